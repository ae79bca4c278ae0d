"""Checkpoints, whole and exactly: config.json and safetensors in, no code run, nothing unpickled."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_looped.adapters import Source, adapter_for
from tl_looped.adapters.native import to_json
from tl_looped.engine.errors import InputError, LoadError, nearest
from tl_looped.nn import LoopedTransformer

EMBEDDED = Path(__file__).parents[1] / "training" / "checkpoints"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def embedded_names() -> list[str]:
    """The models that come with the package."""
    return sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))


def find(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an embedded model, a local folder, or a hub id (downloaded, without code or pickles)."""
    text = str(name)
    if text in embedded_names():
        return EMBEDDED / text
    path = Path(name)
    if path.is_file():
        raise LoadError(f"{text!r} is a file: pass the folder that holds config.json and the .safetensors files.")
    if path.is_dir():
        return path
    if not _HUB_ID.fullmatch(text):
        raise LoadError(
            f"{text!r} is no folder, no hub id ('owner/name') and no embedded model "
            f"({', '.join(embedded_names())}).{nearest(text, embedded_names())}"
        )
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # the hub's errors have no common base
        raise LoadError(f"{text!r} is no local folder, and the hub gave: {type(error).__name__}: {error}") from error


def load(folder: Path, name: str, device: torch.device, dtype: torch.dtype | None) -> LoopedTransformer:
    """The model in a folder; nothing is loaded unless names and shapes of all weights are right.

    Weights are read one tensor at a time, so peak memory is one copy of them and one tensor.
    """
    config = _read_json(folder / "config.json")
    adapter = adapter_for(config)
    shapes, homes = _stored(folder)
    try:
        cfg = adapter.config(config, frozenset(shapes), name)
    except InputError as error:
        raise LoadError(f"config.json: {error}") from error
    with torch.device("meta"):
        model = LoopedTransformer(cfg)
    sources = adapter.sources(cfg)
    checks = adapter.checked(cfg)
    _check_shapes(model, sources, shapes, set(checks))
    kind = dtype or _stored_dtype(homes[sources["embed.weight"].name], sources["embed.weight"].name)
    if not kind.is_floating_point:
        raise LoadError(f"dtype must be a floating one such as torch.bfloat16, got {kind}.")
    targets: dict[str, list[str]] = {}
    for ours, source in sources.items():
        targets.setdefault(source.name, []).append(ours)
    with tqdm(total=len(shapes), desc=f"Loading {cfg.model_name}", disable=len(shapes) < 200) as bar:
        for file in sorted(set(homes.values())):
            with safe_open(file, framework="pt") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    tensor = tensors.get_tensor(stored)
                    if stored in checks:
                        checks[stored](tensor)
                    for ours in targets.get(stored, ()):
                        if not (ours == "unembed.weight" and cfg.tie_embeddings):
                            _assign(model, ours, sources[ours], tensor, device, kind)
                    bar.update()
    _tie(model, sources, homes)
    return model


def _assign(
    model: nn.Module, name: str, source: Source, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    shape = getattr(module, attribute).shape
    rows = tensor.reshape(-1, *shape[1:])[source.start : source.stop]
    setattr(module, attribute, nn.Parameter(rows.to(device=device, dtype=dtype, copy=True)))


def _tie(model: LoopedTransformer, sources: dict[str, Source], homes: dict[str, Path]) -> None:
    """Make a tied head the embedding itself; a head stored beside it must be equal."""
    if not model.cfg.tie_embeddings:
        return
    model.unembed.weight = model.embed.weight
    head = sources["unembed.weight"].name if "unembed.weight" in sources else None
    if head in homes:
        with safe_open(homes[head], framework="pt") as tensors:
            stored = tensors.get_tensor(head).to(model.embed.weight)
        if not torch.equal(stored, model.embed.weight):
            raise LoadError(f"the config ties the head to the embedding, but the stored {head!r} differs from it.")


def _check_shapes(
    model: LoopedTransformer, sources: dict[str, Source], shapes: dict[str, tuple[int, ...]], extra: set[str]
) -> None:
    """Raise unless the stored tensors are exactly those that make the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {}
    for ours, source in sources.items():
        wanted[source.name] = source.shape or tuple(parameters[ours].shape)
    tied = {sources["unembed.weight"].name} if model.cfg.tie_embeddings and "unembed.weight" in sources else set()
    missing = sorted(set(wanted) - set(shapes) - tied)
    unknown = sorted(set(shapes) - set(wanted) - extra)
    wrong = sorted(name for name in set(shapes) & set(wanted) if shapes[name] != wanted[name])
    problems = []
    if missing:
        problems.append(f"missing: {_some(missing)}")
    if unknown:
        problems.append(f"not known to this family: {_some(unknown)}")
    if wrong:
        problems.append("misshapen: " + _some([f"{n} is {shapes[n]}, not {wanted[n]}" for n in wrong]))
    if problems:
        raise LoadError(
            f"the stored weights are not those of a {model.cfg.family} model of this config. " + ". ".join(problems)
        )


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _stored(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """(shape, file) of every tensor in the folder's safetensors, from their headers alone."""
    files = _weight_files(folder)
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise LoadError(f"{folder} lacks the shards {_some(lost)} that its index names.")
    if not files:
        pickled = [path.name for path in folder.iterdir() if path.suffix in _PICKLED]
        if pickled:
            raise LoadError(
                f"{folder} has only pickled weights ({_some(sorted(pickled))}), which can run code when read: "
                "convert them to safetensors."
            )
        raise LoadError(f"{folder} has no .safetensors weights.")
    shapes: dict[str, tuple[int, ...]] = {}
    homes: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    if name in homes:
                        raise LoadError(f"{name!r} is stored twice: in {homes[name].name} and in {file.name}.")
                    shapes[name], homes[name] = tuple(tensors.get_slice(name).get_shape()), file
        except SafetensorError as error:
            raise LoadError(f"{file} is not a whole safetensors file: {error}") from error
    return shapes, homes


def _weight_files(folder: Path) -> list[Path]:
    """The files that an index names; or model.safetensors; or else every .safetensors file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _stored_dtype(file: Path, name: str) -> torch.dtype:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice(name)[:1].dtype


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise LoadError(f"{path.parent} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no JSON object.")
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder, from tokenizer.json; None when there is none. Runs no code of the checkpoint."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises bare Exception
        raise LoadError(f"the tokenizer.json in {folder} can't be read: {error}") from error


def save(model: LoopedTransformer, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config, weights and tokenizer in our own format: all of it, or nothing."""
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(to_json(model.cfg), indent=1) + "\n", encoding="utf-8")
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
        save_file(weights, partial / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that appears under its name only when the block has ended well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoadError(f"{folder} exists and is not an empty folder: choose another.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    except OSError as error:
        raise LoadError(f"{folder} can't be written: {error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
