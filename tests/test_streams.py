"""Where the programs print, and in which locale: what support/streams.py promises, shown with the two programs."""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import report
import train
from support import streams
from support.console import show, show_epoch

PROJECT = Path(__file__).parents[1]
NAMES = {"חתול": "red", "猫": "green", "café": "blue"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photographs in class folders with names of three alphabets, and two finished runs on them."""
    folder = tmp_path_factory.mktemp("world")
    for name, colour in NAMES.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32 + i), colour).save(folder / "photos" / name / f"é{i}.png")
    assert train.main(flags(folder, "runs", "--seeds", "1", "2")) == 0
    return folder


def flags(world, out, *others):
    return ["--data", f"{world / 'photos'}", "--backbone", "tiny", "--shots", "2", "--epochs", "2", "--device", "cpu",
            "--out", f"{world / out}", *others]


def finished(out):
    return sorted(path.parent for path in out.rglob("result.json"))


@pytest.fixture(scope="module")
def programs(world):
    """-> {name: status, stdout, stderr} of real programs, one for each processor of a small machine.

    "closed": its shell has closed all of its streams. "c": it runs in the locale C.
    """
    kinds = {"closed": ("<&- >&- 2>&-", {}), "c": ("", C_LOCALE)}
    begun = {}
    for name, (closed, environment) in kinds.items():
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "train.py", *flags(world, name)]
        begun[name] = subprocess.Popen(command, cwd=PROJECT, env=os.environ | environment, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
    outputs = {name: process.communicate() for name, process in begun.items()}
    return {name: (begun[name].returncode, *of_one) for name, of_one in outputs.items()}


# ---- Encodings ----


def test_a_report_shows_what_an_encoding_lacks_in_other_signs(world):
    out = printed("cp1252", report.main, [str(finished(world / "runs")[0])])
    assert re.search(r"^loss          [1-8]{2} from", out, re.MULTILINE)
    for name in r"\u05d7\u05ea\u05d5\u05dc", r"\u732b", "café":
        assert f"| {name} |" in out


def test_a_run_is_printed_in_ascii(world):
    out = printed("ascii", train.main, flags(world, "ascii"))
    assert r"vectors] caf\xe9." in out and finished(world / "ascii")


def printed(encoding, function, *words):
    """-> what a function prints to a stdout in an encoding."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) as stream:
        function(*words)
        stream.flush()
        return stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
@pytest.mark.parametrize("shown, instead", [
    ("41.67 ± 8.33", "41.67 +- 8.33"), ("a → b", "a -> b"), ("▁▂▃▄▅▆▇█", "12345678"), ("half \udcff", r"half \udcff")])
def test_the_programs_own_signs_stay_readable(encoding, shown, instead):
    assert printed(encoding, streams.ready_streams()(print), shown).strip() in (shown, instead)


@pytest.mark.parametrize("encoding, sign", [("cp1252", "±"), ("ascii", "+-")])
def test_the_table_of_all_runs_is_printed_in_any_encoding(world, encoding, sign):
    table = printed(encoding, report.main, ["--out", str(world / "runs")])
    assert f" {sign} 0.00 (2) |" in table and f"mean {sign} standard deviation" in table


# ---- No stream, and odd ones ----


def test_without_a_stream_a_run_is_made_quietly(world, programs):
    assert programs["closed"] == (0, b"", b"")
    (run,), (first, _) = finished(world / "closed"), finished(world / "runs")
    assert (run / "predictions.csv").read_bytes() == (first / "predictions.csv").read_bytes()


def test_without_a_stream_a_mistake_has_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert report.main([str(tmp_path)]) == 2


class Narrow:
    """A tee into a log in cp1252, which can do nothing but write."""

    def __init__(self):
        self.log = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")

    def write(self, text):
        self.log.write(text)


@pytest.mark.parametrize("stream", [None, Narrow(), io.StringIO()], ids=["none", "tee", "text"])
def test_a_run_in_a_program_with_an_odd_stdout(world, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    assert train.main(flags(world, f"odd {type(stream).__name__}")) == 0
    assert report.main([str(finished(world / "runs")[0]), "--predict", str(world / "photos")]) == 0
    assert sys.stdout is stream  # a program that calls another gets its own stream back
    show("a line of data.py, where no program has readied the streams")
    if isinstance(stream, Narrow):
        stream.log.flush()
        assert rb"\u732b" in stream.log.buffer.getvalue()


def test_a_stream_that_is_no_terminal_gets_the_lines_of_a_log(capsys):
    closed = io.StringIO()
    closed.close()
    assert not any(map(streams.is_terminal, [None, Narrow(), io.StringIO(), closed]))
    show_epoch(0, 100, 1.0, "0.1", 5)
    show_epoch(9, 100, 1.0, "0.1", 5)
    assert capsys.readouterr().out.count("epoch ") == 1


# ---- Locales ----


def test_in_the_locale_c_without_utf_8_mode_a_run_is_the_same(world, programs):
    status, stdout, stderr = programs["c"]
    assert (status, stderr) == (0, b"")  # no warning of Python's either
    (run,), (first, _) = finished(world / "c"), finished(world / "runs")
    for file in "predictions.csv", "prompts.pt":
        assert (run / file).read_bytes() == (first / file).read_bytes(), file
    assert "猫".encode() in stdout


@pytest.mark.parametrize("program", [train, report])
def test_both_programs_begin_alike(program):
    """What is shown of one in the tests above holds for the other."""
    assert ast.unparse(ast.parse(Path(program.__file__).read_text("utf-8")).body[-1]) == (
        "if __name__ == '__main__':\n    start(main)")


@pytest.mark.parametrize("encoding, is_begun, output", [
    ("utf-8", False, None), ("UTF8", False, None), ("ascii", True, None), ("iso8859-1", True, "iso8859-1")])
def test_a_locale_that_reads_names_in_another_encoding_begins_the_program_anew(
        monkeypatch, encoding, is_begun, output):
    begun = []
    monkeypatch.setattr(os, "execv", lambda file, words: begun.append(words))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "--data", "x"])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    streams.begin_in_utf8()
    assert begun == is_begun * [[sys.executable, "-X", "utf8", "-u", "train.py", "--data", "x"]]
    assert os.environ.get("PYTHONIOENCODING") == output
