"""Run folders: who works on a run, what it goes on from after a kill, and what it leaves.

train.py calls reserve(), Checkpoint and save_run(); report.py reads with read_prompts(). A folder is written whole or
not at all, and a finished run is never lost.
"""

import csv
import json
import math
import sqlite3
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from clip_min import UserError
from support.archives import load_tensors
from support.files import clear_leftovers
from support.machine import agree
from support.settings import Settings

CHECKPOINT_SECONDS = 30  # between the checkpoints of an epoch that takes longer


@contextmanager
def reserve(folder, again, machine):
    """Keep a run for this command while the block runs. -> "ours", "finished", or "in work", which a line says.

    again: whether a finished run is repeated. Of several processes that torchrun started, process 0 decides for all.
    """
    lock, state = None, ""
    if machine.rank == 0:
        state = finished(folder, again)
        if not state:
            lock = lock_file(folder.with_name(f"{folder.name}.lock"))
            state = "in work"
            if lock:  # another process may have finished the run between the first look and the lock
                state = finished(folder, again) or "ours"
    state = agree(state, machine)
    if state == "in work":
        print(f"in work     {folder} (by another process)")
    try:
        yield state
    finally:
        if lock:
            lock.close()
            with suppress(OSError):  # on Windows another process may have it open
                folder.with_name(f"{folder.name}.lock").unlink()


def finished(folder, again):
    """-> "finished" for a run that is finished and shall not be repeated, else ""."""
    return "finished" if (folder / "result.json").exists() and not again else ""


def lock_file(path):
    """-> a lock, or None where another process has it. It ends with close(), or with the process."""
    make_folder(path.parent)  # now, so that a place that cannot be written to does not cost a training
    connection = None
    try:  # SQLite knows the locks of every system
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if connection:
            connection.close()
        if "locked" not in str(error):
            raise UserError(f"{path} cannot be written ({error}): choose another --out.") from error
        return None
    return connection


class Checkpoint:
    """What a run that was stopped goes on from: a file beside its folder, used for the same settings and pictures.

    It holds the learned tensors, the state of optimizer, scaler and random streams, the mean losses of the finished
    epochs and the losses of the steps behind them. What is not finite is never written.
    """

    def __init__(self, path, description, machine):
        """description: what prompts.pt holds besides the tensors."""
        self.path, self.description, self.machine, self.written = path, description, machine, time.time()
        self.saved = agree(self.read() if machine.rank == 0 else None, machine)

    def read(self):  # -> what was written, or None
        if not self.path.exists():
            return None
        try:
            saved = load_tensors(self.path)
            saved = {"weights": self.description.get("weights")} | saved  # those of before do not tell
            if any(saved[key] != value for key, value in self.description.items()):
                raise ValueError("other settings, pictures or weights")
            n_epochs, n_steps = len(saved["epoch_losses"]), len(saved["step_losses"])
            print(f"goes on     behind {n_epochs} epochs and {n_steps} steps")
            return saved
        except Exception as error:  # any file can stand there
            if getattr(error, "errno", None):  # the machine's trouble, not the file's
                raise UserError(f"{self.path} cannot be read ({error.strerror}): see to it, or remove it.") from error
            detail = " ".join(str(error).split())[:80]
            print(f"warning: {self.path} is no checkpoint of this run ({detail}), which begins anew")

    def restore_tensors(self, method):
        """-> whether there were any."""
        if self.saved:
            with self.name_what_does_not_fit():
                method.load_learned(self.saved["tensors"])
        return bool(self.saved)

    def restore(self, optimizer, scaler):
        """-> the mean losses of the finished epochs, and the losses of the steps behind them."""
        if not self.saved:
            return [], []
        with self.name_what_does_not_fit():
            optimizer.load_state_dict(self.saved["optimizer"])
            scaler.load_state_dict(self.saved["scaler"])
            torch.set_rng_state(self.saved["random"])
            if self.machine.device.type == "cuda":
                torch.cuda.set_rng_state(self.saved["random_cuda"], self.machine.device)
            step_losses = [loss.to(self.machine.device) for loss in self.saved["step_losses"]]
            return self.saved["epoch_losses"], step_losses

    @contextmanager
    def name_what_does_not_fit(self):
        try:
            yield
        except Exception as error:  # another version of PyTorch or of a method, or a file that somebody changed
            detail = " ".join(str(error).split())[:80]
            raise UserError(f"{self.path} does not fit this run ({detail}): remove it to begin anew.") from error

    def write_if_due(self, method, optimizer, scaler, epoch_losses, step_losses):
        """Write in the middle of an epoch, if the last checkpoint is old and all is finite: else a UserError."""
        if time.time() - self.written > CHECKPOINT_SECONDS:
            require_finite(step_losses, method, len(epoch_losses), optimizer)
            self.write(method, optimizer, scaler, epoch_losses, step_losses)

    def write(self, method, optimizer, scaler, epoch_losses, step_losses):
        """Replace the file, whole or not at all. What it shall hold is finite, see require_finite()."""
        self.written = time.time()
        if self.machine.rank:
            return
        state = self.description | dict(
            tensors=method.learned(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            epoch_losses=epoch_losses, step_losses=step_losses, random=torch.get_rng_state())
        if self.machine.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.machine.device)
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            torch.save(state, part)
            part.replace(self.path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            with suppress(OSError):
                part.unlink()
            raise UserError(f"{self.path} cannot be written ({error}): make room, the same command goes on.") from error

    def remove(self):
        for path in self.path, self.path.with_name(f"{self.path.name}.part"):
            path.unlink(missing_ok=True)


def require_finite(step_losses, method, epoch, optimizer):
    """UserError unless the losses of an epoch's steps so far, and all that the method would save, are finite."""
    values = torch.stack(step_losses).tolist()
    bad_steps = [step for step, value in enumerate(values, 1) if not math.isfinite(value)]
    if not bad_steps and all(tensor.isfinite().all() for tensor in method.learned().values()):
        return
    step = bad_steps[0] if bad_steps else len(values)  # what the last step taught has no loss yet
    raise UserError(f"The loss or what it taught is not finite in epoch {epoch + 1}, step {step}, at learning rate "
                    f"{rates(optimizer)}: no result was saved, try a smaller --lr or --precision fp32.")


def rates(optimizer):
    """-> the present learning rates, each once, such as "0.01/0.002"."""
    return "/".join(dict.fromkeys(f"{group['lr']:.2g}" for group in optimizer.param_groups))


def device_name(device):
    """-> a GPU's name; of any other device its kind, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def save_run(folder, bench, method, description, evaluation, result):
    """Write a run's folder, whole or not at all: beside its place, then renamed.

    description: what prompts.pt holds besides the tensors; evaluation: an Evaluation of the test pictures; result: what
    result.json holds.
    """
    prompts = description | {"tensors": {name: tensor.cpu() for name, tensor in method.learned().items()}}
    try:
        clear_leftovers(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            torch.save(prompts, new / "prompts.pt")
            write_predictions(new / "predictions.csv", bench, evaluation)
            (new / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:  # Ctrl-C, too: an old run is never lost
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, RuntimeError) as error:  # as above
        raise UserError(f"{folder} cannot be written ({error}): make room or choose another --out.") from error


def write_predictions(path, bench, evaluation):
    """A row for every test picture: its path in the data set's folder, its class, the predicted class, how likely."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["picture", "class", "predicted class", "probability"])
        predictions = zip(bench.test, evaluation.predicted, evaluation.probability, strict=True)
        for (picture, label), predicted, p in predictions:
            rows.writerow([bench.relative(picture), bench.classnames[label], bench.classnames[predicted], f"{p:.6f}"])


def warn_of_moved(bench, runs):
    """A user's folder that has grown may train on what earlier runs were tested on: their numbers do not compare."""
    if not bench.own:
        return
    tested = set()
    for file in runs.rglob("predictions.csv"):
        with suppress(OSError, csv.Error), file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            tested |= {row.get("picture") for row in csv.DictReader(lines)}
    moved = tested & {bench.relative(path) for path, _ in bench.train}
    if moved:
        print(f"warning: {len(moved)} training pictures were tested by earlier runs in {runs}: the folder has changed, "
              "compare with runs that are made again (--again).")


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out.") from error


def read_prompts(folder):
    """prompts.pt of a finished run: the fields of Settings, classnames, class_ids, train and tensors."""
    path = Path(folder) / "prompts.pt"
    try:
        saved = load_tensors(path)
        wanted = {*Settings.__dataclass_fields__, "classnames", "class_ids", "train", "tensors"}
        if not saved.keys() >= wanted:
            raise KeyError("a setting is missing")
        return saved
    except Exception as error:  # any file can stand there
        if getattr(error, "errno", None):  # the machine's trouble, not the file's
            raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a finished run.") from error
        raise UserError(f"{path} is not a prompt file of train.py ({type(error).__name__}): train again.") from error
