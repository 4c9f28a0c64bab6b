"""Files and folders on a disk: made whole or not at all, and refused by the machine in one sentence.

data.load() and support/folders.py read inside readable(), support/lists.py and support/names.py with read_text().
support/benchmarks.py and support/world.py make folders with working_folder(). support/downloads.py and support/runs.py
remove what killed processes left. support/hub.py keeps what it fetches below home_folder(), and what a user calls a
place is expanded().
"""

import glob
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from clip_min import UserError


@contextmanager
def readable(folder):
    """What the machine refuses in the block, and a text that is not in UTF-8, become a UserError."""
    try:
        yield
    except OSError as error:  # a folder that may not be read, a full disk, a root that is a file
        raise UserError(f"{error.filename or folder} cannot be used ({error.strerror}): give another folder") from error
    except UnicodeDecodeError as error:
        raise UserError(f"a list or classnames.txt of {folder} is not in UTF-8 ({error}): save it as UTF-8") from error


def read_text(file):
    """-> the text of a list that a user has made: UTF-8 with a byte order mark or without, or UTF-16 with one."""
    content = file.read_bytes()
    is_utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # PowerShell's > and others
    return content.decode("utf-16" if is_utf_16 else "utf-8-sig")


def expanded(path):
    """-> the Path with a home in place of its ~. Where no user has the name behind the ~, it stays as it is."""
    return Path(os.path.expanduser(path))


def home_folder():
    """-> the user's home. Where nothing tells it, as in some containers, the present folder takes its place."""
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()


@contextmanager
def working_folder(folder, inside):
    """Make a folder whole or not at all: in a temporary one beside it, whose folder `inside` is then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        yield Path(temporary)
        try:
            Path(temporary, inside).rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def clear_leftovers(folder):
    """Remove the old temporary folders beside `folder`."""
    remove_old(folder.parent.glob(f".{glob.escape(folder.name)}.*"))


def remove_old(paths):
    """Remove those of the temporary files and folders that a killed process left behind more than an hour ago."""
    for path in paths:
        with suppress(FileNotFoundError):  # another process may remove it, too, or have renamed its own meanwhile
            if time.time() - path.stat().st_mtime > 3600:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
