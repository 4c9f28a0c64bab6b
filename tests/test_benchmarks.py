"""What data.py promises about the eleven benchmarks and ImageNet's four shifts, and what the tables in assets/ hold.

The trees are tiny and made here, downloads come from a server on this machine; the real lists and the published numbers
are read from ../shared where it lies.
"""

import csv
import hashlib
import inspect
import io
import json
import random
import re
import tarfile
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_data import (  # noqa: F401
    SHARED,
    every_warning_is_shown,
    fails,
    git_blob,
    relative,
    touch,
    touch_split,
    write_split,
    zipped,
)
from test_weights import Server

import data
import train
from clip_min import ASSETS, UserError

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
    "imagenet_a": ("a ImageNetA", "a photo of a {}."),
    "imagenet_r": ("r ImageNetR", "a photo of a {}."),
}
SPELLINGS = [(known, spelling) for known, (aliases, _) in NAMES.items() for name in (known, *aliases.split())
             for spelling in (name, name.upper(), *(re.sub("[-_]", blank, name) for blank in ("", "-", "_", " ")))]

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


# ---- Names ----


def test_there_are_eleven_benchmarks_and_four_shifts():
    assert data.BENCHMARKS.keys() == NAMES.keys()


@pytest.mark.parametrize("known, spelling", SPELLINGS)
def test_every_name_in_any_spelling_is_the_same_benchmark(monkeypatch, known, spelling):
    def reached(source, root):
        raise UserError(source.name)

    monkeypatch.setattr(data, "find_images", reached)
    with pytest.raises(UserError, match=f"^{known}$"):
        data.load(spelling)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_is_coops(name):
    assert data.BENCHMARKS[name].template == NAMES[name][1]


# ---- Nine sets with CoOp's lists ----


@pytest.mark.parametrize("root", ["data", "data/{home}", "data/renamed"])
@pytest.mark.parametrize("name, place", PLACES)
def test_a_set_is_found_in_every_layout(tmp_path, monkeypatch, capsys, name, place, root):
    """Under --root, or --root is the set's own folder; with its list in it, the folder may have any name."""
    monkeypatch.setattr(data, "download", None)
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


def test_a_link_with_the_name_of_the_set_may_be_the_root(tmp_path):
    touch(tmp_path / "disk7", *paths("stanford_cars"))
    (tmp_path / "stanford_cars").symlink_to(tmp_path / "disk7", target_is_directory=True)
    with fails(f"split_zhou_StanfordCars.json is missing"):
        replace_splits(data, "http://127.0.0.1:9/")
        data.load("cars", tmp_path / "stanford_cars")


def test_ucfs_capital_letters_are_as_in_the_list_or_said(tmp_path, capsys):
    home, path = tmp_path / "ucf101", "Handstand_Pushups/v_HandStandPushups_g01_c01.jpg"
    write_split(home / SPLIT["ucf101"], [(path, 0, "Handstand_Pushups")])
    touch(home / "UCF-101-midframes", path.replace("HandS", "Hands").replace("jpg", "JPG"))
    benchmark = data.load("ucf101", tmp_path, shots=0)
    assert relative(benchmark, benchmark.test) == [("Handstand_Pushups/v_HandstandPushups_g01_c01.JPG", 0)]
    assert "case" in capsys.readouterr().err
    touch(home / "UCF-101-midframes", path)
    benchmark = data.load("ucf101", tmp_path, shots=0)
    assert relative(benchmark, benchmark.test) == [(path, 0)] and benchmark.classnames == ["Handstand Pushups"]
    assert capsys.readouterr().err == ""
