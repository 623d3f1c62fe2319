"""The forty bad inputs of docs/errors.md: each ends with its exit code and one line, never with a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import evals
import generate
import runtime
from checkpoint import (
    check_same_run,
    gather_tensors,
    list_checkpoints,
    load_model,
    load_training_state,
    newest_checkpoint,
    open_run,
    put_damaged_aside,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from config import Config, DataConfig, GPTConfig, TrainingConfig, load_config
from errors import ConfigError, complain, exit_code_of
from hardware import choose_precision
from model import GPT
from optim import build_optimizers
from prepare_data import DatasetPrep
from tests.test_train import ROOT, Runs
from tokenizer import Tokenizer, load_tiktoken

CONFIG = Config(
    data=DataConfig(current_datasets=("SOTU",), dataset_probabilities=(1.0,), tokenizer="bpe", bpe_vocab_size=300),
    model=GPTConfig(d_model=64, n_layers=2, n_heads=4, max_length=32),
    train=TrainingConfig(run_name="run", batch_size=16, gradient_accumulation_steps=1, max_steps=20, warmup_tokens=0),
)
STATE = {
    "step": 20, "total_steps": 20, "epochs": 3, "rows_per_step": 16, "tokens_seen": 10240, "seconds_trained": 1.5,
    "recent_losses": [], "undone": {}, "first_data_step": 0, "data": {"format": 1, "identity": {}, "streams": {}},
}  # fmt: skip


# ---- what the bad inputs are put into --------------------------------------------------------------


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Tokenizer) -> Path:
    """A run's folder with checkpoints of steps 10 and 20, as train.py leaves them."""
    folder: Path = tmp_path_factory.mktemp("sound") / "run"
    open_run(folder).close()
    for step in (10, 20):
        save_checkpoint(folder, step, tensors_of(tiny_model(300)), {**STATE, "step": step}, CONFIG, tiny_tokenizer, 5.0)
    return folder


def tensors_of(model: GPT) -> dict[str, dict[str, torch.Tensor]]:
    optimizers = build_optimizers(model, CONFIG.train)
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    for optimizer in optimizers:
        optimizer.step()
    return gather_tensors(model, optimizers, keep=True)


@dataclass
class Ground:
    """A copy of the sound run, a place for files, and what would exist if planted code had run."""

    folder: Path
    tokenizer: Tokenizer
    environment: pytest.MonkeyPatch

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def marker(self) -> Path:
        return self.folder / "planted code ran"

    def step(self, step: int = 20) -> Path:
        return self.run / f"step-{step:08d}"

    def resume(self, **changes: Any) -> None:
        """What train.py --resume asks of a folder. tests/test_train.py starts whole processes on some of these."""
        lock = open_run(self.run)
        try:
            for line in put_damaged_aside(self.run):
                complain(line)
            newest = newest_checkpoint(self.run)
            assert newest
            read_state(newest.path)
            check_same_run(newest.path, dataclasses.replace(CONFIG, **changes))
            complain(f"goes on at step {newest.step}")
        finally:
            lock.close()

    def generate(self, *options: str) -> int:
        return generate.main([str(self.run), *options, "--max_tokens", "3"])

    def data(self, content: Any, name: str = "texts.jsonl", length: int = 32, rows: int = 1) -> DatasetPrep:
        """One's own text, read once."""
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content).encode()
        path.write_bytes(content)
        config = DataConfig(
            current_datasets=("LOCAL",), dataset_probabilities=(1.0,), local_files=(str(path),), n_streams=1,
            val_fraction=0.2, cache_dir=str(self.folder / "cache"),
        )  # fmt: skip
        return DatasetPrep(config, length, rows, epochs=1, tokenizer=self.tokenizer)

    def read(self, content: Any, name: str = "texts.jsonl", length: int = 32) -> None:
        """Read a file of one's own from its beginning to its end, held-out rows first."""
        data = self.data(content, name, length)
        try:
            data.validation_rows()
            assert sum(batch.n_targets for batch in data) > 0
            complain(f"{data.totals()['empty']} records without text")
        finally:
            data.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def seal(path: Path, **changes: Any) -> None:
    """A manifest that fits the files as they are now, as somebody would make it who means harm."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    for name in manifest["files"]:
        if (path / name).is_file():
            size = (path / name).stat().st_size
            manifest["files"][name] = {"size": size, "sha256": checkpoint._sha256(path / name)}
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint, and seal that."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))
    seal(path.parent)


# ---- the inputs that take more than a line -----------------------------------------------------------


class Planted:
    """Its pickle, when it is loaded, makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def plant(g: Ground, name: str) -> None:
    for step in (10, 20):
        (g.step(step) / name).write_bytes(pickle.dumps(Planted(g.marker)))
        if name != "manifest.json":
            seal(g.step(step))
    assert pickle.loads(pickle.dumps(Planted(g.folder / "bait"))) is None
    assert (g.folder / "bait").exists()  # the bait works, where it is unpickled


def load_planted_optimizer(g: Ground) -> None:
    plant(g, "optimizer.safetensors")
    model, *_ = load_model(g.run)
    load_training_state(g.step(), model, build_optimizers(model, CONFIG.train))


def name_a_path(g: Ground, name: str) -> None:
    manifest = json.loads((g.step() / "manifest.json").read_text())
    (g.run / "outside").write_text("{}")
    seal(g.step(), files=manifest["files"] | {name: {"size": 2, "sha256": checkpoint._sha256(g.run / "outside")}})
    load_model(g.run)


def link_the_weights(g: Ground) -> None:
    (g.step() / "model.safetensors").rename(g.run / "elsewhere")
    (g.step() / "model.safetensors").symlink_to(g.run / "elsewhere")
    load_model(g.run)


def too_much(g: Ground, name: str) -> None:
    os.truncate(g.step() / name, checkpoint._MOST_JSON + 1)  # a hole: it takes no room, and to parse it would
    if name != "manifest.json":
        seal(g.step())
    load_model(g.run)


def truncate_all(g: Ground, *steps: int) -> None:
    for step in steps:
        file = g.step(step) / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
    g.resume()


def odd_optimizer(g: Ground) -> None:
    file = g.step() / "optimizer.safetensors"
    save_file({"blocks.7.no_such/momentum": torch.zeros(3)}, file)
    seal(g.step())
    model, *_ = load_model(g.run)
    load_training_state(g.step(), model, build_optimizers(model, CONFIG.train))


def odd_position(g: Ground) -> None:
    data = g.data([{"text": "one"}, {"text": "two"}])
    state = data.state_dict()
    state["streams"]["0"] = [[*state["streams"]["0"][0][:7], "5"]]
    data.load_state_dict(state)


def break_weights(g: Ground) -> int:
    file = g.step() / "model.safetensors"
    tensors = load_file(file)
    tensors["final_norm.weight"][0] = torch.nan
    save_file(tensors, file)
    seal(g.step())
    return g.generate("--prompt", "Four score")


def save_without_room(g: Ground) -> None:
    """The kernel ends each file of this process at 64 kB (EFBIG), as a full disk would (ENOSPC: bench/faults.py)."""
    model, tokenizer, *_ = load_model(g.run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        save_checkpoint(g.run, 30, gather_tensors(model, [], keep=True), STATE, CONFIG, tokenizer, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [c.step for c in list_checkpoints(g.run)] == [10, 20]
        assert not list(g.run.glob(".tmp-*"))
        verify_checkpoint(g.step())


def open_without_permission(g: Ground) -> None:
    g.folder.chmod(0o555)
    user = os.geteuid()
    os.seteuid(user or 65534)  # the superuser may write everywhere
    try:
        open_run(g.folder / "new")
    finally:
        os.seteuid(user)
        g.folder.chmod(0o755)


def open_twice(g: Ground) -> None:
    with open_run(g.run):
        open_run(g.run)


def one_character(g: Ground) -> None:
    started = time.perf_counter()
    for tokenizer in (g.tokenizer, load_tiktoken("gpt2", str(g.folder))):
        assert tokenizer.token_byte_length[tokenizer.encode("a" * 10**6)].sum() == 10**6
    assert time.perf_counter() - started < 10


def join_nobody(g: Ground, start: Callable[[], object] | None = None) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        g.environment.delenv(name, raising=False)
    g.environment.setenv("WORLD_SIZE", "2")
    (start or (lambda: runtime.start_processes(CONFIG.train, "fp32", on_cpu=True)))()


def with_a_dataset_of_elsewhere(config: Any) -> Any:
    return {**config, "data": {**config["data"], "current_datasets": ["MINE"]}}


def evaluate(g: Ground) -> int:
    return evals.main([str(g.run)])


def turn_the_clock_back(g: Ground) -> None:
    for path in (g.step(), *g.step().iterdir()):
        os.utime(path, (0, 0))
    g.resume()


def settings(*options: str) -> Callable[[Ground], object]:
    """train.py with these options, as far as it looks at them before it imports torch."""
    return lambda g: load_config(options, "", Config)


def then(first: Callable[[Ground], object], second: Callable[[Ground], object]) -> Callable[[Ground], object]:
    """The one, and then the other."""

    def both(g: Ground) -> object:
        first(g)
        return second(g)

    return both


def load(g: Ground) -> object:
    return load_model(g.run)


def model_of(**changes: Any) -> GPTConfig:
    return dataclasses.replace(CONFIG.model, **changes)


def data_of(**changes: Any) -> DataConfig:
    return dataclasses.replace(CONFIG.data, **changes)


# ---- the table: number in docs/errors.md, what is done, exit code, what is said ------------------------

Call = Callable[[Ground], object]
CASES: list[tuple[int, str, Call, int, str]] = [
    (1, "typo", settings("--train.warmup_tokns", "5"), 2, "--train.warmup_tokens"),
    (1, "no preset", settings("--preset", "dmo"), 2, "did you mean demo?"),
    (2, "batch 0", settings("--train.batch_size", "0"), 2, "train.batch_size is 0; use a positive number"),
    (2, "steps -1", settings("--train.max_steps", "-1"), 2, "train.max_steps is -1; use 0 or a positive number"),
    (2, "1e20 steps", settings("--train.max_steps", str(10**20)), 2, "use at most 1e+15"),
    (2, "1e20", settings("--train.max_steps", "1e20"), 2, "--train.max_steps"),
    (2, "large width", lambda g: GPT(model_of(d_model=10**13).resolved(300)), 2, "out of memory"),
    (2, "huge width", lambda g: GPT(model_of(d_model=10**15).resolved(50304)), 2, "out of memory (Storage size"),
    (2, "huge batch", lambda g: next(g.data([{"text": "one"}, {"text": "two"}], length=10**4, rows=10**15)), 2,
     "out of memory (array is too big"),
    (3, "NaN", settings("--train.lr", "nan"), 2, "train.lr is nan; use a positive number"),
    (3, "inf", settings("--train.lr", "inf"), 2, "train.lr is inf"),
    (3, "negative", settings("--train.lr", "-0.1"), 2, "train.lr is -0.1"),
    (3, "1e300", settings("--train.lr", "1e300"), 2, "train.lr is 1e+300; use at most 1e+30"),
    (4, "heads", settings("--model.d_model", "250"), 2, "try d_model 240, or set model.head_dim"),
    (5, "warm-up", settings("--train.max_steps", "9"), 2, "and the whole run has 9; try --train.warmup_tokens"),
    (6, "batch", settings("--train.batch_size", "3"), 2, "try train.gradient_accumulation_steps 16"),
    (6, "WORLD_SIZE alone", join_nobody, 2, "WORLD_SIZE is 2 in the environment, but"),
    (1, "elsewhere", then(lambda g: edit(g.step() / "config.json", with_a_dataset_of_elsewhere), evaluate), 2,
     "data.current_datasets has no dataset 'MINE'"),
    (6, "in evals.py", lambda g: join_nobody(g, lambda: evaluate(g)), 2, "WORLD_SIZE is 2 in the"),
    (7, "fp16 on a CPU", lambda g: choose_precision(torch.device("cpu"), "fp16"), 2, "use auto"),
    (8, "key", lambda g: Config.from_dict({"train": {"lrr": 1.0}}), 2, "unknown setting train.lrr; did you mean lr?"),
    (8, "type", lambda g: Config.from_dict({"model": {"n_layers": "2"}}), 2, "model.n_layers is '2'; expected int"),
    (8, "in a checkpoint", then(lambda g: edit(g.step() / "config.json", lambda c: {**c, "x": 1}), load), 4,
     "unknown setting x"),
    (9, "model", lambda g: g.resume(model=model_of(n_layers=3)), 4, "model.n_layers 2 -> 3"),
    (10, "data", lambda g: g.resume(data=data_of(seed=5)), 4, "data.seed 1337 -> 5"),
    (10, "schedule", lambda g: g.resume(train=dataclasses.replace(CONFIG.train, lr=0.01)), 4, "train.lr 0.02 -> 0.01"),
    (11, "truncated", lambda g: truncate_all(g, 20), 0, "is now called damaged-step-00000020 ... goes on at step 10"),
    (12, "flipped", then(lambda g: flip(g.step() / "optimizer.safetensors"), Ground.resume), 0,
     "optimizer.safetensors is damaged: its bytes are not those that were written ... goes on at step 10"),
    (12, "generate", then(lambda g: flip(g.step() / "model.safetensors"), Ground.generate), 4, "copy this one again"),
    (13, "no manifest", then(lambda g: (g.step() / "manifest.json").unlink(), Ground.resume), 0, "goes on at step 10"),
    (13, "unfinished", then(lambda g: g.step().rename(g.run / ".tmp-step-00000020"), Ground.resume), 0,
     "goes on at step 10"),
    (14, "all damaged", lambda g: truncate_all(g, 10, 20), 4,
     "no sound checkpoint left, only damaged-step-* folders ( ... step-00000020/model.safetensors is missing or not"),
    (15, "weights", then(lambda g: plant(g, "model.safetensors"), load), 4, "model.safetensors cannot be"),
    (15, "optimizer", load_planted_optimizer, 4, "optimizer.safetensors cannot be read"),
    (15, "manifest", then(lambda g: plant(g, "manifest.json"), Ground.resume), 4, "no sound checkpoint left"),
    (16, "../", lambda g: name_a_path(g, "../outside"), 4, "manifest.json is none that this code writes"),
    (16, "absolute", lambda g: name_a_path(g, str(g.run / "outside")), 4, "manifest.json is none that this code"),
    (16, "hidden", lambda g: name_a_path(g, ".lock"), 4, "manifest.json is none that this code writes"),
    (16, "symlink", link_the_weights, 4, "model.safetensors is missing or not as long as it was written"),
    (16, "huge manifest", lambda g: too_much(g, "manifest.json"), 4, "larger than any that is written here"),
    (16, "huge JSON", lambda g: too_much(g, "config.json"), 4, "config.json is not a file, or larger than any"),
    (16, "a file less", then(lambda g: seal(g.step(), files={}), load), 4, "is none that this code writes"),
    (16, "odd types", then(lambda g: seal(g.step(), step="20"), Ground.resume), 0, "goes on at step 10"),
    (16, "odd state", then(lambda g: edit(g.step() / "state.json", lambda s: {**s, "step": "x"}), Ground.resume), 4,
     "state.json does not fit this code (step)"),
    (16, "odd spikes", then(lambda g: edit(g.step() / "state.json", lambda s: {**s, "undone": []}), Ground.resume), 4,
     "state.json does not fit this code (undone)"),
    (16, "odd optimizer", odd_optimizer, 4, "optimizer state blocks.7.no_such/momentum of another model"),
    (16, "odd position", odd_position, 3, "the saved data position does not fit: the streams it holds changed"),
    (17, "format 2", then(lambda g: seal(g.step(), format=2), load), 4, "has format 2; this code reads up to"),
    (18, "tokenizer", lambda g: g.resume(data=data_of(bpe_vocab_size=400)), 4, "data.bpe_vocab_size 300 -> 400"),
    (18, "no tokenizer", then(lambda g: edit(g.step() / "tokenizer.json", lambda t: {"pattern": "import os"}), load), 4,
     "tokenizer.json does not fit this code"),
    (21, "no records", lambda g: g.read([]), 3, "LOCAL has no documents with text in its files"),
    (21, "no text", lambda g: g.read([{"text": ""}, {"text": None}]), 3, "LOCAL has no documents with text"),
    (22, "short", lambda g: g.read([{"text": "short"}, {"text": "brief"}], length=64), 3, "use --model.max_length"),
    (23, "no field", lambda g: g.read([{"texts": "a", "id": 1}]), 3, "no field 'text' (did you mean texts?)"),
    (23, "null", lambda g: g.read([{"text": f"word {i} " * 9 if i % 3 else None} for i in range(30)]), 0, "10 records"),
    (23, "a number", lambda g: g.read([{"text": 5}]), 3, "record 1, has a text that is int, not a string"),
    (24, "latin-1", lambda g: g.read("naïve".encode("latin-1"), "a.txt"), 3, "is not UTF-8 text at byte 2"),
    (26, "one character", one_character, 0, ""),
    (30, "long prompt", lambda g: g.generate("--prompt", "word " * 300), 0, "tokens; the model sees its last 32"),
    (31, "empty prompt", lambda g: g.generate("--prompt", ""), 0, ""),
    (31, "a text without --prompt", lambda g: g.generate("Four score", "and"), 2, "given as --prompt 'Four score and'"),
    (31, "no such file", lambda g: g.generate("--prompt", f"@{g.folder}/no"), 2, "there is no file '"),
    (32, "greedy", lambda g: g.generate("--temperature", "0"), 0, ""),
    (32, "negative", lambda g: g.generate("--temperature", "-1"), 2, "temperature is -1.0; use 0 (greedy)"),
    (33, "top_p 0", lambda g: g.generate("--top_p", "0"), 2, "top_p is 0.0; use a number above 0 and at most 1"),
    (33, "top_p 1.5", lambda g: g.generate("--top_p", "1.5"), 2, "top_p is 1.5"),
    (33, "top_k -1", lambda g: g.generate("--top_k", "-1"), 2, "top_k is -1; use 0 (off) or a positive number"),
    (33, "top_k off", lambda g: g.generate("--top_k", "0"), 0, ""),
    (33, "top_k 10**9", lambda g: g.generate("--top_k", "1000000000"), 0, ""),
    (33, "1e20 samples", lambda g: g.generate("--num_samples", str(10**20)), 2, "num_samples is 1000000000"),
    (34, "NaN", break_weights, 5, "the model's logits are not finite, so the checkpoint is broken; use an earlier one"),
    (35, "no room", save_without_room, 6, "could not be written"),
    (36, "read-only", open_without_permission, 6, "(Permission denied); choose another --train.out_dir"),
    (36, "a file", lambda g: open_run(g.step() / "state.json" / "run"), 6, "choose another --train.out_dir"),
    (36, "nobody's home", lambda g: load_config(["--train.out_dir", "~nosuchuser"], "", Config).train.run_dir, 2,
     "a path begins with ~ and a name that no user here has"),
    (36, "output is a folder", lambda g: evals.main([str(g.run), "--output", str(g.run)]), 2, "is not a file"),
    (38, "two runs", open_twice, 2, f"is in use by process {os.getpid()}; stop it or choose another --train.run_name"),
    (39, "clock", turn_the_clock_back, 0, "goes on at step 20"),
]  # fmt: skip

# Those that another test exercises: what they need would be slow to make twice.
ELSEWHERE: dict[int, tuple[str, ...]] = {
    7: ("test_gpu.py::test_the_format_of_the_products_is_the_best_that_a_card_multiplies_in",),
    10: ("test_train.py::test_resume_refuses_other_data",),
    18: ("test_data.py::test_a_state_refuses_another_context_length_tokenizer_files_and_format",),
    19: ("test_shards.py::test_a_bad_id_is_named_with_its_file_document_and_vocabulary",),
    20: ("test_sampling.py::test_ids_beyond_the_tokenizers_are_never_sampled",),
    25: ("test_tokenizer.py::test_end_of_text_inside_a_text_is_ordinary_text",
         "test_data.py::test_end_of_text_written_in_a_document_is_ordinary_text"),
    27: ("test_shards.py::test_a_truncated_shard_is_refused_by_name",),
    28: ("test_shards.py::test_a_killed_process_ends_them_all_and_writing_goes_on_where_it_was",),
    29: ("test_hub.py::test_faults_do_not_change_the_batches",
         "test_hub.py::test_faults_that_last_end_the_run_after_all_tries"),
    31: ("test_sampling.py::test_an_empty_prompt_starts_a_new_document",),
    37: ("test_train.py::test_train_20_equals_train_11_killed_and_resumed_for_9",
         "test_faults.py::test_the_whole_suite_in_small"),
    40: ("test_bad_inputs.py::test_a_save_outlasts_a_second_signal_and_not_a_third",),
}  # fmt: skip


@pytest.mark.parametrize(("number", "what", "call", "code", "says"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_bad_input_has_its_exit_code_and_says_what_to_do(
    number: int, what: str, call: Call, code: int, says: str, tmp_path: Path, sound_run: Path,
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(sound_run, tmp_path / "run")
    ground = Ground(tmp_path, tiny_tokenizer, monkeypatch)

    def main() -> None:
        call(ground)

    try:
        ended = exit_code_of(main)
    except SystemExit as usage:  # tyro's, with a box around the suggestion
        ended, lines = int(str(usage.code)), 1
        said = " ".join(capsys.readouterr().err.split())
    else:
        error = capsys.readouterr().err
        said, lines = " ".join(error.split()), error.count("\n")
    assert ended == code, said
    assert all(piece in said for piece in says.split(" ... ")), said
    assert code == 0 or lines == 1, said
    assert not ground.marker.exists()


def test_the_table_in_the_docs_and_these_tests_have_the_same_forty() -> None:
    documented = [int(n) for n in re.findall(r"^\| (\d+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)]
    assert documented == list(range(1, 41))
    assert {case[0] for case in CASES} | ELSEWHERE.keys() == set(documented)
    for test in (test for tests in ELSEWHERE.values() for test in tests):
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


def test_the_exit_codes_in_the_docs_are_those_of_the_tests() -> None:
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    documented = {int(number): {int(code) for code in codes.split(", ")} for number, codes in rows}
    for number, what, _, code, _ in CASES:
        assert code in documented[number], f"{number} {what}"


def fields_of(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from fields_of(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("sign", [1, -1])
def test_no_number_is_so_large_that_it_ends_in_a_traceback(sign: int) -> None:
    n = 0
    for path, value in fields_of(Config().to_dict()):
        if type(value) in (int, float):
            values = Config().to_dict()
            values[path[0]][path[1]] = sign * (10**20 if type(value) is int else 1e300)
            with pytest.raises(ConfigError, match=path[1]):
                Config.from_dict(values).validate()
            n += 1
    assert n > 40


# ---- a process, and a disk that is slow enough to be interrupted ---------------------------------------

SLOW_DISK = """
import os, sys, time
fsync = os.fsync
def slow(descriptor):
    if ".tmp-step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(0.35)
    fsync(descriptor)
os.fsync = slow
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import runtime
import train
from errors import exit_code_of
raise SystemExit(exit_code_of(train.main))
"""


@pytest.mark.parametrize(("signals", "code"), [(2, 75), (3, 143)])
def test_a_save_outlasts_a_second_signal_and_not_a_third(tmp_path: Path, signals: int, code: int) -> None:
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    runs = Runs(tmp_path, tmp_path / "cache")
    command = runs.command("run", "--train.save_every", "1000", "--train.max_steps", "1000")
    command.insert(command.index(str(ROOT / "train.py")), str(tmp_path / "slow.py"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "run"

    def wait_for(sight: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not sight():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    wait_for(lambda: (run / "metrics.jsonl").exists() and '"step": 3,' in (run / "metrics.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: bool(list(run.glob(".tmp-step-*"))))
    for _ in range(signals - 1):
        time.sleep(1.2)  # within a second they are one request
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    complete = [c.step for c in list_checkpoints(run)]
    if code == 75:
        assert complete[0] >= 3
        verify_checkpoint(runs.checkpoint("run", complete[0]))
        assert json.loads((run / "status.json").read_text())["outcome"] == "stopped"
    else:
        assert complete == []
        assert list(run.glob(".tmp-step-*"))
