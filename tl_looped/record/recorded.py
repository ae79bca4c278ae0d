"""What `record` wrote, read back: tensors by site, layer and loop, rows of a torch Dataset, or a LoopedCache.

The format is safetensors in shards. Of the stores that are there it alone keeps bfloat16 as it is (Arrow, which
`datasets` writes, has no such type: it would be widened, or be integers that only we can read); a shard is one file
that is moved into place whole, so that a kill loses at most the shard that was being made; and a reader maps a file and
touches only the pages of the tensors that it asks for. TransformerLens writes no caches to disk but as pickles.

A folder holds `index.json` (what made it, the places, the shards; it says that all is there once that is so), and
`shard-00000.safetensors`, ...: for every place a tensor [row, ...] under its hook name, a row being one position of one
prompt; and of the rows the prompt, position and token ("row.prompt", "row.pos", "row.token"), of its prompts the
index, length and tokens ("prompt.index", "prompt.length", "prompt.tokens").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from tl_looped.engine.cache import LoopedCache
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import HookNameError, InputError, nearest, resolve_index
from tl_looped.engine.numbers import wide
from tl_looped.engine.prompts import Rows
from tl_looped.engine.results import AnyResult
from tl_looped.engine.runs import Runs
from tl_looped.engine.schedule import HookSite, find_site
from tl_looped.viz.loops import Series, loop_series

INDEX, FORMAT = "index.json", "tl_looped.record 1"
ROW = ("row.prompt", "row.pos", "row.token")
PROMPT = ("prompt.index", "prompt.length", "prompt.tokens")


@dataclass(frozen=True)
class Grid:
    """The places of one site: every layer in every loop; None stands for the one place of a site without them.

    Attributes:
        site: the site without layer and loop.
        layers, loops: those recorded, in order.
    """

    site: HookSite
    layers: tuple[int | None, ...]
    loops: tuple[int | None, ...]

    def name(self, loop: int | None, layer: int | None) -> str:
        """The hook name of a place."""
        return replace(self.site, layer=layer, loop=loop).name

    @property
    def labels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Loops and layers as numbers, −1 for None, as results keep them."""
        loops, layers = (tuple(-1 if one is None else one for one in axis) for axis in (self.loops, self.layers))
        return loops, layers


class Recorded(AnyResult, Dataset[dict[str, Any]]):
    """Activations of many prompts on disk, mapped into memory as they are read.

    A row is one recorded position of one prompt; rows are in the order of the prompts, and in each by position,
    whatever their order in the files. `recorded[i]` is one row as a dictionary, so a `torch.utils.data.DataLoader`
    takes this as it is.

    Attributes:
        folder: where it lies.
        places: hook name of every place, with the dtype and shape of a row there (−1: a key for every token).
        cfg: config of the model.
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.folder = folder
        self.made_by: dict[str, Any] = index["made_by"]
        self.places: dict[str, dict[str, Any]] = index["places"]
        self.cfg = LoopedConfig.from_dict(index["cfg"])
        self._shards: list[dict[str, Any]] = index["shards"]
        self._files: dict[int, Any] = {}

    @classmethod
    def load(cls, path: str | Path) -> Recorded:
        """Open what `record` wrote.

        Raises:
            InputError: no such folder, none of `record`'s, one that is not finished, or one with a file missing or cut.
        """
        folder = Path(path)
        index = read_index(folder)
        if index is None:
            raise InputError(f"{str(path)!r} is no folder that record wrote: it has no {INDEX}.")
        if not index["done"]:
            raise InputError(f"{str(path)!r} is not finished: call record again with the same arguments, it goes on.")
        for shard in index["shards"]:
            file = folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                what = "is missing" if not file.is_file() else f"has not its {shard['bytes']:,} bytes"
                raise InputError(f"{str(file)!r} {what}: call record again with the same arguments, it writes it anew.")
        return cls(folder, index)

    def save(self, path: str | Path) -> Path:
        """Copy the folder to another, which must not be there."""
        if Path(path).exists():
            raise InputError(f"{str(path)!r} is there already: give the name of a new folder.")
        return Path(shutil.copytree(self.folder, path, ignore=shutil.ignore_patterns(".*")))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a process opens its own

    def __repr__(self) -> str:
        size = sum(shard["bytes"] for shard in self._shards)
        made = ", ".join(f"{key}={self.made_by[key]}" for key in ("model", "n_loops", "dtype"))
        sites = ", ".join(dict.fromkeys(HookSite.parse(name).component for name in self.places))
        rows = f"{len(self):,} rows of {sum(shard['prompts'] for shard in self._shards):,} prompts"
        return f"Recorded({made})\n    {rows} at {len(self.places)} places ({sites}), {size / 1e6:,.1f} MB"

    def _contents(self) -> dict[str, Any]:
        return {}

    # Rows.

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self._shards)

    @cached_property
    def _rows(self) -> tuple[dict[str, Tensor], Tensor]:
        """Prompt, position and token of each row, and where in the shards, laid end to end, it lies."""
        columns = {name: torch.cat([self._file(i).get_tensor(name) for i in range(len(self._shards))]) for name in ROW}
        order = columns["row.prompt"].argsort(stable=True)  # in a prompt rows lie by position
        return {name.removeprefix("row."): column[order] for name, column in columns.items()}, order

    @property
    def rows(self) -> pd.DataFrame:
        """Prompt, position and token id of every row."""
        return pd.DataFrame({name: column.numpy() for name, column in self._rows[0].items()})

    @cached_property
    def tokens(self) -> tuple[Tensor, ...]:
        """The tokens of every prompt."""
        found: dict[int, Tensor] = {}
        for i in range(len(self._shards)):
            index, length, tokens = (self._file(i).get_tensor(name) for name in PROMPT)
            found.update(zip(index.tolist(), tokens.split(length.tolist()), strict=True))
        return tuple(found[i] for i in range(len(found)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One row: "prompt", "pos", "token", and the activation at every place under its hook name."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows, each as by itself; a DataLoader calls this for a batch."""
        at = torch.tensor([resolve_index("row", int(row), len(self)) for row in rows])
        columns = {name: column[at].tolist() for name, column in self._rows[0].items()}
        columns |= {name: list(self._read(name, at)) for name in self.places}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    # Activations.

    def tensor(
        self, name: str, layer: int | None = None, loop: int | None = None, rows: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """The activations at one place, [row, ...], to the bit as the run had them.

        Args:
            name: short ("resid_post", "state_post", "prelude.attn_out") or full ("blocks.2.loop.3.hook_resid_post").
            layer: where the name does not say it.
            loop: the same; negative numbers count from the end.
            rows: some of them, in this order; None for all.

        Raises:
            HookNameError: that place was not recorded.
        """
        site, loops = self.cfg.own_site(find_site(name)), self.made_by["n_loops"]
        inner = self.made_by.get("l_cycles")
        schedule = self.cfg.schedule(loops if inner is None else (loops, inner))
        if site.in_layer and site.layer is None and layer is not None:
            site = replace(site, layer=resolve_index("layer", layer, schedule.n_layers(site.stack or "")))
        if site.looped and site.loop is None and loop is not None:
            site = site.at(resolve_index("loop", loop, schedule.n_loops(site.stack)))
        if site.name not in self.places:
            missing = [what for what in ("layer", "loop") if getattr(site, what) is None]
            there = nearest(site.name, self.places)
            say = f" A place has {' and '.join(missing)}: tensor({name!r}, layer, loop)." if missing and there else ""
            raise HookNameError(f"{site.name!r} was not recorded.{there}{say}")
        return self._read(site.name, torch.arange(len(self)) if rows is None else torch.as_tensor(rows))

    def numpy(self, name: str, layer: int | None = None, loop: int | None = None) -> npt.NDArray[Any]:
        """`tensor` as an array; bfloat16, which numpy lacks, as the same numbers in float32."""
        values = self.tensor(name, layer, loop)
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()

    def grid(self, site: str | None = None) -> Grid:
        """The layers and loops at which a site was recorded: all of those layers in all of those loops.

        Args:
            site: short or full name without layer and loop; None where one site was recorded.

        Raises:
            InputError: several sites and no name; a site that was not recorded, or in some loops of some layers only.
        """
        found: dict[HookSite, list[HookSite]] = {}
        for place in map(HookSite.parse, self.places):
            found.setdefault(HookSite(place.component, place.stack), []).append(place)
        if site is None and len(found) > 1:
            raise InputError(f"several sites were recorded: pass site=, one of {[one.name for one in found]}.")
        base = next(iter(found)) if site is None else find_site(site)
        if base not in found:
            raise InputError(f"the site {site!r} was not recorded, but {[one.name for one in found]}.")
        layers = tuple(sorted({one.layer for one in found[base]}, key=lambda i: -1 if i is None else i))
        loops = tuple(sorted({one.loop for one in found[base]}, key=lambda t: -1 if t is None else t))
        if len(layers) * len(loops) != len(found[base]):
            raise InputError(f"{base.name!r} was recorded at other loops in some layers: name its places with tensor.")
        return Grid(base, layers, loops)

    def _file(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = safe_open(self.folder / self._shards[shard]["file"], framework="pt")
        return self._files[shard]

    def _read(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a place, from the shards that have them."""
        at = self._rows[1][rows]
        parts: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for i, shard in enumerate(self._shards):
            mine = ((at >= begin) & (at < begin + shard["rows"])).nonzero()[:, 0]
            if len(mine):
                parts.append((mine, self._file(i).get_tensor(name)[at[mine] - begin]))
            begin += shard["rows"]
        if not parts:
            raise InputError("rows is empty: leave it out for all rows.")
        shape = parts[0][1].shape[1:]
        if any(part.shape[1:] != shape for _, part in parts):
            raise InputError(
                f"{name!r} has as many keys as its prompt, and prompts differ in length: pass rows= of prompts of one "
                "length, or take cache(model, prompts)."
            )
        out = parts[0][1].new_empty(len(at), *shape)
        for mine, part in parts:
            out[mine] = part
        return out

    def cache(self, model: Engine, prompts: Iterable[int]) -> LoopedCache:
        """The activations of some prompts as the `LoopedCache` that `run_with_cache` would give, of what was recorded.

        Args:
            model: the model that made it, or one of the same config.
            prompts: their indices; of one length.

        Raises:
            InputError: another model, prompts of different length or that are not there; or a run whose initial
                state, positions, full attention mask or prefix were given, which are not kept here.
        """
        chosen = [resolve_index("prompt", i, len(self.tokens)) for i in prompts]
        ours, theirs = self.cfg.to_dict(), model.cfg.to_dict()
        other = [key for key, value in theirs.items() if ours[key] != value and key != "model_name"]
        if other:
            raise InputError(f"this was recorded from another model, which differs in {', '.join(other)}.")
        given = ("initial_state", "position_ids", "attention_mask", "prefix")
        kept = [key for key in given if str(self.made_by.get(key)).startswith("given")]
        if kept:
            raise InputError(f"the run was given {kept[0]}, which is not kept here: read activations with tensor.")
        if len({len(self.tokens[i]) for i in chosen}) != 1:
            raise InputError("a cache is of prompts of one length: pass indices of such, at least one.")
        ids = tuple(self.tokens[i] for i in chosen)
        rows = Rows(ids, tuple(torch.ones_like(one, dtype=torch.bool) for one in ids))
        n_loops, source = self.made_by["n_loops"], self.made_by["initial_state"]
        seed = int(source.removeprefix("seed ")) if source.startswith("seed ") else None
        step_sizes = self.made_by.get("step_sizes") and tuple(self.made_by["step_sizes"])
        more = {"l_cycles": self.made_by.get("l_cycles"), "step_sizes": step_sizes}
        run = model.batch_of(Runs(rows, n_loops, 0, n_loops, True, seed=seed, **more), range(len(ids)))
        at = torch.cat([(self._rows[0]["prompt"] == i).nonzero()[:, 0] for i in chosen])
        found = {}
        for name in self.places:
            values = self._read(name, at).unflatten(0, (len(chosen), -1))
            found[name] = values.movedim(1, HookSite.parse(name).pos_axis).contiguous()
        sites, schedule = map(HookSite.parse, self.places), model.cfg.schedule(run.counts)
        loops = {t for site in sites if site.loop is not None for t in schedule.around(site.stack, [site.loop])}
        return LoopedCache(found, model, run, loops=loops)

    # Tables and pictures.

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each place: name, component, stack, layer, loop, dtype, and the shape of a row's activation."""
        table = []
        for name, place in self.places.items():
            site = HookSite.parse(name)
            where = {"component": site.component, "stack": site.stack, "layer": site.layer, "loop": site.loop}
            table.append({"name": name, **where, "dtype": place["dtype"], "shape": tuple(place["shape"])})
        return pd.DataFrame(table).astype({"layer": "Int64", "loop": "Int64"})

    def plot(self, site: str | None = None) -> go.Figure:
        """The root mean square of a site's activations over loops, a line for each layer; reads all of them."""
        grid = self.grid(site)
        if None in grid.loops:
            raise InputError(f"{grid.site.name!r} fires once in a run, so there is nothing to draw over loops.")
        lines = []
        for layer in grid.layers:
            parts = [self._read(grid.name(t, layer), torch.arange(len(self))) for t in grid.loops]
            rms = torch.stack([wide(part).square().mean().sqrt() for part in parts]).double()
            lines.append(Series("" if layer is None else f"layer {layer}", rms))
        return loop_series(
            lines, grid.labels[0], f"root mean square of {grid.site.component}", str(self.made_by["model"])
        )


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None where there is none.

    Raises:
        InputError: another file of that name.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} can't be read as the index of a record: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{str(path)!r} is not the index of a record of this version of tl_looped.")
    return index


def is_whole(path: Path, rows: int) -> bool:
    """Whether a shard is there, with its rows; one that is cut can't be opened."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(ROW[0]).get_shape() == [rows]
    except (OSError, SafetensorError):
        return False
