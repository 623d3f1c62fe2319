"""Measure a trained model:  python evals.py <checkpoint>

Held-out loss, perplexity, bits per byte and top-1/top-5 accuracy of each dataset, with standard errors, and
samples for fixed prompts. The table is printed, and written with the samples to eval-<step>.json in the run's folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from config import EvalConfig, parse_arguments
from errors import ConfigError, complain, exit_code_of


@dataclass
class Arguments(EvalConfig):
    """Evaluate a checkpoint on the held-out documents of its own datasets, which it was never trained on."""

    checkpoint: tyro.conf.Positional[str] = tyro.MISSING  # a run's folder, or one of its step-* folders
    val_tokens: int = 0  # tokens of each dataset to evaluate on at most; 0: as many as in training's validation
    local_files: tuple[str, ...] = ()  # where the text of LOCAL is now; empty: where it was in training
    shards_dir: str = ""  # where the shards are now; empty: where they were in training
    output: str = ""  # where to write the results; empty: eval-<step>[-<val_tokens>].json in the run's folder

    def validate(self) -> None:
        super().validate()
        if self.val_tokens < 0:
            raise ConfigError(f"val_tokens is {self.val_tokens}; use 0 (as many as in training) or more")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(Arguments, argv)
    arguments.validate()

    output = Path(arguments.output).expanduser()
    if arguments.output and output.exists() and not output.is_file():
        raise ConfigError(f"--output {output} is not a file; name one to write or to replace")

    import torch
    from tqdm import tqdm

    from checkpoint import find_checkpoint, load_model, read_state
    from files import write_json
    from hardware import best_dtype, default_device, describe
    from metrics import Score, rows_to_score, score_rows, without_nan
    from prepare_data import DatasetPrep
    from sampling import generate_text

    device = default_device()
    path = find_checkpoint(Path(arguments.checkpoint)).resolve()  # of "." too: its name and folder are written
    model, tokenizer, config, step = load_model(path, device, best_dtype(device))
    data_config = dataclasses.replace(
        config.data,
        val_tokens=arguments.val_tokens or config.data.val_tokens,
        local_files=arguments.local_files or config.data.local_files,
        shards_dir=arguments.shards_dir or config.data.shards_dir,
    )
    data = DatasetPrep(data_config, config.model.max_length, config.data.n_streams, tokenizer=tokenizer)
    trained_on = read_state(path)["data"]["identity"]
    for name, value in data.identity().items():
        if trained_on.get(name) != value:
            complain(f"warning: {name} changed since training: what is held out now may have been trained on")
    token_byte_length = torch.from_numpy(tokenizer.token_byte_length).to(device)

    print(f"{path} | step {step:,} | {model.parameter_counts()['total'] / 1e6:.1f}M parameters | {describe(device)}\n")
    scores: dict[str, Score] = {}
    batch_size = rows_to_score(arguments.batch_size, model.config.max_length, model.config.vocab_size)
    for name, rows in data.validation_rows().items():
        batches = range(0, len(rows), batch_size)
        scores[name] = Score.concatenate(
            [
                score_rows(model, rows[i : i + batch_size], token_byte_length, batch_size)
                for i in tqdm(batches, desc=name, leave=False, disable=None)
            ]
        )
    if len(scores) > 1:
        scores["all"] = Score.concatenate(list(scores.values()))
    summaries = {name: score.summary() for name, score in scores.items()}
    print(table(summaries))
    settings = dataclasses.replace(config.generation, max_tokens=arguments.sample_tokens, num_samples=1)
    samples = {prompt: generate_text(model, prompt, tokenizer, settings)[0] for prompt in arguments.prompts}
    for prompt, text in samples.items():
        print(f"\n--- {prompt}\n{prompt}{text}")

    results: dict[str, Any] = {"checkpoint": path.name, "step": step, "held_out": summaries, "samples": samples}
    limited = f"-{arguments.val_tokens}" if arguments.val_tokens else ""
    output = output if arguments.output else path.parent / f"eval-{step:08d}{limited}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, without_nan(results))
    print(f"\nwritten to {output}")
    return 0


def table(summaries: dict[str, dict[str, float]]) -> str:
    """A line a dataset: value +- standard error."""
    columns = (
        ("loss", ".3f", 16), ("perplexity", ".1f", 17), ("bits_per_byte", ".4f", 17), ("top1", ".1%", 14),
        ("top5", ".1%", 14),
    )  # fmt: skip
    lines = [f"{'held out':<12}{'tokens':>10}" + "".join(f"{name.replace('_', ' '):>{n}}" for name, _, n in columns)]
    for dataset, s in summaries.items():
        cells = (f"{_number(s[name], form)} +- {_number(s[name + '_se'], form)}".rjust(n) for name, form, n in columns)
        lines.append(f"{dataset:<12}{s['tokens']:>10,}" + "".join(cells))
    return "\n".join(lines)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
