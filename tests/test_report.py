"""What report.py promises: the table of all runs, its curves, and what one run shows. All data are made here."""

import csv
import io
import json
import math
import shutil
import struct
import zlib
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY, random_clip, random_state_dict
from PIL import Image, ImageColor

import data
import report
import train
from clip_min import read_safetensors
from coop import CoOp
from support.machine import Machine

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


# ---- All runs ----


def write_run(out, accuracy, method="upt", data_name="dtd", shots=16, seed=1, zero_shot=44.4, shifts=None, sets=(),
              flags=(), results=None, **changes):
    """The result.json of a run with these settings, as far as report.py reads it."""
    args = train.parse_arguments([*flags, *(["--set", *sets] if sets else [])])
    settings = replace(train.resolve_settings(args, train.METHODS, data_name, method, shots, seed), **changes)
    folder = out / settings.folder
    folder.mkdir(parents=True)
    result = asdict(settings) | dict(zero_shot=zero_shot, accuracy=accuracy, shifts=shifts or {}, losses=[1.0])
    (folder / "result.json").write_text(json.dumps(result | (results or {})))
    return folder


def table(out, capsys):
    """-> the cells of the table that report.py prints, row by row, without the rule below the head."""
    assert report.main(["--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(rows[1]) == {"---"}
    return rows[:1] + rows[2:]


def test_the_table_has_zero_shot_first_then_methods_by_rows_and_data_by_columns(tmp_path, capsys):
    for seed, accuracy in zip((1, 2, 3), (60.0, 66.0, 63.0), strict=True):
        write_run(tmp_path, accuracy, seed=seed)
    write_run(tmp_path, 50.0, shots=1)
    write_run(tmp_path, 64.0, sets=["mode=mlp"])
    write_run(tmp_path, 80.0, data_name="ucf101", zero_shot=66.0)
    head, *rows = table(tmp_path, capsys)
    assert head == ["method", "backbone", "shots", "dtd", "ucf101", "average of 2"]
    assert rows[0][:3] == ["zeroshot", "ViT-B/16", "0"]
    assert rows[0][3].startswith("44.40; ") and rows[0][4].startswith("66.00; ") and rows[0][5] == "55.20"
    assert rows[1:] == [
        ["upt", "ViT-B/16", "1", "50.00", "", ""],
        ["upt", "ViT-B/16", "16", "63.00 ± 2.45 (3); UPT, Table 2: 70.65", "80.00; UPT, Table 2: 84.03", "71.50"],
        ["upt mode=mlp", "ViT-B/16", "16", "64.00; UPT, Table 2: 67.31", "", ""],
    ]


def test_the_summary_as_csv_has_a_line_for_every_cell(tmp_path, capsys):
    for seed, accuracy in (1, 60.0), (2, 66.0):
        write_run(tmp_path, accuracy, seed=seed)
    write_run(tmp_path, 80.0, shots=0)
    table(tmp_path, capsys)
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["shots"], row["seeds"], row["mean"], row["standard deviation"]) for row in rows] == [
        ("zeroshot", "0", "1", "44.4", ""), ("upt", "16", "2", "63.0", "3.0"), ("upt", "all", "1", "80.0", "")]
    assert rows[1]["papers"] == "70.65" and rows[1]["sources"] == "UPT, Table 2" and rows[1]["data"] == "dtd"


def test_shifts_are_columns_of_their_own_but_not_in_the_average(tmp_path, capsys):
    write_run(tmp_path, 70.0, data_name="imagenet", shifts={"imagenet_a": 40.0})
    write_run(tmp_path, 30.0, data_name="imagenet_a", method="zeroshot", zero_shot=30.0)
    head, zero_shot, row = table(tmp_path, capsys)
    assert head[3:] == ["imagenet", "imagenet_a", "imagenet → imagenet_a", "average of 2"]
    assert zero_shot[3].startswith("44.40") and zero_shot[4].startswith("30.00") and zero_shot[5:] == ["", "37.20"]
    assert row[3].startswith("70.00; ") and row[4] == "" and row[5].startswith("40.00; ") and row[6] == ""


def test_zero_shot_with_templates_of_the_recipe_has_a_row_of_its_own(tmp_path, capsys):
    write_run(tmp_path, 70.0, data_name="imagenet", zero_shot=66.0)
    write_run(tmp_path, 72.0, data_name="imagenet", method="fgvpl", zero_shot=68.0)
    labels = [row[0] for row in table(tmp_path, capsys)[1:]]
    assert labels == ["zeroshot", "zeroshot, templates of fgvpl", "fgvpl", "upt"]


def test_zero_shot_has_the_papers_numbers_beside_a_run_with_changed_options_too(tmp_path, capsys):
    write_run(tmp_path, 64.0, sets=["n_ctx=2"])
    _, zero_shot, run = table(tmp_path, capsys)
    assert zero_shot[3].startswith("44.40; ") and run[3] == "64.00"


def test_data_and_weights_of_the_same_name_stay_apart(tmp_path, capsys):
    for path in "/a/photos", "/b/photos":
        write_run(tmp_path, 70.0, data="photos", data_path=path, backbone="w", backbone_path="/w.pt")
    head, zero_shot, row = table(tmp_path, capsys)
    assert len(set(head[3:5])) == 2 and all(name.startswith("photos-") for name in head[3:5])
    assert row[1].startswith("w-") and row[3:] == ["70.00", "70.00", "70.00"]


def test_the_average_is_over_benchmarks_where_there_are_some(tmp_path, capsys):
    for name, accuracy in dict(dtd=60.0, ucf101=70.0).items():
        write_run(tmp_path, accuracy, data_name=name)
    write_run(tmp_path, 90.0, data_name="shapes")
    head, *rows = table(tmp_path, capsys)
    assert head[-1] == "average of 2" and [row[-1] for row in rows] == ["44.40", "65.00", "", ""]


@pytest.mark.parametrize("content", [
    "", "[]", "{", '{"method": "upt"}', "\xff", {"accuracy": "70"}, {"accuracy": math.nan}, {"accuracy": 170},
    {"zero_shot": None}, {"shifts": [1]}, {"changed": [1]}, {"recipe": None}, {"shots": "x"}, {"losses": ["a"]},
    {"backbone": 3}, {"data": None},
], ids=str)
def test_a_file_that_is_no_result_is_left_out_with_its_name(tmp_path, capsys, content):
    result = json.loads((write_run(tmp_path, 60.0) / "result.json").read_text())
    (tmp_path / "other").mkdir()
    text = json.dumps(result | content) if isinstance(content, dict) else content
    (tmp_path / "other" / "result.json").write_bytes(text.encode("latin1"))
    assert report.main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "| 60.00" in out and str(tmp_path / "other" / "result.json") in err and "Traceback" not in err


def test_a_run_that_is_being_written_is_left_out(tmp_path, capsys):
    folder = write_run(tmp_path, 60.0)
    shutil.copytree(folder, folder.parent / f".{folder.name}.x" / "new")
    assert table(tmp_path, capsys)[2][3].startswith("60.00;")  # not 60.00 ± 0.00 (2)


def test_without_runs_and_without_a_run_the_program_says_so(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert report.main(["--out", str(tmp_path), "--mistakes"]) == 2
    assert "Name the folder" in capsys.readouterr().err


def test_curves_begin_at_zero_shot_and_all_pictures_stand_behind_every_number_of_shots(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda curves, path: drawn.append(curves))
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2)
    write_run(tmp_path, 90.0, shots=0)
    write_run(tmp_path, 50.0, data_name="ucf101", zero_shot=30.4)
    write_run(tmp_path, 70.0, data_name="imagenet", method="fgvpl", zero_shot=68.0, shifts={"imagenet_a": 10.0})
    write_run(tmp_path, 71.0, data_name="dtd", method="fgvpl")
    assert report.main(["--out", str(tmp_path)]) == 0
    upt, fgvpl = "upt, ViT-B/16", "fgvpl, ViT-B/16"
    assert drawn == [{
        "dtd": {upt: {0: [44.4], 16: [60.0, 64.0], math.inf: [90.0]}, fgvpl: {0: [44.4], 16: [71.0]}},
        "ucf101": {upt: {0: [30.4], 16: [50.0]}}, "imagenet": {fgvpl: {0: [68.0], 16: [70.0]}}}]


def result(run):
    return json.loads((run / "result.json").read_text())


def pixels(path, colour):
    """-> the places (x, y) of a colour in a picture."""
    with Image.open(path) as image:
        width, height = image.size
        values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)
    found = (values == torch.tensor(ImageColor.getrgb(colour))).all(dim=2)
    return found.nonzero().flip(1).tolist()


def test_a_curve_passes_through_its_accuracies_and_shows_the_spread_over_seeds(tmp_path):
    report.draw_curves({"dtd": {"upt": {0: [40.0], 16: [58.0, 62.0]}}}, tmp_path / "c.png")
    blue = [(x, y) for x, y in pixels(tmp_path / "c.png", report.COLOURS[0]) if y < 640]
    left, right = 100 + 700 / 4, 100 + 700 * 3 / 4  # two places on an axis of 700
    assert min(blue)[0] == pytest.approx(left, abs=9) and max(blue)[0] == pytest.approx(right, abs=9)

    def level(accuracy):  # on an axis from 40 to 65
        return 100 + 440 * (65 - accuracy) / 25

    column = [y for x, y in blue if abs(x - right) <= 1]
    assert min(column) == pytest.approx(level(62), abs=2) and max(column) == pytest.approx(level(58), abs=2)
    assert any(abs(x - (left + right) / 2) <= 2 and abs(y - level(50)) <= 4 for x, y in blue)


def test_curves_that_coincide_can_be_told_apart(tmp_path):
    curve = {0: [40.0], 4: [50.0], 16: [60.0]}
    report.draw_curves({"dtd": {"a": curve, "b": curve, "c": curve}}, tmp_path / "c.png")
    counts = [len([y for _, y in pixels(tmp_path / "c.png", colour) if y < 640]) for colour in report.COLOURS[:3]]
    assert min(counts) > 1000 and counts[0] > 1.3 * max(counts[1:])  # all are seen; the first has no gaps
    styles = {(report.COLOURS[n % 7], report.DASHES[n % 4]) for n in range(28)}
    assert len(styles) == 28


def test_the_picture_has_a_panel_for_each_set(tmp_path):
    curve = {0: [40.0], 16: [60.0]}
    for sets, size in ("a", (1680, 640)), ("abc", (2520, 640)), ("abcde", (3360, 1280)):
        report.draw_curves({name: {"upt": curve} for name in sets}, tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            assert image.size == (size[0], size[1] + 60)


def test_marks_of_a_scale_are_round_and_span_the_values():
    assert report.round_numbers([40.0, 62.0]) == [40, 45, 50, 55, 60, 65]
    assert report.round_numbers([0, 53.0, -7.5]) == [-20, 0, 20, 40, 60]
    assert report.round_numbers([0.31, 0.34]) == pytest.approx([0.31, 0.32, 0.33, 0.34, 0.35])
    assert len(report.round_numbers([5.0])) >= 2  # a scale of one value has an extent, too


def test_base_to_new_has_columns_of_its_own_and_rows_that_are_no_others(tmp_path, capsys):
    write_run(tmp_path, 60.0)
    halves = dict(base=80.0, new=60.0, harmonic_mean=68.57)
    write_run(tmp_path, 80.0, zero_shot=55.5, flags=["--base-to-new"], results=dict(base_to_new=halves))
    head, *rows = table(tmp_path, capsys)
    assert head[3:] == ["dtd", "dtd: base", "dtd: harmonic mean", "dtd: new"]  # and no average over the two
    cells = {row[0]: [cell.partition(";")[0] for cell in row[3:]] for row in rows}
    assert cells == {"zeroshot": ["44.40", "", "", ""], "upt": ["60.00", "", "", ""],
                     "zeroshot base_to_new=true": ["", "55.50", "", ""],
                     "upt base_to_new=true": ["", "80.00", "68.57", "60.00"]}
    assert not any("UPT" in cell for row in rows if "base_to_new" in row[0] for cell in row)  # papers test all classes
    for flags in [], ["--base-to-new"]:
        write_run(tmp_path / "drawn", 80.0, data_name="shapes", flags=flags,
                  results=dict(base_to_new=halves if flags else {}))
    assert table(tmp_path / "drawn", capsys)[0][3:] == ["shapes", *(f"shapes: {part}" for part in
                                                                    ("base", "harmonic mean", "new"))]


def test_zero_shot_with_the_users_templates_has_a_row_of_its_own(tmp_path, capsys):
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 61.0, zero_shot=50.0, flags=["--template", "a drawing of a {}."])
    cells = {row[0]: row[3].partition(";")[0] for row in table(tmp_path, capsys)[1:]}
    assert cells == {"zeroshot": "44.40", "upt": "60.00", "zeroshot template=a drawing of a {}.": "50.00",
                     "upt template=a drawing of a {}.": "61.00"}


def test_a_result_of_an_older_version_without_a_setting_is_left_out(tmp_path, capsys):
    write_run(tmp_path, 60.0)
    folder = write_run(tmp_path, 61.0, seed=2)
    old = {key: value for key, value in result(folder).items() if key != "templates"}
    (folder / "result.json").write_text(json.dumps(old))
    assert table(tmp_path, capsys)[2][3].startswith("60.00;")


def test_gains_are_bars_as_long_as_the_gain(tmp_path):
    report.draw_gains({"upt": {"dtd": 20.0, "ucf101": 10.0}, "vpt": {"dtd": -10.0}}, tmp_path / "g.png")
    upt, vpt = (pixels(tmp_path / "g.png", colour) for colour in report.COLOURS[:2])
    lengths = []
    for found in upt, vpt:
        for middle in sorted({y for _, y in found})[13::27]:
            row = [x for x, y in found if y == middle]
            lengths.append(max(row) - min(row))
    assert [round(length / max(lengths), 2) for length in lengths] == [1.0, 0.5, 0.5]  # the longest comes first
    assert min(upt)[0] == pytest.approx(max(vpt)[0] - 840, abs=1)  # zero is at the same place in both panels
    assert min(vpt)[0] > 840 + 100 + 250  # behind the name


def test_gains_and_variances_are_drawn_for_the_runs_there_are(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "draw_gains", lambda gains, path: drawn.update(gains=gains))
    monkeypatch.setattr(report, "draw_variances", lambda gains, variances, path: drawn.update(variances=variances))
    write_run(tmp_path, 50.0, shots=1)
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2)
    table(tmp_path, capsys)
    assert drawn == {"gains": {"upt, ViT-B/16": {"dtd": pytest.approx(62.0 - 44.4)}}}  # of the most shots
    before = {"image_within_classes": 0.3, "text_between_classes": 0.7}
    write_run(tmp_path, 70.0, seed=3, results=dict(variance=dict(before=before)))
    table(tmp_path, capsys)
    assert drawn["variances"] == {"dtd": {"upt, ViT-B/16": before}}


def test_points_stand_at_their_variance_and_gain(tmp_path):
    variances = {name: {"upt": {"text_between_classes": t, "image_within_classes": v}}
                 for name, t, v in (("a", 0.12, 0.28), ("b", 0.28, 0.12))}
    report.draw_variances({"upt": {"a": 0.0, "b": 20.0, "c": 5.0}}, variances, tmp_path / "v.png")
    found = [(x, y) for x, y in pixels(tmp_path / "v.png", report.COLOURS[0]) if y < 600]
    # Gains from 0 to 25 on 440 pixels, variances from 0.1 to 0.3 on 640: low left and high right, then the other way.
    for x, y in (100 + 64, 540), (100 + 576, 188), (940 + 576, 540), (940 + 64, 188):
        assert (x, y) in found
    assert not any(abs(y - 452) < 20 for _, y in found)  # of c there is no variance


def test_names_of_points_do_not_lie_on_each_other(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(report, "write", lambda pen, x, y, text, *rest, **more: written.append((text, y)))
    variances = {name: {"upt": {"text_between_classes": variance, "image_within_classes": 0.4}}
                 for name, variance in (("a", 0.1), ("b", 0.1), ("c", 0.9))}
    report.draw_variances({"upt": {"a": 10.0, "b": 10.0, "c": 10.0}}, variances, tmp_path / "v.png")
    a, b, c, *image = (y for text, y in written if text in ("a", "b", "c"))
    assert b - a >= 28 and c == a  # which is far away, to the right
    assert len(image) == 3 and min(y - x for x, y in zip(image, image[1:], strict=False)) >= 28


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


def test_every_finished_run_is_in_the_table(world, capsys):
    head, *rows = table(world / "runs", capsys)
    assert [row[0] for row in rows] == ["zeroshot", "coop epochs=2", "fgvpl epochs=2"]
    assert (world / "runs" / "summary.png").exists()


def test_a_run_is_described_by_its_classes_and_confusions(runs, capsys):
    red, green, blue = "red", "green", "blue"
    answers = [(red, red)] * 3 + [(red, blue)] + [(green, blue)] * 3 + [(green, green)] + [(blue, blue)]
    write_predictions(runs[0], [(f"{i}.png", *pair, 0.5) for i, pair in enumerate(answers)])
    start(runs[0])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|") and "--" not in line]
    assert rows == [["class", "right", "of", "%"], ["green", "1", "4", "25.0"], ["red", "3", "4", "75.0"],
                    ["blue", "1", "1", "100.0"],
                    ["class", "taken for", "times"], ["green", "blue", "3"], ["red", "blue", "1"]]
    assert "balanced      66.67 %" in out
    losses = result(runs[0])["losses"]
    assert f"{losses[0]:.3f} to {losses[-1]:.3f} in 2 epochs" in out and f"{result(runs[0])['accuracy']:.2f} %" in out
    with (runs[0] / "report.csv").open(newline="") as file:
        tables = [row[0] for row in csv.reader(file)]
    assert tables == ["table"] + ["class"] * 3 + ["confusion"] * 2 + ["context"] * 3 * 16


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
        assert sheet.width == 3 * (report.SIDE + 30)
        for i, name in enumerate(["blue", "green", "red"]):
            left = i * (report.SIDE + 30) + 30
            mean = sheet.crop((left, 30, left + 300, 330)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
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


def test_attention_has_a_row_for_each_picture_and_a_column_for_each_map(world, runs, capsys):
    pictures = [world / "photos" / name / "00.png" for name in ("red", "blue")]
    start(*runs[:2], "--attention", *pictures)
    with Image.open(runs[0] / "attention.png") as sheet:
        columns = 1 + 1 + 1 + 3  # the picture, zero-shot CLIP, coop, and fgvpl's three maps
        assert sheet.size == (columns * (report.SIDE + 30), 50 + 2 * (report.SIDE + 62))

        def panel(column, row):
            x, y = 15 + column * (report.SIDE + 30), 50 + row * (report.SIDE + 62)
            return sheet.crop((x, y, x + report.SIDE, y + report.SIDE)).tobytes()

        assert panel(1, 0) == panel(2, 0)  # CoOp leaves the image tower alone
        for row in 0, 1:
            assert len({panel(column, row) for column in (0, 1, 3, 4)}) == 4
        assert panel(1, 0) != panel(1, 1)


def test_attention_columns_say_what_each_method_predicts(world, runs, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_sheet", lambda titles, rows, path: drawn.append((titles, rows)))
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


def test_an_overlay_is_light_where_the_map_is_high_and_smooth_between():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    shown = report.overlay(grey, torch.tensor([0.0, 0.0, 0.0, 5.0])).convert("L")
    row = [shown.getpixel((x, 60)) for x in range(64)]
    assert row[-1] - row[0] > 80 and row == sorted(row) and len(set(row)) > 10
    mask = report.overlay(grey, torch.tensor([False, True, False, False]))
    assert mask.getpixel((50, 10)) == (128, 128, 128) and max(mask.getpixel((10, 10))) < 40
    assert report.overlay(grey, torch.ones(4, dtype=torch.bool)).getpixel((5, 5)) == (128, 128, 128)
    for value in 0.2, math.nan:  # a map without contrast is shown
        assert len(report.overlay(grey, torch.full((4,), value)).getcolors()) == 1


def test_the_colour_scale_grows_lighter_all_the_way():
    ramp = report.overlay(Image.new("RGB", (512, 512)), torch.arange(16.0).repeat(16))
    light = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (ramp.getpixel((x, 256)) for x in range(512))]
    assert all(after >= before - 0.5 for before, after in zip(light, light[1:], strict=False))


def test_a_text_that_is_too_long_loses_its_end():
    image = Image.new("RGB", (300, 40), "white")
    report.write(report.ImageDraw.Draw(image), 0, 20, "a very long name of a class that nobody can read", room=200)
    box = image.convert("L").point(lambda v: 255 - v).getbbox()
    assert 150 < box[2] <= 202


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


def test_features_are_drawn_for_zero_shot_and_the_run_side_by_side(world, runs, capsys):
    start(runs[1], "--root", world, "--features", "red", "blue")
    with Image.open(runs[1] / "features.png") as image:
        assert image.size == (1680, 900 + 2 * 40 + 20)
        left, right = (image.crop((x + 110, 110, x + 790, 790)).tobytes() for x in (0, 840))
    assert left != right
    for side in 450, 1290:  # less their mean, two vectors are opposite: their ends lie around the origin
        ends = [(x, y) for x, y in pixels(runs[1] / "features.png", "black") if abs(x - side) < 350 and 100 < y < 800]
        assert sum(x for x, _ in ends) / len(ends) == pytest.approx(side, abs=4)
        assert sum(y for _, y in ends) / len(ends) == pytest.approx(450, abs=4)
    for colour in report.COLOURS[:2]:
        assert {x < 820 for x, y in pixels(runs[1] / "features.png", colour) if y < 800} == {True, False}
    assert not pixels(runs[1] / "features.png", report.COLOURS[2])


def test_features_are_of_classes_that_there_are(runs, capsys):
    start(runs[0], "--features", "red", "puce", status=2)
    assert "blue, green, red" in capsys.readouterr().err
    start(runs[0], "--features")  # without names the first ten
    with Image.open(runs[0] / "features.png") as image:
        assert image.height == 900 + 3 * 40 + 20


def test_features_of_a_class_alone_and_of_none(runs, capsys, monkeypatch):
    start(runs[0], "--features", "red")
    assert pixels(runs[0] / "features.png", report.COLOURS[0])
    load = data.load
    monkeypatch.setattr(data, "load", lambda *args, **more: replace(load(*args, **more), test=load(*args).test[:1]))
    start(runs[0], "--features", "blue")  # a single picture
    start(runs[0], "--features", "red", status=2)
    assert "no test pictures of these classes" in capsys.readouterr().err


def test_features_are_those_of_the_classes_named_with_their_variances(runs, monkeypatch):
    seen, variance, written = [], report.inter_class_variance, []
    monkeypatch.setattr(report, "inter_class_variance", lambda text: seen.append(text) or variance(text))
    monkeypatch.setattr(report, "write", lambda pen, x, y, text, *rest: written.append(text))
    start(runs[0], "--features", "red", "blue")
    method = train.load_run(runs[0], "cpu")
    with torch.no_grad():
        text = torch.nn.functional.normalize(method.encode_text(), dim=-1)
    rows = [method.classnames.index(name) for name in ("red", "blue")]
    torch.testing.assert_close(seen[1], text[rows])
    torch.testing.assert_close(seen[0], method.zero_shot[rows])
    assert {"red", "blue", "zero-shot", "coop epochs=2"} <= set(written) and "green" not in written
    assert [f"Var_t {variance(x):.3f}" for x in seen] == [x.partition(", ")[2] for x in written if "Var_v" in x]


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
                seen[name] = sheet.width // (report.SIDE + 30), sheet.height
    height = 50 + 2 * (report.SIDE + 62)
    assert seen == {"vpt": (11, height), "upt": (5, height), "dpt": (4, height)}  # 10, 4 prompts, 3 classes' prompts
    assert "no visual prompts" in capsys.readouterr().err


def test_prompt_attention_is_what_patches_would_give_to_the_prompt(world, runs, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "overlay", lambda picture, values: shown.append(values) or picture)
    start(runs[1], "--prompt-attention", world / "photos" / "red" / "00.png")
    method, image = train.load_run(runs[1], "cpu"), report.preprocess(32)(data.read(world / "photos/red/00.png"))
    with torch.no_grad():
        z = method.run_blocks(method.embed(image.unsqueeze(0)))[0]  # (1, 1+4+1, D), the prompt is the last token
        block = method.clip.visual.blocks[-1]
        h = block.ln_1(z)
        q, (k, _) = block.attn.query(h), block.attn.key_value(h)
        weights = torch.stack([(q[0, head] @ k[0, head].T / 8).softmax(dim=1) for head in range(2)]).mean(dim=0)
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
