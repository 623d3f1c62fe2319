"""One more token at a time gives what the whole text gives at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoding import DecodeStep, int8_product
from errors import ConfigError
from model import GPT, KVCache

Build = Callable[..., GPT]
SHAPES = [
    {}, {"mlp": "relu2"}, {"n_kv_heads": 1}, {"tie_embeddings": True}, {"head_dim": 24}, {"norm_eps": 0.1},
    {"qk_norm": False, "n_kv_heads": 2},
]  # fmt: skip


def trained(model: GPT) -> GPT:
    """With no weight where it begins, so that each of them has a say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.dim() == 1 else 0))
    return model.eval()


@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_token_by_token_the_logits_are_those_of_the_whole_text(
    tiny_model: Build, fields: dict[str, Any], rows: int
) -> None:
    model = trained(tiny_model(**fields))
    ids = torch.randint(0, model.config.vocab_size, (rows, model.config.max_length))
    whole = model(ids)
    cache = KVCache(model.config, rows, model.config.max_length, model.device, torch.float32)
    model(ids[:, :5], cache=cache)
    decode = DecodeStep(model)
    for t in range(5, ids.size(1)):
        torch.testing.assert_close(decode(ids[:, t], cache), whole[:, t], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="33 tokens exceed the model's context of 32"):
        decode(ids[:, 0], cache)


@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@torch.inference_mode()
def test_int8_weights_give_nearly_the_same_logits(tiny_model: Build, fields: dict[str, Any]) -> None:
    model = trained(tiny_model(**fields)).bfloat16()
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    logits = []
    for int8 in (False, True):
        cache = KVCache(model.config, 2, 20, model.device, torch.bfloat16)
        model(ids[:, :10], cache=cache)
        decode = DecodeStep(model, int8)
        logits.append(torch.stack([decode(ids[:, t], cache) for t in range(10, 20)]).float())
    exact, rounded = logits
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).square().mean() < 0.01 * exact.square().mean()


@pytest.mark.parametrize("width", [*range(1, 34), 44, 100, 200, 500])
@torch.inference_mode()
def test_int8_products_are_right_for_every_length_of_a_row(width: int) -> None:
    """torch's own reads beyond the end of rows that are no multiple of 16, and returns or does anything."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, width).bfloat16(), torch.randn(3, width)
    exact = x.bfloat16().float() @ weight.float().mT
    assert (int8_product(weight)(x) - exact).abs().max() < 0.03 * exact.abs().max()


@torch.inference_mode()
def test_int8_keeps_a_row_of_zeros_and_its_largest_weight(tiny_model: Build) -> None:
    weight = torch.zeros(16, 32, dtype=torch.bfloat16)
    weight[1, 3] = -2.5
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 3] = 2
    assert int8_product(weight)(x)[0].tolist() == pytest.approx([0, -5] + 14 * [0], rel=0.01)


def test_int8_is_refused_where_its_product_does_not_exist(tiny_model: Build) -> None:
    with pytest.raises(ConfigError, match="leave --int8 out"):
        DecodeStep(tiny_model(), int8=True)
