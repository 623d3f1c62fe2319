"""How likely a model finds given continuations: what lm_eval's `loglikelihood` computes, in fewer products.

The same ids, cut from the left to the context's length in the same way, and the same ties. But what the answers to a
question share is read once, into a KV cache, and the head sees only what follows.

Shapes: B questions, R rows, P ids that a question's rows share, T ids behind them, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from checkpoint import CheckpointError
from errors import ConfigError
from hub import DataError
from metrics import mean_and_error
from model import GPT, ROWS_OF_LOGITS, ROWS_OF_LOGITS_ON_CUDA, KVCache
from sampling import encode_prompt
from tasks import Document
from tokenizer import Tokenizer

T = TypeVar("T")


class OwnModel:
    """A model of train.py. Its texts begin with end-of-text, as in training."""

    shares = True

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.max_length, self.first_id = model.config.max_length, tokenizer.eot_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encode_prompt(text, self.tokenizer) for text in texts]

    def read(self, ids: Tensor, room: int) -> KVCache:
        """ids (B, P) -> their keys and values, with room for so many more behind."""
        B, P = ids.shape
        cache = KVCache(self.model.config, B, P + room, self.device, self.model.embedding.weight.dtype)
        self.model(ids, cache=cache, last_only=True)
        return cache

    def logits(self, ids: Tensor, cache: KVCache | None, rows: Tensor) -> Tensor:
        """ids (R, T), each behind that row of the cache which rows (R,) names -> (R, T, V)."""
        if cache is not None:
            cache = copy.copy(cache)
            cache.keys, cache.values = cache.keys[:, rows], cache.values[:, rows]
        return self.model(ids, cache=cache)


class TransformersModel:
    """Any causal model of transformers, by its folder or its name on the hub. Raises ConfigError, CheckpointError."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ConfigError(f"{name} is a model for transformers; pip install transformers==5.23.0") from None
        try:
            self.tokenizer = t = AutoTokenizer.from_pretrained(name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"transformers cannot load {name}: {str(error).partition(chr(10))[0]}") from None
        self.model = loaded.to(device).eval()
        self.device, self.first_id = device, t.eos_token_id if t.bos_token_id is None else t.bos_token_id
        c = getattr(self.model.config, "text_config", None) or self.model.config
        lengths = [getattr(c, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
        self.max_length = next((int(n) for n in lengths if n), min(t.model_max_length, 2048))
        self.shares = self._continues()

    @torch.inference_mode()
    def _continues(self) -> bool:
        """Not every architecture takes several ids at once behind its cache, and some then compute something else."""
        ids, row = torch.arange(100, 108, device=self.device)[None], torch.zeros(1, dtype=torch.long).to(self.device)
        whole = self.model(ids).logits[:, 4:]
        try:
            return torch.allclose(self.logits(ids[:, 4:], self.read(ids[:, :4], 4), row), whole, rtol=0.05, atol=0.5)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False

    def encode(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, verbose=False)["input_ids"])

    def read(self, ids: Tensor, room: int) -> Any:
        return self.model.base_model(ids, use_cache=True).past_key_values

    def logits(self, ids: Tensor, cache: Any, rows: Tensor) -> Tensor:
        if cache is not None:
            cache = copy.copy(cache)
            cache.layers = [copy.copy(layer) for layer in cache.layers]
            cache.batch_select_indices(rows)
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=cache is not None).logits
        return logits


Model = OwnModel | TransformersModel


class Answer(NamedTuple):
    log_likelihood: float  # nats, summed over the continuation's ids
    greedy: bool  # each of its ids is the model's first choice


class Row(NamedTuple):
    """Ids that the model reads, and the (answer, continuation's ids) that its last logits are for."""

    document: int
    shared: int  # how many ids all rows of the document begin with, before the first of these logits
    ids: list[int]
    answers: list[tuple[int, list[int]]]


def answers_of(
    documents: Sequence[Document], model: Model, run: Callable[..., Iterable[Any]] = map
) -> list[list[Answer]]:
    """The Answers of each document. run(work, batches): the results of work(batch), of each. Raises DataError."""
    # Ids whose logits are made at once: model.py's figures, whose reasons are the same here.
    tokens = ROWS_OF_LOGITS_ON_CUDA if model.device.type == "cuda" else ROWS_OF_LOGITS
    same = sorted(rows_of(documents, model), key=lambda rows: (rows[0].shared, len(rows[0].ids)), reverse=True)
    batches = list(portions(same, tokens, lambda rows: rows[0].shared + sum(len(r.ids) - r.shared for r in rows)))
    answers: dict[tuple[int, int], Answer] = {}
    for scored in run(lambda batch: score(batch, model, tokens), batches):
        answers |= scored
    return [[answers[n, i] for i in range(len(document.contexts))] for n, document in enumerate(documents)]


def portions(items: list[T], room: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """As many at a time as would fit if all were as large as the first of them."""
    while items:
        n = max(1, room // size(items[0]))
        yield items[:n]
        items = items[n:]


def rows_of(documents: Sequence[Document], model: Model) -> list[list[Row]]:
    """Each document's rows, each different one once. Raises DataError for a continuation that cannot be scored."""
    pairs: list[list[tuple[str, str]]] = []
    for document in documents:  # tokens begin with a space: those at a context's end belong to what follows
        both = zip(document.contexts, document.continuations, strict=True)
        pairs.append([(kept := context.rstrip(), context[len(kept) :] + rest) for context, rest in both])
    texts = sorted({text for each in pairs for context, rest in each for text in (context, context + rest)})
    ids_of = dict(zip(texts, model.encode(texts), strict=True)) if texts else {}
    documents_rows = []
    for n, each in enumerate(pairs):
        answers_to: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for answer, (context, rest) in enumerate(each):
            continuation = ids_of[context + rest][len(ids_of[context]) :]
            if not 0 < len(continuation) <= model.max_length:
                raise DataError(f"document {n} has an answer of {len(continuation)} tokens, and {model.max_length} fit")
            ids = [*(ids_of[context] or [model.first_id]), *continuation][-model.max_length - 1 :]
            answers_to.setdefault(tuple(ids[:-1]), []).append((answer, continuation))
        first, last = min(answers_to), max(answers_to)  # what these two begin with, all that lie between do
        limit = min(len(ids) - len(c) for ids, answers in answers_to.items() for _, c in answers)
        shared = next((i for i, (a, b) in enumerate(zip(first[:limit], last, strict=False)) if a != b), limit)
        documents_rows.append([Row(n, shared * model.shares, list(ids), a) for ids, a in answers_to.items()])
    return documents_rows


@torch.inference_mode()
def score(batch: list[list[Row]], model: Model, tokens: int) -> dict[tuple[int, int], Answer]:
    """(document, answer) -> Answer, with logits for about `tokens` ids at a time.

    As many ids are cached as the document that shares least has: nothing in the cache is padding.
    """

    def padded(rows: list[list[int]]) -> Tensor:  # behind: the model is causal, so it changes nothing
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)

    P, block = min(rows[0].shared for rows in batch), 16 if model.device.type == "cpu" else tokens
    rows = sorted(((b, row) for b, same in enumerate(batch) for row in same), key=lambda pair: -len(pair[1].ids))
    cache = model.read(padded([same[0].ids[:P] for same in batch]), len(rows[0][1].ids) - P) if P else None
    answers: dict[tuple[int, int], Answer] = {}
    for chunk in portions(rows, tokens, lambda pair: len(pair[1].ids) - P):
        which = torch.tensor([b for b, _ in chunk], device=model.device)
        logits = model.logits(padded([row.ids[P:] for _, row in chunk]), cache, which)  # (R, T, V)
        places: list[tuple[int, int, int]] = []  # (row, position, wanted id) of all answers
        spans: dict[tuple[int, int], slice] = {}  # where each one's are
        for i, (_, row) in enumerate(chunk):
            for answer, continuation in row.answers:
                start = len(row.ids) - P - len(continuation)
                spans[row.document, answer] = slice(len(places), len(places) + len(continuation))
                places += [(i, start + j, wanted) for j, wanted in enumerate(continuation)]
        parts = []
        # A CPU wants few logits at a time, for its caches, and takes ten times as long for an argmax as for a maximum.
        for r, t, wanted in map(Tensor.unbind, torch.tensor(places).T.to(model.device).split(block, dim=1)):
            found = logits[r, t].float()  # (n, V)
            chosen = found[torch.arange(len(r), device=r.device), wanted]
            first = chosen == found.amax(dim=1)
            first[first.clone()] = found[first].argmax(dim=1) == wanted[first]  # of equals the first is the choice
            parts.append(torch.stack((chosen - found.logsumexp(dim=1), first)).cpu().double())
        values, greedy = torch.cat(parts, dim=1)
        answers |= {key: Answer(float(values[s].sum()), bool(greedy[s].all())) for key, s in spans.items()}
    return answers


def summary(documents: Sequence[Document], answers: Sequence[Sequence[Answer]], normalised: bool) -> dict[str, Any]:
    """Accuracies with standard errors, and each document's result for paired comparisons (correct: "0110...").

    acc: the likeliest answer is the right one, or a cloze's is greedy; of equals the first counts. acc_norm, as in
    lm_eval: the likeliest per character, without the space before it. perplexity: of a cloze's answers.
    """
    cloze = len(documents[0].contexts) == 1
    correct: dict[str, list[bool]] = {metric: [] for metric in ("acc", "acc_norm")[: 1 + normalised]}
    for document, each in zip(documents, answers, strict=True):
        values = np.array([answer.log_likelihood for answer in each])
        correct["acc"].append(each[0].greedy if cloze else bool(values.argmax() == document.label))
        if normalised:
            characters = [len(text) - 1 for text in document.continuations]
            correct["acc_norm"].append(bool((values / characters).argmax() == document.label))
    chance = 0.0 if cloze else float(np.mean([1 / len(document.contexts) for document in documents]))
    result: dict[str, Any] = {"n": len(documents), "chance": chance}
    for metric, right in correct.items():
        result[metric], result[f"{metric}_se"] = mean_and_error(right)
    if cloze:
        nats, error = mean_and_error([-each[0].log_likelihood for each in answers])
        result["perplexity"] = math.exp(min(nats, 700))
        result["perplexity_se"] = result["perplexity"] * error
    result["correct"] = {metric: "".join("01"[each] for each in right) for metric, right in correct.items()}
    return result | {"documents": hashlib.sha256(repr(list(documents)).encode()).hexdigest()[:16]}


def fingerprint(model: Model, checkpoint: Path | None) -> str:
    """Equal for the same model: of a checkpoint's manifest, or of some of the weights themselves."""
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes() if checkpoint else b"")
    for p in () if checkpoint else model.model.parameters():
        digest.update(p.detach().flatten()[:: max(1, p.numel() // 4096)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
