"""Activations of any number of prompts, streamed to disk while the model runs.

Which prompts run together and which rows a shard has follow from the call alone, and a shard is moved into place when
it is whole. So the call that was killed, made again, goes on with the shards that are missing, and its files are those
of an undisturbed one, to the byte. `tl_looped.record.recorded` describes the format, and why it is this one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import HookNameError, InputError, check_count, resolve_index
from tl_looped.engine.files import write_whole
from tl_looped.engine.identity import differences, digest, weights_digest
from tl_looped.engine.runs import Prompts, RunOptions, Runs, with_run_options
from tl_looped.engine.schedule import GRAD, HookSite, LoopCount, LoopSchedule, find_site
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.observation import BATCH_SIZE
from tl_looped.observe.runners import LoopedRunner
from tl_looped.observe.watching import watch
from tl_looped.record.recorded import FORMAT, INDEX, PROMPT, ROW, Recorded, is_whole, read_index

Positions = Literal["all", "last"] | Sequence[int]

SHARD_BYTES = 2**27
"""About how large a shard is: 128 MB. Recording holds one in memory."""

_KEYS = -1  # in a row's shape: as many as the prompt has tokens


@with_run_options
def record(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    sites: str | Sequence[str],
    out: str | Path,
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions = "all",
    batch_size: int = BATCH_SIZE,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> Recorded:
    """Write activations of every prompt to a folder, exact to the bit, in memory that does not grow with the prompts.

    Prompts of one length run together and no others do, so nothing is padding. The same call goes on from what is in
    the folder, and returns at once where all is there. The bar says how large the record will be.

    Args:
        model: in evaluation mode. Hooks that are on it act, and are part of what made the record.
        prompts: in any form; padding is cut off.
        n_loops: loops to run; None for the count the model was trained with.
        sites: what to record, by short or full names: "resid_post", "state_post", "prelude.attn_out", "pattern", or
            "blocks.2.loop.3.attn.hook_z" for one place.
        out: the folder; made where it is not there.
        loops: of the run, of sites that fire in every loop; None for all. Negative numbers count from the end. Of a
            stack that runs several times in a loop of the run, all of these.
        layers: of sites of layers that loop; None for all.
        positions: "all", "last", or some of every prompt (negative ones count from its end); of queries, for patterns.
        batch_size: most prompts to run at once.
        shard_bytes: about how large a file is.
        progress: show a bar.
        options: see `RunOptions`.

    Raises:
        InputError: before anything is written, for input that is wrong, a folder that holds another record (it says
            what differs) or other files, one that another process writes, or a disk that is too small.
    """
    check_eval(check_looped(model, several_stacks=True))
    check_count("batch_size", batch_size)
    check_count("shard_bytes", shard_bytes)
    runs = model.prepare(prompts, n_loops, **options)
    runner = LoopedRunner(model, runs)  # refuses parts of runs
    names = [sites] if isinstance(sites, str) else list(sites)
    at_loops = _chosen("loop", loops, runs.n_loops)
    at_layers = _chosen("layer", layers, model.cfg.n_core)
    wanted = places_of(model, runner.schedule, names, at_loops, at_layers)
    picked = _picked(runs, positions)
    batches = runs.equal_lengths(batch_size)
    tokens = [runs.rows.unpadded(row) for row in range(len(runs))]
    made_by = {
        **runner.describe(),
        "prompts": digest(*tokens),
        "weights": weights_digest(model),
        "sites": names,
        "loops": at_loops,
        "layers": at_layers,
        "positions": positions if isinstance(positions, str) else list(positions),
        "batch_size": batch_size,
        "shard_bytes": shard_bytes,
    }
    with _alone(Path(out)) as folder:
        index = _go_on(folder, {"format": FORMAT, "made_by": made_by, "cfg": model.cfg.to_dict()})
        recorder = _Recorder(model, runs, wanted, picked, tokens)
        recorder.places = index.get("places") or recorder.look(batches[0])
        return _write(folder, index, recorder, recorder.shards(batches, shard_bytes), progress)


def _write(
    folder: Path, index: dict[str, Any], recorder: _Recorder, shards: Sequence[_Shard], progress: bool
) -> Recorded:
    """Write the shards that are missing, and then the index."""
    missing = [shard for shard in shards if not is_whole(folder / shard.file, shard.rows)]
    free, needed = shutil.disk_usage(folder).free, sum(shard.bytes for shard in missing)
    size = {name: tqdm.format_sizeof(n, "B") for name, n in (("free", free), ("needed", needed))}
    if needed > free:
        raise InputError(
            f"the record needs {size['needed']} more, and {str(folder)!r} has {size['free']} free: record fewer sites, "
            "loops, layers or positions, or give a folder on another disk."
        )
    index |= {"places": recorder.places, "shards": []}
    if missing or not index["done"]:
        write_whole(folder / INDEX, json.dumps({**index, "done": False}, indent=1))
    name = f"Recording {len(recorder.places)} places, {size['needed']}"
    with tqdm(total=sum(shard.prompts for shard in shards), desc=name, unit="prompt", disable=not progress) as bar:
        bar.update(bar.total - sum(shard.prompts for shard in missing))
        for shard in missing:
            write_whole(folder / shard.file, partial(save_file, recorder.take(shard, bar), metadata={"format": FORMAT}))
    for one in shards:
        there = (folder / one.file).stat().st_size
        index["shards"].append({"file": one.file, "rows": one.rows, "prompts": one.prompts, "bytes": there})
    index["done"] = True
    write_whole(folder / INDEX, json.dumps(index, indent=1))
    return Recorded(folder, index)


def _chosen(name: str, given: Iterable[int] | None, size: int) -> list[int]:
    """Loops or layers in order; all where none are named."""
    return list(range(size)) if given is None else sorted({resolve_index(name, one, size) for one in given})


def places_of(
    model: LoopedModel, schedule: LoopSchedule, names: Sequence[str], loops: Sequence[int], layers: Sequence[int]
) -> dict[str, HookSite]:
    """Every place to record, by its name."""
    if not names or not loops or not layers:
        raise InputError("nothing would be recorded: name at least one site, and leave out loops and layers for all.")
    found: list[HookSite] = []
    for name in names:
        site = model.cfg.own_site(find_site(name))
        if site.component.endswith(GRAD):
            raise HookNameError(f"{name!r} is a gradient, and recording runs forward only: take model.run_with_cache.")
        each = [site]
        if site.in_layer:
            count = schedule.n_layers(site.stack or "")
            chosen = layers if site.looped else range(count)
            each = [replace(site, layer=i) for i in (chosen if site.layer is None else [site.layer])]
            if not count:
                raise HookNameError(f"{name!r}: this model has no {site.stack} ({schedule.describe()}).")
        for one in each:
            model.hook_dict.shared(one.name)
            if one.loop is not None:
                resolve_index(f"{name!r}: loop", one.loop, schedule.n_loops(one.stack))
            each_loop = one.looped and one.loop is None
            found += [one.at(t) for t in schedule.loops_in(one.stack, loops)] if each_loop else [one]
    return {one.name: one for one in found}


def _picked(runs: Runs, positions: Positions) -> dict[int, Tensor | None]:
    """For every length of prompts the positions to record; None for all."""
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise InputError(f"positions must be 'all', 'last' or a list of positions, got {positions!r}.")
        positions = [] if positions == "all" else [-1]
        every = not positions
    else:
        every = False
        if not len(positions):
            raise InputError("positions is empty, so nothing would be recorded: pass 'all', 'last' or some.")
    picked: dict[int, Tensor | None] = {}
    for row, real in enumerate(runs.rows.real):
        length = int(real.sum())
        if length not in picked:
            chosen = sorted(resolve_index(f"prompt {row}: position", one, length) for one in positions)
            if len(set(chosen)) < len(chosen):
                raise InputError(f"prompt {row} has {length} tokens, so {list(positions)} names a position twice.")
            picked[length] = None if every else torch.tensor(chosen)
    return picked


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Make the folder, and keep others from writing to it; the lock ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process records to {str(folder)!r}: wait for it, or give another folder.") from error
    except OSError as error:
        raise InputError(f"{str(folder)!r} can't be written: {error}.") from error
    try:
        yield folder
    finally:
        lock.release()


def _go_on(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The index to go on with: the folder's own where the same call began it, else a new one."""
    _remove(folder, f".{INDEX}-*")
    here = json.loads(json.dumps(index))
    there = read_index(folder)
    if there is None:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise InputError(f"{str(folder)!r} holds other files ({', '.join(others[:3])}): give a new folder.")
        return {**here, "done": False}
    differing = differences(there["made_by"], here["made_by"])
    if differing:
        raise InputError(
            f"{str(folder)!r} holds the record of another call: {differing}. Give another folder, or the same "
            "arguments."
        )
    _remove(folder, ".shard-*")
    _remove(folder, ".tmp*")  # safetensors' own
    return there


def _remove(folder: Path, pattern: str) -> None:
    """Remove what a kill left half written."""
    for path in folder.glob(pattern):
        path.unlink()


@dataclass(frozen=True)
class _Shard:
    """What one file holds: some batches, their rows and bytes."""

    file: str
    batches: tuple[list[int], ...]
    rows: int
    bytes: int

    @property
    def prompts(self) -> int:
        return sum(map(len, self.batches))


class _Recorder:
    """Runs batches and lays their activations out in rows.

    Attributes:
        places: dtype and shape of a row at every place.
    """

    def __init__(
        self,
        model: LoopedModel,
        runs: Runs,
        wanted: dict[str, HookSite],
        picked: dict[int, Tensor | None],
        tokens: Sequence[Tensor],
    ):
        self.model, self.runs, self.wanted, self.picked, self.tokens = model, runs, wanted, picked, tokens
        self._names = list(dict.fromkeys(site.at(None).name for site in wanted.values()))
        schedule = model.cfg.schedule(runs.counts)
        looped = [schedule.around(site.stack, [site.loop]) for site in wanted.values() if site.loop is not None]
        self._loops = {t for around in looped for t in around} or None
        self._only_loops = all(site.looped for site in wanted.values())
        self.places: dict[str, dict[str, Any]] = {}
        self._seen: dict[int, list[tuple[HookSite, Tensor]]] = {}  # of a batch that has run, by its first prompt

    def _run(self, batch: Sequence[int], put: Any) -> None:
        """Run some prompts, and call `put` with name and rows, [row, ...], at each place."""
        pick = self.picked[len(self.tokens[batch[0]])]

        def see(site: HookSite, x: Tensor) -> None:
            if site.name in self.wanted:
                axis = site.pos_axis
                chosen = x if pick is None else x.index_select(axis, pick.to(x.device))
                put(site, chosen.movedim(axis, 1).flatten(0, 1))

        if batch[0] in self._seen:
            for site, rows in self._seen.pop(batch[0]):
                put(site, rows)
            return
        run = self.model.batch_of(self.runs, batch)
        watch(self.model, run, self._names, see, loops=self._loops, only_loops=self._only_loops)

    def look(self, batch: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The dtype and shape of a row at every place, from a run of one batch, which is not run again."""
        seen: list[tuple[HookSite, Tensor]] = []
        self._run(batch, lambda site, rows: seen.append((site, rows.clone())))
        self._seen[batch[0]] = seen
        found = {}
        for site, rows in seen:
            axes = [axis for i, axis in enumerate(site.axes) if i not in (0, site.pos_axis)]
            shape = [_KEYS if axis == "key" else size for axis, size in zip(axes, rows.shape[1:], strict=True)]
            found[site.name] = {"dtype": str(rows.dtype).removeprefix("torch."), "shape": shape}
        if missing := [name for name in self.wanted if name not in found]:
            raise HookNameError(f"{missing[0]!r} did not fire in a run of this model.")
        return {name: found[name] for name in self.wanted}

    def _shape(self, name: str, rows: int, length: int) -> list[int]:
        return [rows, *(length if size == _KEYS else size for size in self.places[name]["shape"])]

    def _dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.places[name]["dtype"])

    def _size(self, batch: Sequence[int]) -> tuple[int, int]:
        """(rows, bytes) of a batch."""
        length = len(self.tokens[batch[0]])
        pick = self.picked[length]
        rows = len(batch) * (length if pick is None else len(pick))
        held = sum(math.prod(self._shape(name, rows, length)) * self._dtype(name).itemsize for name in self.places)
        return rows, held + 8 * (len(ROW) * rows + (2 + length) * len(batch))

    def shards(self, batches: Sequence[list[int]], most: int) -> list[_Shard]:
        """Batches in files of about so many bytes; of one length where rows have keys."""
        keyed = any(_KEYS in place["shape"] for place in self.places.values())
        groups: list[list[list[int]]] = []
        sizes: list[tuple[int, int]] = []
        for batch in batches:
            rows, held = self._size(batch)
            other = keyed and groups and len(self.tokens[groups[-1][0][0]]) != len(self.tokens[batch[0]])
            if not groups or other or sizes[-1][1] + held > most:
                groups.append([])
                sizes.append((0, 1024 + 160 * len(self.places)))  # about what the header takes
            groups[-1].append(batch)
            sizes[-1] = (sizes[-1][0] + rows, sizes[-1][1] + held)
        return [
            _Shard(f"shard-{i:05}.safetensors", tuple(group), *size)
            for i, (group, size) in enumerate(zip(groups, sizes, strict=True))
        ]

    def take(self, shard: _Shard, bar: tqdm) -> dict[str, Tensor]:
        """Run a shard's batches; what it holds, by name."""
        length = len(self.tokens[shard.batches[0][0]])
        tensors = {
            name: torch.empty(self._shape(name, shard.rows, length), dtype=self._dtype(name)) for name in self.places
        }
        columns: dict[str, list[Tensor]] = {name: [] for name in (*ROW, *PROMPT)}
        begin = 0
        for batch in shard.batches:

            def put(site: HookSite, rows: Tensor) -> None:
                tensors[site.name][begin : begin + len(rows)].copy_(rows)  # noqa: B023 - called in this turn

            self._run(batch, put)
            ids, index = torch.stack([self.tokens[row] for row in batch]), torch.tensor(batch)
            pick = self.picked[ids.shape[1]]
            at = torch.arange(ids.shape[1]) if pick is None else pick
            rows = (index.repeat_interleave(len(at)), at.repeat(len(batch)), ids[:, at].flatten())
            of_prompts = (index, torch.full_like(index, ids.shape[1]), ids.flatten())
            for name, column in zip((*ROW, *PROMPT), (*rows, *of_prompts), strict=True):
                columns[name].append(column)
            begin += len(rows[0])
            bar.update(len(batch))
        return tensors | {name: torch.cat(parts) for name, parts in columns.items()}
