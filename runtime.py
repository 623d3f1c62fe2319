"""What a run needs around its steps: its processes, their micro-batch, validation, signals. For train.py."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from checkpoint import Checkpoint, CheckpointError, list_checkpoints, newest_checkpoint
from config import PRESETS, Config, TrainingConfig, processes
from errors import ConfigError, explain
from files import write_json
from hardware import AUTOCAST_DTYPES
from metrics import Score, means_and_errors, read_metrics, rows_to_score, score_rows, without_nan
from model import GPT
from prepare_data import Batch, DatasetPrep, HeldOut, passes_over, too_often

SECONDS_TO_SEE = 90  # a checkpoint that another machine wrote: NFS keeps what it knows of a folder for up to 60


def check_launcher() -> None:
    """Raises ConfigError where the environment tells of other processes that no launcher started.

    For one process, sets two variables of NCCL's that accelerate, started after this, may demand.
    """
    if (n_processes := processes()) == 1:  # on cards of the RTX 40 series with an old driver, though NCCL is not used
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    elif not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise ConfigError(
            f"WORLD_SIZE is {n_processes} in the environment, but RANK and MASTER_ADDR, which a launcher sets as well, "
            f"are not; unset it, or start with torchrun or accelerate launch"
        )


def start_processes(c: TrainingConfig, precision: str, on_cpu: bool) -> Accelerator:
    """Join this run's processes: DDP, or with train.fsdp FSDP2. Raises ConfigError for FSDP with one process."""
    check_launcher()
    # accelerate names an option of DDP that torch now calls otherwise, and each process would say so.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # How long the others wait for a process that reads from a slow hub, which may try for longer than NCCL's 10
    # minutes; then NCCL would end the run with nothing saved.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    fsdp = None
    if c.fsdp:  # each process keeps some rows of every weight; a block's are gathered while it computes
        from torch.distributed.fsdp import MixedPrecisionPolicy

        fsdp = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            reshard_after_forward=True,
            # Gathered in the products' format: autocast would keep a copy of every weight until the backward pass.
            mixed_precision_policy=MixedPrecisionPolicy(
                AUTOCAST_DTYPES.get(precision), reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            # Not used; left out, accelerate would take them from variables of the environment.
            cpu_offload=False,
            cpu_ram_efficient_loading=False,
            activation_checkpointing=False,
        )
    accelerator = Accelerator(
        fsdp_plugin=fsdp,
        mixed_precision=precision if precision in AUTOCAST_DTYPES else "no",
        cpu=on_cpu,
        kwargs_handlers=[ddp, patience],
        # Both are ours, below; without these, accelerate takes them from variables of the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    if c.fsdp and accelerator.num_processes == 1:
        raise ConfigError(
            "train.fsdp divides the model among several devices, and this run has one; start a process for each, "
            "such as accelerate launch --num_processes=8 train.py, or leave --train.fsdp out"
        )
    if c.fsdp and on_cpu:  # where accelerate ignores the plugin, though FSDP2 works
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for one that is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.loader is None:  # None: of a folder of that name
            raise ConfigError(f"train.trackers has {name}, which is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: Config, step: int) -> list[GeneralTracker]:
    """Those of train.trackers, started: a run that goes on at `step` goes on there too. Ended by end_training().

    Raises ConfigError for one that does not start. accelerate's own init_trackers leaves such out silently, and knows
    no names of runs.
    """
    run_dir, name = config.train.run_dir, config.train.run_name
    settings = {"name": name, "config": config.to_dict(), "resume": "allow"}
    began = next(r["time"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "start")
    run_id = f"{name}-{began:.0f}"  # a new run of an old name is another
    make: dict[str, Callable[[], GeneralTracker]] = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", run_dir, purge_step=step + 1 if step else None),
        "trackio": lambda: TrackioTracker("basicgpt", **settings | {"name": run_id}),
        "wandb": lambda: WandBTracker("basicgpt", **settings, id=run_id, dir=run_dir),
    }
    for kind in config.train.trackers:
        try:
            accelerator.trackers.append(make[kind]())
            accelerator.trackers[-1].start()
        except Exception as error:  # whatever it raises where, for instance, nobody has logged in
            raise ConfigError(f"train.trackers: {kind} does not start: {error}") from None
    return accelerator.trackers


def newest_for_all(accelerator: Accelerator, run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that the main process sees. Machines may see a shared disk at different times; raises
    CheckpointError in a process that does not see that one."""
    accelerator.wait_for_everyone()
    newest = newest_checkpoint(run_dir)
    (step,) = broadcast_object_list([newest.step if newest else None])
    until = time.monotonic() + SECONDS_TO_SEE
    while step is not None:
        if found := next((c for c in list_checkpoints(run_dir) if c.step == step), None):
            return found
        if time.monotonic() > until:
            raise CheckpointError(
                f"process {accelerator.process_index} does not see the checkpoint of step {step} in {run_dir}; all "
                f"machines need the same --train.out_dir, on a disk that they share"
            )
        time.sleep(1)
    return None


def runs_out_of_memory(
    accelerator: Accelerator,
    trained: torch.nn.Module,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    batch_size: int,
) -> bool:
    """Whether so many rows are too many for this process: tried, with room set aside for the optimizer's state.

    The processes exchange nothing meanwhile, so that one may fail alone. (FSDP's would wait for each other.)
    """
    ids = torch.zeros(batch_size, model.config.max_length, dtype=torch.int64, device=model.device)
    room = None
    try:
        if not any(optimizer.state for optimizer in optimizers):  # made by the first step: at most two numbers a weight
            room = torch.empty(2 * model.parameter_counts()["total"], device=model.device)
        with accelerator.no_sync(trained):
            accelerator.backward(0.0 * trained(ids, ids))
        return False
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if explain(error) is None:
            raise
        return True
    finally:
        del room
        model.zero_grad(set_to_none=True)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def like(config: Config, parent: Config) -> Config:
    """The configuration with another's model settings and tokenizer, for weights that come from there.

    Its context may be shorter: rotary positions are computed, not learned.
    """
    length = parent.model.max_length
    known = (parent.model, *(preset.model for preset in PRESETS.values()))
    if dataclasses.replace(config.model, max_length=length) not in [
        dataclasses.replace(model, max_length=length) for model in known
    ]:
        raise ConfigError(
            "with --init_from the model's settings are those of its checkpoint; leave the --model options out, but "
            "for a shorter --model.max_length"
        )
    model = dataclasses.replace(parent.model, max_length=min(config.model.max_length, length))
    tokenizer, n_vocab = parent.data.tokenizer, parent.data.bpe_vocab_size
    data = dataclasses.replace(config.data, tokenizer=tokenizer, bpe_vocab_size=n_vocab)
    return dataclasses.replace(config, model=model, data=data)


def name_suspects(
    run_dir: Path,
    step: int,
    accelerator: Accelerator,
    model: GPT,
    batch: Batch,
    data: DatasetPrep,
    token_byte_length: torch.Tensor,
) -> str:
    """Score each row of a step that is not finite, write all to non-finite.json, and name the worst in a sentence."""
    model.zero_grad(set_to_none=True)  # their memory is needed, and they are of no use
    rows = np.concatenate([batch.inputs, batch.targets[:, -1:].clip(min=0)], axis=1)
    losses, problem = [None] * len(rows), ""
    try:
        # One row is another shape, and to compile for it may take memory.
        with torch.compiler.set_stance("force_eager"), accelerator.autocast():
            score = score_rows(model, rows, token_byte_length, batch_size=1)
        losses = (score.nats / score.tokens).tolist()
    except (RuntimeError, MemoryError) as error:
        # Where training fits barely there may be no room for the logits of a whole row, or for what cuBLAS needs, each
        # with a message of its own. What ends the run is the step that is not finite.
        problem = (str(error).splitlines() or ["no memory"])[0]
    names = [data.config.current_datasets[i] for i in batch.sources]
    texts = [data.tokenizer.decode(row.tolist()) for row in rows]
    table = gather_object([
        {"dataset": name, "loss": loss, "process": accelerator.process_index, "text": text}
        for name, loss, text in zip(names, losses, texts, strict=True)
    ])  # fmt: skip
    path, problems = run_dir / "non-finite.json", [p for p in gather_object([problem]) if p]
    if not problems:
        table.sort(key=lambda row: -row["loss"] if math.isfinite(row["loss"]) else -math.inf)
    if accelerator.is_main_process:
        write_json(path, without_nan({"step": step, "rows": table}))
    if problems:
        return f"Its {len(table)} rows could not be scored one by one: {problems[0]} (all in {path})"
    n_broken = sum(not math.isfinite(row["loss"]) for row in table)
    diverged = ", so the weights have diverged" if n_broken == len(table) else ""
    which = f"{n_broken} of its {len(table)} rows{diverged}; first" if n_broken else "no row by itself; the worst"
    return f"It is {which} {table[0]['dataset']}: {table[0]['text'][:60]!r} (all in {path})"


def often_repeated(data: DatasetPrep, tokens: int, epochs: int | None) -> list[str]:
    """too_often of a run of so many tokens, as far as the sizes of its datasets are known."""
    try:
        sizes = dict.fromkeys(data.config.current_datasets, 0) if epochs else data.tokens_per_epoch(sample=50)
    except ConfigError:
        return []
    return too_often(passes_over(sizes, data.config, tokens, epochs))


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy without waiting: CUDA can do so from pinned memory."""
    tensor = torch.from_numpy(array).contiguous()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def validation_scores(
    accelerator: Accelerator,
    model: GPT,
    held_out: dict[str, HeldOut],
    token_byte_length: torch.Tensor,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """means_and_errors of each dataset's held-out rows, and of "all" together. The processes share the rows."""
    scores = {}
    batch_size = rows_to_score(batch_size, model.config.max_length, model.config.vocab_size)
    for name, (rows, documents) in held_out.items():
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        share, its = rows[mine], documents[mine]
        if len(share) % batch_size == 0 and len(share) * accelerator.num_processes < len(rows):
            # Others have a batch more. Under FSDP a forward pass gathers weights from all processes, so this one joins
            # with a row that is not counted.
            score_rows(model, rows[:1], token_byte_length, batch_size)
        scores[name] = Score.concatenate(gather_object([score_rows(model, share, token_byte_length, batch_size, its)]))
    return {name: means_and_errors([score]) for name, score in scores.items()} | {
        "all": means_and_errors([*scores.values()])
    }


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGHUP, so that the loop can end between two steps; the third one kills at once."""

    def __init__(self) -> None:
        self.received, self._last = 0, -math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if time.monotonic() - self._last < 1:  # a box that shuts down signals us, our launcher and our supervisor, and
            return  # each of them passes it on: that is one request
        self._last = time.monotonic()
        self.received += 1
        if self.received == 1:
            with contextlib.suppress(OSError):  # print may be in the middle of another line, or the terminal gone
                os.write(2, b"stopping after this step and saving ...\n")
        if self.received >= 3:
            os._exit(128 + number)
