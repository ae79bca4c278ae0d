"""Which looped architectures have fixed points before any training: norms, input injection, and the input's scale.

A randomly initialised core runs for many loops, and its layers' states are compared with those of the last one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.dynamics import cycle_of, settled
from tl_looped.dynamics.limits import BEHAVIOURS, FEWEST_LOOPS, classify_limits, limit_shares
from tl_looped.dynamics.measures import cosine_to, distance_to
from tl_looped.dynamics.tokens import N_LOOPS
from tl_looped.engine.checks import check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.files import check_output
from tl_looped.engine.numbers import length, median
from tl_looped.engine.results import Result
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import watch
from tl_looped.viz.study import study_panels

Norm = Literal["pre", "residual_sandwich", "output_sandwich"]
Initialisation = Literal["huginn", "fan_in", "normal"]

LAYERS = (4, 12, 16)
"""The paper's core sizes."""

DIRECTIONS = {name: f"direction_{name.replace(' ', '_')}" for name in BEHAVIOURS}
"""The limit behaviours of a state's direction, and their columns."""

DISTINCT, DEGENERATE, NONE = "fixed point, distinct", "fixed point, degenerate", "no fixed point"

INITIALISATION_WORDS: dict[str, str] = {
    "huginn": "As Huginn is initialised: standard deviation sqrt(2 / (5 d_model)); what writes to the residual stream "
    "is smaller by sqrt(2 l), with l the layers that run in 32 loops; embedding and state are scaled by sqrt(d_model).",
    "fan_in": "Standard deviation 1 / sqrt(fan_in), embedding 1.",
    "normal": "Standard deviation 0.02 for all matrices, whatever their size, as many configs have it.",
}
INPUT_SCALES = (None, 1.0)
"""How large embedding and initial state are, as a root mean square; None: as the initialisation has them."""

NORM_WORDS: dict[str, str] = {
    "pre": "x + f(N(x)): Llama, and models trained from scratch",
    "residual_sandwich": "N′(x + f(N(x))): Huginn",
    "output_sandwich": "x + N′(f(N(x))), and the final norm after each loop: Ouro",
}

_FAMILY: dict[str, dict[str, Any]] = {
    "pre": {},
    "residual_sandwich": {},
    "output_sandwich": {"loop_norm": "each", "final_norm": False},
}
_HUGINN_LOOPS = 32  # the mean loop count of Huginn's training, by which its initialisation counts layers
_EMBED_STD = {"fan_in": 1.0, "normal": 0.02}
_VOCAB = 256


@dataclass(frozen=True)
class Sizes:
    """How large the models are, and what they read: `prompts` texts of `pos` random tokens each."""

    d_model: int = 64
    n_heads: int = 4
    prompts: int = 4
    pos: int = 16

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "prompts", "pos"):
            check_count(name, getattr(self, name))
        if self.d_model % (2 * self.n_heads):
            raise InputError(f"d_model {self.d_model} must be a multiple of twice n_heads, {2 * self.n_heads}.")


@dataclass(frozen=True, eq=False, repr=False)
class ArchitectureStudy(Result):
    """One cell for each architecture, initialisation and seed.

    Attributes:
        cells: of each: initialisation, input_scale, norm, injection, layers, seed; verdict; writes (in loop 0, the norm
            of all that attention and MLPs write over that of what layer 0 reads, means over tokens); converged (share
            of layers and tokens that came to rest), loop (median of the loops from which on they did; NaN where none
            did), smallest_cosine (between layer 0's last state and another layer's, median over tokens); first_norm and
            last_norm (of the last layer's tokens in the first and the last loop) and growth, their ratio; and the share
            of its tokens whose direction shows each limit behaviour (`DIRECTIONS`).
        distances: ‖x_t − x_T‖ / ‖x_T‖ of each cell with T the last loop, mean over layers and tokens.
        medians: the same, median over layers and tokens: a few tokens that move do not hide that the others rest.
    """

    cells: tuple[dict[str, Any], ...]
    distances: Float[Tensor, "cell loop"]
    medians: Float[Tensor, "cell loop"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each cell; its distances as distance_0, distance_1, ..., and the medians as median_0, ..."""
        tables = [pd.DataFrame(self.cells)]
        for name, curves in (("distance", self.distances), ("median", self.medians)):
            columns = [f"{name}_{t}" for t in range(curves.shape[1])]
            tables.append(pd.DataFrame(curves.numpy(), columns=columns))
        return pd.concat(tables, axis=1)

    def starts(self) -> list[tuple[str, float | None]]:
        """The pairs of initialisation and input scale that were studied, in order."""
        return list(dict.fromkeys((cell["initialisation"], cell["input_scale"]) for cell in self.cells))

    def of(self, initialisation: str, input_scale: float | None = None) -> list[int]:
        """The indices of an initialisation's cells at an input scale.

        Raises:
            InputError: it was not studied.
        """
        start = (initialisation, input_scale)
        found = [i for i, cell in enumerate(self.cells) if (cell["initialisation"], cell["input_scale"]) == start]
        if not found:
            raise InputError(
                f"this study has no initialisation {initialisation!r} with input_scale={input_scale}, but "
                f"{self.starts()}."
            )
        return found

    def claims(self, initialisation: str, input_scale: float | None = None) -> pd.DataFrame:
        """What the paper reports beside what came out: one row for each norm and injection.

        Columns: norm, injection, reported, found (the verdict of all cells, or how many have which), agrees (how many
        cells, layers x seeds, show what is reported), cells.
        """
        rows = []
        for (norm, injection), cells in self._groups(self.of(initialisation, input_scale), ("norm", "injection")):
            verdicts, reported = [cell["verdict"] for cell in cells], REPORTED[injection, norm]
            agrees = sum(verdict.startswith(reported) for verdict in verdicts)
            row = {"norm": norm, "injection": injection, "reported": reported, "found": _together(verdicts)}
            rows.append({**row, "agrees": agrees, "cells": len(cells)})
        return pd.DataFrame(rows)

    def summary(self, initialisation: str, input_scale: float | None = None) -> pd.DataFrame:
        """Seeds taken together: one row for each norm, injection and number of layers.

        Columns: norm, injection, layers, verdict (of all seeds, or how many have which); means of writes, converged,
        growth and the directions' shares; cosine_low and cosine_high, the range of the smallest cosines.
        """
        rows = []
        chosen = self.of(initialisation, input_scale)
        for (norm, injection, layers), cells in self._groups(chosen, ("norm", "injection", "layers")):
            row = {"norm": norm, "injection": injection, "layers": layers}
            row["verdict"] = _together([cell["verdict"] for cell in cells])
            for name in ("writes", "converged", "growth", *DIRECTIONS.values()):
                row[name] = sum(cell[name] for cell in cells) / len(cells)
            cosines = [cell["smallest_cosine"] for cell in cells]
            rows.append({**row, "cosine_low": min(cosines), "cosine_high": max(cosines)})
        return pd.DataFrame(rows)

    def decides(self, rest: float = 0.9) -> pd.DataFrame:
        """Whether `writes` alone tells which models come to rest: one row for each norm and injection.

        Columns: norm, injection, models; at_rest, how many have `converged` of at least `rest`; rest_up_to, the largest
        `writes` below which every model is at rest, and none_from, the smallest above which none is; auc, the chance
        that of two models, one at rest and one not, the first writes less (0.5: `writes` says nothing).
        """
        rows = []
        for (norm, injection), cells in self._groups(range(len(self.cells)), ("norm", "injection")):
            still = sorted(cell["writes"] for cell in cells if cell["converged"] >= rest)
            moving = sorted(cell["writes"] for cell in cells if cell["converged"] < rest)
            auc = float("nan")
            if still and moving:
                auc = mannwhitneyu(moving, still).statistic / (len(still) * len(moving))
            rows.append(
                {
                    "norm": norm,
                    "injection": injection,
                    "models": len(cells),
                    "at_rest": len(still),
                    "rest_up_to": max((w for w in still if not moving or w < moving[0]), default=float("nan")),
                    "none_from": min((w for w in moving if not still or w > still[-1]), default=float("nan")),
                    "auc": auc,
                }
            )
        return pd.DataFrame(rows)

    def _groups(self, chosen: Iterable[int], keys: Sequence[str]) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for i in chosen:
            groups.setdefault(tuple(self.cells[i][key] for key in keys), []).append(self.cells[i])
        return list(groups.items())

    def plot(self, initialisation: str | None = None, input_scale: float | None = None) -> go.Figure:
        """Medians over loops: a panel for each norm and injection, a line for each seed, coloured by layers.

        Args:
            initialisation, input_scale: what is drawn; by default what was studied first.
        """
        start = self.starts()[0] if initialisation is None else (initialisation, input_scale)
        chosen = self.of(*start)
        cells = [self.cells[i] for i in chosen]
        return study_panels(
            self.medians[chosen],
            columns=[cell["norm"] for cell in cells],
            rows=["with injection" if cell["injection"] else "without injection" for cell in cells],
            colors=[f"{cell['layers']} layers" for cell in cells],
            names=[f"{cell['layers']} layers, seed {cell['seed']}: {cell['verdict']}" for cell in cells],
            label="distance to the last loop (relative L2)",
        )


REPORTED: dict[tuple[bool, str], str] = {
    (True, "pre"): "fixed point",
    (True, "residual_sandwich"): "fixed point",
    (True, "output_sandwich"): NONE,
    (False, "pre"): DEGENERATE,
    (False, "residual_sandwich"): NONE,
    (False, "output_sandwich"): NONE,
}
"""What arXiv 2604.11791, section 4.2, reports by (injection, norm): the beginning of a verdict."""


def study_architectures(
    layers: Sequence[int] = LAYERS,
    seeds: int = 3,
    n_loops: int = N_LOOPS,
    initialisations: Sequence[Initialisation] = get_args(Initialisation),
    *,
    input_scales: Sequence[float | None] = INPUT_SCALES,
    sizes: Sizes | None = None,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    threshold: float = 0.99,
    share: float = 0.9,
    out: str | Path | None = None,
    progress: bool = True,
) -> ArchitectureStudy:
    """Run randomly initialised cores of every norm, with and without injection, and say which reach fixed points.

    There is no prelude and no coda. A state of one layer at one token came to rest as `convergence` judges it:
    ‖x_t − x_T‖ / ‖x_T‖ stays within the tolerance over the last loops. A cell has a *fixed point* if that holds for
    the given share of its layers and tokens; it is *degenerate* if the smallest cosine between layer 0's fixed point
    and another layer's, median over tokens, is at least the threshold, and else *distinct*.

    Args:
        layers: core sizes, each of two layers or more.
        seeds: how many; seed s draws the weights and, with injection, the initial state.
        n_loops: T, 128 in the paper; at least 16.
        initialisations: see `initialise`.
        input_scales: root mean squares of embedding and initial state, or None for the initialisation's own.
        sizes: of the models and prompts.
        tolerance, hold: as in `convergence`.
        threshold: as in `cycle_of`.
        share: in (0, 1].
        out: a file in which the study is kept as it grows: the same call goes on where it ended.
        progress: show a bar.

    Raises:
        InputError: before anything runs, for a value out of range, an unknown initialisation, a file of another study.

    Example:
        study = study_architectures((4,), seeds=1, n_loops=32, initialisations=["normal"])
        study.claims("normal", 1.0)  # with inputs of unit scale

    Source:
        arXiv 2604.11791, section 4.2. Prompts, sizes and what counts as rest are this library's.
    """
    sizes = Sizes() if sizes is None else sizes
    _check(layers, seeds, n_loops, initialisations, input_scales)
    limits = {
        "tolerance": check_number("tolerance", tolerance),
        "hold": check_number("hold", hold, 0.0, 1.0, high_too=True),
        "threshold": check_number("threshold", threshold, -1.0, 1.0),
        "share": check_number("share", share, 0.0, 1.0, high_too=True),
    }
    grid = list(product(initialisations, input_scales, (True, False), get_args(Norm), layers, range(seeds)))
    study = ArchitectureStudy(
        made_by={
            "n_loops": n_loops,
            "seeds": seeds,
            "layers": list(layers),
            "initialisations": list(initialisations),
            "input_scales": list(input_scales),
            **limits,
            **vars(sizes),
            "prompts_seed": 0,
        },
        cells=(),
        distances=torch.empty(0, n_loops),
        medians=torch.empty(0, n_loops),
    )
    if out is not None:
        study = _go_on(study, Path(out))
    left = tqdm(grid, desc="Study", unit="model", disable=not progress, initial=len(study.cells))
    for cell, distances in _run(grid[len(study.cells) :], sizes, n_loops, limits):
        study = replace(
            study,
            cells=(*study.cells, cell),
            distances=torch.cat([study.distances, distances.mean((1, 2))[None]]),
            medians=torch.cat([study.medians, median(distances.flatten(1))[None]]),
        )
        left.update()
        if out is not None:
            study.save(out)
    left.close()
    return study


def _go_on(study: ArchitectureStudy, out: Path) -> ArchitectureStudy:
    """The study as far as its file has it; makes the file's folder."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{str(out)!r} can't be written: {error}.") from error
    if not check_output(out).exists():
        return study
    found = ArchitectureStudy.load(out)
    other = [name for name, value in study.made_by.items() if found.made_by.get(name) != value]
    if other:
        raise InputError(f"{str(out)!r} holds a study with other {', '.join(other)}: give out= another file.")
    return found


def _run(
    grid: Sequence[tuple[Any, ...]], sizes: Sizes, n_loops: int, limits: dict[str, float]
) -> Iterator[tuple[dict[str, Any], Float[Tensor, "loop layer token"]]]:
    """(cell, its distances), one after the other."""
    tokens = torch.randint(_VOCAB, (sizes.prompts, sizes.pos), generator=torch.Generator().manual_seed(0))
    for how, scale, injection, norm, n_layers, seed in grid:
        model = LoopedModel.from_config(architecture(n_layers, norm, injection, how, sizes, n_loops, scale))
        initialise(model, how, seed)
        states, writes = _states(model, tokens, seed if injection else None)
        found, distances = _measure(states, limits)
        which = {"initialisation": how, "input_scale": scale, "norm": norm, "injection": injection}
        yield {**which, "layers": n_layers, "seed": seed, "writes": writes, **found}, distances


def architecture(
    layers: int,
    norm: Norm,
    injection: bool,
    initialisation: Initialisation,
    sizes: Sizes | None = None,
    n_loops: int = N_LOOPS,
    input_scale: float | None = None,
) -> LoopedConfig:
    """The config of a cell: a core with this norm, nothing before or after it.

    With injection the state is drawn (truncated normal) and mixed with the embedding by a linear map in every loop, as
    in Huginn; without, the embedding is the state. "output_sandwich" has Ouro's norm after each loop. Huginn's
    initialisation goes with its scale of embedding and state, sqrt(d_model). `input_scale` is the root mean square of
    both in place of what the initialisation gives them.
    """
    sizes = Sizes() if sizes is None else sizes
    d = sizes.d_model
    std = math.sqrt(2 / (5 * d))
    scale = state_scale = math.sqrt(d) if initialisation == "huginn" else 1.0
    if input_scale is not None:
        scale, state_scale = input_scale / _EMBED_STD.get(initialisation, std), input_scale / std
    drawn = {"injection": "concat_linear", "state_init": "truncated_normal", "state_init_scale": state_scale}
    drawn["state_init_std"] = std
    return LoopedConfig(
        d_model=d,
        n_heads=sizes.n_heads,
        d_head=d // sizes.n_heads,
        d_mlp=8 * d // 3,
        d_vocab=_VOCAB,
        n_ctx=sizes.pos,
        n_core=layers,
        n_loops=n_loops,
        norm_placement=norm,
        embed_scale=scale,
        model_name=f"{layers} layers, {norm}",
        **_FAMILY[norm],
        **(drawn if injection else {}),
    )


@torch.no_grad()
def initialise(model: LoopedModel, initialisation: Initialisation, seed: int) -> None:
    """Random weights from a seed. Norms are one in all of these.

    - "huginn": N(0, 2 / (5 d_model)), and N(0, 1 / (5 d_model l)) for what writes to the residual stream (attention's o
      and the MLP's down), with l the layers that run in a training forward of Huginn, 32 loops. So each layer changes
      its stream little.
    - "fan_in": N(0, 1 / fan_in), embedding N(0, 1): `LoopedTransformer.reset_parameters`.
    - "normal": N(0, 0.02²) for all, the default of many configs.

    Source:
        arXiv 2502.05171, section 3 ("huginn").
    """
    model.transformer.reset_parameters(seed)
    if initialisation == "fan_in":
        return
    generator = torch.Generator().manual_seed(seed)
    cfg = model.cfg
    for name, weight in model.transformer.named_parameters():
        if weight.ndim == 1:
            continue
        std = 0.02
        if initialisation == "huginn":
            std = math.sqrt(2 / (5 * cfg.d_model))
            if name.endswith(("attn.o.weight", "mlp.down.weight")):
                effective = cfg.n_prelude + _HUGINN_LOOPS * cfg.n_core + cfg.n_coda
                std = math.sqrt(1 / (5 * cfg.d_model * effective))
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _check(
    layers: Sequence[int],
    seeds: int,
    n_loops: int,
    initialisations: Sequence[str],
    input_scales: Sequence[float | None],
) -> None:
    check_count("seeds", seeds)
    check_count("n_loops", n_loops, minimum=FEWEST_LOOPS)
    lists = {"layers": layers, "initialisations": initialisations, "input_scales": input_scales}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} must be a list of one value or more, each once, got {list(values)}.")
    for one in layers:
        check_count("layers", one, minimum=2)  # whether fixed points are distinct is a question of two
    for one in input_scales:
        if one is not None:
            check_number("an input scale", one)
    for one in initialisations:
        if one not in get_args(Initialisation):
            raise InputError(f"initialisations must be of {get_args(Initialisation)}, got {one!r}.")


@torch.no_grad()
def _states(
    model: LoopedModel, tokens: Tensor, seed: int | None
) -> tuple[Float[Tensor, "loop layer token d_model"], float]:
    """(the output of every layer in every loop, what loop 0 writes over what it reads); the models are small."""
    cfg = model.cfg
    states = torch.empty(cfg.n_loops, cfg.n_core, *tokens.shape, cfg.d_model)
    read: list[Tensor] = []
    written: list[Tensor] = []

    def keep(site: HookSite, x: Tensor) -> None:
        if site.component == "hook_resid_post":
            states[site.loop, site.layer] = x
        elif site.loop == 0:
            (read if site.component == "hook_resid_pre" else written).append(x.clone())

    outputs = ("hook_resid_post", "hook_attn_out", "hook_mlp_out")
    names = [HookSite(component, CORE, layer).name for component in outputs for layer in range(cfg.n_core)]
    names.append(HookSite("hook_resid_pre", CORE, 0).name)
    watch(model, model.batch(tokens, seed=seed), names, keep, only_loops=True)
    writes = length(torch.stack(written).sum(0)).mean() / length(read[0]).mean()
    return states.flatten(2, 3), float(writes)


def _measure(
    states: Float[Tensor, "loop layer token d_model"], limits: dict[str, float]
) -> tuple[dict[str, Any], Float[Tensor, "loop layer token"]]:
    """(what a cell says, its distances)."""
    end = states[-1:].expand_as(states)
    distances = distance_to(states, end)
    judged = settled(distances, limits["tolerance"], hold=limits["hold"])
    cosines = cycle_of(states[-1], threshold=limits["threshold"]).smallest
    labels, _, _ = classify_limits(cosine_to(states, end)[:, -1])
    norms = length(states[:, -1]).mean(-1)
    converged, cosine = judged.share(), float(median(cosines))
    verdict = NONE
    if converged >= limits["share"]:
        verdict = DEGENERATE if cosine >= limits["threshold"] else DISTINCT
    found = {
        "verdict": verdict,
        "converged": converged,
        "loop": float(median(judged.loop.flatten())),
        "smallest_cosine": cosine,
        "first_norm": float(norms[0]),
        "last_norm": float(norms[-1]),
        "growth": float(norms[-1] / norms[0]),
    }
    shares = dict(zip(DIRECTIONS.values(), limit_shares(labels).tolist(), strict=True))
    return {**found, **shares}, distances


def _together(verdicts: Sequence[str]) -> str:
    """The verdict of all, or how many have which."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    return "; ".join(f"{verdict} ({count} of {len(verdicts)})" for verdict, count in counts.items())
