"""A stretch of a trajectory as a sum of modes, c + Σ aⱼ zⱼᵗ: how each shrinks or turns, with errors.

What a linear map does is such a sum, and so is what any smooth map does near a point of rest or a closed path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Reals: TypeAlias = npt.NDArray[np.float64]

Z = 4.0
"""How many standard errors an error bar has: thousands of tokens are judged at once."""

_CHANNELS = 6  # principal components that are fitted
_MOST_MODES = 16  # conjugate pairs are two
_FASTEST, _LARGEST = 0.05, 1.1  # between which |z| is looked for
_LEAST_TURN = 0.05  # in radians, over the window, of a conjugate pair; and away from half a turn a loop
_NEAR_ONE = 0.5  # a real z above it is written as (zᵗ − 1) / (z − 1), which is t at z = 1: a straight drift
_EVALUATIONS = 20
_MOST_UNDONE = 4.0
_REFINED = 4  # of the guesses, the likeliest
_ROUNDING = 10.0  # roundings that a state collects on its way
_SURPRISE = 16.0  # by how much the last quarter may miss what the first three foretell, in expected squares
_LEAST_ERROR = 1e-7  # of |z|, whatever the fit says: z = 1 ± 1e-8 is a drift for who looks at 500 loops


@dataclass(frozen=True)
class Mode:
    """One z of the sum.

    Attributes:
        radius: |z|: below 1 it dies out.
        radius_error: four standard errors of it.
        turns: turns a loop, in [0, 0.5]; 0 for a z on the positive axis.
        turns_error: four standard errors of it.
        size: after the last loop, how far the mode holds the state from where it would be without it, beside the
            state's own length. Of a mode that shrinks it is the way left to go.
        size_error: four standard errors of it.
        moved: how far it moves the state over the window, root mean square about its mean.
    """

    radius: float
    radius_error: float
    turns: float
    turns_error: float
    size: float
    size_error: float
    moved: float


@dataclass(frozen=True)
class ModeFit:
    """The modes of a window of loops.

    Attributes:
        modes: those that are there.
        n_loops: of the window.
        scatter: what is left, root mean square, beside the state's length.
        holds: whether the last quarter goes as the modes of the first three foretell.
        ends: the fitted state at the window's two ends.
        noise: standard deviation of what is left, beside the state's length, with more for what is correlated.
        basis: an orthonormal basis of all that was fitted, [loop, column].
        moved: how far the state moves over the window, root mean square about its mean.
    """

    modes: tuple[Mode, ...]
    n_loops: int
    scatter: float
    holds: bool
    ends: tuple[Reals, Reals]
    noise: float
    basis: Reals
    moved: float

    def could_hide(self, radius: float) -> float:
        """How far from its limit a real mode of that |z| may still hold the state unseen: four standard errors."""
        shape = radius ** (np.arange(self.n_loops) - self.n_loops + 1.0)
        seen = shape - self.basis @ (self.basis.T @ shape)
        return Z * self.noise / max(float(np.linalg.norm(seen)), 1e-300)


class _Poles(NamedTuple):
    """The zs: real ones, and (|z|, angle) for each conjugate pair."""

    real: tuple[float, ...] = ()
    pairs: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, values: Reals, n_real: int) -> _Poles:
        """From their parameters, the real ones first."""
        pairs = values[n_real:].reshape(-1, 2).tolist()
        return cls(tuple(values[:n_real].tolist()), tuple((radius, angle) for radius, angle in pairs))

    @property
    def values(self) -> Reals:
        return np.array([*self.real, *(x for pair in self.pairs for x in pair)], dtype=float)

    def bounds(self, n_loops: int) -> tuple[Reals, Reals]:
        """Between which the parameters lie. A pair that next to never turns would be two real zs, and no pair."""
        least = _LEAST_TURN / n_loops
        low = [-_LARGEST] * len(self.real) + [_FASTEST, least] * len(self.pairs)
        return np.array(low), np.array([_LARGEST] * len(self.real) + [_LARGEST, math.pi - least] * len(self.pairs))

    def basis(self, t: Reals) -> Reals:
        """A constant, a column for each real z, and a cosine and a sine for each pair, [loop, column]."""
        columns = [np.ones_like(t), *(_real_mode(z, t)[0] for z in self.real)]
        for radius, angle in self.pairs:
            columns += [radius**t * np.cos(angle * t), radius**t * np.sin(angle * t)]
        return np.stack(columns, axis=1)

    def slopes(self, t: Reals, coefficients: Reals) -> Reals:
        """The derivative of the sum by each parameter, [loop, channel, parameter]."""
        out = [_real_mode(z, t)[1][:, None] * coefficients[1 + i] for i, z in enumerate(self.real)]
        for i, (radius, angle) in enumerate(self.pairs):
            a, b = coefficients[1 + len(self.real) + 2 * i :][:2]
            cos, sin = (radius**t * np.cos(angle * t))[:, None], (radius**t * np.sin(angle * t))[:, None]
            out += [t[:, None] / radius * (cos * a + sin * b), t[:, None] * (cos * b - sin * a)]
        return np.stack(out, axis=-1) if out else np.zeros((*coefficients[:1].repeat(len(t), 0).shape, 0))


def _real_mode(z: float, t: Reals) -> tuple[Reals, Reals]:
    """(zᵗ, or (zᵗ − 1) / (z − 1) near 1, and its derivative by z)."""
    if z <= _NEAR_ONE:
        return z**t, np.where(t > 0, t * z ** np.maximum(t - 1, 0), 0.0)
    d = z - 1
    if abs(d) * t[-1] < 1e-4:
        first, second = t * (t - 1) / 2, t * (t - 1) * (t - 2) / 6
        return t + d * first + d**2 * second, first + 2 * d * second
    value = np.expm1(t * math.log(z)) / d
    return value, (t * z ** (t - 1) - value) / d


class _Fit(NamedTuple):
    """A sum that was fitted by least squares: its zs, coefficients, an orthonormal basis, and what is left."""

    poles: _Poles
    coefficients: Reals
    basis: Reals
    rest: Reals

    @property
    def rss(self) -> float:
        return float(np.square(self.rest).sum())

    @property
    def n_parameters(self) -> int:
        return self.coefficients.size + len(self.poles.values)

    def moved(self) -> list[float]:
        """How far each mode moves the state, root mean square about its mean; the real ones first."""
        columns = self.poles.basis(np.arange(len(self.rest), dtype=float))
        columns, n_real = columns - columns.mean(0), len(self.poles.real)
        parts = [slice(1 + i, 2 + i) for i in range(n_real)]
        parts += [slice(1 + n_real + 2 * i, 3 + n_real + 2 * i) for i in range(len(self.poles.pairs))]
        return [float(np.linalg.norm(columns[:, at] @ self.coefficients[at])) / len(columns) ** 0.5 for at in parts]

    def cancels(self, y: Reals) -> bool:
        """Whether a mode moves much further than the state does, so that others undo it: two zs too near each other."""
        return max(self.moved(), default=0.0) > _MOST_UNDONE * float(np.linalg.norm(y)) / len(y) ** 0.5

    def projected_slopes(self, t: Reals) -> Reals:
        """What the slopes have that no change of coefficients makes up for, [loop · channel, parameter]."""
        slopes = self.poles.slopes(t, self.coefficients)
        slopes = slopes - np.einsum("tc,crp->trp", self.basis, np.einsum("tc,trp->crp", self.basis, slopes))
        return slopes.reshape(self.rest.size, -1)


def _solve(poles: _Poles, y: Reals) -> _Fit:
    """The best coefficients for given zs."""
    columns = poles.basis(np.arange(len(y), dtype=float))
    scale = np.linalg.norm(columns, axis=0)
    coefficients = np.linalg.lstsq(columns / scale, y, rcond=1e-13)[0] / scale[:, None]
    return _Fit(poles, coefficients, np.linalg.qr(columns / scale)[0], y - columns @ coefficients)


def _refine(poles: _Poles, y: Reals) -> _Fit:
    """The best zs near the given ones: variable projection (Golub and Pereyra 1973, in Kaufman's form)."""
    if not poles.values.size:
        return _solve(poles, y)
    n_real, t = len(poles.real), np.arange(len(y), dtype=float)
    low, high = poles.bounds(len(y))
    start = np.clip(poles.values, low + 1e-9, high - 1e-9)

    def rest(values: Reals) -> Reals:
        return _solve(_Poles.of(values, n_real), y).rest.ravel()

    def slopes(values: Reals) -> Reals:
        return -_solve(_Poles.of(values, n_real), y).projected_slopes(t)

    settings: dict[str, Any] = {"jac": slopes, "x_scale": "jac", "xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-15}
    found = least_squares(rest, start, bounds=(low, high), max_nfev=_EVALUATIONS, **settings)
    return _solve(_Poles.of(found.x, n_real), y)


def _subspace(y: Reals) -> tuple[Reals, Reals]:
    """Left singular vectors of the matrix of delayed copies, [delay · channel, direction], and singular values."""
    delays = len(y) // 2
    columns = np.lib.stride_tricks.sliding_window_view(y, delays, axis=0)  # [start, channel, delay]
    u, s, _ = np.linalg.svd(columns.transpose(2, 1, 0).reshape(delays * y.shape[1], -1), full_matrices=False)
    return u, s


def _esprit(u: Reals, n_channels: int, order: int) -> _Poles:
    """The zs of so many modes: eigenvalues of the map from the subspace to itself a loop later (Roy, Kailath 1989)."""
    kept = u[:, :order]
    shift = np.linalg.lstsq(kept[:-n_channels], kept[n_channels:], rcond=None)[0]
    values = np.linalg.eigvals(shift)
    real = tuple(float(z.real) for z in values if z.imag == 0 and abs(z) > _FASTEST)
    pairs = tuple((float(abs(z)), float(np.angle(z))) for z in values if z.imag > 0 and abs(z) > _FASTEST)
    return _Poles(real, pairs)


def _guesses(y: Reals) -> list[_Poles]:
    """What the subspace of each size says, with and without its z nearest 1: it knows the constant as a mode."""
    guesses, (u, s) = [], _subspace(y)
    for order in range(1, min(_MOST_MODES, len(y) // 4, len(s)) + 1):
        poles = _esprit(u, y.shape[1], order)
        guesses.append(poles)
        if poles.real:
            nearest = min(poles.real, key=lambda z: abs(z - 1))
            guesses.append(poles._replace(real=tuple(z for z in poles.real if z != nearest)))
    return guesses


def _best(y: Reals, floor: float) -> _Fit:
    """The sum with the best Bayesian information criterion, of those with numbers enough for their parameters."""

    def score(fit: _Fit) -> float:
        enough = y.size - fit.n_parameters > 2 * y.shape[1]
        if not enough or fit.cancels(y):
            return math.inf
        return y.size * math.log((fit.rss + floor) / y.size) + fit.n_parameters * math.log(y.size)

    likely = sorted((_solve(guess, y) for guess in _guesses(y)), key=score)[:_REFINED]
    slow = [*(_Poles((z,)) for z in (0.9, 0.99, 1.0)), _Poles(pairs=((1.0, math.pi / len(y)),))]
    fits = [_solve(_Poles(), y), *(_refine(poles, y) for poles in (*(fit.poles for fit in likely), *slow))]
    return min(fits, key=score)


def _holds(fit: _Fit, y: Reals, variance: float) -> bool:
    """Whether the last quarter is what the rest foretells, within what noise and the fit's own errors allow."""
    w, channels = y.shape
    n, t = w - w // 4, np.arange(w, dtype=float)
    early = _refine(fit.poles, y[:n])
    columns = early.poles.basis(t)
    missed = np.square((y - columns @ early.coefficients)[n:]).sum()
    variance = max(early.rss / max(1, n * channels - early.n_parameters), variance)
    linear = np.kron(columns, np.eye(channels)).reshape(w, channels, -1)
    design = np.concatenate((linear, early.poles.slopes(t, early.coefficients)), axis=-1)
    known = design[:n].reshape(n * channels, -1)
    scale = np.linalg.norm(known, axis=0) + 1e-300
    spread = np.linalg.pinv((known / scale).T @ (known / scale), rcond=1e-14)
    ahead = design[n:] / scale
    expected = variance * (channels * (w - n) + np.einsum("tcp,pq,tcq->", ahead, spread, ahead))
    return bool(missed <= _SURPRISE * expected)


def _modes(fit: _Fit, w: int, variance: float) -> tuple[Mode, ...]:
    """The modes of a sum with their errors, from the linearised problem."""
    t, channels = np.arange(w, dtype=float), fit.rest.shape[1]
    slopes, columns = fit.projected_slopes(t), fit.poles.basis(t)
    errors = Z * np.sqrt(variance * np.abs(np.diag(np.linalg.pinv(slopes.T @ slopes, rcond=1e-15))))
    spread = variance * channels * np.linalg.pinv(columns.T @ columns, rcond=1e-15)

    def size(*parts: Reals) -> tuple[float, float]:
        """Length of a sum of coefficients, or of several that are orthogonal, and its error."""
        square = sum(float(np.square(part @ fit.coefficients).sum()) for part in parts)
        return math.sqrt(square), Z * math.sqrt(max(float(part @ spread @ part) for part in parts))

    modes, at, moved = [], np.eye(columns.shape[1]), fit.moved()
    for i, z in enumerate(fit.poles.real):
        end = abs(z) ** (w - 1) / (max(abs(1 - z), 1e-12) if z > _NEAR_ONE else 1)
        error, turns = max(_LEAST_ERROR, float(errors[i])), 0.0 if z > 0 else 0.5
        modes.append(Mode(abs(z), error, turns, 0.0, *size(end * at[1 + i]), moved[i]))
    for i, (radius, angle) in enumerate(fit.poles.pairs):
        parameter, column = len(fit.poles.real) + 2 * i, 1 + len(fit.poles.real) + 2 * i
        error, turns_error = max(_LEAST_ERROR, float(errors[parameter])), float(errors[parameter + 1]) / (2 * math.pi)
        end, turned = radius ** (w - 1), angle * (w - 1)
        if turned < math.pi:  # where it is in the end; a cosine and a sine of next to no angle undo each other
            sizes = size(end * (math.cos(turned) * at[column] + math.sin(turned) * at[column + 1]))
        else:
            sizes = size(end * at[column], end * at[column + 1])
        modes.append(Mode(radius, error, angle / (2 * math.pi), turns_error, *sizes, moved[len(fit.poles.real) + i]))
    return tuple(modes)


def fit_modes(states: Reals, eps: float) -> ModeFit:
    """The sum of modes that a window of loops follows.

    The first six principal components of the states are fitted by a constant and as many modes as the Bayesian
    information criterion grants; where to begin is ESPRIT's answer for each number of modes. What is left counts as
    noise, correlated noise as so much more of it, and errors are of the linearised problem.

    Args:
        states: [loop, d], twelve loops or more, not all zero.
        eps: relative rounding of the numbers; nothing below ten times that is fitted.
    """
    w = len(states)
    length = math.sqrt(float(np.square(states).sum(1).mean()))
    u, s, v = np.linalg.svd(states - states.mean(0), full_matrices=False)
    rounding = _ROUNDING * eps
    least = rounding * length * math.sqrt(w)
    channels = max(1, min(_CHANNELS, int((s > least).sum())))
    y = u[:, :channels] * s[:channels] / length
    floor = rounding**2 * y.size
    fit = _best(y, floor)
    lags = [float((fit.rest[i:] * fit.rest[:-i]).sum()) / max(fit.rss, 1e-300) for i in (1, 2, 3)]
    free = y.size - fit.n_parameters
    variance = (fit.rss + floor) / free * max(1.0, 1 + 2 * sum(max(0.0, lag) for lag in lags))
    fitted = ((y - fit.rest)[[0, -1]] * length) @ v[:channels] + states.mean(0)
    return ModeFit(
        modes=_modes(fit, w, variance),
        n_loops=w,
        scatter=math.sqrt(fit.rss / free * channels + float(np.square(s[channels:]).sum()) / (length**2 * w)),
        holds=_holds(fit, y, variance),
        ends=(fitted[0], fitted[1]),
        noise=math.sqrt(variance * channels),
        basis=fit.basis,
        moved=float(np.linalg.norm(s)) / (length * math.sqrt(w)),
    )
