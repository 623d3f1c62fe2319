"""What a training step takes is known before it is taken, and the micro-batch is chosen by it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import hardware
import memory
import optim
from checkpoint import gather_tensors, save_checkpoint
from config import Config, DataConfig, GPTConfig, TrainingConfig, load_config
from errors import ConfigError
from memory import fitting_batch_size, training_memory, usable_memory
from model import ENTRIES_AT_ONCE, GPT, HeadLoss, cross_entropy_
from optim import build_optimizers

ROOT = Path(__file__).resolve().parent.parent
SMALL = Config(
    data=DataConfig(tokenizer="bpe", bpe_vocab_size=2048),
    model=GPTConfig(d_model=128, n_layers=4, n_heads=2, max_length=256),
    train=TrainingConfig(batch_size=8, gradient_accumulation_steps=6),
)
MEASURE = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from config import GPTConfig, TrainingConfig
from hardware import best_dtype
from model import GPT
from optim import build_optimizers

def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def train(model, rows):
    optimizers = build_optimizers(model, TrainingConfig())
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, (rows, 256))
        with torch.autocast("cpu", torch.bfloat16, enabled=best_dtype(torch.device("cpu")) == torch.bfloat16):
            model(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()

torch.set_num_threads(1)
train(GPT(GPTConfig(d_model=64, n_layers=1, n_heads=1).resolved(64)), 1)  # the libraries' own memory comes first
before = peak()
model = GPT(GPTConfig(d_model=256, n_layers=6, n_heads=4, max_length=256).resolved(8192))
model.activation_checkpointing = sys.argv[2] == "again"
train(model, int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize(("again", "rows"), [(False, 5), (False, 17), (True, 25)])
def test_the_memory_of_a_step_is_what_it_really_takes(again: bool, rows: int) -> None:
    # Without this, freed memory stays with the process, and its peak says nothing about what was in use at a time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(ROOT), "again" if again else "kept", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    config = Config(
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=8192),
        model=GPTConfig(d_model=256, n_layers=6, n_heads=4, max_length=256),
        train=TrainingConfig(activation_checkpointing=again),
    )
    assert int(done.stdout) == pytest.approx(training_memory(config, rows).total, rel=0.25)


def test_every_layer_takes_the_same_so_two_are_enough_to_count_them_all() -> None:
    for rows in (1, 8, 100):
        counted = training_memory(SMALL, rows).activations
        assert counted == memory._activations(SMALL, rows, SMALL.model.n_layers)


def test_the_heads_gradient_is_one_sum_in_fp32_and_little_besides() -> None:
    n_vocab, width = 8 * ENTRIES_AT_ONCE, 64
    with FakeTensorMode():
        x = torch.zeros(1, width, dtype=torch.bfloat16, requires_grad=True)  # one row: its logits are little
        weight, targets = torch.zeros(n_vocab, width, requires_grad=True), torch.zeros(1, dtype=torch.long)
        taken = memory._peak(lambda: HeadLoss.apply(x, weight, targets, cross_entropy_).backward())
    assert 6 < taken / (n_vocab * width) < 7  # four bytes a number of the sum, two of the weight in bf16


def test_an_update_of_many_layers_takes_no_more_than_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "NUMBERS_AT_ONCE", 2**18)
    monkeypatch.setattr(memory, "_update", memory._update.__wrapped__)  # without what was counted before, or will be
    four, eight = (
        training_memory(dataclasses.replace(SMALL, model=GPTConfig(d_model=256, n_layers=n, n_heads=4)), 1)
        for n in (4, 8)
    )
    assert 0 < four.update == eight.update < 0.2 * eight.gradients


@pytest.mark.parametrize("model", [GPTConfig(), GPTConfig(d_model=1024, n_layers=20, n_heads=16, mlp="relu2")], ids=str)
def test_an_update_is_counted_in_few_layers_as_in_all(model: GPTConfig) -> None:
    with FakeTensorMode():
        optimizers = build_optimizers(memory._with_gradients(model.resolved(2048)), SMALL.train)
        for optimizer in optimizers:
            optimizer.step()
        taken = max(memory._peak(optimizer.step) for optimizer in optimizers)
    assert training_memory(dataclasses.replace(SMALL, model=model), 1).update == taken


@pytest.fixture
def one_of_eight() -> Iterator[None]:
    """As seen by one of eight processes, whose messages go nowhere."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def test_in_one_of_several_processes_no_more_is_counted_than_alone(request: pytest.FixtureRequest) -> None:
    alone = training_memory(SMALL, 1), training_memory(SMALL, 1, 8)
    memory._update.cache_clear()
    request.getfixturevalue("one_of_eight")
    assert (training_memory(SMALL, 1), training_memory(SMALL, 1, 8)) == alone


@pytest.mark.usefixtures("one_of_eight")
@pytest.mark.parametrize(("width", "n_layers"), [(256, 2), (1024, 16), (2048, 16), (4096, 2)])
def test_the_directions_that_processes_gather_are_in_the_count(width: int, n_layers: int) -> None:
    """Fewer matrices than processes, one turn, several, and matrices above NUMBERS_AT_ONCE."""
    model = GPTConfig(d_model=width, n_layers=n_layers, n_heads=width // 64, max_length=64)
    with FakeTensorMode():
        muon, _ = build_optimizers(memory._with_gradients(model.resolved(2048)), SMALL.train)
        muon.step()
        taken = memory._peak(muon.step)
    config = dataclasses.replace(SMALL, model=model)
    alone, of_eight = training_memory(config, 1).update, training_memory(config, 1, 8).update
    assert taken <= of_eight
    if width > 256:  # where others' directions are the most
        assert alone < taken > 0.9 * of_eight


def test_activations_are_counted_in_the_format_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(precision: Any) -> memory.TrainingMemory:
        return training_memory(dataclasses.replace(SMALL, train=TrainingConfig(precision=precision)), 8)

    bf16, fp32 = counted("bf16"), counted("fp32")
    assert 1.25 < fp32.activations / bf16.activations < 2  # logits are in fp32 in any case
    assert dataclasses.replace(fp32, activations=bf16.activations) == bf16
    assert (counted("fp16"), counted("tf32")) == (bf16, fp32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        monkeypatch.setattr(memory, "best_dtype", lambda _, dtype=dtype: dtype)  # the machine's, which auto means
        assert counted("auto") == expected


def test_weights_and_optimizer_state_are_counted_exactly() -> None:
    with_adamw = dataclasses.replace(SMALL, train=TrainingConfig(optimizer="adamw", lr=1e-3))
    counted, adamw = training_memory(SMALL, 1), training_memory(with_adamw, 1)
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 384)  # per layer: q, k, v, o and gate, up, down
    norms = 128 * 9 + 64 * 8
    weights = matrices + norms + 2 * 2048 * 128
    assert counted.weights == counted.gradients == 4 * weights
    assert adamw.optimizer == 8 * weights
    assert counted.optimizer == 8 * weights - 4 * matrices
    for config, of_state in ((SMALL, counted.optimizer), (with_adamw, adamw.optimizer)):
        optimizers = build_optimizers(memory._with_gradients(SMALL.model.resolved(2048)), config.train)
        for optimizer in optimizers:
            optimizer.step()
        states = [t for o in optimizers for state in o.state.values() for t in state.values()]
        assert sum(t.nbytes for t in states) == pytest.approx(of_state, rel=1e-4)  # and a counter for each of AdamW's


def test_the_largest_divisor_of_the_batch_that_fits_is_chosen() -> None:
    chosen = {n: fitting_batch_size(SMALL, 48, training_memory(SMALL, n).total) for n in (1, 5, 6, 11, 12, 48)}
    assert chosen == {1: 1, 5: 4, 6: 6, 11: 8, 12: 12, 48: 48}
    assert fitting_batch_size(SMALL, 2**20, 2**50) * 256 == memory.MOST_TOKENS


def test_a_model_that_does_not_fit_with_one_row_is_an_error_that_says_what_would_help() -> None:
    with pytest.raises(
        ConfigError, match=r"one row of 256 tokens takes .* GB, and 0.00 GB can .*; use a smaller .*checkpointing"
    ):
        fitting_batch_size(SMALL, 48, 2**20)


def test_usable_memory_is_some_of_what_the_machine_has() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 2**26 < usable_memory(torch.device("cpu")) < 1024 * total


@pytest.mark.parametrize(
    "arguments",
    [["--train.batch_size", "auto"], ["--train.batch_size=auto"], ["--train.batch-size", "auto"] * 2],
    ids=repr,
)
def test_batch_size_auto_fits_the_memory_and_keeps_the_tokens_per_step(arguments: list[str]) -> None:
    config = load_config(["--preset", "smoke", *arguments, "--train.gradient_accumulation_steps", "3"], "", Config)
    assert config.train.fit_memory
    assert config.rows_per_step() == 12


def test_a_run_that_chooses_its_micro_batch_trains_on_the_same_tokens_per_step(tmp_path: Path) -> None:
    """In two processes as in one, and when it is resumed by another number of them."""
    command = [
        str(ROOT / "train.py"), "--preset", "smoke", "--train.no_compile", "--train.gradient_accumulation_steps", "4",
        "--train.batch_size", "auto", "--train.out_dir", str(tmp_path), "--data.cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    one = subprocess.run([sys.executable, *command, "--train.max_steps", "20"], capture_output=True, text=True)
    assert "16 rows x 1 accumulated x 1 devices x 64 tokens = 1,024 tokens per step" in one.stdout, one.stderr
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *command, "--train.max_steps", "22",
         "--resume"], capture_output=True, text=True,
    )  # fmt: skip
    assert "8 rows x 1 accumulated x 2 devices x 64 tokens = 1,024 tokens per step" in two.stdout, two.stderr
    records = [json.loads(line) for line in (tmp_path / "smoke/metrics.jsonl").read_text().splitlines()]
    assert [r["tokens"] for r in records if r["kind"] == "train"][-1] == 22 * 1024


def number_printed_by(script: str, name: str) -> int:
    """By a process whose malloc is as glibc sets it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", script, str(ROOT), name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


FREE_AND_ALLOCATE = """
import resource, sys

sys.path.insert(0, sys.argv[1])
import torch
from hardware import keep_freed_memory

if sys.argv[2] == "kept":
    keep_freed_memory()
for step in range(12):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [torch.ones(n, 1 << 18) for n in (20, 50, 12, 60) * 3]  # of 12 to 63 MB
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_on_a_cpu_finds_the_memory_that_the_last_one_freed() -> None:
    pages = {name: number_printed_by(FREE_AND_ALLOCATE, name) for name in ("kept", "given back")}
    assert 10 * pages["kept"] < pages["given back"]  # 0 and 600,000 here; with huge pages 500 times fewer


STEPS_OF_TWO_KINDS = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from hardware import give_back_freed_memory, keep_freed_memory

if sys.argv[2] == "given back first":
    give_back_freed_memory()
else:
    keep_freed_memory()
arrays, left = [], []
for _ in range(20):  # the first step, which leaves something between its arrays
    arrays.append(torch.ones(1 << 22))  # 16 MB
    left.append(bytes(100_000))
del arrays
keep_freed_memory()
arrays = [torch.ones(5 << 21) for _ in range(8)]  # the next, of 40 MB: as much in all
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # kB; getrusage begins with the parent's
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_a_first_step_leaves_behind_does_not_lie_between_the_arrays_of_the_next() -> None:
    most = {name: number_printed_by(STEPS_OF_TWO_KINDS, name) for name in ("given back first", "kept from the start")}
    assert most["kept from the start"] - most["given back first"] > 250_000  # kB, of 328,000


@pytest.mark.skipif(sys.platform == "darwin", reason="trains on MPS, which has no malloc of glibc's")
def test_malloc_gives_back_until_a_first_step_was_tried_and_keeps_from_then_on(tmp_path: Path) -> None:
    script = """
import hardware, runtime, train

tried = runtime.runs_out_of_memory
hardware.give_back_freed_memory = lambda: print("told: give back")
hardware.keep_freed_memory = lambda: print("told: keep")
runtime.runs_out_of_memory = lambda *of: (print("told: a step"), tried(*of))[1]
train.main()
"""
    options = ["--preset", "smoke", "--train.no_compile", "--train.out_dir", str(tmp_path)]
    command, on_cpu = [sys.executable, "-c", script, *options], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=on_cpu)
    told = [line for line in done.stdout.splitlines() if line.startswith("told: ")]
    assert told == ["told: give back", "told: a step", "told: keep"]


@pytest.mark.parametrize("largest", [2**31 - 1, 2**25, 0], ids=["glibc 2.35", "an older glibc", "no glibc"])
def test_arrays_are_not_mapped_one_by_one_where_malloc_takes_a_smaller_threshold(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, int] = {}

    class Libc:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            if value > largest and parameter == -3:
                return 0
            taken[parameter] = value
            return 1

    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: Libc)
    hardware.keep_freed_memory()
    assert taken == ({-3: largest, -1: 2**31 - 1} if largest else {})
    hardware.give_back_freed_memory()
    assert taken == ({-3: 2**17, -1: 2**17} if largest else {})


def test_a_system_without_mallopt_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: object())
    hardware.give_back_freed_memory()
    hardware.keep_freed_memory()


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_the_environment_sets_of_malloc_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "65536")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda _: pytest.fail("malloc was asked"))
    hardware.give_back_freed_memory()
    hardware.keep_freed_memory()


# ---- weights in large pages ------------------------------------------------------------------------


def test_arrays_in_large_pages_lie_apart_and_outlive_one_another() -> None:
    shapes = [torch.Size(shape) for shape in ((3, 5), (1,), (1000, 700), (64,))]
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        arrays = hardware.in_large_pages(shapes, dtype)
        for number, array in enumerate(arrays):
            array.fill_(number)
        assert [(a.shape, a.dtype, a.data_ptr() % 64) for a in arrays] == [(shape, dtype, 0) for shape in shapes]
        assert len({array.untyped_storage().data_ptr() for array in arrays}) == 4  # or safetensors refuses to save them
        if sys.platform == "linux":
            assert arrays[0].data_ptr() % 2**21 == 0  # or the first two megabytes are in small pages
        last = arrays.pop()
        assert all((array == number).all() for number, array in enumerate(arrays))
        del arrays, array
        assert (last == 3).all()


def test_on_another_system_they_are_arrays_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hardware.mmap, "MADV_HUGEPAGE")
    (array,) = hardware.in_large_pages([torch.Size([3, 5])], torch.bfloat16)
    assert (array.shape, array.dtype) == ((3, 5), torch.bfloat16)


LOAD = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from checkpoint import load_model

def kilobytes(file, name):
    return sum(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(name))

torch.set_num_threads(1)
load_model(sys.argv[2], dtype=torch.bfloat16)  # the libraries' own memory comes first
before = kilobytes("status", "VmRSS")
model, *_ = load_model(sys.argv[3], dtype=torch.bfloat16)
assert model.cos.dtype == torch.bfloat16
print(sum(p.numel() * 2 for p in model.parameters()) // 1024)
print(kilobytes("status", "VmHWM") - before, kilobytes("smaps", "AnonHugePages"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages as Linux counts them")
def test_a_model_is_loaded_in_its_format_at_once_and_into_large_pages(tmp_path: Path, tiny_tokenizer: Any) -> None:
    runs = []
    for name, shape in (("small", GPTConfig(64, 1, 1)), ("large", GPTConfig(384, 12, 6))):
        tensors = gather_tensors(GPT(shape.resolved(tiny_tokenizer.n_vocab)), [], keep=True)
        (tmp_path / name).mkdir()
        runs.append(save_checkpoint(tmp_path / name, 1, tensors, {}, Config(model=shape), tiny_tokenizer, None))
    done = subprocess.run([sys.executable, "-c", LOAD, ROOT, *runs], capture_output=True, text=True, check=True)
    weights, peak, large = map(int, done.stdout.split())
    assert peak < 3.5 * weights  # of which 2 are the file, in fp32; 5 where the model is in fp32 before it is in bf16
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert large > 0.8 * weights
