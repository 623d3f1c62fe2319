"""Checkpoints: written so that a death at any instant loses nothing, verified when read, never unpickled.

    checkpoints/<run>/config.json, metrics.jsonl, loss.png, status.json
    checkpoints/<run>/step-00001000/model.safetensors, optimizer.safetensors, state.json, config.json,
                                    tokenizer.json, manifest.json (size and sha256 of the others)

A checkpoint is a folder with a manifest. It is written under another name, flushed to the disk and then
renamed, so a folder named step-* is always complete. `load_model` is the one door for all who use a model, and takes
a model of Hugging Face's as well: a folder of config.json, *.safetensors and tokenizer.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import TOKENIZERS, Config, DataConfig, GPTConfig
from errors import ConfigError, UserError
from files import PARTIAL, flush, lock_folder, write_json
from hardware import in_large_pages
from interop import from_hub_config, from_hub_weights, from_tokenizer_json
from model import GPT
from tokenizer import Tokenizer

FORMAT = 1
_REPLACED = f"{PARTIAL}replaced-"
_FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # in a manifest: never a path
_MOST_JSON = 2**28  # bytes of a JSON file; a tokenizer of 100,277 entries takes 2 MB


class CheckpointError(UserError):
    """There is no usable checkpoint, or it does not belong to this run."""

    exit_code = 4


class DamagedCheckpoint(CheckpointError):
    """A checkpoint's bytes are not those that were written."""


class DiskError(UserError):
    """The run's folder cannot be written."""

    exit_code = 6


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder, optimizer step and mean validation loss (nats; None: not measured)."""

    path: Path
    step: int
    val_loss: float | None


# --------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------


def open_run(run_dir: Path) -> IO[str]:
    """Create a run's folder and lock it; keep the returned file open as long as the run lasts.

    Raises DiskError when it cannot be written, ConfigError when another process holds it. Clears what an
    interrupted save left behind.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(run_dir, "choose another --train.run_name")
    except OSError as error:
        raise DiskError(f"cannot write to {run_dir} ({error.strerror}); choose another --train.out_dir") from None
    _put_replaced_back(run_dir)
    for leftover in run_dir.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: Config,
    tokenizer: Tokenizer,
    val_loss: float | None,
) -> Path:
    """Write step-NNNNNNNN and return it; then remove those that train.keep_checkpoints and keep_every do not keep.

    tensors: from gather_tensors. state: whatever else a resume needs (data position, tokens seen), as JSON.
    Raises DiskError when there is no room; what was there before is untouched then.
    """
    final = run_dir / f"step-{step:08d}"
    temporary = run_dir / f"{PARTIAL}step-{step:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, content in tensors.items():
            save_file(content, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", state, indent=None)
        write_json(temporary / "config.json", config.to_dict())
        write_json(temporary / "tokenizer.json", tokenizer.to_dict(), indent=None)
        files = {}
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)  # safetensors leaves files that only their owner may read
            flush(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "val_loss": val_loss, "files": files}
        manifest["sha256"] = _digest(manifest)
        write_json(temporary / "manifest.json", manifest)
        flush(temporary)
        aside = run_dir / f"{_REPLACED}{final.name}"
        if final.exists():  # a resumed run reached a step that it had saved before
            final.rename(aside)
        temporary.rename(final)
        flush(run_dir)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            _put_replaced_back(run_dir)
        raise DiskError(f"checkpoint {final} could not be written ({error}); earlier ones are intact") from None
    _remove_old(run_dir, config.train.keep_checkpoints, config.train.keep_every)
    return final


def _put_replaced_back(run_dir: Path) -> None:
    """A save over a step that was there already, and that ended between its two renames, leaves the old one aside."""
    for aside in run_dir.glob(f"{_REPLACED}step-*"):
        final = run_dir / aside.name.removeprefix(_REPLACED)
        if not final.exists():
            aside.rename(final)


def gather_tensors(model: GPT, optimizers: Iterable[torch.optim.Optimizer], keep: bool) -> dict[str, dict[str, Tensor]]:
    """The contents of model.safetensors and optimizer.safetensors, fp32 on the CPU.

    model: weights by name; a tied head is stored once, as the embedding.
    optimizer: by "parameter name/state name", such as "embedding.weight/exp_avg".
    Under FSDP each process holds some rows of every tensor, so all call this together, and one tensor at a time is
    made whole. keep: whether this process wants them.
    """
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}

    def add(file: str, name: str, tensor: Tensor) -> None:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if keep:
            tensors[file][name] = whole.detach().cpu().contiguous()

    # state_dict() first: FSDP then puts the divided parameters back, where validation left gathered ones.
    for name, weight in model.state_dict().items():
        if name != "head.weight" or not model.config.tie_embeddings:
            add("model", name, weight)
    name_of: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                add("optimizer", f"{name_of[parameter]}/{key}", value)
    return tensors


def _remove_old(run_dir: Path, keep: int, every: int) -> None:
    """Keep the newest `keep` checkpoints, that of each `every`th step, and that with the lowest validation loss."""
    checkpoints = list_checkpoints(run_dir)
    measured = [c for c in checkpoints if c.val_loss is not None]
    best = min(measured, key=lambda c: (c.val_loss, -c.step), default=None)
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best and (every == 0 or checkpoint.step % every):
            # Half removed is never mistaken for complete.
            with contextlib.suppress(OSError):  # as when sync_checkpoints.sh --delete was faster
                checkpoint.path.rename(run_dir / f"{PARTIAL}old-{checkpoint.path.name}")
    for doomed in run_dir.glob(f"{PARTIAL}old-*"):  # NFS does not remove what somebody reads: then the next save does
        shutil.rmtree(doomed, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first, by step (never by a clock). Bytes are not verified here."""
    found = []
    for path in sorted(run_dir.glob("step-" + 8 * "[0-9]")):
        try:
            val_loss = _read_manifest(path).get("val_loss")
        except DamagedCheckpoint:  # found out again, and said, by whoever wants to use it
            val_loss = None
        found.append(Checkpoint(path, int(path.name[5:]), val_loss))
    return found


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The complete checkpoint with the highest step, if there is one."""
    return max(list_checkpoints(run_dir), key=lambda c: c.step, default=None)


def put_damaged_aside(run_dir: Path) -> list[str]:
    """Rename the newest checkpoints whose bytes are not those written to damaged-step-*, until one is sound.

    Returns a line for each. Raises CheckpointError when there were checkpoints and none of them is sound.
    """
    lines: list[str] = []
    why = ""
    while newest := newest_checkpoint(run_dir):
        try:
            verify_checkpoint(newest.path)
            return lines
        except DamagedCheckpoint as error:
            aside = newest.path.with_name(f"damaged-{newest.path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newest.path.rename(aside)
            lines.append(f"warning: {error}; it is now called {aside.name}, and the checkpoint before it is used")
            why = why or f" ({error})"
    if any(run_dir.glob("damaged-step-*")):
        raise CheckpointError(
            f"{run_dir} has no sound checkpoint left, only damaged-step-* folders{why}; copy one again, as step-*, "
            f"or remove them to start the run anew"
        )
    return lines


def find_checkpoint(path: Path) -> Path:
    """A step folder or a model of Hugging Face's as it is, or the newest complete step of a run's folder.

    Raises CheckpointError.
    """
    asked, path = path, path.expanduser().resolve()
    if (path / "manifest.json").is_file() or is_hub_model(path):
        return path
    if not path.is_dir():
        beside = [] if path.exists() else [p.name for p in path.parent.glob("*") if p.is_dir()]
        step = re.fullmatch(r"step-(\d{1,8})", path.name)
        near = [name for name in beside if step and name == f"step-{int(step[1]):08d}"]
        if not path.exists() and (path.parent / "checkpoints" / path.name).is_dir():
            near.append(f"checkpoints/{path.name}")
        near += difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
        if near:
            raise CheckpointError(f"{asked} is not there; did you mean {asked.parent / near[0]}?")
        raise CheckpointError(
            f"{asked} is {'a file' if path.exists() else 'not there'}; give the folder of a run, such as "
            f"checkpoints/demo, one of its step-* folders, or that of a model of Hugging Face's (for evals.py also its "
            f"name on the hub, with the owner's, as in openai-community/gpt2)"
        )
    newest = newest_checkpoint(path)
    if newest is None:
        runs = ", ".join(sorted(p.name for p in path.iterdir() if any(p.glob("step-*/manifest.json"))))
        raise CheckpointError(
            f"{asked} is no run but has some; name one: {runs}"
            if runs
            else f"{asked} holds no complete checkpoint (a step-* folder with a manifest.json)"
        )
    return newest.path


def verify_checkpoint(path: Path) -> None:
    """Compare every byte with the manifest. Raises DamagedCheckpoint naming the first file that differs."""
    for name, expected in _read_manifest(path)["files"].items():
        file = path / name
        if file.is_symlink() or not file.is_file() or file.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{file} is missing or not as long as it was written")
        if _sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} is damaged: its bytes are not those that were written")


def _read_json(file: Path) -> Any:
    try:
        if file.exists() and not (file.is_file() and file.stat().st_size <= _MOST_JSON):
            raise DamagedCheckpoint(f"{file} is not a file, or larger than any that is written here")
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from None
    return tensors


def read_config(path: Path) -> Config:
    """The configuration that a checkpoint was trained with."""
    try:
        config = Config.from_dict(_read_json(path / "config.json"))
        config.model.validate()
        return config
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'} does not fit this code: {error}") from None


def load_model(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer, Config, int]:
    """A verified model for generation, evaluation and export: (model in eval mode, tokenizer, config, step).

    path: a run's folder (its newest checkpoint), a step folder, or a model of Hugging Face's, which has no step (0) and
    of whose configuration only the model, tokenizer and run_name are its own. dtype: of the weights.
    Raises CheckpointError.
    """
    path = find_checkpoint(Path(path))
    if is_hub_model(path):
        return (*_load_hub_model(path, device, dtype), 0)
    try:
        verify_checkpoint(path)
    except DamagedCheckpoint as error:
        raise CheckpointError(f"{error}; use another checkpoint of this run, or copy this one again") from None
    config, tokenizer = read_config(path), load_tokenizer(path)
    model = empty_model(config.model.resolved(tokenizer.n_vocab), dtype)
    load_weights(model, path)
    return model.to(device).eval(), tokenizer, config, _read_manifest(path)["step"]


def empty_model(config: GPTConfig, dtype: torch.dtype) -> GPT:
    """A model in memory that is read fast, whose weights are yet to be filled in."""
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # without a tied head
    weights = dict(zip(shapes, in_large_pages(list(shapes.values()), dtype), strict=True))
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    model.init_rotary()
    return model.to(dtype)  # the rotation's tables


def is_hub_model(path: Path) -> bool:
    """Whether a folder holds a model of Hugging Face's (or some of it); never so a checkpoint, which is verified."""
    if (path / "manifest.json").exists():
        return False
    try:
        return "model_type" in dict(_read_json(path / "config.json"))
    except (DamagedCheckpoint, TypeError, ValueError):
        return False


def _load_hub_model(path: Path, device: torch.device | str, dtype: torch.dtype) -> tuple[GPT, Tokenizer, Config]:
    files = ["model.safetensors"]
    whole = (path / files[0]).is_file()  # then an index beside it is an earlier save's, as for transformers
    if not whole and (path / "model.safetensors.index.json").is_file():
        index = _read_json(path / "model.safetensors.index.json")
        try:
            files = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            files = [""]
        if not all(isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in files):
            raise CheckpointError(f"{path}/model.safetensors.index.json does not name files of its own folder")
    elif not whole:
        pickles = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")))
        raise CheckpointError(
            f"{path} has no model.safetensors"
            + (f"; {pickles} could run code when it is read: have it converted to safetensors" if pickles else "")
        )
    try:
        values = _read_json(path / "config.json")
        config = Config(model=from_hub_config(values))
        config.train = dataclasses.replace(config.train, run_name=path.name)  # what it is called, as in --explain
        eot = values.get("eos_token_id")  # of several, the first is the one between documents
        tokenizer = from_tokenizer_json(_read_json(path / "tokenizer.json"), eot[0] if isinstance(eot, list) else eot)
        name: Any = tokenizer.name if tokenizer.name in TOKENIZERS else "bpe"  # what a run that starts from it needs
        config.data = DataConfig(tokenizer=name, bpe_vocab_size=tokenizer.n_vocab)
        model = empty_model(config.model.resolved(tokenizer.n_vocab), dtype)
        tensors = {name: tensor for file in files for name, tensor in _read_tensors(path / file).items()}
        copy_weights(model, from_hub_weights(tensors, config.model))
    except (ConfigError, RuntimeError) as error:  # RuntimeError: of another shape
        raise CheckpointError(f"{path} cannot be imported: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be imported: a file of it is not what its name says ({error!r})"
        ) from None
    return model.to(device).eval(), tokenizer, config


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with."""
    values = _read_json(path / "tokenizer.json")
    try:
        return Tokenizer.from_dict(values)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path / 'tokenizer.json'} does not fit this code ({error!r})") from None


def load_weights(model: GPT, path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape."""
    tensors = _read_tensors(path / "model.safetensors")
    try:
        copy_weights(model, tensors)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} holds other weights than its config.json says ({error})") from None


def copy_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    """Fill a model, divided by FSDP or not, with weights by name; a tied head's are the embedding's.

    Raises RuntimeError when shapes or names differ, KeyError without an embedding for a tied head.
    """
    if model.config.tie_embeddings:
        weights = weights | {"head.weight": weights["embedding.weight"]}
    own = model.state_dict()
    model.load_state_dict({name: _divided_like(own.get(name), tensor) for name, tensor in weights.items()})


def read_state(path: Path) -> dict[str, Any]:
    """What save_checkpoint got as `state`. Raises CheckpointError when it is not what train.py gives."""
    state: dict[str, Any] = _read_json(path / "state.json")
    wrong = [key for key, kind in _STATE.items() if not isinstance(state, dict) or type(state.get(key)) is not kind]
    if wrong or not all(isinstance(state["data"].get(key), dict) for key in ("identity", "streams")):
        raise CheckpointError(f"{path / 'state.json'} does not fit this code ({', '.join(wrong) or 'data'})")
    return state


_STATE = {
    "step": int, "total_steps": int, "epochs": int, "rows_per_step": int, "tokens_seen": int, "seconds_trained": float,
    "recent_losses": list, "undone": dict, "first_data_step": int, "data": dict,
}  # fmt: skip


def load_training_state(path: Path, model: GPT, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Put weights and optimizer state back. Raises CheckpointError for state of another model."""
    load_weights(model, path)
    parameter_of = dict(model.named_parameters())
    optimizer_of = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for key, tensor in _read_tensors(path / "optimizer.safetensors").items():
        name, _, state_name = key.rpartition("/")
        parameter = parameter_of.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise CheckpointError(f"{path} holds optimizer state {key} of another model than its config.json says")
        state = tensor.to(parameter.device)  # counters such as AdamW's "step" too: a fused one wants them there
        optimizer_of[parameter].state[parameter][state_name] = _divided_like(parameter, state) if state.dim() else state


def _divided_like(parameter: Any, whole: Tensor) -> Tensor:
    """This process's part of a tensor if FSDP divided the parameter it is for; otherwise all of it."""
    if not hasattr(parameter, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # half a second that only FSDP has to wait

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def check_same_run(path: Path, config: Config) -> None:
    """Refuse to resume a run whose model, data or schedule changed. Raises CheckpointError with each change.

    Whether the texts themselves are the same, DatasetPrep.load_state_dict checks. With restart_data both may change.
    """
    saved = read_config(path)
    changes = []
    free_data = set(vars(saved.data)) - _TOKENIZER_FIELDS if config.restart_data else _FREE_DATA_FIELDS
    for group, free in (("data", free_data), ("model", set()), ("train", _FREE_TRAINING_FIELDS)):
        old, new = dataclasses.asdict(getattr(saved, group)), dataclasses.asdict(getattr(config, group))
        changes += [f"{group}.{k} {old[k]} -> {new[k]}" for k in old if k not in free and old[k] != new[k]]
    if changes:
        kept = ("model.", "train.", *(f"data.{name} " for name in _TOKENIZER_FIELDS))  # also by --restart_data
        only_data = not any(change.startswith(kept) for change in changes) and not config.restart_data
        remedy = ", or --restart_data to go on with other documents" if only_data else ""
        raise CheckpointError(
            f"cannot resume {path}: {'; '.join(changes)}. Use the old values, or another --train.run_name for a new "
            f"run{remedy}"
        )


_TOKENIZER_FIELDS = {"tokenizer", "bpe_vocab_size"}  # a model's ids mean what its tokenizer says
# Places, which say nothing about what is there: the data's position carries hashes of the files and refuses others.
_FREE_DATA_FIELDS = {"cache_dir", "local_files", "shards_dir", "val_tokens"}
# What may change between a run and its continuation without changing what is learned. (Batch size and
# accumulation may be traded for each other or for devices: train.py checks their product. lr is compared as it is for
# that product.)
_FREE_TRAINING_FIELDS = {
    "run_name", "out_dir", "batch_size", "gradient_accumulation_steps", "fit_memory", "activation_checkpointing",
    "lr_tokens_per_step", "max_steps", "epochs", "precision", "compile", "fsdp",
    "log_every", "eval_every", "save_every", "save_minutes", "keep_checkpoints", "keep_every",
    "hang_minutes", "trackers", "max_spike",
}  # fmt: skip


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own entry of that name."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json, as it was written. Raises DamagedCheckpoint, or CheckpointError for a later format."""
    file = path / "manifest.json"
    manifest = _read_json(file)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _digest(manifest):
        raise DamagedCheckpoint(f"{file} is damaged")
    if type(version := manifest.get("format")) is int and version > FORMAT:
        raise CheckpointError(f"{path} has format {version}; this code reads up to {FORMAT}: update it")
    files, val_loss = manifest.get("files"), manifest.get("val_loss")
    if not (
        version == FORMAT
        and type(manifest.get("step")) is int
        and isinstance(val_loss, (int, float, type(None)))
        and isinstance(files, dict)
        and files.keys() >= _FILES
        and all(_FILE_NAME.fullmatch(name) and isinstance(entry, dict) for name, entry in files.items())
        and all(type(e.get("size")) is int and isinstance(e.get("sha256"), str) for e in files.values())
        and not file.is_symlink()
    ):
        raise DamagedCheckpoint(f"{file} is none that this code writes: it lists other files, or other things of them")
    return manifest
