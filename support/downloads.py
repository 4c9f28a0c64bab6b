"""Downloads: a file is fetched whole or not at all, and known by its hash.

support/weights.py and support/benchmarks.py call download(), data.py and support/checks.py file_digest(). Whatever goes
wrong is one sentence that names the address and the place where the file can be put by hand.
"""

import errno
import hashlib
import secrets
import socket
import sys
from pathlib import Path

import torch

from clip_min import UserError
from support.files import remove_old
from support.streams import is_terminal


class MachineError(UserError):
    """A file cannot be read for want of memory or permission. It may be whole, so it is kept."""


class PlaceError(UserError):
    """A file cannot be written where it is wanted, so that no other source of it would help."""


def download(url, path, algorithm=None, digest=None, check=None, elsewhere="give another --root"):
    """Fetch url into path, unless it is there already. UserError in one sentence, whatever goes wrong.

    algorithm: one of hashlib's, or "git" for the id of a git blob; digest: the hex expected. Where the source states
    none, check(file) raises an error if the content is not whole: torch.hub takes a closed connection for the end.
    elsewhere: how the user chooses another place.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # every process has a file of its own
    try:
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_old(path.parent.glob(f"{path.name}.*.part*"))
        part.touch()  # to see whether it can be written
        part.unlink()
    except OSError as error:
        raise PlaceError(f"{path.parent} cannot be written ({error.strerror}): {elsewhere}.") from error
    print(f"Downloading {url}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        torch.hub.download_url_to_file(url, str(part), progress=is_terminal(sys.stderr))
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
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # a full disk, or a full share of it
            raise PlaceError(f"{path.parent} is full ({error.strerror}): make room, or {elsewhere}.") from error
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
