"""Show one run, or several side by side:  python scripts/report.py checkpoints/demo [another run ...]

Writes report.html into the run's folder, of several runs compared.html into the first one's (or to --output): one page
that opens in any browser, without a network.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from any folder

from config import Config, parse_arguments
from errors import ConfigError, exit_code_of

POINTS = 1500  # of a line at most: about as many as a chart has pixels
SAMPLES = 100  # of a run at most
COLOURS = 7  # --c0 to --c6 of templates/report.html; more are not told apart
DASHES = ("solid", "dashed", "dotted", "dotdash", "dashdot")
MARKS = {  # upright lines
    "restart": "dashed", "checkpoint": "dotted", "spike undone, back to here": "dotdash",
    "loss that is not finite": "solid",
}  # fmt: skip

_TIME = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0}
X_AXES = {  # columns to draw against: what they are, and their units
    "tokens": ("tokens", {"": 1.0, "thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}),
    "trained": ("time in training steps", _TIME),
    "clock": ("time since the first record", _TIME),
}
OF_TRAINING = {  # columns of the training records: title, axis, factor
    "lr": ("Learning rate", "learning rate", 1),
    "grad_norm": ("Gradient norm", "norm before clipping", 1),
    "tokens_per_second": ("Throughput", "tokens per second", 1),
    "mfu": ("Model FLOPs utilisation", "% of the devices' peak", 100),
    "data_wait": ("Waiting for data", "% of the time", 100),
}
Columns = dict[str, np.ndarray]  # (n,) each
Records = list[dict[str, Any]]


@dataclass
class Arguments:
    """A page of runs: losses, speed, samples, settings. A run that is under way may be looked at too."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, such as checkpoints/demo
    # the page; empty: report.html in the run's folder, of several runs compared.html in the first one's
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = ""


@dataclass
class Run:
    """What is shown of a run."""

    label: str
    settings: dict[str, str]  # "train.lr" -> "0.02"
    status: dict[str, Any]
    last: dict[str, Any]  # record of training or validation
    scores: dict[str, Any]  # the last held-out ones, of all datasets together
    starts: Records
    checkpoints: Records
    evals: dict[str, dict[str, Any]]  # by file
    samples: Records
    notes: list[str]
    train: Columns
    held: dict[str, Columns]  # held-out scores by dataset; "all" is of all of them
    marks: dict[str, Columns]  # where upright lines are drawn

    def columns(self) -> list[Columns]:
        return [self.train, *self.held.values(), *self.marks.values()]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(Arguments, argv)
    folders = [Path(run).expanduser() for run in arguments.runs]
    if not 0 < len(folders) <= COLOURS:
        raise ConfigError(
            f"{len(folders)} runs are given; name the folders of 1 to {COLOURS}, such as checkpoints/demo"
        )
    default = folders[0] / ("report.html" if len(folders) == 1 else "compared.html")
    output = Path(arguments.output).expanduser() if arguments.output else default
    names = [folder.resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    runs = [load_run(folder, label) for folder, label in zip(folders, labels, strict=True)]

    from bokeh.embed import components
    from bokeh.resources import Resources

    from metrics import duration
    from pages import write_page

    axes = scale_axes(runs)
    script, charts = components(draw(runs, axes))
    compared = [run.settings for run in runs]
    if len(runs) == 1:
        compared.append(flat(Config().to_dict()))
    settings = {key: [s.get(key, "-") for s in compared] for run in runs for key in run.settings}
    write_page(
        output, "report.html", title=", ".join(labels), runs=runs, axes=axes, charts=charts, script=script,
        library=Resources(mode="inline", components=["bokeh"]).render_js(), settings=settings,
        differing={key: values for key, values in settings.items() if len(set(values)) > 1},
        marks="; ".join(f"{MARKS[k]}: a {k}" for k in MARKS if any(k in run.marks for run in runs)),
        number=number, duration=duration, clock=lambda time: f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC",
        median=lambda column: number(float(np.nanmedian(column)) if np.isfinite(column).any() else None),
    )  # fmt: skip
    print(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0


def load_run(folder: Path, label: str) -> Run:
    """Everything a run has left so far. Raises ConfigError where no step was logged."""
    from metrics import read_metrics

    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; give the folder of a run, such as checkpoints/demo")
    records, notes = read_metrics(path), []
    kinds = "start", "train", "validation", "undone"
    starts, steps, validations, undone = ([r for r in records if r.get("kind") == kind] for kind in kinds)
    if not steps and not validations and (runs := sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))):
        raise ConfigError(f"{folder} is no run but has some; name one or more: {', '.join(runs)}")
    if not steps and not validations:
        raise ConfigError(f"{path} holds no logged step; give the folder of a run, such as checkpoints/demo")
    if damaged := len(path.read_text(errors="replace").splitlines()) - len(records):
        notes.append(f"{damaged:,} damaged lines of metrics.jsonl are left out.")

    began = float(np.fmin.reduce(column(records, "time")))
    train = positions(steps, began) | {"loss": column(steps, "loss")}
    train |= {name: factor * column(steps, name) for name, (_, _, factor) in OF_TRAINING.items()}
    names = dict.fromkeys(name for r in validations for name in r.get("datasets", ()))
    held = {name: held_out(validations, name, began) for name in names}
    if sources := [columns for name, columns in held.items() if name != "all"]:
        # The bytes of the text trained on are not counted: taken is the held-out text's number per token, by the mix.
        mix, density = (np.array([columns[key][-1] for columns in sources]) for key in ("mix", "bytes_per_token"))
        train["bits_per_byte"] = train["loss"] / math.log(2) / ((mix * density).sum() / mix.sum())
        held = held if len(sources) > 1 else {"all": held["all"]}  # a single one is the same as all

    losses = [*train["loss"], *(held["all"]["loss"] if held else ())]
    if broken := [r for r, loss in zip(steps + validations, losses, strict=True) if math.isnan(loss)]:
        notes.append(f"{len(broken):,} logged losses are not finite, the first at step {broken[0]['step']:,}.")
    if (size := math.ceil(len(steps) / POINTS)) > 1:
        notes.append(
            f"{len(steps):,} logged steps are drawn as {math.ceil(len(steps) / size):,} points: each is the mean of "
            f"{size}, and the band around the line goes from the least to the greatest."
        )
    samples = [r for r in validations if r.get("samples")]
    kept = samples[:: math.ceil(len(samples) / SAMPLES) or 1]
    if len(kept) < len(samples):
        notes.append(f"{len(kept)} of {len(samples):,} samples are shown, evenly spaced.")

    last = [r for r in records if r.get("kind") in ("train", "validation")][-1]
    checkpoints = [c for file in sorted(folder.glob("step-*/manifest.json")) if (c := read_json(file))]
    known, saved = train if steps else held["all"], [c["step"] for c in checkpoints]
    marks = {
        "restart": positions([s for s in starts if s["step"] > 0], began),
        "checkpoint": {x: np.interp(saved, known["step"], known[x]) for x in ("step", *X_AXES)},
        "spike undone, back to here": positions(undone, began),
        "loss that is not finite": positions(broken, began),
    }
    return Run(
        label, flat(read_json(folder / "config.json")), read_json(folder / "status.json"), last,
        validations[-1]["datasets"]["all"] if validations else {}, starts, checkpoints,
        {file.name: read_json(file) for file in sorted(folder.glob("eval*.json"))}, kept, notes,
        thinned(train), {name: thinned(columns) for name, columns in held.items()},
        {kind: columns for kind, columns in marks.items() if len(columns["step"])},
    )  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """Empty if there is no such file, as in a run that has just begun. Raises ConfigError if it is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it, or copy it again") from None


def flat(config: dict[str, Any]) -> dict[str, str]:
    """{"train": {"lr": 1}} as {"train.lr": "1"}."""
    groups = {group: values for group, values in config.items() if isinstance(values, dict)}
    return {f"{g}.{k}": json.dumps(v, ensure_ascii=False) for g, values in groups.items() for k, v in values.items()}


def column(records: Records, *keys: str) -> np.ndarray:
    """(n,) numbers at record[key][key]...; NaN where there is none, or an infinite one."""
    numbers = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        numbers.append(value if isinstance(value, (int, float)) else math.nan)
    found = np.array(numbers, dtype=float)
    return np.where(np.isfinite(found), found, math.nan)


def positions(records: Records, began: float) -> Columns:
    """Where records stand on each x axis, in tokens and seconds."""
    names = {"step": "step", "tokens": "tokens", "trained": "seconds", "clock": "time"}
    found = {name: column(records, key) for name, key in names.items()}
    return found | {"clock": found["clock"] - began}


def held_out(validations: Records, name: str, began: float) -> Columns:
    """A dataset's held-out scores, with the band of one standard error."""
    columns = positions(validations, began) | {"mix": 100 * column(validations, "mix", name)}
    for score in ("loss", "bits_per_byte"):
        value, error = (column(validations, "datasets", name, key) for key in (score, f"{score}_se"))
        columns |= {score: value, f"{score}_low": value - error, f"{score}_high": value + error}
    n_bytes, n_tokens = (column(validations, "datasets", name, key) for key in ("bytes", "tokens"))
    return columns | {"bytes_per_token": n_bytes / n_tokens}


def thinned(columns: Columns) -> Columns:
    """At most POINTS rows: the means of as many neighbours as it takes, with their least and their greatest."""
    n = len(columns["step"])
    if n <= POINTS:
        return columns
    size = math.ceil(n / POINTS)
    first, thin = np.arange(0, n, size), {}
    for name, values in columns.items():
        if name == "step" or name in X_AXES:
            thin[name] = values[np.minimum(first + size // 2, n - 1)]
        elif not name.endswith(("_low", "_high")):
            known = np.isfinite(values)
            with np.errstate(invalid="ignore"):  # where none of them is a number, neither is their mean
                thin[name] = np.add.reduceat(np.where(known, values, 0), first) / np.add.reduceat(known * 1, first)
            thin[f"{name}_low"] = np.fmin.reduceat(columns.get(f"{name}_low", values), first)
            thin[f"{name}_high"] = np.fmax.reduceat(columns.get(f"{name}_high", values), first)
    return {name: values.astype(np.float32) for name, values in thin.items()}


def scale_axes(runs: list[Run]) -> dict[str, str]:
    """Divide tokens and seconds by a unit that suits all runs; returns the title of each x axis."""
    titles = {}
    for axis, (title, units) in X_AXES.items():
        greatest = max(float(np.nanmax(c[axis], initial=1)) for run in runs for c in run.columns())
        name = [name for name, unit in units.items() if unit <= greatest][-1]
        titles[axis] = f"{title} ({name})" if name else title
        for columns in (c for run in runs for c in run.columns()):
            columns[axis] = columns[axis] / units[name]
    return titles


def draw(runs: list[Run], axes: dict[str, str]) -> dict[str, Any]:
    """Bokeh's figures by title. The tags of what is drawn, its run and colour, are for the page, which paints it."""
    from bokeh.models import ColumnDataSource, HoverTool, Range1d
    from bokeh.models.annotations import Legend
    from bokeh.plotting import figure

    several, x_range, charts = len(runs) > 1, Range1d(), {}  # the page sets the ranges
    names = [r.label if len(r.label) < 30 else f"{i + 1}: ...{r.label[-20:]}" for i, r in enumerate(runs)]
    sources = {id(columns): ColumnDataSource(columns) for run in runs for columns in run.columns()}

    def chart(title: str, y: str, axis: str, lines: list[tuple[int, str, Columns]]) -> None:
        """lines: the number of the run, what is drawn of it, and the columns that have it."""
        lines = [line for line in lines if y in line[2] and np.isfinite(line[2][y]).any()]
        if not lines:
            return
        plot: Any = figure(
            name=title, height=330, sizing_mode="stretch_width", x_range=x_range, y_range=Range1d(), y_axis_label=axis,
            y_axis_type="log" if y == "grad_norm" else "linear", tools="xbox_zoom,xpan,xwheel_zoom,reset,save",
            active_drag="xbox_zoom", active_scroll=None, background_fill_color=None, border_fill_color=None,
            outline_line_color=None,
        )  # fmt: skip
        style: dict[str, Any] = {"ncols": 2, "location": "left", "spacing": 16, "margin": 0, "padding": 4}
        plot.add_layout(Legend(click_policy="hide", visible=len(lines) > 1, **style), "above")
        kinds, pointed = list(dict.fromkeys(kind for _, kind, _ in lines)), []
        for run, kind, columns in lines:
            label = ": ".join([names[run]] * several + [kind] * (len(kinds) > 1 or not several))
            place, of_training = kinds.index(kind), kind == "training"
            style = {"source": sources[id(columns)], "legend_label": label, "name": label}
            style["tags"] = [run, run if several else place]
            if f"{y}_low" in columns:
                plot.varea("tokens", f"{y}_low", f"{y}_high", fill_alpha=0.2, **style)
            dash = DASHES[place % len(DASHES)] if several and kind not in ("training", "held out") else "solid"
            width = 1 if of_training and len(kinds) > 1 else 2
            pointed.append(plot.line("tokens", y, line_width=width, line_dash=dash, **style))
            if len(columns["step"]) <= (2 if of_training else 60):
                pointed.append(plot.scatter("tokens", y, size=6, **style))
        for i, each in enumerate(runs):
            for kind in each.marks if title == "Loss" else each.marks.keys() & {"restart"}:
                style = {"source": sources[id(each.marks[kind])], "line_dash": MARKS[kind], "name": kind}
                plot.vspan("tokens", tags=[i, i if several else -1], **style)
        where = [("step", "@step{0,0}"), *((name, f"@{x}{{0,0.[000]}}") for x, name in axes.items())]
        plot.add_tools(HoverTool(renderers=pointed, tooltips=[("", "$name"), *where, (axis, f"@{y}{{0,0.[00000]}}")]))
        plot.toolbar.logo = None
        charts[title] = plot

    of_training = [(i, "training", run.train) for i, run in enumerate(runs)]
    held_out = [(i, name, columns) for i, run in enumerate(runs) for name, columns in run.held.items()]
    overall = of_training + [(i, "held out", columns) for i, name, columns in held_out if name == "all"]
    by_source = [line for line in held_out if line[1] != "all"]
    for of, lines in {"": overall, ", held out, by source": by_source}.items():
        chart(f"Loss{of}", "loss", "nats per token", lines)
        chart(f"Bits per byte{of}", "bits_per_byte", "bits per byte", lines)
    for name, (title, axis, _) in OF_TRAINING.items():
        chart(title, name, axis, of_training)
    chart("Mix so far", "mix", "% of what is trained on", by_source)
    return charts


def number(value: Any, error: Any = None) -> str:
    """A value for people, with its standard error if there is one."""
    if isinstance(value, float) and isinstance(error, float) and 0 < error < math.inf:
        digits = max(0, 1 - math.floor(math.log10(error)))
        return f"{value:,.{digits}f} ± {error:.{digits}f}"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
