"""Hugging Face's names for what we have, both ways: a model's configuration, its weights, its tokenizer.

Our block is Qwen3's; without QK-norm it is Llama's, and with ReLU^2 Apertus's, whose activation xIELU
(arXiv:2411.13010) is ReLU^2 for one choice of its parameters. What has no exact counterpart is refused by name.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config, GPTConfig
from errors import ConfigError
from tokenizer import END_OF_TEXT, PATTERNS, HubTokenizer, Tokenizer, bytes_as_characters


class Family(NamedTuple):
    """An architecture of transformers', and the GPTs that it computes."""

    model_type: str
    architecture: str
    mlp: str
    qk_norm: bool
    activation: str
    norms: tuple[str, str]  # names of a block's two


FAMILIES = (
    Family("qwen3", "Qwen3ForCausalLM", "swiglu", True, "silu", ("input_layernorm", "post_attention_layernorm")),
    Family("llama", "LlamaForCausalLM", "swiglu", False, "silu", ("input_layernorm", "post_attention_layernorm")),
    Family("apertus", "ApertusForCausalLM", "relu2", True, "xielu", ("attention_layernorm", "feedforward_layernorm")),
)
# softplus of the first is 1, of the second nothing: x^2 above zero, and below it (expm1(x) - x) times nothing.
XIELU = {"alpha_p": math.log(math.e - 1), "alpha_n": -100.0, "beta": 0.0, "eps": -1e-6}

CONFIG_NAMES = {  # ours -> theirs
    "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size",
    "max_length": "max_position_embeddings", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}  # fmt: skip
# What a config.json may say beside these: with these values only,
COMPUTED = {
    "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "rope_interleaved": False, "pretraining_tp": 1,
    "use_sliding_window": False, "sliding_window": None, "is_encoder_decoder": False, "quantization_config": None,
}  # fmt: skip
# or with any, since nothing that a pre-trained model computes depends on them.
IRRELEVANT = set(
    "_model_name_or_path _name_or_path attention_dropout bos_token_id dtype eos_token_id id2label initializer_range "
    "is_llama_config label2id max_window_layers output_attentions output_hidden_states pad_token_id problem_type "
    "return_dict torch_dtype transformers_version transformers.js_config unk_token_id use_cache".split()
)


def family_of(c: GPTConfig) -> Family:
    """The architecture that computes what this configuration does. Raises ConfigError when there is none."""
    for family in FAMILIES:
        if (family.mlp, family.qk_norm) == (c.mlp, c.qk_norm):
            if family.model_type == "llama" and c.d_model % c.n_heads:  # transformers' own rule
                raise ConfigError(f"a Llama's width must divide by its heads, and {c.d_model} does not by {c.n_heads}")
            return family
    raise ConfigError(f"no architecture of transformers has mlp {c.mlp} and qk_norm {c.qk_norm}")


def to_hub_config(c: GPTConfig, eot_id: int) -> dict[str, Any]:
    """config.json of a resolved configuration, for transformers 4 and 5. Raises ConfigError as family_of does."""
    family = family_of(c)
    # Versions differ in which of the three rope_* they read; one left out may stand for a scaling (Apertus).
    return {theirs: getattr(c, ours) for ours, theirs in CONFIG_NAMES.items()} | {
        "model_type": family.model_type, "architectures": [family.architecture], "hidden_act": family.activation,
        "rope_theta": c.rope_base, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "attention_bias": False, "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float32",
        "bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": None,
    }  # fmt: skip


def from_hub_config(values: dict[str, Any]) -> GPTConfig:
    """The configuration that a config.json describes. Raises ConfigError naming what we would compute otherwise."""
    family = next((f for f in FAMILIES if f.model_type == values.get("model_type")), None)
    if "auto_map" in values:
        raise ConfigError("its config.json asks for code of its own (auto_map), and such code is not run here")
    if family is None:
        known = ", ".join(f.model_type for f in FAMILIES)
        raise ConfigError(f"its model_type is {values.get('model_type')!r}; known here are {known}")
    values = {"tie_word_embeddings": False} | values
    if family.model_type == "llama":  # older ones leave these out
        width, heads = values.get("hidden_size") or 0, values.get("num_attention_heads") or 1
        values |= {"num_key_value_heads": values.get("num_key_value_heads") or heads}
        values |= {"head_dim": values.get("head_dim") or width // heads}
    rope = {"rope_theta": values.get("rope_theta"), "rope_type": "default"} | (values.get("rope_parameters") or {})
    layers = {"layer_types": ["full_attention"] * values.get("num_hidden_layers", 0)}
    only = COMPUTED | layers | {"architectures": [family.architecture], "hidden_act": family.activation}
    for name, value in values.items():
        if name not in {*only, *IRRELEVANT, *CONFIG_NAMES.values(), "model_type", "rope_theta", "rope_parameters"}:
            raise ConfigError(f"its {name} ({value!r}) is not known here, and may change what is computed")
        if name in only and value != only[name]:
            raise ConfigError(f"its {name} is {value!r}, and only {only[name]!r} is computed here")
    if rope != {"rope_theta": rope["rope_theta"], "rope_type": "default"}:
        raise ConfigError(f"its rope_parameters are {rope}; only a rope_theta, without scaling, is computed here")
    values |= {"rope_theta": rope["rope_theta"]}
    missing = [name for name in (*CONFIG_NAMES.values(), "rope_theta") if values.get(name) is None]
    if missing:
        raise ConfigError(f"its config.json does not say {', '.join(missing)}")
    fields = {ours: values[theirs] for ours, theirs in CONFIG_NAMES.items()}
    fields |= {"mlp": family.mlp, "qk_norm": family.qk_norm, "rope_base": values["rope_theta"]}
    config = Config.from_dict({"model": fields}).model
    config.validate()
    return config


def weight_names(c: GPTConfig) -> dict[str, dict[str, int]]:
    """Our name of each weight -> their names of the parts that are fused in it, each with its rows, in order.

    A tied head is not among them.
    """
    family, heads, groups = family_of(c), c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    block = {
        "attention_norm": {family.norms[0]: c.d_model},
        "attention.wqkv": {"self_attn.q_proj": heads, "self_attn.k_proj": groups, "self_attn.v_proj": groups},
        "attention.wo": {"self_attn.o_proj": c.d_model},
        "mlp_norm": {family.norms[1]: c.d_model},
        "mlp.w_up": ({"mlp.gate_proj": c.d_ff} if c.mlp == "swiglu" else {}) | {"mlp.up_proj": c.d_ff},
        "mlp.w_down": {"mlp.down_proj": c.d_model},
    }
    if c.qk_norm:
        block |= {f"attention.{x}_norm": {f"self_attn.{x}_norm": c.head_dim} for x in "qk"}
    names = {"embedding": {"model.embed_tokens": c.vocab_size}, "final_norm": {"model.norm": c.d_model}}
    names |= {} if c.tie_embeddings else {"head": {"lm_head": c.vocab_size}}
    for i in range(c.n_layers):
        for ours, parts in block.items():
            names[f"blocks.{i}.{ours}"] = {f"model.layers.{i}.{theirs}": rows for theirs, rows in parts.items()}
    return {f"{o}.weight": {f"{t}.weight": rows for t, rows in parts.items()} for o, parts in names.items()}


def _activations(c: GPTConfig) -> dict[str, Tensor]:
    """What an Apertus holds beside weights: the parameters of each block's xIELU."""
    values = {name: torch.tensor([v] if name.startswith("alpha") else v) for name, v in XIELU.items()}
    blocks = range(c.n_layers) if c.mlp == "relu2" else ()
    return {f"model.layers.{i}.mlp.act_fn.{name}": v.clone() for i in blocks for name, v in values.items()}


def to_hub_weights(weights: dict[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """A model's state_dict under their names, what is fused apart, in tensors of their own."""
    theirs = _activations(c)
    for name, parts in weight_names(c).items():
        pieces = weights[name].detach().split(list(parts.values()))
        theirs |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    return theirs


def from_hub_weights(tensors: dict[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """The inverse of to_hub_weights, in fp32. Raises ConfigError naming what is missing, unknown or another."""
    tensors, ours = dict(tensors), {}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if c.tie_embeddings and head is not None and embedding is not None and torch.equal(head, embedding):
        del tensors["lm_head.weight"]  # said twice; another one is not known here
    for name, expected in _activations(c).items():
        value = tensors.pop(name, torch.tensor(math.nan)).float()
        if value.shape != expected.shape or not torch.allclose(value, expected, rtol=1e-6, atol=0):
            raise ConfigError(f"its {name} is {value.tolist()}, and only {expected.tolist()}, ReLU^2, is computed here")
    for name, parts in weight_names(c).items():
        for part, rows in parts.items():
            if part not in tensors or tensors[part].shape[:1] != (rows,):
                raise ConfigError(f"it has no weight {part} of {rows} rows")
        ours[name] = torch.cat([tensors.pop(part).float() for part in parts])
    if tensors:
        raise ConfigError(f"it has weights that are not known here, such as {min(tensors)}")
    return ours


# Of each tokenizer: what llama.cpp calls its pattern (of bpe's, the nearest, which cuts no number to three digits), and
# the pattern in the form that other programs know, and that Oniguruma, the regular expressions of `tokenizers`, reads
# alike: there {1,3}+ is a loop, not possessive, and $ is the end of any line.
SPLITS = {
    "gpt2": ("gpt-2", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "cl100k_base": (
        "dbrx", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "bpe": ("gpt-2", PATTERNS["bpe"]),
}  # fmt: skip
UNUSED = "<|unused_{}|>"  # stands where a tokenizer has no such id


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: the same ids for ordinary text, behind end-of-text, as every document in training is.

    The characters of a special token are that token there, unless `split_special_tokens` is asked for.
    """
    from tokenizers import AddedToken, Regex, Tokenizer as Fast, decoders, models, pre_tokenizers, processors

    values = tokenizer.to_dict()
    if isinstance(tokenizer, HubTokenizer):
        fast = Fast.from_str(json.dumps(values["definition"]))
    else:
        tokens, letters = [base64.b64decode(token) for token in values["tokens"]], bytes_as_characters()
        written = {token: "".join(letters[b] for b in token) for token in tokens}
        special = {i: token for token, i in values["special_ids"].items()}
        special |= {i: UNUSED.format(i) for i in range(len(tokens), tokenizer.n_vocab) if i not in special}
        # Every way to put a token together: tiktoken joins any two neighbours that make a token, lowest id first.
        cuts = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
        merges = [(written[a], written[b]) for a, b in cuts if a in written and b in written]
        vocabulary = {text: i for i, text in enumerate(written.values())} | {text: i for i, text in special.items()}
        fast = Fast(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
        if values["pattern"] != PATTERNS[tokenizer.name]:
            raise ConfigError(f"the pattern of this {tokenizer.name} tokenizer is of another version of tiktoken")
        split = pre_tokenizers.Split(Regex(SPLITS[tokenizer.name][1]), behavior="isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([split, as_bytes]), decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(special[i], normalized=False, special=True) for i in sorted(special)])
    eot = fast.id_to_token(tokenizer.eot_id)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{eot} $A", pair=f"{eot} $A {eot} $B", special_tokens=[(eot, tokenizer.eot_id)]
    )
    definition: dict[str, Any] = json.loads(fast.to_str())
    return definition


def from_tokenizer_json(definition: dict[str, Any], eot_id: int) -> Tokenizer:
    """A tokenizer with the same ids: the very one, if to_tokenizer_json wrote it. Raises ConfigError."""
    imported = HubTokenizer(definition, eot_id)
    special = {token["content"]: token["id"] for token in definition.get("added_tokens", [])}
    texts = sorted((i, text) for text, i in definition["model"]["vocab"].items() if text not in special)
    special = {text: i for text, i in special.items() if text != UNUSED.format(i)}
    for name, (_, expression) in SPLITS.items():
        split_alike = json.dumps(expression) in json.dumps(definition.get("pre_tokenizer"))
        if split_alike and special.get(END_OF_TEXT) == eot_id:
            ours = Tokenizer(name, PATTERNS[name], [imported.decode_token(i) for i, _ in texts], special)
            if to_tokenizer_json(ours) == definition:
                return ours
    return imported
