"""What train.py promises beside a run: shifted data, the papers' numbers, the summary. Pictures are made here."""

import json
import math
import statistics

import pytest
import torch
from conftest import random_clip
from PIL import Image, ImageColor
from test_train import draw

import data
import train
from dpt import CAVPT, DPT
from upt import UPT

NUMBERS = {"n01440764": 0, "n02012849": 134, "n03126707": 517, "n15075141": 999}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four classes of ImageNet and of its shifts, and a dtd of two classes in CoOp's layout."""
    root = tmp_path_factory.mktemp("root")
    for part in "train", "val":
        draw(root / "imagenet" / "images" / part, 6, NUMBERS)
    draw(root / "imagenetv2" / "imagenetv2-matched-frequency-format-val", 3, [str(n) for n in NUMBERS.values()])
    draw(root / "imagenet-sketch" / "sketch", 3, NUMBERS)
    draw(root / "imagenet-adversarial" / "imagenet-a", 4, ["n03126707", "n02012849"])
    draw(root / "imagenet-rendition" / "imagenet-r", 4, ["n15075141", "n01440764", "n03126707"])
    draw(root / "dtd" / "images", 6, ["dotted", "lined"])
    rows = [[f"{name}/{i:02}.png", label, name] for label, name in enumerate(["dotted", "lined"]) for i in range(6)]
    split = {"train": rows[:4] + rows[6:10], "val": [], "test": rows[4:6] + rows[10:]}
    (root / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    return root


@pytest.fixture
def start(root, tmp_path, monkeypatch):
    """train.main on these data; ViT-B/16 and ViT-B/32 are a small random CLIP. -> result.json of seed 1, 2 shots."""
    monkeypatch.setattr(train, "load_clip", lambda name, device: random_clip())

    def run(data_name, method, *flags, status=0):
        flags = ["--data", data_name, "--method", method, "--shots", "2", "--epochs", "1", *flags]
        assert train.main([*flags, "--root", str(root), "--device", "cpu", "--out", str(tmp_path / "runs")]) == status
        found = list((tmp_path / "runs").rglob("result.json"))
        return json.loads(found[0].read_text()) if found else None

    return run


RED = ImageColor.getrgb("hsl(0, 75%, 42%)")
SHIFTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]


# ---- Shifted data ----


@pytest.mark.parametrize("method, options", [
    ("zeroshot", []), ("coop", []), ("coop", ["csc=true", "n_ctx=4"]), ("vpt", []), ("vlp", []), ("dpt", []),
    ("cavpt", []), ("cavpt", ["text=template"]), ("upt", []), ("fgvpl", []), ("fgvpl", ["parts=tip-f"]),
], ids=str)
def test_every_method_is_tested_on_the_shifts_and_again_from_its_run(start, tmp_path, capsys, method, options):
    sets = ["--set", *options] if options else []
    run = start("imagenet", method, "--eval-on", *SHIFTS, *sets)
    assert list(run["shifts"]) == SHIFTS and all(0 <= accuracy <= 100 for accuracy in run["shifts"].values())
    out = capsys.readouterr().out
    assert f"{statistics.mean(run['shifts'].values()):.2f} % of the shifted alone (OOD average)" in out
    assert f"{statistics.mean([run['accuracy'], *run['shifts'].values()]):.2f} % with imagenet" in out
    folder = next((tmp_path / "runs").rglob("result.json")).parent
    start("imagenet", method, "--eval-on", "v2", "a", "--load", str(folder))
    again = capsys.readouterr().out
    assert f"shift     {run['shifts']['imagenetv2']:.2f} %" in again
    assert f"shift     {run['shifts']['imagenet_a']:.2f} %" in again


def transferred(root, method_class, **options):
    """A method with random learned tensors, trained "on" imagenet -> its logits, those on imagenet_a, the columns."""
    torch.manual_seed(0)
    source, target = (data.load(name, root, 0) for name in ("imagenet", "imagenet_a"))
    templates = ("art of the {}.",)  # not the target's
    method = method_class(random_clip(), source.classnames, templates, **options)
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    saved = dict(options=options, templates=templates)
    model, columns = train.transferred(method.eval(), saved, source, target)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        return method(images), model.eval()(images), columns


@pytest.mark.parametrize("name, options", [("coop", {}), ("vpt", {}), ("vlp", {}), ("upt", {}), ("dpt", dict(k_n=0))])
def test_a_method_whose_prompts_are_rebuilt_keeps_the_logits_of_the_classes_that_remain(root, name, options):
    whole, part, columns = transferred(root, train.METHODS[name], **options)
    assert columns is None
    torch.testing.assert_close(part, whole[:, [1, 2]], rtol=1e-4, atol=1e-3)


def test_what_is_tied_to_the_training_classes_is_read_in_part(root):
    whole, part, columns = transferred(root, train.METHODS["coop"], csc=True)
    assert columns == [1, 2] and torch.equal(whole, part)


@pytest.mark.parametrize("method_class", [DPT, CAVPT])
def test_class_aware_prompts_are_made_of_the_targets_classes(root, method_class):
    whole, part, columns = transferred(root, method_class, k_n=2)
    assert columns is None and part.shape == (3, 2)
    assert not torch.allclose(part, whole[:, [1, 2]], atol=1e-3)  # of four classes others are the likeliest two


def test_the_columns_decide_what_counts_as_right(root):
    source, target = (data.load(name, root, 0) for name in ("imagenet", "imagenet_a"))
    model = torch.nn.Linear(1, 1)
    model.encode_text = lambda: None
    model.forward = lambda images, text: torch.tensor([[9.0, 1.0, 2.0, 9.0]]).expand(len(images), -1)
    loader = train.test_loader(target, random_clip(), torch.device("cpu"), 0)
    assert train.evaluate(model, loader, torch.device("cpu"), None, [1, 2]) == 50  # always the second of the two
    assert source.class_ids == [0, 134, 517, 999] and target.class_ids == [134, 517]


def test_only_the_columns_of_the_targets_classes_count_where_a_method_stays_whole(start, monkeypatch):
    columns, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: (columns.append(a[4] if len(a) > 4 else None), evaluate(*a))[1])
    for method, options in ("fgvpl", "parts=tip"), ("coop", "csc=true"), ("coop", "csc=false"):
        columns.clear()
        start("imagenet", method, "--set", options, "--eval-on", *SHIFTS)
        whole = options != "csc=false"
        assert columns == [None] * 4 + [[1, 2] if whole else None, [0, 2, 3] if whole else None]


def test_each_shift_is_compared_with_its_own_numbers(start, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "published", lambda run, name: asked.append(name) or [])
    start("imagenet", "zeroshot", "--eval-on", *SHIFTS)
    assert asked == ["imagenet", *SHIFTS]


@pytest.mark.parametrize("sets", [["imagenet"], ["v2", "imagenetv2"]], ids=str)
def test_a_set_is_tested_once(start, capsys, sets):
    assert start("imagenet", "coop", "--eval-on", *sets, status=2) is None
    assert "already" in capsys.readouterr().err


def test_a_second_eval_on_adds_to_the_first(start):
    assert list(start("imagenet", "zeroshot", "--eval-on", "a", "--eval-on", "r")["shifts"]) == SHIFTS[2:]


def test_data_with_other_classes_are_no_shift(start, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", None)  # it is said before the training
    assert start("imagenet", "coop", "--eval-on", "dtd", status=2) is None
    assert "dtd" in capsys.readouterr().err
    assert start("dtd", "coop", "--eval-on", "imagenet_a", status=2) is None
    assert "imagenet_a" in capsys.readouterr().err


def test_nothing_is_trained_on_data_without_training_pictures(start, capsys):
    assert start("imagenet_a", "coop", status=2) is None
    assert "--eval-on imagenet_a" in capsys.readouterr().err
    assert start("imagenet_a", "zeroshot")["test_images"] == 8


def test_fgvpl_on_imagenet_reads_the_seven_templates(start, tmp_path):
    start("imagenet", "fgvpl", "--set", "parts=tar")
    saved = torch.load(next((tmp_path / "runs").rglob("prompts.pt")), weights_only=True)
    assert len(saved["templates"]) == 7 and saved["templates"][0] == "itap of a {}."


# ---- The papers' numbers ----


@pytest.mark.parametrize("command, backbone, shots, name, expected", [
    ("zeroshot", "ViT-B/16", 4, "eurosat", [47.69]),
    ("coop", "ViT-B/16", 16, "eurosat", [83.74]),
    ("coop", "ViT-B/32", 16, "eurosat", [83.12, 83.11]),
    ("coop n_ctx=16", "ViT-B/16", 16, "imagenet", [71.62, 71.9]),
    ("coop ctx_init=a_photo_of_a", "ViT-B/16", 16, "imagenet", [71.51, 71.36]),
    ("coop n_ctx=4", "ViT-B/16", 16, "imagenet", []),
    ("coop", "ViT-B/16", 8, "eurosat", []),
    ("coop", "ViT-L/14", 16, "eurosat", []),
    ("coop --epochs=10", "ViT-B/16", 16, "eurosat", []),
    ("coop --epochs=200", "ViT-B/16", 16, "eurosat", [83.74]),  # what the recipe says anyway
    ("vpt --lr=0.002 --warmup-epochs=1 n_ctx=4", "ViT-B/16", 16, "imagenet_a", [43.85]),
    ("vpt deep=false --lr=0.001", "ViT-B/32", 16, "eurosat", [79.33]),
    ("vlp guide_epochs=0 --epochs=200", "ViT-B/32", 16, "eurosat", [91.84]),
    ("dpt", "ViT-B/32", 16, "eurosat", [91.16]),
    ("dpt", "ViT-B/32", 1, "imagenetv2", [55.15]),
    ("dpt alpha=0", "ViT-B/32", 16, "average_11", [78.96]),
    ("dpt k_n=0", "ViT-B/32", 16, "average_11", [78.41]),
    ("cavpt text=template k_n=5 cavpt_loss=false", "ViT-B/32", 16, "eurosat", [92.16]),
    ("cavpt", "ViT-B/32", 16, "eurosat", []),  # the paper does not say for how many classes
    ("upt", "ViT-B/16", 16, "imagenetv2", [64.35]),
    ("upt mode=mlp", "ViT-B/16", 16, "imagenet", [71.0]),
    ("fgvpl", "ViT-B/16", 2, "imagenet", [71.1]),
    ("fgvpl parts=fvp", "ViT-B/16", 16, "imagenet", [74.5]),
    ("fgvpl alpha=0.1", "ViT-B/16", 16, "imagenet", [75.3]),
    ("fgvpl parts=tip-f", "ViT-B/16", 16, "imagenet", []),  # the best test epoch's: not what a run reports
], ids=str)
def test_a_run_finds_what_the_papers_report_for_exactly_its_setting(command, backbone, shots, name, expected):
    method, *words = command.split()
    flags = {key: None for key in train.FLAGS}
    for word in [word for word in words if word.startswith("--")]:
        key, value = word[2:].replace("-", "_").split("=")
        flags[key] = float(value) if key == "lr" else int(value)
    pairs = [word.replace("a_photo_of_a", "a photo of a") for word in words if not word.startswith("--")]
    method_class, source = train.METHODS[method], "imagenet" if "imagenet" in name else name
    options = train.parse_options(method_class, pairs, method)
    recipe = train.resolve_recipe(method_class.recipe, options, source, shots, type("Flags", (), flags))
    options = recipe.pop("options", {}) | options
    run = dict(method=method, backbone=backbone, shots=shots, options=options, recipe=recipe, data=source)
    assert [value for value, _ in train.published(run, name)] == expected


def test_a_run_prints_and_saves_the_papers_number(start, capsys):
    run = start("dtd", "zeroshot", "--backbone", "ViT-B/32")
    assert (run["published"], run["published_source"]) == (44.03, "DPT, Table I")
    assert "(DPT, Table I: 44.03; CAVPT-v1, Table 1: 43.97)" in capsys.readouterr().out


def test_a_folder_of_ones_own_is_not_compared_with_a_benchmark_of_its_name(start, root):
    draw(root / "own" / "dtd", 6, ["dotted", "lined"])
    run = start(str(root / "own" / "dtd"), "zeroshot", "--backbone", "ViT-B/32")
    assert run["data"] == "dtd" and run["published"] is None


# ---- The summary ----


def write_run(out, seed, accuracy, **changes):
    run = dict(method="upt", data="dtd", backbone="ViT-B/16", shots=16, seed=seed, zero_shot=44.4, accuracy=accuracy,
               published=None, published_source=None, shifts={}, options={}) | changes
    run["recipe"] = train.resolve_recipe(UPT.recipe, {}, run["data"], run["shots"])
    folder = out / f"{run['data']}-{run['method']}-{run['shots']}-{seed}-{len(str(changes))}"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(run))


def summary(out, capsys):
    assert train.main(["--summary", "--out", str(out)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_summary_has_methods_by_rows_and_data_by_columns(tmp_path, capsys):
    for seed, accuracy in zip((1, 2, 3), (60.0, 66.0, 63.0), strict=True):
        write_run(tmp_path, seed, accuracy, published=70.2, published_source="UPT, Table 2")
    write_run(tmp_path, 1, 50.0, shots=1)
    write_run(tmp_path, 1, 64.0, options={"mode": "mlp"})
    write_run(tmp_path, 1, 80.0, data="ucf101")
    head, rule, *rows = summary(tmp_path, capsys)
    assert head == ["method", "backbone", "shots", "dtd", "ucf101", "average of 2"] and set(rule) == {"---"}
    assert rows == [
        ["upt", "ViT-B/16", "1", "50.00 ± 0.00 (1)", "", ""],
        ["upt", "ViT-B/16", "16", "63.00 ± 2.45 (3; paper 70.65)", "80.00 ± 0.00 (1)", "71.50"],
        ["upt mode=mlp", "ViT-B/16", "16", "64.00 ± 0.00 (1)", "", ""],
    ]


def test_shifts_are_columns_but_not_in_the_average(tmp_path, capsys):
    write_run(tmp_path, 1, 70.0, data="imagenet", shifts={"imagenet_a": 40.0}, published=72.63)
    head, _, row = summary(tmp_path, capsys)
    assert head[3:] == ["imagenet", "imagenet_a", "average of 1"]
    cells = ["70.00 ± 0.00 (1; paper 72.63)", "40.00 ± 0.00 (1; paper 50.66)"]
    assert row == ["upt", "ViT-B/16", "16", *cells, "70.00"]


def test_the_curves_are_a_picture_with_a_panel_for_each_set_and_a_colour_for_each_method(tmp_path, capsys):
    write_run(tmp_path, 1, 60.0)
    summary(tmp_path, capsys)
    with Image.open(tmp_path / "summary.png") as image:
        one, colours = image.size, {colour for _, colour in image.getcolors(1 << 20)}
    write_run(tmp_path, 1, 90.0, shots=0)
    write_run(tmp_path, 1, 70.0, options={"mode": "mlp"})
    write_run(tmp_path, 1, 70.0, data="ucf101")
    summary(tmp_path, capsys)
    with Image.open(tmp_path / "summary.png") as image:
        assert one[0] == 840 and image.width == 3 * 420  # two sets and their average
        assert len({colour for _, colour in image.getcolors(1 << 20)} - colours) > 0


def test_a_curve_passes_through_its_accuracies():
    image = train.draw_curves({"dtd": {"upt": {0: 40.0, 16: 60.0}}})
    red = [(x, y) for x in range(image.width) for y in range(260) if image.getpixel((x, y)) == RED]
    (left, low), (right, high) = min(red), max(red)
    assert low - high == pytest.approx(200 * 20 / 25, abs=8)  # from 40 to 60 on an axis from 40 to 65
    assert right - left == pytest.approx(350 / 2, abs=8)  # two places on an axis of 350
    assert sum(x == left + 3 for x, _ in red) >= 5 <= sum(x == right - 3 for x, _ in red)  # a dot at either end


def test_the_zero_point_is_zero_shot_and_all_pictures_stand_behind_every_number_of_shots(tmp_path, capsys, monkeypatch):
    drawn, draw_curves = [], train.draw_curves
    monkeypatch.setattr(train, "draw_curves", lambda curves: (drawn.append(curves), draw_curves(curves))[1])
    write_run(tmp_path, 1, 60.0)
    write_run(tmp_path, 1, 90.0, shots=0)
    write_run(tmp_path, 1, 50.0, data="ucf101", zero_shot=30.4)
    head, _, *rows = summary(tmp_path, capsys)
    assert [row[2] for row in rows] == ["16", "all"]
    label = "upt, ViT-B/16"
    assert drawn == [{"average of 2": {label: {0: pytest.approx(37.4), 16: 55.0}},
                      "dtd": {label: {0: 44.4, 16: 60.0, math.inf: 90.0}}, "ucf101": {label: {0: 30.4, 16: 50.0}}}]


def test_the_average_is_over_benchmarks_where_there_are_some(tmp_path, capsys):
    write_run(tmp_path, 1, 60.0)
    write_run(tmp_path, 1, 90.0, data="shapes", backbone="tiny")
    head, _, *rows = summary(tmp_path, capsys)
    assert head[-1] == "average of 1" and [row[-1] for row in rows] == ["60.00", ""]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"method": "upt"}', '{"method": "none"}', "\xff"])
def test_a_file_that_is_no_result_is_left_out_with_its_name(tmp_path, capsys, content):
    write_run(tmp_path, 1, 60.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_bytes(content.encode("latin1"))
    assert train.main(["--summary", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "60.00" in out and str(tmp_path / "other" / "result.json") in err


def test_without_runs_the_summary_says_so(tmp_path, capsys):
    assert train.main(["--summary", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_every_finished_run_can_be_summarised(start, tmp_path, capsys):
    start("imagenet", "dpt", "--eval-on", "imagenet_r")
    start("dtd", "fgvpl", "--set", "parts=tip")
    start("dtd", "zeroshot")
    rows = summary(tmp_path / "runs", capsys)
    assert [row[0] for row in rows[2:]] == ["dpt epochs=1", "fgvpl parts=tip epochs=1", "zeroshot"]


def test_prompts_of_an_older_version_are_refused_in_one_sentence(start, tmp_path, capsys):
    start("dtd", "zeroshot")
    file = next((tmp_path / "runs").rglob("prompts.pt"))
    saved = torch.load(file, weights_only=True)
    del saved["recipe"]
    torch.save(saved, file)
    start("dtd", "zeroshot", "--load", str(file.parent), status=2)
    assert "train again" in capsys.readouterr().err


def test_a_map_without_contrast_is_shown(start, tmp_path, monkeypatch):
    start("dtd", "fgvpl", "--set", "parts=tip", "cache_views=1")
    run = next((tmp_path / "runs").rglob("result.json")).parent
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    for value in 0.2, math.nan:
        maps = torch.full((1, 4), value), torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
        monkeypatch.setattr(train.FGVPL, "attention", lambda self, images, maps=maps: maps)
        start("dtd", "fgvpl", "--load", str(run), "--attention", str(tmp_path / "white.png"))
        with Image.open(run / "attention_white.png") as sheet:
            assert [sheet.getpixel((x, 100))[0] for x in (100, 444, 788, 1132)] == [255, 25, 0, 255]


def test_the_cache_is_built_under_the_runs_precision(start, monkeypatch):
    seen, prepare = [], train.FGVPL.prepare
    monkeypatch.setattr(train.FGVPL, "prepare", lambda self, batches: (
        seen.append(torch.is_autocast_enabled("cpu")), prepare(self, batches))[1])
    for precision in "fp32", "bf16":
        start("dtd", "fgvpl", "--set", "parts=tip", "cache_views=1", "--precision", precision)
    assert seen == [False, True]
