"""What the image tower looks at: attention weights of its last block, whatever the method puts into it.

report.py draws them beside the pictures of read_pictures(). They are taken while the method encodes the pictures, so no
method needs to know of it.
"""

from pathlib import Path

import torch
from PIL import ImageOps

import data
from clip_min import preprocess
from support import charts


def read_pictures(files, method):
    """-> images (B, 3, R, R), and for each a row of a sheet, which begins with the square that CLIP sees."""
    transform = preprocess(method.clip.visual.resolution)
    pictures = [data.read(file, own=True) for file in files]
    images = torch.stack([transform(picture) for picture in pictures]).to(method.clip.logit_scale.device)
    squares = [ImageOps.fit(picture, (charts.THUMBNAIL, charts.THUMBNAIL)) for picture in pictures]
    return images, [[(square, [Path(file).name])] for square, file in zip(squares, files, strict=True)]


def maps(method, images):
    """images (B, 3, R, R) -> {title: (B, N)}, maps over the patches. The method's own, or else CLIP's attention.

    CLIP's is that of the class token to the patches in the last block, the mean of the heads.
    """
    n = len(method.clip.visual.positional_embedding)  # class token and patches
    return method.attention(images) or {"attention": weights(method, images)[:, :, 0, 1:n].mean(dim=1)}


@torch.no_grad()
def weights(method, images):
    """images (B, 3, R, R) -> the attention weights of the image tower's last block (B, H, T, T+P), rows sum to 1.

    The T tokens that look are the class token, the patches, and what a method put behind them. Those that are looked at
    are the same and P more, the block's own prompts, which are keys and values only.
    """
    inputs, last_block = [], method.clip.visual.blocks[-1]
    hook = last_block.register_forward_pre_hook(lambda block, *given: inputs.append(given), with_kwargs=True)
    try:
        method.encode_image(images, method.encode_text())
    finally:
        hook.remove()
    args, kwargs = inputs[-1]  # the last call's: DPT runs the tower without prompts first
    return last_block.attention_weights(*args, **kwargs)
