"""What several test files need: a small model whose every weight matters, and a small trained tokenizer."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # torch takes a second: only the tests that ask for a model wait for it
    from model import GPT
    from tests.test_train import Runs
    from tokenizer import Tokenizer

# Under nohup, or behind & in a script, these are ignored, and the programs that the tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, more threads only wait for each other

GETTYSBURG = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war,
testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great
battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who
here gave their lives that that nation might live. It is altogether fitting and proper that we should do this."""


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., GPT]:
    """Build a GPT of 2 layers x 64 for 128 ids and a context of 32; arguments: n_vocab and GPTConfig's fields.

    Its weights are random, the same each time. (Those of a fresh GPT would hide mistakes: its blocks do nothing.)
    """
    import torch

    from config import GPTConfig
    from model import GPT

    def build(n_vocab: int = 128, **fields: Any) -> GPT:
        settings: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_length": 32} | fields
        model = GPT(GPTConfig(**settings).resolved(n_vocab))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5, generator=generator)
                else:
                    parameter.normal_(std=parameter.size(1) ** -0.5, generator=generator)
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A BPE of 300 ids: 256 bytes, 43 merges, end-of-text."""
    from tokenizer import train_bpe

    return train_bpe([GETTYSBURG], 300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of train.py --preset smoke, in a folder of the test file's own."""
    from tests.test_train import Runs

    return Runs(tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> str:
    """An uninterrupted run of 20 steps, called "whole"; what it printed."""
    out, _ = runs("whole")
    return out
