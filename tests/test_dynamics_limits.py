"""Limit behaviour on constructed trajectories of each kind, shares, co-occurrence, and on models."""

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics import (
    COSINE_TO_END,
    LimitBehaviour,
    LimitRule,
    limit_behaviour,
    limits_of,
)
from tl_looped.dynamics.limits import BEHAVIOURS, classify_limits, limit_shares
from tl_looped.dynamics.measures import cosine_to
from tl_looped.observe import observe

FIXED, ORBIT, SLIDER, UNKNOWN = range(4)


def to_end(states: torch.Tensor) -> torch.Tensor:
    return cosine_to(states, states[-1:].expand_as(states))


def judge(states: torch.Tensor, **rule: float) -> tuple[int, float, float]:
    label, period, amplitude = classify_limits(to_end(states), LimitRule(**rule))
    return int(label), float(period), float(amplitude)


def times(loops: int) -> torch.Tensor:
    return torch.arange(loops, dtype=torch.float64)[:, None]


def contraction(rate: float, loops: int) -> torch.Tensor:
    return torch.randn(8, dtype=torch.float64) + 3 * torch.randn(8, dtype=torch.float64) * rate ** times(loops)


def rotation(period: float, loops: int, radius: float = 1.0) -> torch.Tensor:
    """A turn in a plane around a point at distance one from the origin, off that plane."""
    angle = 2 * math.pi * times(loops) / period + 0.3
    return torch.cat((radius * angle.cos(), radius * angle.sin(), torch.ones_like(angle)), dim=1)


def line(speed: float, loops: int) -> torch.Tensor:
    return torch.cat((torch.ones_like(times(loops)), speed * times(loops)), dim=1)


LOOPS = pytest.mark.parametrize("loops", [32, 128])


@LOOPS
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, -0.7])
def test_a_contraction_is_a_fixed_point(rate: float, loops: int):
    label, period, amplitude = judge(contraction(rate, loops))
    assert label == FIXED and math.isnan(period) and math.isnan(amplitude)


@LOOPS
@pytest.mark.parametrize("period", [2, 2.5, 3, math.pi, 4, 5, 5.4, 7.3, 8, 10.9])
@pytest.mark.parametrize("radius", [0.5, 1.0, 5.0])
def test_a_rotation_is_an_orbit_of_its_period(period: float, radius: float, loops: int):
    label, found, amplitude = judge(rotation(period, loops, radius))
    assert label == ORBIT
    assert found == pytest.approx(period, rel=3e-3)
    # cosines of two points at an angle φ: (1 + r² cos φ) / (1 + r²), over the loops of the window but the last
    start = math.ceil(loops / 4)
    turns = [2 * math.pi * (loops - 1 - t) / period for t in range(start, loops - 1)]
    cosines = [(1 + radius**2 * math.cos(turn)) / (1 + radius**2) for turn in turns]
    assert amplitude == pytest.approx((max(cosines) - min(cosines)) / 2, abs=1e-9)


@LOOPS
@pytest.mark.parametrize("length", [2, 3, 5, 7])
def test_states_visited_in_turn_are_an_orbit(length: int, loops: int):
    stops = torch.randn(length, 16, dtype=torch.float64)
    label, period, _ = judge(stops[torch.arange(loops) % length])
    assert label == ORBIT and period == pytest.approx(length, rel=5e-3)


@LOOPS
def test_noise_does_not_hide_an_orbit(loops: int):
    states = rotation(6, loops) + 0.02 * torch.randn(loops, 3, dtype=torch.float64)
    label, period, _ = judge(states)
    assert label == ORBIT and period == pytest.approx(6, rel=0.02)


@LOOPS
def test_steady_drifts_are_sliders(loops: int):
    assert judge(line(1 / 32, loops))[0] == SLIDER
    turn = 0.02 * times(loops)
    assert judge(torch.cat((turn.cos(), turn.sin()), dim=1))[0] == SLIDER
    assert judge(rotation(4.5 * loops, loops, 5.0))[0] == SLIDER  # of which the window shows a sixth


def test_a_slider_goes_on_over_the_last_quarter():
    """One that stops there has moved over the last half, but no longer does."""
    loops = 32
    for stops, label in ((6, UNKNOWN), (3, SLIDER)):  # of the window's 23 steps, the last quarter is 6
        speed = torch.full((loops - 1,), 0.1, dtype=torch.float64)
        speed[-stops:] = 0.002
        left = torch.cat((speed.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
        assert classify_limits(left.cos())[0].item() == label


@LOOPS
def test_a_direction_that_comes_to_rest_is_a_fixed_point_though_the_state_grows(loops: int):
    assert judge(line(1.0, loops))[0] == FIXED
    assert judge((1 + times(loops)) * torch.ones(1, 4, dtype=torch.float64))[0] == FIXED


@LOOPS
def test_noise_is_unknown(loops: int):
    states = torch.randn(loops, 300, 8, dtype=torch.float64) + 0.5
    labels, period, _ = classify_limits(to_end(states))
    assert (labels == UNKNOWN).double().mean() > 0.98
    assert period[labels != ORBIT].isnan().all()


def test_an_orbit_that_grows_smaller_is_no_orbit():
    spiral = torch.cat((0.97 ** times(128) * 5 * rotation(9, 128)[:, :2], torch.ones_like(times(128))), dim=1)
    assert judge(spiral)[0] == UNKNOWN


def test_too_long_an_orbit_is_unknown_and_more_loops_tell():
    assert judge(rotation(30, 32))[0] != ORBIT
    label, period, _ = judge(rotation(30, 128))
    assert label == ORBIT and period == pytest.approx(30, rel=5e-3)


def test_thresholds_can_be_set():
    small = rotation(8, 128, 0.1)  # cosines reach 1 - 2 * 0.01 / 1.01
    assert judge(small)[0] == FIXED
    assert judge(small, threshold=0.005)[0] == ORBIT
    late = contraction(0.9, 128)
    assert judge(late, threshold=1e-3, share=1.0, transient=0.1)[0] != FIXED
    assert judge(late, threshold=1e-3, share=0.5, transient=0.1)[0] == FIXED
    noisy = rotation(6, 128) + 0.3 * torch.randn(128, 3, dtype=torch.float64)
    assert judge(noisy, fit=0.99)[0] == UNKNOWN and judge(noisy, fit=0.3)[0] == ORBIT
    wavering = line(1 / 32, 32) + 0.02 * torch.randn(32, 2, dtype=torch.float64)
    assert judge(wavering, steady=1.0)[0] == UNKNOWN and judge(wavering, steady=0.5)[0] == SLIDER
    assert judge(line(1 / 32, 128), pace=1.0)[0] == UNKNOWN


def test_the_fixed_point_rule_by_hand():
    cosines = torch.rand(20, 200) * 0.12 + 0.88
    cosines[-1] = 1
    labels, _, _ = classify_limits(cosines, LimitRule(threshold=0.1, share=0.8))
    for i in range(200):
        near = [1 - c <= 0.1 for c in cosines[5:19, i].double().tolist()]  # the first quarter and the last are left out
        assert (labels[i] == FIXED) == (sum(near) / len(near) >= 0.8)
    assert 0 < int((labels == FIXED).sum()) < 200


def plain_fit(c: np.ndarray, frequency: float) -> float:
    """Adjusted R² of a constant and the harmonics that `LimitRule` names, by least squares."""
    w, t = len(c), np.arange(len(c))
    columns = [np.ones(w)]
    for h in range(1, min(3, int((w / 3 - 1) / 2), int(0.5 / frequency + 1e-9)) + 1):
        columns += [np.cos(2 * np.pi * h * frequency * t), np.sin(2 * np.pi * h * frequency * t)]
    matrix = np.stack(columns, axis=1)
    rest = c - matrix @ np.linalg.lstsq(matrix, c, rcond=1e-6)[0]
    parameters = np.linalg.matrix_rank(matrix, tol=1e-6) - 1
    return 1 - (rest @ rest / (w - 1 - parameters)) / (np.var(c) * w / (w - 1))


@pytest.mark.parametrize("seed", range(4))
def test_an_orbits_fit_against_plain_least_squares(seed: int):
    states = rotation(6, 32) + 0.3 * helpers.noise_like(torch.zeros(32, 3, dtype=torch.float64), seed)
    window = to_end(states)[8:-1].numpy()
    w = len(window)
    tried = np.linspace(2 / w, 0.5, round(10 * w * (0.5 - 2 / w)) + 1)
    fits = [plain_fit(window, frequency) for frequency in tried]
    padded = [*fits, fits[-2]]  # two loops, the shortest period, may be a peak; half the window may not
    peaks = [i for i in range(1, len(fits)) if fits[i] >= max(padded[i - 1], padded[i + 1])]
    best = max(peaks, key=fits.__getitem__)
    label, period, _ = judge(states, fit=fits[best] - 1e-6)
    assert label == ORBIT and abs(1 / period - tried[best]) <= 0.5 * (tried[1] - tried[0]) + 1e-12
    assert judge(states, fit=fits[best] + 1e-6)[0] != ORBIT


def test_series_are_judged_one_by_one_on_any_axes():
    kinds = [contraction(0.5, 64)[:, :3], rotation(7, 64), torch.nn.functional.pad(line(1 / 64, 64), (0, 1))]
    cosines = torch.stack([to_end(states) for states in kinds], dim=1)
    labels, period, _ = classify_limits(cosines)
    assert labels.tolist() == [FIXED, ORBIT, SLIDER]
    nan = torch.full_like(cosines[:, :1], float("nan"))
    again, _, _ = classify_limits(torch.cat((cosines, nan), dim=1).reshape(64, 2, 2).float())
    assert again.tolist() == [[FIXED, ORBIT], [SLIDER, -1]]
    assert classify_limits(cosines[:, 1])[1] == period[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[-15:], "cosines has 15 loops, but this needs at least 16: pass a larger n_loops"),
        (lambda c: c * 2, r"cosines must lie in \[-1, 1\] and be 1 at the last loop, got .* to 2 and 2 at the last"),
        (lambda c: c.flip(0), "and be 1 at the last loop"),
        (lambda c: torch.where(torch.arange(32)[:, None] == 4, float("nan"), c), "NaN at loop 4"),
    ],
)
def test_bad_cosines(change: Any, message: str):
    cosines = to_end(contraction(0.9, 32))[:, None]
    with pytest.raises(InputError, match=message):
        classify_limits(change(cosines))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"threshold": 0.0}, "threshold must be a number above 0 and below 2, got 0.0"),
        ({"share": 1.1}, "share must be a number above 0 and at most 1, got 1.1"),
        ({"transient": 0.6}, "transient must be a number above 0 and at most 0.5, got 0.6"),
        ({"fit": 1.0}, "fit must be a number above 0 and below 1, got 1.0"),
        ({"steady": -1.0}, "steady must be a number above 0"),
        ({"pace": math.nan}, "pace must be a number above 0"),
    ],
)
def test_thresholds_out_of_range(rule: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        LimitRule(**rule)


# Labels.


def labelled(labels: list[list[int]], prompts: list[int]) -> LimitBehaviour:
    found = torch.tensor(labels)
    nan = torch.full(found.shape, float("nan"))
    return LimitBehaviour({}, nan[None], {"prompt": torch.tensor(prompts)}, found, nan, nan)


def test_shares_of_labels():
    labels = torch.tensor([[0, 0, 1], [3, 0, -1]])
    assert limit_shares(labels).tolist() == [3 / 5, 1 / 5, 0, 1 / 5]
    assert limit_shares(torch.tensor([-1])).isnan().all()
    found = labelled([[0, 0, 1, 0, 0, -1]], [0, 0, 0, 1, 1, 2])
    assert list(found.prompt_shares().values()) == [1.0, 0.5, 0.0, 0.0]
    assert all(map(math.isnan, labelled([[-1]], [0]).prompt_shares().values()))


def test_co_occurrence_by_hand():
    labels = torch.randint(-1, 4, (3, 50))
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for token in range(50):
        for first, second in permutations(range(3), 2):
            a, b = int(labels[first, token]), int(labels[second, token])
            if a >= 0 and b >= 0:
                counts[a, b] += 1
    found = labelled(labels.tolist(), [0] * 50).co_occurrence()
    assert list(found.index) == list(found.columns) == list(BEHAVIOURS)
    assert found.to_numpy() == pytest.approx((counts / counts.sum()).numpy())
    assert np.array_equal(labelled([[0, 1], [0, 1]], [0, 0]).co_occurrence(), np.diag([0.5, 0.5, 0, 0]))
    assert labelled([[0, -1], [-1, 1]], [0, 0]).co_occurrence().isna().all(axis=None)
    with pytest.raises(InputError, match="behaviours of layers are compared, and there is one layer"):
        labelled([[0, 1]], [0, 0]).co_occurrence()


# Models.

PROMPTS = [[2, 5, 7], [3, 4, 9, 11, 6]]


@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_a_model_against_its_full_cache(family: str):
    model = helpers.tiny(family)
    found = limit_behaviour(model, PROMPTS, 16, progress=False)
    column = 0
    for prompt in PROMPTS:
        _, cache = model.run_with_cache(torch.tensor([prompt]), 16)
        cosines = to_end(cache.stack("resid_post")[:, :, 0])
        here = slice(column, column + len(prompt))
        assert torch.allclose(found.cosines[:, :, here], cosines, atol=1e-5)
        column += len(prompt)
    labels, period, amplitude = classify_limits(found.cosines)
    assert torch.equal(labels, found.labels) and torch.equal(period.nan_to_num(-1), found.period.nan_to_num(-1))
    assert found.shares() == dict(zip(BEHAVIOURS, limit_shares(labels[-1]).tolist(), strict=True))
    by_prompt = [bool((labels[0, found.places["prompt"] == prompt] == FIXED).any()) for prompt in (0, 1)]
    assert found.prompt_shares(0)["fixed point"] == sum(by_prompt) / 2
    table = found.to_dataframe().set_index(["layer", "prompt", "pos"])
    assert table.loc[(1, 1, 2), "behaviour"] == BEHAVIOURS[int(labels[1, 5])]
    assert amplitude.isnan().equal(found.amplitude.isnan())


def test_a_model_whose_states_turn():
    """Without injection, and with layers that only rotate, a model is a rotation."""
    model = helpers.make(torch.float64, n_core=2, norm_placement="pre")
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()

    turn = 2 * math.pi / 6.5
    matrix = torch.block_diag(
        *[torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])] * 8
    )

    def rotate(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x @ matrix.T.to(x)

    with model.hooks(fwd_hooks=[("hook_state_pre", rotate)]):
        found = limit_behaviour(model, PROMPTS, 32, progress=False)
    assert found.shares()["orbit"] == 1.0 and found.prompt_shares()["orbit"] == 1.0
    assert found.period.flatten().tolist() == pytest.approx([6.5] * 16, rel=2e-3)
    assert found.co_occurrence().loc["orbit", "orbit"] == 1.0


def test_a_collection_gives_the_same_and_is_kept(tmp_path: Path):
    model = helpers.tiny("olmo2")
    rule = LimitRule(threshold=0.01)
    observed = observe(model, PROMPTS, 16, measures=[COSINE_TO_END], per_token=["cosine_to_end"], progress=False)
    one, two = limits_of(observed, rule=rule), limit_behaviour(model, PROMPTS, 16, rule=rule, progress=False)
    assert torch.equal(one.labels, two.labels) and torch.equal(one.cosines, two.cosines)
    assert one.made_by["rule"]["threshold"] == 0.01
    again = LimitBehaviour.load(one.save(tmp_path / "limits"))
    assert again.to_dataframe().equals(one.to_dataframe())
    with pytest.raises(InputError, match=r"'cosine' was not kept for every token, but \['cosine_to_end'\]"):
        limits_of(observed, name="cosine")
    with pytest.raises(InputError, match="n_loops must be at least 16, got 8"):
        limit_behaviour(model, PROMPTS, 8)
    with pytest.raises(InputError, match="layer 2 is out of range"):
        one.shares(2)


def test_the_figure_counts_every_behaviour():
    cosines = torch.stack([to_end(states) for states in (contraction(0.5, 32)[:, :3], rotation(7, 32))], dim=1)
    labels, period, amplitude = classify_limits(cosines)
    places = {"prompt": torch.tensor([0, 1]), "pos": torch.tensor([2, 0])}
    made_by = {"model": "made up", "rule": {"threshold": 0.05}}
    found = LimitBehaviour(made_by, cosines[:, None], places, labels[None], period[None], amplitude[None])
    fig = found.plot()
    names = {trace.name: trace for trace in fig.data}
    assert list(names) == [
        "fixed point: 1 of 2 tokens",
        "orbit: 1 of 2 tokens",
        "slider: 0 of 2 tokens",
        "unknown: 0 of 2 tokens",
    ]
    orbit = names["orbit: 1 of 2 tokens"]
    assert list(orbit.y) == pytest.approx(cosines[:, 1].tolist(), abs=1e-4)
    assert "prompt 1, position 0" in orbit.hovertemplate
    assert fig.layout.shapes[0].y0 == 0.95
    with pytest.raises(InputError, match="no token has a limit behaviour"):
        LimitBehaviour(made_by, cosines[:, None], places, torch.full((1, 2), -1), period[None], amplitude[None]).plot()
