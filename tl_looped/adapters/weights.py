"""Weights by name, wherever they are: in safetensors files, or in a model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_looped.engine.errors import LoadError

FORMATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # at any depth, by torch
_PREFIXES = ("module.", "model.", "transformer.", "gpt.")  # by what trained a model, and by parts of one
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read: `format` as "BF16" or "I8"."""

    shape: tuple[int, ...]
    format: str


@runtime_checkable
class Weights(Protocol):
    """Tensors by name, of which headers can be had before any is read."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Of every tensor."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, in the order that is quick to read."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        ...

    def named_as(self, wanted: set[str]) -> Weights:
        """The same tensors under the names that a family has, where all carry a prefix that it has not, or lack one."""
        ...


class FolderWeights:
    """Every tensor in a folder's safetensors files, which are mapped into memory and not read before they are used.

    Args:
        folder: has the files that model.safetensors.index.json names, or model.safetensors, or any others.

    Raises:
        LoadError: no files, a broken one, a missing shard, a tensor that is stored twice.
    """

    def __init__(self, folder: Path):
        self._homes: dict[str, tuple[Path, str]] = {}
        self.headers: dict[str, Header] = {}
        for file in _existing(folder):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                        if name in self._homes:
                            home = self._homes[name][0].name
                            raise LoadError(f"{name!r} is stored twice: in {home} and in {file.name}.")
                        header = tensors.get_slice(name)
                        self._homes[name] = (file, name)
                        self.headers[name] = Header(tuple(header.get_shape()), header.get_dtype())
            except SafetensorError as error:
                raise LoadError(f"{file} is not a whole safetensors file: {error}") from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file."""
        for file in sorted({home for home, _ in self._homes.values()}):
            with safe_open(file, framework="pt") as tensors:
                for name, (home, stored) in self._homes.items():
                    if home == file:
                        yield name, tensors.get_tensor(stored)

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        file, stored = self._homes[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(stored)

    def named_as(self, wanted: set[str]) -> FolderWeights:
        """See `Weights`."""
        names = family_names(self._homes, wanted)
        self._homes = {ours: self._homes[theirs] for ours, theirs in names.items()}
        self.headers = {ours: self.headers[theirs] for ours, theirs in names.items()}
        return self


class MemoryWeights:
    """Tensors that are in memory already.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        formats = {dtype: name for name, dtype in FORMATS.items()}
        self.headers = {
            name: Header(tuple(one.shape), formats.get(one.dtype, str(one.dtype))) for name, one in tensors.items()
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor."""
        yield from self._tensors.items()

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        return self._tensors[name]

    def named_as(self, wanted: set[str]) -> MemoryWeights:
        """See `Weights`."""
        return MemoryWeights({ours: self._tensors[name] for ours, name in family_names(self._tensors, wanted).items()})


def family_names(stored: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """Stored names by the names that they have in the family: the same, or all without a prefix, or all with one.

    Training wrappers add prefixes, one over another, and a model that was saved without its head lacks one, as GPT-2's
    on the hub.
    """
    same = {name: name for name in stored}
    bare = {_without_wrappers(name): name for name in same}
    kinds, level = [same, bare], [bare]
    for _ in range(2):
        level = [
            {name.removeprefix(prefix): one for name, one in names.items()}
            for names in level
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in names)
        ]
        kinds += level
    kinds += [{prefix + name: one for name, one in bare.items()} for prefix in _PREFIXES]
    best = max(kinds, key=lambda names: len(wanted & set(names)))  # the first of those that are equally good
    return best if len(best) == len(same) else same


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _existing(folder: Path) -> list[Path]:
    """The folder's weight files, all of them there."""
    files = _weight_files(folder)
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise LoadError(f"{folder} lacks the shards {some(lost)} that its index names.")
    if files:
        return files
    pickled = [path.name for path in folder.iterdir() if path.suffix in PICKLED]
    if pickled:
        raise LoadError(
            f"{folder} has only pickled weights ({some(sorted(pickled))}), which can run code when read: "
            f"run tl-looped convert {folder} NEW_FOLDER, and load that."
        )
    raise LoadError(f"{folder} has no .safetensors weights.")


def _weight_files(folder: Path) -> list[Path]:
    """The files that an index names; or model.safetensors; or else every .safetensors file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        LoadError: no such file, or another content.
    """
    return read_object(path, json.loads, json.JSONDecodeError, "JSON")


def read_object(path: Path, parse: Callable[[str], Any], broken: type[Exception], what: str) -> dict[str, Any]:
    """The names and values that a file holds; see `read_json`."""
    if not path.exists():
        raise LoadError(f"{path.parent} has no {path.name}.")
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, broken) as error:
        raise LoadError(f"{path} is not {what}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no {what} object.")
    return content
