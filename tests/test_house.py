"""The house: files that stay small, arrows that run one way, two doors, and nothing that is said in two places.

What a reader needs to understand the methods stands in front; what makes the programs practical stands behind the doors
support/ and baselines/. These tests read the sources and import none of them.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ["coop", "vpt", "dpt", "upt", "fgvpl"]
SOURCES = sorted(path.relative_to(ROOT).as_posix()
                 for pattern in ("*.py", "support/*.py", "baselines/*.py") for path in ROOT.glob(pattern))
BASELINES, SUPPORT = ([file for file in SOURCES if file.startswith(door)] for door in ("baselines/", "support/"))

# Every line counts, docstrings too. A file that grows beyond its budget holds something that belongs elsewhere.
BUDGETS = {
    "README.md": 320,
    "clip_min.py": 560, "coop.py": 110, "vpt.py": 80, "dpt.py": 290, "upt.py": 190, "fgvpl.py": 340,
    "data.py": 350, "train.py": 350, "report.py": 350,
    "support/settings.py": 170, "support/runs.py": 270, "support/machine.py": 130, "support/weights.py": 330,
    "support/benchmarks.py": 280, "support/folders.py": 200, "support/world.py": 110, "support/summary.py": 170,
    "support/charts.py": 260,
    "support/__init__.py": 5, "support/apart.py": 70, "support/archives.py": 190, "support/attention.py": 55,
    "support/changes.py": 200, "support/checks.py": 135, "support/console.py": 85, "support/downloads.py": 95,
    "support/files.py": 85, "support/fonts.py": 195, "support/foreign.py": 120, "support/formats.py": 70,
    "support/hub.py": 195, "support/identity.py": 100, "support/kinds.py": 180, "support/lists.py": 180,
    "support/loading.py": 45, "support/names.py": 80, "support/output.py": 75, "support/own.py": 120,
    "support/pictures.py": 75, "support/prompts.py": 150, "support/results.py": 170, "support/scores.py": 60,
    "support/streams.py": 90,
} | dict.fromkeys(BASELINES, 110)

TOP_LEVEL = {"README.md", "requirements.txt", "LICENSE", "clip_min.py", *(f"{name}.py" for name in METHODS), "data.py",
             "train.py", "report.py", "baselines", "support", "docs", "tests", "assets", ".ci", ".gitignore"}

INSTALLED = {"torch", "torchvision", "ftfy", "regex", "PIL"}
IF_INSTALLED = {"matplotlib", "huggingface_hub", "pillow_heif"}  # asked for where they are used, inside a function

# What a file may import of the house. A door stands for all files behind it.
TO_METHODS = {"clip_min", *METHODS, "baselines"}
ARROWS = {"report": {"train", "data", "support"} | TO_METHODS, "train": {"data", "support"} | TO_METHODS,
          "data": {"support", "clip_min"}, "support": {"support", "data", "clip_min"},
          "baselines": {"coop", "clip_min"}, "clip_min": {"support"}} | dict.fromkeys(METHODS, {"clip_min"})


def parse(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imports(tree):
    """-> names of modules, "support.weights" for a module behind a door."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: an import by dots does not say where it leads"
            if node.module in ("support", "baselines"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def at_the_top(file):
    """-> the imports of a file that run when it is imported."""
    tree = parse(file)
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        node.body = []
    return imports(tree)


def first(names):
    return {name.split(".")[0] for name in names}


def of_the_house(names):
    return {name for name in names if name.split(".")[0] in {*ARROWS, "tests"}}


# ---- Size ----


@pytest.mark.parametrize("file", ["README.md", *SOURCES])
def test_a_file_keeps_within_its_budget(file):
    assert file in BUDGETS, f"{file} has no budget: a new file needs a place in the house and a size"
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= BUDGETS[file], f"{file} has {lines} lines, {lines - BUDGETS[file]} over its {BUDGETS[file]}"


def test_every_budget_belongs_to_a_file():
    assert not BUDGETS.keys() - {"README.md", *SOURCES}, "these files are gone"


@pytest.mark.parametrize("file", [*SOURCES, *(f"tests/{path.name}" for path in sorted(ROOT.glob("tests/*.py")))])
def test_no_line_is_longer_than_120_characters(file):
    long = [number for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 120]
    assert not long, f"{file}, lines {long}"


# ---- Arrows ----


@pytest.mark.parametrize("file", SOURCES)
def test_arrows_run_as_they_are_drawn(file):
    start = file.removesuffix(".py").split("/")[0]
    assert start in ARROWS, f"{file} has no place in the house"
    wrong = first(of_the_house(imports(parse(file)))) - ARROWS[start]
    assert not wrong, f"{file} must not import {', '.join(sorted(wrong))}"


def test_clip_min_goes_through_the_door_only_for_weights_in_other_forms():
    assert of_the_house(imports(parse("clip_min.py"))) == {"support.weights"}
    assert not of_the_house(at_the_top("clip_min.py")), "copied alone, clip_min.py must be importable"


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in METHODS), *BASELINES])
def test_a_method_file_imports_only_torch_math_and_clip_min(file):
    allowed = {"torch", "math", "clip_min"} | ({"coop"} if file in BASELINES else set())
    wrong = first(imports(parse(file))) - allowed
    assert not wrong, f"{file} imports {', '.join(sorted(wrong))}: it could not be copied with {sorted(allowed)}"


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_is_imported_but_what_is_installed(file):
    known = INSTALLED | ARROWS.keys() | sys.stdlib_module_names
    assert not first(imports(parse(file))) - known - IF_INSTALLED
    assert not first(at_the_top(file)) - known, f"{file} must import {IF_INSTALLED} inside a function"
    assert "importlib" not in imports(parse(file)), "an import by name is an arrow that nobody sees"


def test_no_files_import_each_other_in_a_circle():
    arrows = {file.removesuffix(".py").replace("/", "."): of_the_house(at_the_top(file)) for file in SOURCES}
    while arrows:  # again and again, the files that wait for no other are taken away
        free = {name for name, needed in arrows.items() if not needed & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: needed for name, needed in arrows.items() if name not in free}


# ---- Encodings ----

NO_TEXT_FILES = {"Image", "tarfile", "archive", "os"}  # whose open() gives pictures, archives, members of one, numbers


def texts_without_encoding(tree):
    """-> the lines where a text file is opened, read or written in the encoding that the locale happens to have."""
    lines = []
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        function = call.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        owner = getattr(getattr(function, "value", None), "id", "")
        keywords, words = {keyword.arg for keyword in call.keywords}, [ast.unparse(word) for word in call.args]
        words += [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "mode"]
        modes = [word[1:-1] for word in words if re.fullmatch("'[rwxabt+]+'", word)]
        if name in ("read_text", "write_text"):
            is_text, has_encoding = True, len(words) > (name == "write_text")
        elif name in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile", "TextIOWrapper"):
            binary = owner == "gzip" or "Temporary" in name  # where no mode is given
            is_text = owner not in NO_TEXT_FILES and not (any("b" in mode for mode in modes) if modes else binary)
            has_encoding = False
        else:
            is_text = "text" in keywords or "universal_newlines" in keywords  # of a subprocess
            has_encoding = False
        if is_text and not has_encoding and "encoding" not in keywords:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("file", SOURCES)
def test_text_is_read_and_written_in_utf_8_whatever_the_locale(file):
    assert not texts_without_encoding(parse(file)), f"{file}: open text files with an encoding"


@pytest.mark.parametrize("source, is_found", [
    ("open(path)", True), ("open(path, 'rb')", False), ("open(path, encoding='utf-8')", False),
    ("open(path, mode='w')", True), ("path.open(newline='')", True), ("path.open('wb')", False),
    ("path.read_text()", True), ("path.read_text('utf-8')", False), ("path.write_text(text)", True),
    ("path.write_text(text, 'utf-8')", False), ("path.write_text(text, encoding='utf-8')", False),
    ("gzip.open(path)", False), ("gzip.open(path, 'rt')", True), ("tarfile.open(path)", False),
    ("Image.open(path)", False), ("subprocess.run(words, text=True)", True), ("NamedTemporaryFile('w')", True)])
def test_a_text_file_without_an_encoding_is_found(source, is_found):
    assert bool(texts_without_encoding(ast.parse(source))) == is_found


# ---- Places ----


def tracked():
    """-> the project's files, without what a user has put beside them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for file in listed.split("\0") if file and (ROOT / file).exists()]


def test_nothing_else_stands_at_the_top_level():
    unknown = {file.split("/")[0] for file in tracked()} - TOP_LEVEL
    assert not unknown, f"{sorted(unknown)} have no place at the top level: what is practical belongs in support/"


def test_doors_have_code_and_assets_have_data_only():
    for file in tracked():
        if file.startswith(("support/", "baselines/")):
            assert file.endswith(".py") and file.count("/") == 1, file
        if file.startswith(("assets/", "docs/")):
            assert not file.endswith(".py"), file


def test_six_packages_are_enough():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [re.match(r"[\w-]+", line)[0] for line in lines] == ["torch", "torchvision", "ftfy", "regex", "pillow",
                                                               "pytest"]
    for line in lines:  # a lower bound and nothing else
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line


# ---- Words ----


def prose(docstring):
    """-> the sentences of a docstring, without what is indented: formulas, tables and commands."""
    lines = [line for line in (docstring or "").splitlines() if not line.startswith("  ")]
    return [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.:?])\s+(?=[A-Z`\"]|$)|\n\n", "\n".join(lines))
            if sentence.strip()]


def docstrings(file):
    return [ast.get_docstring(node) for node in ast.walk(parse(file))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]


@pytest.mark.parametrize("file", [*SUPPORT, *BASELINES])
def test_a_file_behind_a_door_says_what_it_is_for(file):
    docstring = ast.get_docstring(parse(file))
    assert docstring, f"{file} opens without a word"
    sentences = prose(docstring)
    if file in SUPPORT:  # the head of a method has its own test
        assert 2 <= len(sentences) <= 3, f"{file} opens with {len(sentences)} sentences: two or three say enough"


# How the sentences begin that may stand in several files, each of which is copied and read without the others.
REPEATED = (
    "To use it elsewhere, copy ",
    "images (B, 3, R, R), text (K, E) or None to compute it ",  # the shapes of Method.forward, where it is overridden
)


def test_no_two_files_say_the_same():
    where = defaultdict(set)
    for file in SOURCES:
        for docstring in docstrings(file):
            for sentence in prose(docstring):
                if len(sentence) > 60 and not sentence.startswith(REPEATED):
                    where[sentence].add(file)
    twice = [f"{' and '.join(sorted(files))}: {sentence}" for sentence, files in where.items() if len(files) > 1]
    assert not twice, "said in two places:\n" + "\n".join(twice)
