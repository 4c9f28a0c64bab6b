"""Runs that are killed and go on, runs that two processes want, and runs that several processes share."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import FORKSERVER, call
from test_train import only_run, run_folders, world  # noqa: F401 (a fixture)

import train
from clip_min import UserError
from support import machine, runs
from support.machine import Machine

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def flags(world, tmp_path):  # noqa: F811
    return ["--data", world / "photos", "--backbone", world / "weights.pt", "--shots", 4, "--epochs", 3,
            "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "runs"]


def start(flags, stderr=os.devnull):
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(stderr, "w")  # noqa: SIM115 (as long as the process)
    torch.set_num_threads(1)
    sys.exit(train.main([str(flag) for flag in flags]))


def start_and_die(flags, owner, name, count, after):
    """The run is killed at the count-th call of a function, before it or after it. Every step has a checkpoint."""
    owner = sys.modules.get(owner, owner)  # a module comes by its name
    function, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args, **kwargs):
        is_last = next(calls) == count
        value = None if is_last and not after else function(*args, **kwargs)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, deadly)
    runs.CHECKPOINT_SECONDS = 0
    start(flags)


def outcome(folder):
    """What a run leaves, but for the times."""
    result = json.loads((folder / "result.json").read_text())
    tensors = torch.load(folder / "prompts.pt", weights_only=True)
    return ({key: value for key, value in result.items() if not key.startswith("seconds")},
            {name: tensor.tolist() for name, tensor in tensors.pop("tensors").items()}, tensors,
            (folder / "predictions.csv").read_text())


# ---- Killed ----


@pytest.mark.parametrize("method, options, workers, some", [
    ("coop", ["n_ctx=2"], 0, range(8)), ("upt", [], 2, (2, 5)), ("fgvpl", ["cache_views=2"], 0, (1, 4)),
    ("fgvpl", ["parts=tip-f"], 2, (1, 5))])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(flags, tmp_path, method, options, workers, some):
    """SGD, with UPT's dropout; AdamW with a cache; a cache that is learned. These three die some of the deaths."""
    flags = [*flags, "--method", method, *(["--set", *options] if options else []), "--workers", workers]
    assert call(start, [*flags, "--out", tmp_path / "whole"]) == 0
    kind = train.METHODS[method]
    deaths = [("data", "few_shot_batches", 1, False),  # before anything
              (kind, "prepare", 1, True),  # what it made is lost
              (kind, "loss", 2, False),  # behind the first step's checkpoint
              (Path, "replace", 1, False),  # a checkpoint is written, and has not taken its place
              (train.Checkpoint, "write", 2, True),  # in the middle of an epoch
              ("train", "require_finite", 1, False),  # at the end of an epoch, before its checkpoint
              ("train", "evaluate", 2, False),  # after the training
              (Path, "rename", 1, False)]  # the results are written, and have not taken their place
    for number in some:
        assert call(start_and_die, flags, *deaths[number]) == -signal.SIGKILL
    if method == "coop":  # the last of them had written its results, in a hidden folder
        (left,) = run_folders(tmp_path / "runs")
        assert left.parent.name.startswith(".")
        shutil.rmtree(left.parent)
    assert call(start, flags) == 0
    assert outcome(only_run(tmp_path / "runs")) == outcome(only_run(tmp_path / "whole"))
    assert not list((tmp_path / "runs").rglob("*.checkpoint*")) and not list((tmp_path / "runs").rglob("*.lock"))


@pytest.fixture
def stopped(flags, tmp_path):
    """The checkpoint of a run that was killed in its last epoch."""
    assert call(start_and_die, flags, "train", "require_finite", 3, False) == -signal.SIGKILL
    (path,) = (tmp_path / "runs").rglob("*.checkpoint")
    return path


def test_a_run_says_where_it_goes_on(flags, stopped, capsys):
    assert train.main(list(map(str, flags))) == 0
    out = capsys.readouterr().out
    assert "goes on     behind 2 epochs and 3 steps" in out
    assert re.findall(r"^epoch (\d)/3", out, re.MULTILINE) == ["3"]
    assert not stopped.exists()


@pytest.mark.parametrize("spoil", ["truncate", "foreign", "settings", "pictures", "weights"])
def test_a_checkpoint_of_another_run_or_none_at_all_is_not_used(flags, stopped, tmp_path, capsys, spoil):
    if spoil == "truncate":
        stopped.write_bytes(stopped.read_bytes()[:1000])
    elif spoil == "foreign":
        stopped.write_text("mine")
    else:
        saved = torch.load(stopped, weights_only=True)
        others = {"settings": {"seed": 2}, "pictures": {"train": dict.fromkeys(saved["train"], "0")},
                  "weights": {"weights": "0"}}
        saved |= others[spoil]
        torch.save(saved, stopped)
    assert train.main(list(map(str, flags))) == 0
    (warning,) = re.findall("^warning: .*begins anew.*$", capsys.readouterr().out, re.MULTILINE)
    assert str(stopped) in warning
    assert train.main([str(flag) for flag in [*flags, "--out", tmp_path / "whole"]]) == 0  # with as many threads
    assert outcome(only_run(tmp_path / "runs"))[1] == outcome(only_run(tmp_path / "whole"))[1]
    assert not stopped.exists()


def test_a_checkpoint_from_before_weights_were_recorded_is_used(flags, stopped, capsys):
    saved = torch.load(stopped, weights_only=True)
    del saved["weights"]
    torch.save(saved, stopped)
    assert train.main(list(map(str, flags))) == 0
    assert "goes on     behind 2 epochs" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_checkpoint_before(flags, stopped, capsys, monkeypatch):
    before = stopped.read_bytes()

    def full_disk(value, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert train.main(list(map(str, flags))) == 2
    assert "error: " in capsys.readouterr().err and stopped.read_bytes() == before
    assert [path.name for path in stopped.parent.iterdir()] == [stopped.name]
    assert train.main(list(map(str, flags))) == 0


def test_an_epoch_that_takes_longer_has_checkpoints_of_its_own(flags, monkeypatch):
    written, write = [], train.Checkpoint.write
    monkeypatch.setattr(
        train.Checkpoint, "write", lambda self, *args: written.append(len(args[4])) or write(self, *args))
    assert train.main(list(map(str, flags))) == 0
    assert written == [0, 0, 0]  # at the end of every epoch
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    assert train.main([*map(str, flags), "--again"]) == 0
    assert written[3:] == [1, 2, 3, 0] * 3


# ---- Stopped, and wanted twice ----


def test_sigterm_is_as_ctrl_c_and_a_second_process_leaves_the_run_to_the_first(flags, tmp_path, capsys):
    program = FORKSERVER.Process(target=start, args=([*flags, "--epochs", 100_000], tmp_path / "stderr"))
    program.start()
    while not list((tmp_path / "runs").rglob("*.checkpoint")):
        assert program.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    argv = [*map(str, flags), "--epochs", "100000"]
    assert train.main(argv) == 0  # while the first is at it
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("in work ") and "coop" in line
    program.terminate()
    program.join(300)
    error = (tmp_path / "stderr").read_text()
    assert program.exitcode == 130 and "the same command goes on" in error and len(error.strip().splitlines()) == 1
    (folder,) = [path.parent for path in (tmp_path / "runs").rglob("*.checkpoint")]
    assert not list(folder.glob("*.lock"))


def test_of_a_sweep_the_second_process_takes_the_next_run(flags, tmp_path, capsys):
    with train.reserve(tmp_path / "runs" / "photos" / "coop" / "seed1", False, Machine(torch.device("cpu"))):
        pass  # a lock that was given back is no hindrance
    args = train.parse_arguments(list(map(str, flags)))
    settings = [train.resolve_settings(args, train.METHODS, args.data[0], "coop", 4, seed) for seed in (1, 2)]
    folders = [Path(args.out) / of_run.folder for of_run in settings]
    folders[1].parent.mkdir(parents=True)
    folders[1].with_name(f"{folders[1].name}.lock").write_bytes(b"")  # of a process that was killed
    held = FORKSERVER.Event()
    holder = FORKSERVER.Process(target=hold, args=(folders[0], held))
    holder.start()
    assert held.wait(300)
    assert train.main([*map(str, flags), "--seeds", "1", "2"]) == 0
    assert f"in work     {folders[0]}" in capsys.readouterr().out
    assert run_folders(tmp_path / "runs") == [folders[1]]
    holder.kill()
    holder.join()
    assert train.main([*map(str, flags), "--seeds", "1", "2"]) == 0
    assert sorted(run_folders(tmp_path / "runs")) == folders


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_another_process_finishes_before_the_lock_is_had_is_not_made_twice(
        tmp_path, monkeypatch, again):
    folder, lock_file = tmp_path / "seed1", runs.lock_file

    def finish_and_lock(path):
        folder.mkdir()
        (folder / "result.json").touch()
        return lock_file(path)

    monkeypatch.setattr(runs, "lock_file", finish_and_lock)
    with train.reserve(folder, again, Machine(torch.device("cpu"))) as state:
        assert state == ("ours" if again else "finished")
    assert not list(tmp_path.glob("*.lock"))


def hold(folder, held):
    with train.reserve(folder, False, Machine(torch.device("cpu"))):
        held.set()
        time.sleep(300)


# ---- Several processes ----


def test_two_processes_learn_and_answer_as_one(flags, tmp_path):
    """12 pictures in batches of 5 and of 11: shares differ in size, and FG-VPL's last batch is a picture alone.

    With k_n=1, DPT's processes have different numbers of hits, by which its L_ca is divided.
    """
    flags = [*flags, "--shots", 4, "--epochs", 2, "--lr", 0.02]
    most = [*flags, "--method", "coop", "vpt", "proda", "prograd", "clip_adapter", "fgvpl", "--batch-size", 11]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", "train.py"]
    done = subprocess.run([str(word) for word in [*torchrun, *most, "--out", tmp_path / "two"]], cwd=PROJECT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600)
    assert done.returncode == 0 and "terminate called" not in done.stderr, done.stderr
    assert done.stdout.count("accuracy ") == 6  # process 0 alone speaks
    others = [*flags, "--method", "dpt", "cavpt", "--set", "k_n=1", "--batch-size", 5]
    assert [process.exitcode for process in run_two([*others, "--out", tmp_path / "two"])] == [0, 0]
    for words in most, others:
        assert call(start, [*words, "--out", tmp_path / "runs"]) == 0
    ones, twos = run_folders(tmp_path / "runs"), run_folders(tmp_path / "two")
    assert len(ones) == len(twos) == 8
    for one, two in zip(sorted(ones), sorted(twos), strict=True):
        assert one.relative_to(tmp_path / "runs") == two.relative_to(tmp_path / "two")
        (result, tensors, *_), (shared_result, shared, *_) = outcome(one), outcome(two)
        for name in tensors:
            a, b = torch.tensor(tensors[name]), torch.tensor(shared[name])
            apart, scale = float((b - a).abs().max()), float(a.abs().max())
            assert apart <= 5e-4 * scale, f"{one}, {name}: {apart} apart"  # rounding, of which AdamW makes 7e-5
        assert shared_result["losses"] == pytest.approx(result["losses"], rel=1e-4)
        with (one / "predictions.csv").open() as file, (two / "predictions.csv").open() as other:
            pairs = list(zip(csv.DictReader(file), csv.DictReader(other), strict=True))
        assert all(abs(float(a["probability"]) - float(b["probability"])) < 1e-3 for a, b in pairs)
        ties = [float(a["probability"]) for a, b in pairs if a["predicted class"] != b["predicted class"]]
        assert all(p < 0.501 for p in ties), "rounding decides between two classes that are equally likely, no others"
        assert abs(shared_result["accuracy"] - result["accuracy"]) <= 100 * len(ties) / len(pairs) + 1e-9


@pytest.mark.parametrize("failure", [None, UserError, KeyboardInterrupt])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_group_of_processes_is_destroyed_however_the_program_ends(monkeypatch, device, failure):
    """NCCL would wait for the other processes, so with it a failure leaves the group to the end of the process."""
    destroyed = []
    for name, value in dict(is_torchelastic_launched=True, init_process_group=None, get_rank=0, get_world_size=2,
                            destroy_process_group=None).items():
        monkeypatch.setattr(machine.distributed, name, lambda *_, name=name, value=value, **__: (
            destroyed.append(name) if name.startswith("destroy") else value))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with suppress(UserError, KeyboardInterrupt), machine.join_processes(Machine(torch.device(device))) as joined:
        assert (joined.rank, joined.processes) == (0, 2) and not destroyed
        if failure:
            raise failure
    assert len(destroyed) == (device == "cpu" or not failure)


def start_one_of_two(flags, rank, port, *death):
    """A process of two, as torchrun starts it. The second may be one that dies."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    if death and rank == 1:
        start_and_die(flags, *death)
    start(flags)


def run_two(flags, *death):
    """-> two processes that have worked on the same runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [FORKSERVER.Process(target=start_one_of_two, args=(flags, rank, port, *death)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    return both


@pytest.mark.parametrize("death", [(train.METHODS["coop"], "loss", 2, False), ("train", "evaluate", 2, True)], ids=str)
def test_a_process_whose_partner_has_died_ends_too(flags, death):
    """In the midst of the training; behind its last exchange with the other."""
    first, second = run_two(flags, *death)
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == (1 if death[1] == "loss" else 0)  # neither hangs nor is aborted


@pytest.mark.parametrize("n_batches", [1, 2, 5, 6])
def test_results_come_together_in_the_order_of_the_batches(monkeypatch, n_batches):
    batches = [torch.tensor([number]) for number in range(n_batches)]

    def all_gather_object(hands, mine):
        assert mine == batches[1::3]
        hands[:] = [batches[rank::3] for rank in range(3)]

    monkeypatch.setattr(machine.distributed, "all_gather_object", all_gather_object)
    second_of_three = Machine(torch.device("cpu"), rank=1, processes=3)
    assert machine.gather(batches[1::3], second_of_three) == batches
