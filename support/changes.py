"""A finished run when its command is given again: whether it is still what that command would make, and what it lacks.

train.py calls look_again() and add_to_result(), load_run() calls require_same_weights(), report.py find_moved() and
load_again(). Runs that were made before result.json had made_of are judged by their classes and by the lists of their
pictures.
"""

import functools
import json
from pathlib import Path

import data
from clip_min import UserError
from support.benchmarks import identify, is_here
from support.checks import split_classes
from support.files import expanded
from support.folders import shortened, warn
from support.identity import made_of, of_backbone, of_clip, of_pictures
from support.loading import load_data, load_shifts
from support.machine import process_0_first
from support.output import save
from support.prompts import read_learned
from support.results import completed, read_predictions
from support.runs import read_prompts


def look_again(settings, folder, args, machine):
    """-> the Benchmark of a finished run, those of --eval-on, and what result.json says; or None if nothing is lacking.

    What it says is without the shifts whose pictures are others now. UserError if what the run was made of has changed.
    """
    learned = read_learned(args.prompts, settings.method)
    with process_0_first(machine):
        result, bench, trained_on = load_result(folder), None, {}
        is_known = not settings.data_path and is_as_recorded(result, settings.data, args.root, args.base_to_new)
        if not is_known and is_here(settings.data_path or settings.data, args.root):
            bench, _, trained_on = load_data(settings, args, learned)
        require_unchanged(folder, settings, result, bench, trained_on)
        print(f"finished    {folder} (--again repeats it)")
        # A benchmark that was tested, and is not on this machine, is not fetched for nothing.
        names = [name for name in args.eval_on if is_here(name, args.root) or identify(name)[0] not in result["shifts"]]
        lacks_variance = args.variance and not result["variance"]
        if names or lacks_variance:
            bench = bench or load_data(settings, args, learned)[0]
        targets = load_shifts(names, args.root, bench, trained_on)
    known = known_shifts(result, targets)
    if len(known) == len(targets) and not lacks_variance:
        return None
    return bench, targets, result | dict(shifts=known)


@functools.cache  # once per command: a sweep on ImageNet would list a million files for each of its runs
def benchmark_state(name, root, base_to_new):
    """-> {"classes", "pictures"}, the digests of a benchmark or drawn data set, or None where it is not here."""
    if not is_here(name, root):
        return None
    bench = data.load(name, root, shots=0)
    now = made_of(split_classes(bench)[0] if base_to_new else bench, None, None)
    return {key: now[key] for key in ("classes", "pictures")}


def is_as_recorded(result, name, root, base_to_new):
    """Whether a benchmark has the classes and pictures that a run of it was made of."""
    state = benchmark_state(name, Path(root).absolute(), base_to_new)
    return state and all(result["made_of"].get(key) == found for key, found in state.items())


def load_result(folder):
    """-> what result.json of a finished run holds. UserError if it cannot be read."""
    try:
        return completed(json.loads((folder / "result.json").read_text("utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'result.json'} is no result of train.py ({type(error).__name__}: {error}): "
                        "repeat the run with --again.") from error


def add_to_result(folder, shifts, variance, targets):
    """Take what was evaluated after a run into its result.json. shifts: {name: accuracy} of the Benchmarks targets."""
    result = load_result(folder)
    result["shifts"] |= shifts
    result["variance"] = variance
    pictures = {target.title: of_pictures(target) for target in targets}
    result["made_of"]["shifts"] |= pictures
    save(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def known_shifts(result, targets):
    """-> {name: accuracy} of those Benchmarks on which a run was tested with the pictures that they have now."""
    known, digests = {}, result["made_of"]["shifts"]
    for target in targets:
        name = target.title
        if name in result["shifts"] and digests.get(name, of_pictures(target)) == of_pictures(target):
            known[name] = result["shifts"][name]
        elif name in result["shifts"]:
            warn(f"{name} has other pictures than when a run was tested on it: it is tested again")
    return known


def require_unchanged(folder, settings, result, bench, trained_on):
    """UserError if a finished run was made of other classes, pictures or weights than the same command has now.

    result: load_result(); bench: the Benchmark of now, or None where it is not on this machine; trained_on: its
    fingerprints(), if the run is one that trains.
    """
    found = data_changes(folder, result, bench, trained_on) if bench else []
    weights = of_backbone(settings.backbone_path or settings.backbone, settings.activation or None)
    if weights and result["made_of"].get("weights", weights) != weights:
        found.append(f"{settings.backbone_path or settings.backbone} holds other weights")
    if found:
        raise UserError(f"{folder} is finished, but what it was made of has changed ({'; '.join(found)}): repeat it "
                        "with --again, or keep it and choose another --out.")


def data_changes(folder, result, bench, trained_on=None):
    """-> phrases that say how the classes and pictures of a finished run differ from those of `bench`, or [].

    result: load_result(). trained_on: the fingerprints() of the same shots, or None if `bench` was loaded for its test
    pictures alone.
    """
    then, now = result["made_of"], made_of(bench, trained_on, None)
    asked = ["classes", "pictures", *(["train"] if trained_on is not None else [])]
    is_recorded = then.keys() >= {*asked}
    if is_recorded and all(then[key] == now[key] for key in asked):
        return []
    saved = read_prompts(folder)
    found = differences("class", saved["classnames"], bench.classnames)
    if found or saved["classnames"] != bench.classnames:
        return found or ["its classes have another order"]
    rows = read_predictions(folder / "predictions.csv", saved["classnames"], result.get("test_images"))
    used = {row["picture"]: row["class"] for row in rows}
    used_now = {bench.relative(path): bench.classnames[label] for path, label in bench.test}
    if trained_on is not None:
        used, used_now = used | saved["train"], used_now | trained_on
    found = differences("picture", used, used_now)
    others = [path for path, what in used.items() if used_now.get(path, what) != what]
    if others:
        found.append(f"{count(others, 'picture')} with another class, part or content: {shortened(others)}")
    if not found and (is_recorded or trained_on is not None and result["picks"] != bench.picks):
        found.append(f"pictures of {bench.folder} were added, removed, moved or overwritten")
    return found


def differences(what, then, now):
    """-> phrases for the names that are only among those of `then` and only among those of `now`."""
    gone, new = [name for name in then if name not in now], [name for name in now if name not in then]
    found = [f"{count(gone, what)} no longer part of it: {shortened(gone)}"] if gone else []
    return found + ([f"{count(new, what)} new in it: {shortened(new)}"] if new else [])


def count(names, what):
    return f"{len(names)} {what if len(names) == 1 else {'class': 'classes', 'picture': 'pictures'}[what]}"


def find_moved(folder, saved, moved_to):
    """-> where a run's own pictures are, "" for a benchmark. saved: what prompts.pt holds; moved_to: --data or None."""
    if not moved_to:
        return saved["data_path"]
    if not saved["data_path"]:
        raise UserError(f"--data is for runs on own pictures and {folder} was made of {saved['data']}: --root says "
                        "where that is.")
    if not expanded(moved_to).is_dir():
        raise UserError(f"--data {moved_to} is no folder: give the one in which the pictures of {folder} are now.")
    return str(expanded(moved_to).resolve())


def load_again(folder, saved, root):
    """-> the Benchmark of a finished run. A warning says what has changed, a UserError that it cannot be used."""
    path = saved["data_path"]
    if path and not Path(path).is_dir():
        raise UserError(f"The pictures of {folder} are not at {path} any more: --data PATH says where they are now.")
    bench = data.load(path or saved["data"], root, shots=0)
    if saved["changed"].get("base_to_new"):
        bench, _ = split_classes(bench)
    changed = "; ".join(data_changes(folder, load_result(folder), bench))
    if bench.classnames != saved["classnames"]:
        raise UserError(f"{bench.folder} is not what {folder} was made of ({changed}): --data PATH says where its "
                        "pictures are, or train again.")
    if changed:
        warn(f"{bench.folder} is not as it was when {folder} was made ({changed})")
    return bench


def require_same_weights(folder, saved, clip):
    """UserError if a run was trained on another CLIP. saved: what prompts.pt holds, which once had no weights in it."""
    if saved.get("weights") and saved["weights"] != of_clip(clip):
        place = saved["backbone_path"] or saved["backbone"]
        raise UserError(f"{folder} was trained on other weights than {place} holds now: put those back that it was "
                        "trained on, or train again.")
