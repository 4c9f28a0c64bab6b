"""Where a program prints, and in which encoding: neither ever ends a run.

support/console.py calls begin_in_utf8() and ready_streams() for train.py and report.py, and is_terminal(), as
support/downloads.py does. What a console or a pipe cannot show is replaced, and without any stream nothing is printed.
"""

import codecs
import os
import sys
from contextlib import contextmanager

INSTEAD = dict(zip("±→▁▂▃▄▅▆▇█", ["+-", "->", *"12345678"], strict=True))  # of the signs that the programs print


def replace_lacking(error):
    """For codecs: characters that an encoding lacks become what stands in INSTEAD, or their codes, such as \\u732b."""
    lacking = error.object[error.start : error.end]
    shown = [INSTEAD.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking]
    return "".join(shown), error.end


codecs.register_error("replace_lacking", replace_lacking)


@contextmanager
def ready_streams():
    """In the block stdout and stderr take every text, also where there are none."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(ready, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def ready(stream):
    """-> the stream, or what takes its place."""
    if stream is None:  # under pythonw, as some services, and where a shell has closed it
        # This takes the number of the closed stream, too. Else a file of the run could get it, and with it what a
        # library in C prints.
        return open(os.devnull, "w", encoding="utf-8")
    if not hasattr(stream, "reconfigure"):
        return Tee(stream)
    stream.reconfigure(errors="replace_lacking")
    return stream


class Tee:
    """A stream that is no file, such as one that writes into two others. It may be able to do nothing but write."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            return self.stream.write(text.encode("ascii", "replace_lacking").decode())

    def flush(self):
        if hasattr(self.stream, "flush"):
            self.stream.flush()


def is_terminal(stream):
    """-> whether a stream is a terminal. There may be no stream, or one that cannot say."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a closed file raises the second
        return False


def begin_in_utf8():
    """Where Python reads names and arguments in another encoding, begin the program anew in Python's UTF-8 mode.

    That is so in old locales, and in the locale C with UTF-8 mode switched off. The names of classes and files, and so
    the prompts and the predictions, would not be those of other machines.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    if encoding != "utf-8":
        if encoding != "ascii":  # the terminal of such a locale shows nothing else
            os.environ.setdefault("PYTHONIOENCODING", encoding)
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
