"""A user's own data: which of the forms a folder has, and what its classes are called.

    folder/<class>/*.jpg                 a hash of the path chooses 70 % of each class for training, the rest is tested
    folder/{train,test}/<class>/*.jpg    taken as it stands; a folder val beside them is never read
    folder/{train,val}/<class>/*.jpg     val is tested where there is no test
    folder/labels.csv                    picture, class and perhaps train, val or test; or labels.tsv
    folder/split.json                    {"train": [["cats/1.jpg", 0, "cat"], ...], "val": ..., "test": ...}
    folder/classnames.txt                optional, not for split.json; a line: <class> <readable name>

data.load() calls read_folder(). Every fault of a folder or a list ends in one sentence that names it and what to do.
"""

from clip_min import UserError
from support.folders import SPELLINGS, contents, divide, read_subsets, shortened, warn
from support.lists import LISTS, SUBSETS, read_labels, read_split
from support.names import read_classnames, readable_names


def read_folder(folder, whole=False):
    """A folder in one of the forms above -> split, class names.

    With `whole` it is only tested: all pictures of class folders are test pictures, and test needs no train beside it.
    """
    if (folder / "split.json").exists():
        split, names = read_split(folder / "split.json")
        return split, readable_names(names, folder / "split.json")
    folders, _, others = contents(folder)
    lists = [name for name in others if name.lower() in LISTS]
    if len(lists) > 1:
        raise UserError(f"{folder} has the lists {' and '.join(lists)}: keep one")
    if lists:
        others = [name for name in folders if name.lower() not in SUBSETS]
        if len(others) > 1:
            warn(f"the classes of {folder} are those of {lists[0]}, not its folders {shortened(others)}")
        split, classes = read_labels(folder / lists[0], whole)
    else:
        tables = [name for name in others if name.lower().endswith((".csv", ".tsv"))]
        if tables and len(folders) == 1:
            warn(f"{folder} has one folder and {shortened(tables)}: a list of pictures and classes must be called "
                 f"{LISTS[0]}")
        split, classes = read_class_folders(folder, find_subsets(folder, whole), whole)
    file = folder / "classnames.txt"
    return split, readable_names(read_classnames(file, classes), f"{file} (a line each: class, blank, name)")


def read_class_folders(folder, places, whole):
    """places: of find_subsets() -> split, class folders by label. The test folder may lack some of the classes."""
    if places or whole:
        split, classes = read_subsets(folder, places or {"test": ""}, may_lack=("test",))
        if not split["test"]:
            raise UserError(f"{folder / places.get('test', '')} has no pictures in its class folders: add some")
        return split, classes
    split, classes = read_subsets(folder, {"test": ""})
    return divide(folder, split["test"]), classes


def find_subsets(folder, whole):
    """-> {"train": "Train/", "test": "testing/"}, or {} where the folders are classes, of which one may be "train"."""
    folders = contents(folder)[0]
    found = {subset: [name for name in folders if name.lower() in SPELLINGS[subset]] for subset in SPELLINGS}
    tested = "val" if found["val"] and not found["test"] else "test"
    is_pair = found["train"] and found[tested]
    if tested == "val":  # beside other folders, a train and a val that hold pictures themselves are classes
        is_pair = is_pair and all(holds_folders(folder / name) for name in found["train"] + found["val"])
    nothing_else = folders and sum(map(len, found.values())) == len(folders)
    if not is_pair and not nothing_else:
        return {}
    needed = (tested,) if whole else ("train", tested)
    for subset, names in found.items():
        if len(names) > 1:
            raise UserError(f"{folder} must have one folder {subset}, found {' and '.join(names)}: keep one")
        if subset in needed and not names:
            raise UserError(f"{folder} must have one folder {subset}, found none: add it, or give "
                            f"{folder / folders[0]} alone, which is then divided")
    places = {subset: f"{found[subset][0]}/" for subset in needed}
    require_classes(folder, places, found)
    if tested == "val":
        warn(f"{folder} has no folder test: {found['val'][0]} is tested")
        places["test"] = places.pop("val")
    return places


def holds_folders(folder):
    folders, pictures, _ = contents(folder)
    return folders and not pictures


def require_classes(folder, places, found):
    """UserError unless train and test hold class folders. found: {subset: the folders that are called so}."""
    flat = [place for place in places.values() if not contents(folder / place)[0]]
    if not flat:
        return
    advice = f"put those of each class into a folder of its own, or name their classes in {folder / LISTS[0]}"
    if len(flat) == 2:
        names = " and ".join(place.rstrip("/") for place in flat)
        advice += f"; if {names} are classes, call the folders otherwise and give their names in classnames.txt"
    elif "train" in places and places["train"] not in flat:
        advice += f"; or give {folder / places['train']} alone, which is then divided"
        if found["test"] and found["val"]:
            advice += f"; or move {folder / found['test'][0]} away, then {found['val'][0]} is tested"
    pictures = contents(folder / flat[0])[1]
    raise UserError(f"{folder / flat[0]} has {len(pictures)} pictures and no class folders: {advice}")
