"""Which looped architectures have fixed points before any training: norms, with and without input injection.

A randomly initialised core runs for many loops, and its layers' states are compared with those of the last one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.dynamics import cycle_of, settled
from tl_looped.dynamics.limits import BEHAVIOURS, FEWEST_LOOPS, classify_limits, limit_shares
from tl_looped.dynamics.measures import cosine_to, distance_to
from tl_looped.dynamics.tokens import N_LOOPS
from tl_looped.engine.checks import check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, check_count
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
        cells: of each: initialisation, norm, injection, layers, seed; verdict; converged (share of layers and tokens
            that came to rest), loop (median of the loops from which on they did; NaN where none did), smallest_cosine
            (between layer 0's last state and another layer's, median over tokens); first_norm and last_norm (of the
            last layer's tokens in the first and the last loop) and growth, their ratio; and the share of its tokens
            whose direction shows each limit behaviour (`DIRECTIONS`).
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

    def of(self, initialisation: str) -> list[int]:
        """The indices of an initialisation's cells.

        Raises:
            InputError: it was not studied.
        """
        found = [i for i, cell in enumerate(self.cells) if cell["initialisation"] == initialisation]
        if not found:
            known = list(dict.fromkeys(cell["initialisation"] for cell in self.cells))
            raise InputError(f"this study has no initialisation {initialisation!r}, but {known}.")
        return found

    def claims(self, initialisation: str) -> pd.DataFrame:
        """What the paper reports beside what came out: one row for each norm and injection.

        Columns: norm, injection, reported, found (the verdict of all cells, or how many have which), agrees (how many
        cells, layers x seeds, show what is reported), cells.
        """
        rows = []
        for (norm, injection), cells in self._groups(initialisation, ("norm", "injection")):
            verdicts, reported = [cell["verdict"] for cell in cells], REPORTED[injection, norm]
            agrees = sum(verdict.startswith(reported) for verdict in verdicts)
            row = {"norm": norm, "injection": injection, "reported": reported, "found": _together(verdicts)}
            rows.append({**row, "agrees": agrees, "cells": len(cells)})
        return pd.DataFrame(rows)

    def summary(self, initialisation: str) -> pd.DataFrame:
        """Seeds taken together: one row for each norm, injection and number of layers.

        Columns: norm, injection, layers, verdict (of all seeds, or how many have which); means of converged, growth and
        the directions' shares; cosine_low and cosine_high, the range of the smallest cosines.
        """
        rows = []
        for (norm, injection, layers), cells in self._groups(initialisation, ("norm", "injection", "layers")):
            row = {"norm": norm, "injection": injection, "layers": layers}
            row["verdict"] = _together([cell["verdict"] for cell in cells])
            for name in ("converged", "growth", *DIRECTIONS.values()):
                row[name] = sum(cell[name] for cell in cells) / len(cells)
            cosines = [cell["smallest_cosine"] for cell in cells]
            rows.append({**row, "cosine_low": min(cosines), "cosine_high": max(cosines)})
        return pd.DataFrame(rows)

    def _groups(self, initialisation: str, keys: Sequence[str]) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for i in self.of(initialisation):
            groups.setdefault(tuple(self.cells[i][key] for key in keys), []).append(self.cells[i])
        return list(groups.items())

    def plot(self, initialisation: str) -> go.Figure:
        """Medians over loops: a panel for each norm and injection, a line for each seed, coloured by layers."""
        chosen = self.of(initialisation)
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
    sizes: Sizes | None = None,
    tolerance: float = 1e-2,
    hold: float = 0.25,
    threshold: float = 0.99,
    share: float = 0.9,
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
        sizes: of the models and prompts.
        tolerance, hold: as in `convergence`.
        threshold: as in `cycle_of`.
        share: in (0, 1].
        progress: show a bar.

    Raises:
        InputError: before anything runs, for a value out of range or an unknown initialisation.

    Source:
        arXiv 2604.11791, section 4.2. Prompts, sizes and what counts as rest are this library's.
    """
    sizes = Sizes() if sizes is None else sizes
    _check(layers, seeds, n_loops, initialisations)
    limits = {
        "tolerance": check_number("tolerance", tolerance),
        "hold": check_number("hold", hold, 0.0, 1.0, high_too=True),
        "threshold": check_number("threshold", threshold, -1.0, 1.0),
        "share": check_number("share", share, 0.0, 1.0, high_too=True),
    }
    tokens = torch.randint(_VOCAB, (sizes.prompts, sizes.pos), generator=torch.Generator().manual_seed(0))
    grid = list(product(initialisations, (True, False), get_args(Norm), layers, range(seeds)))
    cells, means, medians = [], [], []
    for how, injection, norm, n_layers, seed in tqdm(grid, desc="Study", unit="model", disable=not progress):
        model = LoopedModel.from_config(architecture(n_layers, norm, injection, how, sizes, n_loops))
        initialise(model, how, seed)
        states = _states(model, tokens, seed if injection else None)
        found, distances = _measure(states, limits)
        which = {"initialisation": how, "norm": norm, "injection": injection, "layers": n_layers, "seed": seed}
        cells.append({**which, **found})
        means.append(distances.mean((1, 2)))
        medians.append(median(distances.flatten(1)))
    return ArchitectureStudy(
        made_by={"n_loops": n_loops, "seeds": seeds, **limits, **vars(sizes), "prompts_seed": 0},
        cells=tuple(cells),
        distances=torch.stack(means),
        medians=torch.stack(medians),
    )


def architecture(
    layers: int,
    norm: Norm,
    injection: bool,
    initialisation: Initialisation,
    sizes: Sizes | None = None,
    n_loops: int = N_LOOPS,
) -> LoopedConfig:
    """The config of a cell: a core with this norm, nothing before or after it.

    With injection the state is drawn (truncated normal) and mixed with the embedding by a linear map in every loop, as
    in Huginn; without, the embedding is the state. "output_sandwich" has Ouro's norm after each loop. Huginn's
    initialisation goes with its scale of embedding and state, sqrt(d_model).
    """
    sizes = Sizes() if sizes is None else sizes
    d = sizes.d_model
    scale = math.sqrt(d) if initialisation == "huginn" else 1.0
    drawn = {"injection": "concat_linear", "state_init": "truncated_normal", "state_init_scale": scale}
    drawn["state_init_std"] = math.sqrt(2 / (5 * d))
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


def _check(layers: Sequence[int], seeds: int, n_loops: int, initialisations: Sequence[str]) -> None:
    check_count("seeds", seeds)
    check_count("n_loops", n_loops, minimum=FEWEST_LOOPS)
    for name, values in (("layers", layers), ("initialisations", initialisations)):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} must be a list of one value or more, each once, got {list(values)}.")
    for one in layers:
        check_count("layers", one, minimum=2)  # whether fixed points are distinct is a question of two
    for one in initialisations:
        if one not in get_args(Initialisation):
            raise InputError(f"initialisations must be of {get_args(Initialisation)}, got {one!r}.")


@torch.no_grad()
def _states(model: LoopedModel, tokens: Tensor, seed: int | None) -> Float[Tensor, "loop layer token d_model"]:
    """The output of every layer in every loop; the models are small, so all are kept."""
    cfg = model.cfg
    states = torch.empty(cfg.n_loops, cfg.n_core, *tokens.shape, cfg.d_model)

    def keep(site: HookSite, x: Tensor) -> None:
        states[site.loop, site.layer] = x

    names = [HookSite("hook_resid_post", CORE, layer).name for layer in range(cfg.n_core)]
    watch(model, model.batch(tokens, seed=seed), names, keep, only_loops=True)
    return states.flatten(2, 3)


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
