"""How a token's state behaves in the limit of many loops: fixed point, orbit, slider, or none of these."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.measures import COSINE_TO_END
from tl_looped.dynamics.tokens import place_table, prepare_long
from tl_looped.engine.checks import check_loop_axis, check_number, undefined_series
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.numbers import wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.observation import BATCH_SIZE, observe
from tl_looped.observe.observed import Observed
from tl_looped.viz.dynamics import limit_curves

BEHAVIOURS = ("fixed point", "orbit", "slider", "unknown")
"""The limit behaviours; a label is an index here, and −1 where the cosines are undefined."""

FEWEST_LOOPS = 16

_OVERSAMPLING = 10  # frequencies tried for each that a window of that length tells apart
_MOST_HARMONICS = 3
_AT_ONCE = 256  # series whose periods are looked for at once


@dataclass(frozen=True)
class LimitRule:
    """How limit behaviour is told from c_t, the cosine of the states after loop t and after the last loop, T − 1.

    Only directions are seen: a state that grows along a ray rests. The window is the loops from ceil(transient · T) to
    T − 2: the beginning is left out, and so is the last loop, whose cosine to itself is 1. In this order:

    1. *Fixed point*: 1 − c_t ≤ `threshold` in at least the share `share` of the window.
    2. *Orbit*: the cosines repeat. For each period P from 2 loops to half the window, in steps of a tenth of what the
       window tells apart, c_t is fitted by a constant and H harmonics, Σ_h a_h cos(2π h t / P) + b_h sin(2π h t / P),
       with H at most 3, at most P / 2 (a higher one would look like a lower one), and at most (w / 3 − 1) / 2 for w
       loops in the window. The fit's quality is R² adjusted for its number of parameters. Among the periods where the
       quality has a peak of at least `fit`, the shortest is the period, refined by a parabola through the peak. The
       amplitude is half the range of c_t in the window. As the cosines of a state that turns by an angle repeat when it
       has turned once, the period of a rotation need not be a whole number of loops.
    3. *Slider*: with θ_t = arccos c_t the angle that is left to go, the window and the last loop together, the path is
       steady, θ_first / Σ |θ_{t+1} − θ_t| ≥ `steady` (1 for an angle that only shrinks), and goes on to the end: the
       speed over the last quarter of the loops is at least `pace` of the mean speed. That is 1 for a state that turns
       at constant speed and 0.31 for one that has long moved along a straight line; one that comes to rest has less.
    4. *Unknown*: none of these. It may be noise, an orbit longer than half the window, or a state that came to rest too
       late for 1.; more loops tell.

    So a drift whose direction has come to rest counts as a fixed point, a state that approaches its limit so slowly
    that it is still on its way counts as a slider, and so do an orbit of which the window shows half a turn and a
    random walk in many dimensions. On constructed states, contractions by 0.8 a loop and faster, rotations with periods
    from 2 to 10.9 loops and turns of 0.02 radians a loop come out the same at 32 and at 128 loops.

    Attributes:
        threshold: τ, in (0, 2).
        share: ρ, in (0, 1].
        transient: share of the loops, at the beginning, to leave out, in (0, 0.5].
        fit: the least adjusted R² of an orbit, in (0, 1).
        steady: in (0, 1].
        pace: in (0, 1].

    Raises:
        InputError: a value out of range.

    Source:
        arXiv 2604.11791 has the classes, the cosines to the state at loop 128, τ = 0.05 and ρ = 0.9; orbits and sliders
        are named in arXiv 2502.05171. The paper's listing is not in the text that this was written from, so the window
        and the steps 2 to 4 are this library's.
    """

    threshold: float = 0.05
    share: float = 0.9
    transient: float = 0.25
    fit: float = 0.9
    steady: float = 0.9
    pace: float = 0.3

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0.0, 2.0)
        check_number("transient", self.transient, 0.0, 0.5, high_too=True)
        check_number("fit", self.fit, 0.0, 1.0)
        for name in ("share", "steady", "pace"):
            check_number(name, getattr(self, name), 0.0, 1.0, high_too=True)


def classify_limits(
    cosines: Float[Tensor, "loop *dims"], rule: LimitRule | None = None
) -> tuple[Int[Tensor, "*dims"], Float[Tensor, "*dims"], Float[Tensor, "*dims"]]:
    """The limit behaviour of every series, by the algorithm that `LimitRule` describes.

    Args:
        cosines: of the state after each loop and the state after the last, as the measure `COSINE_TO_END` gives.
        rule: its thresholds.

    Returns:
        labels (indices of `BEHAVIOURS`; −1 for a series that is NaN throughout), the period of each orbit in loops, and
        its amplitude, half the range of its cosines; both NaN for what is no orbit.

    Raises:
        InputError: fewer than 16 loops, numbers that are not cosines to the last loop, or a series with NaN in some
            loops.
    """
    rule = LimitRule() if rule is None else rule
    check_loop_axis(cosines, "cosines", loops=FEWEST_LOOPS)
    undefined = undefined_series(cosines, "cosines").flatten()
    c = cosines.double().reshape(len(cosines), -1)
    _check_cosines(c[:, ~undefined])
    window = c[math.ceil(rule.transient * len(c)) : -1]
    labels = torch.full(window.shape[1:], BEHAVIOURS.index("unknown"), device=c.device)
    labels[_is_slider(torch.cat((window, c[-1:])), rule)] = BEHAVIOURS.index("slider")
    fixed = (1 - window <= rule.threshold).double().mean(0) >= rule.share
    period = torch.full_like(c[0], float("nan"))
    moving = (~fixed & ~undefined).nonzero().flatten()
    for some in moving.split(_AT_ONCE):
        period[some] = _periods(window[:, some], rule.fit)
    orbit = period.isfinite()
    labels[orbit] = BEHAVIOURS.index("orbit")
    labels[fixed] = BEHAVIOURS.index("fixed point")
    labels[undefined] = -1
    amplitude = torch.where(orbit, (window.amax(0) - window.amin(0)) / 2, float("nan"))
    shape, dtype = cosines.shape[1:], wide(cosines).dtype
    return labels.reshape(shape), period.reshape(shape).to(dtype), amplitude.reshape(shape).to(dtype)


def _check_cosines(c: Float[Tensor, "loop series"]) -> None:
    slack = 1e-3  # float32 rounding, and then some
    if c.numel() and (bool((c.abs() > 1 + slack).any()) or bool(((c[-1] - 1).abs() > slack).any())):
        raise InputError(
            f"cosines must lie in [-1, 1] and be 1 at the last loop, got {float(c.min()):.4g} to {float(c.max()):.4g} "
            f"and {float(c[-1].min()):.4g} at the last: pass cosine_to(states, end) with the last loop's states as end."
        )


def _is_slider(c: Float[Tensor, "loop series"], rule: LimitRule) -> Tensor:
    """Step 3 of `LimitRule`, on the window and the last loop."""
    angle = c.clamp(-1, 1).arccos()
    angle = angle - angle[-1]  # rounding leaves the last at arccos(1 − ε)
    steps = len(angle) - 1
    late = steps - max(1, round(steps / 4))
    steady = angle[0] >= rule.steady * angle.diff(dim=0).abs().sum(0)
    goes_on = angle[late] / (steps - late) >= rule.pace * angle[0] / steps
    return steady & goes_on & (angle[0] > 0)


def _periods(c: Float[Tensor, "loop series"], fit: float) -> Float[Tensor, " series"]:
    """Step 2 of `LimitRule`: the period of each series; NaN where it does not repeat."""
    w, n = c.shape
    most = min(_MOST_HARMONICS, int((w / 3 - 1) / 2))
    count = round(_OVERSAMPLING * w * (0.5 - 2 / w)) + 1
    if most < 1 or count < 2:
        return c.new_full((n,), float("nan"))
    frequencies = torch.linspace(2 / w, 0.5, count, dtype=c.dtype, device=c.device)
    centred = c - c.mean(0)
    power = centred.square().sum(0)
    quality = torch.stack([_quality(f, most, centred, power) for f in frequencies.tolist()])
    left, here = quality[:-1], quality[1:]
    right = torch.cat((quality[2:], quality[-2:-1]))  # mirrored: the shortest period, two loops, may be a peak
    peak = (here >= left) & (here >= right) & (here >= fit)
    place = (peak.long() * torch.arange(1, count, device=c.device)[:, None]).amax(0)  # the highest frequency; 0: none
    at = place.clamp(min=1, max=count - 2)
    below, top, above = (quality.gather(0, (at + i)[None])[0] for i in (-1, 0, 1))
    bend = below - 2 * top + above
    shift = torch.where((place == at) & (bend < 0), (below - above) / (2 * bend), 0.0).clamp(-0.5, 0.5)
    frequency = frequencies[place] + shift * (frequencies[1] - frequencies[0])
    return torch.where(place > 0, 1 / frequency, float("nan"))


def _quality(
    frequency: float, most: int, centred: Float[Tensor, "loop series"], power: Float[Tensor, " series"]
) -> Float[Tensor, " series"]:
    """Adjusted R² of a constant and harmonics of one frequency."""
    w = len(centred)
    harmonics = torch.arange(1, min(most, int(0.5 / frequency + 1e-9)) + 1, dtype=centred.dtype, device=centred.device)
    t = torch.arange(w, dtype=centred.dtype, device=centred.device)
    phase = 2 * math.pi * frequency * harmonics * t[:, None]
    waves = torch.cat((phase.cos(), phase.sin()), dim=1)
    waves = waves - waves.mean(0)
    basis, sizes, _ = torch.linalg.svd(waves, full_matrices=False)
    basis = basis[:, sizes > 1e-6 * sizes[0]]  # at two loops a period the sine is zero
    explained = (basis.T @ centred).square().sum(0) / power
    return 1 - (1 - explained) * (w - 1) / (w - 1 - basis.shape[1])


def limit_shares(labels: Int[Tensor, "*dims"]) -> Float[Tensor, "behaviour"]:
    """Share of each behaviour among all defined labels, in the order of `BEHAVIOURS`; NaN where none is defined."""
    counts = _counts(labels)
    return counts / counts.sum()


def _counts(labels: Tensor) -> Float[Tensor, "behaviour"]:
    return torch.stack([(labels == i).sum() for i in range(len(BEHAVIOURS))]).double()


@dataclass(frozen=True, eq=False, repr=False)
class LimitBehaviour(Result):
    """The limit behaviour of every token in every core layer.

    Attributes:
        cosines: of each state and that of the last loop.
        places: prompt and position of each token.
        labels: indices of `BEHAVIOURS`; −1 where the cosines are undefined.
        period: of orbits, in loops; else NaN.
        amplitude: of orbits, half the range of the cosine; else NaN.
    """

    cosines: Float[Tensor, "loop layer token"]
    places: dict[str, Int[Tensor, " token"]]
    labels: Int[Tensor, "layer token"]
    period: Float[Tensor, "layer token"]
    amplitude: Float[Tensor, "layer token"]

    def shares(self, layer: int = -1) -> dict[str, float]:
        """Share of tokens with each behaviour in a layer; by default the last, as in the paper."""
        return dict(zip(BEHAVIOURS, limit_shares(self._layer(layer)).tolist(), strict=True))

    def prompt_shares(self, layer: int = -1) -> dict[str, float]:
        """Share of prompts in which at least one token of a layer shows each behaviour: one that orbits is enough.

        Of prompts with a defined label; the shares need not sum to 1. NaN where there is none.
        """
        labels, prompts = self._layer(layer), self.places["prompt"]
        seen = [(_counts(labels[prompts == one]) > 0).double() for one in prompts[labels >= 0].unique().tolist()]
        shares = torch.stack(seen).mean(0) if seen else torch.full((len(BEHAVIOURS),), float("nan"))
        return dict(zip(BEHAVIOURS, shares.tolist(), strict=True))

    def co_occurrence(self) -> pd.DataFrame:
        """How behaviours go together across the layers of a token.

        Entry (a, b) is the chance that, of two different layers of one token, drawn at random, the first shows a and
        the second b. The matrix is symmetric and sums to 1; all on the diagonal means that the layers of a token agree.
        NaN where no token has two layers with a label.

        Raises:
            InputError: a single layer.
        """
        if len(self.labels) < 2:
            raise InputError("behaviours of layers are compared, and there is one layer.")
        shows = torch.stack([self.labels == i for i in range(len(BEHAVIOURS))]).double()
        counts = shows.sum(1)
        pairs = counts @ counts.T - torch.diag(counts.sum(1))  # a layer is not paired with itself
        return pd.DataFrame((pairs / pairs.sum()).numpy(), index=list(BEHAVIOURS), columns=list(BEHAVIOURS))

    def _layer(self, layer: int) -> Int[Tensor, " token"]:
        return self.labels[resolve_index("layer", layer, len(self.labels))]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each layer and token: layer, prompt, pos, behaviour, period, amplitude."""
        table = place_table(self.labels.shape, ("layer", "token"), self.places)
        table["behaviour"] = [(*BEHAVIOURS, "undefined")[label] for label in self.labels.flatten().tolist()]
        table["period"], table["amplitude"] = self.period.flatten().numpy(), self.amplitude.flatten().numpy()
        return table

    def plot(self, layer: int = -1) -> go.Figure:
        """Cosine to the last loop over loops, tokens coloured by their behaviour in a layer.

        Args:
            layer: the core layer.
        """
        index = resolve_index("layer", layer, len(self.labels))
        places = zip(self.places["prompt"].tolist(), self.places["pos"].tolist(), strict=True)
        names = [f"prompt {prompt}, position {pos}" for prompt, pos in places]
        title = f"Limit behaviour: {self.made_by.get('model', '')}, core layer {index}"
        threshold = self.made_by["rule"]["threshold"]
        return limit_curves(self.cosines[:, index], self.labels[index], BEHAVIOURS, threshold, names, title)


def limits_of(
    observed: Observed, *, rule: LimitRule | None = None, name: str = COSINE_TO_END.name, stack: str | None = None
) -> LimitBehaviour:
    """The limit behaviour of every token of an observation, in every core layer.

    Args:
        observed: from `observe(..., measures=[COSINE_TO_END], per_token=["cosine_to_end"])`.
        rule: the thresholds.
        name: of another measure of the cosine to the last loop.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: what `classify_limits` refuses; or the measure was not kept for every token.
    """
    rule = LimitRule() if rule is None else rule
    cosines, places = observed.tokens_by_loop(name, stack)
    labels, period, amplitude = classify_limits(cosines, rule)
    return LimitBehaviour(
        made_by={**observed.made_by, "rule": dataclasses.asdict(rule), **({} if stack is None else {"stack": stack})},
        cosines=cosines,
        places=places,
        labels=labels,
        period=period,
        amplitude=amplitude,
    )


@with_run_options
def limit_behaviour(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    rule: LimitRule | None = None,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LimitBehaviour:
    """How each token's state behaves in the limit of many loops, in every core layer.

    Every batch runs twice, once for the end; what is kept are the cosines. To go on after an interruption, pass
    `limits_of` what `observe(..., save_to=...)` gives.

    Args:
        model, prompts, batch_size, progress, options: as in `observe`.
        n_loops: at least 16; None for 128, as in the paper.
        rule: the thresholds of the algorithm, which `LimitRule` describes.
        stack: whose layers and loops; None for the only one that loops.

    Raises:
        InputError: what `observe` refuses; too few loops; states that are not finite, with layer and loop.

    Source:
        arXiv 2604.11791.
    """
    runs = prepare_long(model, prompts, n_loops, options, least=FEWEST_LOOPS, several_stacks=True)
    model.cfg.looping_stack(stack)
    measures, per_token = [COSINE_TO_END], [COSINE_TO_END.name]
    found = observe(model, runs, measures=measures, per_token=per_token, batch_size=batch_size, progress=progress)
    return limits_of(found, rule=rule, stack=stack)
