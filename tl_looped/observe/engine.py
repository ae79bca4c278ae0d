"""Measures taken while a model runs, reduced at once, over many prompts and any number of loops.

A measure sees the activation of one layer call, and where it compares loops that of one other loop. So what a run keeps
does not grow with its loops, but for the numbers that it returns.

Prompts of the same length run as one batch, and no others do: there is no padding that a measure would have to leave
out, and a prompt's numbers do not depend on its company.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_protocol import TransformerLensModel

from tl_looped.engine.errors import InputError, check_count, nearest
from tl_looped.engine.identity import digest, identity, weights_digest
from tl_looped.engine.schedule import HookSite, LoopSchedule
from tl_looped.model import LoopedModel
from tl_looped.observe.collected import Collected, Store
from tl_looped.observe.origin import SCORES
from tl_looped.observe.runners import FeedforwardRunner, LoopedRunner, Runner
from tl_looped.observe.texts import Prompts, tokenize_prompts

Compare = Literal["none", "previous", "last"]

BATCH_SIZE = 16
"""Prompts that run at once, unless the caller says how many."""

_AT_ONCE = 2**18  # numbers of a component that are measured at once: calls on less cost more than what they compute


@dataclass(frozen=True)
class Measure:
    """A number for every layer call: a tensor function, and where in the model it reads.

    Attributes:
        name: what it is called in results, such as "step".
        label: what stands at a plot's axis, such as "‖x_t − x_{t−1}‖ / ‖x_t‖".
        unit: "nats", "relative L2", "cosine", ...; "" for a share.
        component: the hook it reads in every layer, such as "hook_resid_post" or "attn.hook_pattern".
        function: from the activation, batch first, to [batch, *axes], each row by itself (rows may come from several
            layer calls); where it compares, it is called with a second activation, that of `compare`.
        compare: "previous": the same layer one loop earlier; "last": the same layer in the last loop. Undefined (NaN)
            where there is no such loop, as in layers that run once.
        axes: what the function's result has besides the batch: (), ("pos",), ("head",), ("head", "pos").
    """

    name: str
    label: str
    unit: str
    component: str
    function: Callable[..., Tensor]
    compare: Compare = "none"
    axes: tuple[str, ...] = ()


def collect(
    model: LoopedModel | TransformerLensModel,
    prompts: Prompts,
    measures: Sequence[Measure],
    n_loops: int | None = None,
    *,
    field: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    initial_state: Tensor | None = None,
    per_token: Sequence[str] = (),
    save_to: str | Path | None = None,
    progress: bool = True,
) -> Collected:
    """Take measures at every layer call of every prompt, in memory that does not grow with the loops.

    Each measure is computed inside the forward and averaged over positions (those where it is defined), so one number
    (or one for each head) is kept for a prompt and a layer call. Of activations are kept: for measures that compare
    with the previous loop, one for each core layer; for those that compare with the last, one for each core layer, from
    a first run that goes to the end and keeps nothing else, so that such measures take two runs of every batch; and
    small ones that wait to be measured together, up to 262,144 numbers of a component.

    Hooks that are on the model act in every run. Logits are not computed.

    Args:
        model: in evaluation mode: a looped model, or a feedforward one of TransformerLens.
        prompts: a list of texts or of lists of token ids; a tensor [batch, pos], whose padding is cut off; the path of
            a text file, one prompt a line; with `field` a JSONL file or a Hugging Face dataset. See `read_prompts`.
        measures: what to take; several may read the same component.
        n_loops: loops to run; None for the count the model was trained with.
        field: which field of a dataset's rows holds the prompt.
        limit: take the first so many prompts; None for all.
        batch_size: most prompts to run at once; None for 16. Only prompts of the same length run together.
        seed: of a drawn initial state, the same for all prompts.
        initial_state: the state that every prompt starts from, [pos, d_model], or one for each, [prompt, pos, d_model]:
            the first row belongs to a prompt's first token, and rows beyond a prompt's end are not used.
        per_token: names of measures to keep for every token too.
        save_to: a file for what is done so far, written every few seconds and when the call ends, also by an error or
            an interrupt. The same call goes on from it.
        progress: show a bar.

    Returns:
        The measures, prompts in the order given.

    Raises:
        InputError: before anything runs, for input that is wrong, or a file of another call; or in the run, where
            activations are not finite: the message says in which prompt, and in which layer and loop they began.

    Source:
        The measures of arXiv 2604.11791 over many prompts; the collection is this library's.
    """
    tokens = tokenize_prompts(model, prompts, field, limit)
    most = BATCH_SIZE if batch_size is None else check_count("batch_size", batch_size)
    if isinstance(model, LoopedModel):
        runner: Runner = LoopedRunner(model, tokens, n_loops, seed, initial_state)
    else:
        runner = FeedforwardRunner(model, tokens, {"n_loops": n_loops, "seed": seed, "initial_state": initial_state})
    kept = (per_token,) if isinstance(per_token, str) else tuple(per_token)
    _check_measures(measures, kept, runner)
    made_by = {
        **runner.describe(),
        "prompts": digest(*tokens),
        "measures": {measure.name: _describe(measure) for measure in measures},
        "per_token": kept,
        "weights": None if save_to is None else weights_digest(model),
    }
    empty = Collected(
        made_by=made_by,
        schedule=runner.schedule,
        tokens=tokens,
        done=torch.zeros(len(tokens), dtype=torch.bool),
        labels={measure.name: measure.label for measure in measures},
        units={measure.name: measure.unit for measure in measures},
        axes={measure.name: tuple(axis for axis in measure.axes if axis != "pos") for measure in measures},
        values={},
        per_token={name: (None,) * len(tokens) for name in kept},
    )
    store = Store(empty, save_to)
    batches = _batches(tokens, most)
    twice = any(measure.compare == "last" for measure in measures)
    steps = runner.n_loops * (2 if twice else 1)
    name = f"Collecting{' (each batch runs to its end first)' if twice else ''}"
    with torch.no_grad(), store.writing(), tqdm(desc=name, total=len(batches) * steps, disable=not progress) as bar:
        for done, rows in enumerate(batches):
            bar.update(done * steps - bar.n)
            pending = [row for row in rows if not store.done[row]]
            if pending:
                batch = _take(runner, pending, measures, kept, bar)
                store.put(pending, batch.values, batch.per_token)
        bar.update(bar.total - bar.n)
    return store.result()


def _batches(tokens: Sequence[Tensor], most: int) -> list[list[int]]:
    """The prompts of each batch: of one length, shortest first, at most so many."""
    by_length: dict[int, list[int]] = {}
    for index in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        by_length.setdefault(len(tokens[index]), []).append(index)
    return [rows[i : i + most] for rows in by_length.values() for i in range(0, len(rows), most)]


def _describe(measure: Measure) -> str:
    """A text that is another one where the measure is: two measures of one name are not mixed in one file."""
    return f"{measure.component}, {measure.compare}, {measure.axes}: {identity(measure.function)}"


def _check_measures(measures: Sequence[Measure], kept: tuple[str, ...], runner: Runner) -> None:
    if not isinstance(measures, Sequence) or not measures or not all(isinstance(one, Measure) for one in measures):
        raise InputError(f"measures must be a list of at least one Measure, got {measures!r}.")
    names = [measure.name for measure in measures]
    for measure in measures:
        if names.count(measure.name) > 1:
            raise InputError(f"there are two measures {measure.name!r}: give each its own name.")
        if measure.compare not in get_args(Compare):
            raise InputError(
                f"measure {measure.name!r}: compare must be one of {get_args(Compare)}, got {measure.compare!r}."
            )
        if measure.compare != "none" and runner.n_loops < 2:
            raise InputError(f"measure {measure.name!r} compares loops, but {runner.one_loop}.")
        try:
            runner.check_component(measure.component)
        except InputError as error:
            raise InputError(f"measure {measure.name!r}: {error}") from error
    for name in kept:
        if name not in names:
            raise InputError(f"per_token: there is no measure {name!r}, but {names}.{nearest(name, names)}")
        if "pos" not in measures[names.index(name)].axes:
            raise InputError(f"per_token: the measure {name!r} has no numbers for each token (no axis 'pos').")


class _NotFinite(Exception):
    """An activation with NaN or infinity was seen: in which row of the batch, and at which site."""

    def __init__(self, row: int, name: str):
        super().__init__(name)
        self.row, self.name = row, name


def _check_finite(x: Tensor, name: str, component: str) -> None:
    if not x.is_floating_point():
        return
    low, high = (float(end) for end in x.aminmax())  # both NaN where one is; much faster than to look at each number
    if math.isfinite(high) and (math.isfinite(low) or component == SCORES):
        return
    wrong = x.isnan() | x.isposinf() if component == SCORES else ~x.isfinite()
    raise _NotFinite(int(wrong.flatten(1).any(1).nonzero()[0]), name)


def _take(runner: Runner, rows: list[int], measures: Sequence[Measure], kept: tuple[str, ...], bar: tqdm) -> _Batch:
    """Run one batch and take its measures."""
    batch = _Batch(runner.schedule, len(runner.tokens[rows[0]]), measures, kept, bar)
    to_end = sorted({measure.component for measure in measures if measure.compare == "last"})
    try:
        if to_end:
            runner.run(rows, to_end, batch.keep, only_end=True)
            bar.update(runner.n_loops)
        runner.run(rows, sorted(batch.measures), batch.take)
    except _NotFinite as error:
        row = rows[error.row]
        raise InputError(
            f"prompt {row}: activations are not finite, from {_place(runner.origin(row) or error.name)} on. Look at "
            "the weights there, run in a wider dtype or with fewer loops, or leave the prompt out."
        ) from error
    batch.finish()
    return batch


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape has the sizes wanted, None being any."""
    return len(shape) == len(wanted) and all(want in (None, size) for want, size in zip(wanted, shape, strict=True))


def _place(name: str) -> str:
    site = HookSite.parse(name)
    numbers = {"layer": site.layer, "loop": site.loop}
    where = ", ".join(f"{part} {number}" for part, number in numbers.items() if number is not None)
    return f"{name!r} ({where})" if where else repr(name)


class _Batch:
    """The numbers of one batch of prompts; sees activations as they come."""

    def __init__(
        self,
        schedule: LoopSchedule,
        n_pos: int,
        measures: Sequence[Measure],
        kept: tuple[str, ...],
        bar: tqdm,
    ):
        self.calls = list(schedule.layer_calls())
        self.n_pos = n_pos
        self.kept = kept
        self.bar = bar
        self.measures: dict[str, list[Measure]] = {}
        for measure in measures:
            self.measures.setdefault(measure.component, []).append(measure)
        self.values: dict[str, Tensor] = {}
        self.per_token: dict[str, Tensor] = {}
        self._pending: dict[str, list[_Call]] = {component: [] for component in self.measures}
        self._earlier: dict[tuple[str, int], Tensor] = {}
        self._last: dict[tuple[str, int], Tensor] = {}
        self._seen: set[tuple[str, int]] = set()
        self._loop = -1

    def keep(self, component: str, depth: int, x: Tensor) -> None:
        """Keep an activation of the last loop, in the run to the end."""
        _check_finite(x, self._name(component, depth), component)
        self._last[component, self.calls[depth][1]] = x

    def take(self, component: str, depth: int, x: Tensor) -> None:
        """See an activation; its measures are taken now, or with a few more if it is small."""
        _, layer, loop = self.calls[depth]
        if (component, depth) in self._seen:
            raise InputError(
                f"{self._name(component, depth)!r} fired twice in one forward, so this model loops: only a LoopedModel "
                "says at which loop a layer runs."
            )
        self._seen.add((component, depth))
        _check_finite(x, self._name(component, depth), component)
        if loop is not None and loop > self._loop:
            self._loop = loop
            self.bar.update()
        pending = self._pending[component]
        if pending and pending[0].x.shape != x.shape:
            self._measure(component)
        others: dict[str, Tensor] = {}
        if loop is not None:
            kept = {"previous": self._earlier, "last": self._last}
            others = {name: of[component, layer] for name, of in kept.items() if (component, layer) in of}
            if any(measure.compare == "previous" for measure in self.measures[component]):
                self._earlier[component, layer] = x
        pending.append(_Call(depth, x, others))
        if len(pending) * x.numel() >= _AT_ONCE:
            self._measure(component)

    def finish(self) -> None:
        """Take the measures that are left; raise for a layer call that was not seen, whose numbers would be missing."""
        for component in self.measures:
            self._measure(component)
            for depth in range(len(self.calls)):
                if (component, depth) not in self._seen:
                    raise InputError(f"{self._name(component, depth)!r} did not fire in a forward of this model.")

    def _measure(self, component: str) -> None:
        """Take the measures of the pending calls of a component, all in one batch."""
        pending, self._pending[component] = self._pending[component], []
        for measure in self.measures[component]:
            compares = measure.compare != "none"
            calls = [call for call in pending if not compares or measure.compare in call.others]
            if not calls:
                continue
            inputs = [_joined([call.x for call in calls])]
            if compares:
                inputs.append(_joined([call.others[measure.compare] for call in calls]))
            result = self._checked(measure, measure.function(*inputs), inputs[0])
            self._reduce(measure, [call.depth for call in calls], result.unflatten(0, (len(calls), -1)))

    def _checked(self, measure: Measure, result: object, x: Tensor) -> Tensor:
        """What a measure gave, as floats."""
        wanted = (x.shape[0], *(self.n_pos if axis == "pos" else None for axis in measure.axes))
        if not isinstance(result, Tensor) or not _fits(result.shape, wanted):
            got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise InputError(
                f"measure {measure.name!r} must give [{', '.join(('batch', *measure.axes))}] of {measure.component!r} "
                f"of shape {tuple(x.shape)}, got {got}: correct its function or its axes."
            )
        return result if result.is_floating_point() and result.element_size() >= 4 else result.float()

    def _reduce(self, measure: Measure, depths: list[int], result: Float[Tensor, "call row *axes"]) -> None:
        """Keep the mean over positions, and where it is asked for the numbers of all."""
        if "pos" in measure.axes:
            axis = 2 + measure.axes.index("pos")
            if measure.name in self.kept:
                self._write(self.per_token, measure, depths, result.movedim(axis, -1))
            result = result.nanmean(axis)
        self._write(self.values, measure, depths, result)

    def _write(
        self, where: dict[str, Tensor], measure: Measure, depths: list[int], result: Float[Tensor, "call row *axes"]
    ) -> None:
        rows = result.transpose(0, 1)
        if measure.name not in where:
            shape = (rows.shape[0], len(self.calls), *rows.shape[2:])
            where[measure.name] = rows.new_full(shape, float("nan"))
        found, here = where[measure.name], self._name(measure.component, depths[0])
        if found.shape[2:] != rows.shape[2:]:
            raise InputError(
                f"measure {measure.name!r} gave shape {tuple(found.shape[2:])} for each prompt in one layer, and "
                f"{tuple(rows.shape[2:])} at {here!r}: all layers must have the same."
            )
        found[:, depths] = rows.to(found.dtype)

    def _name(self, component: str, depth: int) -> str:
        return HookSite(component, *self.calls[depth]).name


@dataclass
class _Call:
    """A layer call whose measures are still to be taken."""

    depth: int
    x: Tensor
    others: dict[str, Tensor]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Batches as one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
