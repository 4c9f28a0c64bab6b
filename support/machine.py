"""Where a run computes: the device, its precision, the processes that torchrun started, and how a program ends.

train.py and report.py call choose_machine() and exit_status(); train.py calls join_processes(), and average(), agree()
and gather() wherever processes must come to the same. With one process these change nothing.
"""

import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import distributed

from clip_min import UserError


@dataclass(frozen=True)
class Machine:
    """Where a run computes, in which precision, and how many processes read its pictures."""

    device: torch.device
    dtype: torch.dtype | None = None  # of the frozen towers under autocast, None: fp32; learned tensors are always fp32
    workers: int = 0
    rank: int = 0  # of this process among those that torchrun started
    processes: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


def choose_machine(device, precision, workers):
    """The flags -> Machine. bf16 and fp16 are chosen by themselves on CUDA only."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # the first from a PyTorch without CUDA
        raise UserError(f"--device {device} cannot be used by PyTorch here: use cuda or cpu.") from error
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # else cuDNN rounds what an fp32 convolution multiplies
    if precision == "auto":  # emulated bf16, as on a V100 or T4, is slower than fp16
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if device.type != "cuda" else "bf16" if native else "fp16"
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    return Machine(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], workers)


def join_processes(machine):
    """Under torchrun: the Machine with this process's number and its GPU. Only process 0 prints."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        return machine
    if machine.device.type == "cuda":
        machine = replace(machine, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(machine.device)
    backend = "nccl" if machine.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while process 0 downloads
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends those that wait for a process that has failed
    return replace(machine, rank=distributed.get_rank(), processes=distributed.get_world_size())


@contextmanager
def process_0_first(machine):
    """The block is run by process 0, and then by the others."""
    for turn in (0, 1):
        if (machine.rank > 0) == turn:
            yield
        if machine.processes > 1:
            distributed.barrier()


def average(loss, method, n):
    """-> the mean loss of the processes, weighted by their numbers n of pictures. Gradients become their mean, too."""
    learned = [p for p in method.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    values = n * torch.cat([loss.new_ones(1), loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
    distributed.all_reduce(values)
    loss, *gradients = (values[1:] / values[0]).split([1, *(p.numel() for p in learned)])
    for p, gradient in zip(learned, gradients, strict=True):
        if p.grad is not None:  # a loss gives a tensor a gradient in all processes or in none
            p.grad = gradient.view_as(p)
    return loss[0]


def agree(value, machine):
    """-> process 0's value."""
    values = [value]
    if machine.processes > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(rows, machine):
    """The results for every batch, of which each process has those of its share, in the order of the batches."""
    if machine.processes == 1:
        return rows
    hands = [None] * machine.processes
    distributed.all_gather_object(hands, [row.cpu() for row in rows])
    return [hand[i] for i in range(len(hands[0])) for hand in hands if i < len(hand)]


def exit_status(program):
    """Run a program. A user's mistake ends with one sentence and status 2, Ctrl-C and SIGTERM with one line and 130."""
    with suppress(ValueError):  # only the main thread of a program hears signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Slurm ends a job: as Ctrl-C
    try:
        program()
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a DataLoader worker puts its traceback in front
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # somebody reads the first lines only
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
