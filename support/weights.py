"""Every other form of CLIP weights: names, the hub, and files in the keys of open_clip, transformers or a training.

clip_min.load_clip() calls load(). A file is fetched whole or not at all, nothing in it is run, and every fault ends in
one sentence that names it and says what to do.
"""

import gzip
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from clip_min import ACTIVATIONS, ASSETS, CLIP, UserError, read_safetensors, read_weights
from support.downloads import MachineError, PlaceError, download
from support.files import expanded, home_folder

HUB = "https://huggingface.co/{}/resolve/main/{}"
ELSEWHERE = "set HOME, on Windows USERPROFILE, to another folder, or give a weights file with --backbone"
OPENAI_MODELS = {  # the repositories from which open_clip takes OpenAI's weights
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai", "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai", "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
CONFIGURATIONS = {  # of the weights files that folders and repositories have: open_clip's, then transformers'
    "open_clip_model.safetensors": "open_clip_config.json", "open_clip_pytorch_model.bin": "open_clip_config.json",
    "model.safetensors": "config.json", "pytorch_model.bin": "config.json",
}


def load(name, activation=None):
    """-> CLIP. load_clip tells what a name may be, and what activation None means."""
    return read_clip(find_weights(name), activation)


# ---- From a name to a file ----


def find_weights(name):
    """The weights file that a name, a folder or a path means. What a name means is fetched at first use."""
    if name == "tiny":
        return ASSETS / "tiny_clip.safetensors.gz"
    path, cache, dashed = expanded(name), home_folder() / ".cache" / "clip", dashes(name)
    repository = {dashes(model): repository for model, repository in OPENAI_MODELS.items()}.get(dashed, name)
    places = [path, cache / f"{dashed}.pt", cache / f"{dashed}.safetensors"]  # OpenAI's package uses the second
    for place in places + [folder / file for folder in (path, cache / repository) for file in CONFIGURATIONS]:
        if os.path.isfile(place):  # also where the home may not be read
            return place
    if path.is_dir():
        kind = "is a diffusion pipeline" if (path / "model_index.json").exists() else "has no weights of a CLIP"
        raise UserError(f"The folder {path} {kind}: give one with {' or '.join(CONFIGURATIONS)}.")
    if not re.fullmatch(r"(?!ViT-)[\w-]+/[\w.-]+", repository) or path.suffix in (".pt", ".bin", ".safetensors"):
        raise UserError(f"There is no weights file {path}: give one, or a name of tiny, {', '.join(OPENAI_MODELS)}, or "
                        "owner/name of a CLIP on huggingface.co.")
    fetch = download_weights if repository in OPENAI_MODELS.values() else fetch_with_huggingface_hub
    found = fetch(repository, cache / repository)
    if found is None:
        raise UserError(f"{repository} on the hub has none of {', '.join(CONFIGURATIONS)}: name another.")
    return found


def dashes(name):  # ViT-L/14@336px -> ViT-L-14-336px
    return name.replace("/", "-").replace("@", "-")


def download_weights(repository, folder, advice=""):
    """Put a repository's weights file and its configuration into folder -> the file, or None if there is none.

    advice: what else a user may do where that fails.
    """
    for file, configuration in CONFIGURATIONS.items():
        try:
            for wanted in configuration, file:
                download(HUB.format(repository, wanted), folder / wanted, check=check_whole, elsewhere=ELSEWHERE)
            return folder / file
        except PlaceError:
            raise
        except UserError as error:
            if getattr(error.__cause__, "code", None) != 404:  # 404: the repository does not have this file
                raise UserError(f"{str(error).removesuffix('.')}{advice}.") from error
    return None


def check_whole(path):
    """Raise an error unless a configuration or a weights file, under its temporary name, can be read to its end."""
    if ".json." in path.name:
        json.loads(path.read_bytes())
    else:
        read_clip(path)


def fetch_with_huggingface_hub(repository, folder):
    """The same, into the cache of that package: it knows mirrors, tokens and offline mode, and resumes a download.

    Where it is not installed our own download has to do, and an error names the package.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        advice = "; pip install huggingface_hub brings its cache, mirrors, tokens and resume"
        return download_weights(repository, folder, advice)
    fault = None
    for file, configuration in CONFIGURATIONS.items():
        try:
            snapshot = Path(hf_hub_download(repository, configuration)).parent  # named after its commit
            return Path(hf_hub_download(repository, file, revision=snapshot.name))
        except Exception as error:  # without a network the cache may still have another of the files
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                fault = error
    if fault:
        detail = " ".join(str(fault).split())[:300]
        of_its_cache = getattr(fault, "errno", None)  # it cannot be written, or the disk is full
        by_hand = f"try again, or put its files into {folder} by hand"
        raise UserError(f"huggingface_hub could not fetch {repository} ({detail}): "
                        f"{'set HF_HOME to another folder' if of_its_cache else by_hand}.") from fault
    return None


# ---- From a file to a CLIP ----


def read_clip(path, activation=None):
    """The CLIP of a weights file, with the configuration beside it. UserError, or MachineError, names the file."""
    with named_faults(path, " is not a whole weights file ({}): download it again."):
        state = read_state(path)
    with named_faults(path, ": These are not the weights of a CLIP ViT: {}."):
        state = openai_keys(state)
        for part, model in LOOKALIKES.items():
            if any(part in key for key in state):
                raise UserError(f"These are the weights of {model}, and only CLIPs with a ViT are supported: use "
                                "ViT-B/16.")
        configuration = read_configuration(path.parent)
        if activation:
            configuration["activation"] = activation
        return build_clip(state, **configuration)


def build_clip(state, activation="quickgelu", vision_heads=None, text_heads=None):
    """CLIP.from_state_dict, and a UserError where a CLIP would come out that cannot compute or computes nonsense."""
    if activation not in ACTIVATIONS:
        raise UserError(f"The activation is {activation}: choose {' or '.join(ACTIVATIONS)}.")
    clip = CLIP.from_state_dict(state, activation, vision_heads, text_heads)
    for name, parameter in clip.named_parameters():
        if not (parameter.numel() and clip.visual.resolution):
            raise UserError("These are not the weights of a CLIP ViT: one of its sizes is 0.")
        if not all(extreme.isfinite() for extreme in parameter.aminmax()):  # both are NaN where a number is
            raise UserError(f"These are not the weights of a CLIP ViT: {name} has numbers that are not finite, "
                            "download it again.")
    return clip


@contextmanager
def named_faults(path, verdict):
    """Whatever is raised becomes a UserError of one sentence: the file, and the verdict with the detail in its {}.

    What the machine is to blame for becomes a MachineError.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a broken file can fail anywhere in the readers
        detail = " ".join(str(error).split())[:200]
        lacks_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in detail  # PyTorch's is a RuntimeError
        if lacks_memory or getattr(error, "errno", None):
            detail = f"{type(error).__name__}, {detail}"
            raise MachineError(f"{path} cannot be read on this machine ({detail}): the file is kept.") from error
        refused = re.search(r"GLOBAL (\S+)", str(error))  # what torch.load calls anything but tensors
        if refused:
            raise UserError(f"{path} looks like a pickled module, it asks for {refused[1]}, and nothing of a file is "
                            "run: save the module's state_dict() where it was made.") from error
        raise UserError(str(path) + verdict.format(detail.rstrip("."))) from error


def read_state(path):
    """As clip_min.read_weights, and gzipped safetensors."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return read_weights(path)
    with gzip.open(path) as file:
        return read_safetensors(file)


def read_configuration(folder):
    """-> {activation, vision_heads, text_heads}, as open_clip or transformers states them in the folder, or {}."""
    for path in folder / "open_clip_config.json", folder / "config.json":
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else {}
            if "model_cfg" in config:
                return from_open_clip_config(config["model_cfg"], folder)
            if config.get("model_type") == "clip":
                return from_transformers_config(config)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not the configuration of a CLIP ({error}), mend or remove it.") from error
    return {}


def from_open_clip_config(config, folder):
    """open_clip's settings, with its default values. Where QuickGELU is not mentioned, the model's name tells it."""
    in_hub_cache = folder.parent.name == "snapshots"  # models--owner--name/snapshots/commit
    name = folder.parents[1].name if in_hub_cache else folder.name
    is_quick = config.get("quick_gelu", name.lower().endswith(("-quickgelu", ".openai")))
    vision, text = config["vision_cfg"], config["text_cfg"]
    vision_heads = vision.get("width", 768) // vision.get("head_width", 64)
    return checked("quickgelu" if is_quick else "gelu", vision_heads, text.get("heads", 8))


def from_transformers_config(config):
    """transformers' settings, with its default values."""
    vision, text = config["vision_config"], config["text_config"]
    activation = vision.get("hidden_act", "quick_gelu").replace("_", "")
    return checked(activation, vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8))


def checked(activation, vision_heads, text_heads):
    """The arguments of CLIP.from_state_dict, which itself makes sure that the activation is known."""
    for heads in vision_heads, text_heads:
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{heads} attention heads")
    return dict(activation=activation, vision_heads=vision_heads, text_heads=text_heads)


LOOKALIKES = {  # what the keys of other models contain
    "visual.layer1.": "a ResNet CLIP", "visual.trunk.": "a SigLIP or another CLIP with an image tower of timm's",
    "vision_model.head.": "a SigLIP", "diffusion_model.": "a diffusion model", "down_blocks.": "a diffusion model",
}
TRANSFORMERS_NAMES = {  # parts of the keys in transformers -> OpenAI's
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.pre_layrnorm": "visual.ln_pre",  # spelled so
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}


def openai_keys(state):
    """Any form of state dict or training checkpoint -> OpenAI's keys; what is not known keeps its key."""
    for wrapper in "state_dict", "model":  # the weights in a checkpoint of open_clip, Lightning or others
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    common = next((key for key in state if key.endswith("logit_scale")), "").removesuffix("logit_scale")  # "module."
    state = {key.removeprefix(common): tensor for key, tensor in state.items()}
    if "text.token_embedding.weight" in state:  # open_clip's CustomTextCLIP
        state = {key.removeprefix("text."): tensor for key, tensor in state.items()}
    if "text_model.embeddings.token_embedding.weight" in state:
        state = from_transformers(state)
    if "logit_bias" in state and state["logit_bias"] == 0:  # open_clip writes one that changes nothing
        del state["logit_bias"]
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())  # some write (1,)
    return state


def from_transformers(state):
    """Rename, join the projections of queries, keys and values, and transpose the two into the joint space."""
    renamed = {}
    for key, tensor in state.items():
        for theirs, openais in TRANSFORMERS_NAMES.items():
            key = key.replace(theirs, openais)
        if not key.endswith("position_ids"):  # 0, 1, 2, ..
            renamed[key] = tensor
    for key in [key for key in renamed if ".self_attn.q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        renamed[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    for key in {"visual.proj", "text_projection"} & renamed.keys():
        renamed[key] = renamed[key].T.contiguous()
    return renamed
