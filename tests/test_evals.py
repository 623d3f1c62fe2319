"""Held-out scores, the table of evals.py, and its own options. (test_train.py runs it on a trained model.)"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evals
from errors import exit_code_of
from metrics import Score, means_and_errors, pair_of, randomization_test, score_rows, shown


def test_standard_errors_are_of_each_datasets_documents_however_they_lie_in_rows_and_batches() -> None:
    draw = np.random.default_rng(0)
    N, T, V = 140, 16, 9
    rows = draw.integers(0, V, (N, T + 1))
    documents = np.sort(draw.integers(0, 200, (N, T)), axis=None).reshape(N, T)  # of very different lengths
    easy, hard = slice(None, N // 2), slice(N // 2, None)  # two datasets
    hardness = draw.normal(size=200)[documents]  # of a document, in all its tokens
    hardness[hard] -= 3
    logits_of = {  # of each row's inputs (T,): (T, V)
        row[:-1].tobytes(): F.one_hot(torch.from_numpy(row[1:]), V) * torch.from_numpy(its)[:, None]
        for row, its in zip(rows, hardness, strict=True)
    }

    def model(ids: Tensor) -> Tensor:
        return torch.stack([logits_of[row.tobytes()] for row in ids.numpy()])

    nats, variance, n_documents = np.log(np.exp(hardness) + V - 1) - hardness, 0.0, 0
    for dataset in (easy, hard):
        names, residuals = np.unique(documents[dataset]), nats[dataset] - nats[dataset].mean()
        sums = [residuals[documents[dataset] == name].sum() for name in names]
        variance += len(names) / (len(names) - 1) * np.square(sums).sum()
        n_documents += len(names)
    error = math.sqrt(variance) / nats.size

    byte_lengths = torch.arange(V)
    for batch_size, n_processes in ((1, 1), (5, 1), (4, 3)):
        scores = []
        for dataset in (easy, hard):
            shares = [(rows[dataset][r::n_processes], documents[dataset][r::n_processes]) for r in range(n_processes)]
            parts = [score_rows(model, share, byte_lengths, batch_size, its) for share, its in shares]
            scores.append(Score.concatenate(parts))
        found = means_and_errors(scores)
        assert found["loss"] == pytest.approx(nats.mean(), rel=1e-6)
        assert found["loss_se"] == pytest.approx(error, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / rows[:, 1:].sum(), rel=1e-6)
        assert (found["tokens"], found["bytes"]) == (nats.size, rows[:, 1:].sum())
        assert found["documents"] == n_documents
    of_rows = [score_rows(model, rows[dataset], byte_lengths, 8) for dataset in (easy, hard)]
    assert means_and_errors(of_rows)["loss_se"] < 0.95 * error  # rows of one document are no independent sample
    mixed = means_and_errors([Score.concatenate(scores)])
    assert mixed["loss"] == pytest.approx(nats.mean(), rel=1e-6)
    assert mixed["loss_se"] > 1.2 * error  # how the datasets differ is no error


def test_the_standard_errors_are_how_much_the_means_differ_from_draw_to_draw_of_documents() -> None:
    draw = np.random.default_rng(0)

    def dataset(bytes_per_token: float, hardness: float) -> Score:
        """Documents until there are 6,000 tokens; a document's tokens are alike."""
        lengths = draw.geometric(1 / 100, 300)
        lengths = lengths[np.cumsum(lengths) < 6000]
        its = draw.normal(size=(4, len(lengths)))
        each = (
            hardness + 0.3 * its[0],
            np.ones(len(lengths)),
            bytes_per_token * np.exp(0.2 * its[1]),
            0.3 + 0.1 * its[2],
            0.6 + 0.02 * its[3],
        )
        return Score(np.arange(len(lengths)), *(lengths * values for values in each))

    for datasets in (((4.0, 4.0),), ((4.0, 3.0), (1.5, 4.0))):
        found = [means_and_errors([dataset(*each) for each in datasets]) for _ in range(600)]
        for name in ("loss", "perplexity", "bits_per_byte", "top1", "top5"):
            spread = np.std([means[name] for means in found])
            assert np.mean([means[f"{name}_se"] for means in found]) == pytest.approx(spread, rel=0.1), name


def test_a_single_document_has_no_standard_error() -> None:
    rows, lengths = np.array([[0, 3, 4], [4, 5, 6]]), torch.ones(9, dtype=torch.int64)
    score = score_rows(lambda ids: torch.zeros(*ids.shape, 9), rows, lengths, 1, np.ones((2, 2), dtype=int))
    found = means_and_errors([score])
    assert found["loss"] == pytest.approx(math.log(9))
    assert math.isnan(found["loss_se"])
    assert [shown(x, ".4f") for x in (found["loss"], found["loss_se"], None)] == ["2.1972", "-", "-"]
    assert found["documents"] == 1


def test_held_out_documents_are_compared_in_pairs_which_tells_small_differences_from_noise() -> None:
    draw = np.random.default_rng(0)
    lengths, hardness = draw.integers(100, 5000, 40), draw.normal(1, 0.3, 40)

    def result(better: float, last: int = 0) -> dict[str, Any]:  # by so many bits per byte, give or take
        n_bytes = [*lengths.tolist(), 70 + last]  # of the last what fits
        nats = math.log(2) * lengths * (hardness - better + draw.normal(0, 0.01, 40))
        return {"nats": [*nats.tolist(), 50.0 + last], "bytes": n_bytes}

    these = {"by_document": {"SOTU": result(0), "WIKI": result(0), "C4": result(0), "FINEWEB_EDU": result(0)}}
    others = {"by_document": {"SOTU": result(0.02, last=5), "WIKI": result(-0.02), "FINEWEB_EDU": result(0)}}
    others["by_document"]["C4"] = {"nats": [1.0] * 41, "bytes": [9] * 41}
    text = evals.comparison(these | {"tasks": {}}, others | {"tasks": {}})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[:2] for line in lines[1:5]] == [
        [name, "bits/byte"] for name in ("SOTU", "WIKI", "FINEWEB_EDU", "all")
    ]
    assert [line.split()[-2:] for line in lines[1:3]] == [["other", "better"], ["this", "better"]]
    assert lines[3].split()[-1] == "noise"
    assert lines[5] == f"{'C4':<24} not compared: the other has no result of the same documents"
    this, other, difference, error = (float(word) for word in lines[1].replace("+-", "").split()[2:6])
    assert other - this == pytest.approx(difference, abs=2e-4)
    assert difference == pytest.approx(-0.02, abs=0.01)
    assert error < 0.004 < 0.1 * hardness.std()  # of the difference, and not of what makes some documents hard


def test_chance_is_how_often_the_models_exchanged_at_random_differ_as_much() -> None:
    def p(*datasets: list[float]) -> float:
        return randomization_test([np.array(d) for d in datasets], [np.ones(len(d)) for d in datasets])

    assert p([0.1] * 6) == pytest.approx(2 / 2**6, rel=0.2)  # of the draws all heads and all tails
    assert p([0.3, 0.1, -0.1]) == pytest.approx(6 / 2**3, rel=0.1)
    assert p([0.0] * 6) == 1
    assert p([-1.0] * 40) == 0.0001
    draw = np.random.default_rng(0)  # two datasets that differ, each as one would draw it again
    assert p([*draw.normal(100, 5, 11)], [*draw.normal(-2, 0.5, 300)]) < 0.01
    assert math.isnan(p([1.0], [1.0, 2.0]))
    assert math.isnan(p([1.0, math.nan, 2.0]))


def test_scores_that_are_not_finite_have_no_verdict() -> None:
    these = {"by_document": {"SOTU": {"nats": [1.0, None, 3.0], "bytes": [1, 2, 3]}}, "tasks": {}}  # null of JSON
    others = {"by_document": {"SOTU": {"nats": [1.0, 2.0, 3.0], "bytes": [1, 2, 3]}}, "tasks": {}}
    line = evals.comparison(these, others).splitlines()[1]
    assert line.split() == ["SOTU", "bits/byte", "-", "1.4427", "-", "+-", "-", "-"]


def test_documents_at_the_end_may_be_cut_off_elsewhere_by_another_tokenizer() -> None:
    whole: dict[str, list[float]] = {"nats": [1.0] * 9, "bytes": [5.0, 6, 7, 8, 9, 5, 6, 7, 8]}
    shorter: dict[str, list[float]] = {"nats": [2.0] * 5, "bytes": [5.0, 6, 7, 8, 2]}
    pair = pair_of(whole, shorter)
    assert pair is not None
    assert [its.tolist() for its in pair] == [[5, 6, 7, 8], [1] * 4, [2] * 4]
    assert pair_of(whole, {"nats": [2.0] * 3, "bytes": [5.0, 9, 7]}) is None


def test_the_table_fits_100_columns_and_shows_what_is_unknown_as_a_dash() -> None:
    names = ("loss", "perplexity", "bits_per_byte", "top1", "top5")
    untrained = dict(zip(names, (10.825, 50257.1, 12.3456, 0.0, 1.0), strict=True)) | {"tokens": 10_000_000}
    spread = {f"{name}_se": value for name, value in zip(names, (0.012, 987.1, 0.0123, 0.001, 0.0012), strict=True)}
    unknown = {f"{name}_se": math.nan for name in names}
    lines = evals.table(
        {"FINEWEB_EDU": untrained | spread, "one row": untrained | unknown}, *evals.HELD_OUT
    ).splitlines()
    assert max(map(len, lines)) <= 100
    assert "10.825 +- 0.012" in lines[1]
    assert "10.825 +- -" in lines[2]
    assert "nan" not in lines[2]


def test_a_perplexity_beyond_its_column_does_not_push_the_others_aside() -> None:
    task = {"n": 20, "acc": 0.0, "acc_se": 0.0, "chance": 0.0, "seconds": 1.0}
    rows = {
        "lambada": task | {"perplexity": 6_198_376.6, "perplexity_se": 9_711_707.7},
        "trained": task | {"perplexity": 99_999.9, "perplexity_se": 99_999.9},
    }
    lines = evals.table(rows, *evals.TASK).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 100
    assert " 6.2e+06 +- 9.7e+06 " in lines[1]


def test_what_each_run_holds_out_has_a_file_of_its_own_also_where_two_checkpoints_are_of_one_step(
    tmp_path: Path,
) -> None:
    names = set()
    for name in ("one", "other", "third"):
        (tmp_path / name / "step-00000010").mkdir(parents=True)
        (tmp_path / name / "step-00000010" / "manifest.json").touch()
    for held_out_of in ("one", "one/step-00000010", "other", "other/step-00000010"):
        arguments = evals.Arguments(checkpoint="", held_out_of=str(tmp_path / held_out_of))
        names.add(arguments.results_of(str(tmp_path / "third"))[0].name)
    assert len(names) == 4


def test_a_negative_number_of_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: evals.main(["nowhere", "--val_tokens", "-1"])) == 2
    assert capsys.readouterr().err == "error: val_tokens is -1; use 0 (as many as in training) or more\n"
