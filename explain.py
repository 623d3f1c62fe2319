"""Look inside a model: how likely each token of a text was to it, what each layer would have said, where heads looked.

All of it comes from one pass of the model itself over the text, watched by hooks; no weight changes.

Shapes as in model.py: T time, L layers, H heads, K head_dim, D d_model, V vocabulary.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import GPT, Attention
from sampling import TextStream
from tokenizer import Tokenizer

ALTERNATIVES = 10  # likeliest tokens kept for each position
MAP_TOKENS = 128  # an attention map shows the first so many tokens: each head has one, of the square of that


@dataclass(frozen=True)
class Explanation:
    """What a model computed for a text of T tokens. Probabilities are before temperature, top-k and the like.

    ids            (T,)
    probability    (T-1,) of ids[t + 1], given those up to t
    rank           (T-1,) of ids[t + 1]: 1 for the likeliest
    top_ids        (T, k) the likeliest next tokens; top_probability (T, k) theirs
    lens_ids       (L+1, T) the likeliest next token by the residual stream before the first block, then behind each
                   (the logit lens: nostalgebraist, 2020); lens_probability (L+1, T); lens_rank (L+1, T-1) of ids[t+1]
    attention      (L, H, n, n) fp32, n = min(T, MAP_TOKENS): how much each token, a row, looks at those up to it
    """

    ids: Tensor
    probability: Tensor
    rank: Tensor
    top_ids: Tensor
    top_probability: Tensor
    lens_ids: Tensor
    lens_probability: Tensor
    lens_rank: Tensor
    attention: Tensor


@torch.inference_mode()
def explain(model: GPT, ids: Sequence[int]) -> Explanation:
    """Raises ValueError when there are more ids than the model's context."""
    streams, attention = observe(model, torch.tensor([ids], device=model.device))
    following = torch.tensor(ids[1:], device=model.device)[:, None]
    layers = []
    for x in streams:  # one layer's logits at a time: all of them would be L times V times T numbers
        logits = model.head(model.final_norm(x))[0].float()  # (T, V)
        p = logits.softmax(dim=1)
        own = logits[:-1].gather(1, following)
        rank = (logits[:-1] > own).sum(dim=1) + 1
        top = p.topk(min(ALTERNATIVES, p.size(1)), dim=1)
        layers.append((p[:-1].gather(1, following)[:, 0], rank, top.indices, top.values))
    lens = (
        torch.stack([top_i[:, 0] for _, _, top_i, _ in layers]), torch.stack([top_p[:, 0] for *_, top_p in layers]),
        torch.stack([rank for _, rank, _, _ in layers]),
    )  # fmt: skip
    found = (torch.tensor(ids), *layers[-1], *lens, attention)
    return Explanation(*(tensor.cpu() for tensor in found))


def observe(model: GPT, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """ids (1, T) -> the residual stream (1, T, D) before the first block and behind each, and the attention maps."""
    streams: list[Tensor] = []
    maps: list[Tensor] = []

    def keep_stream(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        streams.append(inputs[0])

    def keep_map(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, Attention)
        x, cos, sin, *_ = inputs
        n = min(x.size(1), MAP_TOKENS)  # causal: later tokens change nothing for these
        maps.append(attention_map(module, x[:, :n], cos[:n], sin[:n])[0])

    hooks = [part.register_forward_pre_hook(keep_stream) for part in (*model.blocks, model.final_norm)]
    hooks += [block.attention.register_forward_pre_hook(keep_map) for block in model.blocks]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return streams, torch.stack(maps)


def attention_map(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) of each head for the block's normed input x (B, T, D): (B, H, T, T) fp32."""
    q, k, _ = attention.project(x, cos, sin)
    k = k.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=1)
    scores = (q @ k.mT).float() * attention.head_dim**-0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=3)


# ---- showing ------------------------------------------------------------------------------

LEVELS = (0.5, 0.2, 0.05, 0.01)  # probabilities where the colour changes, from expected to surprising
# The same colours, in the terminal's 256: background and text; what is expected stays as it is.
_TERMINAL = {1: (153, 16), 2: (75, 16), 3: (25, 231), 4: (17, 231)}


def colour_text(explanation: Explanation, tokenizer: Tokenizer) -> str:
    """The text for a terminal, each token on the colour of its probability, and below it what the colours mean."""

    def paint(text: str, level: int) -> str:
        if level not in _TERMINAL:
            return text
        background, foreground = _TERMINAL[level]
        on, off = f"\x1b[48;5;{background};38;5;{foreground}m", "\x1b[0m"
        return on + text.replace("\n", f"{off}\n{on}") + off

    stream, text = TextStream(tokenizer), ""
    for token_id, p in zip(explanation.ids[1:].tolist(), explanation.probability.tolist(), strict=True):
        shown = "" if token_id == tokenizer.eot_id else stream.add(token_id)
        text += paint(shown, sum(p < level for level in LEVELS))
    names = [f"{level:.0%} or more" for level in LEVELS] + [f"under {LEVELS[-1]:.0%}"]
    return f"{text}\n\nprobability: " + " ".join(paint(f" {name} ", level) for level, name in enumerate(names))


def page_values(explanation: Explanation, tokenizer: Tokenizer, n_prompt: int) -> dict[str, Any]:
    """What templates/explain.html shows, ready for JSON. n_prompt: how many of the ids were given, not generated."""
    e = explanation
    ids = {*e.ids.tolist(), *e.top_ids.flatten().tolist(), *e.lens_ids.flatten().tolist()}
    return {
        "ids": e.ids.tolist(),
        "n_prompt": n_prompt,
        "text": {token_id: token_text(token_id, tokenizer) for token_id in ids},
        "probability": rounded(e.probability),
        "rank": e.rank.tolist(),
        "top": {"ids": e.top_ids.tolist(), "probability": rounded(e.top_probability)},
        "lens": {
            "ids": e.lens_ids.tolist(), "probability": rounded(e.lens_probability), "rank": e.lens_rank.tolist(),
        },
        "maps": [[picture(head) for head in layer] for layer in e.attention],
        "n_map": e.attention.size(2),
        "levels": LEVELS,
    }  # fmt: skip


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token by itself; bytes that are a part of a character as \\xe2."""
    try:
        return tokenizer.decode_token(token_id).decode("utf-8", errors="backslashreplace")
    except KeyError:  # a row of the embedding that stands for no token
        return f"<no token {token_id}>"


def rounded(probabilities: Tensor) -> Any:
    """To 4 digits, in nested lists: a page needs no more."""
    if probabilities.dim() > 1:
        return [rounded(row) for row in probabilities]
    return [float(f"{p:.4g}") for p in probabilities.tolist()]


def picture(weights: Tensor) -> str:
    """Weights (n, n) as a PNG in base64: a grey of 255 times their square root, so that small ones are seen too."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((255 * weights.sqrt()).round().to(torch.uint8).numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
