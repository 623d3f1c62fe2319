"""What a rented box's GPUs do, in ten minutes or less:  python bench/gpu.py [--minutes 10] [--rehearse] [--expect]

In this order, as far as the time goes: the best matrix product and memory speed of a card; a micro-step (forward and
backward) and an update of the presets fineweb and gpt2, compiled and not; the attention kernels; decoding; train.py
itself with the default preset's model and batch on text that comes with the requirements, on one GPU and on all of
them; other micro-batch sizes. Prints as it goes, and writes results/gpu/<card>.json after each part, so that a box
that goes away leaves what was measured.

--rehearse does the same on a CPU with tiny models, in seconds, and writes to --out only: for a look, and for the tests.
--expect prints what docs/gpu.md expects of each card, from the FLOP count and the makers' data sheets.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.context import context
from bench.decode import tokenizer_of
from config import PRESETS, Config, GenerationConfig, TrainingConfig
from errors import ConfigError, exit_code_of
from files import write_json
from hardware import (
    AUTOCAST_DTYPES,
    PEAK_TFLOPS,
    allow_tf32,
    best_dtype,
    choose_precision,
    compile_for_training,
    default_device,
    describe,
    peak_flops,
    why_not_compile,
)
from model import GPT
from optim import build_optimizers
from sampling import generate_ids

ROOT = Path(__file__).resolve().parent.parent
EXPECTED_MFU = 0.4
EXPECTED_CARDS = (
    "T4", "V100", "L4", "A10G", "RTX 3090", "RTX 4090", "RTX 5090", "L40S", "A100", "H100", "B200",
)  # fmt: skip
OUT_OF_MEMORY = "out of memory"


class TimeIsUp(BaseException):
    """--minutes are over; what was measured is written. (No Exception, so that nobody catches it on the way.)"""


# ---- what to expect ----------------------------------------------------------------------------------


def expected_table() -> str:
    """A line a card, in Markdown: tokens per second and hours at EXPECTED_MFU of the data sheet's peak."""
    lines = [
        "| card | peak TFLOP/s | fineweb, tokens/s | hours per 10^9 tokens | gpt2, tokens/s | whole run, 8 cards |",
        "|---|---|---|---|---|---|",
    ]
    for card in EXPECTED_CARDS:
        speeds = {}
        for preset in ("fineweb", "gpt2"):
            config = PRESETS[preset]
            with torch.device("meta"):
                flops = GPT(config.model.resolved(config.data.n_vocab)).flops_per_token()
            speeds[preset] = EXPECTED_MFU * PEAK_TFLOPS[card] * 1e12 / flops
        run = PRESETS["gpt2"].train.max_steps * PRESETS["gpt2"].tokens_per_step(8)
        lines.append(
            f"| {card} | {PEAK_TFLOPS[card]:,} | {speeds['fineweb'] / 1e3:,.0f}k | "
            f"{1e9 / speeds['fineweb'] / 3600:.2f} | {speeds['gpt2'] / 1e3:,.0f}k | "
            f"{run / speeds['gpt2'] / 8 / 3600:.1f} h |"
        )
    return "\n".join(lines)


# ---- measuring ---------------------------------------------------------------------------------------


class Box:
    """The device, its best format, the time that is left, and the results so far."""

    def __init__(self, rehearse: bool, minutes: float, out: Path | None):
        self.rehearse, self.ends = rehearse, time.monotonic() + 60 * minutes
        self.device = torch.device("cpu") if rehearse else default_device()
        if self.device.type != "cuda" and not rehearse:
            raise ConfigError("bench/gpu.py measures GPUs, and torch finds none here; --rehearse tries it on a CPU")
        self.precision = choose_precision(self.device, "auto")
        self.dtype = AUTOCAST_DTYPES.get(self.precision, torch.float32)
        allow_tf32(self.device, self.precision)
        self.cards = 1 if rehearse else torch.cuda.device_count()
        self.name = "rehearsal" if rehearse else torch.cuda.get_device_name()
        self.peak = None if rehearse else peak_flops(self.device, self.precision)
        self.gemm, self.bandwidth = 0.0, 0.0  # FLOP/s and bytes/s, measured
        self.results: dict[str, Any] = {"context": context() | self.about()}
        self.path = out / f"{re.sub(r'[^A-Za-z0-9]+', '-', self.name).strip('-')}.json" if out else None

    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = {
            "card": describe(self.device) if not self.rehearse else "none: a rehearsal, not a measurement",
            "cards": self.cards, "precision": self.precision, "data sheet TFLOP/s": self.peak and self.peak / 1e12,
        }  # fmt: skip
        if not self.rehearse:
            query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            try:
                done = subprocess.run(query, capture_output=True, text=True, timeout=20)
                about["driver, power limit, clock"] = done.stdout.splitlines()
            except (OSError, subprocess.TimeoutExpired):
                pass
            about |= {
                "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(), "built for": torch.cuda.get_arch_list(),
            }  # fmt: skip
        return about

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], budget: float = 1.0) -> float:
        """The median of as many calls as fit into the budget, at least three, behind one that does not count."""
        budget = 0.02 if self.rehearse else budget
        call()
        self.wait()
        times: list[float] = []
        while len(times) < 3 or (sum(times) < budget and len(times) < 100):
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def forget_peak_memory(self) -> None:
        torch._dynamo.reset()  # compiled code holds on to its model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> float | None:
        """GB of tensors at most since forget_peak_memory."""
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.device.type == "cuda" else None

    def record(self, part: str, name: str, values: Any) -> None:
        self.results.setdefault(part, {})[name] = values

    def write(self) -> None:
        if self.path:
            write_json(self.path, self.results)


def measure_card(box: Box) -> None:
    """The ceilings: products of large matrices, copies within the card's memory (bytes read and written), and from the
    host's."""
    size = 256 if box.rehearse else 8192
    found: dict[str, Any] = {}
    before = torch.backends.cuda.matmul.fp32_precision
    formats = {"fp32": "ieee"} | ({"tf32": "tf32"} if box.precision == "bf16" and not box.rehearse else {})
    for name in (*formats, box.precision):
        torch.backends.cuda.matmul.fp32_precision = formats.get(name, before)
        n = size // 2 if name == "fp32" else size  # a small part of the speed, and of the time
        a, b = (torch.randn(n, n, device=box.device, dtype=AUTOCAST_DTYPES.get(name, torch.float32)) for _ in range(2))
        out = torch.empty_like(a)
        found[f"{name} TFLOP/s"] = 2 * n**3 / box.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e12
    torch.backends.cuda.matmul.fp32_precision = before
    box.gemm = found[f"{box.precision} TFLOP/s"] * 1e12
    block = torch.empty(2**20 if box.rehearse else 2**30, dtype=torch.uint8, device=box.device)
    copy = torch.empty_like(block)
    box.bandwidth = 2 * block.numel() / box.seconds(lambda: copy.copy_(block))
    found["memory GB/s"] = box.bandwidth / 1e9
    host = torch.empty(block.numel() // 4, dtype=torch.uint8, pin_memory=box.device.type == "cuda")
    found["from the host GB/s"] = host.numel() / box.seconds(lambda: copy[: host.numel()].copy_(host)) / 1e9
    products = ", ".join(f"{name.split()[0]} {value:,.0f}" for name, value in found.items() if "TFLOP" in name)
    speeds = f"memory {found['memory GB/s']:,.0f}, from the host {found['from the host GB/s']:,.0f}"
    print(f"{'ceilings':<26} TFLOP/s: {products}; GB/s: {speeds}")
    if box.peak:
        print(f"{'':<26} {box.gemm / box.peak:.0%} of the data sheet's {box.peak / 1e12:,.0f} TFLOP/s")
    for name, value in found.items():
        box.record("ceilings", name, round(value, 3))


def measure_training(box: Box, preset: str, compiled: bool, rows: int | None = None) -> None:
    """A micro-step of so many rows (None: the preset's) and the update, with Muon and with AdamW."""
    config = PRESETS["smoke" if box.rehearse else preset]
    rows = rows or config.train.batch_size
    T, name = config.model.max_length, f"{preset}, {'compiled' if compiled else 'eager'}, {rows} rows"
    if compiled and (reason := why_not_compile(box.device)):
        return note(box, "training", name, f"not compiled: {reason}")
    box.forget_peak_memory()
    try:
        found = training_speed(box, config, rows, compiled)
    except torch.OutOfMemoryError:
        found = None
    box.forget_peak_memory()
    if found is None:  # not inside the except: what the error holds on to would still be there
        return note(box, "training", name, OUT_OF_MEMORY)
    micro, update = found["micro-step ms"] / 1e3, found["update ms"]["muon"] / 1e3
    step = config.train.gradient_accumulation_steps * micro + update
    speed = config.train.gradient_accumulation_steps * rows * T / step
    shares = {"MFU": box.peak, "of the best product": box.gemm}
    found |= {"step ms": round(step * 1e3, 2), "tokens/s": round(speed)}
    found |= {k: round(speed * found["FLOPs per token"] / peak, 4) for k, peak in shares.items() if peak}
    box.record("training", name, found)
    updates = " ".join(f"{k} {v:.1f}" for k, v in found["update ms"].items())
    share = f"{found['MFU']:.0%} MFU" if box.peak else f"{speed * found['FLOPs per token'] / box.gemm:.0%} of mm"
    memory = f"{found['peak memory GB'] or '-'} GB"
    print(f"{name:<26} {micro * 1e3:7.1f} ms {speed / 1e3:8,.1f}k tok/s {share:>9} {memory:>8} | {updates}")


def training_speed(box: Box, config: Config, rows: int, compiled: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT(config.model.resolved(config.data.n_vocab)).to(box.device)
    T, V = config.model.max_length, model.config.vocab_size
    x, y = torch.randint(0, V, (2, rows, T), device=box.device)
    if compiled and box.rehearse:
        model.compile(backend="aot_eager")
    elif compiled:
        compile_for_training(model, box.device)

    def micro_step() -> None:
        with torch.autocast(box.device.type, dtype=box.dtype, enabled=box.dtype != torch.float32):
            nats = model(x, y)
        (nats / y.numel()).backward()

    started = time.perf_counter()
    micro_step()  # compiles
    box.wait()
    first = time.perf_counter() - started
    found: dict[str, Any] = {
        "micro-step ms": round(box.seconds(micro_step, 4) * 1e3, 2), "first call s": round(first, 1),
        "peak memory GB": None, "FLOPs per token": model.flops_per_token(), "update ms": {},
    }  # fmt: skip
    for optimizer, lr in (("muon", 0.02), ("adamw", 6e-4)):
        optimizers = build_optimizers(model, TrainingConfig(optimizer=optimizer, lr=lr))

        def update(optimizers: list[torch.optim.Optimizer] = optimizers) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                each.step()

        found["update ms"][optimizer] = round(box.seconds(update) * 1e3, 2)
        if optimizer == "muon":
            micro_step()  # now beside the optimizers' state
            box.wait()
            found["peak memory GB"] = box.peak_memory()
    return found


def note(box: Box, part: str, name: str, text: str) -> None:
    print(f"{name:<26} {text}"[:100])
    box.record(part, name, text)


def measure_attention(box: Box, preset: str) -> None:
    """Forward and backward of causal attention by each of torch's kernels, and which one torch would choose."""
    config = PRESETS["smoke" if box.rehearse else preset]
    c = config.model.resolved(config.data.n_vocab)
    shape = (config.train.batch_size, c.max_length, c.n_heads, c.head_dim)
    q, k, v = (
        torch.randn(shape, device=box.device, dtype=box.dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    grad = torch.randn_like(q)
    found: dict[str, Any] = {"shape (B, H, T, K)": list(q.shape)}
    found["chosen"] = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
    flops = 3 * 2 * shape[0] * shape[2] * shape[3] * shape[1] * (shape[1] + 1)  # as in GPT.flops_per_token
    kernels = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    )  # fmt: skip
    for kernel in kernels:

        def call(kernel: SDPBackend = kernel) -> None:
            with sdpa_kernel(kernel):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), grad)

        try:
            seconds = box.seconds(call, 0.5)
            found[kernel.name] = {"ms": round(seconds * 1e3, 3), "TFLOP/s": round(flops / seconds / 1e12, 2)}
        except (RuntimeError, torch.OutOfMemoryError) as error:  # the card or the shape is not for this kernel
            found[kernel.name] = str(error).splitlines()[0][:200]
    times = " ".join(
        f"{k.name.split('_')[0].lower()} {found[k.name]['ms']:.2f}" for k in kernels if isinstance(found[k.name], dict)
    )
    print(f"{f'attention of {preset}':<26} {found['chosen']} is chosen; ms: {times}"[:100])
    box.record("attention", preset, found)


def measure_decoding(box: Box, preset: str) -> None:
    """Tokens per second of one text, and of 16 at a time."""
    config = PRESETS["smoke" if box.rehearse else preset]
    model = GPT(config.model.resolved(config.data.n_vocab)).to(box.device, best_dtype(box.device)).eval()
    tokenizer = tokenizer_of(config.data.n_vocab)
    counts = model.parameter_counts()
    n_bytes = (counts["total"] - counts["embedding"] * (not config.model.tie_embeddings)) * box.dtype.itemsize
    found: dict[str, Any] = {"bytes of weights per token": n_bytes}
    tokens = 8 if box.rehearse else 128
    for samples in (1, 16):
        settings = GenerationConfig(max_tokens=tokens, temperature=1.0, top_k=0, top_p=1.0, num_samples=samples)
        written = 0

        def call(settings: GenerationConfig = settings) -> None:
            nonlocal written
            written = sum(1 for _ in generate_ids(model, [1] * 16, tokenizer, settings))

        seconds = box.seconds(call, 3)
        found[f"{samples} at a time, tokens/s"] = round(samples * written / seconds, 1)
        if samples == 1:  # reading the weights is what takes the time, at best
            found["of the memory's speed"] = round(written / seconds * n_bytes / box.bandwidth, 4)
    one, many = found["1 at a time, tokens/s"], found["16 at a time, tokens/s"]
    memory = format(found["of the memory's speed"], ".0%")
    print(f"{f'decoding with {preset}':<26} {one:,.0f} tok/s ({memory} of the memory's speed), 16 texts {many:,.0f}")
    box.record("decoding", preset, found)


def measure_train_py(box: Box, processes: int) -> None:
    """train.py on so many GPUs: the data, accelerate, NCCL, validation and a checkpoint as in a run of one's own."""
    name = f"train.py on {processes} x {'CPU' if box.rehearse else 'GPU'}"
    box.forget_peak_memory()  # for it needs the card to itself
    options = {
        "preset": "smoke" if box.rehearse else "fineweb", "data.current_datasets": "SOTU WIKI",
        "data.dataset_probabilities": "0.7 0.3", "data.val_fraction": 0.05,
        "data.val_tokens": 1024 if box.rehearse else 65536, "train.max_steps": 4 if box.rehearse else 60,
        "train.log_every": 1 if box.rehearse else 10, "train.warmup_tokens": 0, "train.eval_every": 1000,
        "train.save_every": 1000, "train.run_name": "bench",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        words = " ".join(f"--{key} {value}" for key, value in (options | {"train.out_dir": folder}).items()).split()
        words += ["--train.no_compile"] if box.rehearse else []
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if box.rehearse else {}
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *words]
        code, output = run(command, os.environ | hidden, box.left)
        if code:
            last = output.strip().splitlines()[-20:]
            box.record("train.py", f"{name}, its last lines", last)
            return note(box, "train.py", name, f"failed ({code}): {last[-1] if last else ''}")
        records = [json.loads(line) for line in (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "train"]
    measured = [r for r in steps if r["tokens_per_second"]]  # the first one has compiled
    found: dict[str, Any] = {
        "tokens/s": round(statistics.median(r["tokens_per_second"] for r in measured)),
        "waiting for data": round(statistics.median(r["data_wait"] for r in measured), 4),
        "MFU": measured[-1].get("mfu"), "first and last loss": [steps[0]["loss"], steps[-1]["loss"]],
        "options": options,
    }  # fmt: skip
    text = f"{found['tokens/s']:,} tok/s, {found['waiting for data']:.1%} of it waiting for data"
    alone = box.results.get("train.py", {}).get(name.replace(f" {processes} ", " 1 "))
    if processes > 1 and isinstance(alone, dict):
        found["share of so many times one"] = round(found["tokens/s"] / alone["tokens/s"] / processes, 4)
        text += f", {found['share of so many times one']:.0%} of {processes} x one"
    print(f"{name:<26} {text}")
    box.record("train.py", name, found)


def run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and output. If it takes longer, or we are to stop, it is asked to end: torchrun ends its processes."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        return process.returncode, output
    except BaseException as error:
        process.terminate()
        try:
            process.communicate(timeout=45)
        except subprocess.TimeoutExpired:
            process.kill()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeIsUp from None
        raise


def measure(box: Box) -> None:
    print(f"{box.name}: {box.cards} x {box.results['context']['card']}, {box.precision}"[:100])
    presets = ("fineweb", "gpt2")[: 1 if box.rehearse else 2]  # in a rehearsal both would be smoke
    parts: list[Callable[[], None]] = [lambda: measure_card(box)]
    parts += [lambda c=c, p=p: measure_training(box, p, c) for c in (True, False) for p in presets]
    parts += [lambda p=p: measure_attention(box, p) for p in presets]
    parts += [lambda p=p: measure_decoding(box, p) for p in presets]
    counts = (1, 2) if box.rehearse else sorted({1, max(n for n in (1, 2, 4, 8, 16) if n <= box.cards)})
    parts += [lambda n=n: measure_train_py(box, n) for n in counts]
    sizes = [("fineweb", 64), ("gpt2", 16), ("gpt2", 64), ("fineweb", 16)]
    parts += [lambda p=p, n=n: measure_training(box, p, True, n) for p, n in (sizes[:1] if box.rehearse else sizes)]
    for part in parts:
        try:
            part()
        except Exception as error:  # one kernel that fails must not cost the rest of a rented hour
            traceback.print_exc()
            box.record("failed", f"part {parts.index(part) + 1}", repr(error)[:500])
        box.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="stop after so many")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU, in seconds")
    parser.add_argument("--out", type=Path, help="folder of the results (results/gpu; of a rehearsal: none)")
    parser.add_argument("--expect", action="store_true", help="print the table of docs/gpu.md, measure nothing")
    arguments = parser.parse_args()
    if arguments.expect:
        print(expected_table())
        return 0
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes is {arguments.minutes}; use a positive number")
    box = Box(
        arguments.rehearse, arguments.minutes, arguments.out or (None if arguments.rehearse else ROOT / "results/gpu")
    )

    def time_is_up(*_: Any) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, box.left)
    try:
        measure(box)
    except TimeIsUp:
        print(f"{arguments.minutes:g} minutes are over; the rest is not measured")
        box.record("failed", "the rest", f"{arguments.minutes:g} minutes were over")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        box.write()
    if box.path:
        print(f"written to {box.path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
