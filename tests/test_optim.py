"""Muon, the parameter groups and the learning-rate schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import optim
from config import TrainingConfig
from model import GPT
from optim import Muon, build_optimizers, lr_factor_at, orthogonalize, set_learning_rates

Build = Callable[..., GPT]
Matrices = list[tuple[Tensor, tuple[int, ...]]]


def with_singular_values(n: int, rows: int, columns: int, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, v with orthonormal columns, and u diag(s) v^T for s from 1 down to `smallest`; n of each."""
    generator, k = torch.Generator().manual_seed(0), min(rows, columns)
    u = torch.linalg.qr(torch.randn(n, rows, k, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(n, columns, k, generator=generator))[0]
    return u, v, (u * torch.logspace(0, math.log10(smallest), k)) @ v.mT


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(value: Tensor, gradient: Tensor) -> Tensor:
    weight = torch.nn.Parameter(value.clone())
    weight.grad = gradient.clone()
    return weight


# ---- orthogonalize -------------------------------------------------------------------------


def assert_near_one(values: Tensor, before: Tensor) -> None:
    """Singular values after orthogonalize and before, (n, r): near 1, but that a tiny share of the norm only grows."""
    share = before / before.norm(dim=1, keepdim=True)
    assert (values > 0.85 * (share / 0.005).clamp(max=1)).all()
    assert values.max() < 1.15


def test_each_polynomial_brings_its_interval_as_near_to_one_as_an_odd_one_of_degree_five_can():
    """It deviates by as much below 1 as above, at both ends and both extrema between them (Chebyshev)."""
    low, high = 0.005, 1.0
    for a, b, c in optim._POLYNOMIALS:

        def p(x: float, a: float = a, b: float = b, c: float = c) -> float:
            return a * x + b * x**3 + c * x**5

        root = math.sqrt(9 * b * b - 20 * a * c)
        highest, lowest = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        assert p(low) + p(high) == pytest.approx(2, abs=1e-9)
        assert p(highest) == pytest.approx(p(high), abs=1e-9)
        # As the paper has it, no wider than from 0.024 of the upper end, below which it only grows.
        assert p(lowest) == pytest.approx(p(max(low, 0.02407327424182761 * high)), abs=1e-9)
        low, high = p(low), p(high)
    assert 0.9 < low < high < 1.1


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("smallest", [0.5, 0.03, 0.01])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 64), (2, 64, 16), (1, 128, 128), (1, 1, 64), (1, 64, 1)], ids=str)
def test_orthogonalize_brings_all_singular_values_near_one(shape: tuple[int, int, int], smallest: float, scale: float):
    _, _, x = with_singular_values(*shape, smallest)
    assert_near_one(torch.linalg.svdvals(orthogonalize(scale * x).float()), torch.linalg.svdvals(x))


@pytest.mark.parametrize("shape", [(2, 16, 48), (2, 48, 16)], ids=str)
def test_orthogonalize_keeps_the_singular_vectors(shape: tuple[int, int, int]):
    u, v, x = with_singular_values(*shape, smallest=0.1)
    core = u.mT @ orthogonalize(x).float() @ v  # diagonal, if the vectors are kept
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 0.05


def test_orthogonalizing_a_batch_equals_one_by_one():
    x = random(5, 24, 40)
    single = torch.cat([orthogonalize(matrix[None]) for matrix in x])
    assert torch.allclose(orthogonalize(x).float(), single.float(), atol=0.02)  # bf16


def test_orthogonalizing_zeros_gives_zeros():
    assert not orthogonalize(torch.zeros(2, 4, 8)).any()


SPECTRA = {
    "random": torch.logspace(0, -1, 48),
    "steep": torch.logspace(0, -8, 48),
    "one direction": torch.tensor([1.0] + 47 * [0.0]),
    "one direction and little else": torch.tensor([1.0] + 47 * [1e-3]),
    "half of them": torch.tensor(24 * [1.0] + 24 * [0.0]),
}


@pytest.mark.parametrize("shape", [(48, 48), (48, 64), (48, 80), (256, 48), (48, 1024)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_in_fp32_orthogonalize_gives_the_polynomials_of_the_singular_values(
    monkeypatch: pytest.MonkeyPatch, spectrum: str, shape: tuple[int, int]
):
    monkeypatch.setattr(optim, "best_dtype", lambda device: torch.float32)
    u, v, _ = with_singular_values(1, *shape, 0.1)
    u, v, values = u.double(), v.double(), SPECTRA[spectrum].double()
    expected = values / values.norm() / 1.01
    for a, b, c in optim._SAFE_POLYNOMIALS:
        expected = a * expected + b * expected**3 + c * expected**5
    error = orthogonalize(((u * values) @ v.mT).float()).double() - (u * expected) @ v.mT
    assert torch.linalg.matrix_norm(error, 2).item() < 0.02  # a bf16 of 1 is within 0.004


@pytest.mark.parametrize(("columns", "share"), [(48, 1.0), (72, 1.0), (96, 34 / 40), (480, 66 / 168)])
def test_in_fp32_a_matrix_much_longer_than_wide_takes_fewer_operations(
    monkeypatch: pytest.MonkeyPatch, columns: int, share: float
):
    monkeypatch.setattr(optim, "best_dtype", lambda device: torch.float32)
    for x in (random(2, 48, columns), random(2, columns, 48)):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(x)
        assert counter.get_total_flops() == pytest.approx(share * 2 * (16 * 48**2 * columns + 8 * 48**3), rel=1e-6)


# ---- Muon ----------------------------------------------------------------------------------


def run_muon(matrices: Matrices, gradients: list[list[Tensor]]) -> None:
    optimizer = Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.5)
    for step in gradients:
        for (weight, _), gradient in zip(matrices, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("rows", [(16, 16, 16), (16, 8, 8), (40, 40)], ids=str)
def test_muon_treats_fused_matrices_as_separate_ones(rows: tuple[int, ...]):
    start, gradients = random(sum(rows), 24), [random(sum(rows), 24, seed=s) for s in (1, 2, 3)]
    fused = torch.nn.Parameter(start.clone())
    split: list[Tensor] = [torch.nn.Parameter(part.clone()) for part in start.split(rows)]
    run_muon([(fused, rows)], [[g] for g in gradients])
    run_muon([(p, (p.size(0),)) for p in split], [list(g.split(rows)) for g in gradients])
    assert torch.allclose(fused, torch.cat(split), atol=2e-3)
    whole = torch.nn.Parameter(start.clone())
    run_muon([(whole, (sum(rows),))], [[g] for g in gradients])
    assert (whole - fused).abs().max() > 0.02  # as one matrix it would be another step


@pytest.mark.parametrize("at_once", [2**24, 3 * 24 * 16, 1])
def test_muon_moves_matrices_of_one_shape_together_as_it_moves_each_alone(
    monkeypatch: pytest.MonkeyPatch, at_once: int
):
    monkeypatch.setattr(optim, "NUMBERS_AT_ONCE", at_once)  # four, three and one, or one at a time
    starts, gradients = random(4, 24, 16), random(4, 24, 16, seed=1)
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    run_muon([(p, (24,)) for p in together], [list(gradients)])
    for start, gradient, moved in zip(starts, gradients, together, strict=True):
        alone = torch.nn.Parameter(start.clone())
        run_muon([(alone, (24,))], [[gradient]])
        assert torch.allclose(alone, moved, atol=2e-3)


@pytest.mark.parametrize(("shape", "scale"), [((16, 64), 1.0), ((64, 16), 2.0), ((32, 32), 1.0)], ids=str)
def test_a_step_of_muon_has_size_lr_whatever_the_gradients_scale(shape: tuple[int, int], scale: float):
    _, _, gradient = with_singular_values(1, *shape, smallest=0.1)
    for factor in (1e-4, 1.0, 1e3):
        weight = weight_of(torch.zeros(shape), factor * gradient[0])
        Muon([(weight, (shape[0],))], lr=0.02, momentum=0.95, weight_decay=0.1).step()
        values = torch.linalg.svdvals(weight.detach()) / (0.02 * scale)  # tall: sqrt(rows / columns) larger
        assert 0.7 < values.min() <= values.max() < 1.3
        assert (weight.detach() * gradient[0]).sum() < 0  # downhill


def muon_step(rank: int, world_size: int, folder: str, at_once: int) -> None:
    """One step on matrices of two shapes, three and one of each; rank 0 saves the weights and counts its products."""
    torch.set_num_threads(1)
    optim.NUMBERS_AT_ONCE = at_once  # in a process of its own, or as it is
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=generator).requires_grad_() for rows in (96, 16)]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    muon = Muon([(weights[0], (32, 32, 32)), (weights[1], (16,))], lr=0.1, momentum=0.9, weight_decay=0.1)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    torch.save(
        [w.detach() for w in weights] + [torch.tensor(counter.get_total_flops())], f"{folder}/{world_size}-{rank}"
    )
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("at_once", [optim.NUMBERS_AT_ONCE, 1], ids=["all", "two"])
def test_two_processes_share_the_orthogonalisation_and_get_what_one_gets(tmp_path: Path, at_once: int):
    muon_step(0, 1, str(tmp_path), optim.NUMBERS_AT_ONCE)
    torch.multiprocessing.spawn(muon_step, (2, str(tmp_path), at_once), nprocs=2)
    alone, first, second = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for ours, theirs, whole in zip(first[:2], second[:2], alone[:2], strict=True):
        assert torch.equal(ours, theirs)  # the processes must never drift apart
        torch.testing.assert_close(ours, whole, rtol=1e-2, atol=2e-3)  # bf16, in batches of another size
    assert max(first[2], second[2]) < 0.8 * alone[2]


def divided_muon_steps(rank: int, world_size: int, folder: str) -> None:
    """Two steps on three of each kind of weight, alone or with some rows of each in each process, two weights at a
    time; the whole weights after."""
    torch.set_num_threads(1)
    if world_size > 1:
        optim.NUMBERS_AT_ONCE = 1
    generator = torch.Generator().manual_seed(0)
    rows = [(32, 32, 32), (17,), (1,), (32, 8, 32, 8), (64, 64)] * 3  # some end within a matrix, are unequal, or empty
    weights: Sequence[Tensor] = [torch.randn(sum(r), 32, generator=generator) for r in rows]
    gradients: Sequence[Tensor] = [torch.randn(w.shape, generator=generator) for w in weights]
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
        mesh = init_device_mesh("cpu", (world_size,))
        weights, gradients = ([distribute_tensor(x, mesh, [Shard(0)]) for x in xs] for xs in (weights, gradients))
    muon = Muon(list(zip(weights, rows, strict=True)), lr=0.1, momentum=0.9, weight_decay=0.1)
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.requires_grad_().grad = gradient.clone()  # a step overwrites it
            muon.step()
    momenta = [muon.state[w]["momentum"] for w in weights]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in (*weights, *momenta)]
    held = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in momenta)
    torch.save(([x.detach() for x in whole], held, counter.get_total_flops()), f"{folder}/{world_size}-{rank}")
    if world_size > 1:
        dist.destroy_process_group()


def test_two_processes_with_some_rows_of_each_weight_get_what_one_with_all_gets(tmp_path: Path):
    divided_muon_steps(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(divided_muon_steps, (2, str(tmp_path)), nprocs=2)
    alone, first, second = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for ours, theirs, whole in zip(first[0], second[0], alone[0], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, whole, rtol=1e-2, atol=4e-3)  # bf16, in batches of another size
    assert first[1] + second[1] == alone[1]  # no number of the momentum is held twice
    assert first[2] + second[2] == alone[2]  # nothing twice; of three weights one process has two
    assert max(first[2], second[2]) < 0.7 * alone[2]


def test_muons_decay_is_decoupled_and_per_unit_of_lr():
    weight = weight_of(torch.ones(8, 8), torch.zeros(8, 8))
    Muon([(weight, (8,))], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((8, 8), 0.95))


# ---- the groups ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"mlp": "relu2", "n_kv_heads": 2}], ids=str)
def test_every_parameter_is_in_exactly_one_group(tiny_model: Build, fields: dict[str, Any], optimizer: Any):
    model = tiny_model(**fields)
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=1e-3))
    owned = [id(p) for each in optimizers for group in each.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_adamw_is_one_optimizer_with_one_rate_that_decays_only_the_matrices_of_the_blocks(tiny_model: Build):
    model = tiny_model()
    (optimizer,) = build_optimizers(model, TrainingConfig(optimizer="adamw", lr=1e-3, weight_decay=0.2))
    assert isinstance(optimizer, torch.optim.AdamW)
    matrices = {id(p) for p, _ in model.block_matrices()}
    for group in optimizer.param_groups:
        assert group["lr"] == group["peak_lr"] == 1e-3
        assert all(group["weight_decay"] == (0.2 if id(p) in matrices else 0) for p in group["params"])


def test_with_muon_the_other_rates_shrink_with_the_square_root_of_the_width(tiny_model: Build):
    config = TrainingConfig(lr=0.02, embedding_lr=0.3, head_lr=0.008)
    model = tiny_model(d_model=192)  # 768 / 4, so twice the rates
    muon, adamw = build_optimizers(model, config)
    assert isinstance(muon, Muon)
    assert [group["peak_lr"] for group in muon.param_groups] == [0.02]
    rates = {id(p): group["peak_lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.embedding.weight)] == pytest.approx(0.6)
    assert rates[id(model.head.weight)] == rates[id(model.final_norm.weight)] == pytest.approx(0.016)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_parameters_without_a_gradient_stay_where_they_are(tiny_model: Build, optimizer: Any):
    model = tiny_model()
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=1e-3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in optimizers:
        each.step()  # no parameter has one
    used = {"blocks.0.attention.wo.weight", "head.weight"}
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if name in used else None
    for each in optimizers:
        each.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == used


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_gradient_of_zero_moves_nothing_and_breaks_nothing(tiny_model: Build, optimizer: Any):
    model = tiny_model()
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=1e-3, weight_decay=0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for each in optimizers:
        each.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- the schedule --------------------------------------------------------------------------


def schedule(total: int, warmup: int, **fields: Any) -> list[float]:
    return [lr_factor_at(step, total, warmup, TrainingConfig(**fields)) for step in range(total + 1)]


def test_the_rate_warms_up_linearly_stays_and_falls_linearly():
    factors = schedule(100, 10, cooldown_fraction=0.5, final_lr_fraction=0.1)
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:51] == [1.0] * 41
    assert factors[51:] == pytest.approx([1 - 0.9 * step / 50 for step in range(1, 51)])
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize("total", [1, 2, 20, 333])
@pytest.mark.parametrize("warmup", [0, 1, 19])
@pytest.mark.parametrize("cooldown", [0.0, 0.3, 0.65, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
def test_the_rate_is_always_above_zero_and_never_above_its_peak(total: int, warmup: int, cooldown: float, final: float):
    factors = schedule(total, min(warmup, total - 1), cooldown_fraction=cooldown, final_lr_fraction=final)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    assert factors[-1] == pytest.approx(final if cooldown else 1)


@pytest.mark.parametrize("final", [0.0, 0.05])
def test_after_the_end_the_rate_stays(final: float):
    config = TrainingConfig(final_lr_fraction=final)
    assert [lr_factor_at(step, 50, 5, config) for step in (50, 51, 1000)] == pytest.approx([final] * 3)


def test_set_learning_rates_scales_every_groups_peak(tiny_model: Build):
    optimizers = build_optimizers(tiny_model(), TrainingConfig())
    groups = [group for each in optimizers for group in each.param_groups]
    peaks = [group["peak_lr"] for group in groups]
    assert len(set(peaks)) == 3
    for factor in (0.5, 1.0, 0.25):  # each from the peak, not from the rate before
        set_learning_rates(optimizers, factor)
        assert [group["lr"] for group in groups] == [factor * peak for peak in peaks]
    assert [group["peak_lr"] for group in groups] == peaks


def test_a_warm_up_that_reaches_into_the_cool_down_does_not_jump():
    factors = [lr_factor_at(step, 100, 60, TrainingConfig(cooldown_fraction=0.65)) for step in range(100)]
    assert max(abs(a - b) for a, b in itertools.pairwise(factors)) < 0.05
