"""Models in our own format: written whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_looped.adapters.native import to_json
from tl_looped.adapters.weights import some
from tl_looped.engine.errors import InputError, LoadError
from tl_looped.nn import NativeNetwork, build


def save(model: NativeNetwork, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write config, weights and tokenizer in our own format: all of it, or nothing.

    Raises:
        InputError: the model holds modules or weights that are not its own, as adapters; nothing was written.
        LoadError: the folder can't be written, or is not empty.
    """
    _check_own(model)
    with whole_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(to_json(model.cfg), indent=1) + "\n", encoding="utf-8")
        weights = {name: _alone(weight.detach().cpu()) for name, weight in model.named_parameters()}
        save_file(weights, partial / "model.safetensors")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def _alone(weight: Tensor) -> Tensor:
    """A weight in a storage of its own: one that is part of another model's, or of a mapped file, is copied."""
    whole = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    return weight if whole else weight.clone(memory_format=torch.contiguous_format)


def _check_own(model: NativeNetwork) -> None:
    """Raise unless modules and weights are those that the config alone makes, so that they load again."""
    with torch.device("meta"):
        plain = build(model.cfg)
    kinds = {name: type(module) for name, module in plain.named_modules()}
    foreign = [f"{n or 'model'} ({type(m).__name__})" for n, m in model.named_modules() if kinds.get(n) is not type(m)]
    shapes = [{(n, tuple(w.shape)) for n, w in one.named_parameters()} for one in (model, plain)]
    foreign += sorted({f"{name} {shape}" for name, shape in shapes[0] ^ shapes[1]} if not foreign else ())
    if foreign:
        raise InputError(
            f"the model has parts that its config does not make, so a saved copy would not be the model: "
            f"{some(foreign)}. Merge adapters into the weights first (PEFT: merge_and_unload()), or remove them."
        )


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
