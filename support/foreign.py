"""What the official code of CoOp, CoCoOp, ProGrad, VPT, VLP and DPT leaves of a training, under our tensors' names.

support/prompts.py calls read_official() for --prompts. What is not such output, a folder for each part of a trainer
with a file model.pth.tar-N after N epochs, ends in one sentence that names what was found.
"""

import re

import torch

from clip_min import UserError
from support.archives import load_foreign
from support.folders import shortened

# The parts of a trainer, each a folder of its output, and the keys in their files -> our tensors. A # is the number of
# a class-aware layer. Where two parts hold the same tensor, its layers are joined in this order.
TEXT = {"prompt_learner": {"ctx": "ctx"}}
META_NET = {"prompt_learner": {"ctx": "ctx",
    "meta_net.linear1.weight": "meta_net.0.weight", "meta_net.linear1.bias": "meta_net.0.bias",
    "meta_net.linear2.weight": "meta_net.2.weight", "meta_net.linear2.bias": "meta_net.2.bias"}}  # fmt: skip
VISUAL = {"image_encoder.transformer.ctx_learner": {"ctx": "visual_prompts"}}
CLASS_AWARE = {"image_encoder.transformer.extractor": {"ctx": "visual_prompts",
    "meta_nets.#.weight": "cavpt.#.fc.weight", "meta_nets.#.bias": "cavpt.#.fc.bias",
    "attns.#.qmlp.weight": "cavpt.#.w_q.weight", "attns.#.kmlp.weight": "cavpt.#.w_k.weight",
    "attns.#.vmlp.weight": "cavpt.#.w_v.weight", "classfiers.#.weight": "cavpt.#.aux_classifier.weight",  # spelled so
    "lns.#.weight": "cavpt.#.ln_o.weight", "lns.#.bias": "cavpt.#.ln_o.bias",
    "lns2.#.weight": "cavpt.#.ln_p.weight", "lns2.#.bias": "cavpt.#.ln_p.bias"}}  # fmt: skip
OFFICIAL = {"coop": TEXT, "cocoop": META_NET, "prograd": TEXT, "vpt": VISUAL, "vlp": VISUAL | TEXT,
            "dpt": VISUAL | CLASS_AWARE | TEXT}
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EMBEDDINGS = "token_prefix", "token_suffix"  # CLIP's own, of what stands around the context of the classes trained on


def read_official(path, method):
    """An output folder, or one file where the method has one part -> {our name: tensor}, {of EMBEDDINGS: tensor}."""
    if method not in OFFICIAL:
        raise UserError(f"{path} has no prompts.pt of a run of {method}, and files of the official code are read for "
                        f"{', '.join(OFFICIAL)} only: give the folder of a run.")
    parts, files = OFFICIAL[method], find_parts(path)
    is_known = files.keys() & {part for parts_of_one in OFFICIAL.values() for part in parts_of_one}
    if len(files) == len(parts) == 1 and not is_known:  # a file, or a folder, that was given another name
        files = dict(zip(parts, files.values(), strict=True))
    if files.keys() != parts.keys():
        raise UserError(f"{path} has {' and '.join(files) or 'no part'} of a trainer, and {method} is "
                        f"{' and '.join(parts)}: {where_else(path, files)}.")
    tensors, embeddings = {}, {}
    for part, names in parts.items():
        for key, tensor in read_state(files[part]).items():
            number = NUMBER.search(key)
            name = names.get(NUMBER.sub("#", key))
            if key in EMBEDDINGS:
                embeddings[key] = tensor
            elif name:
                name = name.replace("#", number[0]) if number else name
                tensors[name] = join(tensors[name], tensor, path) if name in tensors else tensor
            else:
                others = [other for other, those in OFFICIAL.items() if NUMBER.sub("#", key) in those.get(part, {})]
                raise UserError(f"{files[part]} has {key}, for which {method} has no place: it is of "
                                f"{' or '.join(others) or 'a method that is not known here'}.")
    return tensors, embeddings


def find_parts(path):
    """-> {name of a part: its file}."""
    if path.is_file():
        return {path.parent.name: path}
    folders = [path] if model_file(path) else sorted(inside for inside in path.iterdir() if inside.is_dir())
    return {folder.name: model_file(folder) for folder in folders if model_file(folder)}


def model_file(folder):
    """-> the file of the last epoch: the one that `checkpoint` names, else that of the most epochs, else the best."""
    note = folder / "checkpoint"
    named = folder / note.read_text("utf-8", "replace").strip() if note.is_file() else folder
    if named.is_file():
        return named
    files = [file for file in folder.glob("model.pth.tar-*") if file.name.rpartition("-")[2].isdecimal()]
    files.sort(key=lambda file: int(file.name.rpartition("-")[2]))
    best = folder / "model-best.pth.tar"
    return files[-1] if files else best if best.is_file() else None


def where_else(path, found):
    """What to do where a path does not have the parts of a method."""
    fitting = [method for method, parts in OFFICIAL.items() if parts.keys() == found.keys()]
    runs = {str(file.parents[1]) for file in path.rglob("model*.pth.tar*")} - {str(path), str(path.parent)}
    runs |= {str(file.parent) for file in path.rglob("prompts.pt")}
    if fitting:
        return f"give --method {' or '.join(fitting)}"
    return f"give one of {shortened(sorted(runs))}" if runs else "give the folder that has these"


def read_file(path):
    """-> what torch.save was given, as load_foreign(). UserError if the file is no whole one of torch.save."""
    try:
        return load_foreign(path)
    except Exception as error:  # any file can stand there
        if getattr(error, "errno", None):  # the machine's trouble, not the file's
            raise UserError(f"{path} cannot be read ({error.strerror}): see to it, or give another file.") from error
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:100].rstrip(".")
        raise UserError(f"{path} is no whole file of torch.save ({detail}): copy or download it again.") from error


def read_state(file):
    """-> {key: tensor}, fp32, of a file of Dassl's."""
    state = read_file(file)
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{file} has no learned tensors under state_dict: give a model.pth.tar of the official code.")
    return {str(key).removeprefix("module."): tensor.float() for key, tensor in state.items()}  # of several GPUs


def join(below, above, path):
    """Visual prompts (b, P, D) of the layers below and (L-b, P, D) of those above -> (L, P, D)."""
    if below.shape[1:] != above.shape[1:]:
        raise UserError(f"{path} has visual prompts {tuple(below.shape)} and {tuple(above.shape)} in its two parts: "
                        "all layers need the same number of them here.")
    return torch.cat([below, above])
