"""What every result has: what made it, and a file that it can be kept in, of tensors and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors.torch import save as to_safetensors
from torch import Tensor

from tl_looped.engine.config import Llama3Rope, LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.files import read_safetensors, write_whole
from tl_looped.engine.schedule import LoopSchedule, Pass

Self = TypeVar("Self", bound="Result")

_FORMAT = "tl_looped.result"
# The classes that a file may name besides the result's own; never looked up by import.
_PARTS: dict[str, type] = {part.__name__: part for part in (LoopSchedule, Pass, LoopedConfig, Llama3Rope)}


@dataclass(frozen=True, eq=False)
class Result:
    """Base of all results: a frozen dataclass of tensors, plain values, tuples, lists and dictionaries of them.

    Attributes:
        made_by: model, loop count, initial state or seed, and the options of the call that made it.
    """

    made_by: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers as a table, one row for each cell."""
        raise NotImplementedError(f"{type(self).__name__} has no table.")

    def save(self, path: str | Path) -> Path:
        """Write the result to one file: its tensors as safetensors, the rest as JSON in its header.

        Raises:
            InputError: the file can't be written.
        """
        tensors: dict[str, Tensor] = {}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content = {name: _encode(value, name, tensors) for name, value in fields.items()}
        header = {"format": _FORMAT, "class": type(self).__name__, "content": json.dumps(content)}
        return write_whole(path, to_safetensors(tensors, metadata=header))

    @classmethod
    def load(cls: type[Self], path: str | Path) -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises:
            InputError: no such file, not a result of tl_looped, or the result of another class.
        """
        header, tensors = read_safetensors(path, _FORMAT, "a result")
        if header["class"] != cls.__name__:
            raise InputError(
                f"{str(path)!r} holds a {header['class']}, not a {cls.__name__}: call {header['class']}.load."
            )
        content = json.loads(header["content"])
        names = {field.name for field in dataclasses.fields(cls)}
        if set(content) != names:
            raise InputError(
                f"{str(path)!r} was written by another version of {cls.__name__}: it differs in "
                f"{', '.join(sorted(set(content) ^ names))}."
            )
        return cls(**{name: _decode(value, tensors) for name, value in content.items()})


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go to `tensors` under names that say where they were."""
    if isinstance(value, Tensor):
        while name in tensors:  # two places may spell alike: {"a.b": ...} and {"a": {"b": ...}}
            name += "'"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        parts = [_encode(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{name}: a result's dictionaries have strings as keys.")
        return {"dict": {key: _encode(part, f"{name}.{key}", tensors) for key, part in value.items()}}
    if type(value).__name__ in _PARTS:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **_encode(fields, name, tensors)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} can't be kept in a result.")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_encode`."""
    if isinstance(value, list):
        return [_decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(part, tensors) for part in value["tuple"])
    parts = {key: _decode(part, tensors) for key, part in value["dict"].items()}
    return _PARTS[value["class"]](**parts) if "class" in value else parts
