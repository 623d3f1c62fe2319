"""Write a model for other programs:  python export.py <checkpoint> OUT [--gguf q8_0]

OUT gets a model that transformers loads without code of ours: config.json, model.safetensors (fp32, every bit of the
checkpoint), tokenizer.json, and a model card, README.md. With --gguf also a file for llama.cpp and a Modelfile for
Ollama. It is read again, and must compute the checkpoint's logits, before it gets its name: whole and right, or not.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from config import DATASETS, Dataset, parse_arguments
from errors import ConfigError, exit_code_of

if TYPE_CHECKING:
    from torch import Tensor

    from config import Config, GPTConfig
    from model import GPT
    from tokenizer import Tokenizer

# Must be cut into the same tokens. No number of four digits: see interop.SPLITS.
PROBE = "The 3 cats' naïve 42-year-old café\n\n  won't  pay €1.50 — 漢字, שלום, 👩\u200d👧!\t\r\n x\u00a0y  "


@dataclass
class Arguments:
    """Write a checkpoint as a model of Hugging Face's, and for llama.cpp and Ollama."""

    # a run's folder, one of its step-* folders, or a model of Hugging Face's
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # the folder to write: a new or empty one
    # also write model-<this>.gguf for llama.cpp, with its matrices so; q8_0: 8 bits, and a scale for each 32
    gguf: Literal["none", "f32", "f16", "q8_0"] = "none"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(Arguments, argv)
    out = Path(arguments.out).expanduser().resolve()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing half written is left

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from checkpoint import DiskError, find_checkpoint, load_model
    from files import whole_folder, write_json
    from interop import to_hub_config, to_hub_weights, to_tokenizer_json

    with whole_folder(out) as folder:
        path = find_checkpoint(Path(arguments.checkpoint))
        model, tokenizer, config, _ = load_model(path)
        c, eot = model.config, tokenizer.eot_id
        write_json(folder / "config.json", to_hub_config(c, eot))
        write_json(folder / "tokenizer.json", to_tokenizer_json(tokenizer), indent=None)
        names = dict.fromkeys(("bos_token", "eos_token"), tokenizer.decode_token(eot).decode())
        names["tokenizer_class"] = "PreTrainedTokenizerFast"  # as versions 4 and 5 both know it
        write_json(folder / "tokenizer_config.json", names | {"model_max_length": c.max_length})
        card = model_card(path, out.name, model, tokenizer, config, arguments.gguf)
        (folder / "README.md").write_text(card, "utf-8", "replace")  # a folder's name may be any bytes
        try:
            weights = to_hub_weights(model.state_dict(), c)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # its own error for a full disk
            raise DiskError(f"{out} could not be written ({error}); free some space") from None
        (folder / "model.safetensors").chmod(0o644)
        if arguments.gguf != "none":
            file = folder / f"model-{arguments.gguf}.gguf"
            write_gguf(file, c, weights, tokenizer, arguments.gguf)
            settings = f'TEMPLATE "{{{{ .Prompt }}}}"\nPARAMETER num_ctx {c.max_length}\n'
            (folder / "Modelfile").write_text(f"FROM ./{file.name}\n{settings}")
        del weights
        lines = check(folder, arguments.gguf, model, tokenizer)
    if arguments.gguf != "none" and tokenizer.name == "bpe":
        lines += ["note: llama.cpp cuts a prompt's numbers of four or more digits, such as years, into other tokens"]
    print("\n".join([*lines, f"written to {out}"]))
    return 0


def write_gguf(file: Path, c: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, form: str) -> None:
    """The file of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

    weights: under Hugging Face's names. form, f32, f16 or q8_0, is of the matrices; all else is in f32.
    Raises ConfigError where llama.cpp has no counterpart.
    """
    import gguf

    from interop import SPLITS, XIELU, family_of, to_tokenizer_json

    if tokenizer.name not in SPLITS:
        raise ConfigError(
            "--gguf is for the tokenizers gpt2, cl100k_base and bpe; leave it out, and give what is written to "
            "llama.cpp's convert_hf_to_gguf.py, which knows those of many published models"
        )
    definition, kind = to_tokenizer_json(tokenizer), family_of(c).model_type
    token_of = {i: text for text, i in definition["model"]["vocab"].items()}
    types = dict.fromkeys(token_of, gguf.TokenType.NORMAL)
    types |= {token["id"]: gguf.TokenType.CONTROL for token in definition["added_tokens"]}
    rows = range(c.vocab_size)  # each row of the embedding wants a token
    facts: dict[str, Any] = {
        "type": gguf.GGUFType.MODEL, "quantization_version": gguf.GGML_QUANT_VERSION,
        "file_type": gguf.LlamaFileType["ALL_F32" if form == "f32" else f"MOSTLY_{form.upper()}"],
        "vocab_size": c.vocab_size, "context_length": c.max_length, "embedding_length": c.d_model,
        "block_count": c.n_layers, "feed_forward_length": c.d_ff, "head_count": c.n_heads,
        "head_count_kv": c.n_kv_heads, "key_length": c.head_dim, "value_length": c.head_dim,
        "rope_dimension_count": c.head_dim, "rope_freq_base": c.rope_base, "layer_norm_rms_eps": c.norm_eps,
        "tokenizer_model": "gpt2", "tokenizer_pre": SPLITS[tokenizer.name][0],  # gpt2: any BPE of bytes
        "token_list": [token_of.get(i, f"[PAD{i}]") for i in rows],
        "token_types": [types.get(i, gguf.TokenType.UNUSED) for i in rows],
        "token_merges": [" ".join(pair) for pair in definition["model"]["merges"]],
        "bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id, "add_bos_token": True,
    }  # fmt: skip
    if kind == "apertus":
        facts |= {f"xielu_{name}": [value] * c.n_layers for name, value in XIELU.items()}
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"]} | weights  # a tied one is written twice
    out = gguf.GGUFWriter(file, kind)
    for name, value in facts.items():
        getattr(out, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], c.n_layers)
    for name, weight in weights.items():
        if ".act_fn." in name:
            continue
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp's Llama rotates neighbours, channels 2i and 2i + 1, for i and i + K/2.
            halves = weight.view(-1, 2, c.head_dim // 2, c.d_model)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        if form == "q8_0" and weight.dim() == 2 and weight.size(1) % 32:
            raise ConfigError(f"{name} has rows of {weight.size(1)}; q8_0 needs multiples of 32: use --gguf f16")
        numbers = gguf.GGMLQuantizationType[form.upper() if weight.dim() == 2 else "F32"]
        data = gguf.quants.quantize(weight.numpy(), numbers)
        out.add_tensor(str(names.get_name(name, (".weight",))), data, raw_dtype=numbers)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def check(folder: Path, form: str, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Read a written model by our own import, transformers and llama.cpp, and say so. Raises CheckpointError."""
    import torch

    from checkpoint import CheckpointError, load_model

    def require(equal: bool, what: str) -> None:
        if not equal:
            raise CheckpointError(f"{what}, so nothing is written; please report this, with the model's configuration")

    length, chance = min(model.config.max_length, 64), torch.Generator().manual_seed(0)
    ids = torch.randint(tokenizer.n_vocab, (1, length), generator=chance)
    tokens = [tokenizer.eot_id, *tokenizer.encode(PROBE)]
    again, its_tokenizer, *_ = load_model(folder)
    with torch.inference_mode():
        logits = model(ids)
        require(torch.equal(again(ids), logits), "the written model computes other logits")
    require(its_tokenizer.fingerprint == tokenizer.fingerprint, "the written tokenizer is another one")
    said = ["read again: equal logits and tokens"]

    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with torch.inference_mode():
            off = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits - logits
        require(off.abs().max().item() < 1e-3 * logits.std().item(), "transformers computes other logits")
        its_tokens = AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"]
        require(its_tokens == tokens, "transformers cuts text into other tokens")
        said += [f"transformers: equal tokens, logits off by at most {off.abs().max():.1e}"]
    else:
        said += ["not compared with transformers, which is not installed (pip install transformers)"]
    if form != "none" and importlib.util.find_spec("llama_cpp"):
        from llama_cpp import Llama

        llama = Llama(str(folder / f"model-{form}.gguf"), n_ctx=length, logits_all=True, verbose=False)
        for token in ids[0].tolist():  # one at a time: its q8_0 product of several rows with AMX crashed (0.3.36)
            llama.eval([token])
        off = (torch.tensor(llama.scores[:length]) - logits[0]).square().mean().sqrt() / logits.std()
        require(off.item() < 0.1, f"llama.cpp's logits are off by {off:.0%} of their deviation")
        require(llama.tokenize(PROBE.encode(), special=False) == tokens, "llama.cpp cuts text into other tokens")
        said += [f"llama.cpp: equal tokens, logits off by {off:.2%} of their deviation"]
    elif form != "none":
        said += ["not compared with llama.cpp, which is not installed (pip install llama-cpp-python)"]
    return said


def model_card(path: Path, name: str, model: GPT, tokenizer: Tokenizer, config: Config, form: str) -> str:
    """README.md: what the model is, what it was trained on, what was measured, how to run it."""
    from checkpoint import is_hub_model, read_state
    from metrics import amount, read_results

    c, millions = model.config, model.parameter_counts()["total"] / 1e6
    training = f"Imported from {path.name}: see its own card, also for its licence.\n"
    if not is_hub_model(path):
        state, data = read_state(path), config.data
        training = f"From the weights of {Path(config.init_from).name}: " if config.init_from else ""
        training += f"{amount(state['tokens_seen'])} tokens in {state['step']:,} steps, of these texts:\n\n"
        training += "| dataset | share | source | licence of the text |\n|---|---|---|---|\n"
        for dataset, share in zip(data.current_datasets, data.dataset_probabilities, strict=True):
            source = DATASETS.get(dataset, Dataset("hub", licence="unknown"))  # one that was added where it trained
            training += f"| {dataset} | {share:.0%} | {source.location} | {source.licence} |\n"
        measured = read_results(path.parent / f"eval-{state['step']:08d}.json")
        held_out, tasks = measured.get("held_out") or {}, measured.get("tasks") or {}
        training += "\n| held out | bits per byte | loss |\n|---|---|---|\n" if held_out else ""
        for dataset, score in held_out.items():
            training += f"| {dataset} | {score['bits_per_byte']:.4f} | {score['loss']:.4f} |\n"
        training += "\n| task, 0-shot | documents | right | by guessing |\n|---|---|---|---|\n" if tasks else ""
        for task, score in tasks.items():
            metric = "acc_norm" if "acc_norm" in score else "acc"
            error = score[f"{metric}_se"]  # None of a single document
            right = f"{score[metric]:.1%}" + (f" +- {error:.1%}" if error else "")
            training += f"| {task} | {score['n']:,} | {right} ({metric}) | {score['chance']:.1%} |\n"
    run = f"\n`ollama create {name} -f Modelfile; ollama run {name}`\n" if form != "none" else ""
    if run and tokenizer.name == "bpe":
        run += """
In training a number was cut into tokens of three digits at most. llama.cpp, and so Ollama, has no such rule: there a
prompt's longer numbers, such as years, become other tokens than the model knows, and it goes on worse behind them.
"""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model of {millions:.1f}M parameters that continues text. It was not taught to follow instructions, and
repeats what its texts say, right or wrong. {c.n_layers} layers x {c.d_model}, {c.n_heads} heads of {c.head_dim}
({c.n_kv_heads} for keys and values), {c.mlp} of {c.d_ff}, context {c.max_length} tokens, weights in fp32.

## Training

{training}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("{name}"), AutoModelForCausalLM.from_pretrained("{name}")
ids = tokenizer("The people", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=True)[0]))
```
{run}
## Licence

Not chosen yet: whoever publishes the weights adds `license:` to this file's head.
"""


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
