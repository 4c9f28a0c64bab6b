"""What support/summary.py and support/results.py promise: the table of all runs, and which results are in it."""

import csv
import json
import math
import shutil
import sys
from dataclasses import asdict, replace

import pytest

import report
import train
from support import charts
from support.results import read_result
from support.summary import Summary


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """Charts have tests of their own, tests/test_charts.py: as where matplotlib is missing, none are drawn here."""
    def missing():
        raise charts.MissingMatplotlib("no charts in these tests")
    monkeypatch.setattr(charts, "load_matplotlib", missing)


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


def test_zero_shot_clip_and_runs_with_all_pictures_are_told_apart(tmp_path, capsys):
    write_run(tmp_path, 44.4, method="zeroshot", shots=0)  # whose folder has 0shot in its name, as that of the next
    folder = write_run(tmp_path, 80.0, shots=0)
    write_run(tmp_path, 60.0, shots=2)
    write_run(tmp_path, 70.0, shots=16)
    assert [row[:3] for row in table(tmp_path, capsys)[1:]] == [
        ["zeroshot", "ViT-B/16", "0"], ["upt", "ViT-B/16", "2"], ["upt", "ViT-B/16", "16"], ["upt", "ViT-B/16", "all"]]
    zero_shot, run = read_result(folder / "result.json", {})[0]
    assert (zero_shot.row.shots, run.row.shots) == ("0", "all")


def test_curves_begin_at_zero_shot_and_all_pictures_stand_behind_every_number_of_shots(tmp_path):
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2)
    write_run(tmp_path, 90.0, shots=0)
    write_run(tmp_path, 50.0, data_name="ucf101", zero_shot=30.4)
    write_run(tmp_path, 70.0, data_name="imagenet", method="fgvpl", zero_shot=68.0, shifts={"imagenet_a": 10.0})
    write_run(tmp_path, 71.0, data_name="dtd", method="fgvpl")
    upt, fgvpl = "upt, ViT-B/16", "fgvpl, ViT-B/16"
    curves = Summary(tmp_path, {}).curves()
    assert curves == {
        "dtd": {upt: {"0": [44.4], "16": [60.0, 64.0], "all": [90.0]}, fgvpl: {"0": [44.4], "16": [71.0]}},
        "ucf101": {upt: {"0": [30.4], "16": [50.0]}}, "imagenet": {fgvpl: {"0": [68.0], "16": [70.0]}}}
    assert list(curves["dtd"][upt]) == ["0", "16", "all"]


def result(run):
    return json.loads((run / "result.json").read_text())


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


def test_gains_are_those_of_the_most_shots_and_variances_those_that_were_measured(tmp_path):
    write_run(tmp_path, 50.0, shots=4)  # as text "4" would stand behind "16"
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2)
    summary = Summary(tmp_path, {})
    assert summary.gains() == {"upt, ViT-B/16": {"dtd": pytest.approx(62.0 - 44.4)}} and summary.variances == {}
    before = {"image_within_classes": 0.3, "text_between_classes": 0.7}
    write_run(tmp_path, 70.0, seed=3, results=dict(variance=dict(before=before)))
    assert Summary(tmp_path, {}).variances == {"dtd": {"upt, ViT-B/16": before}}
    write_run(tmp_path, 84.4, shots=0)
    assert Summary(tmp_path, {}).gains() == {"upt, ViT-B/16": {"dtd": pytest.approx(40.0)}}


def test_without_matplotlib_the_table_and_its_csv_file_come_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    write_run(tmp_path, 60.0)
    assert report.main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "| 60.00; " in out and sorted(path.name for path in tmp_path.iterdir()) == ["dtd", "summary.csv"]
    saved, note = err.splitlines()
    assert "summary.csv" in saved and note.startswith("note: ") and "pip install matplotlib" in note


def made_of(pictures="p", classes="c", weights="w" * 64, **shifts):
    return dict(made_of=dict(classes=classes, pictures=pictures, train="t", weights=weights, shifts=shifts))


OWN = dict(data="photos", data_path="/a/photos", backbone="w", backbone_path="/w.pt")


@pytest.mark.parametrize("other", [dict(pictures="q"), dict(classes="d"), dict(weights="v" * 64), None], ids=str)
def test_runs_of_other_pictures_classes_or_weights_are_never_averaged(tmp_path, capsys, other):
    """None: one that was made before it was recorded, of a user's own pictures and weights."""
    write_run(tmp_path, 40.0, results=made_of(), **OWN)
    write_run(tmp_path, 60.0, seed=2, results=made_of(), **OWN)
    folder = write_run(tmp_path, 90.0, seed=3, zero_shot=50.0, results=other and made_of(**other), **OWN)
    assert report.main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    cells = [cell.strip() for line in out.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert {"50.00 ± 10.00 (2)", "90.00"} <= {*cells} and not any("(3)" in cell for cell in cells)
    assert cells.count("44.40") == cells.count("50.00") == 1  # zero-shot CLIP stays with its own, too
    assert "average of 2" not in cells
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (2 if other is None else 1)  # both data and weights
    assert all(str(folder) in line and "--again" in line for line in warnings)
    assert other or all("earlier" in line for line in warnings)


def test_runs_of_the_same_things_are_averaged_whatever_was_picked_of_them(tmp_path, capsys):
    for seed in 1, 2:
        what = made_of()
        what["made_of"]["train"] = str(seed)
        write_run(tmp_path, 40.0 + 20 * seed, seed=seed, results=what, **OWN)
    assert table(tmp_path, capsys)[2][3] == "70.00 ± 10.00 (2)"


def test_runs_of_benchmarks_that_were_made_before_stay_with_those_of_now(tmp_path, capsys):
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2, results=made_of())
    assert table(tmp_path, capsys)[2][3].startswith("62.00 ± 2.00 (2)")
    write_run(tmp_path, 90.0, seed=3, results=made_of(pictures="q"))
    assert {cell.partition(";")[0] for cell in table(tmp_path, capsys)[-1][3:]} == {"60.00", "64.00", "90.00"}


def test_shifted_data_with_other_pictures_have_a_column_of_their_own(tmp_path, capsys):
    for seed, pictures in (1, "x"), (2, "y"):
        write_run(tmp_path, 60.0, seed=seed, shifts={"/b": 10.0 * seed}, results=made_of(**{"/b": pictures}), **OWN)
    head, _, row = table(tmp_path, capsys)
    assert row[3] == "60.00 ± 0.00 (2)" and sorted(row[4:]) == ["10.00", "20.00"]
    assert all(" → /b (" in name for name in head[4:])


@pytest.mark.parametrize("made", [None, 3, [1], {"shifts": 3}, {"pictures": 3}, {"weights": [1], "pictures": {}}],
                         ids=str)
def test_a_broken_record_of_what_a_run_was_made_of_is_no_traceback(tmp_path, capsys, made):
    write_run(tmp_path, 60.0)
    write_run(tmp_path, 64.0, seed=2, results=dict(made_of=made))
    assert table(tmp_path, capsys)[2][3].startswith("6")
