"""What data.py promises. Pictures and downloads are made here; the real lists are read from ../shared where it lies."""

import hashlib
import http.server
import io
import json
import pickle
import random
import socket
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms

import data
from clip_min import MEAN, STD, UserError, preprocess

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
    data.warn.cache_clear()


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
    train = [("a/1.jpg", 0), ("b/1.jpg", 1), ("a/2.jpg", 0), ("a/3.jpg", 0)]
    touch_split(tmp_path, write_split(tmp_path / "split.json", train))
    for seed in 1, 2:
        assert len(data.load(tmp_path, shots=3, seed=seed).train) == 4
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "n1 (1)" in warnings[0] and "n0" not in warnings[0] and "3" in warnings[0]
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


def test_other_upper_and_lower_case_is_found_and_said(tmp_path, capsys):
    touch(tmp_path, "Handstand_Pushups/v_HandStand.JPG")
    benchmark = load_split(tmp_path, [("HandStand_Pushups/v_Handstand.jpg", 0)], exists=False)
    assert relative(benchmark, benchmark.train) == [("Handstand_Pushups/v_HandStand.JPG", 0)]
    assert "case" in capsys.readouterr().err


def test_the_exact_name_goes_before_one_in_other_case(tmp_path, capsys):
    touch(tmp_path, "a/x.jpg", "a/X.jpg", "a/X.JPG")
    for name in "x.jpg", "X.jpg", "X.JPG":
        benchmark = load_split(tmp_path, [(f"a/{name}", 0)], exists=False, shots=1)
        assert relative(benchmark, benchmark.train) == [(f"a/{name}", 0)]
    assert capsys.readouterr().err == ""


def test_27000_pictures_are_checked_in_under_two_seconds(tmp_path):
    rows = [(f"{label}/{i}.jpg", label) for label in range(10) for i in range(2700)]
    touch_split(tmp_path, write_split(tmp_path / "split.json", rows[::2], [], rows[1::2]))
    start = time.perf_counter()
    benchmark = data.load(tmp_path, shots=0)
    assert time.perf_counter() - start < 2
    assert len(benchmark.train) + len(benchmark.test) == 27000


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
    with fails("split.json", "2 labels, 1 of them to train"):
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


def test_class_folders_are_split_as_coop_splits(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("dog", "Cat") for i in range(10)))
    benchmark = data.load(tmp_path, shots=0)
    assert (benchmark.name, benchmark.own, benchmark.folder) == (tmp_path.name, True, tmp_path)
    assert (benchmark.classnames, benchmark.templates) == (["Cat", "dog"], ("a photo of a {}.",))
    rng, expected = random.Random(1), {"train": [], "val": [], "test": []}
    for label, name in enumerate(["Cat", "dog"]):
        files = [f"{name}/{i}.jpg" for i in range(10)]
        rng.shuffle(files)
        for part, chosen in zip(expected, (files[:5], files[5:7], files[7:]), strict=True):
            expected[part] += [(file, label) for file in chosen]
    assert {part: relative(benchmark, getattr(benchmark, part)) for part in expected} == expected


@pytest.mark.parametrize("pictures, sizes", [(2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1)), (5, (2, 1, 2)),
                                             (7, (4, 1, 2)), (100, (50, 20, 30))])
def test_every_class_has_pictures_to_train_and_to_test(tmp_path, pictures, sizes):
    benchmark = data.load(touch(tmp_path, *(f"a/{i}.jpg" for i in range(pictures))), shots=0)
    assert (len(benchmark.train), len(benchmark.val), len(benchmark.test)) == sizes


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
    assert relative(benchmark, benchmark.val) == [(f"{val}/{path}", label) for path, label in expected if val]
    assert relative(benchmark, benchmark.test) == [(f"test/{path}", label) for path, label in expected]


def test_other_folders_beside_train_and_test_are_no_classes(tmp_path):
    benchmark = data.load(touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg", "notes/1.jpg"))
    assert benchmark.classnames == ["a"] and len(benchmark.test) == 1


def test_a_missing_test_or_train_folder_is_named(tmp_path):
    with fails(tmp_path, "no folder test"):
        data.load(touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg"))
    with fails(tmp_path / "only", "no folder train"):
        data.load(touch(tmp_path / "only", "test/a/1.jpg").parent / "only")


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("bus", "train") for i in range(4)))
    assert data.load(tmp_path).classnames == ["bus", "train"]


@pytest.mark.parametrize("part", ["val", "test"])
def test_train_and_test_need_the_same_classes(tmp_path, part):
    touch(tmp_path, *(f"{name}/a/1.jpg" for name in ("train", "val", "test")), f"{part}/extra/1.jpg")
    with fails(tmp_path / "train", tmp_path / part, "extra"):
        data.load(tmp_path)


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
    touch(tmp_path, "README.txt", "stray.jpg", ".DS_Store", ".cache/x.jpg", "__MACOSX/a/._1.jpg")
    touch(tmp_path / "a", ".DS_Store", "Thumbs.db", "images.mat", "._1.jpg", "README", "folder.jpg/inside.jpg")
    touch(tmp_path / "a", "1.jpg", "2.JPEG", "3.Png", "4.webp")
    benchmark = data.load(tmp_path, shots=0)
    found = sorted(path for path, _ in relative(benchmark, benchmark.train + benchmark.val + benchmark.test))
    assert benchmark.classnames == ["a"] and found == ["a/1.jpg", "a/2.JPEG", "a/3.Png", "a/4.webp"]


def test_classes_that_differ_only_in_case_stay_two(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "Cat") for i in range(2)))
    benchmark = data.load(tmp_path, shots=0)
    assert benchmark.classnames == ["Cat", "cat"]
    assert [path.split("/")[0] for path, _ in relative(benchmark, benchmark.test)] == ["Cat", "cat"]


def test_the_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "abc" for i in range(9)))
    expected, scandir = data.load(tmp_path, shots=2), data.os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def scan_backwards(folder):
        return Backwards(sorted(scandir(folder), key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(data.os, "scandir", scan_backwards)
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


def test_a_split_file_goes_before_folders(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    benchmark = load_split(tmp_path, [("a/1.jpg", 0, "one_of_both"), ("b/1.jpg", 0, "one_of_both")])
    assert benchmark.classnames == ["one of both"] and len(benchmark.train) == 2 and benchmark.own


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
        monkeypatch.setattr(data, "SPLITS", self.url)
        self.change(split="split.json", blob=git_blob(self.split.read_bytes()))
        self.archive("dtd.tar.gz", tar([f"dtd/images/{path}" for path, _, _ in ROWS] + ["dtd/labels/x.txt"]))

    def change(self, **fields):
        self.monkeypatch.setitem(data.BENCHMARKS, "dtd", replace(data.BENCHMARKS["dtd"], **fields))

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
    monkeypatch.setattr(data, "download", None)
    assert mirror.load() == expected


def test_an_archive_put_there_by_hand_is_unpacked(mirror, monkeypatch):
    touch(mirror.root, "dtd/split.json")
    for name in "split.json", "dtd.tar.gz":
        (mirror.root / "dtd" / name).write_bytes((mirror.files / name).read_bytes())
    monkeypatch.setattr(data, "download", None)
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
    monkeypatch.setattr(data, "download", None)
    assert mirror.load(root=place / root).folder == place / images


def test_the_split_is_fetched_to_the_folder_of_the_pictures(mirror, tmp_path):
    touch_split(tmp_path / "dtd" / "images", {"all": ROWS})
    mirror.load(root=tmp_path / "dtd")
    assert (tmp_path / "dtd" / "split.json").exists()


def test_a_known_name_goes_before_a_folder_of_that_name(mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path / "work", *(f"dtd/{c}/{i}.jpg" for c in "ab" for i in range(2))))
    assert mirror.load("dtd").classnames == ["dotted", "lined"]
    assert mirror.load("./dtd").classnames == ["a", "b"] and mirror.load("./dtd").templates == ("a photo of a {}.",)


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
    monkeypatch.setattr(data, "SPLITS", nowhere)
    with fails(mirror.root / "dtd" / "split.json", nowhere + "split.json"):
        mirror.load()


def test_without_network_the_error_says_which_archive_to_put_where(mirror):
    mirror.change(archive=unreachable() + "dtd.tar.gz")
    with fails(mirror.root / "dtd" / "dtd.tar.gz", data.BENCHMARKS["dtd"].archive):
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


# ---- The embedded world ----


def draw_two_classes(name, folder):
    for part in "train", "test":
        touch(folder / part, *(f"{name}/{i}.png" for name in ("big_square", "star") for i in range(3)))


def test_the_world_is_drawn_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "WORLD", {"shapes_x": None})
    monkeypatch.setattr(data, "draw_world", draw_two_classes)
    benchmark = data.load("Shapes-X", tmp_path / "new", shots=1)
    assert (benchmark.name, benchmark.own) == ("shapes_x", False)
    assert benchmark.folder == tmp_path / "new" / "shapes_x" and benchmark.classnames == ["big square", "star"]
    assert (len(benchmark.train), len(benchmark.test)) == (2, 6)
    monkeypatch.setattr(data, "draw_world", None)
    assert data.load("shapes_x", tmp_path / "new", shots=1) == benchmark
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shapes_x"]


def test_a_world_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    def stop(name, folder):
        draw_two_classes(name, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "WORLD", {"shapes_x": None})
    monkeypatch.setattr(data, "draw_world", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load("shapes_x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_draw_the_world_at_once(tmp_path, monkeypatch):
    def overtaken(name, folder):
        draw_two_classes(name, folder)
        draw_two_classes(name, tmp_path / name)     # the other process was faster

    monkeypatch.setattr(data, "WORLD", {"shapes_x": None})
    monkeypatch.setattr(data, "draw_world", overtaken)
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


def test_a_picture_one_pixel_wide_is_read_and_transformed(tmp_path):
    path = save(Image.new("RGB", (1, 50), RED), tmp_path / "a.png")
    for transform in data.augment(32), preprocess(32):
        assert data.Pictures([(path, 0)], transform)[0][0].shape == (3, 32, 32)


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
        data.Pictures([(path, 0)], preprocess(32), own)[0]


def test_a_picture_that_is_too_large_is_named(tmp_path, monkeypatch):
    path = save(Image.new("L", (60, 60)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with fails(path, "DecompressionBombError"):
        data.read(path)


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
    ours = data.Pictures([(path, 0)], preprocess(32))[0][0]
    assert torch.equal(ours, expected) and not torch.equal(ours, resized_first)


# ---- Pictures ----


@pytest.fixture
def items(tmp_path):
    return [(str(save(noise(seed=i), tmp_path / f"{i}.png")), i) for i in range(5)]


def test_pictures_are_tensors_and_labels(items):
    pictures = data.Pictures(items, preprocess(32))
    assert len(pictures) == 5 and [label for _, label in pictures] == [0, 1, 2, 3, 4]
    assert torch.equal(pictures[3][0], preprocess(32)(noise(seed=3)))


def test_kept_pictures_are_the_same_and_are_not_read_again(items):
    pictures = data.Pictures(items, preprocess(32))
    before = [pictures[i][0] for i in range(5)]
    assert pictures.keep()
    for path, _ in items:
        Path(path).unlink()
    assert all(torch.equal(pictures[i][0], before[i]) for i in range(5)) and pictures[4][1] == 4


def test_kept_pictures_are_augmented_anew_each_time(items):
    pictures = data.Pictures(items, data.augment(32))
    pictures.keep()
    assert not torch.equal(pictures[0][0], pictures[0][0])


def test_pictures_that_do_not_fit_are_not_kept(items, monkeypatch):
    pictures = data.Pictures(items, preprocess(32))
    size = 5 * 60 * 40 * 4
    with monkeypatch.context() as patched:
        patched.setattr(data, "read", None)     # the headers are enough to know
        assert not pictures.keep(size - 1)
    assert pictures[0][1] == 0
    assert pictures.keep(size)


def test_keeping_names_the_picture_that_cannot_be_read(items):
    Path(items[2][0]).write_text("no picture")
    with fails(items[2][0]):
        data.Pictures(items, preprocess(32)).keep()
    truncated(Path(items[2][0]))
    with fails(items[2][0]):
        data.Pictures(items, preprocess(32)).keep()


def test_own_pictures_are_kept_as_their_owner_sees_them(tmp_path):
    path = save(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), tmp_path / "a.png")
    pictures = data.Pictures([(path, 0)], transforms.ToTensor(), own=True)
    before = pictures[0][0]
    pictures.keep()
    assert before.min() == 1 and torch.equal(pictures[0][0], before)


@pytest.mark.parametrize("keep", [False, True])
def test_pictures_reach_workers_that_are_not_forked(items, keep):
    pictures = data.Pictures(items, preprocess(32))
    if keep:
        pictures.keep()
    copy = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(copy[1][0], pictures[1][0]) and copy[1][1] == 1
