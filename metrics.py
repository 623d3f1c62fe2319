"""What is measured, and how it is shown: validation, the log line, metrics.jsonl and the loss picture."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import complain
from files import whole_file

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Sums over tokens of the same document in a batch, each (parts,): enough for means and their standard errors."""

    document: np.ndarray  # its number, that of all its parts
    nats: np.ndarray  # summed cross-entropy
    tokens: np.ndarray  # predicted tokens
    bytes: np.ndarray  # bytes of text that these tokens stand for
    top1: np.ndarray  # tokens that the model ranked first
    top5: np.ndarray  # tokens among the model's first five

    @staticmethod
    def concatenate(scores: list[Score]) -> Score:
        return Score(*(np.concatenate([getattr(s, f) for s in scores]) for f in Score.__dataclass_fields__))

    def of_documents(self) -> Score:
        """The same with one part for each document."""
        document, which = np.unique(self.document, return_inverse=True)
        sums = (np.bincount(which, getattr(self, f)) for f in Score.__dataclass_fields__ if f != "document")
        return Score(document, *sums)


def means_and_errors(datasets: Sequence[Score]) -> dict[str, float]:
    """Means over all tokens of these datasets, with their standard errors (name + "_se"), which are of documents: the
    tokens of one document are no independent sample.

    loss: nats per token; bits_per_byte: nats / ln 2 per byte of text, comparable across tokenizers.
    """
    scores = [score.of_documents() for score in datasets]
    tokens = [s.tokens for s in scores]
    loss, loss_se = ratio([s.nats for s in scores], tokens, tokens)
    bits, bits_se = ratio([s.nats / math.log(2) for s in scores], [s.bytes for s in scores], tokens)
    top1, top1_se = ratio([s.top1 for s in scores], tokens, tokens)
    top5, top5_se = ratio([s.top5 for s in scores], tokens, tokens)
    perplexity = math.inf if loss >= 700 else math.exp(loss)
    return {
        "loss": loss, "loss_se": loss_se, "perplexity": perplexity, "perplexity_se": perplexity * loss_se,
        "bits_per_byte": bits, "bits_per_byte_se": bits_se, "top1": top1, "top1_se": top1_se, "top5": top5,
        "top5_se": top5_se, "documents": sum(map(len, tokens)), "tokens": int(sum(n.sum() for n in tokens)),
        "bytes": int(sum(s.bytes.sum() for s in scores)),
    }  # fmt: skip


def ratio(
    numerators: Sequence[np.ndarray], denominators: Sequence[np.ndarray], sizes: Sequence[np.ndarray]
) -> tuple[float, float]:
    """sum / sum over independent documents of each dataset, and its standard error.

    sizes: of the documents, what each dataset has a fixed amount of, tokens or bytes. By the delta method, of documents
    drawn until it has so much (Cochran, Sampling Techniques, 1977, chapter 6): how the datasets differ is no error. NaN
    where one has a single document.
    """
    total, variance = sum(d.sum() for d in denominators), 0.0
    value = sum(x.sum() for x in numerators) / total
    for numerator, denominator, size in zip(numerators, denominators, sizes, strict=True):
        n = len(numerator)
        above = numerator - value * denominator
        residuals = above - above.sum() / size.sum() * size  # about what the dataset's documents of such sizes have
        variance += n / (n - 1) * np.square(residuals).sum() if n > 1 else math.nan
    return float(value), math.sqrt(variance) / float(total)


def shown(value: float | None, form: str) -> str:
    """A number as it is shown, "-" where there is none: NaN, or null of a JSON file."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Of independent values: their mean and its standard error (NaN for a single one)."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def paired(these: str, others: str) -> tuple[float, float, float]:
    """(others - these, its standard error, p) of the same documents' results "0110...".

    p: McNemar's exact test, that of the documents on which the two differ each has as many right.
    """
    differences = [int(b) - int(a) for a, b in zip(these, others, strict=True)]
    n, fewer = sum(map(abs, differences)), min(differences.count(1), differences.count(-1))
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    return *mean_and_error(differences), p


Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # of documents that two models read: bytes, nats of the one, the other


def pair_of(these: dict[str, list[float]], others: dict[str, list[float]]) -> Pair | None:
    """Two models' results {"nats", "bytes"} of the same documents; None where these are others, or other parts of them.

    Where tokenizers or contexts differ the last documents may be cut off elsewhere, and are left out.
    """
    a, b = these["bytes"], others["bytes"]
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if n < max(1, min(len(a), len(b)) - 1):
        return None
    return np.array(a[:n]), np.array(these["nats"][:n], dtype=float), np.array(others["nats"][:n], dtype=float)


def paired_bits(datasets: Sequence[Pair]) -> tuple[float, float, float, float, float]:
    """(bits per byte of the one, of the other, others - these, its standard error over documents, p)."""
    n_bytes = [pair[0] for pair in datasets]
    this, other = (ratio([pair[i] / math.log(2) for pair in datasets], n_bytes, n_bytes)[0] for i in (1, 2))
    differences = [(pair[2] - pair[1]) / math.log(2) for pair in datasets]
    return this, other, *ratio(differences, n_bytes, n_bytes), randomization_test(differences, n_bytes)


def randomization_test(differences: Sequence[np.ndarray], sizes: Sequence[np.ndarray]) -> float:
    """How likely chance makes the sum of independent documents' differences as large, in its standard errors.

    Which of two models is which is drawn anew for each document (Fisher, The Design of Experiments, 1935), which holds
    for few documents, too. Of 9,999 draws, so that the least p is 0.0001. NaN where a dataset has a single document, or
    a difference is not finite.
    """
    value, error = ratio(differences, sizes, sizes)
    if math.isnan(error):
        return math.nan
    draw, found = np.random.default_rng(0), 1
    for _ in range(9999):
        exchanged = [d * (2 * draw.integers(0, 2, len(d)) - 1) for d in differences]
        drawn_value, drawn_error = ratio(exchanged, sizes, sizes)
        found += abs(drawn_value) * error >= abs(value) * drawn_error * (1 - 1e-9)  # errors may be 0
    return found / 10_000


def diversity(texts: list[str]) -> dict[str, float]:
    """repetition: the share of a text's 4-grams of words that it had before (arXiv:1908.04319), the texts' mean.
    distinct_1, distinct_2: of the words, and pairs of words, of all texts the different ones (arXiv:1510.03055)."""

    def different(n: int, texts: list[str]) -> float:
        grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
        return len(set(grams)) / len(grams) if grams else 1.0

    repetition = 1 - sum(different(4, [text]) for text in texts) / len(texts)
    return {"repetition": repetition, "distinct_1": different(1, texts), "distinct_2": different(2, texts)}


def rows_to_score(batch_size: int, length: int, n_vocab: int) -> int:
    """batch_size, or fewer if the rows' logits were more than 2^27 numbers: half a gigabyte, and copies of it."""
    return min(batch_size, max(1, 2**27 // (length * n_vocab)))


@torch.inference_mode()
def score_rows(
    model: Callable[[Tensor], Tensor],
    rows: np.ndarray,
    token_byte_length: Tensor,
    batch_size: int,
    documents: np.ndarray | None = None,
) -> Score:
    """Score each token of packed rows (N, T+1), given those before it in its row.

    model: ids (B, T) -> logits (B, T, V). token_byte_length (n_vocab,) on the model's device. documents (N, T): the
    number of each target's; None: each row is one.
    """
    if documents is None:
        documents = np.broadcast_to(np.arange(len(rows))[:, None], rows[:, 1:].shape)
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(token_byte_length.device)
        targets = batch[:, 1:]  # (B, T)
        logits = model(batch[:, :-1])  # (B, T, V)
        best = logits.topk(min(5, logits.size(2)), dim=2).indices == targets[..., None]  # (B, T, 5); of ties some
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
        values = nats, torch.ones_like(nats), token_byte_length[targets], best[:, :, 0], best.any(dim=2)
        document, which = np.unique(documents[start : start + batch_size], return_inverse=True)
        # The sums are float64, which MPS does not have.
        parts.append([document, *(np.bincount(which.ravel(), v.cpu().numpy().ravel()) for v in values)])
    return Score(*(np.concatenate(sums) for sums in zip(*parts, strict=True)) if parts else np.zeros((6, 0)))


def without_nan(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have: such as the standard error of one row."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each step's once; and what trackers of accelerate show of it.

    Opened at `step` after a resume, it drops what a lost continuation had written beyond that step.
    """

    def __init__(self, path: Path, step: int, trackers: Sequence[GeneralTracker] = ()):
        self.path, self.trackers = path, list(trackers)
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step > 0 else []
        with whole_file(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append {"kind", "step", "time" (seconds since the epoch), ...} and hand it to the system at once."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        try:
            with self.path.open("a") as file:  # each time: whoever removes the file loses no line that is to come
                file.write(json.dumps(without_nan(record), allow_nan=False) + "\n")
        except OSError as error:
            error.filename = str(self.path)
            raise
        for tracker in [*self.trackers] if kind in ("train", "validation") else []:
            try:
                tracker.log(_flat(values, kind), step=step)
            except Exception as error:  # a network, a service, a disk of others: the run goes on
                complain(f"warning: {tracker.name} shows no more of this run: {error}")
                self.trackers.remove(tracker)


def _flat(values: dict[str, Any], prefix: str) -> dict[str, float | str]:
    """{"datasets": {"all": {"loss": 1.0}}} -> {"validation/datasets/all/loss": 1.0}, as trackers want it."""
    found: dict[str, float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}/{key}")
        elif isinstance(value, list):
            found[f"{prefix}/{key}"] = "\n\n".join(value)
        else:
            found[f"{prefix}/{key}"] = value
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none if there is no such file. Lines cut by a kill or a full disk are dropped."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def read_results(path: Path) -> dict[str, Any]:
    """What evals.py wrote to eval-*.json; empty if there is nothing."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        results = {}
    return results if isinstance(results, dict) and isinstance(results.get("tasks"), dict) else {}


def code_version() -> str | None:
    """The commit of this code, with "-dirty" when files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # not of a repository around this one
    try:
        shown = subprocess.run(git, env=environment, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return shown.stdout.strip() or None


class Meter:
    """Speed between two log lines, and the time that validation and checkpoints take."""

    def __init__(self) -> None:
        self._pauses: dict[str, tuple[int, float]] = {}  # every how many steps, and the seconds of the last one
        self._start()

    def _start(self) -> None:
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, waited: float) -> None:
        """One step's tokens, its seconds, and how many of them it waited for data."""
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited

    def pause(self, every: int, work: Callable[[], T]) -> T:
        """Run work(), which comes every so many steps and at the end, and note its seconds under its name."""
        started = time.perf_counter()
        result = work()
        self._pauses[work.__name__] = every, time.perf_counter() - started
        return result

    def pauses_left(self, step: int, total_steps: int) -> float:
        """Seconds of pauses from the one behind `step` on, each as long as the last of its kind, if there was one.

        Behind total_steps, which a run by epochs may pass: that of its end.
        """
        last = max(step, total_steps)
        left = [(-(-last // every) - (step - 1) // every, seconds) for every, seconds in self._pauses.values()]
        return sum(n * seconds for n, seconds in left)

    def read(self) -> dict[str, float]:
        """tokens_per_second and data_wait (a share of the time) since the last reading; NaN when there was no step."""
        seconds = self._seconds or math.nan
        values = {"tokens_per_second": self._tokens / seconds, "data_wait": self._waited / seconds}
        self._start()
        return values


def log_line(step: int, total_steps: int, values: dict[str, float], tokens_per_step: int, pauses_left: float) -> str:
    """One line, fixed order, for people and for grep. values: loss, lr, grad_norm, Meter.read's and, if known, mfu.

    total_steps: where the run is planned to end; one that ends with its last epoch may pass it a little.
    pauses_left: seconds (Meter.pauses_left at this step).
    """
    total_steps, speed = max(step, total_steps), values["tokens_per_second"]
    line = (
        f"step {step:>{len(str(total_steps))}}/{total_steps} {100 * step / total_steps:5.1f}%"
        f" | loss {values['loss']:.4f} | lr {values['lr']:.1e} | gnorm {values['grad_norm']:.2f}"
    )
    if math.isnan(speed):  # the first step of a process, which compiles: nothing to measure by
        return line
    mfu = f" | mfu {100 * values['mfu']:.0f}%" if "mfu" in values else ""
    seconds_left = (total_steps - step) * tokens_per_step / speed + pauses_left
    return (
        f"{line} | {speed / 1e3:.{1 if speed < 1e5 else 0}f}k tok/s{mfu} | data {100 * values['data_wait']:.0f}%"
        f" | eta {duration(seconds_left)}"
    )


def amount(tokens: int) -> str:
    """15,360 or 2.3M or 10.0B."""
    if tokens >= 999.95e6:  # 1000.0M, rounded
        return f"{tokens / 1e9:,.1f}B"
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens:,}"


def duration(seconds: float) -> str:
    """45s, 12m05s, 3h04m or 2d07h."""
    seconds = int(seconds + 0.5)
    days, hours, minutes = seconds // 86400, seconds // 3600, seconds // 60
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def plot_loss(run_dir: Path) -> None:
    """loss.png from metrics.jsonl: training loss, and validation loss of each dataset, against tokens."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    validations = [r for r in records if r["kind"] == "validation" and r["datasets"]["all"]["loss"] is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], color="0.6", linewidth=0.8, label="training")
    names = list(validations[-1]["datasets"]) if validations else []
    for name in names[:1] if len(names) == 2 else names:  # one dataset is the same as all
        points = [(r["tokens"], r["datasets"][name]) for r in validations if name in r["datasets"]]
        label = f"{name}, held out: {points[-1][1]['loss']:.3f} nats, {points[-1][1]['bits_per_byte']:.3f} bits/byte"
        axes.plot([x for x, _ in points], [y["loss"] for _, y in points], marker="o", label=label)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / "loss.png", dpi=110)
    plt.close(figure)
