"""The model: what may be seen, the cache, the counts. (That transformers computes the same: test_export.py.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, GPTConfig, TrainingConfig
from hardware import compile_for_training, peak_flops, why_not_compile
from model import (
    GPT,
    ROWS_OF_LOGITS,
    Block,
    BlockAttention,
    HeadLoss,
    KVCache,
    Packed,
    cross_entropy_,
    rotary_tables,
    rotate,
)
from optim import build_optimizers

Build = Callable[..., GPT]

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "one key head, narrow": {"n_kv_heads": 1, "head_dim": 8},
    "relu2": {"mlp": "relu2"},
    "tied": {"tie_embeddings": True},
    "without QK-norm": {"qk_norm": False},
}
every_shape = pytest.mark.parametrize("fields", SHAPES.values(), ids=list(SHAPES))


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_for(model: GPT, rows: int, length: int = 32) -> KVCache:
    return KVCache(model.config, rows, length, torch.device("cpu"), torch.float32)


# ---- what may be seen ----------------------------------------------------------------------


@every_shape
@torch.inference_mode()
def test_a_token_never_sees_the_future(tiny_model: Build, fields: dict[str, Any]):
    model = tiny_model(**fields)
    ids = random_ids(2, 12)
    before = model(ids)
    for t in range(12):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 128
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(dim=2).min() > 1e-4  # and everything later does see it


@torch.inference_mode()
def test_rows_of_a_batch_do_not_see_each_other(tiny_model: Build):
    model = tiny_model()
    ids = random_ids(3, 10)
    assert torch.allclose(model(ids)[1:2], model(ids[1:2]), atol=1e-5)


def test_a_context_longer_than_the_models_is_refused(tiny_model: Build):
    model = tiny_model()
    assert model(random_ids(1, 32)).shape == (1, 32, 128)
    with pytest.raises(ValueError, match="33 tokens exceed the model's context of 32"):
        model(random_ids(1, 33))
    cache = cache_for(model, 1)
    model(random_ids(1, 30), cache=cache)
    with pytest.raises(ValueError, match="33 tokens"):
        model(random_ids(1, 3), cache=cache)


# ---- the cache -----------------------------------------------------------------------------


@every_shape
@torch.inference_mode()
def test_token_by_token_with_the_cache_equals_one_pass(tiny_model: Build, fields: dict[str, Any]):
    model = tiny_model(**fields)
    ids = random_ids(3, 32)
    cache = cache_for(model, 3)
    steps = [model(ids[:, t : t + 1], cache=cache) for t in range(32)]
    assert torch.allclose(torch.cat(steps, dim=1), model(ids), atol=2e-5)
    assert cache.seen == 32


@every_shape
@pytest.mark.parametrize("chunks", [(5, 1, 7, 3), (1, 15), (16,), (2, 2, 1, 11)], ids=str)
@torch.inference_mode()
def test_reading_in_chunks_equals_one_pass(tiny_model: Build, fields: dict[str, Any], chunks: tuple[int, ...]):
    model = tiny_model(**fields)
    ids = random_ids(2, 16)
    cache = cache_for(model, 2, length=16)
    parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=2e-5)


@torch.inference_mode()
def test_one_prompt_is_read_once_for_several_continuations(tiny_model: Build):
    model = tiny_model(n_kv_heads=2)
    prompt, continuations = random_ids(1, 6), random_ids(3, 4, seed=1)
    cache = cache_for(model, 1)
    model(prompt, cache=cache)
    cache.repeat(3)
    whole = model(torch.cat((prompt.expand(3, -1), continuations), dim=1))
    assert torch.allclose(model(continuations, cache=cache), whole[:, 6:], atol=2e-5)


@torch.inference_mode()
def test_last_only_gives_the_last_positions_logits(tiny_model: Build):
    model, ids = tiny_model(), random_ids(2, 9)
    assert torch.allclose(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_texts_that_share_a_row_and_a_beginning_are_as_alone(
    tiny_model: Build, training: bool, activation_checkpointing: bool
):
    model, (a, b) = tiny_model(n_kv_heads=2), random_ids(2, 9)
    model.activation_checkpointing = activation_checkpointing
    whole, branch = model(torch.stack((a, b))), torch.cat((a[:4], b[4:]))  # the last begins as the first does
    ids = torch.cat((a, b[4:], b))[None]
    positions = torch.tensor([[*range(9), *range(4, 9), *range(9)]])
    text, part = torch.tensor([0] * 14 + [1] * 9), torch.tensor([0] * 4 + [1] * 5 + [2] * 5 + [0] * 9)
    sees = (text[:, None] == text) & ((part == 0) | (part[:, None] == part))
    at = torch.zeros(23, dtype=torch.long), torch.arange(23)
    with torch.set_grad_enabled(training):
        found = model(ids, packed=Packed(positions, sees.tril()[None, None], at))
    assert torch.allclose(found, torch.cat((whole[0], model(branch[None])[0, 4:], whole[1])), atol=2e-5)


# ---- the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_the_loss_of_a_fresh_model_is_ln_v(mlp: Any):
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=64, n_layers=2, n_heads=4, max_length=32, mlp=mlp).resolved(1000))
    ids = torch.randint(1000, (8, 32))
    loss = model(ids, targets=torch.randint(1000, (8, 32))).item() / ids.numel()
    assert loss == pytest.approx(math.log(model.config.vocab_size), abs=0.01)


def test_the_loss_is_the_sum_of_nats_of_the_targets_that_count(tiny_model: Build):
    model, ids, targets = tiny_model(), random_ids(2, 8), random_ids(2, 8, seed=1)
    nats = -F.log_softmax(model(ids), dim=2).gather(2, targets[..., None])[..., 0]
    masked = targets.clone()
    masked[0, 3:] = masked[1, ::2] = -1
    assert model(ids, targets).item() == pytest.approx(nats.sum().item(), rel=1e-5)
    assert model(ids, masked).item() == pytest.approx(nats[masked >= 0].sum().item(), rel=1e-5)
    assert model(ids, targets).dtype == torch.float32
    assert model(ids, targets).shape == ()


def test_targets_of_minus_one_pull_at_nothing(tiny_model: Build):
    model, ids = tiny_model(), random_ids(2, 8)
    loss = model(ids, torch.full_like(ids, -1))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("optimizer", "lr"), [("muon", 0.02), ("adamw", 6e-3)])
def test_one_batch_is_learned_by_heart(optimizer: Any, lr: float):
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=32, n_layers=2, n_heads=4, max_length=32).resolved(128))
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=lr))
    ids = random_ids(2, 17)
    for _ in range(50):
        loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss.item() < 0.1


# ---- the counts ----------------------------------------------------------------------------


@every_shape
def test_parameter_counts_are_the_built_models(tiny_model: Build, fields: dict[str, Any]):
    model = tiny_model(**fields)
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == sum(n for part, n in counts.items() if part != "total")
    assert counts["norms"] == sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counts["head"] == (0 if fields.get("tie_embeddings") else model.head.weight.numel())


def test_the_default_model_has_38_6_million_parameters():
    config = PRESETS["fineweb"]
    with torch.device("meta"):
        model = GPT(config.model.resolved(config.data.n_vocab))
    assert model.parameter_counts()["total"] == sum(p.numel() for p in model.parameters()) == 38_610_176


@every_shape
def test_flops_per_token_are_those_that_torch_counts(tiny_model: Build, fields: dict[str, Any]):
    """Torch counts what is multiplied, masked or not: T keys for each query (the math backend), or 3/4 T on average
    (BlockAttention). Ours has the (T + 1) / 2 that a causal query sees on average; the difference is
    2 products x 2 FLOPs x H K numbers for each of the other keys."""
    model, rows, T = tiny_model(**fields), 3, 32
    c = model.config
    of_a_key = 4 * c.n_layers * c.n_heads * c.head_dim
    ids = random_ids(rows, T)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    masked = of_a_key * (T - (T + 1) / 2)
    assert counter.get_total_flops() == rows * T * (model.flops_per_token(training=False) + masked)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    masked = of_a_key * (3 / 4 * T - (T + 1) / 2)
    assert counter.get_total_flops() == rows * T * (model.flops_per_token() + 3 * masked)


@every_shape
def test_block_matrices_are_all_matrices_of_the_blocks_cut_into_whole_rows(tiny_model: Build, fields: dict[str, Any]):
    model = tiny_model(**fields)
    matrices = model.block_matrices()
    inside = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert {id(p) for p, _ in matrices} == inside
    assert all(sum(rows) == p.size(0) for p, rows in matrices)


@pytest.mark.parametrize(("mlp", "up"), [("swiglu", (64, 64, 48) * 2), ("relu2", (64, 64, 48))])
def test_the_parts_of_an_mlp_never_mix_gate_and_up(mlp: Any, up: tuple[int, ...]):
    config = GPTConfig(d_model=96, n_layers=1, n_heads=2, n_kv_heads=1, max_length=8, d_ff=176, mlp=mlp).resolved(50)
    parts = [rows for _, rows in GPT(config).block_matrices()]
    assert parts == [(48,) * 4, (96,), up, (64, 32)]


# ---- rotary positions ----------------------------------------------------------------------


def test_rotating_keeps_norms():
    x = torch.randn(2, 32, 4, 16, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *rotary_tables(16, 32, 10_000.0))
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[:, 0], x[:, 0])  # position 0 turns nothing
    assert not torch.allclose(rotated[:, 1], x[:, 1])


def test_rotated_products_depend_only_on_the_distance():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)  # the same query and key at every position
    tables = rotary_tables(16, 32, 10_000.0)
    q, k = (rotate(x.expand(1, 32, 1, 16), *tables)[0, :, 0] for x in (q, k))
    products = q @ k.T  # (32 queries, 32 keys)
    for distance in range(-31, 32):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-5)
    assert products[0].std() > 0.1  # and on the distance they do depend


def test_the_tables_of_positions_are_not_saved(tiny_model: Build):
    assert not {"cos", "sin"} & set(tiny_model().state_dict())


@pytest.mark.parametrize("d_model", [64, 256, 768, 2048])
def test_a_fresh_tied_model_knows_nothing_either(d_model: int):
    c = GPTConfig(d_model=d_model, n_layers=1, n_heads=1, d_ff=64, tie_embeddings=True, max_length=16)
    torch.manual_seed(0)
    model = GPT(c.resolved(8192))
    ids = torch.randint(0, 8192, (8, 17))
    assert model(ids[:, :-1], ids[:, 1:]).item() / (8 * 16) == pytest.approx(math.log(8192), abs=0.1)


# ---- the training step's own kernels ---------------------------------------------------------


@pytest.mark.parametrize("length", [2, 7, 64])
def test_block_attention_is_causal_attention_with_the_same_gradients(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(2, 3, length, 8, dtype=torch.float32, generator=generator) for _ in range(4))
    results = []
    fused: Callable[..., Tensor] = partial(F.scaled_dot_product_attention, is_causal=True)
    for attention in (BlockAttention.apply, fused):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs)
        (y * weights).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def bytes_kept(model: nn.Module, ids: Tensor) -> int:
    """What a forward pass keeps for its backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(ids, ids)
    loss.backward()
    return sum(kept.values())


@pytest.mark.skipif(why_not_compile(torch.device("cpu")) is not None, reason="torch.compile does not work here")
def test_compiled_for_training_a_step_keeps_only_what_products_made() -> None:
    B, T, D, F, H, layers = 2, 64, 32, 96, 2, 2
    model = GPT(GPTConfig(d_model=D, n_layers=layers, n_heads=H, d_ff=F, max_length=T).resolved(128))
    block = model.blocks[0]
    assert isinstance(block, Block)
    torch.nn.init.normal_(block.attention.wo.weight)  # or no gradient reaches the queries
    ids = torch.randint(128, (B, T), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compile_for_training(model, torch.device("cpu"))
    kept = bytes_kept(model, ids)
    # A token's q, k, v; scores, their mean value; gate and up; and the two additions to the residual stream.
    products = B * T * layers * (3 * D + H * (T * 3 // 4) + D + 2 * F + 2 * D) * 4
    head = (3 * B * T + 128) * D * 4  # its norm's input and result, and the gradients that HeadLoss makes
    assert kept == pytest.approx(products + head, rel=0.05)

    compiled = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.compiler.set_stance("force_eager"):
        assert bytes_kept(model, ids) > 1.5 * kept
    torch._dynamo.reset()
    for name, p in model.named_parameters():
        torch.testing.assert_close(compiled[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(why_not_compile(torch.device("cpu")) is not None, reason="torch.compile does not work here")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_for_training_a_model_has_the_eager_ones_gradients_whatever_the_last_piece_of_its_head(
    checkpointing: bool,
) -> None:
    shape = GPTConfig(d_model=32, n_layers=3, n_heads=2, max_length=256).resolved(128)
    assert 5 * 256 % ROWS_OF_LOGITS
    ids = torch.randint(128, (5, 256), generator=torch.Generator().manual_seed(0))
    results, kept = [], []
    torch._dynamo.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GPT(shape)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        model.activation_checkpointing = checkpointing
        if compiled:
            compile_for_training(model, torch.device("cpu"))
        kept.append(bytes_kept(model, ids))
        results.append({name: p.grad for name, p in model.named_parameters()})
    torch._dynamo.reset()
    for name, gradient in results[0].items():
        ours = results[1][name]
        assert gradient is not None
        assert ours is not None
        assert (ours - gradient).norm() < 1e-4 * gradient.norm(), name
    if checkpointing:  # of a block its input, as in eager code; of the last norm only its input, too
        assert kept[1] == pytest.approx(kept[0] - 4 * ids.numel() * shape.d_model, rel=0.02)


@pytest.mark.parametrize("rows", [1, 5, 2500])
def test_head_loss_is_cross_entropy_with_the_same_gradients_whatever_the_number_of_pieces(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(-1, 50, (rows,), generator=generator)  # -1: does not count
    results = []
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = (
            HeadLoss.apply(a, b, targets, cross_entropy_)
            if ours
            else F.cross_entropy(a @ b.T, targets, ignore_index=-1, reduction="sum")
        )
        (loss * 0.1).backward()
        results.append([loss.detach(), a.grad, b.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_heads_gradients_can_be_taken_once() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = HeadLoss.apply(x, weight, torch.arange(5), cross_entropy_)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    once = weight.grad.clone()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()
    assert torch.equal(weight.grad, once)


def test_training_never_holds_the_logits_of_all_rows() -> None:

    rows, n_vocab = 4 * ROWS_OF_LOGITS, 512
    model = GPT(GPTConfig(d_model=16, n_layers=1, n_heads=2, max_length=256).resolved(n_vocab))
    ids = torch.zeros(rows // 256, 256, dtype=torch.long)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        model(ids, ids).backward()
    assert ROWS_OF_LOGITS * n_vocab <= largest < rows * n_vocab


def test_a_cache_gives_the_same_logits_with_gradients_on(tiny_model: Build) -> None:
    model, ids = tiny_model(), random_ids(1, 12)
    cache = KVCache(model.config, 1, 12, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        whole = model(ids)
    first = model(ids[:, :5], cache=cache).detach()
    cache.keys, cache.values = cache.keys.detach(), cache.values.detach()
    second = model(ids[:, 5:], cache=cache)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA A10G", 70), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None), ("NVIDIA T400", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_that_of_its_own_name(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == (tflops * 1e12 if tflops else None)


@pytest.mark.parametrize("fields", [{}, {"mlp": "relu2"}, {"tie_embeddings": True, "n_kv_heads": 2}], ids=repr)
def test_activation_checkpointing_changes_the_memory_and_not_a_bit_of_the_gradients(
    tiny_model: Build, fields: dict[str, Any]
) -> None:
    model, ids = tiny_model(**fields), random_ids(3, 30)
    gradients, kept = [], []
    for again in (False, True):
        model.activation_checkpointing = again
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            nats = model(ids, ids)
        nats.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.8 * kept[0]
