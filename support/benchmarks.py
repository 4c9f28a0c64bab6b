"""The eleven benchmarks and the four shifts of ImageNet: found under a root, fetched where absent, read, compared.

data.load() calls identify() and read_benchmark(); train.py and report.py quote the papers' numbers, published(). The
splits are CoOp's, in its order: lists split_zhou_*.json, FGVC Aircraft's lists of its own, and for ImageNet and its
shifts class folders, sorted where CoOp's picks follow the chance of a disk.
"""

import csv
import json
import re
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from clip_min import ASSETS, UserError
from support.downloads import download, file_digest
from support.files import expanded, working_folder
from support.folders import class_folders, contents, number_classes, shortened, warn
from support.lists import read_split
from support.names import imagenet_names
from support.world import WORLD


@dataclass(frozen=True)
class Source:
    """Where a benchmark comes from: a row of assets/benchmarks.json."""
    name: str
    aliases: list[str]  # upper case and "-", "_", " " do not matter
    images: list[str]  # image folders under root, CoOp's and torchvision's; the first step is the data set's folder
    holds: str = ""  # a folder in the image folder, where the image folder is the data set's folder itself
    split: str = ""  # the name of CoOp's list, which lies in the data set's folder
    blob: str = ""  # the list's git blob id
    archive: str = ""  # the address of the pictures
    md5: str = ""
    nested: str = ""  # a second archive inside the archive
    inside: str = ""  # the folder in the archive that is put into the data set's folder
    by_hand: str = ""  # layout and source, where no address works
    template: str = "a photo of a {}."  # CoOp's


TABLE = json.loads((ASSETS / "benchmarks.json").read_text("utf-8"))["benchmarks"]
BENCHMARKS = {row["name"]: Source(**row) for row in TABLE}
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"  # CoOp's are on a Drive
FLAT_VAL = "LOC_val_solution.csv"  # says of which class each picture of ImageNet's val is, where it has no folders
MOST_FILES, MOST_BYTES = 200_000, 10 * 2**30  # of an archive; the largest, Food-101, has 101,000 pictures in 5 GB


def identify(name_or_folder):
    """-> (a data set's name, "") or (the name of a user's own folder, its absolute path)."""
    def plain(name):
        return re.sub("[-_ ]", "", name.lower())

    text, folder = str(name_or_folder), expanded(name_or_folder)
    names = {plain(name): name for name in (*BENCHMARKS, *WORLD)}
    aliases = {plain(alias): source.name for source in BENCHMARKS.values() for alias in source.aliases}
    known = names.get(plain(text)) or aliases.get(plain(text))
    if known:
        if folder.is_dir() and plain(text) in aliases:
            raise UserError(f"{text} is short for {known} and also a folder here: give {known} or ./{text}")
        if folder.is_dir():
            warn(f"{text} is taken as the data set of this name: for the folder of this name give ./{text}")
        return known, ""
    if not folder.is_dir():
        raise UserError(f"no data set or folder is called {text}: give a folder, or one of {', '.join(names.values())}")
    return folder.resolve().name, str(folder.resolve())


def is_here(name_or_folder, root):
    """Whether a data set can be read without fetching or drawing any of it."""
    name, own_path = identify(name_or_folder)
    root = expanded(root)
    if own_path or name in WORLD:
        return Path(own_path or root / name).is_dir()
    source = BENCHMARKS[name]
    return any(has_images(source, place) and (place[0] / source.split).exists()
               for place in possible_places(source, root))


def read_benchmark(name, root):
    """-> the image folder, the split, the class names, and ImageNet's class numbers or None."""
    source, class_ids = BENCHMARKS[name], None
    home, folder = find_images(source, root)
    if name.startswith("imagenet"):
        split, classnames, class_ids = read_imagenet(home, folder, name)
    elif name == "fgvc_aircraft":
        split, classnames = read_aircraft(folder)
    else:
        split, classnames = read_split(home / source.split)
    return folder, split, classnames, class_ids


def read_aircraft(folder):
    """FGVC Aircraft's own lists, beside the image folder. Its names have slashes, F/A-18, and are never a path."""
    def lines(file):
        return [line for line in file.read_text("utf-8").splitlines() if line]

    split, classnames = {}, lines(folder.parent / "variants.txt")
    for subset in "train", "val", "test":
        file, split[subset] = folder.parent / f"images_variant_{subset}.txt", []
        for line in lines(file):
            image, _, name = line.partition(" ")  # 1025794 707-320
            if name not in classnames:
                raise UserError(f"{file} has the line {line!r}, which ends with no line of variants.txt: mend it")
            split[subset].append((f"{image}.jpg", classnames.index(name)))
    return split, classnames


def read_imagenet(home, folder, name):
    """ImageNet, or one of its shifts, which is test pictures only. -> split, class names, ImageNet's class numbers.

    Class folders are called by wnid, in ImageNetV2 by number; sorted as text, 10 would come before 2. The names are
    OpenAI's; torchvision's cost accuracy. ImageNet's val may lie flat, as its archive unpacks.
    """
    rows = list(imagenet_names().items())
    number = {key: i for i, (wnid, _) in enumerate(rows) for key in (wnid, str(i))}
    places = {"train": "train/", "test": "val/"} if name == "imagenet" else {"test": ""}
    found = {}
    for subset, place in places.items():
        folders, pictures, _ = contents(folder / place)
        is_flat = place == "val/" and pictures and not folders
        found[subset] = (read_flat_val(home, folder / place, found["train"]) if is_flat
                         else class_folders(folder / place))
    split, keys = number_classes(folder, places, found, order=lambda key: number.get(key, -1))
    if keys[0] not in number:
        raise UserError(f"{folder / places['test'] / keys[0]} is not named like a class of ImageNet: move it away")
    class_ids = [number[key] for key in keys]
    return split, [rows[i][1] for i in class_ids], class_ids


def read_flat_val(home, val, trained):
    """ImageNet's val without class folders, read with FLAT_VAL. -> {wnid: paths in val}, those of `trained` complete.

    The list lies in the data set's folder `home` or beside val. A line: ILSVRC2012_val_00048981,n03995372 85 1 499 272
    """
    pictures = contents(val)[1]
    lists = [file for file in (home / FLAT_VAL, val.parent / FLAT_VAL) if file.is_file()]
    if not lists:
        raise UserError(f"{val} has {len(pictures)} pictures and no class folders: put {FLAT_VAL}, which comes with "
                        f"ImageNet's download from Kaggle, into {home}")
    try:
        with lists[0].open(newline="", encoding="utf-8-sig") as file:
            wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (KeyError, AttributeError, IndexError, csv.Error) as error:  # a column or a cell is missing
        raise UserError(f"{lists[0]} has no columns ImageId and PredictionString with a wnid in each line "
                        f"({error!r}): take Kaggle's") from error
    unknown = [picture for picture in pictures if wnids.get(Path(picture).stem) not in imagenet_names()]
    if unknown:
        raise UserError(f"{lists[0]} gives no class of ImageNet for {shortened(unknown)}, which {val} has: take "
                        "Kaggle's list, or move these away")
    stems = {Path(picture).stem for picture in pictures}
    missing = [f"{name}.JPEG" for name, wnid in wnids.items() if wnid in trained and name not in stems]
    if missing:
        raise UserError(f"{len(missing)} pictures of {lists[0]} are not in {val}: {shortened(missing)}: add them")
    classes = {}
    for picture in pictures:
        classes.setdefault(wnids[Path(picture).stem], []).append(picture)
    return classes


# ---- Finding and fetching ----


def find_images(source, root):
    """-> the data set's folder and its image folder. Lists and pictures that are absent are downloaded."""
    places = possible_places(source, root)
    present = [place for place in places if has_images(source, place)]
    home, images = present[0] if present else places[0]
    if not present and not source.archive:
        raise UserError(f"{source.name} is not under {root} and cannot be downloaded: put its pictures into "
                        f"{images}: {source.by_hand}")
    if source.split and not (home / source.split).exists():  # first: the archive is of no use without the list
        download(SPLITS + source.split, home / source.split, "git", source.blob)
    if not present:
        fetch_images(source, home)
        present = [place for place in places if has_images(source, place)]
    return present[0]


def possible_places(source, root):
    """-> the (data set's folder, image folder) of every layout, under root or with root as the data set's folder."""
    layouts = [path.split("/", 1) for path in source.images]  # ["dtd", "images"]
    places = [(root / home, root / home / images) for home, images in layouts]
    has_list = source.split and (root / source.split).exists()
    has_name = {root.absolute().name, root.resolve().name} & {home for home, _ in layouts}  # its own or a link's
    if has_list or has_name:
        places = [(root, root / images) for _, images in layouts] + places
    return places


def has_images(source, place):
    return (place[1] / source.holds).is_dir()


def fetch_images(source, home):
    """Download the archive, unless it was put there by hand, and unpack it into the data set's folder."""
    archive = home / source.archive.rsplit("/")[-1]
    if not archive.exists():
        download(source.archive, archive, "md5", source.md5)
    elif file_digest(archive, "md5") != source.md5:
        raise UserError(f"{archive} is not {source.archive} as it should be (md5): remove it, to download it again")
    unpack(source, archive, home)


def unpack(source, archive, home):
    """Put the pictures of an archive into the data set's folder. An archive that is broken or a bomb is a UserError."""
    with working_folder(home / Path(source.inside).name, source.inside) as temporary:
        try:
            extract(archive, temporary)
            if source.nested:
                extract(temporary / source.nested, temporary)
            if not (temporary / source.inside).is_dir():
                raise ValueError(f"no folder {source.inside} in it")
        except Exception as error:  # of a broken archive, of many kinds; those of the disk have a number
            if getattr(error, "errno", None) or isinstance(error, MemoryError):
                raise
            detail = " ".join(str(error).split())
            raise UserError(f"{archive} cannot be unpacked ({detail}): remove it, to download it again") from error


def extract(archive, folder):
    """Extract a zip or tar file. Members that lead out of the folder are refused by tarfile, renamed by zipfile."""
    if not archive.is_file():
        raise ValueError(f"no {archive.name} in it")
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for member in bounded(file.infolist(), "file_size"):
                file.extract(member, folder)
    else:
        with tarfile.open(archive) as file:
            for member in bounded(file, "size"):
                file.extract(member, folder, filter="data")


def bounded(members, size):
    """The members of an archive one by one, until they are too many or too large. size: the name of their attribute."""
    total = 0
    for number, member in enumerate(members, 1):
        total += getattr(member, size)
        if number > MOST_FILES or total > MOST_BYTES:
            raise ValueError(f"more than {MOST_FILES} files or {MOST_BYTES} bytes in it")
        yield member


# ---- What the papers report ----


def published(run, data_name):
    """What the papers report for a run's settings on a data set. -> [(accuracy, "DPT, Table II"), ...], often empty.

    A row of published.csv fits if the run has its options, and if the user changed nothing else.
    """
    if run.data_path:
        return []
    wanted = [run.method, run.backbone, "0" if run.method == "zeroshot" else str(run.shots), data_name]
    changed, found = run.changed.keys() - {"precision", "prompts"}, []
    with (ASSETS / "published.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            options = dict(pair.split("=", 1) for pair in row["options"].split(";") if pair)
            same_run = [row[key] for key in ("method", "backbone", "shots", "dataset")] == wanted
            if same_run and changed <= options.keys() and all(is_set(run, *option) for option in options.items()):
                found.append((float(row["accuracy"]), f"{row['paper']}, {row['table']}"))
    return found


def quoted(papers):
    """What published() returns -> the text that stands behind a run's own accuracy."""
    return f"  ({'; '.join(f'{source}: {accuracy:.2f}' for accuracy, source in papers)})" if papers else ""


def is_set(run, name, text):
    """Whether an option of the method or, where the method has none of this name, of the recipe has this value."""
    value = run.options[name] if name in run.options else run.recipe.get(name)  # of --prompts it is not known
    return spell(value) == text


def spell(value):
    """A value of an option or of a recipe, as assets/published.csv writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
