"""What `tl_looped.observe` returns: measures at every layer call of every prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, nearest
from tl_looped.engine.files import check_output
from tl_looped.engine.identity import differences
from tl_looped.engine.numbers import quantile
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import LoopSchedule
from tl_looped.viz.curves import Group, grouped_curves

_SAVE_EVERY = 5.0  # seconds; and whenever a call ends


@dataclass(frozen=True, eq=False, repr=False)
class Observed(Result):
    """Measures at every place of every prompt: each layer call, each loop, or once, by what the measure reads.

    A number is NaN where its measure is undefined: everywhere for a prompt that is not done, at loop 0 for what
    compares with the loop before, and for what compares loops in layers that run once. Statistics are over the prompts
    whose number is defined, each prompt counting once whatever its length; over none they are NaN.

    Attributes:
        schedule: which layer runs at which realised depth.
        tokens: each prompt's tokens.
        done: which prompts have run: all of them, but in the file of a run that was interrupted.
        labels, units: of each measure, by its name.
        kinds: what a measure's places are: "depth", every layer call; "loop", every loop; "once".
        stacks: of those of every loop, whose loops they are, where two stacks loop; "" for the loops of the run.
        axes: what each measure has besides prompt and place, such as ("head",).
        values: each measure, averaged over the positions where it is defined.
        per_token: for measures that were asked for, each prompt's numbers, [place, *axes, pos]; None for a prompt that
            is not done.
    """

    schedule: LoopSchedule
    tokens: tuple[Int[Tensor, "_"], ...]
    done: Bool[Tensor, " prompt"]
    labels: dict[str, str]
    units: dict[str, str]
    kinds: dict[str, str]
    axes: dict[str, tuple[str, ...]]
    values: dict[str, Float[Tensor, "prompt place *axes"]]
    per_token: dict[str, tuple[Tensor | None, ...]]
    stacks: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Float[Tensor, "prompt place *axes"]:
        """One measure's values.

        Raises:
            InputError: it was not taken.
        """
        if name not in self.values:
            raise InputError(f"there is no measure {name!r} here, but {list(self.values)}.{nearest(name, self.values)}")
        return self.values[name]

    def mean(self, name: str) -> Float[Tensor, "place *axes"]:
        """Mean over prompts."""
        return self[name].nanmean(0)

    def var(self, name: str) -> Float[Tensor, "place *axes"]:
        """Variance over prompts, with n − 1 below; NaN for fewer than two prompts."""
        values = self[name]
        count = (~values.isnan()).sum(0)
        squares = (values - values.nanmean(0)).square().nansum(0)
        return torch.where(count > 1, squares / (count - 1).clamp(min=1), float("nan"))

    def quantile(self, name: str, q: float) -> Float[Tensor, "place *axes"]:
        """Quantile over prompts, between two of them by linear interpolation.

        Args:
            name: of the measure.
            q: from 0 to 1; 0.5 for the median.

        Raises:
            InputError: no such measure, or q out of range.
        """
        return quantile(self[name], check_number("q", q, 0.0, 1.0, low_too=True, high_too=True), dim=0)

    def by_loop(self, name: str, stack: str | None = None) -> Float[Tensor, "loop *axes"]:
        """Mean over prompts by loop: [loop, *axes], or for what layers have [loop, layer, *axes] of the core.

        Args:
            name: of the measure.
            stack: of what layers have, whose layers and loops; None for the only stack that loops.

        Raises:
            InputError: no such measure, one that fires once, a model without loops, or with two stacks and none named.
        """
        return self._loops(self.mean(name), name, 0, stack)

    def prompts_by_loop(self, name: str, stack: str | None = None) -> Float[Tensor, "prompt loop *axes"]:
        """Each prompt's numbers by loop: [prompt, loop, *axes], or for what layers have [prompt, loop, layer, *axes].

        Args:
            name, stack: as in `by_loop`.

        Raises:
            InputError: what `by_loop` refuses.
        """
        return self._loops(self[name], name, 1, stack)

    def tokens_by_loop(
        self, name: str, stack: str | None = None
    ) -> tuple[Float[Tensor, "loop *axes token"], dict[str, Int[Tensor, " token"]]]:
        """A measure for every token of every prompt, and each token's "prompt" and "pos".

        Args:
            name: of a measure kept for every token, with `per_token`.
            stack: as in `by_loop`.

        Returns:
            [loop, *axes, token], or for what layers have [loop, layer, *axes, token] of the core.

        Raises:
            InputError: it was not kept, or a prompt has not run.
        """
        if name not in self.per_token:
            raise InputError(
                f"{name!r} was not kept for every token, but {list(self.per_token)}: pass per_token=[{name!r}] to "
                "observe, with a measure of that name."
            )
        kept = [values for values in self.per_token[name] if values is not None]
        if len(kept) < len(self.tokens):
            missing = [i for i, values in enumerate(self.per_token[name]) if values is None]
            raise InputError(f"prompts {missing[:5]} have not run: call observe again with the same save_to.")
        lengths = torch.tensor([one.shape[-1] for one in kept])
        places = {
            "prompt": torch.repeat_interleave(torch.arange(len(kept)), lengths),
            "pos": torch.cat([torch.arange(int(length)) for length in lengths]),
        }
        return self._loops(torch.cat(kept, dim=-1), name, 0, stack), places

    def _loops(self, values: Tensor, name: str, axis: int, stack: str | None) -> Tensor:
        """Places as loops, or as loops and layers of a stack."""
        looping, kind = self.schedule.looping(), self.kinds[name]
        if not looping:
            raise InputError(f"this model has no loops ({self.schedule.describe()}): take mean({name!r}).")
        if kind == "once":
            raise InputError(f"{name!r} reads what fires once in a run: take mean({name!r}).")
        if kind == "loop":
            return values
        if stack is None and len(looping) == 1:
            (stack,) = looping
        if stack is None or stack not in looping:
            said = "" if stack is None else f", got {stack!r}"
            raise InputError(
                f"what loops is {' and '.join(looping)}: pass stack={' or '.join(map(repr, looping))}{said}."
            )
        loops, layers = self.schedule.n_loops(stack), self.schedule.n_layers(stack)
        depths = [self.schedule.realised_depth(stack, layer, t) for t in range(loops) for layer in range(layers)]
        return values.index_select(axis, torch.tensor(depths)).unflatten(axis, (loops, layers))

    def to_dataframe(self, name: str | None = None) -> pd.DataFrame:
        """One row for each number: measure, prompt, depth, stack, layer, loop, the measure's own axes, value.

        What a row does not have is missing (NA): `loop` in layers that run once; depth, stack and layer of what is no
        layer's.

        Args:
            name: of one measure; None for all.
        """
        tables = []
        for one in self.values if name is None else [name]:
            values = self[one].double().numpy()
            places = dict(
                zip(("prompt", "place", *self.axes[one]), map(np.ravel, np.indices(values.shape)), strict=True)
            )
            at = self._where(one).iloc[places["place"]].reset_index(drop=True)
            own = {axis: pd.array(places[axis], dtype="Int64") for axis in self.axes[one]}  # not all measures have them
            head = pd.DataFrame({"measure": one, "prompt": places["prompt"]})
            tables.append(pd.concat([head, at, pd.DataFrame({**own, "value": values.ravel()})], axis=1))
        return pd.concat(tables, ignore_index=True)

    def _where(self, name: str) -> pd.DataFrame:
        """What each place of a measure is: depth, stack, layer and loop."""
        calls, owner = list(self.schedule.layer_calls()), self.stacks.get(name) or None
        rows: dict[str, list[tuple[int | None, str | None, int | None, int | None]]] = {
            "depth": [(depth, *call) for depth, call in enumerate(calls)],
            "loop": [(None, owner, None, t) for t in range(self.schedule.n_loops(owner))],
            "once": [(None, None, None, None)],
        }
        depth, stack, layer, loop = zip(*rows[self.kinds[name]], strict=True)
        depth, layer, loop = (pd.array(list(numbers), dtype="Int64") for numbers in (depth, layer, loop))
        return pd.DataFrame({"depth": depth, "stack": list(stack), "layer": layer, "loop": loop})

    def plot(self, name: str | None = None, group: Group = "depth", *, log: bool = False) -> go.Figure:
        """One measure's mean over prompts (and over its own axes, such as heads), with its quartiles over prompts.

        Args:
            name: of the measure; None where there is only one.
            group: for what layers have, over "depth"; "loop": a line for every loop; "layer": a line for every core
                layer, over loops. What has no layers is drawn over loops.
            log: a logarithmic axis.

        Raises:
            InputError: several measures and no name, no such measure, or one that fires once in a run.
        """
        if name is None:
            if len(self.values) != 1:
                raise InputError(f"there are the measures {list(self.values)}: say which to plot.")
            (name,) = self.values
        rest = self.axes.get(name, ())
        values = self[name].flatten(2).nanmean(-1) if rest else self[name]
        if self.kinds[name] == "once":
            raise InputError(f"{name!r} reads what fires once in a run, so there is nothing to draw it over.")
        over_loops = self.kinds[name] == "loop"
        prompts = int(self.done.sum())
        what = f"mean over {prompts} prompts" if prompts > 1 else "one prompt"
        what += "".join(f", {axis}s" for axis in rest)
        quartiles = (quantile(values, 0.25, dim=0), quantile(values, 0.75, dim=0)) if prompts > 1 else None
        return grouped_curves(
            values.nanmean(0),
            LoopSchedule.looped(0, 1, 0, values.shape[1]) if over_loops else self.schedule,
            "layer" if over_loops else group,
            label=self.labels[name],
            unit=self.units[name],
            title=f"{name}: {self.made_by.get('model', '')}, {what}",
            band=quartiles,
            band_name="quartiles over prompts",
            log=log,
        )


class Store:
    """All prompts' numbers so far, in memory and in a file.

    Args:
        empty: the result before anything has run.
        path: the file; None for none. One that is there must be of the same call, and its numbers are taken over.

    Raises:
        InputError: the file can't be written, or another call made it: the message says what differs.
    """

    def __init__(self, empty: Observed, path: str | Path | None):
        self._empty = empty
        self.done = empty.done.clone()
        self.values: dict[str, Tensor] = {}
        self.per_token = {name: list(values) for name, values in empty.per_token.items()}
        self.path = None if path is None else check_output(path)
        self._dirty, self._saved_at = False, time.monotonic()
        if self.path is not None and self.path.exists():
            self._go_on(Observed.load(self.path))

    def _go_on(self, saved: Observed) -> None:
        """Take over what a file has, if the same call made it."""
        differing = differences(saved.made_by, self._empty.made_by)
        if differing:
            raise InputError(
                f"{str(self.path)!r} was made by another call: {differing}. Give save_to another name, or "
                "the same arguments."
            )
        self.done, self.values = saved.done, saved.values
        self.per_token = {name: list(values) for name, values in saved.per_token.items()}

    def put(self, rows: Sequence[int], values: Mapping[str, Tensor], per_token: Mapping[str, Tensor]) -> None:
        """Add the numbers of some prompts, each [row, depth, *axes], those of tokens with the position last."""
        for name, new in values.items():
            if name not in self.values:
                shape = (len(self.done), *new.shape[1:])
                self.values[name] = torch.full(shape, float("nan"), dtype=new.dtype)
            if self.values[name].shape[1:] != new.shape[1:]:
                raise InputError(
                    f"measure {name!r} gave shape {tuple(new.shape[2:])} for prompt {rows[0]}, but "
                    f"{tuple(self.values[name].shape[2:])} for one before: its axes must not depend on the prompt."
                )
            self.values[name][list(rows)] = new.cpu()
        for name, new in per_token.items():
            for row, one in zip(rows, new.cpu(), strict=True):
                self.per_token[name][row] = one.clone()
        self.done[list(rows)] = True  # last, so that an interrupt leaves nothing half done
        self._dirty = True
        if time.monotonic() - self._saved_at > _SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        if self.path is not None and self._dirty:
            self.result().save(self.path)
            self._dirty, self._saved_at = False, time.monotonic()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write what is done when the block ends, however it ends."""
        try:
            yield
        finally:
            self._save()

    def result(self) -> Observed:
        """What there is."""
        per_token = {name: tuple(values) for name, values in self.per_token.items()}
        values = {name: self.values[name] for name in self._empty.labels if name in self.values}  # in the order given
        return replace(self._empty, done=self.done.clone(), values=values, per_token=per_token)
