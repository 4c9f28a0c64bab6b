"""Weights of CLIPs: where they are found or fetched, the forms they come in, and what a configuration says of them.

A name, a folder or a file -> find_weights -> read_weights -> openai_keys -> CLIP.from_state_dict
"""

import gzip
import hashlib
import json
import pickle
import secrets
import socket
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import regex
import torch

from clip_min import ASSETS, CLIP, UserError

HUB = "https://huggingface.co/{}/resolve/main/{}"
OPENAI_MODELS = {  # the repositories from which open_clip takes OpenAI's weights
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai", "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai", "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}
CONFIGURATIONS = {  # of the weights files that folders and repositories have: open_clip's, then transformers'
    "open_clip_model.safetensors": "open_clip_config.json", "open_clip_pytorch_model.bin": "open_clip_config.json",
    "model.safetensors": "config.json", "pytorch_model.bin": "config.json",
}


class MachineError(UserError):
    """A file cannot be read for want of memory or permission. It may be whole, so it is kept."""


def find_weights(name):
    """The weights file that a name, a folder or a path means. What a name means is fetched at first use."""
    if name == "tiny":
        return ASSETS / "tiny_clip.safetensors.gz"
    path, cache, dashed = Path(name).expanduser(), Path.home() / ".cache" / "clip", dashes(name)
    repository = {dashes(model): repository for model, repository in OPENAI_MODELS.items()}.get(dashed, name)
    places = [path, cache / f"{dashed}.pt", cache / f"{dashed}.safetensors"]  # OpenAI's package uses the second
    for place in places + [folder / file for folder in (path, cache / repository) for file in CONFIGURATIONS]:
        if place.is_file():
            return place
    if path.is_dir():
        kind = "is a diffusion pipeline" if (path / "model_index.json").exists() else "has no weights of a CLIP"
        raise UserError(f"The folder {path} {kind}: give one with {' or '.join(CONFIGURATIONS)}.")
    if not regex.fullmatch(r"(?!ViT-)[\w-]+/[\w.-]+", repository) or path.suffix in (".pt", ".bin", ".safetensors"):
        raise UserError(f"There is no weights file {path}: give one, or a name of tiny, {', '.join(OPENAI_MODELS)}, or "
                        "owner/name of a CLIP on huggingface.co.")
    for file, configuration in CONFIGURATIONS.items():
        try:
            for wanted in configuration, file:
                download(HUB.format(repository, wanted), cache / repository / wanted, check=check_whole)
            return cache / repository / file
        except UserError as error:
            if getattr(error.__cause__, "code", None) != 404:  # 404: the repository does not have this file
                raise
    raise UserError(f"{repository} on the hub has none of {', '.join(CONFIGURATIONS)}: name another.")


def dashes(name):  # ViT-L/14@336px -> ViT-L-14-336px
    return name.replace("/", "-").replace("@", "-")


def check_whole(path):
    """Raise an error unless a configuration or a weights file, under its temporary name, can be read to its end."""
    if ".json." in path.name:
        json.loads(path.read_bytes())
    else:
        read_clip(path, path.parent)


def download(url, path, algorithm=None, digest=None, check=None):
    """Fetch url into path, unless it is there already. UserError in one sentence, whatever goes wrong.

    algorithm: one of hashlib's, or "git" for the id of a git blob; digest: the hex expected. Where the source states
    none, check(file) raises an error if the content is not whole: torch.hub takes a closed connection for the end.
    """
    path = Path(path)
    if path.is_file():
        return
    print(f"Downloading {url}", file=sys.stderr)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # every process has a file of its own
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{path.name}.*.part*"):  # of processes that were killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        if digest and file_digest(part, algorithm) != digest:
            raise ValueError(f"it does not have the {algorithm} hash {digest}")
        if check:
            check(part)
        part.replace(path)
    except MachineError:  # reading the file again will say what the machine lacks
        part.replace(path)
    except Exception as error:  # a malformed answer can fail anywhere in urllib
        if part.exists():
            part.unlink()
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{url} could not be fetched ({detail}): try again, or put it at {path} by hand, for example "
                        "with curl -L -C - -o, which goes on where it broke off.") from error
    finally:
        socket.setdefaulttimeout(timeout)


def file_digest(path, algorithm):
    """Hex digest of a file; "git" is git's blob id: sha1 over a short header and the content."""
    h = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if algorithm == "git" else hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


def read_clip(path, folder, activation=None):
    """The CLIP of a weights file, with the configuration in folder. UserError, or MachineError, names the file."""
    try:
        configuration = read_configuration(folder)
        if activation:
            configuration["activation"] = activation
        state = openai_keys(read_weights(path))
        for part, model in LOOKALIKES.items():
            if any(part in key for key in state):
                raise UserError(f"these are the weights of {model}, and only CLIPs with a ViT are supported, "
                                "use ViT-B/16.")
        return CLIP.from_state_dict(state, **configuration)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a broken file can fail anywhere in the readers
        detail = " ".join(str(error).split())
        if lacks_memory(error) or getattr(error, "errno", None):
            detail = f"{type(error).__name__}, {detail[:200]}"
            raise MachineError(f"{path} cannot be read on this machine ({detail}): the file is kept.") from error
        if "GLOBAL" in detail:  # what torch.load calls anything but tensors
            found = detail.split("GLOBAL ")[1].split()[0]
            raise UserError(f"{path} looks like a pickled module, it asks for {found}, and nothing of a file is run: "
                            "save the module's state_dict() where it was made.") from error
        raise UserError(f"{path} is not a whole weights file ({detail[:200]}): download it again.") from error


def lacks_memory(error):
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)  # PyTorch's is a plain RuntimeError


def read_configuration(folder):
    """-> activation, vision_heads, text_heads, as open_clip or transformers states them in the folder, or {}."""
    for path in folder / "open_clip_config.json", folder / "config.json":
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else {}
            if "model_cfg" in config:  # open_clip, with its default values
                quick = config["model_cfg"].get("quick_gelu", folder.name.lower().endswith(("-quickgelu", ".openai")))
                vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
                vision_heads = vision.get("width", 768) // vision.get("head_width", 64)
                return dict(activation="quickgelu" if quick else "gelu", vision_heads=vision_heads,
                            text_heads=text.get("heads", 8))
            if config.get("model_type") == "clip":  # transformers, with its default values
                vision, text = config["vision_config"], config["text_config"]
                activation = vision.get("hidden_act", "quick_gelu").replace("_", "")
                return dict(activation=activation, vision_heads=vision.get("num_attention_heads", 12),
                            text_heads=text.get("num_attention_heads", 8))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not the configuration of a CLIP ({error}), mend or remove it.") from error
    return {}


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


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
TORCHSCRIPT_NAMES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "OrderedDict": OrderedDict,
    "_rebuild_tensor_v2": lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset),
}


def read_weights(path):
    """What is in OpenAI's TorchScript archive, a safetensors file (also gzipped), or a file of torch.save.

    Recognised by content, not by name. No code of the file is run.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    gzipped = head[:2] == b"\x1f\x8b"
    if gzipped or head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        with gzip.open(path) if gzipped else open(path, "rb") as file:
            return read_safetensors(file)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(archive)
    with open(path, "rb") as file:  # torch.load goes by the name if it gets one
        return torch.load(file, map_location="cpu", weights_only=True)


def read_safetensors(file):
    """Eight bytes of header length, a JSON header {key: dtype, shape, [begin, end)}, raw little-endian tensors."""
    length = int.from_bytes(file.read(8), "little")
    if length > 100_000_000:  # the format's limit
        raise ValueError("its header is too long")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    state, position = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        raw = bytearray(file.read(end - begin))
        if begin != position or len(raw) != end - begin:
            raise ValueError(f"the data of {key} is not all there")
        state[key] = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
        position = end
    if file.read(1):  # reading to the end also has gzip check its sum
        raise ValueError("there is more behind the last tensor")
    return state


def read_torchscript(archive):
    """Its pickle names modules and tensors: only tensors and containers are built, the archive's code is not read."""
    root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")

    class Module:
        """Stands for a module of the archive; unpickling fills its __dict__ with parameters and submodules."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):  # nothing but these, whatever it asks for
            return Module if module.startswith("__torch__") else TORCHSCRIPT_NAMES[name]

        def persistent_load(self, record):
            _, dtype, key, _, _ = record  # "storage", type, key, device, number of elements
            return torch.frombuffer(bytearray(archive.read(f"{root}data/{key}")), dtype=dtype)

    with archive.open(root + "data.pkl") as file:
        modules, state = [("", Unpickler(file).load())], {}
    for prefix, module in modules:  # the list grows while it is walked
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                state[prefix + name] = value
            elif isinstance(value, Module):
                modules.append((f"{prefix}{name}.", value))
        if len(modules) > 10_000:  # they contain each other
            raise ValueError("it has too many modules")
    return state
