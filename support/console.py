"""What a run says on the terminal, and how the two programs begin and end.

train.py prints with these functions what a run is, how far it is, and advice; data.py shows how far a walk through the
pictures is. train.py and report.py begin with start() and run inside exit_status(): a user's mistake ends with one
sentence, never with a traceback.
"""

import math
import os
import signal
import sys
from contextlib import suppress

import torch

from clip_min import UserError
from support.streams import begin_in_utf8, is_terminal, ready_streams


def start(main):
    """Begin a program with main(), and end it with the status that this returns."""
    begin_in_utf8()
    sys.exit(main())


@ready_streams()
def exit_status(program, *args):
    """Call program(*args). -> 0, or what the program ends with after having said why.

    A user's mistake ends with one sentence and status 2, Ctrl-C and SIGTERM with one line and status 130.
    """
    with suppress(ValueError):  # only the main thread of a program hears signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Slurm ends a job: as Ctrl-C
    try:
        program(*args)
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback in front
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody reads the first lines only
        with suppress(AttributeError, OSError):  # a stream that is no file has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def print_settings(settings, bench, machine, method):
    """What a run is: the method and what was changed, data, backbone, recipe, and the first three prompts."""
    changed = "".join(f", {key} {value}" for key, value in settings.changed.items())
    recipe = ", ".join(f"{key} {value}" for key, value in settings.recipe.items())
    print(f"method      {settings.method}{changed}")
    print(f"data        {bench.name}: {len(bench.classnames)} classes, {len(bench.train)} training pictures "
          f"({settings.shots or 'all'} per class, seed {settings.seed}), {len(bench.test)} test pictures")
    print(f"backbone    {settings.backbone} with {settings.activation} on {machine.device.type}, "
          f"{machine.dtype or torch.float32}")
    print(f"recipe      {recipe or 'nothing to train'}")
    print(f"prompts     {' | '.join(method.prompt_texts[:3])}")


def show_epoch(epoch, epochs, loss, rates, seconds_left):
    """The line that an epoch writes over its predecessor's. A log gets ten of them."""
    line = f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}  lr {rates}  {seconds_left:.0f} s left"
    show(line, keep=epoch + 1 == epochs, in_log=(epoch + 1) % max(1, epochs // 10) == 0)


def show(line, keep=False, in_log=False):
    """One live line on a terminal, written over by the next unless kept. A log gets only the lines meant for it."""
    if is_terminal(sys.stdout):
        print("\r" + line.ljust(70), end="\n" if keep else "", flush=True)
    elif in_log:
        print(line, flush=True)


def advice(after, epochs, n_classes):
    """What to try where a run ends below zero-shot CLIP. after: its Evaluation; epochs: how many it was trained."""
    chance = math.log(n_classes)  # the cross-entropy of knowing nothing
    knows_nothing = after.cross_entropy > 0.97 * chance and after.accuracy < 150 / n_classes
    remedy = "more --epochs or --shots" if epochs else "more --shots"
    if knows_nothing and epochs > 20:
        remedy = "a smaller --lr"
    return (f"this is below zero-shot CLIP, with a cross-entropy of {after.cross_entropy:.2f} (chance: {chance:.2f}): "
            f"try {remedy}.")
