"""The table of evals.py, and its own options. (test_train.py runs it on a trained model.)"""

from __future__ import annotations

import math

import pytest

import evals
from errors import exit_code_of


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


def test_a_negative_number_of_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: evals.main(["nowhere", "--val_tokens", "-1"])) == 2
    assert capsys.readouterr().err == "error: val_tokens is -1; use 0 (as many as in training) or more\n"
