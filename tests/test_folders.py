"""What support/folders.py, own.py, lists.py, names.py and formats.py promise of what people bring."""

import json
import logging
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_data import (  # noqa: F401
    every_warning_is_shown,
    fails,
    noise,
    pixels,
    relative,
    save,
    touch,
    write_split,
)

import data
import report
import train
from support import benchmarks, folders, formats, lists, names


def link(path, goal="/gone/away"):
    """A link that leads nowhere, or to `goal`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(goal)
    except OSError:
        pytest.skip("this system makes no links")


def split_of(bench):
    return {"train": relative(bench, bench.train), "val": relative(bench, bench.val),
            "test": relative(bench, bench.test)}


def warnings_of(capsys):
    return capsys.readouterr().err.splitlines()


# ---- train and val without test ----


@pytest.mark.parametrize("val", ["val", "Valid", "validation"])
@pytest.mark.parametrize("more", [[], ["annotations"]], ids=["alone", "beside others"])
@pytest.mark.parametrize("whole", [False, True])
def test_val_is_tested_where_there_is_no_test(tmp_path, capsys, val, more, whole):
    touch(tmp_path, *(f"{part}/{name}/1.jpg" for part in ("train", val, *more) for name in "ab"))
    bench = data.load(tmp_path, shots=0, whole=whole)
    train_items = [] if whole else [("train/a/1.jpg", 0), ("train/b/1.jpg", 1)]
    assert split_of(bench) == {"train": train_items, "val": [], "test": [(f"{val}/a/1.jpg", 0), (f"{val}/b/1.jpg", 1)]}
    warnings = warnings_of(capsys)
    assert len(warnings) == 1 and f"{tmp_path} has no folder test: {val} is tested" in warnings[0]


def test_beside_other_classes_train_and_val_may_be_classes(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("bus", "train", "val") for i in range(2)))
    assert data.load(tmp_path, shots=0).classnames == ["bus", "train", "val"]


def test_train_and_val_of_different_classes_are_refused(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    with fails(f"{tmp_path / 'train'} lacks", tmp_path / "val", "b"):
        data.load(tmp_path)


@pytest.mark.parametrize("form", ["split.json", "labels.csv"])
def test_val_is_tested_where_a_list_has_no_test(tmp_path, capsys, form):
    touch(tmp_path, "1.jpg", "2.jpg")
    if form == "split.json":
        write_split(tmp_path / form, [("1.jpg", 0, "cat")], [("2.jpg", 0, "cat")], [])
    else:
        (tmp_path / form).write_text("1.jpg,cat,train\n2.jpg,cat,val\n")
    assert split_of(data.load(tmp_path, shots=0)) == {"train": [("1.jpg", 0)], "val": [], "test": [("2.jpg", 0)]}
    assert f"{tmp_path / form} has no pictures for test: those of val are tested" in capsys.readouterr().err


def test_a_folder_train_alone_can_be_given_itself(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg")
    with fails("one folder test", "found none", f"give {tmp_path / 'train'} alone"):
        data.load(tmp_path)
    assert len(data.load(tmp_path / "train", shots=0).test) == 1


# ---- train and test that hold pictures themselves ----


@pytest.mark.parametrize("other", ["test", "val"])
def test_train_and_test_that_hold_pictures_are_one_sentence(tmp_path, other):
    touch(tmp_path, *(f"{part}/{i}.jpg" for part in ("train", other) for i in range(3)))
    with fails(f"{tmp_path / 'train'} has 3 pictures and no class folders", tmp_path / "labels.csv",
               f"if train and {other} are classes, call the folders otherwise"):
        data.load(tmp_path)
    (tmp_path / "train").rename(tmp_path / "trains")
    (tmp_path / other).rename(tmp_path / "other")
    (tmp_path / "classnames.txt").write_text("trains train\nother test")
    assert data.load(tmp_path, shots=0).classnames == ["test", "train"]  # the advice works


def test_a_flat_test_beside_class_folders_of_train(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "test/1.jpg")
    with fails(f"{tmp_path / 'test'} has 1 pictures and no class folders", f"give {tmp_path / 'train'} alone"):
        data.load(tmp_path)
    assert len(data.load(tmp_path / "train", shots=0).train) == 1
    touch(tmp_path, "val/a/1.jpg")
    with fails(tmp_path / "test", f"or move {tmp_path / 'test'} away, then val is tested"):  # as competitions have it
        data.load(tmp_path)
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    bench = data.load(tmp_path, shots=0)
    assert relative(bench, bench.test) == [("val/a/1.jpg", 0)]


# ---- A test set without some of the classes ----


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_class_may_be_without_test_pictures(tmp_path, capsys, empty, whole):
    touch(tmp_path, *(f"train/{name}/{i}.jpg" for name in ("ant", "bee", "cow") for i in range(2)), "test/ant/1.jpg",
          "test/cow/1.jpg")
    if empty:
        (tmp_path / "test" / "bee").mkdir()
    bench = data.load(tmp_path, shots=0, whole=whole)
    known = ["ant", "cow"] if whole and not empty else ["ant", "bee", "cow"]  # train is not read for a whole test
    assert bench.classnames == known
    assert relative(bench, bench.test) == [("test/ant/1.jpg", 0), ("test/cow/1.jpg", len(known) - 1)]
    told = f"warning: {tmp_path} has no test pictures of bee, which no accuracy counts"
    assert warnings_of(capsys) == ([told] if "bee" in known else [])


@pytest.mark.parametrize("form", ["split.json", "labels.csv"])
def test_a_list_may_be_without_test_pictures_of_a_class(tmp_path, capsys, form):
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    if form == "split.json":
        write_split(tmp_path / form, [("1.jpg", 0, "cat"), ("2.jpg", 1, "dog")], [], [("3.jpg", 0, "cat")])
    else:
        (tmp_path / form).write_text("1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,cat,test\n")
    assert data.load(tmp_path, shots=0).classnames == ["cat", "dog"]
    assert warnings_of(capsys) == [f"warning: {tmp_path} has no test pictures of dog, which no accuracy counts"]


def test_a_test_set_without_any_picture_is_refused(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    for name in "ab":
        (tmp_path / "test" / name).mkdir(parents=True)
    with fails(tmp_path / "test", "no pictures"):
        data.load(tmp_path)


def test_pictures_deeper_in_a_test_class_are_pointed_at(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "test/a/more/1.jpg")
    with fails(tmp_path / "test" / "a", "more"):
        data.load(tmp_path)


def test_a_run_is_tested_and_reported_without_a_class(tmp_path, capsys):
    for part, known in ("train", "abc"), ("test", "ac"):
        for name in known:
            for i in range(2):
                save(noise((8, 8), seed=f"{part} {name} {i}"), tmp_path / "photos" / part / f"{name}at" / f"{i}.png")
    out = str(tmp_path / "runs")
    arguments = ["--data", str(tmp_path / "photos"), "--backbone", "tiny", "--out", out, "--device", "cpu"]
    assert train.main([*arguments, "--shots", "2", "--epochs", "1", "--variance", "--set", "n_ctx=2"]) == 0
    (run,) = Path(out).rglob("result.json")
    assert json.loads(run.read_text())["classes"] == 3 and json.loads(run.read_text())["test_images"] == 4
    for asked in [], ["--features"], ["--eval-on", str(tmp_path / "photos")]:
        if asked == ["--features"]:
            pytest.importorskip("matplotlib")
        assert report.main([str(run.parent), *asked, "--device", "cpu"]) == 0
    assert "no test pictures of bat" in capsys.readouterr().err


# ---- Links that lead nowhere ----


@pytest.mark.parametrize("place, rest", [
    ("fish", ["cat/1.jpg", "cat/2.jpg"]), ("cat/a.jpg", ["cat/1.jpg", "cat/2.jpg"]),
    ("train/fish", ["train/cat/1.jpg", "test/cat/1.jpg"]), ("test/fish", ["train/cat/1.jpg", "test/cat/1.jpg"]),
    ("train/cat/a.jpg", ["train/cat/1.jpg", "test/cat/1.jpg"]),
    ("test/cat/a.jpg", ["train/cat/1.jpg", "test/cat/1.jpg"]),
    ("test", ["train/cat/1.jpg", "train/cat/2.jpg"]), ("split.json", ["cat/1.jpg", "cat/2.jpg"]),
    ("labels.csv", ["cat/1.jpg", "cat/2.jpg"]), ("classnames.txt", ["cat/1.jpg", "cat/2.jpg"])])
def test_a_link_that_leads_nowhere_stops(tmp_path, place, rest):
    link(touch(tmp_path, *rest) / place)
    with fails(tmp_path / place, "/gone/away", "mend or remove it"):
        data.load(tmp_path, shots=1)


def test_a_link_in_a_circle_stops(tmp_path):
    link(touch(tmp_path, "cat/1.jpg", "cat/2.jpg") / "fish", tmp_path / "fish")
    with fails(tmp_path / "fish"):
        data.load(tmp_path)


def test_hidden_links_are_left_alone(tmp_path):
    link(touch(tmp_path, "cat/1.jpg", "cat/2.jpg") / "cat" / ".#1.jpg")  # an editor's lock
    assert len(data.load(tmp_path, shots=0).test) == 1


@pytest.mark.parametrize("form", ["split.json", "labels.csv"])
def test_a_list_that_names_a_link_that_leads_nowhere_stops(tmp_path, form):
    touch(tmp_path, "inside/1.jpg", "inside/2.jpg", "inside/3.jpg")
    link(tmp_path / "inside" / "4.jpg")
    paths = [f"inside/{i}.jpg" for i in range(1, 5)]
    if form == "split.json":
        write_split(tmp_path / form, [(path, 0, "cat") for path in paths[1:]], [], [(paths[0], 0, "cat")])
    else:
        (tmp_path / form).write_text("".join(f"{path},cat\n" for path in paths))
    with fails("1 of 4 pictures are not in", "inside/4.jpg"):
        data.load(tmp_path, shots=0)


def test_pictures_to_predict_name_links_that_lead_nowhere(tmp_path):
    link(touch(tmp_path, "1.jpg", "deeper/2.jpg") / "deeper" / "3.jpg")
    link(tmp_path / "folder")
    found = folders.pictures_below(tmp_path)
    assert found == [tmp_path / path for path in ("1.jpg", "deeper/2.jpg", "deeper/3.jpg", "folder")]
    for path in found[2:]:
        with fails(path):
            data.read(path)


def test_imagenets_class_that_is_a_broken_link_stops(tmp_path):
    touch(tmp_path / "imagenet", "train/n01440764/1.JPEG", "val/n01440764/1.JPEG")
    link(tmp_path / "imagenet" / "train" / "n01443537")
    with fails(tmp_path / "imagenet" / "train" / "n01443537", "/gone/away"):
        data.load("imagenet", tmp_path)


# ---- labels.csv ----

PLACES = {"beside": "", "in a folder": "images/", "deeper": "images/2024/"}


@pytest.mark.parametrize("header, delimiter", [(("picture", "class"), ";"), (("id", "breed"), ","), (None, "\t"),
                                               (None, ",")], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", ["path", "name", "stem", "absolute"])
def test_labels_are_read_as_annotation_tools_write_them(tmp_path, header, delimiter, place, spelling):
    """And divided by the same hash as class folders. The same picture has the same place, however it is spelled."""
    paths = {f"{PLACES[place]}{name}{i}.jpg": name for name in ("dog", "Cat") for i in range(10)}
    touch(tmp_path, *paths)
    written = {"path": lambda path: path, "name": lambda path: path.rsplit("/")[-1],
               "stem": lambda path: path.rsplit("/")[-1][:-4], "absolute": lambda path: f"{tmp_path}/{path}"}[spelling]
    rows = [header] if header else []
    rows += [(written(path), name) for path, name in paths.items()]
    suffix = "tsv" if delimiter == "\t" else "csv"
    text = "".join(f"{delimiter.join(row)}\r\n" for row in rows)
    (tmp_path / f"labels.{suffix}").write_text(text, encoding="utf-8-sig" if header else "utf-16")
    bench = data.load(tmp_path, shots=0)
    items = [(path, label) for label, name in enumerate(["Cat", "dog"]) for path in paths if paths[path] == name]
    expected = folders.divide(tmp_path, items)
    assert bench.classnames == ["Cat", "dog"] and bench.own and split_of(bench) == expected
    whole = data.load(tmp_path, shots=0, whole=True)
    assert (whole.train, whole.val, sorted(relative(whole, whole.test))) == ([], [], sorted(items))


@pytest.mark.parametrize("rows", [["1.jpg,cat,train", "2.jpg,cat,validation", "3.jpg,cat,Test"],
                                  ["file,label,split", "1.jpg,cat,training", "2.jpg,cat,valid", "3.jpg,cat,TESTING"]])
def test_a_third_column_divides_a_list(tmp_path, rows):
    touch(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n\n")
    assert split_of(data.load(tmp_path, shots=0)) == {"train": [("1.jpg", 0)], "val": [("2.jpg", 0)],
                                                      "test": [("3.jpg", 0)]}
    assert split_of(data.load(tmp_path, shots=0, whole=True)) == {"train": [], "val": [], "test": [("3.jpg", 0)]}


def test_rows_that_are_added_to_a_list_move_at_most_one_picture(tmp_path):
    def tested(count):
        pictures = [f"images/{name}{i}.jpg" for i in range(count) for name in ("cat", "dog")]
        touch(tmp_path, *pictures)
        rows = [f"{Path(path).name},{Path(path).name[:3]}\n" for path in pictures]
        (tmp_path / "labels.csv").write_text("".join(reversed(rows)))
        bench = data.load(tmp_path, shots=0)
        return dict.fromkeys(bench.train, False) | dict.fromkeys(bench.test, True)

    before = tested(2)
    for count in range(3, 20):
        after = tested(count)
        assert before.keys() <= after.keys()
        for label in 0, 1:
            assert sum(after[item] != before[item] for item in before if item[1] == label) <= 1
        before = after


def test_a_missing_picture_of_a_list_is_named_and_an_unnamed_one_is_not_used(tmp_path):
    """As those of split.json: only the pictures in use need to be there."""
    touch(tmp_path, "1.jpg", "2.jpg", "unnamed.jpg")
    for rows in ["1.jpg,cat", "2.jpg,cat", "3.jpg,cat"], ["picture,class", "1.jpg,cat", "2.jpg,cat", "3.jpg,cat"]:
        (tmp_path / "labels.csv").write_text("\n".join(rows))
        with fails("1 of 3 pictures are not in", tmp_path, "3.jpg"):
            data.load(tmp_path, shots=0)
    (tmp_path / "labels.csv").write_text("3.jpg,cat\n1.jpg,cat\n2.jpg,cat\n")  # the first line is no header
    with fails("1 of 3 pictures", "3.jpg"):
        data.load(tmp_path, shots=0)
    (tmp_path / "labels.csv").write_text("1.jpg,cat\n2.jpg,cat\n2.jpg,cat\n")  # a row that is there twice
    bench = data.load(tmp_path, shots=0)
    assert sorted(path for path, _ in relative(bench, bench.train + bench.test)) == ["1.jpg", "2.jpg"]


LISTS = {  # what is wrong -> the list, words of the sentence
    "empty": ("", "found nothing"),
    "blank": ("\n\n", "found nothing"),
    "header alone": ("picture,class", "names no picture"),
    "one column": ("1.jpg\n2.jpg", "picture and class"),
    "four columns": ("1.jpg,cat,train,x\n2.jpg,cat,train,x", "1.jpg,cat,train,x"),
    "ragged": ("1.jpg,cat\n2.jpg,cat,train", "2.jpg"),
    "other order": ("cat,1.jpg\ncat,2.jpg", "names no picture", "found cat and"),
    "index": ("number,file,class\n0,1.jpg,cat\n1,2.jpg,cat", "'cat' in its third column", "write train, val or test"),
    "part": ("1.jpg,cat,train\n2.jpg,cat,fold1", "'fold1' in its third column", "2.jpg"),
    "no part": ("1.jpg,cat,train\n2.jpg,cat,", "'' in its third column"),
    "no class": ("1.jpg,cat\n2.jpg,", "2.jpg has no class"),
    "two classes": ("1.jpg,cat\n2.jpg,cat\n1.jpg,dog", "1.jpg has two classes"),
    "two parts": ("1.jpg,cat,train\n2.jpg,cat,train\n1.jpg,cat,test", "1.jpg has two classes or is in two subsets"),
    "no test": ("1.jpg,cat,train\n2.jpg,cat,train", "no pictures for test"),
    "no train": ("1.jpg,cat,train\n2.jpg,dog,test", "no training pictures of dog"),
    "one picture": ("1.jpg,cat\n2.jpg,dog", "the one picture of its class"),
    "leaves": ("1.jpg,cat\n../2.jpg,cat", "../2.jpg leaves the image folder"),
    "two files": ("1.jpg,cat\n3.jpg,cat", "3.jpg in the list", "a/3.jpg or b/3.jpg"),
    "zero byte": ("1.jpg,cat\n2.jpg\0,cat", ""),
}


@pytest.mark.parametrize("kind", LISTS)
def test_what_is_wrong_in_a_list_is_named(tmp_path, kind):
    touch(tmp_path, "1.jpg", "2.jpg", "a/3.jpg", "b/3.jpg")
    text, *words = LISTS[kind]
    (tmp_path / "labels.csv").write_bytes(text.encode())
    with fails(tmp_path, *words):
        data.load(tmp_path, shots=0)


def test_a_list_in_another_encoding_is_named(tmp_path):
    (touch(tmp_path, "1.jpg") / "labels.csv").write_bytes("1.jpg,crème".encode("latin-1"))
    with fails(tmp_path, "UTF-8"):
        data.load(tmp_path)


def test_two_lists_are_refused_and_split_json_goes_before_one(tmp_path):
    touch(tmp_path, "1.jpg", "2.jpg")
    for name in "labels.csv", "labels.tsv":
        (tmp_path / name).write_text("1.jpg\tcat\n2.jpg\tcat")
    with fails("labels.csv and labels.tsv", "keep one"):
        data.load(tmp_path)
    write_split(tmp_path / "split.json", [("1.jpg", 0, "lion")])
    assert data.load(tmp_path).classnames == ["lion"]


def test_a_table_of_another_name_beside_one_folder_is_pointed_at(tmp_path, capsys):
    touch(tmp_path, "images/1.jpg", "images/2.jpg", "train.csv")
    data.load(tmp_path, shots=0)
    assert f"{tmp_path} has one folder and train.csv: a list of pictures and classes must be called labels.csv" in (
        capsys.readouterr().err)


def test_a_list_beside_class_folders_says_what_counts(tmp_path, capsys):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(2)))
    (tmp_path / "labels.csv").write_text("a/0.jpg,cat\na/1.jpg,dog\nb/0.jpg,dog\nb/1.jpg,cat\n")
    assert data.load(tmp_path, shots=0).classnames == ["cat", "dog"]
    assert "are those of labels.csv, not its folders a, b" in capsys.readouterr().err


def test_a_list_takes_classnames_txt_and_quoted_names(tmp_path, capsys):
    touch(tmp_path, *(f"images/{i}.jpg" for i in range(6)))
    classes = ["0", "0", "1", "1", "tench, Tinca tinca", "tench, Tinca tinca"]
    rows = [f'{i}.jpg,"{name}"' for i, name in enumerate(classes)]
    (tmp_path / "labels.csv").write_text("image_id,label\n" + "\n".join(rows))
    (tmp_path / "classnames.txt").write_text("0 cassava mosaic disease\n1 healthy")
    assert data.load(tmp_path, shots=0).classnames == ["cassava mosaic disease", "healthy", "tench, Tinca tinca"]
    assert warnings_of(capsys) == []


def test_classes_of_a_list_that_clip_cannot_tell_apart_are_named(tmp_path, capsys):
    touch(tmp_path, *(f"{i}.jpg" for i in range(4)))
    (tmp_path / "labels.csv").write_text("0.jpg,Cat\n1.jpg,Cat\n2.jpg,cat\n3.jpg,cat\n")
    data.load(tmp_path, shots=0)
    assert warnings_of(capsys) == ["warning: to CLIP Cat, cat have the same class name: give them different names"]


# ---- A phone's pictures, and satellites' ----


@pytest.fixture
def without_pillow_heif(monkeypatch):
    plain = tuple(suffix for suffix in formats.SUFFIXES if suffix not in formats.HEIF)
    for module in formats, folders, lists:
        monkeypatch.setattr(module, "SUFFIXES", plain)


def test_heic_is_left_out_with_the_name_of_the_package(tmp_path, capsys, without_pillow_heif):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(2)), "a/3.HEIC", "b/4.heif", "b/5.mov")
    data.load(tmp_path, shots=0)
    assert warnings_of(capsys) == [f"warning: left out in {tmp_path}: 1 .heic, 1 .heif, 1 .mov "
                                   "(pip install pillow-heif to read .heic)"]
    folders.pictures_below(tmp_path)
    assert "pillow-heif" in capsys.readouterr().err
    with fails(tmp_path / "only" / "a", "no pictures", "pip install pillow-heif"):
        data.load(touch(tmp_path / "only", "a/1.heic"))
    with fails(tmp_path / "a" / "3.HEIC", "pip install pillow-heif"):
        data.read(tmp_path / "a" / "3.HEIC")


def test_pillow_heif_is_asked_for_only_where_it_is_installed(monkeypatch):
    registered = []
    module = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert formats.read_by_pillow_heif() == (".heic", ".heif", ".hif") and registered == [1]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    assert formats.read_by_pillow_heif() == ()


def test_heic_is_read_with_pillow_heif(tmp_path):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, colour in ("a", (200, 30, 40)), ("b", (20, 30, 240)):
        for i in range(2):
            save(Image.new("RGB", (64, 32), colour), tmp_path / name / f"{i}.heic", exif=exif.tobytes())
    bench = data.load(tmp_path, shots=0)
    picture = data.read(bench.test[0][0], own=True)
    assert len(bench.test) == 2 and picture.size == (32, 64)  # upright
    assert max(abs(a - b) for a, b in zip(pixels(picture)[0], (200, 30, 40), strict=True)) < 12


def write_tiff(path, bands, bits, order="<", big=False):
    """A TIFF of 4 x 3 pixels, as satellites' have many bands."""
    size = 4 * 3 * bands * bits // 8
    word, head = ("Q", 16) if big else ("L", 8)
    count, cell = ("Q", 8) if big else ("H", 4)
    n, width = 9, struct.calcsize("=" + count) + 9 * (4 + 2 * cell) + cell
    depths = struct.pack(f"{order}{bands}H", *[bits] * bands)
    tags = {256: 4, 257: 3, 258: None, 259: 1, 262: 2, 273: head + width + len(depths), 277: bands, 278: 3, 279: size}
    directory = struct.pack(order + count, n)
    for tag, value in tags.items():
        many = tag == 258
        field = struct.pack(order + word, head + width) if many else struct.pack(f"{order}L", value)
        if many and len(depths) <= cell:
            field = depths
        directory += struct.pack(f"{order}HH{word}", tag, 3 if many else 4, bands if many else 1)
        directory += field.ljust(cell, b"\0")
    directory += struct.pack(order + word, 0)
    start = struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HL", 42, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((b"II" if order == "<" else b"MM") + start + directory + depths + bytes(size))
    return path


@pytest.mark.parametrize("bands, bits", [(13, 16), (7, 8), (5, 8), (3, 32), (2, 8)])
@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize("own", [False, True])
def test_a_picture_of_more_bands_than_pillow_reads_says_how_many(tmp_path, bands, bits, order, big, own):
    path = write_tiff(tmp_path / "a.tif", bands, bits, order, big)
    with fails(path, f"{bands} bands of {bits} bits", "red, green and blue"):
        data.read(path, own)


def test_a_plain_tiff_is_read_and_a_damaged_one_is_not_said_to_have_bands(tmp_path):
    path = write_tiff(tmp_path / "a.tif", 3, 8)
    assert data.read(path).size == (4, 3)
    path.write_bytes(path.read_bytes()[:-20])
    with fails(path, "replace it"):
        data.read(path)


def test_pillows_own_line_about_many_bands_which_names_no_picture_is_not_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, which no user has
    with fails("13 bands"):
        data.read(write_tiff(tmp_path / "a.tif", 13, 16))
    assert capsys.readouterr().err == ""


# ---- Class names that mean nothing ----

WNIDS = ["n01440764", "n01443537", "n15075141"]  # tench, goldfish, toilet paper


@pytest.mark.parametrize("name", ["1", "10", "007", "class 0", "class_0", "Class12", "label-3", "c0", "A3-77",
                                  "n01855672", "ID_04", "3.5", "category 7", "class a", "group_B"])
def test_a_name_without_meaning(name):
    assert names.is_without_meaning(name)


@pytest.mark.parametrize("name", ["boeing 737", "cat", "a", "ox", "3D model", "class room 3", "2012 Audi TTS",
                                  "type 2 diabetes", "folder", "label", "苹果2", "été 1", "polka-dotted",
                                  "A-10 Thunderbolt", "T-shirt"])
def test_a_name_that_has_a_word(name):
    assert not names.is_without_meaning(name)


@pytest.mark.parametrize("form", ["folders", "train and test", "labels.csv", "split.json"])
def test_names_without_meaning_are_one_warning_that_names_three(tmp_path, capsys, form):
    known = ["1", "10", "2", "3", "dog"]
    if form == "split.json":
        split = write_split(tmp_path / form, [(f"{name}.jpg", label, name) for label, name in enumerate(known)])
        touch(tmp_path, *(path for path, _, _ in split["train"]))
    elif form == "labels.csv":
        touch(tmp_path, *(f"{name}_{i}.jpg" for name in known for i in range(2)))
        (tmp_path / form).write_text("".join(f"{name}_{i}.jpg,{name}\n" for name in known for i in range(2)))
    else:
        parts = ["train/", "test/"] if form == "train and test" else [""]
        touch(tmp_path, *(f"{part}{name}/{i}.jpg" for part in parts for name in known for i in range(2)))
    assert data.load(tmp_path, shots=0).classnames == known
    data.load(tmp_path, shots=0, seed=2)
    where = tmp_path / ("split.json" if form == "split.json" else "classnames.txt")
    (warning,) = warnings_of(capsys)
    assert " 1, 10, 2 may" in warning and "dog" not in warning and str(where) in warning
    if form != "split.json":
        where.write_text("1 oak\n10 elm\n2 fir\n3 ash\n")
        assert data.load(tmp_path, shots=0).classnames == ["oak", "elm", "fir", "ash", "dog"]
        assert not warnings_of(capsys)


@pytest.mark.parametrize("form", ["folders", "labels.csv", "split.json"])
def test_imagenets_wnids_get_their_names(tmp_path, capsys, form):
    known = [*WNIDS, "n03773504", "n04355933", "n99999999", "zebra"]
    if form == "split.json":
        split = write_split(tmp_path / form, [(f"{name}.jpg", label, name) for label, name in enumerate(known)])
        touch(tmp_path, *(path for path, _, _ in split["train"]))
    else:
        touch(tmp_path, *(f"{name}/{i}.jpg" for name in known for i in range(2)))
        if form == "labels.csv":
            (tmp_path / form).write_text("".join(f"{name}/{i}.jpg,{name}\n" for name in known for i in range(2)))
    bench = data.load(tmp_path, shots=0)
    expected = ["tench", "goldfish", "missile", "sunglasses", "toilet paper", "n99999999", "zebra"]
    assert bench.classnames == ([expected[i] for i in (0, 1, 4, 2, 3, 5, 6)] if form == "split.json" else expected)
    told = [line for line in warnings_of(capsys) if "n01440764 tench" in line or "n99999999" in line]
    assert len(told) == 2 and "wnids" in told[0] and "n99999999" in told[1]


def test_classnames_txt_goes_before_imagenets_names(tmp_path, capsys):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in WNIDS[:2] for i in range(2)))
    (tmp_path / "classnames.txt").write_text("n01440764 Schleie\n")
    assert data.load(tmp_path, shots=0).classnames == ["Schleie", "goldfish"]
    assert "n01440764" not in capsys.readouterr().err


def test_benchmarks_keep_their_names(tmp_path, capsys):
    """Aircraft are called 707-320 in the protocol."""
    content = json.dumps({part: [["a.jpg", 0, "707-320"]] for part in ("train", "val", "test")}).encode()
    source = benchmarks.BENCHMARKS["dtd"]
    touch(tmp_path, "dtd/images/a.jpg")
    (tmp_path / "dtd" / source.split).write_bytes(content)
    assert data.load("dtd", tmp_path, shots=0).classnames == ["707-320"]
    assert "may say nothing" not in capsys.readouterr().err
