"""How likely a model finds given continuations: what lm_eval's `loglikelihood` computes, in fewer products.

The same ids, cut from the left to the context's length in the same way, and the same ties. But what the answers to a
question share is read once, nothing is padded while there is another question to fill the row, and the head sees only
the places that an answer is read from.

Shapes: B rows, T ids in each, n places, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoint import CheckpointError, is_hub_model, load_model
from errors import ConfigError
from hub import DataError
from metrics import mean_and_error
from model import GPT, ROWS_OF_LOGITS, ROWS_OF_LOGITS_ON_CUDA, Packed
from sampling import NonFiniteError, encode_prompt
from tasks import Document
from tokenizer import Tokenizer

# Ids in a row of several questions: attention computes T x T, most of it masked; shorter ones would be filled worse.
ROW = 128


class OwnModel:
    """Our GPT. Its texts begin with end-of-text, as in training; an imported model's as transformers begins them.

    theirs: transformers' tokenizer of the latter.
    """

    shares = True

    def __init__(self, model: GPT, tokenizer: Tokenizer, theirs: Any = None):
        self.model, self.tokenizer, self.theirs, self.device = model, tokenizer, theirs, model.device
        self.max_length = model.config.max_length
        self.first_id = first_of(theirs, tokenizer.eot_id) if theirs else tokenizer.eot_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self.theirs:
            return list(self.theirs(texts, verbose=False)["input_ids"])
        return [encode_prompt(text, self.tokenizer) for text in texts]

    def logits(self, ids: Tensor, packed: Packed) -> Tensor:
        """ids (B, T) -> (n, V)."""
        return self.model(ids, packed=packed)


class TransformersModel:
    """Any causal model of transformers, by its folder or its name on the hub. Raises ConfigError, CheckpointError.

    Not every architecture can be told what sees what: here each row has one text, and no more is shared than the rows.
    """

    shares = False

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        self.tokenizer = t = from_transformers("AutoTokenizer", name)
        self.model = from_transformers("AutoModelForCausalLM", name, dtype=dtype).to(device).eval()
        c = getattr(self.model.config, "text_config", None) or self.model.config
        self.device, self.first_id = device, first_of(t, getattr(c, "eos_token_id", None))
        lengths = [getattr(c, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx")]
        self.max_length = next((int(n) for n in lengths if n), min(t.model_max_length, 2048))
        self.rows_of_embedding = self.model.get_input_embeddings().weight.size(0)
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def encode(self, texts: list[str]) -> list[list[int]]:
        every = list(self.tokenizer(texts, verbose=False)["input_ids"])
        if (largest := max(map(max, filter(None, every)), default=0)) >= (n := self.rows_of_embedding):
            raise CheckpointError(f"its tokenizer gives id {largest}, and the model has {n}: it is another model's")
        return every

    def logits(self, ids: Tensor, packed: Packed) -> Tensor:
        T, (rows, places) = ids.size(1), packed.at
        options = {"logits_to_keep": T - int(places.min())} if self.keeps else {}
        logits: Tensor = self.model(ids, use_cache=False, **options).logits[rows, places - T]  # counted from the end
        return logits


Model = OwnModel | TransformersModel


def hub_model(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """A model of Hugging Face's: in our GPT, which is faster, if it is a folder that can be imported; or else in
    transformers. Raises ConfigError, CheckpointError."""
    if is_hub_model(folder := Path(name).expanduser()):
        name = str(folder)
        with contextlib.suppress(CheckpointError):  # of another family
            # Not AutoTokenizer: its classes, such as Llama's, take from tokenizer.json the vocabulary only.
            return OwnModel(*load_model(name, device, dtype)[:2], from_transformers("PreTrainedTokenizerFast", name))
    return TransformersModel(name, device, dtype)


def from_transformers(kind: str, name: str, **options: Any) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{name} is a model for transformers; pip install transformers==5.23.0") from None
    try:  # unless told so, it asks at the terminal whether to run the code that some models bring
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # each library below has its own: for a damaged file, a package that is missing
        reason = (str(error).strip() or repr(error)).partition("\n")[0]
        raise CheckpointError(f"transformers cannot load {name}: {reason}") from None


def first_of(tokenizer: Any, eos_id: int | list[int] | None) -> int:
    """What stands before an empty text, as in lm_eval; eos_id: the model's own end-of-text. Raises CheckpointError."""
    eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
    for known in (tokenizer.bos_token_id, tokenizer.eos_token_id, eos_id):
        if isinstance(known, int):
            return known
    raise CheckpointError("its config.json names no end-of-text, nor does its tokenizer: add eos_token_id")


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
    """The Answers of each document. run(work, batches): the results of work(batch), of each.

    Raises DataError, NonFiniteError.
    """
    # Ids that the model reads at once, as in training: few on a CPU, for its caches, and enough to fill a GPU.
    tokens = ROWS_OF_LOGITS_ON_CUDA if model.device.type == "cuda" else ROWS_OF_LOGITS
    questions = rows_of(documents, model)
    if not model.shares:
        questions = [[row] for rows in questions for row in rows]
    alone, several = [[rows] for rows in questions if len(rows) == 1], [rows for rows in questions if len(rows) > 1]
    batches = [
        batch
        for filled in (alone, [*fill(several)])
        for batch in portions(sorted(filled, key=length, reverse=True), tokens)
    ]
    answers: dict[tuple[int, int], Answer] = {}
    for scored in run(lambda batch: score(batch, model), batches):
        answers |= scored
    if any(math.isnan(answer.log_likelihood) for answer in answers.values()):  # argmax would take it for the best
        raise NonFiniteError("the model's logits are not finite, so its weights are broken; use others")
    return [[answers[n, i] for i in range(len(document.contexts))] for n, document in enumerate(documents)]


def size(rows: list[Row]) -> int:
    """Ids of a document: what its rows share, once, and what follows of each."""
    return rows[0].shared + sum(len(row.ids) - rows[0].shared for row in rows)


def length(documents: list[list[Row]]) -> int:
    return sum(map(size, documents))


def fill(documents: list[list[Row]]) -> Iterator[list[list[Row]]]:
    """Documents that together have at most ROW ids: the largest left, and as many of the smallest as fit."""
    left = deque(sorted(documents, key=size, reverse=True))
    while left:
        together = [left.popleft()]
        while left and length(together) + size(left[-1]) <= ROW:
            together.append(left.pop())
        yield together


def portions(filled: list[list[list[Row]]], tokens: int) -> Iterator[list[list[list[Row]]]]:
    """As many at a time as would have so many tokens if all were as long as the first of them."""
    while filled:
        n = max(1, tokens // length(filled[0]))
        yield filled[:n]
        filled = filled[n:]


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
        shared *= model.shares and len(answers_to) > 1
        documents_rows.append([Row(n, shared, list(ids), a) for ids, a in answers_to.items()])
    return documents_rows


@torch.inference_mode()
def score(batch: list[list[list[Row]]], model: Model) -> dict[tuple[int, int], Answer]:
    """(document, answer) -> Answer, of the documents in each row of the batch."""
    lines: list[list[tuple[int, int, int, int]]] = []  # of each row: (id, position, document, branch) of each place
    places: list[tuple[int, int, int]] = []  # (row, place, wanted id) of all answers
    spans: dict[tuple[int, int], slice] = {}  # where each one's are
    for r, documents in enumerate(batch):
        lines.append([])
        for d, rows in enumerate(documents):
            P = rows[0].shared
            lines[r] += [(token, t, d, 0) for t, token in enumerate(rows[0].ids[:P])]
            for b, row in enumerate(rows, 1):
                lines[r] += [(token, t, d, b) for t, token in enumerate(row.ids[P:], P)]
                for answer, continuation in row.answers:
                    spans[row.document, answer] = slice(len(places), len(places) + len(continuation))
                    places += [(r, t, token) for t, token in enumerate(continuation, len(lines[r]) - len(continuation))]
    T, nothing = max(map(len, lines)), (0, 0, -1, -1)  # what pads a row sees only itself, and nobody sees it
    table = torch.tensor([line + [nothing] * (T - len(line)) for line in lines], device=model.device)
    ids, positions, document, branch = table.unbind(2)  # (B, T)
    mask = None  # a single text in each row: attention is causal, which is faster without one
    if any(len(documents) > 1 or len(documents[0]) > 1 for documents in batch):
        sees = (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
        mask = (sees & (document[:, :, None] == document[:, None])).tril()[:, None]
    at_row, at_place, token = torch.tensor(places, device=model.device).unbind(1)
    logits = model.logits(ids, Packed(positions, mask, (at_row, at_place)))  # (n, V)
    # A CPU wants few logits at a time, for its caches, and takes ten times as long for an argmax as for a maximum.
    parts, few = [], 16 if model.device.type == "cpu" else ROWS_OF_LOGITS_ON_CUDA
    for some, wanted in zip(logits.split(few), token.split(few), strict=True):
        found = some.float()
        chosen = found.gather(1, wanted[:, None])[:, 0]
        first = chosen == found.amax(dim=1)
        first[first.clone()] = found[first].argmax(dim=1) == wanted[first]  # of equals the first is the choice
        parts.append(torch.stack((chosen - found.logsumexp(dim=1), first)).cpu().double())
    values, greedy = torch.cat(parts, dim=1)
    return {key: Answer(float(values[s].sum()), bool(greedy[s].all())) for key, s in spans.items()}


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
            with np.errstate(divide="ignore"):  # of an empty answer: -inf, as in lm_eval
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
