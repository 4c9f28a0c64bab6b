"""Broken files and odd texts: every one of some thousand seeded mutations is read as valid values or refused in one
sentence. Nothing else is raised, nothing hangs, no number that is not finite gets through.

    MUTATIONS=100000 python -m pytest tests/test_mutations.py      # longer, by hand: so many of each kind of file
"""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_state_dict
from PIL import Image
from test_weights import FORMS, to_transformers, transformers_config

import data
import report
import train
from clip_min import CLIP, UserError, encode, load_clip, tokenize
from support import charts, fonts, streams
from support.machine import Machine
from support.output import print_table
from support.streams import Tee

COUNT = int(os.environ.get("MUTATIONS", 100))
SIZES = TINY | dict(resolution=16, vision_layers=1, vision_width=64, text_layers=1, joint=8)
ODD_VALUES = [None, True, 0, -1, 1e308, 10**400, math.nan, math.inf, "", "x", "..", "{}", [], [[]], {}, {"a": 1}]
ODD_CHARACTERS = [*"aZ0 _./\\{}<>|&;'\"\t\n\r", *map(chr, (0, 7, 27, 127, 133, 160, 173, 0x301, 0x200B, 0x2028, 0x202E,
                                                         0xD800, 0xFEFF, 0xFFFD, 0x1F600, 0x10FFFF, 0x4E00))]
MARKS = ["<|startoftext|>", "<|endoftext|>", "&amp;", "&#0;", "&#xD800;", "&lt"]


class Hang(BaseException):
    """No reader catches it."""


def survives(read, what):
    """read() ends, with a result or a UserError. -> the result, or None. What takes two minutes is a hang."""
    def stop(*_):
        raise Hang(what)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    try:
        return read()
    except UserError as error:
        assert str(error), what
        return None
    except (Hang, Exception) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate_bytes(rng, content, head=4000):
    """One to three changes. Half of them are in the head, where a format keeps what it says about itself."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        end = max(1, min(len(content), head) if rng.random() < 0.5 else len(content))
        at, size = rng.randrange(end), rng.choice([1, 2, 8, 64, 1000])
        kind = rng.choice(["flip", "flip", "cut", "remove", "double", "swap", "noise", "fill"])
        chunk = content[at : at + size]
        if kind == "flip" and content:
            content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + size]
        elif kind == "double":
            content[at:at] = chunk
        elif kind == "swap":
            other = rng.randrange(end)
            content[at : at + size], content[other : other + size] = content[other : other + size], chunk
        elif kind == "noise":
            content[at : at + size] = rng.randbytes(len(chunk))
        elif kind == "fill":
            content[at : at + size] = rng.choice([b"\0", b"\xff"]) * len(chunk)
    return bytes(content)


def mutate_value(rng, value):
    """Replace, remove or double something in a JSON value, at a random depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = {**value, key: mutate_value(rng, value[key])}
        if rng.random() < 0.15:
            changed[rng.choice(["", "x", key + "x"])] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], *rng.choice([[], [value[i]] * 2, [mutate_value(rng, value[i])]]), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)


def mutate_json(rng, content):
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    return json.dumps(mutate_value(rng, json.loads(content))).encode()


def odd_text(rng):
    """Words, signs, control characters, lone surrogates, marks of the tokenizer, up to 2,000 characters."""
    pick = [lambda: rng.choice(ODD_CHARACTERS), lambda: rng.choice(MARKS), lambda: chr(rng.randrange(0x110000)),
            lambda: rng.choice("abcdefgh ") * rng.choice([1, 1, 3, 100])]
    return "".join(rng.choice(pick)() for _ in range(rng.choice([0, 1, 3, 10, 60])))[:2000]


# ---- Weights ----


@pytest.fixture(scope="module")
def state():
    return random_state_dict(**SIZES, vocab=20)


@pytest.mark.parametrize("form", FORMS)
def test_weights(form, state, tmp_path):
    FORMS[form]({key: tensor.half() for key, tensor in state.items()}, tmp_path / "whole")
    content, rng = (tmp_path / "whole").read_bytes(), random.Random(form)
    load_clip(tmp_path / "whole")
    refused = 0
    for i in range(COUNT):
        (tmp_path / "broken").write_bytes(mutate_bytes(rng, content))
        clip = survives(lambda: load_clip(tmp_path / "broken"), f"{form} {i}")
        refused += clip is None
        assert clip is None or all(p.isfinite().all() for p in clip.parameters()), f"{form} {i}"
    assert refused > 0


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_configurations(name, state, tmp_path):
    of_open_clip = {"model_cfg": {"vision_cfg": dict(width=64, head_width=64), "text_cfg": dict(heads=1),
                                  "quick_gelu": True}}
    if name == "config.json":
        content, weights = transformers_config(1, 1, "quick_gelu"), "model.safetensors"
        FORMS["safetensors"](to_transformers(state), tmp_path / weights)
    else:
        content, weights = json.dumps(of_open_clip).encode(), "open_clip_model.safetensors"
        FORMS["safetensors"](state, tmp_path / weights)
    rng = random.Random(name)
    (tmp_path / name).write_bytes(content)
    load_clip(tmp_path)
    for i in range(COUNT):
        (tmp_path / name).write_bytes(mutate_json(rng, content))
        clip = survives(lambda: load_clip(tmp_path), f"{name} {i}: {(tmp_path / name).read_bytes()!r}")
        if clip:  # it computes, too
            assert clip.encode_image(torch.zeros(1, 3, 16, 16)).isfinite().all()


# ---- A run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a CLIP of the smallest size; its folder and that of its pictures."""
    folder = tmp_path_factory.mktemp("run")
    FORMS["safetensors"](random_state_dict(**SIZES), folder / "weights")
    for i in range(8):
        place = folder / "pictures" / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * i, 99, 9)).save(place / f"{i}.png")
    assert train.main(["--data", str(folder / "pictures"), "--backbone", str(folder / "weights"), "--epochs", "1",
                       "--shots", "0", "--batch-size", "2", "--out", str(folder / "runs"), "--device", "cpu"]) == 0
    return next((folder / "runs").rglob("result.json")).parent


def test_prompts(run, tmp_path, monkeypatch):
    whole, rng = (run / "prompts.pt").read_bytes(), random.Random("prompts")
    saved = torch.load(run / "prompts.pt", weights_only=True)
    clip = CLIP.from_state_dict(random_state_dict(**SIZES))
    monkeypatch.setattr(train, "load_clip", lambda *_: clip)  # the same for all
    tmp_path.joinpath("prompts.pt").write_bytes(whole)
    train.load_run(tmp_path, "cpu")
    for i in range(COUNT):
        if i % 2:
            tmp_path.joinpath("prompts.pt").write_bytes(mutate_bytes(rng, whole))
        elif i % 4:
            torch.save(mutate_value(rng, saved), tmp_path / "prompts.pt")
        else:
            number = rng.choice([math.nan, math.inf, -math.inf])
            torch.save(saved | dict(tensors={k: v * number for k, v in saved["tensors"].items()}),
                       tmp_path / "prompts.pt")
        method = survives(lambda: train.load_run(tmp_path, "cpu"), f"prompts.pt {i}")
        if method:
            assert all(tensor.isfinite().all() for tensor in method.learned().values()), f"prompts.pt {i}"


def test_results_and_predictions(run, tmp_path, capsys):
    """The table of all runs and `report.py RUN`, each with one of the files broken."""
    shutil.copytree(run, tmp_path / "run")
    whole = report.open_run(tmp_path / "run", "cpu")
    read = {"result.json": 0, "predictions.csv": 0}
    for name, mutate in ("result.json", mutate_json), ("predictions.csv", mutate_bytes):
        path, rng = tmp_path / "run" / name, random.Random(name)
        content = path.read_bytes()
        for i in range(COUNT):
            path.write_bytes(mutate(rng, content))
            what = f"{name} {i}: {path.read_bytes()!r}"
            found = survives(lambda: report.read_run(whole), what)
            if found:
                entries, _, rows = found
                assert all(0 <= entry.accuracy <= 100 for entry in entries), what
                assert all(0 <= row["probability"] <= 1 for row in rows), what
                survives(lambda: report.describe(whole), what)
                read[name] += 1
                if name == "result.json" and read[name] <= 5:  # it draws
                    survives(lambda: report.summarise(tmp_path), what)
        path.write_bytes(content)
    assert all(0 < count < COUNT for count in read.values()), read
    assert "nan %" not in capsys.readouterr().out


def test_checkpoints(tmp_path, capsys):
    """A broken one is not used, or is named. None changes what is learned."""
    method = train.METHODS["coop"](CLIP.from_state_dict(random_state_dict(**SIZES)), ["cat", "dog"], n_ctx=2)
    optimizer = torch.optim.SGD(method.parameter_groups(), momentum=0.9)
    scaler, machine = torch.amp.GradScaler("cpu", enabled=False), Machine(torch.device("cpu"))
    method.loss(torch.randn(2, 3, 16, 16), torch.tensor([0, 1])).backward()
    optimizer.step()
    path, description = tmp_path / "checkpoint", dict(method="coop", seed=1)
    train.Checkpoint(path, description, machine).write(method, optimizer, scaler, [0.5], [torch.tensor(0.25)])
    content, saved, ctx = path.read_bytes(), torch.load(path, weights_only=True), method.ctx.detach().clone()

    def restore():
        checkpoint = train.Checkpoint(path, description, machine)
        if checkpoint.restore_tensors(method):
            return checkpoint.restore(optimizer, scaler)

    assert restore() == ([0.5], [0.25])
    rng, used = random.Random("checkpoint"), 0
    for i in range(COUNT):
        if i % 4:
            path.write_bytes(mutate_bytes(rng, content))
        else:
            torch.save({key: value for key, value in saved.items() if key != rng.choice(list(saved))}, path)
        restored = survives(restore, f"checkpoint {i}")
        assert restored in (None, ([0.5], [0.25])) and torch.equal(method.ctx, ctx), f"checkpoint {i}"
        used += restored is not None
    assert used < COUNT / 2
    said = capsys.readouterr().out
    assert "is no checkpoint of this run" in said


# ---- What lies around a finished run ----


def pictures_of(place):
    return sorted((place / "pictures").rglob("*.png"))


def classes_of(place):
    return sorted(path for path in (place / "pictures").iterdir() if path.is_dir())


def draw_anew(rng, path):
    Image.frombytes("RGB", (20, 20), rng.randbytes(1200)).save(path)


def swap_pictures(rng, place):
    one, other = rng.sample(pictures_of(place), 2)
    aside = one.rename(one.with_suffix(".aside"))
    other.rename(one)
    aside.rename(other)


def add_class(rng, place):
    (place / "pictures" / "wolf").mkdir(exist_ok=True)
    for i in range(2):
        draw_anew(rng, place / "pictures" / "wolf" / f"{i}.png")


def move_picture(rng, place):
    picture = rng.choice(pictures_of(place))
    picture.rename(rng.choice(classes_of(place)) / f"moved {picture.name}")


def copy_picture(rng, place):
    picture = rng.choice(pictures_of(place))
    shutil.copy(picture, picture.with_name(f"{picture.stem} (1).png"))


def rename_class(rng, place):
    folder = rng.choice(classes_of(place))
    folder.rename(folder.with_name(rng.choice(["class", "a b", "Class 0", "zebra"])))


def write_classnames(rng, place):
    (place / "pictures" / "classnames.txt").write_text(rng.choice(["class 0 tiger\n", "class 1 class 1\n", "x y\n"]))


def break_picture(rng, place):
    picture = rng.choice(pictures_of(place))
    picture.write_bytes(mutate_bytes(rng, picture.read_bytes()))


def rewrite(rng, place):
    """The same content in another file."""
    picture = rng.choice(pictures_of(place))
    content = picture.read_bytes()
    picture.unlink()
    picture.write_bytes(content)


SURROUNDINGS = [
    rename_class, add_class, move_picture, copy_picture, swap_pictures, write_classnames, break_picture, rewrite,
    lambda rng, place: shutil.rmtree(rng.choice(classes_of(place))),
    lambda rng, place: rng.choice(pictures_of(place)).unlink(),
    lambda rng, place: draw_anew(rng, rng.choice(pictures_of(place))),
    lambda rng, place: draw_anew(rng, rng.choice(classes_of(place)) / "new.png"),
    lambda rng, place: (place / "pictures" / "notes.txt").write_text("no picture"),
    lambda rng, place: FORMS["safetensors"](random_state_dict(**SIZES, seed=rng.randrange(3)), place / "weights"),
    lambda rng, place: torch.save(random_state_dict(**SIZES), place / "weights"),  # the same in another form
]


def made_of(place):
    """-> what a run there is made of, in full; None where the data cannot be used."""
    try:
        bench = data.load(place / "pictures", shots=0)
    except UserError:
        return None
    used = [(bench.relative(path), label, Path(path).read_bytes()) for path, label in bench.train + bench.test]
    return bench.classnames, used


def test_surroundings(tmp_path, capsys):
    """A finished run's command, and the run, after its pictures, classes and weights were changed: a change that
    matters is told in one sentence, one that does not is none."""
    place, whole = tmp_path / "place", tmp_path / "whole"
    rng = random.Random("surroundings")
    for i in range(12):
        folder = whole / "pictures" / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        draw_anew(rng, folder / f"{i}.png")
    FORMS["safetensors"](random_state_dict(**SIZES), whole / "weights")
    command = ["--data", str(place / "pictures"), "--backbone", str(place / "weights"), "--epochs", "1", "--shots", "2",
               "--out", str(tmp_path / "runs"), "--device", "cpu"]
    shutil.copytree(whole, place)
    assert train.main(command) == 0
    (result,) = (tmp_path / "runs").rglob("result.json")
    before, weights = made_of(place), load_clip(place / "weights").state_dict()
    content, told = {path.name: path.read_bytes() for path in result.parent.iterdir()}, {True: 0, False: 0}
    for i in range(COUNT // 5):
        shutil.rmtree(place)
        shutil.copytree(whole, place)
        changes = rng.choices(SURROUNDINGS, k=rng.choice([1, 1, 1, 2, 3]))
        with suppress(IndexError, OSError):  # nothing is left that could be changed, or it has that name already
            for change in changes:
                change(rng, place)
        now = load_clip(place / "weights").state_dict()
        has_other_weights = any(not torch.equal(tensor, now[key]) for key, tensor in weights.items())
        has_changed = has_other_weights or made_of(place) != before
        what = f"surroundings {i}: {[change.__name__ for change in changes]}"
        capsys.readouterr()
        assert survives(lambda: train.main(command), what) == (2 if has_changed else 0), what
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(errors) == has_changed and ("finished " in out) != has_changed, f"{what}: {out} {err}"
        assert (survives(lambda: train.load_run(result.parent, "cpu"), what) is None) == has_other_weights, what
        told[has_changed] += 1
    assert {path.name: path.read_bytes() for path in result.parent.iterdir()} == content
    assert told[False] and told[True] > 3 * told[False], told


# ---- Data ----


def test_lists_and_class_names(run, tmp_path):
    rng = random.Random("lists")
    for label, name in enumerate(["cats", "sea lions"]):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (80 * i, 9, 90 * label)).save(tmp_path / name / f"{i}.png")
    rows = [[f"{name}/{i}.png", label, name] for label, name in enumerate(["cats", "sea lions"]) for i in range(3)]
    split = json.dumps(dict(train=rows[:1] + rows[3:4], val=[], test=rows[1:3] + rows[4:])).encode()
    names = "cats house cat\nsea lions, großer Seelöwe\n".encode()
    labels = "".join(f"{path},{name}\n" for path, _, name in rows).encode()
    for file, content, mutate in (("split.json", split, mutate_json), ("labels.csv", labels, mutate_bytes),
                                  ("classnames.txt", names, mutate_bytes)):
        path = tmp_path / file
        path.write_bytes(content)
        data.load(tmp_path, shots=1)
        for i in range(COUNT):
            path.write_bytes(mutate(rng, content))
            what = f"{file} {i}: {path.read_bytes()!r}"
            bench = survives(lambda: data.load(tmp_path, shots=1), what)
            if bench:
                assert bench.train and bench.test, what
                assert all(Path(p).is_file() and p.startswith(str(tmp_path)) for p, _ in bench.train + bench.test), what
                assert {label for _, label in bench.train} == set(range(len(bench.classnames))), what
                survives(lambda b=bench: tokenize(b.classnames), what)
        path.unlink()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_pictures(form, tmp_path):
    rng, content = random.Random(form), io.BytesIO()
    noise = Image.frombytes("RGB", (24, 18), random.Random(0).randbytes(24 * 18 * 3))
    noise.save(content, form)
    path = tmp_path / "picture.png"  # recognised by its content
    for i in range(COUNT):
        path.write_bytes(mutate_bytes(rng, content.getvalue(), head=60))
        for own in False, True:
            picture = survives(lambda own=own: data.read(path, own), f"{form} {i}")
            assert picture is None or picture.mode == "RGB" and min(picture.size) > 0


# ---- Texts ----


def test_texts_on_every_stream_and_every_picture(monkeypatch):
    rng = random.Random("streams")
    monkeypatch.setattr(fonts, "installed_fonts", lambda: [])  # those of this machine are chance
    fonts.find_fonts.cache_clear()
    for i in range(COUNT // 3):
        text, encoding = odd_text(rng), rng.choice(["ascii", "cp1252", "cp932", "utf-8"])
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        stream = rng.choice([file, Tee(file)])

        def use(text=text, stream=stream):
            with contextlib.redirect_stdout(stream), streams.ready_streams():
                print_table("title", ["class"], [[text]])
                print(text, flush=True)
            return charts.draw_sheet([], [[(Image.new("RGB", (4, 4)), [text])]])

        assert survives(use, f"{i}: {encoding}, {text!a}")
        file.flush()
        shown = file.buffer.getvalue().decode(encoding)
        (row,) = [line for line in shown.split("\n")[5:6]]
        assert row.startswith("| ") and len(re.findall(r"(?<!\\)\|", row)) == 2, f"{i}: {text!a}"


def test_texts():
    rng = random.Random("texts")
    for i in range(10 * COUNT):
        text = odd_text(rng)
        ids = survives(lambda text=text: encode(text), f"{i}: {text!a}")
        assert ids is None or all(0 <= token <= 49407 for token in ids), ascii(text)
        tokens = survives(lambda text=text: tokenize(text), f"{i}: {text!a}")
        assert tokens is None or tokens.shape == (1, 77), ascii(text)
