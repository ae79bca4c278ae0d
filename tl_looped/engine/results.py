"""What every result has: what made it, and a file that it can be kept in, of tensors and JSON."""

from __future__ import annotations

import base64
import dataclasses
import html
import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from safetensors.torch import save as to_safetensors
from torch import Tensor

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, LoopedError
from tl_looped.engine.files import read_safetensors, write_whole
from tl_looped.engine.parts import ROPE_SCALINGS, QKNorm, Rotary
from tl_looped.engine.schedule import LoopSchedule, Pass

Self = TypeVar("Self", bound="AnyResult")

_FORMAT = "tl_looped.result"
_MOST_ROWS = 12  # of the table in a notebook
_PICTURE_WIDTH = 520  # pixels, of the picture there
_MOST_PICTURE = 150_000  # bytes of it
# The classes that a file may name besides the result's own; never looked up by import.
_PARTS: dict[str, type] = {
    part.__name__: part for part in (LoopSchedule, Pass, LoopedConfig, Rotary, *ROPE_SCALINGS, QKNorm)
}


@runtime_checkable
class _HasStill(Protocol):
    """A figure of `tl_looped.viz`: a room above this one."""

    def still_svg(self) -> str: ...


class AnyResult:
    """What every result can do: say what it is, be shown, be a table or a picture, be kept in a file.

    Results of this library are `Result`s; a cache and a patching result, which are TransformerLens's too, are these.

    Attributes:
        made_by: model, loop count, initial state or seed, and the options of the call that made it.
    """

    made_by: dict[str, Any]

    def __repr__(self) -> str:
        made = ", ".join(f"{name}={value}" for name, value in self.made_by.items() if _is_short(value))
        parts = [f"{name} {[*value.shape]}" for name, value in self._contents().items() if isinstance(value, Tensor)]
        lines = [*_lines(parts), *self._in_words()]
        return f"{type(self).__name__}({made})" + "".join(f"\n    {line}" for line in lines)

    def _in_words(self) -> list[str]:
        """What a reader of the numbers should know at once, in sentences."""
        return []

    def _repr_html_(self) -> str:
        """A small picture where `plot()` draws one, else a table of what it holds; above it, a line of what made it."""
        first, *_ = repr(self).splitlines()
        shown = self._picture() or self._table()
        return f"<div><code>{html.escape(first)}</code>{shown}</div>"

    def _picture(self) -> str:
        """`plot()` as a still picture in HTML; nothing where there is none, or where it asks what to draw."""
        method = type(self).plot
        _, *given = inspect.signature(method).parameters.values()
        if method is AnyResult.plot or any(one.default is one.empty for one in given):
            return ""
        try:
            figure = self.plot()
        except LoopedError:  # several measures, or nothing to draw: the table is left
            return ""
        if not isinstance(figure, _HasStill):
            return ""
        drawn = figure.still_svg()
        if len(drawn) > _MOST_PICTURE:
            return ""
        address = base64.b64encode(drawn.encode()).decode()
        name = html.escape(type(self).__name__)
        return f'<br><img alt="{name}" width="{_PICTURE_WIDTH}" src="data:image/svg+xml;base64,{address}">'

    def _table(self) -> str:
        tensors = {name: value for name, value in self._contents().items() if isinstance(value, Tensor)}
        rows = [
            {"": name, "shape": " × ".join(map(str, value.shape)), **_range(value)}
            for name, value in islice(tensors.items(), _MOST_ROWS)
        ]
        table = pd.DataFrame(rows).to_html(index=False, border=0) if rows else ""
        return table + (f"<i>and {len(tensors) - _MOST_ROWS} more</i>" if len(tensors) > _MOST_ROWS else "")

    def _contents(self) -> dict[str, Any]:
        """What it holds, by name."""
        fields = dataclasses.fields(cast(Any, self))
        return {field.name: getattr(self, field.name) for field in fields}

    def to_dataframe(self) -> pd.DataFrame:
        """The numbers as a table, one row for each cell."""
        raise NotImplementedError(f"{type(self).__name__} has no table.")

    def plot(self, *args: Any, **kwargs: Any) -> go.Figure:
        """The numbers as a picture."""
        raise NotImplementedError(f"{type(self).__name__} has no picture.")

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Show `plot(...)` where one is: under a notebook's cell, or in a browser."""
        self.plot(*args, **kwargs).show()

    def save(self, path: str | Path) -> Path:
        """Write the result to one file: its tensors as safetensors, the rest as JSON in its header.

        Raises:
            InputError: the file can't be written.
        """
        tensors: dict[str, Tensor] = {}
        content = {name: _encode(value, name, tensors) for name, value in self._contents().items()}
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
        names = {field.name for field in dataclasses.fields(cast(Any, cls))}
        if set(content) != names:
            raise InputError(
                f"{str(path)!r} was written by another version of {cls.__name__}: it differs in "
                f"{', '.join(sorted(set(content) ^ names))}."
            )
        return cls(**{name: _decode(value, tensors) for name, value in content.items()})


@dataclass(frozen=True, eq=False, repr=False)
class Result(AnyResult):
    """Base of results: a frozen dataclass of tensors, plain values, tables, tuples, lists and dictionaries of them."""

    made_by: dict[str, Any]


def pairs_of_calls(
    loops: Sequence[int], layers: Sequence[int], values: Float[Tensor, "*axes call call"], name: str, *axes: str
) -> pd.DataFrame:
    """One row for each pair of layer calls: the axes in front, loop, layer, other_loop, other_layer, and the value."""
    *places, call, other = np.indices(values.shape).reshape(values.ndim, -1)
    table = dict(zip(axes, places, strict=True))
    for prefix, index in (("", call), ("other_", other)):
        table[f"{prefix}loop"] = np.array(loops)[index // len(layers)]
        table[f"{prefix}layer"] = np.array(layers)[index % len(layers)]
    return pd.DataFrame({**table, name: values.flatten().numpy()})


def _is_short(value: Any) -> bool:
    return value is not None and isinstance(value, (str, int, float)) and len(str(value)) <= 40


def _lines(parts: Sequence[str]) -> list[str]:
    """Parts in lines of a readable length, six at most."""
    lines = textwrap.wrap(", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts), 100)
    lines = [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
    return lines if len(lines) <= 6 else [*lines[:6], "..."]


def _range(values: Tensor) -> dict[str, str]:
    """The smallest and largest number, in text; empty where there is none."""
    finite = values[values.isfinite()] if values.is_floating_point() else values.flatten()
    low, high = ("", "") if not finite.numel() else (f"{finite.min().item():.4g}", f"{finite.max().item():.4g}")
    return {"least": low, "most": high}


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
    if isinstance(value, pd.DataFrame):
        return {"table": {str(name): column.tolist() for name, column in value.items()}}
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
    if "table" in value:
        return pd.DataFrame(value["table"])
    if "tuple" in value:
        return tuple(_decode(part, tensors) for part in value["tuple"])
    parts = {key: _decode(part, tensors) for key, part in value["dict"].items()}
    return _PARTS[value["class"]](**parts) if "class" in value else parts
