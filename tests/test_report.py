"""What report.py promises about one run: what each of its flags prints, writes and draws. All data are made here."""

import csv
import io
import json
import math
import random
import shutil
import struct
import sys
import zlib
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_clip, random_state_dict
from PIL import Image

import data
import report
import train
from clip_min import read_safetensors
from coop import CoOp
from support import charts
from support.machine import Machine
from support.scores import score as scores_of

CELL = charts.THUMBNAIL + charts.GAP  # of a sheet, without the lines of text
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}


def draw(folder, count, names=COLOURS, seed=0):
    """Class folders of `count` pictures each, 32 x 32, one colour and noise."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.tensor(COLOURS.get(name, (128, 128, 128))) + 60 * torch.randn(32, 32, 3, generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / name / f"{i:02}.png")
    return folder


def result(run):
    return json.loads((run / "result.json").read_text())


# ---- One run ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photographs, weights of a small random CLIP, and finished runs on them, which tests only read."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "photos", 12)
    torch.save(random_state_dict(**TINY), folder / "weights.pt")
    usual = ["--data", f"{folder / 'photos'}", "--backbone", f"{folder / 'weights.pt'}", "--out", f"{folder / 'runs'}"]
    flags = ["--shots", "4", "--epochs", "2", "--device", "cpu"]
    assert train.main(["--method", "coop", "fgvpl", "zeroshot", *usual, *flags]) == 0
    return folder


@pytest.fixture
def runs(world, tmp_path):
    """Copies of the runs of coop, fgvpl and zeroshot, which a test may change."""
    shutil.copytree(world / "runs", tmp_path / "runs")
    return sorted(path.parent for path in (tmp_path / "runs").rglob("result.json"))


def start(*arguments, status=0):
    assert report.main([*map(str, arguments), "--device", "cpu"]) == status


def test_options_of_predict_are_refused_without_it(tmp_path, capsys):
    for flags in ["--csv", tmp_path / "a.csv"], ["--threshold", 0.5]:
        start("--out", tmp_path, *flags, status=2)
        assert capsys.readouterr().err == "error: --csv and --threshold are for --predict: give it, too.\n"


def test_one_file_is_for_one_run(runs, tmp_path, capsys):
    for flags in ["--predict", "x.png", "--csv", tmp_path / "a.csv"], ["--export", tmp_path / "a.safetensors"]:
        start(*runs[:2], *flags, status=2)
        assert "name one run" in capsys.readouterr().err and not list(tmp_path.glob("a.*"))


def write_predictions(run, rows):
    with (run / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("picture", "class", "predicted class", "probability"), *rows])
    (run / "result.json").write_text(json.dumps(result(run) | dict(test_images=len(rows))))


def test_every_finished_run_is_in_the_table_and_in_the_charts(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib draws the charts: pip install matplotlib")
    assert report.main(["--out", str(tmp_path / "runs")]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| ---", "| zeroshot", "| coop epochs=2", "| fgvpl epochs=2"]
    assert {path.name for path in (tmp_path / "runs").glob("*.*")} == {"summary.csv", "summary.png", "gains.png"}


def test_a_run_is_described_by_its_classes_and_confusions(runs, capsys):
    red, green, blue = "red", "green", "blue"
    answers = [(red, red)] * 3 + [(red, blue)] + [(green, blue)] * 3 + [(green, green)] + [(blue, blue)]
    write_predictions(runs[0], [(f"{i}.png", *pair, 0.5) for i, pair in enumerate(answers)])
    start(runs[0])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|") and "--" not in line]
    assert rows == [["class", "right", "of", "%", "precision", "F1"], ["green", "1", "4", "25.0", "100.00", "40.00"],
                    ["red", "3", "4", "75.0", "100.00", "85.71"], ["blue", "1", "1", "100.0", "20.00", "33.33"],
                    ["class", "taken for", "times"], ["green", "blue", "3"], ["red", "blue", "1"]]
    assert "balanced      66.67 %" in out and "macro F1      53.02 %" in out
    losses = result(runs[0])["losses"]
    assert f"{losses[0]:.3f} to {losses[-1]:.3f} in 2 epochs" in out and f"{result(runs[0])['accuracy']:.2f} %" in out
    with (runs[0] / "report.csv").open(newline="") as file:
        tables = [row[0] for row in csv.reader(file)]
    assert tables == ["table"] + ["class"] * 3 + ["mean"] + ["confusion"] * 2 + ["context"] * 3 * 16


# The pictures' classes and the predicted ones, a letter each -> rows and macro F1, as scikit-learn computes them.
SCORES = {
    "each right": ("aab", "aab", [("a", 2, 2, "100.0", "100.00", "100.00"), ("b", 1, 1, "100.0", "100.00", "100.00")],
                   100),
    "c is never predicted": ("aabc", "aaba", [("c", 0, 1, "0.0", "0.00", "0.00"),
                                              ("a", 2, 2, "100.0", "66.67", "80.00"),
                                              ("b", 1, 1, "100.0", "100.00", "100.00")], 60),
    "d has no pictures": ("aaab", "aadb", [("a", 2, 3, "66.7", "100.00", "80.00"),
                                           ("b", 1, 1, "100.0", "100.00", "100.00"), ("d", 0, 0, "", "0.00", "0.00")],
                          60),
    "all wrong": ("ab", "ba", [("a", 0, 1, "0.0", "0.00", "0.00"), ("b", 0, 1, "0.0", "0.00", "0.00")], 0),
    "one class": ("a", "a", [("a", 1, 1, "100.0", "100.00", "100.00")], 100),
}


def answered(classes, predicted):
    return [{"class": name, "predicted class": other} for name, other in zip(classes, predicted, strict=True)]


@pytest.mark.parametrize("case", SCORES)
def test_precision_and_f1_are_scikit_learns(case):
    classes, predicted, rows, macro_f1 = SCORES[case]
    scores = scores_of(answered(classes, predicted))
    assert scores.classes == rows and scores.macro_f1 == pytest.approx(macro_f1)
    assert ("mean", "of the classes", "", "", f"{scores.balanced:.2f}", "", f"{macro_f1:.2f}") in scores.csv_lines()


@pytest.mark.parametrize("seed", range(10))
def test_any_predictions_are_scored_as_scikit_learn_scores_them(seed):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = random.Random(seed)  # a is never predicted, g has no pictures
    classes, predicted = rng.choices("abcdef", k=30), rng.choices("bcdefg", k=30)
    scores = scores_of(answered(classes, predicted))
    precision, recall, f1, count = metrics.precision_recall_fscore_support(classes, predicted, zero_division=0)
    labels = sorted({*classes, *predicted})
    expected = {name: (n, f"{100 * p:.2f}", f"{100 * f:.2f}") for name, n, p, f in zip(
        labels, count, precision, f1, strict=True)}
    assert {name: (of, p, f) for name, _, of, _, p, f in scores.classes} == expected
    assert {name: percent for name, *_, percent, _, _ in scores.classes} == {
        name: f"{100 * r:.1f}" if n else "" for name, r, n in zip(labels, recall, count, strict=True)}
    assert scores.macro_f1 == pytest.approx(100 * metrics.f1_score(classes, predicted, average="macro"))


def test_a_run_without_training_is_described_without_a_loss_or_contexts(runs, capsys):
    start(runs[2])
    out = capsys.readouterr().out
    assert out.count("\naccuracy ") == 1 and "\nloss" not in out and "context" not in out


def test_only_the_ten_worst_classes_are_printed_and_all_are_written(runs, capsys):
    write_predictions(runs[0], [(f"{i}.png", f"c{i}", f"c{i // 2}", 0.5) for i in range(15)])
    saved = torch.load(runs[0] / "prompts.pt", weights_only=True)
    torch.save(saved | dict(classnames=[f"c{i}" for i in range(15)]), runs[0] / "prompts.pt")
    start(runs[0])
    assert capsys.readouterr().out.count("\n| c") == 2 * (1 + 10)  # with the heads
    lines = (runs[0] / "report.csv").read_text().splitlines()
    assert sum(line.startswith("class,") for line in lines) == 15
    assert sum(line.startswith("confusion,") for line in lines) == 14


@pytest.mark.parametrize("content", ["", "picture,class,predicted class,probability\n", "a,b\n1,2\n",
                                     "picture,class,predicted class,probability\nx.png,red\n", "\0\0",
                                     "picture,class,predicted class,probability\nx.png,red,red,nan\n"], ids=repr)
def test_broken_predictions_are_one_sentence(runs, capsys, content):
    (runs[0] / "predictions.csv").write_text(content)
    for flags in [], ["--mistakes"]:
        start(runs[0], *flags, status=2)
        assert str(runs[0] / "predictions.csv") in capsys.readouterr().err


def test_truncated_predictions_are_one_sentence(runs, capsys):
    content = (runs[0] / "predictions.csv").read_bytes()
    end = content[:-2].rindex(b"\n") + 1  # where the last line begins
    for length in end, end - 9, end + 12:
        (runs[0] / "predictions.csv").write_bytes(content[:length])
        for flags in [], ["--mistakes"]:
            start(runs[0], *flags, status=2)
            assert capsys.readouterr().err.count("predictions.csv cannot be read as the predictions of a run") == 1


@pytest.mark.parametrize("change", ["nan", dict(precision="x"), dict(changed=3), dict(recipe=3, tensors=3)], ids=str)
def test_a_prompt_file_with_nonsense_in_it_is_one_sentence(runs, capsys, change):
    saved = torch.load(runs[0] / "prompts.pt", weights_only=True)
    if change == "nan":
        saved["tensors"]["ctx"][0, 0] = math.nan
    else:
        saved |= change
    torch.save(saved, runs[0] / "prompts.pt")
    start(runs[0], "--predict", "x.png", status=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and str(runs[0]) in err
    assert change != "nan" or "not finite" in err


def test_a_prompt_file_that_is_truncated_is_one_sentence(runs, capsys):
    content = (runs[0] / "prompts.pt").read_bytes()
    for length in 0, 100, len(content) // 2, len(content) - 1:
        (runs[0] / "prompts.pt").write_bytes(content[:length])
        start(runs[0], status=2)
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and str(runs[0] / "prompts.pt") in err


def test_the_words_near_the_contexts_are_those_they_were_made_of():
    method = CoOp(random_clip(), ["cat"], ctx_init="a photo of a")
    words = report.nearest_words(method)
    assert [row[0][0] for row in words] == ["a", "photo", "of", "a"]
    assert all(row[0][1] < 1e-3 < row[1][1] <= row[2][1] for row in words)
    every_class = CoOp(random_clip(), ["cat", "dog"], ctx_init="a photo of a", csc=True)
    assert [row[0][0] for row in report.nearest_words(every_class)] == ["a", "photo", "of", "a"] * 2


@pytest.mark.parametrize("name,number", [("cocoop", 4), ("prograd", 16), ("proda", 32 * 16), ("dpt", 16), ("upt", 4)])
def test_words_are_named_for_every_learned_context_vector(name, number):
    words = report.nearest_words(train.METHODS[name](random_clip(), ["cat", "dog"]))
    assert len(words) == number and all(len(row) == 3 for row in words)


def test_a_method_without_learned_words_has_none_near_them():
    assert report.nearest_words(train.METHODS["vpt"](random_clip(), ["cat"])) == []


def test_words_that_the_clip_never_saw_are_not_named():
    clip = random_clip()
    method = CoOp(clip, ["cat"], n_ctx=2)
    with torch.no_grad():
        seen = clip.text.token_embedding.weight[:4].clone()
        clip.text.token_embedding.weight.zero_()
        clip.text.token_embedding.weight[:4] = 10 + seen
    assert {word for row in report.nearest_words(method) for word, _ in row} <= set('!"#$')


def test_mistakes_are_shown_from_the_most_confident_on(runs, capsys):
    rows = [("red/00.png", "red", "red", 0.99), ("red/01.png", "red", "blue", 0.4),
            ("blue/02.png", "blue", "green", 0.9), ("green/03.png", "green", "red", 0.7)]
    write_predictions(runs[0], rows)
    start(runs[0], "--mistakes")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["blue/02.png: blue, predicted: 90% green", "green/03.png: green, predicted: 70% red",
                     "red/01.png: red, predicted: 40% blue"]
    with Image.open(runs[0] / "mistakes.png") as sheet:
        assert sheet.width == 3 * CELL
        for i, name in enumerate(["blue", "green", "red"]):
            left = i * CELL + 20
            mean = sheet.crop((left, 20, left + 200, 220)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            assert min(COLOURS, key=lambda other: math.dist(COLOURS[other], mean)) == name
    start(runs[0], "--mistakes", 1)
    assert len(capsys.readouterr().out.splitlines()) == 1
    write_predictions(runs[0], rows[:1])
    start(runs[0], "--mistakes", status=2)
    assert "no mistake" in capsys.readouterr().err


def write_bomb(path):
    """A small file whose header promises 40,000 by 40,000 pixels."""
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "PNG")
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + content.getvalue()[24:29]
    path.write_bytes(content.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + content.getvalue()[33:])


@pytest.mark.parametrize("flag", ["--attention", "--prompt-attention"])
def test_a_picture_bomb_is_one_sentence(runs, tmp_path, capsys, flag):
    write_bomb(tmp_path / "bomb.png")
    start(runs[1], flag, tmp_path / "bomb.png", status=2)
    err = capsys.readouterr().err
    assert "bomb.png cannot be read as a picture (DecompressionBombError" in err and len(err.splitlines()) == 1


def test_new_pictures_are_predicted_as_the_method_does_and_broken_ones_named(world, runs, tmp_path, capsys):
    draw(tmp_path / "new", 2, ["red", "green"])
    (tmp_path / "new" / "broken.png").write_bytes(b"no picture")
    write_bomb(tmp_path / "new" / "bomb.png")
    (tmp_path / "new" / "notes.txt").write_text("not looked at")
    missing, table_file = tmp_path / "missing.png", tmp_path / "p.csv"
    start(runs[0], "--predict", tmp_path / "new", missing, "--csv", table_file, status=1)
    out, err = capsys.readouterr()
    assert str(tmp_path / "new" / "broken.png") in err and str(missing) in err and len(out.splitlines()) == 4
    assert str(tmp_path / "new" / "bomb.png") in err and len(err.splitlines()) == 4  # one for the file that is saved
    with table_file.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:3] == ["picture", "class 1", "probability 1"] and len(rows) == 4
    method = train.load_run(runs[0], "cpu")
    for row in rows:
        image = report.preprocess(32)(data.read(row[0], own=True)).unsqueeze(0)
        with torch.no_grad():
            probabilities = method(image)[0].softmax(dim=0)
        expected = sorted(zip(probabilities.tolist(), method.classnames, strict=True), reverse=True)
        assert row[1::2] == [name for _, name in expected]
        assert [float(p) for p in row[2::2]] == pytest.approx([p for p, _ in expected], abs=1e-4)


def test_predictions_skip_hidden_files_and_folders_of_systems_as_training_does(world, runs, tmp_path, capsys):
    draw(tmp_path, 1, ["red", "blue"])
    picture = (tmp_path / "red" / "00.png").read_bytes()
    for hidden in "red/._00.png", ".trash/a.png", "__MACOSX/b.png", "red/@eaDir/c.png":
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(picture)
    start(runs[0], "--predict", tmp_path / "red", tmp_path / "blue")
    start(runs[0], "--predict", tmp_path)
    found = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    red, blue = str(tmp_path / "red" / "00.png"), str(tmp_path / "blue" / "00.png")
    assert found == [red, blue, blue, red]
    (tmp_path / "only" / "__MACOSX").mkdir(parents=True)
    (tmp_path / "only" / "__MACOSX" / "d.png").write_bytes(picture)
    start(runs[0], "--predict", tmp_path / "only", status=2)
    assert "no picture in" in capsys.readouterr().err


def test_a_class_below_the_threshold_is_none(world, runs, capsys):
    picture = world / "photos" / "red" / "00.png"
    start(runs[0], "--predict", picture, "--threshold", 1.01)
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{picture}: none 0.") and line.count("none") == 3
    start(runs[0], "--predict", picture, "--threshold", 0.34)  # of three classes the best is likelier, others are not
    assert "none" not in capsys.readouterr().out


def test_a_table_for_a_folder_that_is_a_file_is_refused_in_one_sentence(world, runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    start(runs[0], "--predict", world / "photos" / "red" / "00.png", "--csv", tmp_path / "file" / "p.csv", status=2)
    assert f"{tmp_path / 'file' / 'p.csv'} cannot be written" in capsys.readouterr().err


def test_a_folder_without_pictures_is_an_error(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    start(runs[0], "--predict", tmp_path / "empty", status=2)
    assert str(tmp_path / "empty") in capsys.readouterr().err


def test_a_run_is_evaluated_on_its_own_data_again_and_on_other_class_folders_whole(world, runs, tmp_path, capsys):
    start(runs[0], "--eval-on", world / "photos")
    before = result(runs[0])
    line = f"photos        {before['accuracy']:.2f} % of {before['test_images']} test pictures"
    assert capsys.readouterr().out.splitlines() == [line]
    draw(tmp_path / "other", 5, ["red", "plaid"], seed=1)  # other class names, none of the training's pictures
    start(runs[0], "--eval-on", tmp_path / "other")
    assert "% of 10 test pictures" in capsys.readouterr().out
    for part in "train", "test":
        draw(tmp_path / "parts" / part, 2, ["red", "plaid"], seed=2)
    start(runs[0], "--eval-on", tmp_path / "parts")
    assert "% of 4 test pictures" in capsys.readouterr().out
    start(runs[1], "--eval-on", tmp_path / "other", status=2)  # its cache knows other classes
    assert "parts=fvp" in capsys.readouterr().err


def test_a_run_on_other_weights_is_refused(world, runs, tmp_path, capsys):
    torch.save(random_state_dict(**TINY, seed=1), tmp_path / "others.pt")
    saved = torch.load(runs[0] / "prompts.pt", weights_only=True)
    torch.save(saved | dict(backbone_path=str(tmp_path / "others.pt")), runs[0] / "prompts.pt")
    picture = world / "photos" / "red" / "00.png"
    for flags in ([], ["--predict", picture], ["--eval-on", world / "photos"], ["--features"], ["--attention", picture],
                  ["--export", tmp_path / "a.safetensors"]):
        start(runs[0], *flags, status=2)
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1
        assert f"{runs[0]} was trained on other weights than {tmp_path / 'others.pt'} holds now" in err
    assert not (tmp_path / "a.safetensors").exists()


# ---- Data that were moved or changed ----


@pytest.fixture
def moved(world, runs, tmp_path):
    """The runs' pictures at another place; where the runs say that they are there is nothing."""
    for run in runs:
        saved = torch.load(run / "prompts.pt", weights_only=True)
        torch.save(saved | dict(data_path="/gone/photos"), run / "prompts.pt")
    return shutil.copytree(world / "photos", tmp_path / "moved")


def test_data_says_where_the_pictures_of_a_run_are_now(moved, runs, capsys, features):
    start(runs[0], "--data", moved, "--mistakes", "--features", "--eval-on", moved)
    out, err = capsys.readouterr()
    run = result(runs[0])
    assert f"moved         {run['accuracy']:.2f} % of {run['test_images']} test pictures" in out
    assert (runs[0] / "mistakes.png").exists() and len(features) == 1 and "warning" not in err


@pytest.mark.parametrize("flag", ["--mistakes", "--features"])
def test_pictures_that_were_moved_are_one_sentence_that_names_data(moved, runs, capsys, features, flag):
    start(runs[0], flag, status=2)
    where = f"The pictures of {runs[0]} are not at /gone/photos any more"
    assert capsys.readouterr().err == f"error: {where}: --data PATH says where they are now.\n"
    start(runs[0], flag, "--data", moved / "nowhere", status=2)
    assert "nowhere is no folder" in capsys.readouterr().err


def test_data_is_for_runs_on_own_pictures(runs, tmp_path, capsys):
    saved = torch.load(runs[0] / "prompts.pt", weights_only=True)
    torch.save(saved | dict(data_path="", data="dtd"), runs[0] / "prompts.pt")
    start(runs[0], "--data", tmp_path, "--mistakes", status=2)
    assert "--root" in capsys.readouterr().err
    start("--data", tmp_path, status=2)
    assert "Name the folder of a finished run first" in capsys.readouterr().err


def test_classes_that_have_changed_are_refused_and_pictures_told(moved, runs, capsys, features):
    (moved / "red" / "00.png").rename(moved / "blue" / "red.png")
    start(runs[0], "--data", moved, "--features")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{moved} is not as it was when {runs[0]} was made" in warning
    (moved / "red").rename(moved / "crimson")
    for flag in "--features", "--mistakes":
        start(runs[0], "--data", moved, flag, status=2)
        err = capsys.readouterr().err
        assert "1 class no longer part of it: red; 1 class new in it: crimson" in err and len(err.splitlines()) == 1


def test_mistakes_whose_pictures_were_moved_are_left_out(moved, runs, capsys):
    rows = [("red/01.png", "red", "blue", 0.9), ("gone.png", "red", "blue", 0.8)]
    write_predictions(runs[0], rows)
    (moved / "red" / "05.png").unlink()  # so that the folder is compared
    start(runs[0], "--data", moved, "--mistakes")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["red/01.png: red, predicted: 90% blue"] and "gone.png" in err


# ---- Pictures of one run ----


def test_attention_has_a_row_for_each_picture_and_a_column_for_each_map(world, runs, capsys):
    pictures = [world / "photos" / name / "00.png" for name in ("red", "blue")]
    start(*runs[:2], "--attention", *pictures)
    with Image.open(runs[0] / "attention.png") as sheet:
        columns = 1 + 1 + 1 + 3  # the picture, zero-shot CLIP, coop, and fgvpl's three maps
        assert sheet.size == (columns * CELL, 32 + 2 * (CELL + charts.TEXT_LINE))

        def panel(column, row):
            x, y = 10 + column * CELL, 32 + row * (CELL + charts.TEXT_LINE)
            return sheet.crop((x, y, x + charts.THUMBNAIL, y + charts.THUMBNAIL)).tobytes()

        assert panel(1, 0) == panel(2, 0)  # CoOp leaves the image tower alone
        for row in 0, 1:
            assert len({panel(column, row) for column in (0, 1, 3, 4)}) == 4
        assert panel(1, 0) != panel(1, 1)


def test_attention_columns_say_what_each_method_predicts(world, runs, monkeypatch):
    drawn = []
    draw_sheet = charts.draw_sheet
    monkeypatch.setattr(charts, "draw_sheet", lambda *sheet: drawn.append(sheet) or draw_sheet(*sheet))
    pictures = [world / "photos" / name / "00.png" for name in ("red", "green", "blue")]
    start(runs[0], runs[1], "--attention", *pictures)
    titles, rows = drawn[0]
    assert titles == ["picture", "zero-shot", "coop epochs=2", "fgvpl epochs=2", "", ""]
    images = torch.stack([report.preprocess(32)(data.read(picture)) for picture in pictures])
    for column, run in (2, runs[0]), (3, runs[1]):
        method = train.load_run(run, "cpu")
        with torch.no_grad():
            best, classes = method(images).softmax(dim=1).max(dim=1)
        expected = [[f"{p:.0%} {method.classnames[i]}"] for p, i in zip(best.tolist(), classes, strict=True)]
        assert [row[column][1] for row in rows] == expected
    for row in rows:
        assert row[0][1] == ["00.png"] and [lines for _, lines in row[4:]] == [["above Otsu's threshold"], ["object"]]


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, capsys, runs, world):
    picture, blocked = world / "photos" / "red" / "00.png", tmp_path / "folder"
    blocked.mkdir()
    (blocked / "full").touch()
    start(runs[0], "--predict", picture, "--csv", blocked, status=2)  # a folder of that name is in the way
    assert str(blocked) in capsys.readouterr().err and not list(tmp_path.glob(".*"))


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    start(tmp_path, status=2)
    assert "prompts.pt" in capsys.readouterr().err


def test_the_training_program_does_not_need_the_report():
    imported = {getattr(value, "__name__", "") for value in vars(train).values()}
    assert "data" in imported and "report" not in imported


# ---- The papers' figures, and the classifier for others ----


@pytest.fixture
def features(monkeypatch):
    """What --features hands to the chart: lists of (title, caption, image features, text features), classes, names."""
    pytest.importorskip("matplotlib", reason="matplotlib draws the charts: pip install matplotlib")
    drawn, draw_features = [], charts.draw_features
    monkeypatch.setattr(charts, "draw_features", lambda *given: drawn.append(given) or draw_features(*given))
    return drawn


def test_features_are_drawn_for_zero_shot_and_the_run_side_by_side(world, runs, features):
    start(runs[1], "--root", world, "--features", "red", "blue")
    (zero_shot, run), classes, names = features[0]
    assert (zero_shot[0], run[0], names) == ("zero-shot", "fgvpl epochs=2", ["red", "blue"])
    assert sorted(set(classes.tolist())) == [0, 1] and len(classes) == len(zero_shot[2]) == len(run[2]) == 8
    assert not torch.equal(zero_shot[2], run[2])
    with Image.open(runs[1] / "features.png") as image:
        assert image.width == charts.INCHES * charts.DPI


def test_features_are_of_classes_that_there_are(runs, capsys, features):
    start(runs[0], "--features", "red", "puce", status=2)
    assert "blue, green, red" in capsys.readouterr().err
    start(runs[0], "--features")  # without names the first ten
    assert features[0][2] == ["blue", "green", "red"]


def test_features_of_a_class_alone_and_of_none(runs, capsys, monkeypatch, features):
    start(runs[0], "--features", "red")
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args, **more: replace(load(*args, **more), test=load(*args).test[:1]))
    start(runs[0], "--features", "blue")  # a single picture
    assert [len(classes) for _, classes, _ in features] == [4, 1]
    start(runs[0], "--features", "red", status=2)
    assert "no test pictures of these classes" in capsys.readouterr().err


def test_features_are_those_of_the_classes_named_with_their_variances(runs, features):
    start(runs[0], "--features", "red", "blue")
    method = train.load_run(runs[0], "cpu")
    with torch.no_grad():
        text = torch.nn.functional.normalize(method.encode_text(), dim=-1)
    rows = [method.classnames.index(name) for name in ("red", "blue")]
    panels, classes, _ = features[0]
    for (_, caption, images, seen), expected in zip(panels, (method.zero_shot[rows], text[rows]), strict=True):
        torch.testing.assert_close(seen, expected)
        variances = report.intra_class_variance(images, classes), report.inter_class_variance(expected)
        assert caption == "Var_v {:.3f}, Var_t {:.3f}".format(*variances)


def test_features_without_matplotlib_are_one_sentence(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    start(runs[0], "--features", status=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.endswith("pip install matplotlib.\n") and len(err.splitlines()) == 1
    assert not (runs[0] / "features.png").exists()


def test_prompt_attention_has_a_column_for_each_visual_prompt(world, tmp_path, capsys):
    flags = ["--data", f"{world / 'photos'}", "--backbone", f"{world / 'weights.pt'}", "--shots", "1", "--epochs", "1",
             "--device", "cpu", "--out", f"{tmp_path}"]
    assert train.main([*flags, "--method", "vpt", "upt", "dpt", "coop"]) == 0
    pictures, seen = [world / "photos" / name / "00.png" for name in ("red", "blue")], {}
    for folder in sorted(path.parent for path in tmp_path.rglob("result.json")):
        name = result(folder)["method"]
        start(folder, "--prompt-attention", *pictures, status=2 if name == "coop" else 0)
        if name != "coop":
            with Image.open(folder / "prompt_attention.png") as sheet:
                seen[name] = sheet.width // CELL, sheet.height
    height = 32 + 2 * (CELL + charts.TEXT_LINE)
    assert seen == {"vpt": (11, height), "upt": (5, height), "dpt": (4, height)}  # 10, 4 prompts, 3 classes' prompts
    assert "no visual prompts" in capsys.readouterr().err


def test_prompt_attention_is_what_patches_would_give_to_the_prompt(world, runs, monkeypatch):
    shown = []
    monkeypatch.setattr(charts, "overlay", lambda picture, values: shown.append(values) or picture)
    start(runs[1], "--prompt-attention", world / "photos" / "red" / "00.png")
    method, image = train.load_run(runs[1], "cpu"), report.preprocess(32)(data.read(world / "photos/red/00.png"))
    with torch.no_grad():
        z = method.run_blocks(method.embed(image.unsqueeze(0)))[0]  # (1, 1+4+1, D), the prompt is the last token
        block = method.clip.visual.blocks[-1]
        q, k, _ = block.attn.qkv(block.ln_1(z))[0].permute(1, 2, 0, 3)  # (2 heads, 6 tokens, 64)
        weights = torch.stack([(q[head] @ k[head].T / 8).softmax(dim=1) for head in range(2)]).mean(dim=0)
    torch.testing.assert_close(shown[0], weights[1:5, 5])
    assert len(shown) == 1


EXPORTED = {"zeroshot", "coop", "prograd"}


@pytest.mark.parametrize("name", train.METHODS)
def test_a_classifier_is_exported_where_clip_with_it_predicts_as_the_method(name, tmp_path, capsys):
    torch.manual_seed(0)
    method, images = train.METHODS[name](random_clip(), ["cat", "dog", "cow"]).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for tensor in method.learned().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))  # as after a training
        method.prepare([(images, torch.tensor([0, 1, 2, 0]))])
    args = train.parse_arguments(["--backbone", "tiny"])
    settings = train.resolve_settings(args, train.METHODS, "shapes", name, 16, 1)
    run, path = report.Run(tmp_path, settings, {}, method, Machine(torch.device("cpu"), None, 0)), tmp_path / "c"
    clip = method.clip
    with torch.no_grad():
        features = torch.nn.functional.normalize(clip.encode_image(images), dim=-1)
        text = torch.nn.functional.normalize(method.encode_text().float(), dim=-1)
        is_same = torch.allclose(clip.logit_scale.exp() * features @ text.T, method(images), atol=1e-3)
    assert is_same == (name in EXPORTED)
    if name not in EXPORTED:
        with pytest.raises(report.UserError, match=f"{name} is more than CLIP with another classifier"):
            report.export(run, path)
        assert not path.exists()
        return
    report.export(run, path)
    with path.open("rb") as file:
        torch.testing.assert_close(read_safetensors(file), {"classifier": text})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that the numbers can be mapped into memory


def test_the_exported_file_is_read_by_safetensors(runs, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "c.safetensors"
    start(runs[0], "--export", path)
    with safetensors.safe_open(path, "pt") as file, path.open("rb") as ours:
        torch.testing.assert_close(file.get_tensor("classifier"), read_safetensors(ours)["classifier"])
        assert file.metadata().keys() >= {"logit_scale", "classnames", "templates", "backbone"}


def test_the_exported_file_holds_what_is_needed(runs, tmp_path):
    start(runs[0], "--export", tmp_path / "c.safetensors")
    with (tmp_path / "c.safetensors").open("rb") as file:
        classifier = read_safetensors(file)["classifier"]
        file.seek(0)
        notes = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    method, images = train.load_run(runs[0], "cpu"), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = torch.nn.functional.normalize(method.clip.encode_image(images), dim=-1)
        torch.testing.assert_close(float(notes["logit_scale"]) * features @ classifier.T, method(images))
    assert json.loads(notes["classnames"]) == method.classnames
    assert json.loads(notes["templates"]) == list(method.templates) and notes["backbone"] == "weights"
