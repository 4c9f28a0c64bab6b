"""What README.md and docs/ say: every command parses or runs, snippets run as printed, lists are those of the code."""

import argparse
import ast
import csv
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_state_dict
from PIL import Image
from test_clip import assert_equal, picture
from test_method import IMAGES, NAMES, OTHERS, copied, learned, logits, same_tensors, train_steps
from test_operations import LiteralCLIP, build, step

import data
import report
import train
from clip_min import CLIP, Method, load_clip
from clip_min import preprocess as clip_preprocess
from support import attention, settings
from support.benchmarks import BENCHMARKS, spell
from support.world import WORLD

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES} | {"train.py": train.__doc__,
                                                                          "report.py": report.__doc__}
RUN = "runs/photos-6f1c2a/coop/ViT-B-16_4shot_seed1"  # the run that the pages speak of
NUMBER = r"\d[\d,]*\.?\d*(e-\d+)?"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# ---- Reading the pages ----


def section(page, heading):
    """The text below a heading, up to the next one of the same level."""
    level = heading.split(" ")[0]
    _, found, rest = TEXT[page].partition(f"\n{heading}\n")
    assert found, f"{page} has no heading {heading}"
    return rest.split(f"\n{level} ")[0]


def table_rows(text):
    """The cells of a text's tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines) if re.fullmatch(r"[|\s-]+", line)}
    rows = [line for i, line in enumerate(lines) if not {i, i + 1} & heads]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def commands(text, program):
    """The words behind each `python program` of a text, but for commands with a gap to fill in."""
    text, found = re.sub(r"```.*?```", "", text, flags=re.DOTALL), []
    for line in text.splitlines() + re.findall(r"`([^`]+)`", text):
        line = " ".join(line.split())
        start = re.match(rf"(python|pip install .*&& python|torchrun [-\w ]+|sbatch .*'python) {program}", line)
        if start and "..." not in line:
            line = line.removesuffix("'") if line.startswith("sbatch") else line
            found.append(shlex.split(line[start.end() :].replace("$RUN", RUN), comments=True))
    return found


def snippets(page):
    return re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL)


def snippet(page, word):
    """The one snippet of a page that has this word."""
    (found,) = [code for code in snippets(page) if word in code]
    return found


def run_printed(code):
    """-> what a snippet prints."""
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    return out.getvalue()


def main(program, words):
    """-> what a program prints, which must end well."""
    with redirect_stdout(io.StringIO()) as out:
        assert program.main(words) == 0, words
    return out.getvalue()


# ---- Form ----


def test_the_readme_is_short_and_nothing_is_folded():
    assert len(TEXT["README.md"].splitlines()) <= 320
    assert not [page.name for page in PAGES if "<details>" in TEXT[page.name]]


def test_the_readmes_tables_of_results_and_of_speed_are_short():
    for heading in "## Which method", "## How fast it is":
        assert 3 <= len(table_rows(section("README.md", heading))) <= 12


def test_every_page_of_docs_opens_with_its_question_and_is_linked_from_the_readme():
    names = {page.name for page in PAGES[1:]}
    assert names == {"results.md", "speed.md", "options.md", "data.md", "checks.md", "citations.md"}
    for name in names:
        assert re.match(r"# [^\n]+\n\nThis page answers: [^.]*\?", TEXT[name]), name
        assert f"(docs/{name})" in TEXT["README.md"]


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", TEXT[page.name], flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", TEXT[page.name])
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert link.startswith("https://") or target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_picture_of_assets_is_shown():
    pictures = {path.name for path in (ROOT / "assets").iterdir() if path.suffix in (".png", ".svg")}
    assert pictures and pictures == set(re.findall(r"assets/([\w.]+\.(?:png|svg))\)", "".join(TEXT.values())))


# ---- Commands ----


@pytest.mark.parametrize("page", [name for name in TEXT if commands(TEXT[name], "train.py")])
def test_the_commands_of_train_py_that_are_written_down_parse(page, monkeypatch):
    class Correction(Method):  # the README's own method
        def __init__(self, *args, ratio=1.0):
            super().__init__(*args)

    monkeypatch.setitem(train.METHODS, "correction", Correction)
    for words in commands(TEXT[page], "train.py"):
        check_command(words)


def check_command(words):
    try:
        args = train.parse_arguments(words)
    except SystemExit:
        pytest.fail(f"python train.py {shlex.join(words)}")
    for method in args.method:
        settings.parse_options(method, train.METHODS[method].default_options(), args.set)
    for name in args.data + args.eval_on:
        assert name in (*BENCHMARKS, *WORLD, "photos", "path/to/folder"), name


def test_the_commands_are_found():
    found = {page: len(commands(TEXT[page], "train.py")) for page in TEXT}
    assert found["README.md"] >= 10 and found["train.py"] >= 7 and found["options.md"] >= 7 and found["checks.md"] >= 2
    assert len(commands(TEXT["README.md"], "report.py")) >= 6 and len(commands(TEXT["options.md"], "report.py")) >= 3
    assert ["--method", "coop", "vpt", "--data", "dtd", "--seeds", "1", "2", "3"] in commands(  # in sbatch's quotes
        TEXT["options.md"], "train.py")


@pytest.mark.parametrize("page", [name for name in TEXT if commands(TEXT[name], "report.py")])
def test_the_commands_of_report_py_that_are_written_down_parse(page):
    for words in commands(TEXT[page], "report.py"):
        try:
            report.parse_arguments(words)
        except SystemExit:
            pytest.fail(f"python report.py {shlex.join(words)}")


def test_the_papers_ablations_parse():
    rows = table_rows(section("options.md", "## The papers' ablations as commands"))
    checked = 0
    for _, cell in rows:
        method = []
        for code, values in re.findall(r"`(--[^`]*)`([^`;]*)", cell):
            words = shlex.split(code)
            if "--method" in words:
                method = words[: words.index("--set")] if "--set" in words else words
            elif "--set" in words:
                words = method + words
            if words[-1].endswith("="):
                choices = re.findall(r"(?:^| |, )([\w.+-]+)(?=,|;|$| to | for )", values)
                assert len(choices) >= 2, cell
                for value in choices:
                    check_command([*words[:-1], words[-1] + value])
            elif "--method" in words:
                check_command(words)
            checked += 1
    assert checked >= 20


def work_in(folder, patch, load=data.load):
    """Work in this folder, and save time: one epoch, every sixth test picture."""
    patch.chdir(folder)
    patch.setattr(settings, "WORLD_EPOCHS", 1)
    patch.setattr(data, "load", lambda *args, **options: replace(b := load(*args, **options), test=b.test[::6]))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the pages' commands can run: a run of CoOp and one of UPT, some pictures."""
    folder, before = tmp_path_factory.mktemp("workplace"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        for method, place in ("coop", RUN), ("upt", f"{RUN}-upt"):
            main(train, ["--method", method, "--shots", "4", "--out", "first", "--device", "cpu"])
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(f"first/shapes/{method}/tiny_4shot_seed1", place)
        Image.new("RGB", (60, 40), "red").save("cat.jpg")
        Path("new").mkdir()
        Image.new("RGB", (40, 60), "blue").save("new/1.jpg")
    assert Path.cwd() == before
    return folder


def in_the_drawn_world(words):
    args = train.parse_arguments(words)
    return set(args.data) <= set(WORLD) and not args.backbone and "correction" not in words


def test_the_readmes_commands_on_drawn_pictures_run(workplace, monkeypatch):
    work_in(workplace, monkeypatch)
    monkeypatch.setitem(train.METHODS, "correction", Method)
    chosen = [words for words in commands(TEXT["README.md"], "train.py") if in_the_drawn_world(words)]
    assert len(chosen) >= 3
    for words in chosen:
        assert "accuracy" in main(train, words), words
    for words in commands(TEXT["README.md"], "report.py"):  # among them the report of a run just made
        main(report, words)


def test_the_other_commands_of_report_py_run(workplace, monkeypatch):
    pytest.importorskip("matplotlib", reason="--features draws a chart")
    work_in(workplace, monkeypatch)
    for words in commands(section("options.md", "## Pictures that report.py draws"), "report.py"):
        if "--prompt-attention" in words:  # CoOp has no visual prompts
            words = [f"{RUN}-upt" if word == RUN else word for word in words]
        main(report, words)


def masked(line):
    return re.sub(NUMBER, "N", line)


def test_the_first_command_prints_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "WORLD_EPOCHS", 2)  # to save time
    printed = main(train, ["--device", "cpu"]).splitlines()
    shown = re.search(r"^    method .*?^    saved[^\n]*$", TEXT["README.md"], re.DOTALL | re.MULTILINE)[0]
    shown = [line.strip() for line in shown.splitlines() if line.strip() != "..."]
    assert [masked(line) for line in shown if "epoch " not in line] == [masked(line) for line in printed
                                                                        if not line.startswith("epoch ")]
    assert {masked(line) for line in shown} == {masked(line) for line in printed}
    for line in shown:
        exact = line.startswith(("data", "backbone", "prompts", "learning", "saved"))
        assert not exact or line in printed, line
    # The losses of the first two epochs, which the README names, do not depend on the number of epochs.
    losses = json.loads(Path("runs/shapes/coop/tiny_16shot_seed1/result.json").read_text(encoding="utf-8"))["losses"]
    named = re.search(rf"from\s+({NUMBER})\s+in\s+epoch\s+1\s+to\s+({NUMBER})\s+in\s+epoch\s+2", TEXT["README.md"])
    assert losses[:2] == pytest.approx([float(named[1]), float(named[3])], rel=0.05)


def test_the_steps_of_the_readmes_example():
    text = " ".join(section("README.md", "## Which method").split())
    pictures, steps, in_all = (int(re.search(pattern, text)[1].replace(",", "")) for pattern in (
        r"are (\d+) pictures", r"make (\d+) steps", r"and ([\d,]+) in CoOp's"))
    recipe, _ = settings.resolve_recipe(train.METHODS["coop"].recipe, {}, "dtd", 16)
    batches = data.Batches(data.Pictures([("", 0)] * pictures, None), recipe["batch_size"], torch.device("cpu"),
                           drop_last=True)
    assert (pictures, steps, in_all) == (47 * 16, len(batches), len(batches) * recipe["epochs"])


# ---- Snippets ----


def test_the_readmes_zero_shot_clip_prints_what_it_says(capsys):
    printed = run_printed(snippet("README.md", "ellipse"))
    (said,) = re.findall(r"It prints `([^`]*)`", TEXT["README.md"])
    assert ast.literal_eval(printed) == pytest.approx(ast.literal_eval(said), abs=0.02)


def test_the_readmes_training_loop_reaches_what_it_says(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    printed = run_printed(snippet("README.md", "optimizer.step()"))
    said = float(re.search(rf"which reaches ({NUMBER}) %", TEXT["README.md"])[1])
    assert float(printed.removesuffix(" %\n")) == pytest.approx(said, abs=2)


def test_a_run_is_loaded_from_python_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert run_printed(snippet("options.md", "train.load_run")).strip() in train.load_run(RUN, "cpu").classnames


def test_an_exported_classifier_answers_in_open_clip_as_the_run_does(workplace, monkeypatch):
    """open_clip's model, which would be fetched, is replaced by one of the same interface: the run's own CLIP."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(workplace)
    clip = load_clip("tiny")

    def create_model_and_transforms(name, pretrained):
        model = SimpleNamespace(encode_image=lambda x, normalize: F.normalize(clip.encode_image(x), dim=-1))
        model.eval = lambda: model
        return model, None, clip_preprocess(clip.visual.resolution)

    open_clip = ModuleType("open_clip")
    open_clip.create_model_and_transforms = create_model_and_transforms
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    main(report, [RUN, "--export", "c.safetensors"])
    answer = run_printed(snippet("options.md", "open_clip"))
    assert answer == run_printed(snippet("options.md", "train.load_run"))


def test_no_snippet_is_left_untested():
    assert {page: len(snippets(page)) for page in TEXT if snippets(page)} == {"README.md": 3, "options.md": 2}


# ---- A method of your own ----


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The README's own method, written to a file and entered into METHODS as the README says. -> its name."""
    text = section("README.md", "## Write your own method")
    (file,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (entry,) = re.findall(r"`(from \w+ import \w+; METHODS[^`]*)`", text)
    name = re.search(r"(\w+)\.py", file)[1]
    (tmp_path / f"{name}.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    exec(entry, dict(METHODS=train.METHODS))
    yield name
    del sys.modules[name]


@pytest.fixture
def clip():
    """A small random CLIP, new for every test."""
    return CLIP.from_state_dict(random_state_dict(**TINY | dict(vision_layers=3)))


def test_the_readmes_own_method_trains(example, tmp_path, monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args: replace(b := load(*args), test=b.test[::4]))  # to save time
    flags = ["--shots", "4", "--epochs", "6", "--batch-size", "8", "--warmup-epochs", "0", "--lr", "0.01"]
    assert train.main(["--method", example, *flags, "--set", "ratio=0.9", "--device", "cpu", "--root", str(tmp_path),
                       "--out", str(tmp_path / "runs")]) == 0
    (path,) = tmp_path.glob(f"runs/shapes/{example},*/tiny_4shot_seed1/result.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["options"] == dict(ratio=0.9) and result["trainable_parameters"] == 128**2
    assert result["accuracy"] > result["zero_shot"] + 10 and result["losses"][-1] < result["losses"][0]
    method = train.load_run(path.parent, "cpu")
    zero_shot, images = Method(method.clip, method.classnames), picture(method.clip.visual.resolution, 2)
    assert type(method).__name__.lower() == example and not torch.allclose(method(images), zero_shot(images), rtol=1e-2)


def test_the_readmes_own_method_keeps_the_promises(example, clip, monkeypatch):
    torch.manual_seed(0)
    method = train.METHODS[example](clip, NAMES)
    assert_equal(logits(method), logits(Method(clip, NAMES)))
    before = copied(clip.state_dict())
    train_steps(method)
    assert same_tensors(clip.state_dict(), before) and all(p.grad.abs().max() > 0 for p in learned(method).values())
    other = train.METHODS[example](clip, NAMES)
    other.load_learned(method.learned())
    assert torch.equal(logits(other), logits(method)) and len(attention.maps(method, IMAGES)) == 1
    assert method.for_classes(OTHERS[:2])(IMAGES).shape == (4, 2)


# ---- Lists that the code knows ----


@pytest.mark.parametrize("program", [train, report], ids=["train.py", "report.py"])
def test_the_flags_are_those_of_the_program(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(argparse.ArgumentParser, "format_usage", lambda parser: "")
    with pytest.raises(SystemExit):
        program.parse_arguments(["--help"])
    shown = capsys.readouterr().out.partition(program.__doc__.strip())[2]
    written = section("options.md", f"## Flags of `{program.__name__}.py`")
    assert written.split() == shown.split()


def written_options():
    """-> {method: {option: default as written, or None}} of options.md."""
    methods, method = {}, None
    for name, options, _ in table_rows(section("options.md", "## Options of every method")):
        if name:
            method = name.strip("`")
            methods[method] = {}
        if base := re.fullmatch(r"all of `(\w+)`'s", options):
            methods[method] |= methods[base[1]]
        elif options != "none":
            for option in re.findall(r"`([^`]*)`", options):
                key, _, default = option.partition("=")
                methods[method][key] = default
    return methods


def test_the_options_and_their_defaults_are_those_of_the_methods():
    expected = {}
    for name, method in train.METHODS.items():
        defaults = method.default_options()
        expected[name] = {key: "" if value is None else spell(value) for key, value in defaults.items()}
    assert written_options() == expected


def written_recipe(recipe):
    """The first cells of a method's row, as options.md writes them."""
    parts = [(f"`{name}`", part) for name, part in recipe.get("parts", {}).items()]
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[recipe["optimizer"]]
    rates = ", ".join([optimizer, f"{recipe['lr']:g}", *(f"{name} {part['lr']:g}" for name, part in parts)])
    rates = rates.replace("`, ", "` ")
    warmup = ", ".join([str(recipe["warmup_epochs"]), *(f"{name} {part['warmup_epochs']}" for name, part in parts)])
    epochs = recipe["epochs"]
    epochs = ", ".join(str(epochs[shots]) for shots in (1, 2, 4, 8, 16)) if isinstance(epochs, dict) else str(epochs)
    return [rates, warmup, str(recipe["batch_size"]), epochs]


def test_the_recipes_are_those_of_the_methods():
    rows = {row[0].strip("`"): row[1:] for row in table_rows(section("options.md", "## Recipes"))}
    assert rows.keys() == {name for name, method in train.METHODS.items() if method.recipe}
    for name, row in rows.items():
        recipe = train.METHODS[name].recipe
        if "optimizer" not in recipe:
            assert row[0].startswith("L-BFGS")
            continue
        assert row[:4] == written_recipe(recipe)
        for data_name, change in recipe.get("datasets", {}).items():
            epochs = change.get("epochs", recipe["epochs"])
            if epochs != recipe["epochs"]:
                number = epochs[16] if isinstance(epochs, dict) else epochs
                assert f"{data_name}: {number} epochs" in row[4]
            for key, value in change.get("options", {}).items():
                assert f"`{key}={value}`" in row[4] or key == "k_n"  # CAVPT's are written below the ablations
            assert change.get("warmup_epochs") in (None, 1) and ("warmup_epochs" not in change
                                                                 or "warm-up 1" in row[4])


def test_the_data_sets_with_their_names_and_folders_are_those_of_the_code():
    rows = table_rows(section("data.md", "## The benchmarks"))
    drawn = re.findall(r"`(\w+)`", rows[-1][0])
    assert drawn == list(WORLD)
    names = [row[0].replace("`", "").split(", ") for row in rows[:-1]]
    assert {name: set(aliases) for name, *aliases in names} == {
        source.name: set(source.aliases) for source in BENCHMARKS.values()}
    for (_, folder, pictures), (name, *_) in zip(rows[:-1], names, strict=True):
        source = BENCHMARKS[name]
        assert f"`{source.images[0].replace('/.', f'/{source.holds}')}" in folder, name
        assert pictures.startswith("downloaded" if source.archive else "by hand"), name


def test_the_published_numbers_are_as_many_as_written():
    with (ROOT / "assets" / "published.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    resnet = [row for row in rows if row["backbone"] == "RN50"]
    assert f"all {len(rows)} numbers" in " ".join(TEXT["options.md"].split())
    assert f"{len(resnet)} of them are for ResNet-50" in " ".join(TEXT["options.md"].split())


# ---- How much a GPU is given to do ----


@pytest.mark.parametrize("name", ["coop", "vpt", "vlp", "upt"])
def test_the_operations_of_a_step_are_as_many_as_written(name):
    """Versions of PyTorch differ by a few, so a twentieth is left for them."""
    rows = {row[0].strip("`"): [int(cell.replace(",", "")) for cell in row[1:]]
            for row in table_rows(section("speed.md", "## What a GPU is given to do"))}
    state = random_state_dict(joint=64, resolution=32, vision_layers=12, vision_width=128, patch=16, text_width=128,
                              text_layers=12)
    ours, official = [step(name, method)[0] for method in build(name, state, LiteralCLIP(state))]
    _, operations, official_operations, _, kernels, official_kernels = rows[name]
    assert (operations, kernels) == pytest.approx(ours, rel=0.05)
    assert (official_operations, official_kernels) == pytest.approx(official, rel=0.05)
    if name == "coop":
        said = re.search(r"now\s+([\d,]+),\s+officially\s+([\d,]+)", TEXT["README.md"]).groups()
        assert [int(number.replace(",", "")) for number in said] == [operations, official_operations]


# ---- How much there is to read ----


def lines_of(file, name, until):
    """Lines of a function or class with its decorators, or of a function's part before its first call of `until`."""
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        (node,) = [child for child in node.body if getattr(child, "name", None) == part]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.end_lineno
    if until:
        last = min(call.lineno for call in ast.walk(node) if isinstance(call, ast.Call)
                   and getattr(call.func, "id", None) == until)
    return last - first + 1


def test_the_path_of_one_training_step_is_as_short_as_written():
    """To mend the pages after a change of the code, take the table and the number from this test's message."""
    text, table, total = section("checks.md", "## The path of one training step"), [], 0
    rows = table_rows(text)
    for file, parts, _ in rows:
        file, counted = file.strip("`"), []
        for name, until in re.findall(r"`([\w.]+)`(?: until `(\w+)`)? \d+", parts):
            shown = f"`{name}`" + (f" until `{until}`" if until else "")
            counted.append((shown, lines_of(file, name, until)))
        assert len(counted) == parts.count(",") + 1, f"{file}: not all of its row is understood"
        total += sum(number for _, number in counted)
        table.append([f"`{file}`", ", ".join(f"{shown} {number}" for shown, number in counted),
                      str(sum(number for _, number in counted))])
    right = "\n".join(f"| {' | '.join(row)} |" for row in table)
    assert rows == table, f"docs/checks.md, the right rows:\n{right}\nand {total} lines of {len(rows)} files"
    for page, said in ("checks.md", text), ("README.md", section("README.md", "## Read it in this order")):
        number, files = re.search(r"(\d+)\s+lines\s+of\s+(\w+)\s+files", said).groups()
        assert (int(number), files) == (total, "five"), f"{page} says {number} lines, it is {total}"
    assert len(rows) == 5 and total <= 412
