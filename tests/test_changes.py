"""Where a finished run's command is given again: what the run was made of is compared, and what it lacks is added."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_state_dict
from PIL import Image
from test_train import contents, draw, main, only_run, prompts, result, run_folders

import data
import train
from clip_min import UserError
from support import benchmarks, changes, checks, identity


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photographs with train and test folders, weights, and a finished run on them, which tests copy."""
    folder = tmp_path_factory.mktemp("made")
    for part in "train", "test":
        draw(folder / "photos" / part, 4)
        for picture in (folder / "photos" / part).rglob("*.png"):  # no two are copies
            mark(picture, (len(part), int(picture.stem), len(picture.parent.name)))
    torch.save(random_state_dict(**TINY), folder / "weights.pt")
    return folder


def mark(path, colour):
    picture = Image.open(path).convert("RGB")
    picture.putpixel((0, 0), colour)
    picture.save(path)


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


@pytest.fixture
def start(place):
    """train.main on the copies, two pictures of each class and one epoch."""
    return lambda *flags: main(
        "--data", place / "photos", "--backbone", place / "weights.pt", "--shots", 2, "--epochs", 1, "--device", "cpu",
        "--out", place / "runs", *flags)


def make_older(folder):
    """As a run that was made before it was recorded what it was made of."""
    (folder / "result.json").write_text(json.dumps(
        {key: value for key, value in result(folder).items() if key != "made_of"}))
    saved = prompts(folder)
    del saved["weights"]
    torch.save(saved, folder / "prompts.pt")


def other_weights(place):
    torch.save(random_state_dict(**TINY, seed=1), place / "weights.pt")


def rename_class(place):
    for part in "train", "test":
        (place / "photos" / part / "red").rename(place / "photos" / part / "crimson")


def delete_class(place):
    for part in "train", "test":
        shutil.rmtree(place / "photos" / part / "red")


def add_class(place):
    for part in "train", "test":
        draw(place / "photos" / part, 2, ["plaid"])


def swap_class_names(place):
    (place / "photos" / "classnames.txt").write_text("blue red\nred blue\n")


def move_a_test_picture(place):
    (place / "photos/test/red/00.png").rename(place / "photos/test/blue/moved.png")


def move_a_training_picture(place):
    (place / "photos/train/red/00.png").rename(place / "photos/train/blue/moved.png")


def overwrite_every_training_picture(place):
    for picture in (place / "photos/train").rglob("*.png"):
        mark(picture, (9, 9, 9))


def overwrite_a_test_picture(place):
    mark(place / "photos/test/red/00.png", (9, 9, 9))


def delete_a_test_picture(place):
    (place / "photos/test/red/00.png").unlink()


CHANGES = {  # what changes -> what the sentence names
    rename_class: ["1 class no longer part of it: red", "1 class new in it: crimson"],
    delete_class: ["1 class no longer part of it: red"], add_class: ["1 class new in it: plaid"],
    swap_class_names: ["its classes have another order"],
    move_a_test_picture: ["no longer part of it: test/red/00.png", "new in it: test/blue/moved.png"],
    move_a_training_picture: ["picture"], delete_a_test_picture: ["1 picture no longer part of it: test/red/00.png"],
    overwrite_every_training_picture: ["6 pictures with another class, part or content: train/"],
    overwrite_a_test_picture: ["photos were added, removed, moved or overwritten"],
    other_weights: ["weights.pt holds other weights"],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_finished_run_was_made_of_has_changed(place, start, capsys, change):
    assert start() == start() == 0
    assert capsys.readouterr().out.count("finished ") == 1
    before, folder = contents(place / "runs"), only_run(place / "runs")
    change(place)
    assert start("--seeds", 1, 2) == 2  # and nothing new is trained beside it
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert "finished  " not in out and len(errors) == 1 and str(folder) in errors[0]
    assert all(part in err for part in [*CHANGES[change], "--again", "--out"]), err
    assert contents(place / "runs") == before
    assert start("--out", place / "others") == 0
    assert start("--again") == start() == 0
    assert result(folder)["made_of"] == result(only_run(place / "others"))["made_of"]


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in (
    overwrite_a_test_picture, other_weights)], ids=lambda change: change.__name__)
def test_a_run_of_before_is_judged_by_its_lists(place, start, capsys, change):
    assert start() == 0
    folder = only_run(place / "runs")
    make_older(folder)
    train.load_run(folder, "cpu")
    assert start() == 0 and "finished " in capsys.readouterr().out
    change(place)
    assert start() == 2
    err = capsys.readouterr().err
    assert all(part in err for part in CHANGES[change]), err


def test_what_is_the_same_elsewhere_or_in_another_form_has_not_changed(place, start, capsys):
    assert start() == 0
    capsys.readouterr()
    for picture in (place / "photos").rglob("*.png"):
        content = picture.read_bytes()
        picture.unlink()
        picture.write_bytes(content)  # a new file with a new time
    (place / "photos" / "train" / "red" / "notes.txt").write_text("no picture")
    torch.save({"state_dict": random_state_dict(**TINY)}, place / "weights.pt")
    assert start() == 0
    assert "finished " in capsys.readouterr().out
    train.load_run(only_run(place / "runs"), "cpu")


def test_of_large_folders_only_the_pictures_in_use_are_read(place, start, capsys, monkeypatch):
    monkeypatch.setattr(identity, "FEW", 10)
    assert start() == 0
    used = prompts(only_run(place / "runs"))["train"]
    (unused, *_) = [path for path in (place / "photos/train/red").iterdir() if f"train/red/{path.name}" not in used]
    mark(unused, (9, 9, 9))
    assert start() == 0
    overwrite_a_test_picture(place)
    assert start() == 2
    mark(place / "photos/test/red/00.png", (len("test"), 0, 3))
    assert start() == 0
    mark(place / "photos" / sorted(used)[0], (9, 9, 9))
    assert start() == 2 and sorted(used)[0] in capsys.readouterr().err


def test_a_benchmark_that_is_not_on_this_machine_is_not_fetched_for_a_finished_run(tmp_path, capsys, monkeypatch):
    flags = ["--data", "shapes", "--method", "zeroshot", "--root", tmp_path / "root", "--out", tmp_path / "runs"]
    assert main(*flags) == main(*flags) == 0
    (tmp_path / "root" / "shapes" / "test" / "red_dotted_shape" / "000.png").unlink()
    changes.benchmark_state.cache_clear()  # it holds as long as a command
    assert main(*flags) == 2
    assert "red_dotted_shape/000.png" in capsys.readouterr().err
    changes.benchmark_state.cache_clear()
    shutil.rmtree(tmp_path / "root")
    monkeypatch.setattr(data, "load", None)
    assert main(*flags) == 0
    assert not (tmp_path / "root").exists()


def test_a_benchmark_is_here_where_its_pictures_and_its_list_are(tmp_path):
    source = benchmarks.BENCHMARKS["dtd"]
    assert not benchmarks.is_here("dtd", tmp_path)
    draw(tmp_path / "dtd" / "images", 1, ["dotted"])
    assert not benchmarks.is_here("dtd", tmp_path)
    (tmp_path / "dtd" / source.split).touch()
    assert benchmarks.is_here("textures", tmp_path) and benchmarks.is_here(tmp_path, tmp_path / "nowhere")
    assert not benchmarks.is_here("imagenet", tmp_path) and not benchmarks.is_here("shapes", tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shifts": 3}', '{"shifts": {}, "made_of": [1]}'])
def test_a_finished_run_with_a_broken_result_is_one_sentence(place, start, capsys, content):
    assert start() == 0
    (only_run(place / "runs") / "result.json").write_text(content)
    assert start() == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "result.json" in err and "--again" in err


# ---- Weights ----


def test_a_run_is_not_loaded_with_other_weights(place, start):
    assert start() == 0
    folder = only_run(place / "runs")
    other_weights(place)
    with pytest.raises(UserError, match="was trained on other weights than .*weights.pt holds now"):
        train.load_run(folder, "cpu")
    make_older(folder)
    train.load_run(folder, "cpu")  # nobody knows


def test_heads_and_activation_belong_to_the_weights(clip):
    seen = {identity.of_clip(clip)}
    clip.activation = "gelu"
    seen.add(identity.of_clip(clip))
    clip.visual.blocks[0].attn.heads = 4
    seen.add(identity.of_clip(clip))
    with torch.no_grad():
        clip.logit_scale += 1e-6
    seen.add(identity.of_clip(clip))
    assert len(seen) == 4


def test_weights_are_read_once_per_command(place, start, monkeypatch):
    assert start("--seeds", 1, 2, 3) == 0
    loaded, load = [], identity.load_clip
    monkeypatch.setattr(identity, "load_clip", lambda *args, **more: loaded.append(args) or load(*args, **more))
    assert start("--seeds", 1, 2, 3) == 0
    assert len(loaded) == 1


# ---- --eval-on and --variance on a finished run ----


def shift(place, name="other", seed=0):
    folder = draw(place / name, 3)
    for picture in folder.rglob("*.png"):
        mark(picture, (seed, int(picture.stem), len(picture.parent.name)))
    return folder


@pytest.mark.parametrize("method", ["coop", "zeroshot", "fgvpl", "upt"])
def test_a_finished_run_is_tested_on_what_is_asked_besides_as_a_new_one_is(place, start, capsys, monkeypatch, method):
    flags = ["--method", method, "--eval-on", shift(place), "--variance"]
    assert start(*flags, "--out", place / "at_once") == 0
    lines = capsys.readouterr().out.splitlines()
    assert start("--method", method) == 0
    capsys.readouterr()
    monkeypatch.setattr(train, "learn", None)  # nothing is trained again
    assert start(*flags) == 0
    later = capsys.readouterr().out.splitlines()
    assert later[0].startswith("finished ") and len(later) == 4 and {*later[1:]} <= {*lines}
    found, expected = result(only_run(place / "runs")), result(only_run(place / "at_once"))
    for key in "shifts", "variance", "made_of":
        assert found[key] == expected[key] != {}
    monkeypatch.setattr(train, "evaluate", None)  # and nothing is tested twice
    assert start(*flags) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_further_data_are_added_and_the_average_is_over_all_that_are_named(place, start, capsys, monkeypatch):
    first, second = shift(place, "first"), shift(place, "second", seed=1)
    assert start("--eval-on", first) == 0
    capsys.readouterr()
    tested, evaluate_on = [], train.evaluate_on
    monkeypatch.setattr(train, "evaluate_on", lambda method, target, *args: (
        tested.append(target.folder) or evaluate_on(method, target, *args)))
    assert start("--eval-on", first, second) == 0
    assert tested == [second]
    found = result(only_run(place / "runs"))["shifts"]
    assert list(found) == [str(first), str(second)]
    mean = sum(found.values()) / 2
    assert f"{mean:.2f} % of the shifted alone" in capsys.readouterr().out


def test_shifted_data_with_other_pictures_are_tested_again(place, start, capsys):
    target = shift(place)
    assert start("--eval-on", target) == 0
    before = result(only_run(place / "runs"))["made_of"]["shifts"]
    (target / "red" / "00.png").rename(target / "blue" / "moved.png")
    assert start("--eval-on", target) == 0
    assert "other pictures than when a run was tested on it" in capsys.readouterr().err
    assert result(only_run(place / "runs"))["made_of"]["shifts"] != before


def test_a_shifted_benchmark_with_other_pictures_is_tested_again_and_one_that_is_gone_is_not(tmp_path, capsys):
    flags = ["--method", "zeroshot", "--root", tmp_path / "root", "--out", tmp_path / "runs", "--eval-on", "shapes_v2"]
    assert main(*flags) == 0
    (tmp_path / "root/shapes_v2/test/red_dotted_shape/000.png").unlink()
    assert main(*flags) == 0
    assert "shapes_v2   " in capsys.readouterr().out.rpartition("finished ")[2]
    shutil.rmtree(tmp_path / "root" / "shapes_v2")
    assert main(*flags) == 0
    assert "shapes_v2   " not in capsys.readouterr().out and not (tmp_path / "root" / "shapes_v2").exists()


@pytest.mark.parametrize("wrong", ["nowhere", "plaid"])
def test_data_that_a_run_cannot_be_tested_on_are_an_error_after_it_is_finished_too(place, start, capsys, wrong):
    assert start() == 0
    draw(place / "plaid", 2, ["plaid", "checked"])
    before = contents(place / "runs")
    assert start("--eval-on", place / wrong) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and wrong in err and contents(place / "runs") == before


# ---- The same picture on both sides ----


def test_copies_of_training_pictures_in_the_test_are_one_warning(place, start, capsys):
    assert start("--seeds", 1, 2) == 0
    assert "copies" not in capsys.readouterr().err
    photos = place / "photos"
    shutil.copy(photos / "train/red/00.png", photos / "test/red/00 (1).png")
    shutil.copy(photos / "train/red/01.png", photos / "test/blue/other.png")  # under another class, too
    assert start("--seeds", 1, 2, "--shots", 0, "--out", place / "others") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"2 of 14 test pictures of {photos} are copies of training pictures" in warning
    assert "test/blue/other.png of train/red/01.png" in warning


def test_copies_in_a_folder_that_is_divided_by_itself_are_one_warning(tmp_path, capsys):
    draw(tmp_path, 12)
    for picture in [*tmp_path.rglob("*.png")]:
        mark(picture, (int(picture.stem), len(picture.parent.name), 0))
        shutil.copy(picture, picture.with_name(f"{picture.stem} (1).png"))
    bench = data.load(tmp_path, shots=4)
    capsys.readouterr()
    checks.warn_of_copies(bench)
    (warning,) = capsys.readouterr().err.splitlines()
    trained = {path.replace(" (1)", "") for path in data.load(tmp_path, shots=0).fingerprints()}
    both = [path for path, _ in bench.test if bench.relative(path).replace(" (1)", "") in trained]
    assert f"{len(both)} of {len(bench.test)} test pictures" in warning and both


def test_a_picture_without_permission_is_one_sentence(place, start, capsys, monkeypatch):
    def denied(path, algorithm):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(identity, "file_digest", denied)
    assert start() == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and f"{place / 'photos' / 'train'}" in err
    assert "cannot be read as a picture (PermissionError: Permission denied): see to permissions and memory" in err
    assert not run_folders(place / "runs")
