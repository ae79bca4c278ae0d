"""Verdict, loop and rate of convergence: linear maps with known rates, rotations, drifts, models."""

import itertools
import math
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics import DISTANCE, STEP, Convergence, convergence, convergence_of, settled
from tl_looped.dynamics.measures import distance_to
from tl_looped.observe import observe


def iterate(matrix: torch.Tensor, offset: torch.Tensor, loops: int) -> torch.Tensor:
    """x → A x + b from zero, the state after each loop."""
    x, states = torch.zeros_like(offset), []
    for _ in range(loops):
        x = matrix @ x + offset
        states.append(x)
    return torch.stack(states)


def to_end(states: torch.Tensor) -> torch.Tensor:
    return distance_to(states, states[-1:].expand_as(states))


def rotation(angle: float, loops: int) -> torch.Tensor:
    turn = angle * torch.arange(loops, dtype=torch.float64)
    return torch.stack((turn.cos(), turn.sin()), dim=-1)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.9])
def test_a_linear_map_converges_at_its_rate(rate: float):
    basis, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor([rate, rate / 2, -rate / 3, 0.0], dtype=torch.float64)) @ basis.T
    states = iterate(matrix, torch.ones(4, dtype=torch.float64), 128)
    distances = to_end(states)
    found = settled(distances, 1e-3)
    assert found.converged.item() == 1.0
    assert found.rate.item() == pytest.approx(math.log(rate), rel=2e-3)
    assert found.rate_error.item() < 0.01 * -math.log(rate)
    within = [d <= 1e-3 for d in distances.tolist()]
    assert found.loop.item() == next(t for t in range(128) if all(within[t:]))
    start, stop = int(found.fit_start), int(found.fit_stop)
    slope, _ = np.polyfit(np.arange(start, stop), np.log(distances[start:stop].numpy()), 1)
    assert found.rate.item() == pytest.approx(slope, rel=1e-10)


def test_complex_eigenvalues_converge_at_their_absolute_value():
    c, s = 0.8 * math.cos(1.0), 0.8 * math.sin(1.0)
    states = iterate(torch.tensor([[c, -s], [s, c]], dtype=torch.float64), torch.ones(2, dtype=torch.float64), 128)
    assert settled(to_end(states)).rate.item() == pytest.approx(math.log(0.8), rel=1e-3)


def test_exact_numbers():
    distances = 0.5 ** torch.arange(12, dtype=torch.float64)
    found = settled(distances, 2.0**-4)
    assert (found.converged.item(), found.loop.item()) == (1.0, 4.0)
    # remains: 2^-9 at loop 9, the first of the last quarter; clear: above 20 · 2^-9, which loops 0 to 4 are
    assert (int(found.fit_start), int(found.fit_stop)) == (0, 5)
    assert found.rate.item() == pytest.approx(-math.log(2), rel=1e-12) and found.rate_error.item() < 1e-12
    assert found.share() == 1.0


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, math.pi])
def test_a_rotation_does_not_converge(angle: float):
    found = settled(to_end(rotation(angle, 64)))
    assert found.converged.item() == 0.0
    assert found.loop.isnan() and found.rate.isnan() and found.rate_error.isnan()
    assert (int(found.fit_start), int(found.fit_stop)) == (0, 0)


def test_a_drift_does_not_converge_though_it_ends_at_its_end():
    states = torch.arange(1, 129, dtype=torch.float64)[:, None] * torch.ones(3, dtype=torch.float64)
    distances = to_end(states)
    assert distances[-2] <= 1e-2  # near, for a moment
    found = settled(distances)
    assert found.converged.item() == 0.0 and found.loop.isnan() and found.rate.isnan()


def test_too_slow_a_contraction_has_no_rate():
    found = settled(to_end(iterate(0.99 * torch.eye(1), torch.ones(1), 64)))
    assert found.converged.item() == 0.0 and found.rate.isnan()


def test_rounding_noise_and_a_transient_do_not_bend_the_rate():
    noise = 3e-7 * (1 + torch.rand(128))
    distances = (1.0 * 0.7 ** torch.arange(128) + noise).float()
    distances[:8] = distances[8]  # flat before it becomes geometric
    distances[-1] = 0
    found = settled(distances)
    assert found.rate.dtype == torch.float32
    assert abs(found.rate.item() - math.log(0.7)) < 3 * found.rate_error.item() + 0.005
    assert int(found.fit_stop) < 40


# The rate's error.


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.8, 0.9, 0.94])
@pytest.mark.parametrize("loops", [32, 64, 128])
def test_the_error_covers_that_the_end_is_not_the_fixed_point(rate: float, loops: int):
    """x_t = r^t v, so the distance to x_T is r^t − r^T, and the line's bias is known."""
    t = torch.arange(loops, dtype=torch.float64)
    distances = rate**t - rate ** (loops - 1)
    found = settled(distances)
    if found.rate.isnan():
        assert rate ** (0.75 * loops) > 1e-3  # too slow for so few loops
        return
    start, stop = int(found.fit_start), int(found.fit_stop)
    weights = t[start:stop] - t[start:stop].mean()
    weights /= weights.square().sum()
    left = rate ** (loops - 1 - t[start:stop])
    bias = float(weights @ torch.log1p(-left))
    assert found.rate.item() == pytest.approx(math.log(rate) + bias, abs=1e-12)
    assert abs(bias) <= found.rate_error.item() < 0.5 * -math.log(rate)
    turned = float(weights.abs() @ -torch.log1p(-(found.rate * (loops - 1 - t[start:stop])).exp()))
    assert turned <= (1 + 1e-9) * found.rate_error.item()
    offset = distances.clone()
    offset[-1] = 1e-300  # as of a fixed point that is known: then nothing is left over at the end
    assert settled(offset).rate_error.item() ** 2 == pytest.approx(found.rate_error.item() ** 2 - turned**2)


def contraction(kind: str, rate: float, dim: int) -> torch.Tensor:
    """A random matrix with spectral radius `rate`."""
    if kind == "normal":
        matrix = torch.randn(dim, dim, dtype=torch.float64)
        return matrix * rate / torch.linalg.eigvals(matrix).abs().max()
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    if kind == "rotation":
        return rate * basis
    low = {"shrinking": 0.0, "swinging": -rate, "alone": -rate / 2}[kind]
    values = low + (rate / 2 - low if kind == "alone" else rate - low) * torch.rand(dim, dtype=torch.float64)
    values[0] = rate
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rotation", "alone", "shrinking", "swinging", "normal"])
def test_two_errors_cover_the_rate(kind: str, dtype: torch.dtype):
    within, asked = [], 0
    cases = itertools.product((0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), (32, 64, 128), (1, 2, 8, 64), range(4))
    for rate, loops, dim, _ in cases:
        matrix, offset = contraction(kind, rate, dim), torch.randn(dim, dtype=torch.float64)
        found = settled(to_end(iterate(matrix, offset, loops).to(dtype)))
        asked += 1
        if not found.rate.isnan():
            within.append(abs(found.rate.item() - math.log(rate)) <= 2 * found.rate_error.item())
    assert len(within) > 0.6 * asked and sum(within) >= 0.9 * len(within)


@pytest.mark.parametrize("kind", ["shrinking", "swinging", "normal"])
def test_two_errors_cover_the_rate_of_wide_random_maps(kind: str):
    """In which many components are nearly as slow as the slowest."""
    within = []
    for rate, loops, _ in itertools.product((0.5, 0.6, 0.7, 0.8, 0.9), (32, 64, 128), range(8)):
        matrix, offset = contraction(kind, rate, 64), torch.randn(64, dtype=torch.float64)
        found = settled(to_end(iterate(matrix, offset, loops)))
        if not found.rate.isnan():
            within.append(abs(found.rate.item() - math.log(rate)) <= 2 * found.rate_error.item())
    assert len(within) > 70 and sum(within) >= 0.9 * len(within)


def test_the_error_of_scatter_is_the_slopes():
    """Not the intercept's, which is many times as large where the fitted loops are far from loop 0."""
    t = torch.arange(256, dtype=torch.float64)
    distances = torch.exp(-0.1 * t + 0.2 * torch.randn(256, dtype=torch.float64))
    found = settled(distances)
    start, stop = int(found.fit_start), int(found.fit_stop)
    x, y = t[start:stop] - t[start:stop].mean(), distances[start:stop].log()
    rest = y - y.mean() - (x @ y) / x.square().sum() * x
    error = float((rest.square().sum() / (len(x) - 2) / x.square().sum()).sqrt())
    assert found.rate_error.item() == pytest.approx(error, rel=1e-6)
    assert abs(found.rate.item() + 0.1) < 3 * error


def test_a_rate_that_is_all_error_is_none():
    t = torch.arange(64, dtype=torch.float64)
    distances = torch.exp(-0.001 * t) + 0.5 * (-1.0) ** t
    distances[40:] = 0
    assert settled(distances).rate.isnan() and settled(distances).rate_error.isnan()


@pytest.mark.parametrize(("held", "verdict"), [(3, 0.0), (4, 1.0)])
def test_the_tolerance_must_hold_for_a_share_of_the_loops(held: int, verdict: float):
    distances = torch.tensor([1.0] * (16 - held) + [1e-3] * held)
    found = settled(distances, hold=0.25)
    assert found.converged.item() == verdict
    assert found.loop.item() == 16 - held if verdict else found.loop.isnan()


def test_two_loops_can_be_judged_but_not_fitted():
    found = settled(torch.tensor([[0.5, 1e-3], [0.0, 0.0]]))
    assert found.converged.tolist() == [0.0, 1.0] and found.rate.isnan().all()


def test_series_are_judged_one_by_one():
    loops = torch.arange(64, dtype=torch.float64)
    series = torch.stack((0.5**loops, 0.8**loops, torch.ones_like(loops), torch.full_like(loops, float("nan"))), 1)
    found = settled(series.reshape(64, 2, 2), axes=("layer", "token"))
    assert found.converged.shape == (2, 2)
    for i in range(3):
        alone = settled(series[:, i])
        for name in ("converged", "loop", "rate", "rate_error"):
            assert torch.equal(getattr(found, name).flatten()[i].nan_to_num(-9), getattr(alone, name).nan_to_num(-9))
    for name in ("converged", "loop", "rate", "rate_error"):
        assert getattr(found, name)[1, 1].isnan()
    assert found.share() == pytest.approx(2 / 3)
    table = found.to_dataframe()
    assert table["verdict"].tolist() == ["converged", "converged", "did not converge", "undefined"]
    assert table[["layer", "token"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda d: d[:1], {}, "distances has 1 loops, but this needs at least two"),
        (lambda d: -d, {}, "distances must not be below zero, got -"),
        (lambda d: d / 0, {}, r"distances is infinite at loop 0, series \(0,\)"),
        (lambda d: torch.where(torch.arange(8)[:, None] == 3, float("nan"), d), {}, r"NaN at loop 3, series \(0,\)"),
        (lambda d: d, {"tolerance": 0}, "tolerance must be a finite number above 0, got 0"),
        (lambda d: d, {"tolerance": math.nan}, "tolerance must be a finite number above 0"),
        (lambda d: d, {"hold": 1.5}, "hold must be a number above 0 and at most 1, got 1.5"),
        (lambda d: d, {"axes": ("token", "token")}, "axes must name the 1 axes behind the loop"),
    ],
)
def test_bad_input(change: Any, options: dict[str, Any], message: str, as_a_user: None):
    with pytest.raises(InputError, match=message):
        settled(change(torch.rand(8, 2) + 0.1), **options)


# On models.

PROMPTS = [[2, 5, 7], [3, 4, 9, 11, 6], [8, 1, 7]]


@pytest.mark.parametrize("family", helpers.TINY)
def test_a_model_against_its_full_cache(family: str):
    model = helpers.tiny(family)
    found = convergence(model, PROMPTS, 12, tolerance=0.1, progress=False)
    assert found.axes == ("layer", "token") and found.distances.shape == (12, 2, 11)
    assert found.places["prompt"].tolist() == [0] * 3 + [1] * 5 + [2] * 3
    assert found.places["pos"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]
    column = 0
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([prompt]), 12)
        for pos in range(len(prompt)):
            for layer in range(2):
                states = cache.stack("resid_post", layer)[:, 0, pos].double()
                expected = [float((x - states[-1]).norm() / states[-1].norm()) for x in states]
                assert found.distances[:, layer, column].tolist() == pytest.approx(expected, abs=1e-5)
                alone = settled(found.distances[:, layer, column], 0.1)
                assert found.converged[layer, column] == alone.converged
            column += 1


def test_a_model_that_settles_and_one_that_does_not():
    settling = helpers.make(torch.float64, **helpers.TINY["llama"])
    with torch.no_grad():
        settling.transformer.injection.weight[:, : settling.cfg.d_model] *= 0.05
    found = convergence(settling, PROMPTS, 64, progress=False)
    assert found.share() == 1.0 and bool((found.rate < -0.5).all())
    growing = helpers.make(torch.float64, norm_placement="pre")  # no injection, no norm on the stream
    found = convergence(growing, PROMPTS, 24, tolerance=1e-3, progress=False)
    assert found.share() == 0.0 and bool(found.loop.isnan().all())


def test_a_collection_gives_the_same():
    model = helpers.tiny("olmo2")
    observed = observe(model, PROMPTS, 8, measures=[DISTANCE, STEP], per_token=["distance"], seed=3, progress=False)
    one, two = convergence_of(observed), convergence(model, PROMPTS, 8, seed=3, progress=False)
    assert torch.equal(one.distances, two.distances) and torch.equal(one.converged, two.converged)
    assert two.made_by["n_loops"] == 8 and two.made_by["initial_state"] == "seed 3"
    with pytest.raises(InputError, match=r"'step' was not kept for every token, but \['distance'\]: pass per_token"):
        convergence_of(observed, name="step")
    assert convergence_of(observed, tolerance=1e9).loop.eq(0).all()


def test_a_model_must_have_loops_to_compare(as_a_user: None):
    model: Any = helpers.tiny("llama")
    with pytest.raises(InputError, match="n_loops must be at least 2, got 1"):
        convergence(model, PROMPTS, 1)
    with pytest.raises(InputError, match="tolerance must be a finite number above 0"):
        convergence(model, PROMPTS, tolerance=-1)
    with pytest.raises(InputError, match="needs a LoopedModel, got str"):
        convergence("model", PROMPTS)  # pyright: ignore[reportArgumentType]


def test_states_that_blow_up_are_named():
    model = helpers.make(norm_placement="pre")
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight.mul_(1e39)
    with pytest.raises(InputError, match=r"prompt 0: activations are not finite, from 'blocks.*layer 1, loop 0"):
        convergence(model, [[1, 2, 3]], 8, progress=False)


def test_kept_in_a_file(tmp_path: Path):
    found = convergence(helpers.tiny("huginn"), PROMPTS[:1], 8, progress=False)
    again = Convergence.load(found.save(tmp_path / "convergence"))
    assert again.to_dataframe().equals(found.to_dataframe()) and again.made_by == found.made_by


@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_the_figure_shows_every_layer_and_the_tolerance(family: str):
    found = convergence(helpers.tiny(family), PROMPTS, 8, tolerance=0.05, progress=False)
    fig = found.plot()
    lines = [trace for trace in fig.data if trace.mode == "lines+markers"]
    median = found.distances.nanquantile(0.5, dim=2)
    for layer, trace in enumerate(lines):
        assert trace.name == f"layer {layer}: {int(found.converged[layer].sum())} of 11 converged"
        assert trace.y[-1] is None  # zero has no place on a logarithmic axis
        assert list(trace.y[:-1]) == pytest.approx(median[:-1, layer].tolist(), rel=1e-4)
    assert [shape.y0 for shape in fig.layout.shapes] == [0.05]
    assert "distance" in fig.layout.yaxis.title.text and fig.layout.xaxis.title.text == "loop"


def test_a_figure_of_plain_series():
    distances = 0.5 ** torch.arange(8.0)
    assert len(settled(distances).plot().data) == 1
    with pytest.raises(InputError, match="distances has no value above zero, so there is nothing to draw"):
        settled(torch.zeros(4, 2)).plot()
