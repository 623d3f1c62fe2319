"""The pages of runs and of models, as a browser shows them: what they draw, both themes, any text, any length."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metrics
from config import Config
from errors import exit_code_of
from explain import LEVELS, explain, page_values, token_text
from pages import write_page
from scripts import report
from tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent.parent / "results/demo"
NASTY = (
    """</script><script>window.bad=1</script><img src=x onerror="bad=1">' " \\ \\u003c $$x$$ &amp; \u2028{{ 7*7 }}"""
)


def make_run(folder: Path, steps: int, validations: int = 0, sample: str = "It was", **status: Any) -> Path:
    """A run of so many logged steps, as train.py writes it: the loss is 9 / sqrt(step), with a spike at step 777."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        at = {"step": step, "time": 1.8e9 + step, "tokens": 1000 * step, "seconds": 0.9 * step}
        if step in (1, 60):
            how = {"world_size": 2, "device": "GPU", "precision": "bf16", "parameters": 10**7, "total_steps": 10**6}
            records.append(at | {"kind": "start", "step": step - 1, "commit": NASTY} | how)
        loss = 90 if step == 777 else 9 / math.sqrt(step)
        speed = {"tokens_per_second": None if step == 1 else 1e3, "data_wait": 0.01}
        records.append(at | {"kind": "train", "loss": loss, "lr": 0.01, "grad_norm": 1.5} | speed)
        if step == 70:
            records.append(at | {"kind": "undone", "loss": 9.9, "usual_loss": 1.1})
        if validations and step % (steps // validations) == 0:
            score = {"loss": loss, "loss_se": 0.1, "bits_per_byte": loss / 3, "bits_per_byte_se": 0.03}
            score |= {"tokens": 100, "bytes": 450}
            scores = {"datasets": dict.fromkeys(("A", "B", "all"), score), "mix": {"A": 0.7, "B": 0.3}}
            records.append(at | {"kind": "validation", "samples": [sample]} | scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps(Config().to_dict()))
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def write_report(*runs: Path, output: Path) -> Path:
    assert report.main([*map(str, runs), "-o", str(output)]) == 0
    return output


def test_the_end_of_a_run_between_two_logged_steps_is_that_of_its_last_validation(tmp_path: Path):
    folder = make_run(tmp_path / "run", 60, validations=1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    end = json.loads(lines[-1]) | {"step": 67, "tokens": 67_000}
    assert end["kind"] == "validation"
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(end)]) + "\n")
    assert report.load_run(folder, "run").last["step"] == 67


def test_results_of_single_documents_are_not_shown(tmp_path: Path):
    folder = make_run(tmp_path / "run", 60)
    scores = {"held_out": {"all": {"loss": 3.25}}, "by_document": {"A": [[1.5, 2.5]]}}
    (folder / "eval-00000060.json").write_text(json.dumps({"step": 60, **scores}))
    page = write_report(folder, output=tmp_path / "page.html").read_text()
    assert "<h3>held out</h3>" in page
    assert "by document" not in page


def test_many_lines_become_few_points_that_keep_mean_and_extremes(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=99_991)
    values[5], values[70_000] = np.nan, 1000
    steps = np.arange(99_991.0)
    thin = report.thinned(dict.fromkeys(("step", *report.X_AXES), steps) | {"loss": values})
    size = math.ceil(len(values) / report.POINTS)
    assert len(thin["loss"]) == math.ceil(len(values) / size) <= report.POINTS
    assert thin["loss_high"].max() == 1000
    assert thin["loss_low"].min() == pytest.approx(np.nanmin(values))
    assert thin["loss"][0] == pytest.approx(np.nanmean(values[:size]))
    assert thin["loss"][-1] == pytest.approx(values[size * (len(thin["loss"]) - 1) :].mean())
    assert ((thin["step"] // size) == np.arange(len(thin["step"]))).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda run: run.mkdir(), "holds no logged step; give the folder of a run"),
        (lambda run: None, "is not there; give the folder of a run"),
        (lambda run: make_run(run / "one", 3), "is no run but has some; name one or more: one"),
        (lambda run: (make_run(run, 3) / "status.json").write_text("{"), "status.json cannot be read"),
    ],
    ids=["empty", "missing", "runs", "damaged"],
)
def test_a_folder_without_a_run_is_one_line(
    tmp_path: Path, make: Callable[[Path], Any], words: str, capsys: pytest.CaptureFixture[str]
):
    make(tmp_path / "run")
    assert exit_code_of(lambda: report.main([str(tmp_path / "run")])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not (tmp_path / "run/report.html").exists()


def test_a_page_of_several_runs_leaves_that_of_the_first_one_alone(tmp_path: Path):
    one, other = (str(make_run(tmp_path / name, 3)) for name in ("one", "other"))
    assert report.main([one]) == report.main([one, other]) == 0
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*.html")} == {
        "one/report.html",
        "one/compared.html",
    }
    assert "other" not in (tmp_path / "one/report.html").read_text().partition("</title>")[0]


def test_a_start_names_the_commit_of_the_code_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "metrics.py"))
    assert metrics.code_version() is None
    git("init")
    (tmp_path / "metrics.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    assert metrics.code_version() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "metrics.py").write_text("2")
    assert metrics.code_version() == git("rev-parse", "--short=12", "HEAD") + "-dirty"
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(metrics, "__file__", str(tmp_path / "inner/metrics.py"))
    assert metrics.code_version() is None


# ---- in a browser -------------------------------------------------------------------------

CHARTS = """() => Object.fromEntries(Bokeh.documents[0].roots().map((chart) => [
    chart.name, Object.fromEntries(chart.renderers.map((r) => [`${r.glyph.type} ${r.name}`, r.data_source.length]))
]))"""
COLOURS = """() => Bokeh.documents[0].roots().map((chart) => [getComputedStyle(document.body).backgroundColor,
    chart.left[0].axis_label_text_color, JSON.stringify(chart.renderers[0].glyph.line_color)])"""
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-headless-shell") or shutil.which("google-chrome")
    if not program:
        pytest.skip("there is no chromium on PATH (Debian: apt install chromium-headless-shell)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file, without a network; the test fails for anything that the page complains of or asks for."""
    complaints: list[str] = []
    contexts = []

    def open_it(path: Path, dark: bool = False, width: int = 1280) -> Any:
        scheme = "dark" if dark else "light"
        contexts.append(
            browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", timeout=20_000)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is wider than the window"
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.slow
def test_a_report_draws_each_logged_point_of_a_real_run_in_both_themes(tmp_path: Path, open_page: Open):
    path = write_report(DEMO, output=tmp_path / "demo.html")
    page, dark = open_page(path), open_page(path, dark=True)
    records = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    steps, validations = (sum(r["kind"] == kind for r in records) for kind in ("train", "validation"))
    charts = page.evaluate(CHARTS)
    assert list(charts) == [
        "Loss", "Bits per byte", "Loss, held out, by source", "Bits per byte, held out, by source", "Learning rate",
        "Gradient norm", "Throughput", "Model FLOPs utilisation", "Waiting for data", "Mix so far",
    ]  # fmt: skip
    assert charts["Loss"]["Line training"] == charts["Throughput"]["Line training"] == steps
    assert charts["Loss"]["Line held out"] == charts["Mix so far"]["Line WIKI"] == validations
    for title in charts:
        assert page.locator(f"section:has(h3:text-is('{title}')) canvas").count() > 0
    ends = {}
    for axis in ("clock", "trained", "tokens"):
        page.check(f"#axis input[value={axis}]")
        ends[axis] = page.evaluate("Bokeh.documents[0].roots()[0].x_range.end")
    assert records[-1]["tokens"] / 1e6 <= ends["tokens"] < 1.2 * records[-1]["tokens"] / 1e6
    last = next(r for r in reversed(records) if r["kind"] == "validation")
    assert last["seconds"] / 60 <= ends["trained"] < 1.2 * last["seconds"] / 60
    assert ends["clock"] > 0.9 * (records[-1]["time"] - records[0]["time"]) / 60
    held_out = json.loads(next(DEMO.glob("eval-*.json")).read_text())["held_out"]["all"]
    assert f"{held_out['loss']:.3f} ± {held_out['loss_se']:.3f}" in page.inner_text("#summary")
    assert "The people of the United States" in page.inner_text("main")  # of its evaluation
    light, expected = page.evaluate(COLOURS), dark.evaluate(COLOURS)
    assert light[0][0] == "rgb(255, 255, 255)"
    assert all(one != other for one, other in zip(light[0], expected[0], strict=True))
    page.check("#theme input[value=dark]")
    assert page.evaluate(COLOURS) == expected
    page.check("#theme input[value=system]")
    assert page.evaluate(COLOURS) == light


@pytest.mark.slow
def test_a_hundred_thousand_lines_stay_small_and_open_at_once(tmp_path: Path, open_page: Open):
    path = write_report(make_run(tmp_path / "month", 100_000, 200), output=tmp_path / "month.html")
    assert path.stat().st_size < 3e6
    started = time.perf_counter()
    page = open_page(path)
    assert time.perf_counter() - started < 10
    charts = page.evaluate(CHARTS)
    assert charts["Loss"]["Line training"] == charts["Loss"]["VArea training"] == 1493
    assert "100,000 logged steps are drawn as 1,493 points: each is the mean of 67" in page.inner_text("main")
    assert "100 of 200 samples are shown" in page.inner_text("main")
    highest = "Math.max(...Bokeh.documents[0].roots()[0].renderers[0].data_source.data.loss_high)"
    assert page.evaluate(highest) == 90


@pytest.mark.slow
def test_runs_side_by_side_whatever_their_texts_say(tmp_path: Path, open_page: Open):
    name = NASTY.replace("/", "|")
    one = make_run(tmp_path / name, 120, 3, NASTY, outcome="failed", exit_code=5, error=NASTY, time=1.8e9, step=1)
    other = make_run(tmp_path / "other", 100, 2)
    (other / "config.json").write_text(json.dumps({"train": {"lr": NASTY}}))
    page = open_page(write_report(one, other, output=tmp_path / "both.html"), width=420)
    assert page.evaluate("window.bad") is None
    assert page.title() == page.inner_text("h1") == f"{name}, other"
    shown = page.inner_text("main")
    assert shown.count(NASTY.split("\u2028")[0].strip()) >= 6  # samples, error, commits
    charts = page.evaluate(CHARTS)
    assert charts["Loss"][f"Line 1: ...{name[-20:]}: training"] == 120
    assert charts["Loss"]["Line other: held out"] == 2
    visible = "() => Bokeh.documents[0].roots()[0].renderers.filter((r) => r.visible).map((r) => r.name)"
    page.uncheck("#summary input >> nth=0")
    assert set(page.evaluate(visible)) == {
        "other: training",
        "other: held out",
        "restart",
        "spike undone, back to here",
    }
    assert "train.lr" in page.inner_text("main")  # which differs


@pytest.mark.slow
def test_a_run_cut_short_and_lines_that_are_no_numbers(tmp_path: Path, open_page: Open):
    run = make_run(tmp_path / "cut", 100)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[50] = lines[50].replace('"loss": ', '"loss": NaN, "was": ')
    lines[70] = lines[70].replace('"loss": ', '"loss": Infinity, "was": ')
    (run / "metrics.jsonl").write_text("\n".join([*lines[:90], '{"kind": "train", "st']))
    page = open_page(write_report(run, output=tmp_path / "cut.html"), dark=True)
    shown = page.inner_text("main")
    assert "1 damaged lines" in shown
    assert "2 logged losses are not finite, the first at step 50." in shown
    assert "unknown: there is no status.json" in shown
    assert "87 of 1,000,000" in shown
    charts = page.evaluate(CHARTS)
    assert "Bits per byte" not in charts  # nothing was validated yet
    marks = {"VSpan restart": 1, "VSpan spike undone, back to here": 1, "VSpan loss that is not finite": 2}
    assert charts["Loss"] == {"Line training": 87} | marks
    assert charts["Throughput"] == {"Line training": 87, "VSpan restart": 1}


@pytest.mark.slow
def test_a_model_is_looked_into_by_mouse_and_by_keyboard(
    tmp_path: Path, open_page: Open, tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer
):
    text = "Four </script><b>&amp; caf\u00e9"
    ids = [tiny_tokenizer.eot_id, *tiny_tokenizer.encode(text).tolist()]
    e = explain(tiny_model(300), ids)
    write_page(tmp_path / "in.html", "explain.html", title=NASTY, notes=[], values=page_values(e, tiny_tokenizer, 4))
    page = open_page(tmp_path / "in.html", width=420)
    assert page.evaluate("window.bad") is None
    assert page.locator("#text span").count() == len(ids)
    assert "</script><b>&amp;" in page.inner_text("#text")
    assert page.locator("#maps canvas").count() == 2 * 4
    page.hover("#text span >> nth=5")
    assert f"rank {e.rank[4]}" in page.inner_text("#token")
    page.click("#text span >> nth=2")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token h3").startswith("Token 3 ")
    assert f"rank {e.rank[2]}" in page.inner_text("#token")
    page.click("#maps button >> nth=6")  # layer 2, head 3
    best = int(e.attention[1, 2, 3].argmax())
    weight, look = float(e.attention[1, 2, 3, best]), page.inner_text("#look")
    assert look.startswith("Layer 2, head 3: token 3 ")
    assert f" looks at {best} " in look
    assert float(look.split(" by ")[1].rstrip("%")) / 100 == pytest.approx(weight, abs=0.01)
    page.check("#mode input[value=attention]")
    level = 4 - sum(weight < each for each in LEVELS)
    assert f"s{level}" in page.locator(f"#text span >> nth={best}").get_attribute("class").split()
    says = page.locator("#lens tr >> nth=1").locator("td").all_inner_texts()  # the output is on top
    shown = [token_text(i, tiny_tokenizer) for i in e.lens_ids[-1].tolist()]
    assert says == [text.replace(" ", "\u00b7").replace("\n", "\u23ce") for text in shown]
