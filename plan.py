"""Before a run costs anything: what it will take (train.py --plan), and a rehearsal of all its parts (--check)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import load_model, newest_checkpoint, read_state
from config import DATASETS, Config, processes
from errors import ConfigError
from files import PARTIAL
from hardware import MEMORY_GB, PEAK_TFLOPS, WITHOUT_BF16, choose_precision, default_device, describe, why_not_compile
from memory import SHARE_TO_FILL, fitting_batch_size, training_memory, usable_memory
from metrics import amount, duration, read_metrics
from model import GPT
from prepare_data import DatasetPrep, passes_over, planned_tokens, too_often
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
MEASURED_STEPS = 6  # of which the first, which compiles, counts apart


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of a run's parts, and where they are from."""

    step: float
    compiling: float
    validation: float
    checkpoint: float
    source: str


def main(config: Config, options: Any, run: Callable, argv: Sequence[str]) -> int:
    """train.py --plan or --check. options: train.py's TrainConfig; run: its train(config); argv: its command line."""
    tokenizer = None
    if config.init_from:
        from runtime import like  # with accelerate: seconds that the scripts which import this need not wait for

        _, tokenizer, parents_config, _ = load_model(config.init_from)
        config = like(config, parents_config)
    if options.check:
        return check(config, [word for word in argv if word != "--check"])
    world_size = processes()
    if torch.cuda.is_available():  # or all processes would take memory of the first GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if config.resume and (newest := newest_checkpoint(config.train.run_dir)):
        batch_size = 1 if config.train.fit_memory else config.train.batch_size
        config = config.with_batch_size(batch_size, read_state(newest.path)["rows_per_step"], world_size)
    return plan(config, world_size, options.gpu, options.mfu, options.price_per_hour, run, tokenizer)


def plan(
    config: Config,
    world_size: int,
    gpu: str,
    mfu: float,
    price_per_hour: float,
    run: Callable,
    tokenizer: Tokenizer | None,
) -> int:
    """Print parameters, memory, disk, passes over the data, time and price, and warn of what usually goes wrong.

    gpu: one of CARDS that is not here: time follows from its peak and the assumed mfu. Otherwise a few steps are
    trained by run(config), which is train.py's, in a folder that is removed again.
    tokenizer: of the weights that the run begins with, in place of the one that config names.
    """
    if gpu and gpu not in PEAK_TFLOPS:
        raise ConfigError(f"there is no GPU {gpu!r} in the table; choose from {', '.join(PEAK_TFLOPS)}")
    if gpu and config.train.precision == "fp32":
        others = "fp16" if gpu in WITHOUT_BF16 else "bf16, fp16 or tf32"
        raise ConfigError(f"how fast GPUs are in fp32 is not known here; plan with --train.precision {others}")
    if gpu in WITHOUT_BF16 and config.train.precision in ("bf16", "tf32"):
        raise ConfigError(f"a {gpu} has no {config.train.precision}; plan with --train.precision fp16 or auto")
    if gpu and config.train.precision == "auto":  # which means fp16 on some, and takes as much
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    c = config.train
    total_steps, per_epoch = run_length(config, world_size, tokenizer)
    config.check_length(total_steps, world_size)
    tokens = total_steps * config.tokens_per_step(world_size)
    with torch.device("meta"):
        model = GPT(config.model.resolved(config.data.n_vocab))
    counts, flops = model.parameter_counts(), model.flops_per_token()
    n_saves, n_validations = math.ceil(total_steps / c.save_every), math.ceil(total_steps / c.eval_every)
    checkpoint = training_memory(config, 1).checkpoint  # whole also where FSDP divides what it holds
    disk = Path(c.out_dir).expanduser()
    free = shutil.disk_usage(next(p for p in (disk.absolute(), *disk.absolute().parents) if p.exists())).free
    epochs = None if c.max_steps else c.epochs
    passes = passes_over(per_epoch, config.data, tokens, epochs)

    if gpu:  # GB of 10^9 bytes, as the makers': of a T4's 16, CUDA shows 15.7
        usable = int(SHARE_TO_FILL["cuda"] * MEMORY_GB[gpu] * 1e9)
    else:  # before the measured steps, whose memory torch keeps
        usable = usable_memory(default_device(), world_size)
    rows = _rows_at_once(config, usable, world_size)
    memory = training_memory(config, rows, world_size)
    speed = _assumed(gpu, mfu, flops, config, world_size) if gpu else _measured(config, run)
    if speed is None:
        return 0
    if c.save_minutes:  # more of them, counted from the last one on
        times, rest = divmod(total_steps, c.save_every)
        of_all, of_rest = (int(steps * speed.step / 60 / c.save_minutes) for steps in (c.save_every, rest))
        n_saves += times * of_all + of_rest
    n_kept = min(n_saves, most_checkpoints(config, total_steps))
    seconds = total_steps * speed.step + speed.compiling
    seconds += n_validations * speed.validation + n_saves * speed.checkpoint
    rate = config.tokens_per_step(world_size) / speed.step
    print(f"device    {world_size} x {gpu or describe(default_device())}")
    print(f"model     {counts['total'] / 1e6:,.1f}M parameters, {flops / 1e6:,.1f} MFLOP per token")
    print(f"length    {total_steps:,} steps of {config.tokens_per_step(world_size):,} tokens: {amount(tokens)} "
          f"tokens, {tokens / counts['total']:,.1f} per parameter")  # fmt: skip
    print(f"lr        {c.lr_for(config.tokens_per_step(world_size)):.2g} at its peak")
    known = ", ".join(f"{name} {n:.2f}" for name, n in passes.items())
    print(f"data      passes over {known}" if known else "data      how often it is passed over is not known")
    print(f"memory    {memory.total / 2**30:.2f} GB a device at most, with {rows} rows at once, of "
          f"{usable / 2**30:.1f} to use{'' if gpu else ' now'}")  # fmt: skip
    print(f"disk      {checkpoint / 2**20:,.0f} MB a checkpoint, {n_kept} at a time: "
          f"{n_kept * checkpoint / 2**30:.1f} GB of {free / 2**30:,.0f} free")  # fmt: skip
    print(f"speed     {rate:,.0f} tokens/s, {speed.source}")
    measured = "" if gpu else (
        f", {n_validations} validations {duration(n_validations * speed.validation)}, "
        f"{n_saves} checkpoints {duration(n_saves * speed.checkpoint)}"
    )  # fmt: skip
    print(f"time      {duration(seconds)}: {total_steps:,} steps {duration(total_steps * speed.step)}, compiling "
          f"{duration(speed.compiling)}{measured}")  # fmt: skip
    if price_per_hour:
        print(f"price     {seconds / 3600 * price_per_hour:,.2f} at {price_per_hour:g} an hour")
    for warning in _warnings(config, world_size, total_steps, tokens, counts, passes):
        print(f"  ! {warning}")
    if n_kept * checkpoint > free:
        print(
            "  ! the checkpoints do not fit the disk; lower --train.keep_checkpoints, or choose another --train.out_dir"
        )
    if memory.total > usable and not c.fit_memory:
        print("  ! it may not fit the memory; --train.batch_size auto takes what does, with more accumulation")
    return 0


def _rows_at_once(config: Config, usable: int, world_size: int = 1) -> int:
    """train.batch_size; or with auto what the run will choose when a device has so many bytes."""
    if not config.train.fit_memory:
        return config.train.batch_size
    return fitting_batch_size(config, config.rows_per_step(world_size) // world_size, usable, world_size)


def most_checkpoints(config: Config, total_steps: int) -> int:
    """On the disk at a time: the newest, the best, the one being written, and those of each keep_every-th step."""
    c = config.train
    return c.keep_checkpoints + 2 + (total_steps // c.keep_every if c.keep_every else 0)


def run_length(config: Config, world_size: int, tokenizer: Tokenizer | None = None) -> tuple[int, dict[str, int]]:
    """Optimizer steps of the run; and of each dataset its training tokens per epoch, 0 if that is not known.

    Like train.py: max_steps, or else the epochs over all datasets. Local datasets, and shards, are read for that; those
    of the hub are planned from their descriptions, but in a run by epochs with a tokenizer of one's own.
    """
    c = config.data
    described = {name: DATASETS[name] for name in c.current_datasets}
    sizes = dict.fromkeys(described, 0)
    counted = all(d.documents and d.tokens_per_document for d in described.values())
    if counted and not c.shards_dir and (c.tokenizer != "bpe" or config.train.max_steps):
        for n, d in described.items():
            sizes[n] = planned_tokens(n, c, d.documents, d.tokens_per_document)
    elif c.shards_dir or not (any(d.kind == "hub" for d in described.values()) and config.train.max_steps):
        rows = config.rows_per_step(world_size)
        sizes = DatasetPrep(c, config.model.max_length, rows, tokenizer=tokenizer).tokens_per_epoch()
    per_step = config.tokens_per_step(world_size)
    return config.train.max_steps or math.ceil(sum(sizes.values()) * config.train.epochs / per_step), sizes


def _assumed(gpu: str, mfu: float, flops: int, config: Config, world_size: int) -> Speed:
    peak = PEAK_TFLOPS[gpu] / (2 if config.train.precision == "tf32" else 1)
    step = flops * config.tokens_per_step(world_size) / (peak * 1e12 * mfu * world_size)
    source = f"if {world_size} x {gpu} reach {mfu:.0%} of {peak:g} TFLOP/s"
    return Speed(step, 60.0, 0.0, 0.0, f"{source} (validation and checkpoints not counted)")


def _measured(config: Config, run: Callable) -> Speed | None:
    """Train for a few steps, as the run would, and remove all that is left. None but in the first process."""
    c = config.train
    launch = os.environ.get("MASTER_PORT", os.getpid())  # the same in all processes of this plan, and no other's
    folder = Path(c.out_dir).expanduser() / f"{PARTIAL}plan-{launch}"  # its run is inside: a run's name has no dot
    few = dataclasses.replace(
        c, max_steps=MEASURED_STEPS, warmup_tokens=0, eval_every=10**9, save_every=10**9, save_minutes=0.0, log_every=1,
        out_dir=str(folder), run_name="plan", trackers=(),
    )  # fmt: skip
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        print(f"measuring {MEASURED_STEPS} steps ...", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = run(dataclasses.replace(config, train=few, resume=False, restart_data=False))
        records = read_metrics(few.run_dir / "metrics.jsonl") if is_main else []  # which it will remove
    finally:
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if code:
        raise KeyboardInterrupt  # stopped by a signal
    if not is_main:
        return None
    steps = [r for r in records if r["kind"] == "train"]
    (validation,) = (r for r in records if r["kind"] == "validation")
    (saved,) = (r for r in records if r["kind"] == "checkpoint")
    step = (steps[-1]["seconds"] - steps[0]["seconds"]) / (len(steps) - 1)
    mfu = f", mfu {steps[-1]['mfu']:.0%}" if "mfu" in steps[-1] else ""
    return Speed(
        step, steps[0]["seconds"] - step, validation["time"] - steps[-1]["time"], saved["seconds"],
        f"measured in {len(steps) - 1} steps{mfu}",
    )  # fmt: skip


def _warnings(
    config: Config, world_size: int, total_steps: int, tokens: int, counts: dict[str, int], passes: dict[str, float]
) -> list[str]:
    found = []
    ends = counts["embedding"] + counts["head"]
    if ends > 0.7 * counts["total"]:
        found.append(f"embedding and head are {ends / counts['total']:.0%} of the parameters: a smaller vocabulary?")
    if tokens < 5 * counts["total"]:
        found.append(
            f"{tokens / counts['total']:.1f} tokens per parameter; about 20 are compute-optimal (arXiv:2203.15556)"
        )
    if (warmup := config.warmup_steps(world_size)) > 0.1 * total_steps:
        found.append(f"warm-up takes {warmup / total_steps:.0%} of the run; a tenth is enough: --train.warmup_tokens")
    if total_steps < 300:
        found.append(f"only {total_steps} steps: a smaller batch takes more of them with the same tokens")
    return found + too_often(passes)


# --------------------------------------------------------------------------------------
# The rehearsal
# --------------------------------------------------------------------------------------


def check(config: Config, argv: Sequence[str]) -> int:
    """Go through the parts of a run with the real options, two layers and few rows; a line for each, with its remedy.

    Returns the exit code of the part that failed, or 0.
    """
    from runtime import check_trackers  # with accelerate, as above

    if processes() != 1:
        raise ConfigError("--check rehearses one process; run it without the launcher: python train.py --check")
    device, c = default_device(), config.train
    _tick("device", f"{describe(device)} | {choose_precision(device, c.precision)}")
    why_not = why_not_compile(device) if c.compile else "off"
    _tick("compiler", f"not used: {why_not}" if why_not else "there is one", good=not (c.compile and why_not))
    usable = usable_memory(device)
    rows = _rows_at_once(config, usable)
    needed = training_memory(config, rows).total
    remedy = "" if needed <= usable else "; --train.batch_size auto chooses what fits"
    counted = f"{needed / 2**30:.2f} GB counted for {rows} rows, {usable / 2**30:.1f} to use{remedy}"
    _tick("memory", counted, good=needed <= usable)
    check_trackers(c.trackers)
    for name in c.trackers:  # they are to show the run, not its rehearsal
        _tick("tracker", f"{name} is installed; whether it starts is seen in the run")

    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "check")
        # Another's weights have all their layers; FSDP has no use for one process.
        layers = [] if config.init_from else ["--model.n_layers", str(min(2, config.model.n_layers))]
        layers += ["--train.no_fsdp"] if c.fsdp else []
        small = [
            *argv, *layers, "--train.batch_size", "1",
            "--train.gradient_accumulation_steps", str(config.data.n_streams), "--train.warmup_tokens", "0",
            "--train.out_dir", folder, "--train.run_name", "check", "--train.no_compile", "--train.trackers",
            "--train.save_every", "1",
            "--data.val_tokens", str(2 * config.model.max_length), "--eval.sample_tokens", "8",
        ]  # fmt: skip
        parts = {
            "data, a step, a save": ["train.py", *small, "--train.max_steps", "1"],
            "resume, one more step": ["train.py", *small, "--train.max_steps", "2", "--resume"],
            "generate": ["generate.py", run, "--prompt", config.eval.prompts[0], "--max_tokens", "8"],
            "evaluate": ["evals.py", run],
        }
        for name, (script, *options) in parts.items():
            started = time.perf_counter()
            done = subprocess.run([sys.executable, str(ROOT / script), *options], capture_output=True, text=True)
            if done.returncode:
                _tick(name, (done.stderr.strip().splitlines() or ["no message"])[-1], good=False)
                return done.returncode
            _tick(name, f"{time.perf_counter() - started:.1f} s")
    print("ready: the run's options are sound; start it without --check")
    return 0


def _tick(name: str, text: str, good: bool = True) -> None:
    print(f"{'ok ' if good else ' ! '} {name:<23}{text}", flush=True)
