"""Downloads: a file is fetched whole or not at all, and known by its hash.

support/weights.py and support/benchmarks.py call download(), data.py and support/checks.py file_digest(). Whatever goes
wrong is one sentence that names the address and the place where the file can be put by hand.
"""

import hashlib
import secrets
import socket
import sys
from pathlib import Path

import torch

from clip_min import UserError
from support.files import remove_old


class MachineError(UserError):
    """A file cannot be read for want of memory or permission. It may be whole, so it is kept."""


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
        remove_old(path.parent.glob(f"{path.name}.*.part*"))
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
