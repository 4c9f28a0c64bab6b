"""Every other form of CLIP weights: files in the keys of open_clip, transformers or a training, wherever they lie.

clip_min.load_clip() calls load(). support/hub.py finds the file of a name, and support/kinds.py knows what is no CLIP.
Nothing in a file is run, and every fault ends in one sentence that names it and says what to do.
"""

import gzip
import json
from contextlib import contextmanager

import torch

from clip_min import ACTIVATIONS, CLIP, UserError, read_safetensors
from support.archives import is_torchscript, load_foreign, load_torchscript
from support.downloads import MachineError
from support.folders import shortened, warn
from support.hub import find_weights
from support.kinds import find_clip, require_known_form


def load(name, activation=None):
    """-> CLIP. load_clip tells what a name may be, and what activation None means."""
    path = find_weights(name, check_whole)
    clip, left_out = read_clip(path, activation)
    if left_out:
        warn(f"{path} holds more than a CLIP, left out: {shortened(left_out)}")
    return clip


def check_whole(path):
    """Raise an error unless a configuration or a weights file, under its temporary name, can be read to its end."""
    if ".json." in path.name:
        json.loads(path.read_bytes())
    else:
        read_clip(path)


# ---- From a file to a CLIP ----


def read_clip(path, activation=None):
    """A weights file, with the configuration beside it -> its CLIP, and the names of what was left out.

    UserError, or MachineError, names the file.
    """
    with named_faults(path, " is not a whole weights file ({}): download it again."):
        content = read_state(path)
    with named_faults(path, ": These are not the weights of a CLIP ViT: {}."):
        state, left_out = find_clip(content)
        configuration = read_configuration(path.parent)
        if activation:
            configuration["activation"] = activation
        return build_clip(openai_keys(state), **configuration), left_out


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
        raise UserError(str(path) + verdict.format(detail.rstrip("."))) from error


def read_state(path):
    """What the file holds, in any of its forms: in most cases {key: tensor}. See load_foreign()."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"\x1f\x8b":
        with gzip.open(path) as file:
            return read_safetensors(file)
    if start[8:] == b"{":
        with open(path, "rb") as file:
            return read_safetensors(file)
    if is_torchscript(path):
        return load_torchscript(path)
    require_known_form(path)
    return load_foreign(path)


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
    """A CLIP's keys in any form -> OpenAI's; what is not known keeps its key."""
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
