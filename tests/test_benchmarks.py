"""What data.py promises about the eleven benchmarks and ImageNet's four shifts, and what the tables in assets/ hold.

The trees are tiny and made here, downloads come from a server on this machine; the real lists and the published numbers
are read from ../shared where it lies.
"""

import csv
import hashlib
import http.server
import io
import json
import os
import random
import re
import tarfile
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import at_most
from test_data import (  # noqa: F401
    SHARED,
    every_warning_is_shown,
    fails,
    git_blob,
    relative,
    touch,
    write_split,
    zipped,
)

import data
import train
from clip_min import ASSETS, UserError
from support import benchmarks
from support.settings import Settings

# name: other names, CoOp's class among them; template
NAMES = {
    "imagenet": ("imagenet1k in1k ImageNet", "a photo of a {}."),
    "caltech101": ("caltech caltech-101 Caltech101", "a photo of a {}."),
    "oxford_pets": ("pets oxfordpets oxford-iiit-pet OxfordPets", "a photo of a {}, a type of pet."),
    "stanford_cars": ("cars stanfordcars StanfordCars", "a photo of a {}."),
    "oxford_flowers": ("flowers flowers102 oxfordflowers OxfordFlowers", "a photo of a {}, a type of flower."),
    "food101": ("food food-101 Food101", "a photo of {}, a type of food."),
    "fgvc_aircraft": ("aircraft fgvc fgvcaircraft FGVCAircraft", "a photo of a {}, a type of aircraft."),
    "sun397": ("sun SUN397", "a photo of a {}."),
    "dtd": ("describabletextures textures DescribableTextures", "{} texture."),
    "eurosat": ("EuroSAT", "a centered satellite photo of {}."),
    "ucf101": ("ucf UCF101", "a photo of a person doing {}."),
    "imagenetv2": ("v2 ImageNetV2", "a photo of a {}."),
    "imagenet_sketch": ("sketch ImageNetSketch", "a photo of a {}."),
    "imagenet_a": ("imagenet-adversarial ImageNetA", "a photo of a {}."),
    "imagenet_r": ("imagenet-rendition ImageNetR", "a photo of a {}."),
}

# name: CoOp's list; image folders, CoOp's and torchvision's; two rows of its kind
SETS = {
    "caltech101": ("Caltech101", "caltech-101/101_ObjectCategories caltech101/101_ObjectCategories",
                   [("Faces/image_0001.jpg", 0, "face"), ("water_lilly/image_0002.jpg", 1, "water_lilly")]),
    "oxford_pets": ("OxfordPets", "oxford_pets/images oxford-iiit-pet/images",
                    [("Abyssinian_1.jpg", 0, "abyssinian"), ("wheaten_terrier_2.jpg", 1, "wheaten_terrier")]),
    "stanford_cars": ("StanfordCars", "stanford_cars",
                      [("cars_train/00001.jpg", 0, "2012 Audi TTS"), ("cars_test/00001.jpg", 1, "2012 Acura TL")]),
    "oxford_flowers": ("OxfordFlowers", "oxford_flowers/jpg flowers-102/jpg",
                       [("image_00190.jpg", 1, "hard-leaved pocket orchid"), ("image_00001.jpg", 0, "pink primrose")]),
    "food101": ("Food101", "food-101/images",
                [("apple_pie/1.jpg", 0, "apple_pie"), ("waffles/2.jpg", 1, "waffles")]),
    "sun397": ("SUN397", "sun397/SUN397 SUN397",
               [("a/abbey/sun_1.jpg", 0, "abbey"), ("c/church/outdoor/sun_2.jpg", 1, "outdoor church")]),
    "dtd": ("DescribableTextures", "dtd/images dtd/dtd/images",
            [("banded/banded_0001.jpg", 0, "banded"), ("polka-dotted/x.jpg", 1, "polka-dotted")]),
    "eurosat": ("EuroSAT", "eurosat/2750",
                [("AnnualCrop/AnnualCrop_1.jpg", 0, "Annual Crop Land"), ("SeaLake/SeaLake_2.jpg", 1, "Sea or Lake")]),
    "ucf101": ("UCF101", "ucf101/UCF-101-midframes",
               [("Apply_Lipstick/v_ApplyLipstick_g01_c01.jpg", 0, "Apply_Lipstick"),
                ("Handstand_Pushups/v_HandStandPushups_g01_c01.jpg", 1, "Handstand_Pushups")]),
}
SPLIT = {name: f"split_zhou_{file}.json" for name, (file, _, _) in SETS.items()}
ROWS = {name: rows for name, (_, _, rows) in SETS.items()}
PLACES = [(name, place) for name, (_, places, _) in SETS.items() for place in places.split()]


def paths(name):
    return [path for path, _, _ in ROWS[name]]


def tgz(members):
    """A .tar.gz of {name: content}; of content that is text, a link to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname, content = tarfile.SYMTYPE, content, b""
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def caltech_zip(inner, outer=()):
    """Caltech101's archive: a zip around a .tar.gz, or without one."""
    buffer = io.BytesIO(zipped(["caltech-101/Annotations.tar", "__MACOSX/caltech-101/._x", *outer]))
    with zipfile.ZipFile(buffer, "a") as file:
        if inner is not None:
            file.writestr("caltech-101/101_ObjectCategories.tar.gz", inner)
    return buffer.getvalue()


# FGVC Aircraft's lists, not in alphabetical order
VARIANTS = ["F-16A/B", "Boeing 717", "F/A-18", "707-320"]
LISTS = {"variants.txt": "F-16A/B\nBoeing 717\nF/A-18\n707-320\n",
         "images_variant_train.txt": "0034309 F/A-18\n1025794 707-320\n0034958 F-16A/B\n0935000 Boeing 717\n",
         "images_variant_val.txt": "0056978 Boeing 717\n",
         "images_variant_test.txt": "0061581 F-16A/B\n0062765 F/A-18\n"}
AIRCRAFT = {"train": [("0034309.jpg", 2), ("1025794.jpg", 3), ("0034958.jpg", 0), ("0935000.jpg", 1)],
            "val": [("0056978.jpg", 1)], "test": [("0061581.jpg", 0), ("0062765.jpg", 2)]}


def lay_aircraft(folder, **lists):
    """Empty pictures and the lists beside them; another text for a list by its name without .txt, None for none."""
    touch(folder / "images", *(path for rows in AIRCRAFT.values() for path, _ in rows))
    for file, text in LISTS.items():
        if (text := lists.get(file.removesuffix(".txt"), text)) is not None:
            (folder / file).write_bytes(text.encode())
    return folder


# name: where the archive has the pictures, which folder of the set gets them
PACKED = {"caltech101": ("101_ObjectCategories", "caltech-101/101_ObjectCategories"),
          "oxford_pets": ("images", "oxford_pets/images"),
          "oxford_flowers": ("jpg", "oxford_flowers/jpg"),
          "food101": ("food-101/images", "food-101/images"),
          "fgvc_aircraft": ("fgvc-aircraft-2013b/data/images", "fgvc_aircraft/data/images"),
          "dtd": ("dtd/images", "dtd/images"),
          "eurosat": ("2750", "eurosat/2750")}


def archive_of(name, more=None):
    """The set's archive, a tiny one in the layout of the official one, with more {member: content}."""
    if name == "fgvc_aircraft":
        files = [path for rows in AIRCRAFT.values() for path, _ in rows]
        members = {f"fgvc-aircraft-2013b/data/{file}": text.encode() for file, text in LISTS.items()}
    else:
        files, members = paths(name), {"README": b"", "labels/x.txt": b""}
    members |= {f"{PACKED[name][0]}/{file}": random.Random(file).randbytes(500) for file in files} | (more or {})
    if name == "eurosat":
        return zipped(members)
    return caltech_zip(tgz(members)) if name == "caltech101" else tgz(members)


ARCHIVE = {"caltech101": "caltech-101.zip", "oxford_pets": "images.tar.gz", "oxford_flowers": "102flowers.tgz",
           "food101": "food-101.tar.gz", "fgvc_aircraft": "fgvc-aircraft-2013b.tar.gz", "dtd": "dtd-r1.0.1.tar.gz",
           "eurosat": "EuroSAT.zip"}


class Host:
    """A server of tiny benchmarks and an empty root to fetch them to.

    `files` is {path: content}, `asked` lists the paths that were asked for, and after `cut` bytes the connection
    closes.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.files, self.asked, self.cut = {}, [], None
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                host.asked.append(self.path)
                content = host.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: host.cut])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(benchmarks, "SPLITS", f"{self.url}/")

    def offer(self, name, archive=None):
        """Serve the set's list and archive, with the hashes that benchmarks.BENCHMARKS then expects."""
        source, changes = benchmarks.BENCHMARKS[name], {}
        if source.split:
            content = json.dumps({"train": ROWS[name], "val": [], "test": ROWS[name]}).encode()
            self.files[f"/{source.split}"], changes["blob"] = content, git_blob(content)
        if archive is not None:
            file = "/" + source.archive.split("/")[-1]
            self.files[file], changes["archive"] = archive, self.url + file
            changes["md5"] = source.md5 and hashlib.md5(archive).hexdigest()
        self.monkeypatch.setitem(benchmarks.BENCHMARKS, name, replace(source, **changes))

    def load(self, name):
        return data.load(name, self.root, shots=0)

    def home(self, name):
        return self.root / PACKED[name][1].split("/")[0]

    def found(self, name):
        return {path.name for path in self.home(name).iterdir()}

    def left(self, name):
        """What a failed load leaves to the next: whole downloads, nothing else."""
        return {ARCHIVE[name], *([SPLIT[name]] if name in SPLIT else [])}


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    host = Host(tmp_path / "root", monkeypatch)
    yield host
    host.http.shutdown()
    host.http.server_close()


# ---- Names ----


def test_there_are_eleven_benchmarks_and_four_shifts():
    assert benchmarks.BENCHMARKS.keys() == NAMES.keys()


@pytest.mark.parametrize("known", NAMES)
def test_every_name_in_any_spelling_is_the_same_benchmark(monkeypatch, known):
    def reached(source, root):
        raise UserError(source.name)

    monkeypatch.setattr(benchmarks, "find_images", reached)
    for name in known, *NAMES[known][0].split():
        for spelling in name, name.upper(), *(re.sub("[-_]", blank, name) for blank in ("", "-", "_", " ")):
            with pytest.raises(UserError, match=f"^{known}$"):
                data.load(spelling)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_is_coops(name):
    assert benchmarks.BENCHMARKS[name].template == NAMES[name][1]


# ---- Nine sets with CoOp's lists ----


@pytest.mark.parametrize("root", ["data", "data/{home}", "data/renamed"])
@pytest.mark.parametrize("name, place", PLACES)
def test_a_set_is_found_in_every_layout(tmp_path, monkeypatch, capsys, name, place, root):
    """Under --root, or --root is the set's own folder; with its list in it, the folder may have any name."""
    monkeypatch.setattr(benchmarks, "download", None)
    home, _, images = place.partition("/")
    root = tmp_path / root.format(home=home)
    home = tmp_path / "data" / home if root.name == "data" else root
    touch(home / images, *paths(name))
    write_split(home / SPLIT[name], ROWS[name])
    benchmark = data.load(name, root, shots=0)
    assert benchmark.folder == home / images and benchmark.name == name
    assert benchmark.train == benchmark.test == [(f"{home / images}/{path}", label) for path, label, _ in ROWS[name]]
    assert benchmark.classnames == [row[2].replace("_", " ") for row in sorted(ROWS[name], key=lambda row: row[1])]
    assert (benchmark.templates, benchmark.own, benchmark.class_ids) == ((NAMES[name][1],), False, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("root", ["data", "data/{home}"])
@pytest.mark.parametrize("name, place", PLACES)
def test_the_list_is_fetched_to_the_folder_of_the_set(host, tmp_path, name, place, root):
    home = place.split("/")[0]
    touch(tmp_path / "data" / place, *paths(name))
    host.offer(name)
    benchmark = data.load(name, tmp_path / root.format(home=home), shots=0)
    assert benchmark.folder == tmp_path / "data" / place and len(benchmark.test) == 2
    assert [path.name for path in (tmp_path / "data").rglob("*.json")] == [SPLIT[name]]
    assert (tmp_path / "data" / home / SPLIT[name]).exists()


def test_ucfs_capital_letters_are_those_of_the_list(tmp_path):
    home, path = tmp_path / "ucf101", "Handstand_Pushups/v_HandStandPushups_g01_c01.jpg"
    write_split(home / SPLIT["ucf101"], [(path, 0, "Handstand_Pushups")])
    touch(home / "UCF-101-midframes", path)
    benchmark = data.load("ucf101", tmp_path, shots=0)
    assert relative(benchmark, benchmark.test) == [(path, 0)] and benchmark.classnames == ["Handstand Pushups"]


# ---- Downloads ----


@pytest.mark.parametrize("name, place, md5", [
    ("caltech101", "https://data.caltech.edu/records/mzrjq-6wc02/files/", "3138e1922a9193bfa496528edbbc45d0"),
    ("oxford_pets", "https://www.robots.ox.ac.uk/~vgg/data/pets/data/", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
    ("oxford_flowers", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "52808999861908f626f3c1f4e79d11fa"),
    ("food101", "http://data.vision.ee.ethz.ch/cvl/", "85eeb15f3717b99a5da872d97d918f87"),
    ("fgvc_aircraft", "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/",
     "d4acdd33327262359767eeaa97a4f732"),
    ("dtd", "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/", "fff73e5086ae6bdbea199a49dfb8a4c1"),
    ("eurosat", "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/",
     "c8fa014336c82ac7804f0398fcb19387"),
])
def test_archives_and_hashes_are_torchvisions(name, place, md5):
    assert (benchmarks.BENCHMARKS[name].archive, benchmarks.BENCHMARKS[name].md5) == (place + ARCHIVE[name], md5)


@pytest.mark.parametrize("name", PACKED)
def test_a_set_is_fetched_list_first_and_then_found(host, name):
    host.offer(name, archive_of(name))
    benchmark = host.load(name)
    assert benchmark.folder == host.root / PACKED[name][1]
    expected = AIRCRAFT["test"] if name == "fgvc_aircraft" else [row[:2] for row in ROWS[name]]
    assert relative(benchmark, benchmark.test) == expected
    assert all(len(Path(path).read_bytes()) in (4, 500) for path, _ in benchmark.train + benchmark.test)
    assert host.asked == [f"/{file}" for file in (SPLIT.get(name), ARCHIVE[name]) if file]
    assert host.found(name) == host.left(name) | {PACKED[name][1].split("/")[1]}
    assert host.load(name) == benchmark and len(host.asked) <= 2


def test_without_the_list_the_archive_is_not_fetched(host):
    host.offer("eurosat", archive_of("eurosat"))
    del host.files["/split_zhou_EuroSAT.json"]
    with fails(host.root / "eurosat" / "split_zhou_EuroSAT.json", f"{host.url}/split_zhou_EuroSAT.json"):
        host.load("eurosat")
    assert host.asked == ["/split_zhou_EuroSAT.json"]


@pytest.mark.parametrize("name", ["caltech101", "oxford_flowers", "fgvc_aircraft", "eurosat"])
def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(host, name):
    host.offer(name, archive_of(name))
    if name in SPLIT:
        touch(host.home(name), SPLIT[name])
        (host.home(name) / SPLIT[name]).write_bytes(host.files[f"/{SPLIT[name]}"])
    host.cut = 100
    with fails(host.home(name) / ARCHIVE[name], f"{host.url}/{ARCHIVE[name]}"):
        host.load(name)
    assert host.found(name) == host.left(name) - {ARCHIVE[name]}
    host.cut = None
    assert host.load(name).test and host.asked == [f"/{ARCHIVE[name]}"] * 2
    assert host.found(name) == host.left(name) | {PACKED[name][1].split("/")[1]}


@pytest.mark.parametrize("name", [name for name in PACKED if name != "fgvc_aircraft"])
def test_another_archive_or_list_than_the_official_one_is_refused(host, name):
    host.offer(name, archive_of(name))
    whole, lists = host.files[f"/{ARCHIVE[name]}"], host.files[f"/{SPLIT[name]}"]
    host.files[f"/{SPLIT[name]}"] = lists + b" "
    with fails(host.home(name) / SPLIT[name], "git"):
        host.load(name)
    assert host.found(name) == set() and len(host.asked) == 1
    host.files |= {f"/{SPLIT[name]}": lists, f"/{ARCHIVE[name]}": whole + b" "}
    with fails(host.home(name) / ARCHIVE[name], "md5"):
        host.load(name)
    assert host.found(name) == {SPLIT[name]}
    host.files[f"/{ARCHIVE[name]}"] = whole
    assert host.load(name).test


@pytest.mark.parametrize("evil", ["../evil.txt", "../../../evil.txt", "{images}/../../../../../evil.txt",
                                  "/{tmp}/evil.txt", "{images}/link/evil.txt"])
@pytest.mark.parametrize("name", ["caltech101", "caltech101, outer", "oxford_flowers", "fgvc_aircraft", "eurosat"])
def test_no_archive_writes_outside(host, tmp_path, name, evil):
    """Nor does the archive in Caltech's archive, nor a link to a folder followed by a file in it."""
    name, _, outer = name.partition(", ")
    evil = evil.format(images=PACKED[name][0], tmp=str(tmp_path).lstrip("/"))
    link = {f"{PACKED[name][0]}/link": str(tmp_path)} if "link" in evil and name != "eurosat" else {}
    members = {f"{PACKED[name][0]}/{path}": b"" for path in paths("caltech101")}
    archive = caltech_zip(tgz(members), [evil]) if outer else archive_of(name, link | {evil: b"evil"})
    host.offer(name, archive)
    try:
        assert host.load(name).test
    except UserError as error:
        assert "cannot be unpacked" in str(error) and "\n" not in str(error)
        assert host.found(name) == host.left(name)
    else:     # shutil leaves hostile members of a zip file out, tarfile puts absolute ones under its folder
        assert name == "eurosat" or outer or evil.startswith("/")
    assert not [path for path in tmp_path.rglob("evil.txt") if host.root / PACKED[name][1] not in path.parents]


@pytest.mark.parametrize("name", ["oxford_flowers", "caltech101", "fgvc_aircraft"])
@pytest.mark.parametrize("goal", ["/etc", "../../../../.."])
def test_no_archive_brings_links_that_lead_outside(host, name, goal):
    host.offer(name, archive_of(name, {f"{PACKED[name][0]}/link": goal}))
    with fails(host.home(name) / ARCHIVE[name], "cannot be unpacked"):
        host.load(name)
    assert host.found(name) == host.left(name)


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: b"<html>moved</html>", lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[:10] + b"\xff" * 500, lambda whole: tgz({"other/x.jpg": b""}),
    lambda whole: None,
], ids=["empty", "text", "cut", "garbled", "other folders", "missing"])
def test_a_broken_archive_in_caltechs_archive_is_named_and_can_be_mended(host, spoil):
    whole, archive = archive_of("caltech101"), host.home("caltech101") / ARCHIVE["caltech101"]
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        host.offer("caltech101", caltech_zip(spoil(file.read("caltech-101/101_ObjectCategories.tar.gz"))))
    with fails(archive, "cannot be unpacked", "remove it"):
        host.load("caltech101")
    assert host.found("caltech101") == host.left("caltech101")
    archive.unlink()
    host.offer("caltech101", whole)
    assert host.load("caltech101").test
    assert host.found("caltech101") == host.left("caltech101") | {"101_ObjectCategories"}


@pytest.mark.parametrize("spoil", [
    lambda whole: b"", lambda whole: b"<html>moved</html>", lambda whole: whole[: len(whole) // 2],
    lambda whole: whole[: len(whole) // 2] + bytes(len(whole) // 2), lambda whole: tgz({"other/x.jpg": b""}),
], ids=["empty", "text", "cut", "zeros", "other folders"])
def test_a_broken_archive_of_aircraft_is_named_and_can_be_mended(host, spoil):
    """Put there by hand."""
    whole, archive = archive_of("fgvc_aircraft"), host.home("fgvc_aircraft") / ARCHIVE["fgvc_aircraft"]
    host.offer("fgvc_aircraft", whole)
    touch(archive.parent, archive.name)
    archive.write_bytes(spoil(whole))
    with fails(archive, "remove it"):
        host.load("fgvc_aircraft")
    assert host.found("fgvc_aircraft") == {archive.name}
    archive.unlink()
    assert host.load("fgvc_aircraft").test and host.found("fgvc_aircraft") == {archive.name, "data"}


# ---- Sets without a link ----

BY_HAND = {
    "stanford_cars": ("stanford_cars", "cars_train/00001.jpg cars_test/ github.com/pytorch/vision/issues/7545"),
    "sun397": ("sun397/SUN397", "a/abbey/sun_ github.com/pytorch/vision/issues/9348"),
    "ucf101": ("ucf101/UCF-101-midframes", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg UCF-101-midframes.zip "
               "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"),
    "imagenet": ("imagenet/images", "train/n01440764/ val/n01440764/ image-net.org"),
    "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", "0/ 999/ ImageNetV2"),
    "imagenet_sketch": ("imagenet-sketch/images", "n01440764/ ImageNet-Sketch"),
    "imagenet_a": ("imagenet-adversarial/imagenet-a", "n01498041/ natural-adv-examples"),
    "imagenet_r": ("imagenet-rendition/imagenet-r", "n01443537/ hendrycks/imagenet-r"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_cannot_be_fetched_is_asked_for_in_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setattr(benchmarks, "download", None)
    place, words = BY_HAND[name]
    with fails(name, tmp_path / "root" / place, *words.split()):
        data.load(name, tmp_path / "root")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["stanford_cars", "imagenet"])
def test_an_empty_folder_of_the_name_is_not_the_set(tmp_path, monkeypatch, name):
    """Where the pictures are to lie in the set's folder itself."""
    monkeypatch.setattr(benchmarks, "download", lambda url, path, *_: write_split(path, ROWS["stanford_cars"]))
    (tmp_path / name).mkdir()
    place, words = BY_HAND[name]
    with fails(tmp_path / place, *words.split()):
        data.load(name, tmp_path)
    assert list((tmp_path / name).iterdir()) == []


# ---- FGVC Aircraft ----


@pytest.mark.parametrize("root", ["data", "data/{home}"])
@pytest.mark.parametrize("place", ["fgvc_aircraft", "fgvc-aircraft-2013b/data", "fgvc_aircraft/data"])
def test_aircraft_brings_its_own_lists(tmp_path, monkeypatch, place, root):
    """CoOp's layout, torchvision's and that of a download here; labels are in the order of variants.txt."""
    monkeypatch.setattr(benchmarks, "download", None)
    lay_aircraft(tmp_path / "data" / place)
    benchmark = data.load("fgvc_aircraft", tmp_path / root.format(home=place.split("/")[0]), shots=0)
    assert benchmark.folder == tmp_path / "data" / place / "images"
    assert benchmark.classnames == VARIANTS and benchmark.templates == (NAMES["fgvc_aircraft"][1],)
    assert {part: relative(benchmark, getattr(benchmark, part)) for part in AIRCRAFT} == AIRCRAFT


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), lambda text: text.removesuffix("\n"),
                                    lambda text: text + "\n"], ids=["Windows", "no last line end", "a blank line"])
def test_aircrafts_lists_may_end_their_lines_otherwise(tmp_path, change):
    lists = {file.removesuffix(".txt"): change(text) for file, text in LISTS.items()}
    lay_aircraft(tmp_path / "fgvc_aircraft", **lists)
    benchmark = data.load("fgvc_aircraft", tmp_path, shots=0)
    assert benchmark.classnames == VARIANTS
    assert {part: relative(benchmark, getattr(benchmark, part)) for part in AIRCRAFT} == AIRCRAFT


@pytest.mark.parametrize("lists, words", [
    (dict(images_variant_val="0056978 F/A-19\n"), ["images_variant_val.txt", "F/A-19"]),
    (dict(images_variant_test="0056978\n"), ["images_variant_test.txt", "0056978"]),
    (dict(variants=""), ["variants.txt"]),
    (dict(variants=None), ["variants.txt"]),
    (dict(images_variant_train=None), ["images_variant_train.txt"]),
    (dict(images_variant_test=None), ["images_variant_test.txt"]),
    (dict(images_variant_val="9999999 F/A-18\n"), ["images", "9999999.jpg"]),
], ids=str)
def test_a_list_of_aircraft_that_does_not_fit_is_named(tmp_path, lists, words):
    lay_aircraft(tmp_path / "fgvc_aircraft", **lists)
    with fails(tmp_path / "fgvc_aircraft", *words):
        data.load("fgvc_aircraft", tmp_path, shots=0)


# ---- ImageNet ----

# class number, folder, name; missile and sunglasses are there twice
FACTS = [(0, "n01440764", "tench"), (7, "n01514668", "rooster"), (134, "n02012849", "crane bird"),
         (517, "n03126707", "construction crane"), (657, "n03773504", "missile"), (744, "n04008634", "missile"),
         (836, "n04355933", "sunglasses"), (837, "n04356056", "sunglasses"), (999, "n15075141", "toilet paper")]
IDS, WNIDS, WORDS = ([fact[i] for fact in FACTS] for i in range(3))


def lay(folder, keys, files=("a.JPEG", "b.JPEG")):
    """Class folders, made from the last to the first."""
    return touch(folder, *(f"{key}/{file}" for key in reversed(keys) for file in files))


def lay_imagenet(folder, keys=WNIDS):
    lay(folder / "train", keys)
    lay(folder / "val", keys, ["ILSVRC2012_val_1.JPEG"])
    return folder


@pytest.mark.parametrize("root", ["data", "data/imagenet"])
@pytest.mark.parametrize("place", ["imagenet/images", "imagenet"])
def test_imagenets_labels_are_the_ranks_of_its_folders(tmp_path, place, root):
    """CoOp's layout and torchvision's. Classes that share a name stay two."""
    lay_imagenet(tmp_path / "data" / place)
    benchmark = data.load("imagenet", tmp_path / root, shots=0)
    assert benchmark.folder == tmp_path / "data" / place and benchmark.templates == ("a photo of a {}.",)
    assert (benchmark.class_ids, benchmark.classnames) == (IDS, WORDS)
    assert relative(benchmark, benchmark.train) == [(f"train/{wnid}/{file}", label) for label, wnid in enumerate(WNIDS)
                                                    for file in ("a.JPEG", "b.JPEG")]
    assert relative(benchmark, benchmark.test) == [(f"val/{wnid}/ILSVRC2012_val_1.JPEG", label)
                                                   for label, wnid in enumerate(WNIDS)]
    assert benchmark.val == []


def test_a_link_called_imagenet_may_be_the_root(tmp_path):
    lay_imagenet(tmp_path / "ILSVRC2012")
    (tmp_path / "imagenet").symlink_to(tmp_path / "ILSVRC2012", target_is_directory=True)
    assert data.load("imagenet", tmp_path / "imagenet", shots=1).class_ids == IDS


def test_imagenets_picks_come_from_sorted_listings(tmp_path):
    files = [f"x_{i}.JPEG" for i in reversed(range(12))]
    lay_imagenet(tmp_path / "imagenet")
    lay(tmp_path / "imagenet" / "train", WNIDS, files)
    for shots, seed in (1, 1), (4, 3):
        rng = random.Random(seed)
        expected = [(f"train/{wnid}/{file}", label) for label, wnid in enumerate(WNIDS)
                    for file in rng.sample(sorted([*files, "a.JPEG", "b.JPEG"]), shots)]
        benchmark = data.load("imagenet", tmp_path, shots, seed)
        assert relative(benchmark, benchmark.train) == expected and benchmark.val == []
        assert len(benchmark.test) == len(WNIDS)


def test_loose_files_are_no_classes_of_imagenet(tmp_path):
    lay_imagenet(tmp_path / "imagenet")
    touch(tmp_path / "imagenet", "README.txt", "ILSVRC2012_devkit_t12.tar.gz", "train/README.txt", "val/x.JPEG",
          "val/.DS_Store", "val/valprep.sh", "train/n01440764/notes.txt", "train/.cache/x.JPEG")
    benchmark = data.load("imagenet", tmp_path, shots=0)
    assert benchmark.class_ids == IDS
    assert (len(benchmark.train), len(benchmark.test)) == (2 * len(WNIDS), len(WNIDS))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_folder_that_is_no_class_of_imagenet_is_named(tmp_path, part):
    lay_imagenet(tmp_path / "imagenet")
    touch(tmp_path / "imagenet" / part, "n99999999/x.JPEG")
    with fails(tmp_path / "imagenet" / part, "n99999999"):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_empty_class_of_imagenet_is_named(tmp_path, part):
    lay_imagenet(tmp_path / "imagenet")
    (tmp_path / "imagenet" / part / "n01443537").mkdir()
    with fails(tmp_path / "imagenet" / part / "n01443537", "no pictures"):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize("keys", [WNIDS[1:], WNIDS[:-1], [*WNIDS[1:], "n01443537"]], ids=["first", "last", "other"])
def test_imagenets_train_and_val_need_the_same_classes(tmp_path, keys):
    lay(tmp_path / "imagenet" / "train", WNIDS)
    lay(tmp_path / "imagenet" / "val", keys)
    with fails(tmp_path / "imagenet" / "train", tmp_path / "imagenet" / "val"):
        data.load("imagenet", tmp_path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_of_imagenet_is_named(tmp_path, part):
    lay(tmp_path / "imagenet" / ("val" if part == "train" else "train"), WNIDS)
    with fails(tmp_path / "imagenet", part):
        data.load("imagenet", tmp_path)


# ---- ImageNet's val as its archive unpacks ----

FLAT = ["n01440764", "n01443537", "n15075141"]  # tench, goldfish, toilet paper

def flat_imagenet(root, home="imagenet", place="", listed=None, known=None):
    """Six pictures of val lie flat, two of each class. -> LOC_val_solution.csv"""
    folder = root / "imagenet" / place
    touch(folder, *(f"train/{wnid}/a.JPEG" for wnid in known or FLAT),
          *(f"val/ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 7)))
    rows = [f"ILSVRC2012_val_{i:08},{FLAT[i % 3]} 85 1 499 272 {FLAT[0]} 1 2 3 4" for i in (4, 2, 6, 1, 5, 3)]
    file = root / home / "LOC_val_solution.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return file


@pytest.mark.parametrize("home, place", [("imagenet", ""), ("imagenet", "images"), ("imagenet/images", "images"),
                                         ("imagenet", "ILSVRC/Data/CLS-LOC")])
@pytest.mark.parametrize("root", ["", "imagenet"])
def test_a_flat_val_is_read_with_kaggles_list(tmp_path, home, place, root):
    """It gives the labels and the order of class folders."""
    flat_imagenet(tmp_path, home, place)
    bench = data.load("imagenet", tmp_path / root, shots=0)
    assert (bench.class_ids, bench.classnames) == ([0, 1, 999], ["tench", "goldfish", "toilet paper"])
    assert relative(bench, bench.test) == [(f"val/ILSVRC2012_val_{i:08}.JPEG", label)
                                           for label, i in enumerate([3, 6, 1, 4, 2, 5]) for label in [label // 2]]
    assert len(bench.train) == 3 and bench.val == []


def test_a_flat_val_without_the_list_names_it(tmp_path):
    flat_imagenet(tmp_path).unlink()
    with fails(f"{tmp_path / 'imagenet' / 'val'} has 6 pictures and no class folders",
               "LOC_val_solution.csv", f"into {tmp_path / 'imagenet'}"):
        data.load("imagenet", tmp_path)


LINE = f"00000004,{FLAT[1]} 85 1 499 272 {FLAT[0]} 1 2 3 4"
FAULTS = {
    "no line": (lambda text: text.replace("00000004,", "00000044,"), "ILSVRC2012_val_00000004.JPEG"),
    "other class": (lambda text: text.replace("00000004,n01443537", "00000004,n99999999"), "val_00000004.JPEG"),
    "no columns": (lambda text: text.replace("ImageId", "image"), "ImageId"),
    "short line": (lambda text: text.replace(LINE, "00000004"), "wnid"),
    "no class": (lambda text: text.replace(LINE, "00000004, "), "wnid"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_list_of_a_flat_val_that_does_not_fit_is_named(tmp_path, kind):
    file = flat_imagenet(tmp_path)
    spoil, words = FAULTS[kind]
    assert spoil(file.read_text()) != file.read_text()
    file.write_text(spoil(file.read_text()))
    with fails(file, words):
        data.load("imagenet", tmp_path)


def test_a_picture_that_a_flat_val_lacks_is_named_unless_its_class_is_not_trained(tmp_path):
    file = flat_imagenet(tmp_path, known=FLAT[:2])
    for i in 2, 5:
        (tmp_path / "imagenet" / "val" / f"ILSVRC2012_val_{i:08}.JPEG").unlink()
    assert data.load("imagenet", tmp_path).class_ids == [0, 1]  # both pictures of the third class are gone
    (tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000004.JPEG").unlink()
    with fails(file, "1 pictures", "ILSVRC2012_val_00000004.JPEG"):
        data.load("imagenet", tmp_path)


def test_a_flat_val_with_classes_that_are_not_trained_is_refused(tmp_path):
    flat_imagenet(tmp_path, known=FLAT[:2])
    with fails(f"{tmp_path / 'imagenet' / 'train'} lacks", FLAT[2]):
        data.load("imagenet", tmp_path)


# ---- ImageNet's shifts ----

SHIFTS = {"imagenetv2": "imagenetv2/imagenetv2-matched-frequency-format-val",
          "imagenet_sketch": "imagenet-sketch/images", "imagenet_a": "imagenet-adversarial/imagenet-a",
          "imagenet_r": "imagenet-rendition/imagenet-r"}


@pytest.mark.parametrize("shots", [0, 16])
@pytest.mark.parametrize("root", ["data", "data/{home}"])
@pytest.mark.parametrize("name, place", [*SHIFTS.items(), ("imagenet_sketch", "imagenet-sketch/sketch")])
def test_a_shift_is_test_pictures_only(tmp_path, capsys, name, place, root, shots):
    keys = [str(i) for i in IDS] if name == "imagenetv2" else WNIDS
    touch(lay(tmp_path / "data" / place, keys), "README.txt", ".DS_Store", "stray.jpg")
    benchmark = data.load(name, tmp_path / root.format(home=place.split("/")[0]), shots)
    assert (benchmark.name, benchmark.folder) == (name, tmp_path / "data" / place)
    assert (benchmark.train, benchmark.val) == ([], [])
    assert relative(benchmark, benchmark.test) == [(f"{key}/{file}", label) for label, key in enumerate(keys)
                                                   for file in ("a.JPEG", "b.JPEG")]
    assert (benchmark.classnames, benchmark.class_ids) == (WORDS, IDS)
    assert benchmark.templates == ("a photo of a {}.",)
    assert capsys.readouterr().err == f"warning: left out in {benchmark.folder}: 1 beside the class folders\n"


def test_imagenetv2s_folders_are_numbers_not_text(tmp_path):
    lay(tmp_path / SHIFTS["imagenetv2"], [str(i) for i in range(1000)], ["x.jpeg"])
    benchmark = data.load("v2", tmp_path)
    assert relative(benchmark, benchmark.test) == [(f"{i}/x.jpeg", i) for i in range(1000)]
    assert benchmark.class_ids == list(range(1000)) and [benchmark.classnames[i] for i in IDS] == WORDS


# the first, the 11th, 51st, 101st and last of the 200 classes of each
ADVERSARIAL = [(6, "n01498041", "stingray"), (39, "n01677366", "green iguana"), (307, "n02177972", "weevil"),
               (496, "n03026506", "Christmas stocking"), (988, "n12267677", "acorn")]
RENDITIONS = [(1, "n01443537", "goldfish"), (26, "n01630670", "smooth newt"), (203, "n02098286",
              "West Highland White Terrier"), (355, "n02437616", "llama"), (988, "n12267677", "acorn")]


@pytest.mark.parametrize("name, facts", [("imagenet_a", ADVERSARIAL), ("imagenet_r", RENDITIONS)])
def test_imagenet_a_and_r_number_their_own_classes(tmp_path, name, facts):
    """Labels are 0 to 199 in the order of the folders, class_ids the places among ImageNet's 1000."""
    wnids = [line.split(" ")[0] for line in (ASSETS / "imagenet_classes.txt").read_text().splitlines()]
    known = {number for number, _, _ in facts}
    chosen = sorted({*known, *[i for i in range(facts[0][0], 900) if i not in known][: 200 - len(known)]})
    lay(tmp_path / SHIFTS[name], [wnids[i] for i in chosen], ["x.jpg"])
    benchmark = data.load(name, tmp_path)
    assert benchmark.class_ids == chosen and len(benchmark.classnames) == 200
    assert [label for _, label in benchmark.test] == list(range(200))
    for number, wnid, word in facts:
        label = benchmark.class_ids.index(number)
        assert benchmark.classnames[label] == word and relative(benchmark, benchmark.test)[label][0] == f"{wnid}/x.jpg"


@pytest.mark.parametrize("name, stranger", [("imagenetv2", "1000"), ("imagenetv2", "007"), ("imagenet_a", "n00000001"),
                                            ("imagenet_sketch", "sketch")])
def test_a_folder_that_is_no_class_of_a_shift_is_named(tmp_path, name, stranger):
    lay(tmp_path / SHIFTS[name], [*(["7"] if name == "imagenetv2" else WNIDS), stranger])
    with fails(tmp_path / SHIFTS[name] / stranger):
        data.load(name, tmp_path)


# ---- CoOp's lists themselves ----

# train, val, test, classes; names at the first and last label and of the first row
REAL = {
    "caltech101": (4128, 1649, 2465, 100, "face", "yin yang", "face"),
    "oxford_pets": (2944, 736, 3669, 37, "abyssinian", "yorkshire terrier", "abyssinian"),
    "stanford_cars": (6509, 1635, 8041, 196, "2000 AM General Hummer SUV", "2012 smart fortwo Convertible",
                      "2012 Audi TTS Coupe"),
    "oxford_flowers": (4093, 1633, 2463, 102, "pink primrose", "blackberry lily", "passion flower"),
    "dtd": (2820, 1128, 1692, 47, "banded", "zigzagged", "banded"),
    "eurosat": (13500, 5400, 8100, 10, "Annual Crop Land", "Sea or Lake", "Annual Crop Land"),
    "ucf101": (7639, 1898, 3783, 101, "Apply Eye Makeup", "Yo Yo", "Apply Eye Makeup"),
}


def lists_of(name):
    file = SHARED / "splits" / SPLIT[name]
    if not file.exists():
        pytest.skip("needs ../shared")
    return file.read_bytes()


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory):
    """A root with EuroSAT's list and, empty, all its 27,000 pictures."""
    content, root = lists_of("eurosat"), tmp_path_factory.mktemp("real")
    files = [f"{root}/eurosat/2750/{path}" for rows in json.loads(content).values() for path, _, _ in rows]
    for folder in {os.path.dirname(file) for file in files}:
        os.makedirs(folder)
    for file in files:
        os.close(os.open(file, os.O_CREAT))
    (root / "eurosat" / SPLIT["eurosat"]).write_bytes(content)
    return root


@pytest.mark.parametrize("name", REAL)
def test_the_lists_have_the_sizes_of_the_papers(tmp_path, monkeypatch, capsys, name):
    """And 16 pictures of each class to train, 4 to validate. Whether the files are there is not asked here."""
    monkeypatch.setattr(data, "find_files", lambda folder, split: split)
    place = dict(PLACES)[name]
    touch(tmp_path / place, *paths(name))
    (tmp_path / place.split("/")[0] / SPLIT[name]).write_bytes(lists_of(name))
    *sizes, classes, first, last, begins = REAL[name]
    benchmark = data.load(name, tmp_path, shots=0)
    assert [len(benchmark.train), len(benchmark.val), len(benchmark.test)] == sizes
    assert len(benchmark.classnames) == len({label for _, label in benchmark.test}) == classes
    assert (benchmark.classnames[0], benchmark.classnames[-1]) == (first, last)
    assert benchmark.classnames[benchmark.train[0][1]] == begins
    few = data.load(name, tmp_path, shots=16)
    assert set(Counter(label for _, label in few.train).values()) == {16} and len(few.train) == 16 * classes
    assert set(Counter(label for _, label in few.val).values()) == {4} and len(few.val) == 4 * classes
    assert few.test == benchmark.test and capsys.readouterr().err == ""


BLOBS = {  # the git blobs of CoOp's lists; not at hand are those of Food-101 and SUN397
    "caltech101": "8be694a80de04a39fb159c462bea9696aa47ccf1",
    "oxford_pets": "fa821d9f9e7d32fdf3640bf74fa7491ed04f37da",
    "stanford_cars": "dcdb8264712e9940e74cfb0f06ddb8f9cc239b81",
    "oxford_flowers": "8d10037b0690b6c65e307a354b039efb0f42404c",
    "food101": "39557040ee6501bd32aa8b5dfd75f7941a32f0a7",
    "sun397": "8d5725db8f70bcf02245665304f863e68f96a24c",
    "dtd": "8dd197a94b598fa44ee3c9e35c486dd017ab00a7",
    "eurosat": "6bdc847a5d5c49dcc78e8cb8707b87198cbfa5a4",
    "ucf101": "ea87e3de7b4f6f00fdd77618e34a23508b4c5590",
}


@pytest.mark.parametrize("name", REAL)
def test_the_hash_expected_of_a_list_is_the_lists(name):
    assert BLOBS[name] == git_blob(lists_of(name))


@pytest.mark.parametrize("name", BLOBS)
def test_the_hash_of_every_list_is_expected(name):
    assert (benchmarks.BENCHMARKS[name].split, benchmarks.BENCHMARKS[name].blob) == (SPLIT[name], BLOBS[name])
    assert BLOBS.keys() == SPLIT.keys() == {source.name for source in benchmarks.BENCHMARKS.values() if source.split}


def test_eurosats_27000_files_are_looked_at_in_a_few_steps_each(eurosat):
    with at_most(100 * 27000):
        benchmark = data.load("eurosat", eurosat, shots=0)
    assert len(benchmark.train + benchmark.val + benchmark.test) == 27000


# ---- The tables in assets/ ----


def test_imagenets_names_are_openais():
    lines = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
    wnids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert len(set(wnids)) == 1000 and list(wnids) == sorted(wnids) and all(map(re.compile(r"n\d{8}$").match, wnids))
    assert [(i, wnids[i], names[i]) for i in IDS] == FACTS
    assert [(i, wnids[i], names[i]) for i, _, _ in ADVERSARIAL + RENDITIONS] == ADVERSARIAL + RENDITIONS
    assert {name for name, count in Counter(names).items() if count > 1} == {"missile", "sunglasses"}
    # from open_clip's IMAGENET_CLASSNAMES and timm's imagenet_synsets.txt
    digest = "51b5b1d8b800502030c5556eb206abaafdd682ef363ff7a7077591ea3c9befa5"
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def published():
    with (ASSETS / "published.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("line", [     # read from the papers' tables
    "zeroshot,,ViT-B/32,0,eurosat,45.49,DPT,Table I,ZSCLIP",
    "coop,,ViT-B/32,16,imagenet,66.55,DPT,Table I,CoOp",
    "prograd,,ViT-B/32,16,dtd,65.98,DPT,Table I,ProGrad",
    "vlp,,ViT-B/32,16,stanford_cars,78.81,DPT,Table I,VLP",
    "dpt,,ViT-B/32,16,fgvc_aircraft,48.37,DPT,Table I,DPT",
    "vpt,,ViT-B/16,16,eurosat,92.67,DPT,Table II,VPT",
    "dpt,,ViT-B/16,16,average_11,83.18,DPT,Table II,DPT",
    "coop,,ViT-B/32,1,imagenet_sketch,37.32,DPT,Table III,CoOp",
    "coop,,ViT-B/32,1,ood_average,45.21,DPT,Table III,CoOp",
    "cavpt,base=vpt;tuned_k_n=true;cavpt_loss=false,ViT-B/32,16,eurosat,92.16,CAVPT-v1,Table 2,VPT-CLIP-CAVPT",
    "vlp,guide_epochs=0;epochs=200,ViT-B/32,16,average_8,79.98,CAVPT-v1,Table 1,VLP-CLIP-Deep",
    "cavpt,base=vpt,ViT-B/32,16,caltech101,94.90,CAVPT-v1,Table 3,VPT-CLIP-CAVPT",
    "cavpt,base=vpt;k_n=50,ViT-B/32,16,oxford_flowers,94.05,CAVPT-v1,Table 3,VPT-CLIP-CAVPT",
    "cavpt,base=vpt;k_n=1000,ViT-B/32,16,stanford_cars,72.10,CAVPT-v1,Table 3,VPT-CLIP-CAVPT",
    "upt,,ViT-B/16,16,imagenet_a,50.66,UPT,Table 1,UPT",
    "upt,,ViT-B/16,16,shift_average,62.51,UPT,Table 1,UPT",
    "upt,mode=joint,ViT-B/16,16,average_11,78.70,UPT,Table 2,Joint Training",
    "vpt,lr=0.002;warmup_epochs=1;n_visual=4,ViT-B/16,16,average_11,79.39,UPT,Table 2,VPT-deep",
    "linear_probe,,ViT-B/16,4,imagenet,54.4,FG-VPL,Table 2,Linear-probe CLIP",
    "fgvpl,,ViT-B/16,1,imagenet,70.3,FG-VPL,Table 2,FG-VPL Approach",
    "fgvpl,parts=tar,ViT-B/16,8,imagenet,72.9,FG-VPL,Table 2,TAR Module",
    "fgvpl,,ViT-B/32,16,imagenet,70.1,FG-VPL,Table 3,FG-VPL Approach",
    "fgvpl,alpha=0.1,ViT-B/16,16,imagenet,75.3,FG-VPL,Table 4,FG-VPL Approach",
    "fgvpl,beta=0.9,ViT-B/16,16,imagenet,75.0,FG-VPL,Table 5,FG-VPL Approach",
])
def test_a_published_number_is_the_papers(line):
    columns = ["method", "options", "backbone", "shots", "dataset", "accuracy", "paper", "table", "row"]
    expected = dict(zip(columns, line.split(","), strict=True))
    number = float(expected.pop("accuracy"))
    assert [float(row.pop("accuracy")) for row in published() if expected.items() <= row.items()] == [number]


def test_every_published_row_is_a_run_or_another_method():
    for row in published():
        assert row["method"] in ("", *train.METHODS) and int(row["shots"]) in (0, 1, 2, 4, 8, 16), row
        assert row["dataset"] in benchmarks.BENCHMARKS or row["dataset"].rpartition("average")[1], row
        assert 0 < float(row["accuracy"]) < 100 and (row["method"] or not row["options"]), row
        known = {"lr", "epochs", "warmup_epochs", *train.METHODS[row["method"] or "coop"].default_options()}
        for option in filter(None, row["options"].split(";")):
            key, _, value = option.partition("=")
            assert key in known and value, row


def test_the_500_published_numbers_are_those_that_were_compared_with_the_papers():
    """A digest of the numbers and of whose they are; the next test compares them where ../shared lies."""
    lines = sorted(",".join([*(row[key] for key in ("paper", "table", "row", "backbone", "shots", "dataset")),
                             f"{float(row['accuracy']):.2f}"]) for row in published())
    digest = "0830db56ecccb8f13622e6a91b861b04bdba7fbf970da86e6128eb93593edc10"
    assert len(lines) == 500 and hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_all_500_published_numbers_are_there():
    file = SHARED / "published.json"
    if not file.exists():
        pytest.skip("needs ../shared")
    of_five, of_eight = {("DPT", "Table III"), ("UPT", "Table 1")}, "CAVPT-v1"

    def ours(entry):
        if entry["dataset"] == "OOD Average":
            return "ood_average"
        if entry["dataset"].startswith("Average"):
            place = entry["paper"], entry["table"]
            return "shift_average" if place in of_five else "average_8" if place[0] == of_eight else "average_11"
        return data.identify(entry["dataset"])[0]

    expected = Counter((e["paper"], e["table"], e["method"], e["backbone"], str(e["shots"]), ours(e), e["accuracy"])
                       for e in json.loads(file.read_text()))
    found = Counter((row["paper"], row["table"], row["row"], row["backbone"], row["shots"], row["dataset"],
                     float(row["accuracy"])) for row in published())
    assert found == expected and found.total() == 500


def test_a_methods_option_goes_before_what_the_recipe_calls_the_same(tmp_path, monkeypatch):
    """A method has an option lr of its own, and the recipe's is another. What only the recipe has is found there."""
    (tmp_path / "published.csv").write_text("method,options,backbone,shots,dataset,accuracy,paper,table,row\n"
                                            "new,lr=5,ViT-B/16,4,dtd,61.5,P,Table 1,New\n"
                                            "new,lr=0.002,ViT-B/16,4,dtd,62.5,P,Table 2,New\n"
                                            "new,lr=5;epochs=50,ViT-B/16,4,dtd,63.5,P,Table 3,New\n")
    monkeypatch.setattr(benchmarks, "ASSETS", tmp_path)
    run = Settings("new", options=dict(lr=5), data="dtd", data_path="", backbone="ViT-B/16", backbone_path="", shots=4,
                   seed=1, activation="quickgelu", precision="auto", templates=[], recipe=dict(lr=0.002, epochs=50),
                   changed=dict(lr="5"))
    assert benchmarks.published(run, "dtd") == [(61.5, "P, Table 1"), (63.5, "P, Table 3")]
    assert benchmarks.published(replace(run, options=dict(lr=0.002)), "dtd") == [(62.5, "P, Table 2")]
