"""What data.py promises. Pictures and downloads are made here; the real lists are read from ../shared where it lies."""

import hashlib
import http.server
import io
import json
import os
import pickle
import random
import socket
import struct
import tarfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import at_most
from PIL import Image
from torchvision import transforms

import data
from clip_min import MEAN, STD, UserError, preprocess
from support import benchmarks, checks, folders, world

SHARED = Path(__file__).parents[2] / "shared"
DTD_SPLIT = SHARED / "splits" / "split_zhou_DescribableTextures.json"
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)

# ten lines; the labels appear in the order 1, 0, 2
LINES = [("b/1", 1), ("b/2", 1), ("b/3", 1), ("a/1", 0), ("c/1", 2), ("a/2", 0), ("a/3", 0), ("a/4", 0), ("c/2", 2),
         ("c/3", 2)]


# ---- Helpers ----


def touch(folder, *names):
    """Empty files: enough for whatever only asks whether a file is there."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(folder)


def touch_split(folder, split):
    for path in {Path(folder, path) for rows in split.values() for path, _, _ in rows}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(folder)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def noise(size=(60, 40), mode="RGB", seed=0):
    values = random.Random(seed).randbytes(size[0] * size[1] * 4)
    return Image.frombytes("RGBA", size, values).convert(mode)


def pixels(picture):
    return [picture.getpixel((x, y)) for y in range(picture.height) for x in range(picture.width)]


def write_split(file, train, val=(), test=None):
    """Rows may be (path, label) or (path, label, name); names default to n0, n1, ..."""
    parts = {"train": train, "val": val, "test": train if test is None else test}
    split = {part: [[*row, f"n{row[1]}"][:3] for row in rows] for part, rows in parts.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(split), encoding="utf-8")
    return split


def relative(benchmark, items):
    return [(Path(path).relative_to(benchmark.folder).as_posix(), label) for path, label in items]


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fails(*words):
    """The error names all of this, in one line."""
    class Raises:
        def __enter__(self):
            self.context = pytest.raises(UserError)
            self.info = self.context.__enter__()

        def __exit__(self, *exception):
            caught = self.context.__exit__(*exception)
            message = str(self.info.value)
            assert all(str(word) in message for word in words) and "\n" not in message, message
            return caught

    return Raises()


@pytest.fixture(autouse=True)
def every_warning_is_shown():
    folders.warn.cache_clear()


# ---- Few-shot picks ----


@pytest.fixture(scope="module", params=["dtd/images", "dtd/dtd/images"], ids=["CoOp", "torchvision"])
def dtd_root(request, tmp_path_factory):
    """DTD in one of the two layouts: all 5,640 names, no content."""
    if not DTD_SPLIT.exists():
        pytest.skip("needs ../shared")
    root = tmp_path_factory.mktemp("root")
    touch_split(root / request.param, json.loads(DTD_SPLIT.read_text()))
    (root / "dtd" / DTD_SPLIT.name).write_bytes(DTD_SPLIT.read_bytes())
    return root


@pytest.mark.parametrize("shots, seed", [(1, 1), (1, 2), (4, 1), (4, 2)])
def test_dtd_picks_are_those_published_for_coop(dtd_root, shots, seed):
    lists = json.loads((SHARED / "picks" / f"dtd_shot_{shots}-seed_{seed}.json").read_text())
    benchmark = data.load("dtd", dtd_root, shots, seed)
    for part in "train", "val":
        published = [(row["impath"].removeprefix("./data/dtd/images/"), row["label"]) for row in lists[part]["data"]]
        assert relative(benchmark, getattr(benchmark, part)) == published
        assert all(benchmark.classnames[row["label"]] == row["classname"] for row in lists[part]["data"])


def test_dtd_has_the_published_sizes_names_and_prompt(dtd_root):
    benchmark = data.load("dtd", dtd_root, shots=0)
    assert [len(benchmark.train), len(benchmark.val), len(benchmark.test)] == [2820, 1128, 1692]
    assert len(benchmark.classnames) == 47 and "polka-dotted" in benchmark.classnames
    assert (benchmark.name, benchmark.templates, benchmark.own) == ("dtd", ("{} texture.",), False)
    assert benchmark.class_ids is None


def test_the_test_set_is_never_sub_sampled(dtd_root):
    assert data.load("dtd", dtd_root, 1).test == data.load("dtd", dtd_root, 0).test


@pytest.mark.parametrize("seed, k, train, val", [
    (0, 1, "b/2 a/4 c/1", "b/v2 a/v4 c/v2"),
    (1, 2, "b/1 b/3 a/3 a/1 c/2 c/3", "b/v2 b/v3 a/v2 a/v1 c/v2 c/v1"),
    (1, 4, "b/1 b/2 b/3 a/2 a/3 a/1 a/4 c/1 c/2 c/3", "b/v1 b/v2 b/v3 a/v1 a/v2 a/v3 a/v4 c/v1 c/v2 c/v3"),
    (2, 2, "b/1 b/3 a/1 a/2 c/1 c/2", "b/v2 b/v1 a/v1 a/v3 c/v3 c/v1"),
], ids=str)
def test_the_k_shot_rule_on_ten_lines(tmp_path, seed, k, train, val):
    """First appearance, then draw order; val from the continuing stream; classes of fewer than k whole, without a draw.

    Recorded from a literal copy of Dassl's rule on random.seed(seed)."""
    validation = [(path.replace("/", "/v"), label) for path, label in LINES]
    touch_split(tmp_path, write_split(tmp_path / "split.json", LINES, validation))
    benchmark = data.load(tmp_path, shots=k, seed=seed)
    assert " ".join(path for path, _ in relative(benchmark, benchmark.train)) == train
    assert " ".join(path for path, _ in relative(benchmark, benchmark.val)) == val


@pytest.mark.parametrize("seed", range(3))
def test_the_shots_are_places_in_the_lists_order(tmp_path, seed):
    """Nothing here is sorted: neither the labels, nor the pictures of a class, nor their folders."""
    classes, order = [f"{folder}/{{}}.jpg" for folder in ("m", "z", "a")], random.Random(5)
    train, val = ([(classes[label].format(f"{part}{i}"), label) for i in range(9) for label in (2, 0, 1)]
                  for part in ("t", "v"))
    order.shuffle(train)
    order.shuffle(val)
    assert train != sorted(train) and val != sorted(val)
    touch_split(tmp_path, write_split(tmp_path / "split.json", train, val))
    benchmark, draw = data.load(tmp_path, shots=5, seed=seed), random.Random(seed)
    for rows, k, found in (train, 5, benchmark.train), (val, 4, benchmark.val):
        expected = []
        for label in dict.fromkeys(label for _, label in rows):
            of_class = [row for row in rows if row[1] == label]
            assert of_class not in (sorted(of_class), sorted(of_class, reverse=True))
            expected += [of_class[place] for place in draw.sample(range(9), k)]
        assert relative(benchmark, found) == expected
    whole = data.load(tmp_path, shots=0)
    assert [relative(whole, part) for part in (whole.train, whole.val, whole.test)] == [train, val, train]


def ten_per_class(folder, classes=2):
    return touch_split(folder, write_split(folder / "split.json", [(f"{c}/{i}.jpg", c) for c in range(classes)
                                                                   for i in range(10)]))


def test_val_never_has_more_than_four_shots(tmp_path):
    benchmark = data.load(ten_per_class(tmp_path), shots=8)
    assert (len(benchmark.train), len(benchmark.val), len(benchmark.test)) == (16, 0, 20)
    write_split(tmp_path / "split.json", *[[(f"{c}/{i}.jpg", c) for c in range(2) for i in range(10)]] * 2)
    assert len(data.load(tmp_path, shots=8).val) == 8 and len(data.load(tmp_path, shots=2).val) == 4
    assert len(data.load(tmp_path, shots=0).val) == 20


def test_seed_0_is_a_seed(tmp_path):
    ten_per_class(tmp_path)
    first, again, other = (data.load(tmp_path, shots=4, seed=seed).train for seed in (0, 0, 1))
    assert first == again and first != other


def test_loading_leaves_the_global_random_numbers_alone(tmp_path):
    state = random.getstate()
    data.load(ten_per_class(tmp_path), shots=4)
    touch(tmp_path / "own", *(f"{c}/{i}.jpg" for c in "ab" for i in range(9)))
    data.load(tmp_path / "own")
    assert random.getstate() == state


def test_picks_are_a_hash_of_the_list_on_any_machine(tmp_path):
    here, there = (data.load(ten_per_class(tmp_path / name), shots=2, seed=3) for name in ("here", "over/there"))
    lines = "".join(f"{path} {label}\n" for path, label in relative(here, here.train))
    assert here.picks == there.picks == hashlib.sha256(lines.encode()).hexdigest()
    assert data.load(tmp_path / "here", shots=2, seed=4).picks != here.picks


def test_a_class_with_too_few_pictures_is_taken_whole_and_named_once(tmp_path, capsys):
    train = [("a/1.jpg", 0, "ant"), ("b/1.jpg", 1, "bee"), ("a/2.jpg", 0, "ant"), ("a/3.jpg", 0, "ant")]
    touch_split(tmp_path, write_split(tmp_path / "split.json", train))
    for seed in 1, 2:
        assert len(data.load(tmp_path, shots=3, seed=seed).train) == 4
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "bee (1)" in warnings[0] and "ant" not in warnings[0] and "3" in warnings[0]
    data.load(tmp_path, shots=1)
    assert capsys.readouterr().err == ""


def test_a_negative_number_of_shots_is_refused(tmp_path):
    with fails("shots", "-1"):
        data.load(ten_per_class(tmp_path), shots=-1)


# ---- Split files ----


def load_split(folder, *arguments, exists=True, **options):
    split = write_split(folder / "split.json", *arguments)
    if exists:
        touch_split(folder, split)
    return data.load(folder, **options)


def test_windows_paths_and_leading_slashes_are_read(tmp_path):
    touch(tmp_path, "a/1.jpg")
    benchmark = load_split(tmp_path, [("a\\1.jpg", 0)], [("/a/1.jpg", 0)], [("./a//1.jpg", 0)], exists=False)
    assert benchmark.train == benchmark.val == benchmark.test
    assert relative(benchmark, benchmark.train) == [("a/1.jpg", 0)]


@pytest.mark.parametrize("path", ["../secret.jpg", "a/../../secret.jpg", "a\\..\\..\\secret.jpg", "/../secret.jpg"])
def test_a_path_that_leaves_the_image_folder_is_refused(tmp_path, path):
    touch(tmp_path, "secret.jpg", "set/a/1.jpg")
    with fails(path, "split.json"):
        load_split(tmp_path / "set", [(path, 0)], exists=False)


def test_missing_pictures_are_counted_before_training(tmp_path):
    rows = [(f"a/{i}.jpg", 0) for i in range(9)]
    touch(tmp_path, "a/0.jpg", "a/1.jpg")
    with fails("7 of 18", tmp_path, "a/2.jpg, a/3.jpg, a/4.jpg"):
        load_split(tmp_path, rows, [], [("a/0.jpg", 0)] * 9, exists=False, shots=0)


def test_only_pictures_in_use_need_to_be_there(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg")
    picked = [path for path in ("a/1.jpg", "a/2.jpg", "a/gone.jpg")]
    for seed in range(20):
        rows = [(path, 0) for path in picked]
        if random.Random(seed).sample(rows, 1)[0][0] == "a/1.jpg":
            assert len(load_split(tmp_path, rows, [], rows[:1], exists=False, shots=1, seed=seed).train) == 1
            return


def test_12000_pictures_are_checked_in_a_few_steps_each(tmp_path):
    """The calls are counted, and ten times the pictures take about ten times the time. Seeking each in a list: 60."""
    seconds = []
    for number in 120, 1200:
        rows = [(f"{label}/{i}.jpg", label) for label in range(10) for i in range(number)]
        folder = touch_split(tmp_path / f"{number}", write_split(tmp_path / f"{number}" / "split.json",
                                                                rows[::2], [], rows[1::2]))
        seconds.append(min(cpu_seconds(lambda folder=folder: data.load(folder, shots=0)) for _ in range(2)))
    assert seconds[1] < 30 * seconds[0]
    with at_most(100 * 12000):
        benchmark = data.load(folder, shots=0)
    assert len(benchmark.train) + len(benchmark.test) == 12000


def cpu_seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def test_one_label_with_two_names_is_refused(tmp_path):
    with fails("label 0", "cat", "dog"):
        load_split(tmp_path, [("a/1.jpg", 0, "cat"), ("a/2.jpg", 0, "dog")])


def test_two_classes_may_have_the_same_name(tmp_path):
    rows = [("a/1.jpg", 0, "missile"), ("b/1.jpg", 1, "missile"), ("c/1.jpg", 2, "F/A-18")]
    benchmark = load_split(tmp_path, rows)
    assert benchmark.classnames == ["missile", "missile", "F/A-18"]
    assert [label for _, label in benchmark.test] == [0, 1, 2]


@pytest.mark.parametrize("labels", [(0, 2), (1, 2), (-1, 0)], ids=str)
def test_labels_with_a_gap_are_refused(tmp_path, labels):
    with fails("split.json", "without a gap"):
        load_split(tmp_path, [(f"a/{label}.jpg", label) for label in labels])


def test_a_class_that_is_only_in_the_test_is_refused(tmp_path):
    with fails("split.json", "of 2 labels 1 have training pictures"):
        load_split(tmp_path, [("a/1.jpg", 0)], [], [("b/1.jpg", 1)])


def test_a_split_without_tests_is_refused(tmp_path):
    with fails("split.json", "0 test pictures"):
        load_split(tmp_path, [("a/1.jpg", 0)], [], [])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"train": [["a/1.jpg", 0]]}', '{"train": [["a/1.jpg", "0", "a"]]}',
                                  '{"train": [["a/1.jpg", 0.5, "a"]]}', '{"train": [5]}', '{"train": 5}', "\xff"])
def test_a_file_that_is_no_split_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text, encoding="latin-1")
    with fails("split.json", "mend it"):
        data.load(tmp_path)


# ---- A user's own folders ----


def test_class_folders_are_split_by_a_hash_of_the_path(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("dog", "Cat") for i in range(10)))
    benchmark = data.load(tmp_path, shots=0)
    assert (benchmark.name, benchmark.own, benchmark.folder) == (tmp_path.name, True, tmp_path)
    assert (benchmark.classnames, benchmark.templates) == (["Cat", "dog"], ("a photo of a {}.",))
    train, test = [], []
    for label, name in enumerate(["Cat", "dog"]):
        paths = [f"{name}/{i}.jpg" for i in range(10)]
        ordered = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
        train += [(path, label) for path in ordered[:7]]
        test += [(path, label) for path in ordered[7:]]
    assert (relative(benchmark, benchmark.train), relative(benchmark, benchmark.test)) == (train, test)
    assert benchmark.val == []


def test_a_picture_that_is_added_moves_at_most_one_other(tmp_path):
    def tested(pictures):
        touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(pictures)))
        benchmark = data.load(tmp_path, shots=0)
        return dict.fromkeys(benchmark.train, False) | dict.fromkeys(benchmark.test, True)

    before = tested(2)
    for pictures in range(3, 40):
        after = tested(pictures)
        for label in 0, 1:
            assert sum(after[item] != before[item] for item in before if item[1] == label) <= 1
        before = after


@pytest.mark.parametrize("pictures, sizes", [(2, (1, 1)), (3, (2, 1)), (4, (3, 1)), (5, (4, 1)), (7, (5, 2)),
                                             (100, (70, 30))])
def test_every_class_has_pictures_to_train_and_to_test(tmp_path, pictures, sizes):
    benchmark = data.load(touch(tmp_path, *(f"a/{i}.jpg" for i in range(pictures))), shots=0)
    assert (len(benchmark.train), len(benchmark.test), benchmark.val) == (*sizes, [])


def test_four_pictures_and_four_shots_train_on_three_and_say_so(tmp_path, capsys):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    benchmark = data.load(tmp_path, shots=4)
    assert (len(benchmark.train), len(benchmark.test)) == (6, 2)
    warning = capsys.readouterr().err
    assert "fewer than 4" in warning and "a (3), b (3)" in warning and "30 %" in warning
    for part in "train", "test":
        touch(tmp_path / "parts" / part, *(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    assert len(data.load(tmp_path / "parts", shots=4).train) == 8 and capsys.readouterr().err == ""


def test_one_picture_is_too_few_for_a_class(tmp_path):
    with fails(tmp_path / "lonely", "one picture"):
        data.load(touch(tmp_path, "a/1.jpg", "a/2.jpg", "lonely/1.jpg"))


def test_the_test_set_of_class_folders_does_not_depend_on_the_seed(tmp_path):
    touch(tmp_path, *(f"a/{i}.jpg" for i in range(50)))
    assert data.load(tmp_path, shots=4, seed=1).test == data.load(tmp_path, shots=4, seed=2).test


@pytest.mark.parametrize("val", ["val", "valid", "validation", None])
def test_train_and_test_folders_are_taken_as_they_stand(tmp_path, val):
    for part in filter(None, ("train", val, "test")):
        touch(tmp_path, f"{part}/b_c/1.jpg", f"{part}/a/2.png", f"{part}/a/10.png")
    benchmark = data.load(tmp_path, shots=0)
    expected = [("a/10.png", 0), ("a/2.png", 0), ("b_c/1.jpg", 1)]
    assert benchmark.classnames == ["a", "b c"]
    assert relative(benchmark, benchmark.train) == [(f"train/{path}", label) for path, label in expected]
    assert benchmark.val == []
    assert relative(benchmark, benchmark.test) == [(f"test/{path}", label) for path, label in expected]


def test_other_folders_beside_train_and_test_are_no_classes(tmp_path):
    benchmark = data.load(touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg", "notes/1.jpg"))
    assert benchmark.classnames == ["a"] and len(benchmark.test) == 1


def test_a_missing_test_or_train_folder_is_named(tmp_path):
    with fails(tmp_path, "one folder test", "none"):
        data.load(touch(tmp_path, "train/a/1.jpg"))
    with fails(tmp_path / "only", "one folder train", "none"):
        data.load(touch(tmp_path / "only", "test/a/1.jpg").parent / "only")


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("bus", "train") for i in range(4)))
    assert data.load(tmp_path).classnames == ["bus", "train"]


def test_classes_that_are_tested_but_not_trained_are_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg", *(f"test/extra_{i}/1.jpg" for i in range(8)))
    with fails(f"{tmp_path / 'train'} lacks", tmp_path / "test", "extra_4 and 3 more"):
        data.load(tmp_path)


def test_val_is_never_read(tmp_path):
    """It may be empty, lack a class or have one more."""
    touch(tmp_path, *(f"{part}/{name}/1.jpg" for part in ("train", "test") for name in "ab"))
    touch(tmp_path, "val/a/broken.jpg", "val/c/1.jpg")
    (tmp_path / "val" / "empty").mkdir()
    benchmark = data.load(tmp_path, shots=0)
    assert (benchmark.classnames, len(benchmark.train), benchmark.val, len(benchmark.test)) == (["a", "b"], 2, [], 2)


@pytest.mark.parametrize("more", ["validation", "valid", "Train", "testing"])
def test_two_folders_for_one_part_are_refused(tmp_path, more):
    touch(tmp_path, *(f"{part}/a/1.jpg" for part in ("train", "val", "test", more)))
    with fails(tmp_path, f" {more}", " and "):
        data.load(tmp_path)


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_train_and_test_have_other_spellings(tmp_path, train, test):
    benchmark = data.load(touch(tmp_path, f"{train}/a/1.jpg", f"{train}/a/2.jpg", f"{test}/a/1.jpg"), shots=0)
    assert relative(benchmark, benchmark.train) == [(f"{train}/a/1.jpg", 0), (f"{train}/a/2.jpg", 0)]
    assert relative(benchmark, benchmark.test) == [(f"{test}/a/1.jpg", 0)]


# ---- A folder that is only tested ----


def test_class_folders_that_are_only_tested_are_tested_whole(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(60)), "lonely/1.jpg")
    benchmark = data.load(tmp_path, shots=0, whole=True)
    assert benchmark.classnames == ["a", "b", "lonely"] and (benchmark.train, benchmark.val) == ([], [])
    assert relative(benchmark, benchmark.test) == [
        *((f"{name}/{i}.jpg", label) for label, name in enumerate("ab") for i in sorted(range(60), key=str)),
        ("lonely/1.jpg", 2)]


@pytest.mark.parametrize("parts", [("test",), ("train", "test")])
def test_a_test_folder_that_is_only_tested_needs_no_train_folder(tmp_path, parts):
    touch(tmp_path, *(f"{part}/a/{i}.jpg" for part in parts for i in range(3)))
    benchmark = data.load(tmp_path, shots=0, whole=True)
    assert benchmark.train == [] and relative(benchmark, benchmark.test) == [(f"test/a/{i}.jpg", 0) for i in range(3)]


# ---- What a run was trained on is not tested ----


def own_pictures(folder, count=10):
    for label, name in enumerate("ab"):
        for i in range(count):
            save(noise((8, 8), seed=100 * label + i), folder / name / f"{i}.png")
    return folder


def test_a_folder_that_grew_is_tested_without_the_pictures_of_the_training(tmp_path):
    own_pictures(tmp_path)
    trained = data.load(tmp_path, shots=0)
    fingerprints = trained.fingerprints()
    assert list(fingerprints) == [path for path, _ in relative(trained, trained.train)]
    own_pictures(tmp_path, 15)
    grown = data.load(tmp_path, shots=0)
    seen = set(trained.train) & set(grown.test)
    assert seen  # the test would say nothing otherwise
    clean = checks.without_trained(grown, fingerprints, trained.folder)
    assert clean.test == [item for item in grown.test if item not in seen]
    assert replace(clean, test=grown.test) == grown


def test_pictures_of_the_training_are_known_by_content_elsewhere_and_by_path_in_their_folder(tmp_path):
    trained = data.load(own_pictures(tmp_path / "here"), shots=0)
    (first, _), (second, _) = trained.train[:2]
    save(Image.open(first), tmp_path / "there" / "a" / "renamed.png").write_bytes(Path(first).read_bytes())
    save(noise((8, 8), seed=999), tmp_path / "there" / trained.relative(second))  # another picture of the same path
    save(noise((8, 8), seed=998), tmp_path / "there" / "b" / "new.png")
    there = data.load(tmp_path / "there", shots=0, whole=True)
    clean = checks.without_trained(there, trained.fingerprints(), trained.folder)
    assert {there.relative(path) for path, _ in there.test} - {there.relative(path) for path, _ in clean.test} == {
        "a/renamed.png"}
    fingerprints = trained.fingerprints()
    save(noise((8, 8), seed=997), Path(second))  # the picture was edited after the training
    here = data.load(tmp_path / "here", shots=0, whole=True)
    clean = checks.without_trained(here, fingerprints, trained.folder)
    assert len(here.test) == 20 and len(clean.test) == 6


def test_a_test_set_that_was_trained_on_altogether_is_refused(tmp_path):
    trained = data.load(own_pictures(tmp_path), shots=0)
    with fails(tmp_path.name, "all 14 test pictures"):
        checks.without_trained(replace(trained, test=trained.train), trained.fingerprints(), trained.folder)


# ---- What else a user's folder may hold ----


def test_a_class_without_pictures_is_named(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "empty/notes.txt")
    with fails(tmp_path / "empty", "no pictures"):
        data.load(tmp_path)
    touch(tmp_path / "parts", "train/a/1.jpg", "train/b/1.txt", "test/a/1.jpg", "test/b/1.jpg")
    with fails(tmp_path / "parts" / "train" / "b", "no pictures"):
        data.load(tmp_path / "parts")


def test_a_folder_without_class_folders_is_named(tmp_path):
    with fails(tmp_path, "class folders"):
        data.load(touch(tmp_path, "1.jpg", "2.jpg"))
    (tmp_path / "bare").mkdir()
    with fails(tmp_path / "bare", "class folders"):
        data.load(tmp_path / "bare")


def test_junk_is_ignored(tmp_path):
    touch(tmp_path, "README.txt", "stray.jpg", ".DS_Store", ".cache/x.jpg", "__MACOSX/a/._1.jpg", "@eaDir/1.jpg",
          "$RECYCLE.BIN/1.jpg", ".ipynb_checkpoints/1.jpg")
    touch(tmp_path / "a", ".DS_Store", "Thumbs.db", "images.mat", "._1.jpg", "README", "folder.jpg/inside.jpg")
    touch(tmp_path / "a", "1.jpg", "2.JPEG", "3.Png", "4.webp")
    benchmark = data.load(tmp_path, shots=0)
    found = sorted(path for path, _ in relative(benchmark, benchmark.train + benchmark.val + benchmark.test))
    assert benchmark.classnames == ["a"] and found == ["a/1.jpg", "a/2.JPEG", "a/3.Png", "a/4.webp"]


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    touch(tmp_path, *(f"{name}/{i}.{suffix}" for name in "ab" for i in range(2) for suffix in ("jpg", "CR2", "cr2")))
    touch(tmp_path, "stray.jpg", "README.txt", "a/1.mov", "a/README", "a/more/1.jpg", "a/Thumbs.db", "b/.hidden.jpg")
    data.load(tmp_path, shots=0)
    data.load(tmp_path, shots=1)
    left_out = "8 .cr2, 1 beside the class folders, 1 folders, 1 .mov, 1 files"
    assert capsys.readouterr().err == f"warning: left out in {tmp_path}: {left_out}\n"


@pytest.mark.parametrize("suffix", ["jfif", "jp2", "avif"])
def test_newer_kinds_of_files_are_read_where_pillow_can(tmp_path, suffix):
    if f".{suffix}" not in folders.SUFFIXES:
        pytest.skip(f"this Pillow does not read .{suffix}")
    for name in "ab":
        for i in range(2):
            save(Image.new("RGB", (32, 32), (200, 30, 40)), tmp_path / name / f"{i}.{suffix}")
    benchmark = data.load(tmp_path, shots=0)
    assert len(benchmark.train) == len(benchmark.test) == 2
    assert max(abs(a - b) for a, b in zip(pixels(data.read(benchmark.test[0][0]))[0], (200, 30, 40), strict=True)) < 12


@pytest.mark.parametrize("inside", ["images", "Photos 2024"])
def test_class_folders_one_level_deeper_are_pointed_at(tmp_path, inside):
    touch(tmp_path, *(f"{inside}/{name}/{i}.jpg" for name in "ab" for i in range(3)))
    with fails(f"a, b are classes, give {tmp_path / inside}"):
        data.load(tmp_path)
    assert data.load(tmp_path / inside).classnames == ["a", "b"]


def test_class_folders_one_level_higher_are_pointed_at(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(3)))
    with fails(tmp_path / "a", "3 pictures and no class folders", f"give {tmp_path}"):
        data.load(tmp_path / "a")


@pytest.mark.parametrize("names", [("golden retriever", "golden_retriever"), ("Cat", "cat"),
                                   ("caf\u00e9", "cafe\u0301")], ids=["blank", "case", "accent"])
def test_two_classes_that_clip_cannot_tell_apart_are_named(tmp_path, capsys, names):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in (*names, "other") for i in range(2)))
    folders = sorted(path for path in tmp_path.iterdir() if path.name != "other")
    if len(folders) < 2:
        pytest.skip("this file system takes the two folders for one")
    assert len(data.load(tmp_path, shots=0).classnames) == 3
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and all(str(folder) in warnings[0] for folder in folders) and "other" not in warnings[0]


def test_one_class_alone_is_a_warning(tmp_path, capsys):
    data.load(touch(tmp_path, "cat/1.jpg", "cat/2.jpg"), shots=0)
    warning = capsys.readouterr().err
    assert str(tmp_path) in warning and "cat" in warning and "100 %" in warning


def test_classes_that_differ_only_in_case_stay_two(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "Cat") for i in range(2)))
    benchmark = data.load(tmp_path, shots=0)
    assert benchmark.classnames == ["Cat", "cat"]
    assert [path.split("/")[0] for path, _ in relative(benchmark, benchmark.test)] == ["Cat", "cat"]


def test_the_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "abc" for i in range(9)))
    expected, scandir = data.load(tmp_path, shots=2), folders.os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def scan_backwards(folder):
        return Backwards(sorted(scandir(folder), key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(folders.os, "scandir", scan_backwards)
    assert data.load(tmp_path, shots=2) == expected


def test_linked_class_folders_are_followed(tmp_path):
    touch(tmp_path, "store/1.jpg", "store/2.jpg", "set/a/1.jpg", "set/a/2.jpg")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "store", target_is_directory=True)
    benchmark = data.load(tmp_path / "set")
    assert benchmark.classnames == ["a", "b"] and len(benchmark.test) == 2


def test_classnames_txt_renames_folders(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("n01", "n01 b", "other_one") for i in range(2)))
    (tmp_path / "classnames.txt").write_text("n01 great white shark\n\nn01 b crème_brûlée\n", encoding="utf-8-sig")
    assert data.load(tmp_path).classnames == ["great white shark", "crème brûlée", "other one"]
    (tmp_path / "classnames.txt").write_text("n02 no such folder")
    with fails(tmp_path / "classnames.txt", "n02"):
        data.load(tmp_path)


@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", "  "])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_classnames_txt_may_come_from_windows(tmp_path, encoding, separator):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("n1", "n2", "n22") for i in range(2)))
    text = f"n1{separator}crème brûlée\r\nn2{separator}tea\r\n"
    (tmp_path / "classnames.txt").write_bytes(text.encode(encoding))
    assert data.load(tmp_path).classnames == ["crème brûlée", "tea", "n22"]


def test_a_text_file_in_another_encoding_is_one_sentence(tmp_path):
    touch(tmp_path, "n1/1.jpg", "n1/2.jpg")
    (tmp_path / "classnames.txt").write_bytes("n1 crème brûlée".encode("latin-1"))
    with fails(tmp_path, "classnames.txt", "UTF-8"):
        data.load(tmp_path)


def test_a_split_file_goes_before_folders(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    benchmark = load_split(tmp_path, [("a/1.jpg", 0, "one_of_both"), ("b/1.jpg", 0, "one_of_both")])
    assert benchmark.classnames == ["one of both"] and len(benchmark.train) == 2 and benchmark.own


def test_a_tilde_before_the_name_of_nobody_is_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is called ~nobody-has-this-name/photos"):
        data.load("~nobody-has-this-name/photos")
    touch(tmp_path, "~nobody-has-this-name")
    with pytest.raises(UserError, match="~nobody-has-this-name"):
        data.load("dtd", "~nobody-has-this-name/data")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with fails("imagenot", "dtd", "folder"):
        data.load("imagenot", tmp_path)


def test_a_root_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with fails(tmp_path / "file"):
        data.load("dtd", tmp_path / "file")


# ---- Benchmarks: where they are found and how they are fetched ----

ROWS = [(f"{name}/{i}.jpg", label, name) for label, name in enumerate(["dotted", "lined"]) for i in range(3)]


def tar(members):
    """A .tar.gz with these file names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = 4
            file.addfile(info, io.BytesIO(b"data"))
    return buffer.getvalue()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in members:
            file.writestr(name, b"data")
    return buffer.getvalue()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Mirror:
    """A server of a two-class "dtd" and a root folder to fetch it to. Change its files and hashes, then load()."""

    def __init__(self, tmp_path, monkeypatch):
        self.root, self.files, self.monkeypatch = tmp_path / "outer" / "root", tmp_path / "served", monkeypatch
        self.split = self.files / "split.json"
        write_split(self.split, ROWS)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(self.files)))
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        monkeypatch.setattr(benchmarks, "SPLITS", self.url)
        self.change(split="split.json", blob=git_blob(self.split.read_bytes()))
        self.archive("dtd.tar.gz", tar([f"dtd/images/{path}" for path, _, _ in ROWS] + ["dtd/labels/x.txt"]))

    def change(self, **fields):
        self.monkeypatch.setitem(benchmarks.BENCHMARKS, "dtd", replace(benchmarks.BENCHMARKS["dtd"], **fields))

    def archive(self, name, content):
        (self.files / name).write_bytes(content)
        self.change(archive=self.url + name, md5=hashlib.md5(content).hexdigest())

    def load(self, name="dtd", root=None):
        return data.load(name, root or self.root, shots=1)

    def found(self):
        return sorted(path.name for path in (self.root / "dtd").iterdir())


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    mirror = Mirror(tmp_path, monkeypatch)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def unreachable():
    """The address of a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def test_what_is_absent_is_downloaded(mirror):
    benchmark = mirror.load()
    assert benchmark.folder == mirror.root / "dtd" / "images" and benchmark.classnames == ["dotted", "lined"]
    assert len(benchmark.train) == 2 and len(benchmark.test) == 6
    assert mirror.found() == ["dtd.tar.gz", "images", "split.json"]
    assert (mirror.root / "dtd" / "split.json").read_bytes() == mirror.split.read_bytes()


def test_what_is_there_is_not_downloaded_again(mirror, monkeypatch):
    expected = mirror.load()
    monkeypatch.setattr(benchmarks, "download", None)
    assert mirror.load() == expected


def test_an_archive_put_there_by_hand_is_unpacked(mirror, monkeypatch):
    touch(mirror.root, "dtd/split.json")
    for name in "split.json", "dtd.tar.gz":
        (mirror.root / "dtd" / name).write_bytes((mirror.files / name).read_bytes())
    monkeypatch.setattr(benchmarks, "download", None)
    assert len(mirror.load().test) == 6


def test_a_file_that_cannot_be_read_for_the_machines_sake_is_kept(mirror, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied", "dtd.tar.gz")

    archive = touch(mirror.root, "dtd/dtd.tar.gz") / "dtd" / "dtd.tar.gz"
    archive.write_bytes((mirror.files / "dtd.tar.gz").read_bytes())
    with monkeypatch.context() as patched:
        patched.setattr(benchmarks.tarfile, "open", fail)
        with fails("dtd.tar.gz", "Permission denied"):
            mirror.load()
    assert archive.read_bytes() == (mirror.files / "dtd.tar.gz").read_bytes()
    assert len(mirror.load().test) == 6


def test_an_archive_put_there_by_hand_must_be_whole(mirror):
    archive = touch(mirror.root, "dtd/dtd.tar.gz") / "dtd" / "dtd.tar.gz"
    archive.write_bytes((mirror.files / "dtd.tar.gz").read_bytes()[:-30])
    with fails(archive, "md5", "remove it"):
        mirror.load()
    assert mirror.found() == ["dtd.tar.gz", "split.json"]


def test_a_zip_archive_is_unpacked(mirror):
    mirror.archive("dtd.zip", zipped([f"dtd/images/{path}" for path, _, _ in ROWS]))
    assert len(mirror.load().test) == 6


@pytest.mark.parametrize("name", ["dtd", "DTD", "Describable-Textures", "describable_textures", "Textures"])
def test_aliases_are_the_same_benchmark(mirror, name):
    benchmark = mirror.load(name)
    assert benchmark.name == "dtd" and benchmark.templates == ("{} texture.",)


@pytest.mark.parametrize("images, root", [("dtd/images", ""), ("dtd/dtd/images", ""), ("dtd/images", "dtd"),
                                          ("copy/images", "copy")])
def test_pictures_are_found_in_every_layout(mirror, tmp_path, monkeypatch, images, root):
    """CoOp's, torchvision's, and with --root at the data set's own folder."""
    place = tmp_path / "place"
    touch_split(place / images, {"all": ROWS})
    (place / images.split("/")[0] / "split.json").write_bytes(mirror.split.read_bytes())
    monkeypatch.setattr(benchmarks, "download", None)
    assert mirror.load(root=place / root).folder == place / images


def test_the_split_is_fetched_to_the_folder_of_the_pictures(mirror, tmp_path):
    touch_split(tmp_path / "dtd" / "images", {"all": ROWS})
    mirror.load(root=tmp_path / "dtd")
    assert (tmp_path / "dtd" / "split.json").exists()


def test_a_known_name_goes_before_a_folder_of_that_name_and_says_so(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(touch(tmp_path / "work", *(f"dtd/{c}/{i}.jpg" for c in "ab" for i in range(2))))
    assert mirror.load("dtd").classnames == ["dotted", "lined"]
    assert "dtd is taken as the data set" in (warnings := capsys.readouterr().err) and "./dtd" in warnings
    assert mirror.load("./dtd").classnames == ["a", "b"] and mirror.load("./dtd").templates == ("a photo of a {}.",)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("alias, known", [("food", "food101"), ("cars", "stanford_cars"),
                                          ("sketch", "imagenet_sketch")])
def test_an_alias_that_is_also_a_folder_is_asked_about(tmp_path, monkeypatch, alias, known):
    assert data.identify(alias) == (known, "")
    monkeypatch.chdir(touch(tmp_path, f"{alias}/a/1.jpg", f"{alias}/a/2.jpg"))
    with fails(alias, known, f"./{alias}"):
        data.identify(alias)
    assert data.identify(f"./{alias}") == (alias, str(tmp_path / alias)) and data.identify(known) == (known, "")


def test_no_name_has_one_letter(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "a/x/1.jpg", "r/x/1.jpg"))
    assert [data.identify(name)[1] for name in "ar"] == [str(tmp_path / "a"), str(tmp_path / "r")]
    assert all(len(name) > 1 for source in benchmarks.BENCHMARKS.values() for name in (source.name, *source.aliases))


def test_a_split_of_the_users_choice_is_taken_but_checked(mirror):
    touch_split(mirror.root / "dtd" / "images", {"all": ROWS})
    write_split(mirror.root / "dtd" / "split.json", ROWS[:1])
    assert len(mirror.load().test) == 1
    (mirror.root / "dtd" / "split.json").write_text("{}")
    with fails(mirror.root / "dtd" / "split.json"):
        mirror.load()


def test_a_split_with_another_hash_is_refused_and_not_kept(mirror):
    mirror.change(blob="0" * 40)
    with fails("split.json", mirror.url, "0" * 40):
        mirror.load()
    assert mirror.found() == []


def test_an_archive_with_another_hash_is_refused_and_not_kept(mirror):
    mirror.change(md5="0" * 32)
    with fails(mirror.root / "dtd" / "dtd.tar.gz", mirror.url, "0" * 32):
        mirror.load()
    assert mirror.found() == ["split.json"]


def test_without_network_the_error_says_which_split_to_put_where(mirror, monkeypatch):
    nowhere = unreachable()
    monkeypatch.setattr(benchmarks, "SPLITS", nowhere)
    with fails(mirror.root / "dtd" / "split.json", nowhere + "split.json"):
        mirror.load()


def test_without_network_the_error_says_which_archive_to_put_where(mirror):
    mirror.change(archive=unreachable() + "dtd.tar.gz")
    with fails(mirror.root / "dtd" / "dtd.tar.gz", benchmarks.BENCHMARKS["dtd"].archive):
        mirror.load()


@pytest.mark.parametrize("evil", ["../evil.txt", "../../evil.txt", "dtd/images/../../../evil.txt", "/{tmp}/evil.txt"])
@pytest.mark.parametrize("pack", [tar, zipped])
def test_no_member_of_an_archive_lands_outside(mirror, tmp_path, pack, evil):
    members = [evil.format(tmp=str(tmp_path).lstrip("/")), *(f"dtd/images/{path}" for path, _, _ in ROWS)]
    mirror.archive("dtd.zip" if pack is zipped else "dtd.tar.gz", pack(members))
    try:
        mirror.load()
    except UserError as error:
        assert "cannot be unpacked" in str(error)
        assert "images" not in mirror.found()
    # tarfile puts an absolute name under the folder instead, shutil leaves hostile members of a zip file out
    assert not [path for path in tmp_path.rglob("evil.txt") if mirror.root / "dtd" / "images" not in path.parents]


def test_a_link_that_leaves_the_folder_is_refused(mirror):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        link = tarfile.TarInfo("dtd/images")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        file.addfile(link)
    mirror.archive("dtd.tar.gz", buffer.getvalue())
    with fails("dtd.tar.gz", "cannot be unpacked"):
        mirror.load()


@pytest.mark.parametrize("content", [b"no archive", tar(["other/x"])], ids=["text", "other folders"])
def test_a_bad_archive_leaves_nothing_half_done(mirror, content):
    mirror.archive("dtd.tar.gz", content)
    with fails(mirror.root / "dtd" / "dtd.tar.gz", "remove it"):
        mirror.load()
    assert mirror.found() == ["dtd.tar.gz", "split.json"]


@pytest.mark.parametrize("limit, value", [("MOST_FILES", 6), ("MOST_BYTES", 20)])
@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_bomb_stops_early(mirror, monkeypatch, pack, limit, value):
    """Seven files of four bytes each; what was unpacked until then is gone."""
    name = "dtd.zip" if pack is zipped else "dtd.tar.gz"
    mirror.archive(name, pack([f"dtd/images/{path}" for path, _, _ in ROWS] + ["dtd/labels/x.txt"]))
    with monkeypatch.context() as patched:
        patched.setattr(benchmarks, limit, value)
        with fails(mirror.root / "dtd" / name, "cannot be unpacked", "more than"):
            mirror.load()
    assert mirror.found() == [name, "split.json"]
    assert len(mirror.load().test) == 6


def test_the_bounds_leave_room_for_the_largest_archive():
    assert benchmarks.MOST_FILES > 1.5 * 101_000 and benchmarks.MOST_BYTES > 1.5 * 5e9  # Food-101


def test_what_killed_processes_left_is_removed(mirror):
    old, new = mirror.root / "dtd" / ".images.old", mirror.root / "dtd" / ".images.new"
    for folder in old, new:
        touch(folder, "images/1.jpg")
    os.utime(old, (time.time() - 4000,) * 2)
    mirror.load()
    assert not old.exists() and new.exists()  # the new one may belong to a living process


# ---- Pictures to predict ----


def test_pictures_below_a_folder_are_found_by_the_rule_of_training(tmp_path):
    """At any depth; hidden files, those of systems and what is no picture are left out; links are followed."""
    touch(tmp_path / "photos", "b.jpg", "a/2.PNG", "a/10.png", "a/deep/er/1.webp", "notes.txt", "._b.jpg", ".DS_Store",
          ".hidden/1.jpg", "a/._2.PNG", "a/__MACOSX/1.jpg", "@eaDir/b.jpg", "Thumbs.db", "folder.jpg/1.txt")
    touch(tmp_path / "store", "1.jpg")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "photos" / "one.jpg").symlink_to(tmp_path / "store" / "1.jpg")
    expected = ["a/10.png", "a/2.PNG", "a/deep/er/1.webp", "b.jpg", "linked/1.jpg", "one.jpg"]
    for folder in tmp_path / "photos", str(tmp_path / "photos"):
        assert folders.pictures_below(folder) == [tmp_path / "photos" / path for path in expected]
    assert folders.pictures_below(touch(tmp_path / "bare", "notes.txt")) == []


def test_links_that_lead_round_are_followed_once(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "c").symlink_to(tmp_path / "c", target_is_directory=True)
    (tmp_path / "c" / "back").symlink_to(tmp_path / "a", target_is_directory=True)
    assert folders.pictures_below(tmp_path / "a") == [tmp_path / "a" / path for path in ("1.jpg", "b/2.jpg", "c/3.jpg")]


def test_a_folder_of_pictures_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(folders.os, "scandir", refuse)
    with fails(tmp_path, "Permission denied"):
        folders.pictures_below(tmp_path)


# ---- The classes of other data ----


def two_folders(root, *classes):
    """-> Benchmarks of folders that are all called images."""
    for i, names in enumerate(classes):
        touch(root / str(i) / "images", *(f"{name}/{j}.jpg" for name in names for j in range(2)))
    return [data.load(root / str(i) / "images", shots=0) for i in range(len(classes))]


def test_the_same_classes_are_taken_even_if_the_folders_have_one_name(tmp_path):
    bench, *targets = two_folders(tmp_path, "abc", "abc", "abc")
    checks.require_same_classes(bench, targets)


def test_one_folder_named_twice_is_refused(tmp_path):
    bench, target = two_folders(tmp_path, "abc", "abc")
    for targets in [bench], [target, target]:
        with fails(targets[0].folder, "once"):
            checks.require_same_classes(bench, targets)


def test_classes_that_differ_are_named_but_not_all_of_them(tmp_path):
    names = [f"n{i:02}" for i in range(30)]
    bench, target = two_folders(tmp_path, names, [*names[:22], "zebra"])
    with fails("n22, n23, n24, n25, n26 and 4 more"):
        checks.require_same_classes(bench, [target])
    with fails("order"):
        checks.require_same_classes(bench, [replace(bench, classnames=names[::-1], folder=tmp_path)])


def test_columns_are_the_places_of_the_targets_classes(tmp_path):
    bench, _ = two_folders(tmp_path, "abc", "abc")
    assert checks.columns(replace(bench, class_ids=[7, 3, 9]), [9, 8, 7, 3]) == [2, 3, 0]
    assert checks.columns(replace(bench, class_ids=[7, 3, 5]), [9, 8, 7, 3]) is None
    assert checks.columns(bench, [9, 8, 7]) is None and checks.columns(replace(bench, class_ids=[7]), None) is None


# ---- The embedded world ----


def draw_two_classes(name, folder):
    for part in "train", "test":
        touch(folder / part, *(f"{name}/{i}.png" for name in ("big_square", "star") for i in range(3)))


def test_the_world_is_drawn_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setitem(world.WORLD, "shapes_x", None)
    monkeypatch.setattr(world, "draw_world", draw_two_classes)
    benchmark = data.load("Shapes-X", tmp_path / "new", shots=1)
    assert (benchmark.name, benchmark.own) == ("shapes_x", False)
    assert benchmark.folder == tmp_path / "new" / "shapes_x" and benchmark.classnames == ["big square", "star"]
    assert (len(benchmark.train), len(benchmark.test)) == (2, 6)
    monkeypatch.setattr(world, "draw_world", None)
    assert data.load("shapes_x", tmp_path / "new", shots=1) == benchmark
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shapes_x"]


def test_a_world_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    def stop(name, folder):
        draw_two_classes(name, folder)
        raise KeyboardInterrupt

    monkeypatch.setitem(world.WORLD, "shapes_x", None)
    monkeypatch.setattr(world, "draw_world", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load("shapes_x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_drew_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(world.WORLD, "shapes_x", None)
    monkeypatch.setattr(world, "draw_world", draw_two_classes)
    touch(tmp_path, ".shapes_x.k1ll3d/shapes_x/train/star/1.png")
    os.utime(tmp_path / ".shapes_x.k1ll3d", (time.time() - 4000,) * 2)
    data.load("shapes_x", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes_x"]


def test_two_processes_may_draw_the_world_at_once(tmp_path, monkeypatch):
    def overtaken(name, folder):
        draw_two_classes(name, folder)
        draw_two_classes(name, tmp_path / name)     # the other process was faster

    monkeypatch.setitem(world.WORLD, "shapes_x", None)
    monkeypatch.setattr(world, "draw_world", overtaken)
    assert len(data.load("shapes_x", tmp_path).test) == 6


# ---- Reading pictures ----


def test_a_plain_picture_is_read_as_it_is(tmp_path):
    picture = noise()
    read = data.read(save(picture, tmp_path / "a.png"))
    assert read.mode == "RGB" and read.tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("1", "png"), ("P", "png"), ("P", "gif"), ("CMYK", "jpg"),
                                          ("LA", "png"), ("RGBA", "webp"), ("L", "pgm")])
def test_every_mode_is_read_as_convert_does(tmp_path, mode, suffix):
    path = save(noise(mode=mode), tmp_path / f"a.{suffix}")
    assert data.read(path).tobytes() == Image.open(path).convert("RGB").tobytes()


def test_gif_content_in_a_jpg_file_is_read(tmp_path):
    path = save(noise(mode="P"), tmp_path / "Abyssinian_34.jpg", format="GIF")
    assert data.read(path).tobytes() == Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    values = [0, 128, 129, 257, 257 * 100, 257 * 254, 65534, 65535]
    picture = Image.frombytes("I;16", (8, 1), b"".join(value.to_bytes(2, "little") for value in values))
    path = save(picture, tmp_path / f"a.{suffix}")
    assert pixels(data.read(path)) == [(round(value / 257),) * 3 for value in values]


GREY_LEVELS = {
    "12 bits in I;16": Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 2048, 4095)),
    "32 bits": Image.frombytes("I", (3, 1), struct.pack("3i", 10**6, 10**6 + 512, 10**6 + 1023)),
    "floats from 0 to 1": Image.frombytes("F", (3, 1), struct.pack("3f", 0.0, 0.5001, 1.0)),
}


@pytest.mark.parametrize("kind", GREY_LEVELS)
def test_a_users_own_grey_pictures_are_scaled_by_their_own_range(tmp_path, capsys, kind):
    paths = [save(GREY_LEVELS[kind], tmp_path / "a" / f"{i}.tif") for i in range(3)]
    for path in paths:
        assert pixels(data.read(path, own=True)) == [BLACK, (128,) * 3, WHITE]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and str(tmp_path) in warnings[0] and "range" in warnings[0]
    if kind.startswith("12"):
        assert pixels(data.read(paths[0])) == [BLACK, (8,) * 3, (16,) * 3]  # a benchmark's, by what 16 bits hold


def test_a_grey_picture_of_one_value_or_of_no_finite_one(tmp_path):
    path = save(Image.new("F", (2, 2), 0.25), tmp_path / "a" / "1.tif")
    assert len(set(pixels(data.read(path, own=True)))) == 1
    for value in float("nan"), float("inf"):
        with fails("1.tif", "finite"):
            data.read(save(Image.new("F", (2, 2), value), path), own=True)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_picture_that_the_machine_cannot_read_is_not_called_broken(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    path = save(noise(), tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=type(error).__name__) as info:
        data.read(path)
    assert str(path) in str(info.value) and "replace" not in str(info.value)


def test_a_picture_one_pixel_wide_is_read_and_transformed(tmp_path):
    path = save(Image.new("RGB", (1, 50), RED), tmp_path / "a.png")
    for transform in data.augment(32), preprocess(32):
        assert data.Pictures([(path, 0)], transform)[0, 1][0].shape == (3, 32, 32)


def truncated(path):
    save(noise((200, 200)), path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize("spoil", [truncated, Path.touch, lambda path: path.write_text("no picture"), Path.mkdir,
                                   lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), lambda path: None],
                         ids=["truncated", "0 bytes", "text", "folder", "broken PNG", "gone"])
@pytest.mark.parametrize("own", [False, True])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, spoil, own):
    path = tmp_path / "spoiled.jpg"
    spoil(path)
    with fails(path, "replace it"):
        data.Pictures([(path, 0)], preprocess(32), own)[0, None]


def test_a_picture_that_is_too_large_is_named(tmp_path, monkeypatch):
    path = save(Image.new("L", (60, 60)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with fails(path, "DecompressionBombError"):
        data.read(path)


CORRUPT_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03"  # it says that it has five entries


def test_what_pillow_warns_of_is_not_shown_since_it_names_no_picture(tmp_path, monkeypatch):
    paths = [str(save(noise(), tmp_path / f"{n}.jpg", exif=CORRUPT_EXIF)) for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Corrupt EXIF"):
            Image.open(paths[0]).getexif()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1300)  # twice as many are an error
        for before in warnings.resetwarnings, lambda: warnings.simplefilter("error"):
            before()
            pictures = data.Pictures([(path, 0) for path in paths], None, own=True)
            assert data.decode_all(pictures) and len(pictures.decoded) == 4  # with several threads
        with pytest.raises(UserWarning, match="of another library"):
            warnings.warn("of another library", stacklevel=1)


def test_only_a_users_own_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6     # the camera was held upright: turn by 90 degrees
    path = save(noise((40, 20)), tmp_path / "a.png", exif=exif)
    assert data.read(path).size == (40, 20) and data.read(path, own=True).size == (20, 40)
    assert data.read(path, own=True).tobytes() == noise((40, 20)).transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_only_a_users_own_pictures_are_put_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    path = save(picture.convert("P") if mode == "PA" else picture.convert(mode), tmp_path / "a.png")
    assert pixels(data.read(path)) == [BLACK] * 4
    assert pixels(data.read(path, own=True)) == [WHITE, BLACK, WHITE, WHITE]


def test_a_transparent_colour_is_put_on_white(tmp_path):
    path = save(Image.new("RGB", (3, 1), RED), tmp_path / "a.png", transparency=RED)
    assert pixels(data.read(path)) == [RED] * 3 and pixels(data.read(path, own=True)) == [WHITE] * 3


# ---- Transforms ----


@pytest.mark.parametrize("size", [(60, 40), (31, 97), (224, 224), (1, 9)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_training_pictures_equal_torchvisions_to_the_bit(size, scale):
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose([
        transforms.RandomResizedCrop((32, 32), scale=scale, ratio=(3 / 4, 4 / 3), interpolation=bicubic),
        transforms.RandomHorizontalFlip(p=0.5), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for seed in range(8):
        torch.manual_seed(seed)
        ours = data.augment(32, scale)(noise(size))
        torch.manual_seed(seed)
        assert torch.equal(ours, expected(noise(size)))


def test_the_smallest_crop_is_8_percent_unless_said_otherwise():
    assert data.augment(32).transforms[0].scale == (0.08, 1.0)
    assert data.augment(32, (0.5, 1.0)).transforms[0].scale == (0.5, 1.0)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_pictures_are_converted_to_rgb_before_they_are_resized(tmp_path, mode):
    path = save(noise(mode=mode), tmp_path / "a.png")
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = [transforms.Resize(32, bicubic), transforms.CenterCrop(32)]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    expected = transforms.Compose(resize + to_tensor)(Image.open(path).convert("RGB"))
    resized_first = transforms.Compose([*resize, lambda picture: picture.convert("RGB"), *to_tensor])(Image.open(path))
    ours = data.Pictures([(path, 0)], preprocess(32))[0, None][0]
    assert torch.equal(ours, expected) and not torch.equal(ours, resized_first)


# ---- Pictures ----


@pytest.fixture
def items(tmp_path):
    return [(str(save(noise(seed=i), tmp_path / f"{i}.png")), i) for i in range(5)]


def test_pictures_are_tensors_and_labels(items):
    pictures = data.Pictures(items, preprocess(32))
    assert [pictures[i, None][1] for i in range(5)] == [0, 1, 2, 3, 4]
    assert torch.equal(pictures[3, None][0], preprocess(32)(noise(seed=3)))


def test_the_seed_alone_decides_the_augmentation(items):
    pictures = data.Pictures(items, data.augment(32))
    first = pictures[0, 7][0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(pictures[0, 7][0], first) and not torch.equal(pictures[0, 8][0], first)
    assert torch.equal(torch.get_rng_state(), state)


def test_decoded_pictures_are_the_same_and_are_not_read_again(items):
    pictures = data.Pictures(items, preprocess(32))
    before = [pictures[i, None][0] for i in range(5)]
    assert data.decode_all(pictures)
    for path, _ in items:
        Path(path).unlink()
    assert all(torch.equal(pictures[i, None][0], before[i]) for i in range(5)) and pictures[4, None][1] == 4


def test_pictures_that_do_not_fit_are_not_decoded(items, monkeypatch):
    pictures = data.Pictures(items, preprocess(32))
    size = 5 * 60 * 40 * 4
    with monkeypatch.context() as patched:
        patched.setattr(data, "read", None)  # the headers are enough to know
        assert not data.decode_all(pictures, size - 1)
    assert pictures[0, None][1] == 0
    assert data.decode_all(pictures, size)


def test_decoding_names_the_picture_that_cannot_be_read(items):
    Path(items[2][0]).write_text("no picture")
    with fails(items[2][0]):
        data.decode_all(data.Pictures(items, preprocess(32)))
    truncated(Path(items[2][0]))
    with fails(items[2][0]):
        data.decode_all(data.Pictures(items, preprocess(32)))


def test_own_pictures_are_decoded_as_their_owner_sees_them(tmp_path):
    path = save(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), tmp_path / "a.png")
    pictures = data.Pictures([(path, 0)], transforms.ToTensor(), own=True)
    before = pictures[0, None][0]
    data.decode_all(pictures)
    assert before.min() == 1 and torch.equal(pictures[0, None][0], before)


@pytest.mark.parametrize("decode", [False, True])
def test_pictures_reach_workers_that_are_not_forked(items, decode):
    pictures = data.Pictures(items, preprocess(32))
    if decode:
        data.decode_all(pictures)
    copy = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(copy[1, None][0], pictures[1, None][0]) and copy[1, None][1] == 1


# ---- Batches ----

CPU = torch.device("cpu")


def batches_of(items, seed=1, workers=0, batch_size=2, drop_last=True):
    transform = preprocess(32) if seed is None else data.augment(32)
    return data.Batches(data.Pictures(items, transform), batch_size, CPU, workers, seed, drop_last)


def same(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for some, others in zip(some, others, strict=True)
                                            for a, b in zip(some, others, strict=True))


def test_workers_seed_epoch_and_walk(items):
    """Two workers give what none gives; another seed or epoch differs; nothing moves PyTorch's random numbers."""
    here, there, other = batches_of(items), batches_of(items, workers=2), batches_of(items, seed=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    epochs = [list(here.epoch(number)) for number in (0, 1)]
    walks = [list(here), list(here)]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(list(there.epoch(1)), epochs[1]) and same(list(there), walks[0])  # in another order
    assert same(list(there.epoch(0)), epochs[0]) and same(list(there), walks[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(*epochs) and not same(*walks) and not same(list(other.epoch(0)), epochs[0])
    assert not same(list(other), walks[0])
    assert [labels.tolist() for _, labels in walks[0]] == [[0, 1], [2, 3], [4]]


class RecordedPictures(data.Pictures):
    """Pictures that note which views are loaded."""

    def __getitem__(self, view):
        self.views.append(view)
        return super().__getitem__(view)


def test_the_seed_of_every_view_is_that_of_its_walk_or_epoch(items):
    """The streams are written out here: runs that are finished were made with them."""
    pictures = RecordedPictures(items, data.augment(32))
    batches = data.Batches(pictures, 2, CPU, seed=3, drop_last=True)
    for number in 1, 2:
        pictures.views = []
        list(batches)
        rng = random.Random(f"3 -{number}")
        assert pictures.views == [(i, rng.getrandbits(32)) for i in range(5)]
    for number in 0, 1, 2:
        pictures.views = []
        list(batches.epoch(number))
        rng, order = random.Random(f"3 {number}"), list(range(5))
        rng.shuffle(order)
        assert pictures.views == [(i, rng.getrandbits(32)) for i in order[:4]]


@pytest.mark.parametrize("first", [0, 1])
def test_processes_share_walks_and_epochs(items, first):
    """Of a walk each gets every second batch, of an epoch its share of every batch from the first that is wanted."""
    whole = batches_of(items)
    walk, epoch = list(whole), list(whole.epoch(4))
    for rank in range(2):
        batches = batches_of(items)
        assert same(list(batches.share(rank, 2)), walk[rank::2])
        shares = [(images[rank::2], labels[rank::2]) for images, labels in epoch[first:]]
        assert same(list(batches.epoch(4, first, rank, 2)), shares)


def test_two_walks_at_once_do_not_disturb_each_other(items):
    batches, whole = batches_of(items), list(batches_of(items))
    walk = iter(batches)
    begun = [next(walk)]
    list(batches.epoch(0))
    assert same(begun + list(walk), whole)


def test_batches_without_a_seed_are_the_same_each_time(items):
    batches = batches_of(items, seed=None)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, torch.stack([preprocess(32)(noise(seed=i)) for i in range(5)]))
    assert same(list(batches), list(batches))


@pytest.mark.parametrize("batch_size, drop_last, sizes", [(2, True, [2, 2]), (2, False, [2, 2, 1]), (5, True, [5]),
                                                          (8, True, [5]), (3, True, [3])])
def test_an_epoch_drops_the_short_batch_only_where_there_is_another(items, batch_size, drop_last, sizes):
    batches = batches_of(items, batch_size=batch_size, drop_last=drop_last)
    labels = [labels.tolist() for _, labels in batches.epoch(0)]
    assert [len(batch) for batch in labels] == sizes and len(batches) == len(sizes)
    assert len({label for batch in labels for label in batch}) == sum(sizes)  # each picture once
    assert sum(len(labels) for _, labels in batches) == 5  # a walk has all pictures


def test_a_walk_that_was_left_does_not_disturb_the_next(items):
    batches, whole = batches_of(items, seed=None), list(batches_of(items, seed=None))
    for _ in batches:
        break
    assert same(list(batches), whole)


def test_few_shot_pictures_are_decoded_once(items, clip, monkeypatch):
    counts, read = Counter(), data.read

    def counting(path, own):
        counts[path] += 1
        return read(path, own)

    monkeypatch.setattr(data, "read", counting)
    bench = data.Benchmark("x", list("abcde"), ("{}",), items, [], items, Path(items[0][0]).parent)
    recipe = {"crop_scale": (0.5, 1.0), "batch_size": 2}
    batches = data.few_shot_batches(bench, clip, recipe, 1, CPU, 0)
    for number in range(2):
        assert [images.shape for images, _ in batches.epoch(number)] == [(2, 3, 32, 32)] * 2
    assert len(list(batches)) == 3 and counts == {path: 1 for path, _ in items}


def test_an_unreadable_picture_stops_a_worker_in_one_sentence(items):
    Path(items[2][0]).write_text("no picture")
    with pytest.raises(UserError, match="2.png cannot be read"):
        list(batches_of(items, workers=1))
