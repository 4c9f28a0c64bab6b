"""Names of CLIP weights, the Hugging Face hub and its cache: from what --backbone was given to a file on this machine.

support/weights.py calls find_weights(). A cache is looked into first, and a file is fetched whole or not at all.
ways_to_the_hub() alone knows that the package huggingface_hub may be installed or not.
"""

import os
import re
from pathlib import Path

from clip_min import ASSETS, UserError
from support.downloads import download

OPENAI_MODELS = {  # the repositories of OpenAI's weights: open_clip's, from which they are fetched, and transformers'
    "ViT-B/32": ("timm/vit_base_patch32_clip_224.openai", "openai/clip-vit-base-patch32"),
    "ViT-B/16": ("timm/vit_base_patch16_clip_224.openai", "openai/clip-vit-base-patch16"),
    "ViT-L/14": ("timm/vit_large_patch14_clip_224.openai", "openai/clip-vit-large-patch14"),
    "ViT-L/14@336px": ("timm/vit_large_patch14_clip_336.openai", "openai/clip-vit-large-patch14-336"),
}
CONFIGURATIONS = {  # of the weights files that folders and repositories have: open_clip's, then transformers'
    "open_clip_model.safetensors": "open_clip_config.json", "open_clip_pytorch_model.bin": "open_clip_config.json",
    "model.safetensors": "config.json", "pytorch_model.bin": "config.json",
}
YES = ("1", "ON", "YES", "TRUE")


class NotThere(Exception):
    """The repository has no such file."""


def find_weights(name, check):
    """The weights file that a name, a folder or a path means. What a name means is fetched at first use.

    check(file) raises an error unless a file that was just downloaded can be read to its end.
    """
    if name == "tiny":
        return ASSETS / "tiny_clip.safetensors.gz"
    path, cache, dashed = Path(name).expanduser(), Path.home() / ".cache" / "clip", dashes(name)
    openais = {dashes(model): repositories for model, repositories in OPENAI_MODELS.items()}
    repositories = openais.get(dashed, [name])
    places = [path, cache / f"{dashed}.pt", cache / f"{dashed}.safetensors"]  # OpenAI's package uses the second
    folders = path, cache / repositories[0]
    for place in places + [folder / file for folder in folders for file in CONFIGURATIONS]:
        if place.is_file():
            return place
    if path.is_dir():
        kind = "has no weights of a CLIP"
        if (path / "model_index.json").exists():
            kind = "is a diffusion pipeline"
        elif any(path.glob("*.index.json")):
            kind = "has its weights in several files, which are not read together"
        raise UserError(f"The folder {path} {kind}: give one with {' or '.join(CONFIGURATIONS)}.")
    if not re.fullmatch(r"(?!ViT-)[\w-]+/[\w.-]+", repositories[0]) or path.suffix in (".pt", ".bin", ".safetensors"):
        raise UserError(f"There is no weights file {path}: give one, or a name of tiny, {', '.join(OPENAI_MODELS)}, or "
                        "owner/name of a CLIP on huggingface.co.")
    return find_on_hub(repositories, dashed in openais, check)


def dashes(name):  # ViT-L/14@336px -> ViT-L-14-336px
    return name.replace("/", "-").replace("@", "-")


def find_on_hub(repositories, openais, check):
    """The weights file of the first repository that the hub's cache has, else of the first, which is fetched.

    openais: their activation and heads are known. Other weights need the configuration beside them, which tells.
    """
    look_up, fetch = ways_to_the_hub()

    def cached(repository, file):
        is_tower = repository.startswith("timm/") and not file.startswith("open_clip")  # alone, put there by timm
        return None if is_tower else look_up(repository, file)

    for repository in repositories:
        for file, configuration in CONFIGURATIONS.items():
            found = cached(repository, file)
            if found and (openais or found.with_name(configuration).is_file()):
                return found
    for file in sorted(CONFIGURATIONS, key=lambda file: cached(repositories[0], file) is None):  # what is there first
        try:
            return fetch(repositories[0], CONFIGURATIONS[file], file, check)
        except NotThere:
            continue
    raise UserError(f"{repositories[0]} on the hub has none of {', '.join(CONFIGURATIONS)}: name another.")


def ways_to_the_hub():
    """-> look_up(repository, file) in the cache, a path or None, and fetch(repository, configuration, file, check).

    fetch() gives the file with its configuration in the same folder. It raises NotThere, or UserError in one sentence.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return look_up, fetch
    return look_up_by_package, fetch_by_package


# ---- With huggingface_hub: it knows caches, mirrors, tokens and offline mode, and resumes a download ----


def look_up_by_package(repository, file):
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)  # None, or an object where the hub is known not to have it
    return Path(found) if isinstance(found, str) else None


def fetch_by_package(repository, configuration, file, check):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    try:
        snapshot = Path(hf_hub_download(repository, configuration)).parent  # named after its commit
        return Path(hf_hub_download(repository, file, revision=snapshot.name))
    except Exception as error:
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        if status == 404 or isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise NotThere from error
        detail = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"huggingface_hub could not fetch {repository} ({detail}): try again, or put {file} and "
                        f"{configuration} into {own_folder(repository)} by hand.") from error


# ---- Without it ----


def own_folder(repository):
    return Path.home() / ".cache" / "clip" / repository


def look_up(repository, file):
    """As the package's: its cache has a folder for each commit, and a note which of them is the newest."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    folder = Path(cache).expanduser() / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text("utf-8").strip()
        found = folder / "snapshots" / commit / file
        return found if found.is_file() else None
    except (OSError, ValueError):  # it is not there, no text, or somebody else's
        return None


def fetch(repository, configuration, file, check):
    """Our own download, which begins anew where one broke off. Weights in the hub's cache that lack only their
    configuration get it there, from their own commit."""
    cached = look_up(repository, file)
    folder, revision = (cached.parent, cached.parent.name) if cached else (own_folder(repository), "main")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in YES:
        if cached:
            raise UserError(f"{cached} lacks {configuration} beside it, which tells the activation, and HF_HUB_OFFLINE "
                            "forbids to fetch it: put it there, or give this file to --backbone with --activation.")
        raise UserError(f"{repository} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: put {file} "
                        f"and {configuration} into {folder} by hand, or unset HF_HUB_OFFLINE.")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if "://" not in endpoint:
        raise UserError(f"HF_ENDPOINT is {endpoint}, which is no address: write https://{endpoint}.")
    for wanted in configuration, file:
        try:
            download(f"{endpoint}/{repository}/resolve/{revision}/{wanted}", folder / wanted, check=check,
                     token=os.environ.get("HF_TOKEN", "").strip())
        except UserError as error:
            code = getattr(error.__cause__, "code", None)
            if code == 404:
                raise NotThere from error
            if code in (401, 403):
                raise UserError(f"{endpoint} does not give {repository} to everybody (HTTP {code}): if its name is "
                                "right, accept its licence and set HF_TOKEN to a token of your account.") from error
            raise UserError(f"{str(error).removesuffix('.')}; HF_ENDPOINT may name a mirror, and pip install "
                            "huggingface_hub brings resume.") from error
    return folder / file
