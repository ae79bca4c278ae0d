"""Linear probes on recorded activations: what can be read where, by loop, beside what a probe can learn by heart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor

from tl_looped.engine.errors import InputError, check_count, nearest
from tl_looped.engine.numbers import wide
from tl_looped.engine.results import Result
from tl_looped.record.recorded import Recorded
from tl_looped.viz.loops import Series, loop_series

AXES = ("loop", "layer", "pos")
Array = npt.NDArray[Any]
Labels = Sequence[Any] | Array | Tensor
"""A label of every prompt, or of every row of a record."""


@dataclass(frozen=True, eq=False, repr=False)
class Probed(Result):
    """How well linear probes read labels, by loop and layer (and position), on prompts that they were not fitted to.

    Whichever cells share a probe, accuracy is that of each cell's own examples, so a shared probe and one for each loop
    can be compared.

    Attributes:
        site: what was read.
        by: the axes along which each cell has a probe of its own; along the others all cells share one.
        classes: the labels, as text.
        loops, layers, positions: of the cells; −1 for what the site or the probe does not tell apart.
        accuracy: share of held-out examples that are read rightly.
        low, high: its interval.
        control: accuracy of the same probes on the control task, a random label for each type of token.
        chance: accuracy of always saying the commonest label of the other prompts.
        examples: how many examples a cell has.
        prompts: from how many prompts those come, prompts of the same tokens counting once.
        predicted: what was said of each row when its prompt was held out, as an index of `classes`; −1 where a row is
            not of the cell.
    """

    site: str
    by: tuple[str, ...]
    classes: tuple[str, ...]
    loops: tuple[int, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    accuracy: Float[Tensor, "loop layer pos"]
    low: Float[Tensor, "loop layer pos"]
    high: Float[Tensor, "loop layer pos"]
    control: Float[Tensor, "loop layer pos"]
    chance: Float[Tensor, "loop layer pos"]
    examples: Int[Tensor, "loop layer pos"]
    prompts: Int[Tensor, "loop layer pos"]
    predicted: Int[Tensor, "loop layer pos row"]

    @property
    def selectivity(self) -> Float[Tensor, "loop layer pos"]:
        """Accuracy less that on the control task: what was read, and not learnt by heart from the token."""
        return self.accuracy - self.control

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each cell: loop, layer, pos (missing where there is none) and its numbers."""
        names = ("accuracy", "low", "high", "control", "selectivity", "chance", "examples", "prompts")
        cells = list(product(self.loops, self.layers, self.positions))
        table = pd.DataFrame(cells, columns=list(AXES)).astype("Int64")
        table = table.mask(table < 0)
        return table.assign(**{name: getattr(self, name).flatten().numpy() for name in names})

    def plot(self, pos: int | None = None) -> go.Figure:
        """Accuracy over loops with its interval, a line for each layer; the control task and chance dashed.

        Args:
            pos: of probes by position: which one.
        """
        if len(self.positions) > 1 and pos not in self.positions:
            raise InputError(f"there are probes at the positions {list(self.positions)}: say which, with pos=.")
        at = self.positions.index(pos) if pos in self.positions else 0
        lines = []
        for i, layer in enumerate(self.layers):
            name = "probe" if layer < 0 else f"layer {layer}"
            lines.append(Series(name, self.accuracy[:, i, at], (self.low[:, i, at], self.high[:, i, at])))
            lines.append(Series(f"{name}, control task", self.control[:, i, at], control=True))
        lines.append(Series("commonest label", self.chance[:, 0, at], control=True))
        return loop_series(lines, self.loops, "accuracy on held-out prompts", f"{self.site}: {self.made_by['model']}")


def probe(
    recorded: Recorded,
    labels: Labels,
    *,
    by: Sequence[str] = ("loop", "layer"),
    site: str | None = None,
    folds: int = 5,
    types: Labels | None = None,
    estimator: Any = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Probed:
    """Fit linear probes from activations to labels, and test each on prompts that it was not fitted to.

    Prompts, not rows, are dealt into folds, so that no position or loop of a prompt is on both sides; prompts of the
    same tokens stay together. Activations are standardised by the mean and variance of the fitted part.

    The control task (Hewitt and Liang) gives every type of token a label at random, drawn as often as the labels are.
    It can only be learnt by heart. Where its accuracy is as high, the probe says nothing of what the model represents.

    Intervals are Wilson's over prompts: rows of one prompt count as one observation, which makes them wider than they
    need be; that folds share prompts to be fitted on is left out.

    Args:
        recorded: the activations.
        labels: of every prompt, or of every row (`recorded.rows` lists them).
        by: along which axes each cell has a probe of its own: of "loop", "layer" and "pos". Along the others one probe
            is fitted to all: ("layer",) is one for all loops.
        site: which one, where several were recorded.
        folds: how many.
        types: what the control task gives labels to, of every prompt or every row; None: the row's token.
        estimator: of scikit-learn, cloned for every fit; None: logistic regression with its defaults.
        confidence: of the intervals.
        seed: of folds and control labels.

    Raises:
        InputError: scikit-learn is not installed; labels of another number, real-valued, of one class, or with a class
            in fewer prompts than folds; activations that are not finite.

    Source:
        Hewitt and Liang 2019 (arXiv 1909.03368), selectivity and control tasks.
    """
    if unknown := [axis for axis in by if axis not in AXES]:
        raise InputError(f"by must name some of {AXES}, got {unknown[0]!r}.{nearest(str(unknown[0]), AXES)}")
    check_count("folds", folds, 2)
    grid = recorded.grid(site)
    rows = recorded.rows
    targets = of_rows(recorded, labels, "labels")
    kinds = rows["token"].to_numpy().astype(str) if types is None else of_rows(recorded, types, "types")
    groups = _groups(recorded)
    classes, truth = _classes(targets, groups, folds)
    rng = np.random.default_rng(seed)
    control = rng.choice(truth, size=len(set(kinds)))[np.unique(kinds, return_inverse=True)[1]]
    fold = np.empty(len(rows), dtype=np.int64)
    splitter = _sk("model_selection").StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(fold, truth, groups)):
        fold[held_out] = number
    estimator = _sk("linear_model").LogisticRegression(max_iter=1000) if estimator is None else estimator
    pipeline = _sk("pipeline").make_pipeline(_sk("preprocessing").StandardScaler(), estimator)
    positions = rows["pos"].to_numpy() if "pos" in by else np.full(len(rows), -1)
    places = sorted(set(positions.tolist()))
    said = np.full((2, len(grid.loops), len(grid.layers), len(places), len(rows)), -1)
    for cells in _sharing(said.shape[1:-1], by):
        parts = []
        for t, i, pos in cells:
            at = np.flatnonzero(positions == places[pos])
            name = grid.name(grid.loops[t], grid.layers[i])
            parts.append((at, _floats(recorded.tensor(name, rows=torch.from_numpy(at)), name)))
        at, x = (np.concatenate(each) for each in zip(*parts, strict=True))
        cell_of = np.repeat(np.arange(len(cells)), [len(one) for one, _ in parts])
        for task, goal in enumerate((truth, control)):
            answers = _held_out(pipeline, x, goal[at], fold[at], folds)
            for number, cell in enumerate(cells):
                mine = cell_of == number
                said[(task, *cell, at[mine])] = answers[mine]
    counted = said[0] >= 0
    common = np.array([np.bincount(truth[fold != number]).argmax() for number in range(folds)])[fold]
    right = {"accuracy": said[0] == truth, "control": said[1] == control, "chance": common == truth}
    observed = {name: torch.from_numpy((one & counted).sum(-1) / counted.sum(-1)) for name, one in right.items()}
    prompts = torch.from_numpy(np.apply_along_axis(lambda cell: len(np.unique(groups[cell])), -1, counted))
    low, high = wilson(observed["accuracy"], prompts, confidence)
    return Probed(
        made_by={**recorded.made_by, "folds": folds, "seed": seed, "estimator": str(estimator)},
        site=grid.site.name,
        by=tuple(by),
        classes=tuple(classes.tolist()),
        loops=grid.labels[0],
        layers=grid.labels[1],
        positions=tuple(places),
        low=low,
        high=high,
        examples=torch.from_numpy(counted.sum(-1)),
        prompts=prompts,
        predicted=torch.from_numpy(said[0]),
        **observed,
    )


def wilson(share: Tensor, count: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Wilson's interval of a share of so many observations."""
    z, count = float(norm.ppf((1 + confidence) / 2)), count.double()
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)).sqrt()
    return middle - half, middle + half


def _sk(module: str) -> Any:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise InputError("probes need scikit-learn: pip install 'tl_looped[probes]'.") from error


def _held_out(pipeline: Any, x: Array, goal: Array, fold: Array, folds: int) -> Array:
    """What is said of each row by a probe fitted to the other folds."""
    said = np.empty(len(goal), dtype=np.int64)
    for number in range(folds):
        rest, mine = fold != number, fold == number
        seen = goal[rest]
        if len(np.unique(seen)) < 2:  # as where all rows have one token: scikit-learn would refuse
            said[mine] = seen[0] if len(seen) else 0
        elif mine.any():
            said[mine] = _sk("base").clone(pipeline).fit(x[rest], seen).predict(x[mine])
    return said


def _sharing(shape: Sequence[int], by: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """The cells, those that share a probe together."""
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for cell in np.ndindex(*shape):
        key = tuple(index for axis, index in zip(AXES, cell, strict=True) if axis in by)
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def of_rows(recorded: Recorded, values: Labels, name: str) -> Array:
    """A text for each row, from one for each row or each prompt."""
    given = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    if any(isinstance(one, float) and not one.is_integer() for one in given):
        raise InputError(f"{name} must be classes, and some are real numbers: sort them into classes first.")
    found = np.array([str(one) for one in given])
    prompts = recorded.rows["prompt"].to_numpy()
    if len(found) == len(recorded):
        return found
    if len(found) != len(recorded.tokens):
        raise InputError(
            f"there are {len(found)} {name} for {len(recorded.tokens)} prompts and {len(recorded)} rows: give one for "
            "each prompt, or one for each row of recorded.rows."
        )
    return found[prompts]


def _groups(recorded: Recorded) -> Array:
    """For each row a number that rows of the same tokens' prompts have in common."""
    numbers: dict[tuple[int, ...], int] = {}
    of_prompt = [numbers.setdefault(tuple(one.tolist()), len(numbers)) for one in recorded.tokens]
    return np.array(of_prompt)[recorded.rows["prompt"].to_numpy()]


def _classes(targets: Array, groups: Array, folds: int) -> tuple[Array, Array]:
    """The classes, and of each row the index of its own."""
    classes, truth = np.unique(targets, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"all labels are {str(classes[0])!r}, so there is nothing to tell apart.")
    for index, name in enumerate(classes):
        count = len(set(groups[truth == index].tolist()))
        if count < folds:
            mend = "leave it out" if count < 2 else f"pass folds={count}, or leave it out"
            raise InputError(
                f"the class {str(name)!r} is in {count} prompt{'s' if count > 1 else ''}, and each of {folds} folds "
                f"needs one to test on: record more of it, or {mend}."
            )
    return classes, truth


def _floats(x: Tensor, name: str) -> Array:
    """Activations as an array of rows, each one vector."""
    if not bool(x.isfinite().all()):
        raise InputError(f"activations at {name!r} are not finite: run in a wider dtype, or record fewer loops.")
    return wide(x).flatten(1).numpy() if x.ndim > 1 else wide(x)[:, None].numpy()
