"""Where a run computes: the device, its precision, and the processes that torchrun started.

train.py and report.py call choose_machine(). train.py runs inside join_processes(), and average(), agree() and gather()
stand wherever its processes must come to the same. With one process these change nothing.
"""

import os
import signal
import sys
from contextlib import contextmanager
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
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # a build without CUDA asserts that it has it
        detail = " ".join(str(error).split())[:200]  # the name is none, or the driver says what it lacks
        raise UserError(f"--device {device} cannot be used by PyTorch here ({detail}): use cuda or cpu.") from error
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # else cuDNN rounds what an fp32 convolution multiplies
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, as on a V100, fp16 is faster
        precision = "bf16" if has_bf16 else "fp16"
    dtype = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU the towers need the cores
    return Machine(device, dtype, workers)


def cast_products(clip, dtype):
    """Keep the weights that enter matrix products in `dtype`, to which autocast would cast them at every use."""
    for name, parameter in clip.named_parameters():
        if not any(part in name for part in ("ln_", "embedding", "logit_scale")):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def join_processes(machine):
    """Under torchrun the block has the Machine with this process's number and its GPU. Only process 0 prints."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield machine
        return
    if machine.device.type == "cuda":
        machine = replace(machine, device=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(machine.device)
    backend = "nccl" if machine.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while process 0 downloads
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends those that wait for a process that has failed
    ended_well = False
    try:
        yield replace(machine, rank=distributed.get_rank(), processes=distributed.get_world_size())
        ended_well = True
    finally:
        if ended_well or backend == "gloo":  # NCCL would wait for the others, which may have failed or be waiting, too
            distributed.destroy_process_group()


@contextmanager
def process_0_first(machine):
    """The block is run by process 0, and then by the others."""
    for turn in (0, 1):
        if (machine.rank > 0) == turn:
            yield
        if machine.processes > 1:
            distributed.barrier()


def average(loss, method, n, machine):
    """-> the mean loss of the processes, weighted by the number n of pictures that each has.

    The gradients of the method's learned tensors become the weighted mean, too.
    """
    if machine.processes == 1:
        return loss
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
    shares = [None] * machine.processes
    distributed.all_gather_object(shares, [row.cpu() for row in rows])
    in_order = []
    for i in range(len(shares[0])):  # the first share is the longest
        in_order += [share[i] for share in shares if i < len(share)]
    return in_order
