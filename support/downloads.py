"""Downloads: a file is fetched whole or not at all, and known by its hash.

support/hub.py and support/benchmarks.py call download(), this and support/identity.py file_digest(). Whatever goes
wrong is one sentence that names the address and the place where the file can be put by hand.
"""

import errno
import hashlib
import secrets
import sys
import urllib.request
from pathlib import Path

from clip_min import UserError
from support.files import remove_old
from support.streams import is_terminal

TIMEOUT = 60  # seconds without a byte
BYTES_AT_ONCE = 1 << 20


class MachineError(UserError):
    """A file cannot be read for want of memory or permission. It may be whole, so it is kept."""


class PlaceError(UserError):
    """A file cannot be written where it is wanted, so that no other source of it would help."""


def download(url, path, algorithm=None, digest=None, check=None, token=None, elsewhere="give another --root"):
    """Fetch url into path, unless it is there already. UserError in one sentence, whatever goes wrong.

    algorithm: one of hashlib's, or "git" for the id of a git blob; digest: the hex expected. Where the source states
    none, check(file) raises an error if the content is not whole. token: what the host asks for before it gives a file
    that not everybody may have, or None. elsewhere: how the user chooses another place.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # every process has a file of its own
    try:
        if path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_old(path.parent.glob(f"{path.name}.*.part*"))
        part.touch()  # to see whether it can be written
    except OSError as error:
        raise PlaceError(f"{path.parent} cannot be written ({error.strerror}): {elsewhere}.") from error
    print(f"Downloading {url}", file=sys.stderr)
    try:
        fetch(url, part, token)
        if digest and file_digest(part, algorithm) != digest:
            raise ValueError(f"it does not have the {algorithm} hash {digest}")
        if check:
            check(part)
        part.replace(path)
    except MachineError:  # reading the file again will say what the machine lacks
        part.replace(path)
    except Exception as error:  # a malformed answer can fail anywhere in urllib
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # a full disk, or a full share of it
            raise PlaceError(f"{path.parent} is full ({error.strerror}): make room, or {elsewhere}.") from error
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{url} could not be fetched ({detail}): try again, or put it at {path} by hand, for example "
                        "with curl -L -C - -o, which goes on where it broke off.") from error
    finally:
        if part.exists():
            part.unlink()


def fetch(url, path, token):
    """What the host answers -> path. ValueError if it is shorter than the host has said: urllib does not mind."""
    request = urllib.request.Request(url, headers={"User-Agent": "python"})
    if token:  # for this host alone: a redirect leads to another one, which must not see it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        length = answer.headers.get("Content-Length")
        while chunk := answer.read(BYTES_AT_ONCE):
            file.write(chunk)
            if is_terminal(sys.stderr):
                total = f" of {int(length) / 1e6:.0f}" if length else ""
                print(f"\r{file.tell() / 1e6:.0f}{total} MB", end="", file=sys.stderr, flush=True)
        came = file.tell()
    if is_terminal(sys.stderr):
        print(file=sys.stderr)
    if length and came < int(length):
        raise ValueError(f"only {came} of {length} bytes came")


def file_digest(path, algorithm):
    """Hex digest of a file; "git" is git's blob id: sha1 over a short header and the content."""
    h = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if algorithm == "git" else hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(BYTES_AT_ONCE):
            h.update(chunk)
    return h.hexdigest()
