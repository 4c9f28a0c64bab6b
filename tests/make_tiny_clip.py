"""Make assets/tiny_clip.safetensors.gz, the CLIP of the embedded world: `python tests/make_tiny_clip.py`.

A CLIP ViT of 1.4 M parameters besides its word embeddings (image tower 128 wide, 4 layers, 40x40 pictures in patches
of 8; text tower 128 wide, 3 layers; joint width 128), under OpenAI's key names and with OpenAI's vocabulary. It is
trained from CLIP's own initialisation with CLIP's loss and optimiser on pictures that support.world draws here, from
another random stream than those of the downstream datasets, with captions of the same world.

Two things differ from Radford et al. (2021), both for what a toy lacks and CLIP has:
  * several pictures of a batch can fit a caption ("a striped shape"), so the targets are shared between all that fit;
  * in half of the steps 1 to 10 random tokens are appended at every layer of the image tower. A tower that never saw
    extra tokens loses 15 to 27 points to ten of them before any learning; visual prompts then repair instead of adapt.

Prints loss (above the least possible, the entropy of the shared targets) and time; seeded, on two cores the same again.
"""

import gzip
import json
import math
import random
import struct
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms.functional import normalize

sys.path.insert(0, str(Path(__file__).parents[1]))

from clip_min import CLIP, MEAN, STD, tokenize  # noqa: E402
from support.world import COLOURS, FORMS, RESOLUTION, TEXTURES, draw_picture  # noqa: E402

WIDTH, JOINT, PATCH, VISION_LAYERS, TEXT_LAYERS = 128, 128, 8, 4, 3
PICTURES, STEPS, BATCH, RATE, WARMUP, SEED = 60_000, 1500, 256, 2e-3, 100, 7
VALUES = {"texture": TEXTURES, "colour": tuple(COLOURS), "form": FORMS, "ground": tuple(COLOURS)}

# Openings of 0 to 17 tokens, so that learned contexts of up to 16 vectors meet trained positions.
OPENINGS = (
    "", "a photo of", "a picture of", "this is", "one can see", "a small photo of", "here we look at",
    "this is a picture of", "this is a rather small photo that shows us",
    "in the middle of this small picture one can clearly see",
    "this is one of the many small pictures in which one can clearly see",
)


def scene(rng):
    colour, ground = rng.sample(VALUES["colour"], 2)
    return {"texture": rng.choice(TEXTURES), "colour": colour, "form": rng.choice(FORMS), "ground": ground}


def scenes_and_pictures(rng):
    """Yields PICTURES times (the four values, the picture)."""
    for values in [scene(rng) for _ in range(PICTURES)]:
        zoom = rng.choice((1, 1, rng.uniform(1, 1.7)))
        yield values, draw_picture(rng, **values, noise=rng.uniform(0.05, 0.3), zoom=zoom)


def caption(values, rng):
    """-> a phrase that states some of the values, and which: {"texture": "striped", ...}."""
    said = {key: values[key] for key in VALUES if rng.random() < 0.75}
    if not {"texture", "colour"} & said.keys():
        key = rng.choice(["texture", "colour"])
        said[key] = values[key]
    noun = said.get("form", "shape")
    if {"texture", "colour"} <= said.keys() and rng.random() < 0.2:
        thing = f"{noun} that is {said['colour']} and {said['texture']}"
    else:
        thing = " ".join([said[key] for key in ("texture", "colour") if key in said] + [noun])
    if "ground" not in said:
        return f"a {thing}", said
    ground = said["ground"]
    forms = (f"a {thing} on a {ground} background", f"a {thing} on {ground}", f"a {ground} background with a {thing}",
             f"a {thing} before a {ground} wall", f"a {ground} wall with a {thing}")
    return rng.choice(forms), said


def numbers(values):
    """{"texture": "striped", ...} -> the four values as numbers, -1 for what is not stated."""
    return [options.index(values[key]) if key in values else -1 for key, options in VALUES.items()]


def initial_state():
    """CLIP's initialisation (Radford et al.'s code, initialize_parameters) for these sizes, under OpenAI's keys."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    std = WIDTH**-0.5
    state = {
        "visual.class_embedding": normal(WIDTH, std=std),
        "visual.positional_embedding": normal((RESOLUTION // PATCH) ** 2 + 1, WIDTH, std=std),
        "visual.proj": normal(WIDTH, JOINT, std=std),
        "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH, std=(9 * PATCH * PATCH) ** -0.5),
        "token_embedding.weight": normal(49408, WIDTH, std=0.02),
        "positional_embedding": normal(77, WIDTH, std=0.01),
        "text_projection": normal(WIDTH, JOINT, std=std),
        "logit_scale": torch.tensor(math.log(1 / 0.07)),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower, layers in ("visual.transformer", VISION_LAYERS), ("transformer", TEXT_LAYERS):
        for block in (f"{tower}.resblocks.{i}" for i in range(layers)):
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            linears = {"attn.in_proj_": (3, 1, std), "attn.out_proj.": (1, 1, std * (2 * layers) ** -0.5),
                       "mlp.c_fc.": (4, 1, (2 * WIDTH) ** -0.5), "mlp.c_proj.": (1, 4, std * (2 * layers) ** -0.5)}
            for name, (rows, columns, scale) in linears.items():
                state[f"{block}.{name}weight"] = normal(rows * WIDTH, columns * WIDTH, std=scale)
                state[f"{block}.{name}bias"] = torch.zeros(rows * WIDTH)
    for name in norms:
        state |= {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    return state


def encode_image(visual, images):
    """The image tower, in half of the calls with 1 to 10 random tokens at every layer."""
    x = visual.embed(images)
    n = x.shape[1]
    extra = int(torch.randint(1, 11, ())) if torch.rand(()) < 0.5 else 0
    std = (0.02, 0.1, 0.5)[int(torch.randint(3, ()))]
    for block in visual.blocks:
        tokens = (std * torch.randn(1, extra, WIDTH)).expand(len(x), -1, -1)
        x = block(torch.cat([x[:, :n], tokens], dim=1))
    return visual.project(x)


def shared_target_loss(logits, fits):
    """Cross-entropy of each row against its equal targets, less their entropy: 0 is perfect."""
    targets = fits / fits.sum(dim=1, keepdim=True)
    return -(logits.log_softmax(dim=1) * targets).sum(dim=1).mean() - fits.sum(dim=1).log().mean()


def main():
    started, rng = time.time(), random.Random("pretraining")
    torch.manual_seed(SEED)
    scenes, pixels = [], torch.empty(PICTURES, RESOLUTION, RESOLUTION, 3, dtype=torch.uint8)
    for row, (values, picture) in zip(pixels, scenes_and_pictures(rng), strict=True):
        scenes.append(values)
        row.copy_(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view_as(row))
    truth = torch.tensor([numbers(values) for values in scenes])
    print(f"{PICTURES} pictures drawn in {time.time() - started:.0f} s", flush=True)

    clip = CLIP.from_state_dict(initial_state()).requires_grad_(True)
    parameters = list(clip.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    order, used, mean = [], set(), None
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        if len(order) < BATCH:
            order = rng.sample(range(PICTURES), PICTURES)
        batch, order = order[:BATCH], order[BATCH:]
        opening = rng.choice(OPENINGS)  # one for the batch: the text tower encodes a common beginning once
        phrases, said = zip(*(caption(scenes[i], rng) for i in batch), strict=True)
        tokens = tokenize([f"{opening} {phrase}.".strip() for phrase in phrases])
        used.update(tokens.unique().tolist())
        stated = torch.tensor([numbers(values) for values in said])
        fits = ((stated[:, None] == truth[batch]) | (stated[:, None] < 0)).all(dim=-1).float()  # (captions, pictures)
        images = normalize(pixels[batch].permute(0, 3, 1, 2) / 255, MEAN, STD)

        logits = clip.logits(clip.encode_text(tokens), encode_image(clip.visual, images))
        loss = (shared_target_loss(logits, fits) + shared_target_loss(logits.T, fits.T)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == STEPS - 1:
            scale, seconds = clip.logit_scale.exp().item(), time.time() - started
            print(f"step {step}  loss {mean:.3f}  logit scale {scale:.1f}  {seconds:.0f} s", flush=True)

    rows = clip.text.token_embedding.weight.data
    rows[[i for i in range(len(rows)) if i not in used]] = 0  # never trained: zeros compress
    path = Path(__file__).parents[1] / "assets" / "tiny_clip.safetensors.gz"
    write_safetensors(openai_state(clip), path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {time.time() - started:.0f} s")


def openai_state(clip):
    """Our keys -> OpenAI's, in fp16 as OpenAI's files are."""
    def key(name):
        return name.replace("blocks.", "transformer.resblocks.").removeprefix("text.")

    return {key(name): p.detach().half() for name, p in clip.named_parameters()}


def write_safetensors(state, path):
    """The format that clip_min.read_safetensors reads, gzipped; the same bytes for the same tensors."""
    header, position = {}, 0
    for name, tensor in state.items():
        end = position + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    main()
