"""The data of a command: what a run is trained and tested on, and what else it is tested on.

train.py calls both functions before anything is computed, support/changes.py for a run that is finished. Data that do
not fit the command end in one sentence.
"""

import data
from clip_min import UserError
from support.checks import require_same_classes, split_classes, warn_of_copies, without_trained


def load_data(settings, args, learned):
    """-> the Benchmark to train on; with --base-to-new that of the other half of its classes, else None; fingerprints.

    They are those of the pictures that the method learns from, or that the prompts of --prompts were learned from:
    learned is what read_learned() gives, else None.
    """
    bench = data.load(settings.data_path or settings.data, args.root, settings.shots, settings.seed)
    if settings.recipe and not bench.train:
        raise UserError(f"{bench.name} has test pictures only: train on other data, with --eval-on {bench.name}.")
    if settings.recipe:
        warn_of_copies(bench)
    if learned:
        bench = without_trained(bench, learned.trained_on(bench.folder), bench.folder)
    bench, new_classes = split_classes(bench) if args.base_to_new else (bench, None)
    trained_on = learned.trained_on(bench.folder) if learned else bench.fingerprints() if settings.recipe else {}
    return bench, new_classes, trained_on


def load_shifts(names, root, bench, trained_on):
    """-> the Benchmarks of --eval-on, which have the classes of `bench`, without the pictures that are trained on."""
    targets = [data.load(name, root, shots=0, whole=True) for name in names]
    require_same_classes(bench, targets)
    return [without_trained(target, trained_on, bench.folder) for target in targets]
