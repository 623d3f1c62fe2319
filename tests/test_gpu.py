"""What a GPU would be given to do, checked without one: the model and the optimizers are traced on a fake card.

A fake tensor has a device, a shape and a dtype, and no numbers; torch's own dispatcher and autocast decide what is
called on it, as on a real card. What this cannot show is speed, the backward pass (autograd asks the card for its
streams) and what the card's kernels compute: docs/gpu.md lists it, and bench/gpu.py measures it.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import optim
from checkpoint import gather_tensors, save_checkpoint
from config import PRESETS, Config, DataConfig, GPTConfig, TrainingConfig
from decoding import DecodeStep
from errors import ConfigError
from hardware import PEAK_TFLOPS, allow_tf32, best_dtype, choose_precision, default_device, peak_flops, why_not_compile
from model import (
    ENTRIES_AT_ONCE,
    GPT,
    ROWS_OF_LOGITS,
    ROWS_OF_LOGITS_ON_CUDA,
    BlockAttention,
    HeadLoss,
    KVCache,
    cross_entropy_,
)
from optim import build_optimizers, orthogonalize
from runtime import to_device
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.addmv"}
SHAPES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "relu2": {"mlp": "relu2"},
    "tied": {"tie_embeddings": True},
    "grouped": {"n_kv_heads": 2},
}
every_shape = pytest.mark.parametrize("fields", SHAPES.values(), ids=list(SHAPES))
every_format = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


# ---- a fake card -----------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuda as a device of fake tensors, with the capability of an A100."""
    set_capability(monkeypatch, (8, 0))
    with contextlib.ExitStack() as stack:
        if not torch.backends.cuda.is_built():
            stack.enter_context(no_op_device_guard())
        stack.enter_context(FakeTensorMode())
        yield


@contextlib.contextmanager
def no_op_device_guard() -> Iterator[None]:
    """Indexing a tensor first makes its device the current one, and a torch built for CPUs has nothing that could do
    this for cuda: lend it what it has for the device "meta", which does nothing."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.exists():
        pytest.skip("libc10.so is not there")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(
        ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before, guards[cuda] = guards[cuda], guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which without a card does nothing."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def model_on_card(config: GPTConfig, n_vocab: int = 50257, dtype: torch.dtype = torch.float32) -> GPT:
    with torch.device("meta"):
        model = GPT(config.resolved(n_vocab))
    moved: dict[int, nn.Parameter] = {}  # by identity, so that a tied weight stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(torch.empty(parameter.shape, device="cuda", dtype=dtype))
                module._parameters[name] = moved.setdefault(id(parameter), fake)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, device="cuda") if buffer is not None else None
    return model


class Watch(TorchDispatchMode):
    """Notes the operations on the card, as (name, dtype, shape) of their results; fails if data leaves the card."""

    def __init__(self) -> None:
        super().__init__()
        self.results: Counter[tuple[str, torch.dtype, tuple[int, ...]]] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        name = str(func.overloadpacket)
        self.names[name] += 1
        for x in outputs:
            assert x.device.type == "cuda" or not any(i.device.type == "cuda" for i in inputs), (
                f"{name} leaves the card"
            )
            self.results[name, x.dtype, tuple(x.shape)] += 1
        if name in PRODUCTS:
            assert len({x.dtype for x in (*inputs, *outputs)}) == 1
        return result

    def dtypes(self, names: set[str]) -> set[torch.dtype]:
        return {dtype for name, dtype, _ in self.results if name in names}


class Calls(TorchFunctionMode):
    """Notes the calls of torch's functions with the dtypes of their results, after autocast; attention only by name,
    since on a fake card it would be the plain products that no card is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: list[dict[str, Any]] = []
        self.wide: Counter[str] = Counter()  # functions with a large fp32 result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            self.attention.append({"q": q, "k": k, "v": v, **(kwargs or {})})
            return torch.empty_like(q)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.dim() >= 3:
            self.wide[func.__name__] += 1
        return result


def set_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "a card") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    properties = SimpleNamespace(name=name, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


def test_the_watch_notices_what_would_wait_for_the_card(card: None):
    x = torch.ones(3, device="cuda")
    with pytest.raises(AssertionError, match="leaves the card"), Watch():
        x.cpu()
    for wait in (lambda: x.sum().item(), lambda: float(x[0]), lambda: bool(x.any()), lambda: x.tolist()):
        with pytest.raises(DataDependentOutputException), Watch():
            wait()


# ---- the model on the card ---------------------------------------------------------------------


@every_format
@every_shape
def test_a_step_is_made_of_products_in_its_format_and_nothing_in_it_waits_for_the_card(
    card: None, fields: dict[str, Any], dtype: torch.dtype
):
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8, **fields))
    ids = torch.empty(2, 1024, dtype=torch.int64, device="cuda")
    with autocast(dtype), Calls(), Watch() as watch:
        loss = model(ids, ids)
    assert watch.dtypes(PRODUCTS) == {dtype}
    pieces = math.ceil(2048 / (ROWS_OF_LOGITS_ON_CUDA if dtype == torch.bfloat16 else ROWS_OF_LOGITS))
    in_a_piece = 2 + math.ceil(model.config.vocab_size / ENTRIES_AT_ONCE)  # logits, gradients of their rows and entries
    products = sum(n for (name, *_), n in watch.results.items() if name in PRODUCTS)
    assert products == 2 * 4 + pieces * in_a_piece
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())


@every_shape
def test_in_bf16_nothing_between_the_products_is_fp32(card: None, fields: dict[str, Any]):
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8, **fields))
    ids = torch.empty(2, 1024, dtype=torch.int64, device="cuda")
    with autocast(torch.bfloat16), Calls() as calls:
        model(ids, ids)
    assert set(calls.wide) <= {"embedding", "unsqueeze", "__getitem__"}, calls.wide  # the weights' own, before the cast
    assert calls.wide["embedding"] == 1


def test_in_fp16_the_residual_stream_is_fp32_since_its_sums_may_pass_65504(card: None):
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8))
    ids = torch.empty(2, 1024, dtype=torch.int64, device="cuda")
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with autocast(torch.float16), Calls() as calls:
        model(ids, ids)
    assert inputs == [torch.float32] * 2
    assert {call["q"].dtype for call in calls.attention} == {torch.float16}


@pytest.mark.parametrize("preset", ["fineweb", "gpt2"])
def test_the_logits_of_a_presets_micro_batch_are_never_whole(card: None, preset: str):
    config = PRESETS[preset]
    model = model_on_card(config.model)
    rows, V = config.train.batch_size * config.model.max_length, model.config.vocab_size
    ids = torch.empty(config.train.batch_size, config.model.max_length, dtype=torch.int64, device="cuda")
    with autocast(torch.bfloat16), Calls(), Watch() as watch:
        model(ids, ids)
    logits = Counter({key: n for key, n in watch.results.items() if key[0] == "aten.mm" and key[2][1] == V})
    # A few pieces, each with enough rows that the products with their gradients fill the card.
    assert logits == {("aten.mm", torch.bfloat16, (ROWS_OF_LOGITS_ON_CUDA, V)): 8}
    assert max(math.prod(shape) for _, _, shape in watch.results) < rows * V


@every_format
@every_shape
def test_attention_on_a_card_is_torchs_fused_kernel(
    card: None, fields: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(BlockAttention, "apply", lambda *_: pytest.fail("BlockAttention is for CPUs"))
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8, **fields))
    ids = torch.empty(2, 256, dtype=torch.int64, device="cuda")
    with autocast(dtype), Calls() as calls:
        model(ids, ids)
    assert len(calls.attention) == 2
    for call in calls.attention:
        assert call["is_causal"]
        assert call["attn_mask"] is None  # flash attention takes none
        shared = "n_kv_heads" in fields and dtype == torch.bfloat16  # that takes flash attention, from Ampere on
        assert call["enable_gqa"] == shared
        for x, heads in ((call["q"], 8), (call["k"], 2 if shared else 8), (call["v"], 2 if shared else 8)):
            assert (x.shape, x.dtype, x.stride(3)) == ((2, heads, 256, 32), dtype, 1)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_flash_attention_takes_the_heads_of_every_preset(preset: str):
    head_dim = PRESETS[preset].model.resolved(50257).head_dim
    assert head_dim % 8 == 0
    assert head_dim <= 256


@torch.no_grad()
def test_decoding_on_a_card_waits_for_nothing_inside_the_model(card: None):
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8, n_kv_heads=2), dtype=torch.bfloat16)
    cache, decode = KVCache(model.config, 3, 64, CUDA, torch.bfloat16), DecodeStep(model)
    with Calls(), Watch() as watch:
        model(torch.empty(3, 16, dtype=torch.int64, device="cuda"), cache=cache, last_only=True)
        for _ in range(2):
            assert decode(torch.empty(3, dtype=torch.int64, device="cuda"), cache).shape == (3, 50304)
        model(torch.empty(3, 4, dtype=torch.int64, device="cuda"), cache=cache, last_only=True)
    assert cache.seen == 22
    assert watch.dtypes(PRODUCTS) == {torch.bfloat16}


def test_validation_on_a_card_is_in_bf16_too(card: None):
    model = model_on_card(GPTConfig(d_model=256, n_layers=2, n_heads=8, mlp="relu2"))
    with autocast(torch.bfloat16), torch.no_grad(), Calls(), Watch() as watch:
        logits = model(torch.empty(2, 64, dtype=torch.int64, device="cuda"))
    assert logits.dtype == torch.bfloat16
    assert watch.dtypes(PRODUCTS) == {torch.bfloat16}


# ---- the optimizers on the card ------------------------------------------------------------------


def with_gradients(model: GPT) -> GPT:
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    return model


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@every_shape
def test_an_update_never_waits_for_the_card_and_adamw_is_fused(card: None, fields: dict[str, Any], optimizer: Any):
    model = with_gradients(model_on_card(GPTConfig(d_model=128, n_layers=3, n_heads=4, **fields), 1000))
    optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=1e-3))
    for _ in range(2):  # the first one makes the state
        with Watch() as watch:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                each.step()
    groups = [g for each in optimizers if isinstance(each, torch.optim.AdamW) for g in each.param_groups]
    assert watch.names["aten._fused_adamw_"] == len(groups)  # one launch for all weights of a group
    assert watch.dtypes(PRODUCTS) == ({torch.bfloat16} if optimizer == "muon" else set())


def test_muon_multiplies_matrices_of_one_shape_together(card: None):
    few, many = (with_gradients(model_on_card(GPTConfig(d_model=128, n_layers=n, n_heads=4), 1000)) for n in (2, 12))
    counts = []
    for model in (few, many):
        muon, _ = build_optimizers(model, TrainingConfig())
        with Watch() as watch:
            muon.step()
        counts.append(sum(watch.names[name] for name in PRODUCTS))
    assert counts[0] == counts[1] == 4 * 12  # four shapes, four polynomials of three products


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_muon_multiplies_in_fp16_before_ampere_where_bf16_is_emulated(
    card: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
):
    set_capability(monkeypatch, capability)
    with Watch() as watch:
        assert orthogonalize(torch.empty(2, 64, 32, device="cuda")).dtype == torch.bfloat16
    assert watch.dtypes(PRODUCTS) == {dtype}


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 256, 256)], ids=str)
def test_orthogonalising_in_other_formats_brings_singular_values_near_one_as_well(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype, scale: float
):
    monkeypatch.setattr(optim, "best_dtype", lambda device: dtype)
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    before = torch.logspace(0, -1.5, u.size(2))
    values = torch.linalg.svdvals(orthogonalize(scale * (u * before) @ v).float())
    small = scale < 1e-7  # what adds nothing to a weight may stay small, but never becomes NaN or large
    assert values.min() >= 0 if small else values.min() > 0.7
    assert values.max() < 1.15


# ---- fp16 -----------------------------------------------------------------------------------------


def head_gradients(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = HeadLoss.apply(x, weight, targets, cross_entropy_)
    (loss * scale).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad.float() / scale, weight.grad.float() / scale


@pytest.mark.parametrize("scale", [2.0**-8, 1.0, 2.0**12])  # 65,536 / tokens of a step, and what it may grow to
def test_the_heads_gradient_in_fp16_is_that_of_fp32(monkeypatch: pytest.MonkeyPatch, scale: float):
    monkeypatch.setattr("model.ENTRIES_AT_ONCE", 800)  # six times, and 200 at last
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 64, generator=generator)
    weight = 0.3 * torch.randn(5000, 64, generator=generator)
    targets = torch.randint(-1, 5000, (2500,), generator=generator)
    half = head_gradients(x.half(), weight, targets, scale)
    full = head_gradients(x.half().float(), weight.half().float(), targets, scale)
    for ours, theirs in zip(half, full, strict=True):
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize("d_model", [256, 768, 2048])
def test_the_heads_gradient_in_fp16_is_finite_if_all_rows_are_one_token_that_nobody_expected(d_model: int):
    """The sum over a piece's rows is at its largest: each adds a normed channel of sqrt(D), all of the same sign."""
    x = torch.zeros(2 * ROWS_OF_LOGITS, d_model).half()
    x[:, 3] = d_model**0.5
    weight = torch.zeros(128, d_model)
    weight[5, 3] = -1  # the target's logit is far under the others
    targets = torch.full((2 * ROWS_OF_LOGITS,), 5)
    loss, grad_x, grad_weight = head_gradients(x, weight, targets, 1.0)
    assert loss.isfinite()
    assert grad_x.isfinite().all()
    assert grad_weight[5, 3].item() == pytest.approx(-2 * ROWS_OF_LOGITS * d_model**0.5, rel=1e-2)


# accelerate and choose_precision allow fp16 on GPUs only; torch's CPU computes in it as well.
FP16_ON_A_CPU = """
import sys
import accelerate, torch
import hardware, train

class Accelerator(accelerate.Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings | {"mixed_precision": "fp16"})
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=float(sys.argv[1]))

accelerate.Accelerator = Accelerator
hardware.choose_precision = lambda device, wanted: "fp16"
raise SystemExit(train.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[float], Path]]:
    """A run of the preset smoke: losses of its steps, folder of its last checkpoint. scale: in fp16, with this one."""
    folder, cache = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache")

    def run(name: str, steps: int, scale: float = 0) -> tuple[list[float], Path]:
        start = ["-c", FP16_ON_A_CPU, str(scale)] if scale else ["train.py", "--train.precision", "fp32"]
        options = f"--preset smoke --train.no_compile --train.run_name {name} --train.max_steps {steps}"
        options += f" --train.warmup_tokens 0 --data.cache_dir {cache} --train.out_dir {folder}"
        done = subprocess.run(
            [sys.executable, *start, *options.split()], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [r["loss"] for r in records if r["kind"] == "train"], folder / name / f"step-{steps:08d}"

    return run


def test_a_run_in_fp16_learns_like_one_in_fp32(smoke: Callable[..., tuple[list[float], Path]]):
    half, half_end = smoke("half", 8, 65536)
    full, full_end = smoke("full", 8)
    assert half == pytest.approx(full, rel=5e-3)
    assert full[-1] < full[0] - 0.5
    # The scale is out of the gradients of both optimizers: Adam's weights would hide it, its averages do not.
    for name, state in load_file(half_end / "optimizer.safetensors").items():
        if name.endswith(("momentum", "exp_avg_sq")):
            theirs = load_file(full_end / "optimizer.safetensors")[name]
            assert state.norm().item() == pytest.approx(theirs.norm().item(), rel=0.2), name


def test_a_step_whose_gradients_overflow_is_left_out_by_all_optimizers(
    smoke: Callable[..., tuple[list[float], Path]],
):
    from checkpoint import load_model

    steps = 3
    losses, end = smoke("overflow", steps, 2.0**40)  # far too large, and halved only three times
    assert losses == pytest.approx([math.log(512)] * steps, abs=0.02)
    assert load_file(end / "optimizer.safetensors") == {}
    model, *_ = load_model(end, torch.device("cpu"), torch.float32)
    for block in model.blocks:
        assert not block.get_parameter("attention.wo.weight").any()  # zero from the start


# ---- the step of a compiler ------------------------------------------------------------------------


@every_shape
def test_a_step_is_one_graph_for_all_blocks_and_two_of_the_norm_and_the_loss_compiled_once(
    tiny_model: Callable[..., GPT], fields: dict[str, Any]
):
    torch._dynamo.reset()
    graphs = []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model, eager = tiny_model(**fields), tiny_model(**fields)
    model.compile(fullgraph=True, backend=backend)
    for seed in (0, 1):  # a second micro-batch finds it compiled
        ids = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(seed))
        targets = torch.where(ids % 7 == seed, -1, ids)
        for each in (model, eager):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = each(ids, targets)
            (loss * 0.01).backward()
    assert len(graphs) == 3
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() < 0.02 * q.grad.norm(), name
    torch._dynamo.reset()


def test_compiled_code_holds_no_logits_in_fp32_and_fuses_what_is_between_the_products(monkeypatch: pytest.MonkeyPatch):
    """In the code that is generated for a CPU: the graph is the same for a GPU."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.utils import run_and_get_code

    # Nothing to be run is compiled: it is the calls that are read.
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    torch._dynamo.reset()
    layers, pieces, V = 3, 2, 640
    model = GPT(GPTConfig(d_model=64, n_layers=layers, n_heads=4, max_length=1024).resolved(V))
    ids = torch.zeros(pieces, 1024, dtype=torch.int64)
    model.compile(fullgraph=True)

    def forward() -> None:  # the head's part of the backward pass included
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, ids)

    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(forward)
    torch._dynamo.reset()
    block, norm, loss = (code[code.index("def call(") :] for code in codes)  # whatever the number of layers and pieces
    assert block.count("extern_kernels.mm(") == 4
    assert not re.findall(rf"empty_strided\w*\(\({ROWS_OF_LOGITS}, {V}\)", loss)  # the gradient is where the logits are
    # A norm; queries and keys; a sum and its norm; SwiGLU; a sum. The last norm. Softmax, nats and gradient.
    kernels = [len(re.findall(r"^\s+cpp_fused\w*\(", calls, re.MULTILINE)) for calls in (block, norm, loss)]
    assert kernels == [6, 1, 1]


# ---- what is chosen for a card ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card_name", "capability", "precision"),
    [
        ("Tesla P100", (6, 0), "fp16"), ("Tesla V100", (7, 0), "fp16"), ("Tesla T4", (7, 5), "fp16"),
        ("A100", (8, 0), "bf16"), ("RTX 3090", (8, 6), "bf16"), ("RTX 4090", (8, 9), "bf16"), ("H100", (9, 0), "bf16"),
        ("B200", (10, 0), "bf16"), ("RTX 5090", (12, 0), "bf16"),
    ],
)  # fmt: skip
def test_the_format_of_the_products_is_the_best_that_a_card_multiplies_in(
    monkeypatch: pytest.MonkeyPatch, card_name: str, capability: tuple[int, int], precision: str
):
    set_capability(monkeypatch, capability, card_name)
    assert choose_precision(CUDA, "auto") == precision
    assert best_dtype(CUDA) == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert choose_precision(CUDA, "fp32") == "fp32"
    assert choose_precision(CUDA, "fp16") == "fp16"
    for wanted in ("bf16", "tf32"):
        if precision == "bf16":
            assert choose_precision(CUDA, wanted) == wanted
        else:
            with pytest.raises(ConfigError, match=f"precision {wanted} .*{card_name}, 16 GB"):
                choose_precision(CUDA, wanted)


@pytest.mark.parametrize("wanted", ["fp16", "tf32"])
def test_formats_of_gpus_are_refused_on_a_cpu(wanted: str):
    with pytest.raises(ConfigError, match="needs a CUDA"):
        choose_precision(torch.device("cpu"), wanted)


@pytest.mark.parametrize(("precision", "setting"), [("bf16", "tf32"), ("tf32", "tf32"), ("fp32", "ieee")])
def test_fp32_products_are_rounded_unless_fp32_itself_is_asked_for(precision: str, setting: str):
    before = torch.get_float32_matmul_precision()
    try:
        allow_tf32(torch.device("cpu"), precision)
        assert torch.get_float32_matmul_precision() == before
        allow_tf32(CUDA, precision)
        assert torch.backends.cuda.matmul.fp32_precision == setting
        assert torch.backends.cuda.matmul.allow_tf32 == (setting == "tf32")  # what max-autotune asks
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_driver_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    version = ["NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01"]
    monkeypatch.setattr("hardware.lines_of", lambda path: version if path == "/proc/driver/nvidia/version" else [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert default_device().type == "cpu"  # a container to which no GPU was given
    monkeypatch.setattr("hardware._GPUS", Path("/dev/null"))
    for visible in (None, "0", "GPU-5ebe9f43"):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ConfigError, match=r"for CUDA 13.0, cannot use .*535.*cu126.*CUDA_VISIBLE_DEVICES="):
            default_device()
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert default_device().type == "cpu"


def test_a_slice_of_a_card_has_no_known_peak(monkeypatch: pytest.MonkeyPatch):
    set_capability(monkeypatch, (8, 0), "NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    assert peak_flops(CUDA, "bf16") is None


def test_the_peak_in_tf32_is_half_of_that_in_bf16(monkeypatch: pytest.MonkeyPatch):
    set_capability(monkeypatch, (8, 0), "NVIDIA A100-SXM4-80GB")
    assert [peak_flops(CUDA, p) for p in ("bf16", "tf32", "fp32")] == [312e12, 156e12, None]


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 6), ["sm_75", "sm_80", "sm_90"], True),  # machine code runs on later cards of its generation
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 5), ["sm_70", "sm_80"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 0), ["sm_90a", "sm_100"], False),
        ((12, 1), ["sm_90", "sm_120", "compute_120"], True),
        ((13, 0), ["sm_120", "compute_120"], True),  # compiled by the driver
        ((10, 3), ["sm_90", "compute_90"], True),
        ((9, 4), ["gfx90a", "gfx942"], True),  # AMD's names say nothing about this
    ],
)
def test_a_card_that_this_torch_has_no_code_for_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: list[str], fits: bool
):
    set_capability(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    if fits:
        assert default_device() == CUDA
    else:
        with pytest.raises(ConfigError, match=rf"no code for a card, 16 GB \(sm_{capability[0]}{capability[1]}\)"):
            default_device()


def test_a_mac_s_processor_is_asked_nothing_that_its_torch_does_not_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert best_dtype(torch.device("cpu")) == torch.float32


def test_in_fp16_a_text_is_written_as_in_fp32_where_the_residual_stream_passes_its_largest_number(
    tiny_model: Callable[..., GPT], tiny_tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    model = tiny_model(tiny_tokenizer.n_vocab, mlp="relu2", n_layers=4)
    with torch.no_grad():
        for weight in (p for name, p in model.named_parameters() if "w_down" in name):
            weight[:8] = 200  # of what is not negative: each block adds to what is there
    with torch.inference_mode():
        assert not copy.deepcopy(model).half()(torch.tensor([[5]])).isfinite().all()
    data = DataConfig(("SOTU",), (1.0,), tokenizer="bpe", bpe_vocab_size=300)
    tensors, config = gather_tensors(model, [], keep=True), Config(data, model.config)
    path = save_checkpoint(tmp_path, 1, tensors, {}, config, tiny_tokenizer, None)
    options = [str(path), "--prompt", "Four score", "--max_tokens", "12", "--temperature", "0"]
    texts = []
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr("hardware.best_dtype", lambda _, dtype=dtype: dtype)
        assert generate.main(options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "Four score\n"


def test_reasons_not_to_compile_on_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    compilers = {"gcc"}
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in compilers else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    set_capability(monkeypatch, (6, 1))
    assert why_not_compile(CUDA) == "the GPU is older than Volta"
    set_capability(monkeypatch, (7, 5))
    assert why_not_compile(CUDA) is None
    compilers.add("clang++")  # torch tries no other than g++, or what CXX names
    assert why_not_compile(torch.device("cpu")) == "there is no C++ compiler g++; CXX may name another"
    monkeypatch.setenv("CXX", "clang++")
    assert why_not_compile(torch.device("cpu")) is None
    compilers.clear()
    assert why_not_compile(CUDA) == "no C compiler found"
    compilers.add("mycc")
    monkeypatch.setenv("CC", "mycc")
    assert why_not_compile(CUDA) is None
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in str(why_not_compile(CUDA))


def test_a_micro_batch_goes_to_a_card_from_pinned_memory_without_waiting(monkeypatch: pytest.MonkeyPatch):
    done: list[Any] = []

    def pin_memory(self: Tensor) -> Tensor:
        done.append("pinned")
        return self

    def to(self: Tensor, device: torch.device, **options: Any) -> Tensor:
        done.append((device, options))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    to_device(np.zeros((2, 3), dtype=np.int64)[:, ::2], CUDA)
    assert done == ["pinned", (CUDA, {"non_blocking": True})]


# ---- bench/gpu.py and docs/gpu.md ------------------------------------------------------------------------


def bench(*options: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_the_benchmark_of_a_box_can_be_rehearsed_whole_without_a_gpu(tmp_path: Path):
    out, _ = bench("--rehearse", "--out", str(tmp_path))
    results = json.loads((tmp_path / "rehearsal.json").read_text())
    assert "failed" not in results
    assert set(results) == {"context", "ceilings", "training", "attention", "decoding", "train.py"}
    assert "not a measurement" in results["context"]["card"]
    assert len(results["training"]) == 3
    for speeds in (*results["training"].values(), *results["train.py"].values()):
        assert speeds["tokens/s"] > 0
    assert all(set(speeds["update ms"]) == {"muon", "adamw"} for speeds in results["training"].values())
    assert results["train.py"]["train.py on 2 x CPU"]["share of so many times one"] > 0
    assert max(map(len, out.splitlines()[:-1])) <= 100  # the last one names the file


def test_the_benchmark_without_a_gpu_is_one_line_and_exit_code_2():
    out, err = bench(code=2)
    assert out == ""
    assert err.count("\n") == 1
    assert "--rehearse" in err


def test_the_benchmark_stops_when_its_minutes_are_over_and_keeps_what_it_has(tmp_path: Path):
    out, _ = bench("--rehearse", "--minutes", "0.01", "--out", str(tmp_path))
    assert "0.01 minutes are over" in out
    results = json.loads((tmp_path / "rehearsal.json").read_text())
    assert set(results["failed"]) == {"the rest"}
    assert "context" in results


def test_what_docs_gpu_md_expects_is_what_the_code_computes():
    text = (ROOT / "docs" / "gpu.md").read_text()
    table, _ = bench("--expect")
    assert table in text
    flops = []
    for preset in ("fineweb", "gpt2"):
        with torch.device("meta"):
            flops.append(GPT(PRESETS[preset].model.resolved(50257)).flops_per_token())
        assert f"{flops[-1] / 1e6:.0f} million for {preset}" in text
    share = re.search(r"at (\d+)% of the data sheet's peak", text)
    assert share
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) > 8
    for card, _, fineweb, _, gpt2, _ in rows:
        for speed, n in ((fineweb, flops[0]), (gpt2, flops[1])):
            tokens = float(speed.replace(",", "").rstrip("k")) * 1e3
            assert tokens * n / 1e12 == pytest.approx(int(share[1]) / 100 * PEAK_TFLOPS[card], rel=0.02)
    assert f"pieces of {ROWS_OF_LOGITS_ON_CUDA:,} rows (fp16: {ROWS_OF_LOGITS:,})" in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
