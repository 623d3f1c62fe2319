"""From logits to the next token, and from a prompt to a text."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from config import GenerationConfig
from decoding import Decode, decode_step, format_of
from errors import UserError
from model import GPT, KVCache
from tokenizer import Tokenizer


class NonFiniteError(UserError):
    """The model's numbers are NaN or infinite."""

    exit_code = 5


def next_token_probabilities(logits: Tensor, config: GenerationConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution that the next token is drawn from: (B, V) fp32, each row summing to 1.

    logits (B, V); seen (B, n) ids that the repetition penalty applies to. In this order, as in transformers:
    repetition penalty, temperature, top-k, top-p, min-p. temperature 0 gives all to the likeliest token.
    Raises NonFiniteError when a row holds NaN or +inf, or nothing but -inf.
    """
    if config.temperature == 0:
        return torch.zeros(logits.shape, device=logits.device).scatter_(1, likeliest(logits, config, seen)[:, None], 1)
    p, ids = candidates(logits, config, seen)
    return p if ids is None else p.new_zeros(logits.shape).scatter_(1, ids, p)


def likeliest(logits: Tensor, config: GenerationConfig, seen: Tensor | None) -> Tensor:
    """The ids (B,) that temperature 0 takes. Raises NonFiniteError."""
    highest, ids = penalised(logits.float(), config, seen).max(dim=1)  # argmax takes thrice as long
    check_finite(highest)
    return ids


def candidates(logits: Tensor, config: GenerationConfig, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """next_token_probabilities above temperature 0, of the n likeliest tokens alone: (B, n), and their ids (B, n).

    n: top_k, or more where several are as likely as the k-th; without top-k, V. Without top-p too, the ids are None:
    all, in order. Raises NonFiniteError.
    """
    logits = penalised(logits.float(), config, seen)
    highest = logits.amax(dim=1, keepdim=True)
    check_finite(highest)
    logits = (logits - highest) / config.temperature  # so that no division overflows
    order = None
    if 0 < config.top_k < logits.size(1):
        every = logits
        logits, order = every.topk(config.top_k, dim=1)  # what follows has these few to work on
        weakest = logits[:, -1:]
        n = int((every >= weakest).sum(dim=1).max())  # more than k where several are as likely as the k-th
        if n > config.top_k:
            logits, order = every.topk(n, dim=1)
            logits = logits.masked_fill(logits < weakest, -torch.inf)
    elif config.top_p < 1:
        logits, order = logits.sort(dim=1, descending=True, stable=True)
    if config.top_p < 1:
        p = logits.softmax(dim=1)
        # A token stays while those likelier than it have not reached top_p: so the first always stays.
        logits = logits.masked_fill(p.cumsum(dim=1) - p >= config.top_p, -torch.inf)
    p = logits.softmax(dim=1)
    if config.min_p > 0:
        p = p * (p >= config.min_p * p.amax(dim=1, keepdim=True))
        p = p / p.sum(dim=1, keepdim=True)
    return p, order


def penalised(logits: Tensor, config: GenerationConfig, seen: Tensor | None) -> Tensor:
    """logits (B, V) with the repetition penalty for the ids seen (B, n)."""
    if config.repetition_penalty == 1 or seen is None or seen.size(1) == 0:
        return logits
    # Dividing a negative logit would make its token likelier: multiply instead (arXiv:1909.05858).
    old = logits.gather(1, seen)
    return logits.scatter(
        1, seen, torch.where(old > 0, old / config.repetition_penalty, old * config.repetition_penalty)
    )


def check_finite(highest: Tensor) -> None:
    """highest: of each row of logits; -inf for single tokens is allowed. Raises NonFiniteError."""
    if not all(map(math.isfinite, highest.flatten().tolist())):
        raise NonFiniteError("the model's logits are not finite, so the checkpoint is broken; use an earlier one")


def fit_context(length: int, max_length: int, prompt_length: int = 1) -> int:
    """How many of `length` tokens, the last ones, the model looks at before it predicts the next.

    All of them while they fit; of a longer prompt as many as fit. A text that outgrows the context then keeps its
    last half and grows again, so that the cache is rebuilt once in max_length / 2 tokens instead of at each.
    """
    outgrown = length - max(max_length, prompt_length)
    if outgrown <= 0:
        return min(length, max_length)
    keep = max(max_length // 2, 1)
    grown = max_length - keep + 1  # tokens between two cuts
    return keep + (outgrown - 1) % grown


@torch.inference_mode()
def generate_ids(
    model: GPT,
    prompt: list[int],
    tokenizer: Tokenizer,
    config: GenerationConfig,
    use_cache: bool = True,
    decode: Decode | None = None,
) -> Iterator[list[int]]:
    """Yield the next id of each of config.num_samples texts, token by token; end-of-text fills those that ended.

    prompt: ids, at least one. The prompt is read once and shared by the samples. The same seed gives the same
    ids on the same device. use_cache=False recomputes everything for each token: the reference for the cache.
    decode: the step for one more token; without it decode_step(model, config.num_samples).
    """
    decode = decode or decode_step(model, config.num_samples)
    c, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(config.seed)
    ids = torch.tensor([prompt], device=device).expand(config.num_samples, -1)  # (B, n)
    ended = torch.zeros(config.num_samples, dtype=torch.bool, device=device)
    dtype = format_of(model)
    without_text = torch.from_numpy(tokenizer.token_byte_length == 0)  # holes, other special ids
    without_text[tokenizer.eot_id] = False
    silent = without_text.nonzero()[:, 0].to(device)
    cache: KVCache | None = None
    for _ in range(config.max_tokens):
        window = fit_context(ids.size(1), c.max_length, len(prompt))
        if not use_cache:
            logits = model(ids[:, -window:], last_only=True)[:, -1]
        elif cache is not None and cache.seen == window - 1:
            logits = decode(ids[:, -1], cache)
        elif cache is None:
            cache = KVCache(c, 1, min(c.max_length, window + config.max_tokens), device, dtype)
            logits = model(ids[:1, -window:], cache=cache, last_only=True)[:, -1]
            cache.repeat(config.num_samples)
            logits = logits.repeat(config.num_samples, 1)
        else:  # the text outgrew the context: read its last half again
            cache.seen = 0
            logits = model(ids[:, -window:], cache=cache, last_only=True)[:, -1]
        # Rows of the embedding beyond the tokenizer's entries are padding; they are never sampled.
        known = logits[:, : tokenizer.n_vocab].index_fill_(1, silent, -torch.inf)
        if config.temperature == 0:
            drawn = likeliest(known, config, ids)
        else:
            p, order = candidates(known, config, ids)
            place = torch.multinomial(p, 1, generator=generator)  # makes a random number for each: of 50,257 in 1 ms
            drawn = (place if order is None else order.gather(1, place)).squeeze(1)
        drawn = torch.where(ended, tokenizer.eot_id, drawn)
        ended = ended | (drawn == tokenizer.eot_id)
        ids = torch.cat((ids, drawn[:, None]), dim=1)
        yield drawn.tolist()
        if ended.all():
            return


def by_module(model: GPT) -> Decode:
    """The model itself as the decode step: when its weights are there only while it runs, as under FSDP."""
    return lambda ids, cache: model(ids[:, None], cache=cache)[:, -1]


def generate_text(
    model: GPT, prompt: str, tokenizer: Tokenizer, config: GenerationConfig, decode: Decode | None = None
) -> list[str]:
    """The continuations of a prompt, config.num_samples of them, without the prompt."""
    texts: list[list[int]] = [[] for _ in range(config.num_samples)]
    for step in generate_ids(model, encode_prompt(prompt, tokenizer), tokenizer, config, decode=decode):
        for text, token_id in zip(texts, step, strict=True):
            text.append(token_id)
    return [tokenizer.decode(i for i in text if i != tokenizer.eot_id) for text in texts]


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """End-of-text, which every document begins with in training, then the prompt's ids."""
    return [tokenizer.eot_id, *tokenizer.encode(prompt).tolist()]


class TextStream:
    """Bytes of tokens -> text to print as soon as it is complete, never a broken UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes; maybe none."""
        return self._decoder.decode(self._tokenizer.decode_token(token_id))

    def end(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
