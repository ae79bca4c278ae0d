"""The Jacobian of one loop: how it shrinks, turns or blows up small differences between states."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigs
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.dynamics.tokens import one_prompt, prepare_long
from tl_looped.engine.checks import check_finite, check_number
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.numbers import length, ratio
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, check_state, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import naming_origin
from tl_looped.viz.dynamics import spectrum_plane

Reals = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False, repr=False)
class JacobianSpectrum(Result):
    """The leading eigenvalues of a loop's Jacobian at one state, the largest first.

    Attributes:
        position: whose block of the Jacobian; None for the whole.
        size: rows of the matrix.
        real, imag: the eigenvalues' parts.
        residual: how well each is met: ‖Jᵀ w − λ w‖ / (|λ| ‖w‖) with w its vector, measured; NaN for λ = 0.
        state_step: ‖F(x) − x‖ / ‖x‖ at the state: how far it is from a fixed point; NaN where x is zero.
    """

    position: int | None
    size: int
    real: Float[Tensor, " k"]
    imag: Float[Tensor, " k"]
    residual: Float[Tensor, " k"]
    state_step: float

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues, complex, by falling absolute value."""
        return torch.complex(self.real, self.imag)

    @property
    def radius(self) -> float:
        """The spectral radius: the largest absolute value. Below 1, the loop contracts near a fixed point."""
        return float(self.eigenvalues.abs().max())

    @property
    def rate(self) -> float:
        """The logarithm of the radius: the exponent per loop at which distances shrink near a fixed point, in the end.

        To compare with `Convergence.rate`. Minus infinity for a radius of zero.
        """
        return math.log(self.radius) if self.radius > 0 else -math.inf

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each eigenvalue: real, imag, abs, angle (radians per loop), residual."""
        values = self.eigenvalues
        columns = {"real": self.real, "imag": self.imag, "abs": values.abs(), "angle": values.angle()}
        return pd.DataFrame({name: one.numpy() for name, one in {**columns, "residual": self.residual}.items()})

    def plot(self) -> go.Figure:
        """The eigenvalues in the complex plane, with the unit circle."""
        where = "whole state" if self.position is None else f"position {self.position}"
        title = f"Jacobian of a loop: {self.made_by.get('model', '')}, {where}, radius {self.radius:.4g}"
        return spectrum_plane(self.real, self.imag, title)


@torch.inference_mode(mode=False)  # it needs gradients, whatever the caller's mode
@with_run_options
def jacobian_spectrum(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None = None,
    *,
    loop: int = -1,
    state: Tensor | None = None,
    position: int | None = None,
    k: int = 6,
    tolerance: float | None = None,
    max_iterations: int = 1000,
    start_seed: int = 0,
    **options: Unpack[RunOptions],
) -> JacobianSpectrum:
    """Leading eigenvalues of the Jacobian J of one loop, x → loop(x), at a state.

    The map takes the state that enters a loop, at all positions, to the one that leaves it, the prompt's injection
    held fixed. J is never formed: the Arnoldi method (ARPACK) asks for products with Jᵀ, which one backward pass
    through the loop gives, and Jᵀ has the eigenvalues of J. With `position`, the matrix is the block of J by which
    that position's state acts on itself. Where attention is causal, J is block triangular, and its eigenvalues are
    those of all positions' blocks together. Near a fixed point the distance at a position shrinks, in the end, at the
    rate of the largest radius among the blocks of the positions up to it.

    In float32 a product is exact to about 1e-6 ‖J‖ only, and where J is far from normal eigenvalues suffer more than
    that: load the model in float64, and look at `residual`.

    Args:
        model: the model, in float32 or float64.
        prompts: one prompt.
        n_loops: loops to run for the state; None for 128.
        loop: take the state that enters this loop; by default the last, so the state is near the fixed point if there
            is one.
        state: the state itself, [pos, d_model] or [1, pos, d_model]; then nothing is run before. (Of two states both,
            side by side, as a stopped run returns them: the map is that of both.)
        position: of one position's block, negative from the end; None for the whole state.
        k: how many eigenvalues, at most the matrix's size less two; a complex pair may be cut by it.
        tolerance: relative accuracy that ARPACK stops at; None: 1e-9 in float64, 1e-4 in float32.
        max_iterations: of ARPACK's restarts.
        start_seed: of ARPACK's first vector.
        options: as in `LoopedModel.forward`.

    Raises:
        InputError: several prompts, a half-precision model, too many eigenvalues, a state that is not finite, or no
            convergence within `max_iterations`.

    Source:
        Lehoucq, Sorensen and Yang 1998 (ARPACK). For the spectral radius at a fixed point as the rate of convergence:
        any text on fixed-point iteration (Ostrowski's theorem).
    """
    runs = prepare_long(model, prompts, n_loops, options, least=1, several_stacks=True)
    if model.dtype not in _TOLERANCES:
        raise InputError(f"the model is {model.dtype}: load it in float32, or better float64, for its Jacobian.")
    check_count("k", k)
    check_count("max_iterations", max_iterations)
    accuracy = _TOLERANCES[model.dtype] if tolerance is None else check_number("tolerance", tolerance, 0.0, 1.0)
    if state is not None:
        if runs.initial_state is not None:
            raise InputError("state is given, so leave out initial_state.")
        check_state(model.cfg, runs.rows, state, runs.seed, model.dtype)
        runs = replace(runs, initial_state=state)
    run = one_prompt(model, runs)
    at = resolve_index("loop", loop, run.n_loops)
    place = None if position is None else resolve_index("position", position, run.tokens.shape[1])
    size = model.cfg.d_state * (run.tokens.shape[1] if place is None else 1)
    if k > size - 2:
        raise InputError(f"the Jacobian has {size} rows, so k must be at most {size - 2}, got {k}.")
    run = replace(run, start=at if state is not None else 0, stop=at + 1, reads_out=False)
    model.reach(run).check_hooks()
    with naming_origin(model, run):
        loop_map = _LoopMap(model, run, place)
    values, vectors = _arnoldi(loop_map, k, accuracy, max_iterations, start_seed)
    residual = [_residual(loop_map, value, vector) for value, vector in zip(values, vectors.T, strict=True)]
    return JacobianSpectrum(
        made_by={"model": model.cfg.model_name, **run.describe(), "loop": at, "tolerance": accuracy},
        position=place,
        size=size,
        real=torch.from_numpy(values.real.copy()),
        imag=torch.from_numpy(values.imag.copy()),
        residual=torch.tensor(residual, dtype=torch.float64),
        state_step=loop_map.step,
    )


class _LoopMap(LinearOperator):
    """The transposed Jacobian of one loop as a map of the state (or of one position's): products are backward passes.

    Attributes:
        step: ‖F(x) − x‖ / ‖x‖; NaN where x is zero.
    """

    def __init__(self, model: LoopedModel, run: Run, position: int | None):
        transformer, frame, loop = model.transformer, model.frame(run), run.stop - 1
        with torch.no_grad():
            _, e = transformer.begin(run.tokens, frame, run.state, run.start)
            state = transformer(run.tokens, frame, run.state, run.start, loop).clone()
        check_finite(state[0], (f"loop {loop}, entering: position",))
        with torch.enable_grad():
            self._x = (state if position is None else state[:, position]).clone().requires_grad_()
            whole = self._x
            if position is not None:
                whole = torch.cat((state[:, :position], self._x[:, None], state[:, position + 1 :]), dim=1)
            after = transformer.loop(whole, e, frame, loop)
            self._y = after if position is None else after[:, position]
        check_finite(after[0].detach(), (f"loop {loop}, leaving: position",))
        x, y = self._x.detach(), self._y.detach()
        self.step = float(ratio(length((y - x).flatten()), length(x.flatten())))
        super().__init__(np.float64, (x.numel(), x.numel()))

    def _matvec(self, x: Reals) -> Reals:
        v = torch.from_numpy(x.reshape(tuple(self._y.shape))).to(self._y)
        (product,) = torch.autograd.grad(self._y, self._x, v, retain_graph=True)
        return product.double().cpu().numpy().ravel()


def _arnoldi(
    loop_map: _LoopMap, k: int, tolerance: float, max_iterations: int, seed: int
) -> tuple[Complexes, Complexes]:
    """(eigenvalues, vectors in columns) of Jᵀ, the largest by absolute value first."""
    first = np.random.default_rng(seed).standard_normal(loop_map.shape[0])
    settings: dict[str, Any] = {"which": "LM", "v0": first, "tol": tolerance, "maxiter": max_iterations}
    try:
        found: Any = eigs(loop_map, k=k, **settings)
    except ArpackNoConvergence as error:
        raise InputError(
            f"ARPACK found {len(error.eigenvalues)} of k={k} eigenvalues in max_iterations={max_iterations}: raise "
            "max_iterations, ask for another k (eigenvalues of the same size are hard to tell apart), load the model "
            f"in float64, or raise tolerance above {tolerance:g}; with position= the matrix is smaller."
        ) from error
    except ArpackError as error:
        raise InputError(
            f"ARPACK could not go on ({error}): the Jacobian may be zero at this state. Take another loop= or state=."
        ) from error
    values, vectors = found
    order = np.lexsort((-values.imag, -np.abs(values)))
    return values[order], vectors[:, order]


def _residual(loop_map: _LoopMap, value: complex, vector: Complexes) -> float:
    product = loop_map.matvec(vector.real.copy()) + 1j * loop_map.matvec(vector.imag.copy())
    left = np.linalg.norm(product - value * vector)
    return float(left / (abs(value) * np.linalg.norm(vector))) if value else math.nan
