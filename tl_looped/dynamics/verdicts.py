"""What a token's state does in the long run: rest, approach, drift, go round, wander; or that no one can tell yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.dynamics.modes import Mode, ModeFit, Reals, Z, fit_modes
from tl_looped.dynamics.tokens import place_table, prepare_long
from tl_looped.engine.checks import check_finite, check_loop_axis, check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.numbers import wide
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, RunOptions, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe import Measure, Observed, observe
from tl_looped.observe.observation import BATCH_SIZE
from tl_looped.viz.dynamics import verdict_shares

VERDICTS = ("rest", "approaching", "drifting", "orbit", "quasi-periodic", "chaotic", "undecided")
"""What `long_run` may say; a verdict is an index here."""

FEWEST_LOOPS = 16
N_COMPONENTS = 32
"""How many random directions a state is seen in."""

_TRANSIENT = 0.25  # share of the loops, at the beginning, that is left out
_LEAST_SEEN = 0.05  # of the way that is left, for an extrapolated limit to be believed
_COMMENSURATE = 0.01  # a frequency is p/P if its error is below this over P²: one in a hundred would be by chance
_NEIGHBOURS = 4
_HORIZONS = (1, 2, 4, 8)
_FORESEEN, _FORGOTTEN = 0.7, 0.3  # of the variance one loop ahead; and of that, what is left at a longer horizon


@dataclass
class _Verdict:
    """What is said of one state; see `LongRun` for the numbers."""

    verdict: str
    rate: float = math.nan
    rate_error: float = math.nan
    way_left: float = math.nan
    period: float = math.nan
    amplitude: float = math.nan
    norm_change: float = math.nan
    turn: float = math.nan
    scatter: float = math.nan


@dataclass(frozen=True, eq=False, repr=False)
class LongRun(Result):
    """What the state of every token does in the long run.

    Sizes and distances are beside the state's length; NaN stands where a number has no meaning.

    Attributes:
        places: prompt and position of each token.
        verdict: indices of `VERDICTS`.
        rate: by what the slowest mode that dies out shrinks in a loop.
        rate_error: four standard errors of it.
        way_left: how far the state is from its limit after the last loop, by the modes that die out.
        loops_left: loops until it is within the tolerance, at that rate.
        period: loops for one turn: whole for an orbit; of the largest mode that goes round.
        amplitude: of that mode.
        norm_change: log of the state's length after the last loop over that at the window's beginning, of what drifts.
        turn: the angle between the two, in radians.
        scatter: what no mode explains, root mean square.
    """

    places: dict[str, Int[Tensor, " token"]]
    verdict: Int[Tensor, " token"]
    rate: Float[Tensor, " token"]
    rate_error: Float[Tensor, " token"]
    way_left: Float[Tensor, " token"]
    loops_left: Float[Tensor, " token"]
    period: Float[Tensor, " token"]
    amplitude: Float[Tensor, " token"]
    norm_change: Float[Tensor, " token"]
    turn: Float[Tensor, " token"]
    scatter: Float[Tensor, " token"]

    def shares(self) -> dict[str, float]:
        """Share of tokens of each verdict."""
        counts = torch.bincount(self.verdict, minlength=len(VERDICTS)).double()
        return dict(zip(VERDICTS, (counts / counts.sum()).tolist(), strict=True))

    def prompt_shares(self) -> dict[str, float]:
        """Share of prompts with at least one token of each verdict; they need not sum to 1."""
        prompts = self.places["prompt"]
        seen = [torch.bincount(self.verdict[prompts == one], minlength=len(VERDICTS)) > 0 for one in prompts.unique()]
        return dict(zip(VERDICTS, torch.stack(seen).double().mean(0).tolist(), strict=True))

    def drifts_in(self) -> list[str]:
        """For each token that drifts what changes, "norm", "direction" or "both"; "" for the others."""
        tolerance = self.made_by["tolerance"]
        parts = []
        for verdict, norm, turn in zip(self.verdict.tolist(), self.norm_change.abs(), self.turn, strict=True):
            grows, turns = bool(norm > tolerance), bool(turn > tolerance)
            what = "both" if grows == turns else "norm" if grows else "direction"
            parts.append(what if VERDICTS[verdict] == "drifting" else "")
        return parts

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each token: prompt, pos, the verdict, what drifts, and the numbers."""
        table = place_table(self.verdict.shape, ("token",), self.places)
        table["verdict"] = [VERDICTS[index] for index in self.verdict.tolist()]
        table["drifts_in"] = self.drifts_in()
        for one in fields(_Verdict)[1:]:
            table[one.name] = getattr(self, one.name).numpy()
        return table.assign(loops_left=self.loops_left.numpy())

    def plot(self) -> go.Figure:
        """Share of each verdict, over all tokens and over positions."""
        return verdict_shares(self.verdict, self.places["pos"], VERDICTS, str(self.made_by.get("model", "")))


@lru_cache(maxsize=8)
def _directions(d_model: int) -> Float[Tensor, "d_model component"]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(d_model, N_COMPONENTS, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0] * math.sqrt(d_model / N_COMPONENTS)


def sketch(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch component pos"]:
    """A state along 32 fixed random directions, all of it where it has no more; lengths stay as they are on average.

    What a linear map of states does (shrink, turn, drift), it does to these too; relative lengths are off by some 12 %
    (Johnson and Lindenstrauss 1984).
    """
    values = wide(x)
    if x.shape[-1] > N_COMPONENTS:
        values = values @ _directions(x.shape[-1]).to(values)
    return values.transpose(-1, -2)


SKETCH = Measure("sketch", "state along random directions", "", "hook_state_post", sketch, axes=("component", "pos"))
"""The state leaving every loop, in few numbers: what `long_run` looks at. See `sketch`."""


def sketch_of(cfg: LoopedConfig, stack: str | None = None) -> Measure:
    """`SKETCH` of the state of a stack that loops; None for the one that the head reads."""
    return replace(SKETCH, site=cfg.name_in(cfg.looping_stack(stack or cfg.head_stack), "state_post"))


def judge_states(
    states: Float[Tensor, "loop token d_model"], *, tolerance: float = 0.01, slowest: float = 0.999
) -> dict[str, Tensor]:
    """The verdict on each trajectory, as `long_run` gives it; see there for what the words mean.

    Args:
        states: of 16 loops or more, finite.
        tolerance, slowest: see `long_run`.

    Returns:
        The fields of `LongRun` by name, [token].

    Raises:
        InputError: too few loops, states that are not finite, a number out of range.
    """
    return _judge(states, tolerance, slowest, progress=False)


def _judge(states: Tensor, tolerance: float, slowest: float, progress: bool) -> dict[str, Tensor]:
    check_number("tolerance", tolerance, 0.0, 1.0)
    check_number("slowest", slowest, 0.0, 1.0)
    check_loop_axis(states, "states", loops=FEWEST_LOOPS)
    check_finite(states, ("loop", "token"))
    eps = torch.finfo(states.dtype).eps
    window = states[math.ceil(_TRANSIENT * len(states)) :].double().cpu().numpy()
    tokens = tqdm(range(states.shape[1]), desc="states", disable=not progress)
    rows = [_verdict(window[:, i], eps, tolerance, slowest) for i in tokens]
    found = {
        one.name: torch.tensor([getattr(row, one.name) for row in rows], dtype=torch.float64)
        for one in fields(_Verdict)[1:]
    }
    found["verdict"] = torch.tensor([VERDICTS.index(row.verdict) for row in rows], dtype=torch.long)
    left = (tolerance / found["way_left"]).log() / found["rate"].log()
    return {**found, "loops_left": left.clamp(min=0)}


def _verdict(window: Reals, eps: float, tolerance: float, slowest: float) -> _Verdict:
    """The verdict on one trajectory without its transient."""
    if not window.any():
        return _Verdict("rest", way_left=0.0, scatter=0.0)
    fit = fit_modes(window, eps)
    found = _Verdict("undecided", scatter=fit.scatter)
    if not fit.holds:
        found.verdict = _wanders(window)
        return found
    modes = _sort_modes(fit, tolerance, slowest)
    left, error = _way_left(found, modes)
    if modes.drift:
        _measure_drift(found, fit)
    if modes.unclear:
        unexplained = fit.scatter > max(0.5 * fit.moved, tolerance)
        found.verdict = _wanders(window) if unexplained else "undecided"
        return found
    if modes.drift:
        found.verdict = "drifting"
    elif modes.rounds:
        largest = max(modes.rounds, key=lambda mode: mode.size)
        found.period, found.amplitude = 1 / largest.turns, largest.size
        if fit.scatter <= max(0.3 * largest.size, tolerance):
            found.verdict, whole = _goes_round(modes.rounds, fit.n_loops)
            found.period = whole or found.period
    elif left > tolerance + error:
        found.verdict = "approaching"
    elif fit.scatter > tolerance:
        found.verdict = _wanders(window)
    elif left + error + fit.could_hide(slowest) <= tolerance:
        found.verdict = "rest"
    return found


class _Modes(NamedTuple):
    """Modes by what becomes of them.

    Attributes:
        drift: whether one moves on.
        unclear: whether one that matters can't be told.
        rounds: those that go round.
        shrinking: those that die out.
        doubt: how far those that may or may not die out can still move the state, if they do by `slowest`.
    """

    drift: bool
    unclear: bool
    rounds: list[Mode]
    shrinking: list[Mode]
    doubt: float


def _sort_modes(fit: ModeFit, tolerance: float, slowest: float) -> _Modes:
    drift, unclear, doubt = False, False, 0.0
    rounds, shrinking = [], []
    for mode in fit.modes:
        if mode.moved * math.sqrt(fit.n_loops) <= Z * fit.noise:
            continue  # it may be noise
        turned = mode.turns * fit.n_loops
        lasts = mode.radius - mode.radius_error > slowest
        if mode.radius + mode.radius_error < 1:
            shrinking.append(mode)
            way = -(fit.n_loops - 1) * math.log(max(mode.radius, 1e-300))
            seen = math.expm1(min(way, 700.0))  # of its way, beside what is left of it
            unclear = unclear or (seen < _LEAST_SEEN and mode.size > tolerance)
        elif turned < 0.5:  # not half a turn was seen: it moves on
            drift = drift or lasts
            # A mode that shrinks by `slowest` has moved by so much of what it has left; evenly, so by √12 times the
            # root mean square about its mean.
            left = 0.0 if lasts else math.sqrt(12) * mode.moved / (slowest ** -(fit.n_loops - 1) - 1)
            doubt, unclear = doubt + left, unclear or left > tolerance / 2
        elif mode.size + mode.size_error <= tolerance / 2:
            continue  # too small to matter
        elif not lasts or mode.radius - mode.radius_error > 1 or (mode.turns < 0.5 and turned < 2):
            unclear = True
        elif mode.size > tolerance:
            rounds.append(mode)
    return _Modes(drift, unclear, rounds, shrinking, doubt)


def _way_left(found: _Verdict, modes: _Modes) -> tuple[float, float]:
    """Note the rate, and how far the limit is; that distance and its error."""
    shrinking = modes.shrinking
    left = sum((mode.size for mode in shrinking), 0.0)
    error = sum((mode.size_error + mode.size * mode.radius_error / (1 - mode.radius) for mode in shrinking), 0.0)
    if shrinking:
        last = max(shrinking, key=lambda mode: mode.radius)
        found.rate, found.rate_error = last.radius, last.radius_error
    found.way_left = left
    return left, error + modes.doubt


def _measure_drift(found: _Verdict, fit: ModeFit) -> None:
    """Note how much the fitted state's length and direction changed from one end of the window to the other."""
    first, last = fit.ends
    lengths = np.linalg.norm(first), np.linalg.norm(last)
    if not all(lengths):
        return
    found.norm_change = float(np.log(lengths[1] / lengths[0]))
    u, v = first / lengths[0], last / lengths[1]
    found.turn = float(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))


def _goes_round(rounds: Sequence[Mode], n_loops: int) -> tuple[str, int | None]:
    """(whether it comes back after a whole number of loops, of which at least two fit; that number, if so)."""
    for period in range(2, n_loops // 2 + 1):
        off = [abs(mode.turns - round(mode.turns * period) / period) for mode in rounds]
        if all(miss <= mode.turns_error + 1e-9 for miss, mode in zip(off, rounds, strict=True)):
            told = all(mode.turns_error <= _COMMENSURATE / period**2 for mode in rounds)
            return ("orbit", period) if told else ("undecided", None)
    return "quasi-periodic", None


def _wanders(window: Reals) -> str:
    """Say "chaotic" where neighbours in space foretell the next loop and not the later ones; else "undecided".

    The last third is foretold from the four nearest states of the rest (Sugihara and May 1990). Noise can't be foretold
    at all, and what repeats can be at any horizon.
    """
    known = 2 * len(window) // 3
    if known < 4 * max(_HORIZONS):
        return "undecided"
    skills = []
    for ahead in _HORIZONS:
        now, then = window[known:-ahead], window[known + ahead :]
        distance = np.square(now[:, None] - window[None, : known - ahead]).sum(-1)
        nearest = np.argsort(distance, axis=1)[:, :_NEIGHBOURS]
        missed = np.square(window[nearest + ahead].mean(1) - then).sum()
        skills.append(1 - missed / np.square(then - window.mean(0)).sum())
    forgets = min(skills[1:]) < _FORGOTTEN * skills[0]
    return "chaotic" if skills[0] > _FORESEEN and forgets else "undecided"


def long_run_of(
    observed: Observed, *, tolerance: float = 0.01, slowest: float = 0.999, progress: bool = True
) -> LongRun:
    """The verdict on every token of an observation.

    Args:
        observed: from `observe(..., measures=[SKETCH], per_token=["sketch"])`, of 16 loops or more.
        tolerance, slowest, progress: as in `long_run`.

    Raises:
        InputError: the measure was not kept for every token, too few loops, a number out of range.
    """
    states, places = observed.tokens_by_loop(SKETCH.name)
    found = _judge(states.movedim(1, -1), tolerance, slowest, progress)
    made_by = {**observed.made_by, "tolerance": tolerance, "slowest": slowest}
    return LongRun(made_by=made_by, places=places, **found)


@with_run_options
def long_run(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    tolerance: float = 0.01,
    slowest: float = 0.999,
    stack: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
    **options: Unpack[RunOptions],
) -> LongRun:
    """What the state leaving each loop does in the long run, at every token; it may say that these loops can't tell.

    The loops behind the first quarter are written as c + Σ aⱼ zⱼᵗ (see `dynamics.modes`), with errors. A mode dies out
    if |z| < 1 by four standard errors, and lasts if |z| > `slowest` by as many; what is neither leaves the state
    undecided. Then:

    - *rest*: nothing lasts, and the state is within `tolerance` of its limit, also counting what modes up to `slowest`
      could hide in the noise;
    - *approaching*: what dies out has more than the tolerance left to go (`rate`, `way_left`, `loops_left`);
    - *drifting*: a mode lasts that has not made half a turn: the state moves on, in norm, direction or both;
    - *orbit*: what lasts goes round and comes back after a whole number of loops (`period`, `amplitude`);
    - *quasi-periodic*: it goes round, and no whole number up to half the window brings it back;
    - *chaotic*: no such sum foretells the last quarter or explains the most, and neighbours in space foretell one loop,
      but not some later one up to the eighth;
    - *undecided*: none of these is certain. More loops, a wider number format, or a smaller `slowest` decide.

    The slower the motion and the larger the noise, the more loops it takes: rest can't be told from an approach that
    has hardly begun, nor a drift from an approach by 0.999 a loop. A contraction slower than `slowest` counts as
    drifting. Noise is what no mode explains, so bfloat16's rounding (0.4 %) too.

    Args:
        model, prompts, batch_size, progress, options: as in `observe`.
        n_loops: at least 16; None for 128, as in the paper.
        tolerance: distance from the limit, beside the state's length, that counts as rest.
        slowest: the slowest contraction that is told from none.
        stack: whose state, where two stacks loop; None for the one that the head reads. A loop is then one of that
            stack's own passes, which sees the other's in between as part of what moves it.

    Raises:
        InputError: what `observe` refuses; too few loops; a number out of range; states that are not finite.

    Source:
        This library's; the words are those of arXiv 2604.11791 and 2502.05171, whose own rule is `limit_behaviour`.
        ESPRIT: Roy and Kailath 1989. Variable projection: Golub and Pereyra 1973.
    """
    for name, value in (("tolerance", tolerance), ("slowest", slowest)):
        check_number(name, value, 0.0, 1.0)
    runs = prepare_long(model, prompts, n_loops, options, least=FEWEST_LOOPS, several_stacks=True)
    measure, per_token = sketch_of(model.cfg, stack), [SKETCH.name]
    found = observe(model, runs, measures=[measure], per_token=per_token, batch_size=batch_size, progress=progress)
    result = long_run_of(found, tolerance=tolerance, slowest=slowest, progress=progress)
    return replace(result, made_by={**result.made_by, **model.cfg.made_of(measure.site.rpartition(".")[0])})
