"""Names of CLIP weights, the Hugging Face hub and its cache: from what --backbone was given to a file on this machine.

support/weights.py calls find_weights(), support/identity.py local_weights(). A cache is looked into first, and a file
is fetched whole or not at all. ways_to_the_hub() alone knows that the package huggingface_hub may be installed or not.
"""

import os
import re
from pathlib import Path

from clip_min import ASSETS, UserError
from support.downloads import PlaceError, download
from support.files import expanded, home_folder

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
ELSEWHERE = "set HOME, on Windows USERPROFILE, to another folder, or give a weights file with --backbone"


class NotThere(Exception):
    """The repository has no such file."""


def find_weights(name, check):
    """As local_weights(), but what a name means is fetched at first use. UserError where there is nothing to fetch.

    check(file) raises an error unless a file that was just downloaded can be read to its end.
    """
    found = local_weights(name)
    if found:
        return found
    path, repository = expanded(name), repositories_of(name)[0]
    if path.is_dir():
        kind = "has no weights of a CLIP"
        if (path / "model_index.json").exists():
            kind = "is a diffusion pipeline"
        elif any(path.glob("*.index.json")):
            kind = "has its weights in several files, which are not read together"
        raise UserError(f"The folder {path} {kind}: give one with {' or '.join(CONFIGURATIONS)}.")
    if not is_repository(repository):
        raise UserError(f"There is no weights file {path}: give one, or a name of tiny, {', '.join(OPENAI_MODELS)}, or "
                        "owner/name of a CLIP on huggingface.co.")
    _, fetch = ways_to_the_hub()
    # What is in the cache without its configuration goes first.
    for file in sorted(CONFIGURATIONS, key=lambda file: in_hub_cache(repository, file) is None):
        try:
            return fetch(repository, CONFIGURATIONS[file], file, check)
        except NotThere:
            continue
    raise UserError(f"{repository} on the hub has none of {', '.join(CONFIGURATIONS)}: name another.")


def local_weights(name):
    """The weights file that a name, a folder or a path means, or None where it has to be fetched or there is none."""
    if name == "tiny":
        return ASSETS / "tiny_clip.safetensors.gz"
    path, cache, repositories = expanded(name), home_folder() / ".cache" / "clip", repositories_of(name)
    places = [path, cache / f"{dashes(name)}.pt", cache / f"{dashes(name)}.safetensors"]  # OpenAI's package: the second
    folders = path, cache / repositories[0]
    for place in places + [folder / file for folder in folders for file in CONFIGURATIONS]:
        if os.path.isfile(place):  # also where the home may not be read
            return place
    if path.is_dir() or not is_repository(repositories[0]):
        return None
    is_openais = len(repositories) > 1  # their activation and heads are known; of others the configuration tells them
    for repository in repositories:
        for file, configuration in CONFIGURATIONS.items():
            found = in_hub_cache(repository, file)
            if found and (is_openais or found.with_name(configuration).is_file()):
                return found
    return None


def repositories_of(name):
    """-> those of an OpenAI model; any other name is one itself."""
    return {dashes(model): repositories for model, repositories in OPENAI_MODELS.items()}.get(dashes(name), [name])


def is_repository(name):
    is_file = Path(name).suffix in (".pt", ".bin", ".safetensors")
    return bool(re.fullmatch(r"(?!ViT-)[\w-]+/[\w.-]+", name)) and not is_file


def dashes(name):  # ViT-L/14@336px -> ViT-L-14-336px
    return name.replace("/", "-").replace("@", "-")


def in_hub_cache(repository, file):
    """-> the path of a repository's file in the hub's cache, or None."""
    look_up, _ = ways_to_the_hub()
    is_tower = repository.startswith("timm/") and not file.startswith("open_clip")  # alone, put there by timm
    return None if is_tower else look_up(repository, file)


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
        remedy = f"try again, or put {file} and {configuration} into {own_folder(repository)} by hand"
        if getattr(error, "errno", None):  # its cache cannot be written, or the disk is full
            remedy = "set HF_HOME to another folder"
        raise UserError(f"huggingface_hub could not fetch {repository} ({detail}): {remedy}.") from error


# ---- Without it ----


def own_folder(repository):
    return home_folder() / ".cache" / "clip" / repository


def look_up(repository, file):
    """As the package's: its cache has a folder for each commit, and a note which of them is the newest."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    folder = expanded(cache) / f"models--{repository.replace('/', '--')}"
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
                     token=os.environ.get("HF_TOKEN", "").strip(), elsewhere=ELSEWHERE)
        except PlaceError:  # no mirror would help
            raise
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
