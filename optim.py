"""How the weights move: Muon for the block matrices, AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from config import TrainingConfig
from hardware import best_dtype
from model import GPT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Polar Express (arXiv:2505.16932, Algorithm 1): the odd polynomials a x + b x^3 + c x^5 whose composition
# takes singular values from [0.005, 1] closest to 1 in 4 steps. Five, from 0.001, are no better up to 36M parameters
# (docs/recipe.md). Each but the last is evaluated at x / 1.01, as there: a value that rounding lifts above 1 would
# otherwise grow (docs/log.md).
_POLYNOMIALS = (
    (8.152107458208128, -23.21120807024078, 17.018342976089436),
    (3.9094317928813322, -2.8997807585460174, 0.5538706667371186),
    (3.189818320216991, -2.391949019784006, 0.4991274180632689),
    (2.2000281800359818, -1.5770596350587665, 0.40893738237389937),
)
_SAFE_POLYNOMIALS = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLYNOMIALS[:-1]] + [_POLYNOMIALS[-1]]

# Numbers in the matrices that a process orthogonalises together: few small ones do not fill a GPU, and all of a large
# model would take as much memory again as its weights.
NUMBERS_AT_ONCE = 2**24


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: all singular values come near 1.

    x (n, rows, columns), any float dtype. Returned in bf16, which is enough for a direction; computed in the device's
    best format, since a GPU before Ampere or a CPU without instructions for bf16 would take several times as long.
    """
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    # The polynomials hold for singular values up to 1; the Frobenius norm bounds the largest. Small gradients are
    # nothing in fp16, so they are divided first.
    x = (x / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)).to(best_dtype(x.device))
    if x.dtype == torch.float32 and 2 * x.size(2) > 3 * x.size(1):
        x = _multiplier(x @ x.mT) @ x
    else:
        for a, b, c in _SAFE_POLYNOMIALS:
            gram = x @ x.mT  # (n, r, r)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).bfloat16()


def _multiplier(gram: Tensor) -> Tensor:
    """The matrix M for which M x is x after all polynomials, from x's Gram matrix x x^T alone; both (n, r, r), fp32.

    With it r x c matrices take 26 r^3 + 4 r^2 c operations instead of 8 r^3 + 16 r^2 c (Gram Newton-Schulz,
    tridao.me/blog/2026/gram-newton-schulz). In 16 bits it is not exact enough: the eigenvalues here are squares, and
    rounding makes small ones negative, which the polynomials let grow.
    """

    def factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
        """a + b gram + c gram^2, by which a polynomial multiplies its x."""
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    first, *others = _SAFE_POLYNOMIALS
    product = last = factor(gram, *first)
    for polynomial in others:
        gram = gram @ last @ last  # x's after that step: all of these commute
        last = factor(gram, *polynomial)
        product = product @ last
    return product


def orthogonalize_together(matrices: tuple[Tensor, ...], processes: int) -> Tensor:
    """orthogonalize of n matrices (rows, columns), the same in each process: each does its share and all get all."""
    if processes == 1:
        return orthogonalize(torch.stack(matrices))
    share = -(-len(matrices) // processes)
    first = dist.get_rank() * share
    part = matrices[first : first + share]  # of the last processes it may be shorter, or nothing
    ours = orthogonalize(torch.stack(part)) if part else None
    everyones = matrices[0].new_empty((processes * share, *matrices[0].shape), dtype=torch.bfloat16)
    if ours is not None:
        everyones[first : first + len(part)] = ours
    dist.all_gather_single(everyones, everyones[first : first + share])
    return everyones[: len(matrices)]


def orthogonalize_divided(
    parts: tuple[Tensor, ...], shape: torch.Size, rows: tuple[int, ...], mesh: DeviceMesh
) -> Tensor:
    """Directions for n weights of one shape, of which FSDP gives each process some rows: parts (our rows, columns).

    The processes trade their rows of all for all rows of some, orthogonalise each matrix in those, and trade back, so
    that none ever holds all (but on CPUs, where torch trades by gathering). rows: the matrices in a weight, as in Muon.
    Returns (n, our rows, columns) in bf16, as they are traded, each matrix times its output_scale.
    """
    from torch.distributed.tensor import DTensor, Shard  # half a second that only FSDP has to wait

    n, (height, width) = len(parts), shape
    stride = (height * width, width, 1)

    def trade(x: Tensor, held: Shard, wanted: Shard) -> Tensor:
        whole = DTensor.from_local(x, mesh, [held], shape=torch.Size((n, height, width)), stride=stride)
        return whole.redistribute(placements=[wanted]).to_local()

    stacked = parts[0].new_empty((n, *parts[0].shape), dtype=torch.bfloat16)
    torch.stack(parts, out=stacked)
    ours = trade(stacked, Shard(1), Shard(0))  # (our n, rows, columns)
    del stacked
    parts_of_ours = list(ours.split(rows, dim=1))
    for size in set(rows):
        alike = [i for i, n_rows in enumerate(rows) if n_rows == size]
        at_once = max(1, NUMBERS_AT_ONCE // max(1, len(ours) * size * width))
        for some in (alike[i : i + at_once] for i in range(0, len(alike), at_once)):
            directions = orthogonalize(torch.cat([parts_of_ours[i] for i in some])) * output_scale((size, width))
            for i, direction in zip(some, directions.split([len(ours)] * len(some)), strict=True):
                parts_of_ours[i] = direction
    return trade(torch.cat(parts_of_ours, dim=1), Shard(0), Shard(1))


def output_scale(shape: Sequence[int]) -> float:
    """A tall matrix of orthonormal columns has small rows; this gives its outputs the same scale."""
    return math.sqrt(max(1, shape[0] / shape[1]))


def _held(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it, but for FSDP."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    matrices: (weight, row counts): each run of so many rows of the weight is a matrix of its own, such as the
    queries, keys and values of one fused projection. Matrices of one shape are orthogonalised together, up to
    NUMBERS_AT_ONCE in each process; several share the work, with all of each weight in all of them or, under FSDP,
    some rows.
    lr: about the change of a matrix's output of unit scale per step. Decay is decoupled, per unit of lr.
    A step overwrites the gradients, which saves a copy of them all.
    processes: among which the work is divided.
    """

    def __init__(
        self, matrices: Iterable[tuple[Tensor, tuple[int, ...]]], lr: float, momentum: float, weight_decay: float
    ):
        weights, self._rows = zip(*matrices, strict=True)
        self.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        super().__init__(list(weights), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        with_grad = [(p, rows) for p, rows in zip(group["params"], self._rows, strict=True) if p.grad is not None]
        if not with_grad:
            return
        for p, _ in with_grad:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        mesh = getattr(with_grad[0][0], "device_mesh", None)  # FSDP: the processes that hold some rows of each weight
        weights = [_held(p) for p, _ in with_grad]
        gradients = [_held(p.grad) for p, _ in with_grad]
        averages = [_held(self.state[p]["momentum"]) for p, _ in with_grad]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(gradients, averages, group["momentum"])  # Nesterov: they look ahead from here on

        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[torch.Size, tuple[int, ...]], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for (p, rows), weight, update in zip(with_grad, weights, gradients, strict=True):
            if mesh:  # a process's rows need not end where a matrix does
                by_shape[p.shape, rows].append((weight, update))
            else:
                for part, direction in zip(weight.split(rows), update.split(rows), strict=True):
                    by_shape[part.shape, (len(part),)].append((part, direction))
        for (shape, rows), parts in by_shape.items():
            at_once = self.processes * max(1, NUMBERS_AT_ONCE // shape.numel())
            for some in (parts[i : i + at_once] for i in range(0, len(parts), at_once)):
                moved, updates = zip(*some, strict=True)
                if mesh:
                    directions, step = orthogonalize_divided(updates, shape, rows, mesh), -group["lr"]
                else:
                    directions = orthogonalize_together(updates, self.processes)
                    step = -group["lr"] * output_scale(shape)
                torch._foreach_copy_(updates, directions.unbind())  # in fp32, where the gradients were
                del directions  # or the next ones would be beside them
                torch._foreach_add_(moved, updates, alpha=step)


def build_optimizers(model: GPT, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; every group carries its `peak_lr`, and `lr` follows from lr_factor_at.

    muon: Muon on the block matrices; AdamW on embedding, head and norms with rates that shrink with the
    square root of the width, so that one setting serves models of every size. adamw: one AdamW on all.
    """
    fused = model.device.type in ("cuda", "cpu", "mps")
    matrices = model.block_matrices()
    if config.optimizer == "adamw":
        inside = {id(p) for p, _ in matrices}
        groups = [
            {"params": [p for p, _ in matrices], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if id(p) not in inside], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)
        optimizers: list[torch.optim.Optimizer] = [adamw]
    else:
        width = math.sqrt(768 / model.config.d_model)
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        groups = [{"params": [*norms, model.head.weight], "lr": config.head_lr * width, "betas": (0.8, 0.96)}]
        if not model.config.tie_embeddings:  # one matrix for both moves like the head
            embedding = {"params": [model.embedding.weight], "lr": config.embedding_lr * width, "betas": (0.8, 0.995)}
            groups.append(embedding)
        optimizers = [
            Muon(matrices, lr=config.lr, momentum=0.95, weight_decay=config.weight_decay),
            torch.optim.AdamW(groups, eps=1e-10, weight_decay=0.0, fused=fused),
        ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor_at(step: int, total_steps: int, warmup_steps: int, config: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of its peak.

    Linear warm-up, constant, then linear to final_lr_fraction over the last cooldown_fraction of the run
    (arXiv:2405.18392). After total_steps it stays there.
    """
    rising = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    cooldown_steps = config.cooldown_fraction * total_steps
    left = max(total_steps - step, 0)
    if left >= cooldown_steps:
        return rising
    return min(rising, config.final_lr_fraction + (1 - config.final_lr_fraction) * left / cooldown_steps)


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """lr = peak_lr x factor in every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
