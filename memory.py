"""The memory of a training step: counted before anything is allocated, and held against what the device has."""

from __future__ import annotations

import bisect
import functools
import os
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config, GPTConfig, TrainingConfig
from errors import ConfigError
from hardware import best_dtype, default_device, lines_of
from model import GPT
from optim import NUMBERS_AT_ONCE, Muon, build_optimizers

# Of the free memory. Allocators round up and keep what is freed: on a CPU, a third more was measured than a step needs.
SHARE_TO_FILL = {"cuda": 0.85, "mps": 0.7, "cpu": 0.5}
MOST_TOKENS = 65_536  # in a micro-batch: every device is busy by then, and more only takes memory


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process in training: what stays, and the most that comes and goes in a step.

    optimizer    its state: Muon keeps one number per weight, AdamW two
    activations  of the forward and backward pass (eager; torch.compile needs less)
    update       while the optimizer moves the weights
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    update: int

    @property
    def total(self) -> int:
        """The most at a time."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.update)

    @property
    def checkpoint(self) -> int:
        """Of a checkpoint on the disk, but for its tokenizer and the like; without train.fsdp."""
        return self.weights + self.optimizer


def training_memory(config: Config, rows: int, devices: int = 1) -> TrainingMemory:
    """Follow the allocations of a step with so many rows in a micro-batch, without computing anything.

    Products are in train.precision (computes_in_16_bits), but Muon's own in this machine's best format; weights and
    all state in fp32.
    devices: among which train.fsdp divides weights, gradients and state.
    """
    shape = config.model.resolved(config.data.n_vocab)
    with torch.device("meta"):
        model = GPT(shape)
    weights = gradients = 4 * model.parameter_counts()["total"]
    optimizer = sum(
        4 * p.numel() * (1 if isinstance(o, Muon) else 2)
        for o in build_optimizers(model, config.train) for group in o.param_groups for p in group["params"]
    )  # fmt: skip
    one, two = _activations(config, rows, n_layers=1), _activations(config, rows, n_layers=2)
    activations = one + (shape.n_layers - 1) * (two - one)  # each further layer takes as much as the second
    n = devices if config.train.fsdp else 1
    # Not divided: Muon takes some matrices at a time, and of several processes each as many.
    update = _update(astuple(shape), config.train.optimizer, 1 if config.train.fsdp else devices)
    return TrainingMemory(weights // n, gradients // n, optimizer // n, activations, update)


def computes_in_16_bits(config: Config) -> bool:
    """Whether the products are in bf16 or fp16: by train.precision, where auto means what this machine is best at."""
    if config.train.precision != "auto":
        return config.train.precision in ("bf16", "fp16")
    return torch.cuda.is_available() or best_dtype(default_device()).itemsize == 2  # any CUDA card has one of them


def _with_gradients(shape: GPTConfig) -> GPT:
    """The model with gradients, as it has them from the second micro-step on."""
    model = GPT(shape)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def _activations(config: Config, rows: int, n_layers: int) -> int:
    """Bytes that a forward and backward pass takes at most, beside weights and gradients."""
    with FakeTensorMode():
        model = _with_gradients(replace(config.model.resolved(config.data.n_vocab), n_layers=n_layers))
        model.activation_checkpointing = config.train.activation_checkpointing

        def forward_and_backward() -> None:
            ids = torch.zeros(rows, model.config.max_length, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_16_bits(config)):
                model(ids, ids).backward()

        return _peak(forward_and_backward)


@functools.cache  # asked for with one number of rows after another
def _update(shape: tuple[Any, ...], optimizer: Literal["muon", "adamw"], processes: int) -> int:
    """Bytes that come and go while the optimizer moves the weights, at most: as in one process, or, if that is more,
    the directions that several gather. shape: the fields of a resolved GPTConfig."""
    config = GPTConfig(*shape)
    with FakeTensorMode():
        layer = GPT(replace(config, n_layers=1)).block_matrices()
        of_a_layer = Counter((n, weight.size(1)) for weight, rows in layer for n in rows)
        at_once = {(r, c): max(1, NUMBERS_AT_ONCE // (r * c)) for r, c in of_a_layer}  # as Muon takes them
        # More layers than those that fill it take no more at a time, and seconds to follow.
        enough = max(-(-at_once[kind] // n) for kind, n in of_a_layer.items())
        model = _with_gradients(replace(config, n_layers=min(enough, config.n_layers)))
        optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer))
        for each in optimizers:
            if isinstance(each, Muon):
                each.processes = 1  # what is counted must not depend on how many count
            each.step()  # the first one makes the state
        alone = max(_peak(each.step) for each in optimizers)
    if processes == 1 or optimizer == "adamw":
        return alone
    shares = [r * c * min(at_once[r, c], -(-n * config.n_layers // processes)) for (r, c), n in of_a_layer.items()]
    return max(alone, 2 * (processes + 1) * max(shares))  # bf16: everyone's, and a process's own before


def _peak(work: Callable[[], object]) -> int:
    """The most bytes that some work on fake tensors has allocated at a time."""
    with _Allocations() as allocations:
        work()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the storages that operations make, each from its first sight to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in mine:  # not a view, and not changed in place
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._end, key)
        return out

    def _end(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def usable_memory(device: torch.device, processes: int = 1) -> int:
    """SHARE_TO_FILL of the bytes that are free on a device; of a CPU, in the system or its container, for each of so
    many processes."""
    return int(SHARE_TO_FILL[device.type] * _free_memory(device)) // (processes if device.type == "cpu" else 1)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    lines = lines_of("/proc/meminfo")
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]  # with caches
    limit, used = lines_of("/sys/fs/cgroup/memory.max"), lines_of("/sys/fs/cgroup/memory.current")
    inactive = [int(line.split()[1]) for line in lines_of("/sys/fs/cgroup/memory.stat") if "inactive_file " in line]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS tells of all only
    most = available[0] if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    if limit and used and limit[0] != "max":
        most = min(most, int(limit[0]) - int(used[0]) + sum(inactive))
    return most


def fitting_batch_size(config: Config, rows: int, usable: int, devices: int = 1) -> int:
    """The largest micro-batch whose training takes at most so many bytes of a device and that divides so many rows.

    Raises ConfigError when a single row is too much.
    """
    length = config.model.max_length
    most = max(1, MOST_TOKENS // length)
    divisors = [n for n in range(1, min(rows, most) + 1) if rows % n == 0]
    n_fitting = bisect.bisect_right(divisors, usable, key=lambda n: training_memory(config, n, devices).total)
    if n_fitting == 0:
        help_of_it = "" if config.train.activation_checkpointing else ", or --train.activation_checkpointing"
        raise ConfigError(
            f"training on one row of {length} tokens takes {training_memory(config, 1, devices).total / 2**30:.2f} GB, "
            f"and {usable / 2**30:.2f} GB can be used; use a smaller model or context{help_of_it}"
        )
    return divisors[n_fitting - 1]
