"""Train a GPT:  python train.py [--preset demo] [--train.lr 0.01 ...] [--resume]

On several GPUs:  accelerate launch --num_processes=8 train.py
Everything a run leaves is in checkpoints/<run_name>/: config.json, metrics.jsonl, loss.png, status.json, step-*/
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import math
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Self

from config import Config, load_config
from errors import ConfigError, complain, drop, exit_code_of, explain
from files import check_lock, write_failure, write_json, write_status

STOPPED = 75  # exit code: a signal came, everything is saved, run again with --resume


@dataclasses.dataclass
class TrainConfig(Config):
    plan: bool = False  # train nothing: say what the run would take, from a few measured steps or from --gpu
    gpu: str = ""  # with plan: a GPU that is not here, such as H100
    mfu: float = 0.0  # with gpu: the share of its peak that training is assumed to reach, such as 0.4
    price_per_hour: float = 0.0  # with plan: of the whole machine
    check: bool = False  # train nothing: rehearse data, a step, save, resume, generation and evaluation in small

    def validate(self, world_size: int = 1) -> Self:
        if not 0 <= self.mfu <= 1:
            raise ConfigError(f"mfu is {self.mfu}; use a share above 0 and at most 1, such as 0.4")
        if not 0 <= self.price_per_hour < math.inf:
            raise ConfigError(f"price_per_hour is {self.price_per_hour}; use 0 or a positive number")
        if (self.gpu or self.price_per_hour) and not self.plan:
            raise ConfigError("gpu, mfu and price_per_hour are for --plan; add it, or leave them out")
        if self.plan and self.check:
            raise ConfigError("plan and check are two things; do one after the other")
        if bool(self.mfu) != bool(self.gpu):
            raise ConfigError("gpu and mfu go together, such as --gpu H100 --mfu 0.4; give both, or neither")
        return super().validate(world_size)


def main(argv: Sequence[str] | None = None) -> int:
    # torch takes a second to import: --help and a mistyped option are answered before that.
    options = load_config(argv, "Train a GPT from scratch.", TrainConfig)
    config = Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})
    if options.plan or options.check:
        import plan

        return plan.main(config, options, train, sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the loop knows better
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return train(config)
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", 1)
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        message, code = explain(error) or ("interrupted" if interrupted else repr(error), code)
        write_failure(config.train.run_dir, message, code)
        raise


def train(config: Config) -> int:
    """The run, from the data to the last checkpoint. Returns the exit code: 0, or STOPPED. Raises UserError."""
    import torch
    from accelerate.utils import gather_object, set_seed
    from tqdm import tqdm

    from checkpoint import (
        check_same_run,
        copy_weights,
        gather_tensors,
        load_model,
        load_tokenizer,
        load_training_state,
        newest_checkpoint,
        open_run,
        put_damaged_aside,
        read_config,
        read_state,
        save_checkpoint,
    )
    from decoding import decode_step
    from hardware import (
        allow_tf32,
        choose_precision,
        compile_for_training,
        default_device,
        describe,
        give_back_freed_memory,
        keep_freed_memory,
        peak_flops,
        why_not_compile,
    )
    from memory import fitting_batch_size, usable_memory
    from metrics import Meter, MetricsFile, amount, code_version, duration, log_line, plot_loss, shown
    from model import GPT
    from optim import build_optimizers, lr_factor_at, set_learning_rates
    from prepare_data import DatasetPrep
    from runtime import (
        StopSignal,
        check_trackers,
        like,
        name_suspects,
        newest_for_all,
        often_repeated,
        runs_out_of_memory,
        start_processes,
        start_trackers,
        to_device,
        validation_scores,
    )
    from sampling import NonFiniteError, by_module, generate_text

    # ---- where we are -------------------------------------------------------------------
    given = config.train
    precision = choose_precision(default_device(), given.precision)
    allow_tf32(default_device(), precision)
    on_cpu = default_device().type == "cpu"  # then processes talk through gloo
    if on_cpu:
        give_back_freed_memory()
    accelerator = start_processes(given, precision, on_cpu)
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    is_main = accelerator.is_main_process
    progress = tqdm(disable=not (is_main and sys.stderr.isatty()), unit="step", leave=False)

    def say(text: str) -> None:
        if is_main:
            try:
                progress.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # whoever read it has gone: the run, and metrics.jsonl, go on
                drop(sys.stdout)

    # ---- the run's folder, and the checkpoint to continue from ----------------------------
    run_dir = config.train.run_dir
    lock = open_run(run_dir) if is_main else None
    accelerator.wait_for_everyone()
    newest = newest_checkpoint(run_dir)
    if newest and not config.resume:
        raise ConfigError(
            f"{run_dir} already holds a run at step {newest.step}; add --resume to continue it, "
            f"or choose another --train.run_name"
        )
    if is_main:
        write_status(run_dir, "running", newest.step if newest else 0)
        for line in put_damaged_aside(run_dir):
            complain(line)
    newest = newest_for_all(accelerator, run_dir)
    state = read_state(newest.path) if newest else None
    if state and 0 < given.max_steps < state["step"]:
        own = f"--train.max_steps {state['total_steps']}"
        if state["epochs"]:
            own = f"--train.max_steps 0 --train.epochs {state['epochs']}"
        raise ConfigError(
            f"{run_dir} is at step {state['step']} of {state['total_steps']} already, beyond train.max_steps "
            f"{given.max_steps}; repeat the options of the run: {own}"
        )
    saved_tokenizer = load_tokenizer(newest.path) if newest else None
    if config.init_from:  # only now it is known whether the run has weights of its own
        if newest:
            config = like(config, read_config(newest.path))
        else:
            parent, saved_tokenizer, parents_config, _ = load_model(config.init_from)
            config = like(config, parents_config)
        config.validate(world_size)
    rows_per_step = state["rows_per_step"] if state else config.rows_per_step(world_size)
    batch_size = given.batch_size
    if given.fit_memory:
        config.with_batch_size(1, rows_per_step, world_size).check_layout(world_size)
        usable = usable_memory(device, world_size)
        fitting = fitting_batch_size(config, rows_per_step // world_size, usable, world_size)
        batch_size = int(accelerator.gather(torch.tensor([fitting], device=device)).min())
        say(f"memory    {usable / 2**30:.1f} GB to use: {batch_size} rows of {config.model.max_length} tokens at once")
    config = config.with_batch_size(batch_size, rows_per_step, world_size)
    config.check_layout(world_size)
    if config.train.max_steps:
        config.check_length(config.train.max_steps, world_size)
    c, tokens_per_step = config.train, config.tokens_per_step(world_size)  # c: as it runs here; lr may differ as well
    if newest and state:
        check_same_run(newest.path, config)
        if c.max_steps == state["step"]:
            say(f"{run_dir} is complete at step {c.max_steps}; nothing to do. Raise --train.max_steps to train on")
            if is_main:
                write_status(run_dir, "complete", c.max_steps, exit_code=0)
            return 0

    if is_main:
        check_trackers(c.trackers)

    # ---- data, model, optimizer -----------------------------------------------------------
    say(f"device    {world_size} x {describe(device)} | {precision}")
    epochs = None if c.max_steps else c.epochs
    with accelerator.main_process_first():  # the others find the tokenizer and held-out rows that it made
        data = DatasetPrep(
            config.data, config.model.max_length, rows_per_step, rank, world_size, epochs, saved_tokenizer
        )
        held_out = data.validation_rows()
    tokenizer = data.tokenizer
    token_byte_length = torch.from_numpy(tokenizer.token_byte_length).to(device)

    set_seed(c.seed)
    model = GPT(config.model.resolved(tokenizer.n_vocab))
    model.activation_checkpointing = c.activation_checkpointing
    if config.init_from and not newest:
        copy_weights(model, parent.state_dict())
        del parent
        say(f"weights   of {config.init_from}")
    if not c.fsdp:  # which takes each process's rows to its device: all might not fit there
        model = model.to(device)
    optimizers = build_optimizers(model, c)

    # `model` is what is saved, validated and sampled; `trained` is what the step calls: the same, or DDP's wrapper.
    if not (why_eager := why_not_compile(device) if c.compile else "off"):
        compile_for_training(model, device)
    trained, *_ = accelerator.prepare(model, *optimizers)

    step, tokens_seen, seconds_trained, total_steps = 0, 0, 0.0, c.max_steps
    recent_losses: deque[float] = deque(maxlen=100)
    undone: Counter[int] = Counter()  # spikes, by the step of the checkpoint that they led back to
    first_data_step = 0  # where the documents began: not at 0 if --restart_data changed them
    if newest and state:
        load_training_state(newest.path, model, optimizers)
        step, tokens_seen, seconds_trained = state["step"], state["tokens_seen"], state["seconds_trained"]
        recent_losses.extend(state["recent_losses"])
        undone.update({int(key): n for key, n in state["undone"].items()})
        if config.restart_data and data.changed_since(state["data"]):
            first_data_step = step
            all_of_them = "" if c.max_steps else f", for all {c.epochs} epochs"
            say(f"data      changed since step {step}: its documents begin anew{all_of_them}")
        else:
            data.load_state_dict(state["data"])
            first_data_step = state["first_data_step"]
            if not c.max_steps and state["epochs"] == c.epochs:
                total_steps = state["total_steps"]
    if not total_steps:
        per_epoch = sum(data.tokens_per_epoch().values()) / tokens_per_step
        total_steps = first_data_step + math.ceil(per_epoch * c.epochs)
    config.check_length(total_steps, world_size)
    warmup_steps = config.warmup_steps(world_size)

    n_parameters, flops_per_token = model.parameter_counts()["total"], model.flops_per_token()
    peak = peak_flops(device, precision)
    say(
        f"model     {n_parameters / 1e6:.1f}M parameters, {model.config.n_layers} layers x {model.config.d_model}, "
        f"context {model.config.max_length}, vocabulary {tokenizer.n_vocab}"
    )
    say(f"compile   {why_eager or 'on: the first step waits for it'}")
    shares = zip(config.data.current_datasets, config.data.dataset_probabilities, strict=True)
    asked = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    say(f"data      {asked} | tokenizer {tokenizer.name}")
    for warning in often_repeated(data, total_steps * tokens_per_step, epochs) if is_main else []:
        say(f"          {warning}")
    say(
        f"batch     {c.batch_size} rows x {c.gradient_accumulation_steps} accumulated x {world_size} devices "
        f"x {config.model.max_length} tokens = {tokens_per_step:,} tokens per step"
    )
    if c.lr != given.lr:
        growth = f"({tokens_per_step:,} / {given.lr_tokens_per_step:,} tokens per step)^(1/4)"
        say(f"lr        {c.lr:.2g} at its peak: {given.lr:g} x {growth}; another with --train.lr")
    about = "" if c.max_steps else "about "  # the data decides
    say(f"run       {run_dir}: step {step} to {about}{total_steps:,}, {amount(total_steps * tokens_per_step)} tokens")
    if state and step < total_steps != state["total_steps"]:
        was, now = (c.lr * lr_factor_at(step, n, warmup_steps, c) for n in (state["total_steps"], total_steps))
        before = f"before of {state['total_steps']:,}"
        say(f"schedule  of {total_steps:,} steps, {before}: from lr {was:.1e} to {now:.1e} at once")
    stop_signal = StopSignal()
    first_step = saved_step = step
    started = last_save = time.perf_counter()
    while not c.fsdp and accelerator.reduce(
        torch.tensor(float(runs_out_of_memory(accelerator, trained, model, optimizers, c.batch_size)), device=device)
    ):
        fewer = [n for n in range(1, c.batch_size) if rows_per_step // world_size % n == 0]
        if not fewer:
            raise ConfigError(
                "out of memory with a single row; use a smaller model or context, or --train.activation_checkpointing"
            )
        config = config.with_batch_size(fewer[-1], rows_per_step, world_size)
        c = config.train
        say(f"memory    too little for that; now {c.batch_size} rows x {c.gradient_accumulation_steps} accumulated")
        torch.compiler.reset()  # or after eight sizes it would compile no more
    if on_cpu:
        keep_freed_memory()  # from the second pass on (under FSDP, which tries none, from the first)
    seconds_trained += time.perf_counter() - started  # most of it is compiling
    if is_main:
        write_json(run_dir / "config.json", config.to_dict())
    log = MetricsFile(run_dir / "metrics.jsonl", step) if is_main else None

    def record(kind: str, **values: Any) -> None:
        if log and lock:
            check_lock(lock)
            log.write(kind, step, tokens=tokens_seen, **values)

    if log:
        record(
            "start", seconds=seconds_trained, total_steps=total_steps, world_size=world_size, device=describe(device),
            precision=precision, parameters=n_parameters, commit=code_version(),
        )  # fmt: skip
        log.trackers = start_trackers(accelerator, config, step)

    @torch.compiler.set_stance("force_eager")  # its other shapes, and those of the sample, are not worth compiling
    def validate() -> float:
        """Mean held-out loss over all datasets; logs each dataset's and what is written after each prompt."""
        with accelerator.autocast():
            scores = validation_scores(accelerator, model, held_out, token_byte_length, config.eval.batch_size)
        for name, s in scores.items() if len(held_out) > 1 else [*scores.items()][:1]:
            say(
                f"  held out {name:<12} loss {s['loss']:.4f} +- {shown(s['loss_se'], '.4f')} | bits/byte "
                f"{s['bits_per_byte']:.4f} +- {shown(s['bits_per_byte_se'], '.4f')} | top-1 {s['top1']:.1%}"
            )
        mix = data.mix()
        say(f"  mix so far   {', '.join(f'{name} {share:.2%}' for name, share in mix.items())}")
        finite, samples = math.isfinite(scores["all"]["loss"]), []
        if finite and (is_main or c.fsdp):  # a divided model runs in all processes; the same seed gives them one text
            settings = dataclasses.replace(config.generation, max_tokens=config.eval.sample_tokens, num_samples=1)
            with accelerator.autocast():
                decode = by_module(model) if c.fsdp else decode_step(model)
                for prompt in config.eval.prompts:
                    samples += [prompt + generate_text(model, prompt, tokenizer, settings, decode)[0]]
                    say(f"  sample       {' '.join(samples[-1].split())[:84]}")
        record("validation", datasets=scores, mix=mix, samples=samples, seconds=seconds_trained)
        if not finite:
            raise NonFiniteError(
                f"the held-out loss is {scores['all']['loss']} at step {step}, which is not saved. Continue from "
                f"the last checkpoint with --resume, or start anew with a lower --train.lr"
            )
        if is_main:
            plot_loss(run_dir)
        return scores["all"]["loss"]

    def save() -> None:
        """A checkpoint of this step by the main process, with every process's data position."""
        nonlocal saved_step, last_save
        started = time.perf_counter()
        positions = gather_object([position])
        tensors = gather_tensors(model, optimizers, keep=is_main)
        if lock:
            check_lock(lock)
            data_state = {**position, "streams": {k: v for p in positions for k, v in p["streams"].items()}}
            state = {
                "step": step, "total_steps": total_steps, "epochs": epochs or 0, "rows_per_step": rows_per_step,
                "tokens_seen": tokens_seen, "seconds_trained": seconds_trained,
                "recent_losses": [*recent_losses], "undone": undone,
                "first_data_step": first_data_step, "data": data_state,
            }  # fmt: skip
            path = save_checkpoint(run_dir, step, tensors, state, config, tokenizer, val_loss)
            write_status(run_dir, "running", step)
            say(f"  saved    {path}")
            record("checkpoint", seconds=round(time.perf_counter() - started, 3))
        accelerator.wait_for_everyone()
        saved_step, last_save = step, time.perf_counter()

    def watch() -> None:
        """From now on, all threads' stacks and the end of the process if it is not called again in time."""
        if c.hang_minutes:  # a thread in C: it does not wait for Python's lock, which may be what hangs
            faulthandler.dump_traceback_later(60 * c.hang_minutes, exit=True, file=sys.__stderr__ or 2)

    # ---- the loop ---------------------------------------------------------------------------
    progress.reset(total_steps)
    progress.update(step)
    meter = Meter()
    position, val_loss = data.state_dict(), newest.val_loss if newest else None
    max_grad_norm = c.max_grad_norm or math.inf
    outcome = "complete"
    while c.max_steps == 0 or step < c.max_steps:  # epochs end by themselves: total_steps is about where
        watch()
        step_started = time.perf_counter()
        waited = data.seconds_waited
        batch = next(data, None) or data.empty_batch()  # its documents are used up; other processes' may not be
        save_is_due = c.save_minutes > 0 and step_started - last_save > 60 * c.save_minutes
        sums: list[Any] = [batch.n_targets, stop_signal.received, save_is_due]
        if world_size > 1:  # one process need not wait for its GPU, still busy with the step before
            sums = accelerator.reduce(torch.tensor(sums, device=device), "sum").tolist()
        n_targets, stop, save_is_due = sums
        if stop or n_targets == 0:
            outcome = "stopped" if stop else "complete"
            break

        factor = lr_factor_at(step, total_steps, warmup_steps, c)
        set_learning_rates(optimizers, factor)

        # Gradients of the mean loss per token of the whole step: micro-steps and processes count by their tokens.
        # (DDP and FSDP take the mean over processes, hence the factor world_size.)
        nats = torch.zeros((), device=device)
        micro_batches = list(batch.split(c.batch_size))
        for i, (inputs, targets) in enumerate(micro_batches):
            x, y = to_device(inputs, device), to_device(targets, device)  # (B, T) each
            # The processes exchange gradients at the last one; under FSDP at each, or every device would hold all.
            exchange = i == len(micro_batches) - 1 or c.fsdp
            with contextlib.nullcontext() if exchange else accelerator.no_sync(trained):
                with accelerator.autocast():  # under FSDP accelerate does not wrap it
                    micro_nats = trained(x, y)
                accelerator.backward(micro_nats * (world_size / n_targets))
            nats += micro_nats.detach()

        # Both are launched before .item() waits for the GPU.
        nats, norm = accelerator.reduce(nats, "sum"), accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        loss, grad_norm = nats.item() / n_targets, float(norm)
        # fp16's scaled loss gives infinite gradients as a matter of course: then the scale is halved and all optimizers
        # leave the step out; infinite with a scale below 1 they are broken. (accelerate's own step would take the scale
        # out of the second one's gradients twice.)
        finite, scaler = math.isfinite(grad_norm), accelerator.scaler
        broken = not math.isfinite(loss) or not (finite or (scaler and scaler.get_scale() >= 1))
        usual_loss = statistics.median(recent_losses) if len(recent_losses) >= 10 else math.inf
        spiked = c.max_spike and (broken or loss > usual_loss + c.max_spike)
        if spiked and is_main:
            for line in put_damaged_aside(run_dir):
                complain(line)
        if spiked and (back := newest_for_all(accelerator, run_dir)):
            undone[back.step] += 1
            if undone[back.step] > 3:
                raise NonFiniteError(
                    f"loss {loss:.3f} at step {step + 1}, the fourth spike since the checkpoint of step {back.step}; "
                    f"other documents do not help: start anew with a lower --train.lr"
                )
            say(
                f"  undone   loss {loss:.3f} at step {step + 1}, usually {usual_loss:.3f}: back to step {back.step}, "
                f"and on behind the documents that led here and those of {10 ** undone[back.step]} further steps"
            )
            for _ in range(10 ** undone[back.step]):  # what is odd is seldom odd in one batch only
                next(data, None)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            if scaler:  # with the scale that a run begins with: a spike may have shrunk it to nothing
                scaler.update(2.0**16)
            load_training_state(back.path, model, optimizers)
            state = read_state(back.path)
            step, tokens_seen, seconds_trained = state["step"], state["tokens_seen"], state["seconds_trained"]
            recent_losses = deque(state["recent_losses"], recent_losses.maxlen)
            progress.reset(total_steps)
            progress.update(step)
            position, val_loss = data.state_dict(), back.val_loss
            if log:  # without the lines of the steps that are undone
                log = MetricsFile(run_dir / "metrics.jsonl", step, log.trackers)
            record("undone", loss=loss, usual_loss=usual_loss, seconds=seconds_trained)
            accelerator.wait_for_everyone()  # until all have read it
            save()  # so that a resume leaves these documents out as well
            continue
        if broken:
            suspects = name_suspects(run_dir, step + 1, accelerator, model, batch, data, token_byte_length)
            raise NonFiniteError(
                f"loss {loss}, gradient norm {grad_norm} at step {step + 1}; this step was neither applied nor saved. "
                f"{suspects}. Start anew with a lower --train.lr; or, where a few documents are to blame, go on from "
                f"the last checkpoint and skip them: --resume --train.max_spike 1"
            )
        recent_losses.append(loss)
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            # DDP keeps them as parts of the buckets that it sends; set to None, they would be made anew, and copied.
            optimizer.zero_grad(set_to_none=world_size == 1 or c.fsdp)
        if scaler:
            scaler.update()

        step += 1
        tokens_seen += n_targets
        position = data.state_dict()
        seconds = time.perf_counter() - step_started
        seconds_trained += seconds
        if step > first_step + 1:  # the first one compiles what is left to compile
            meter.add(n_targets, seconds, data.seconds_waited - waited)
        progress.update()
        is_end = step == c.max_steps
        if step % c.log_every == 0 or step in (first_step + 1, first_step + 4) or is_end:  # the fourth has an eta
            values = {"loss": loss, "lr": c.lr * factor, "grad_norm": grad_norm, **meter.read()}
            if peak:  # the share of all devices' peak that the model's own products had
                values["mfu"] = values["tokens_per_second"] * flops_per_token / (peak * world_size)
            say(log_line(step, total_steps, values, tokens_per_step, meter.pauses_left(step, total_steps)))
            record("train", **values, seconds=seconds_trained)
        watch()
        val_loss = meter.pause(c.eval_every, validate) if step % c.eval_every == 0 or is_end else None
        if step % c.save_every == 0 or is_end or save_is_due:
            watch()
            meter.pause(c.save_every, save)

    # ---- the end ------------------------------------------------------------------------------
    data.close()
    progress.close()
    watch()
    not_validated = outcome == "complete" and step > 0 and val_loss is None  # the last epoch ended it
    if not_validated:
        val_loss = validate()
    if saved_step < step or not_validated:
        save()
    if is_main:
        write_status(run_dir, outcome, step, exit_code=STOPPED if outcome == "stopped" else 0)
        if outcome == "stopped" and step > first_step:
            plot_loss(run_dir)  # with the steps since the last validation
    elapsed = duration(time.perf_counter() - started)
    say(f"{outcome} at step {step}: {amount(tokens_seen)} tokens, this time in {elapsed}")
    if outcome == "stopped":
        say(f"{'everything is saved' if step else 'no step was done'}; run the same command with --resume to continue")
    accelerator.end_training()
    faulthandler.cancel_dump_traceback_later()
    if lock:
        lock.close()
    return STOPPED if outcome == "stopped" else 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
