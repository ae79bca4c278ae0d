"""How far and where states move: closed forms, the plain sums, and the measures on a model."""

import math
from typing import Any

import helpers
import pytest
import torch

from tl_looped import InputError
from tl_looped.dynamics.measures import (
    COSINE,
    COSINE_TO_END,
    DISTANCE,
    STEP,
    STEP_NORM,
    acceleration,
    cosine_to,
    distance_to,
    step_angle,
    step_change,
    step_norm,
)
from tl_looped.observe import Measure, observe

MEASURES = (STEP, STEP_NORM, COSINE, DISTANCE, COSINE_TO_END)


def plain_norm(x: list[float]) -> float:
    return math.sqrt(math.fsum(a * a for a in x))


def plain_cosine(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / plain_norm(x) / plain_norm(y)


def circle(angle: float, loops: int, radius: float = 1.0) -> torch.Tensor:
    turn = angle * torch.arange(loops, dtype=torch.float64)
    return radius * torch.stack((turn.cos(), turn.sin()), dim=-1)


def over_loops(function: Any, states: torch.Tensor, **options: Any) -> torch.Tensor:
    """A function of three successive states, from loop 2 on."""
    return function(states[2:], states[1:-1], states[:-2], **options)


def test_pairs_against_plain_sums():
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    for place in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        a, b = x[tuple(place)].tolist(), y[tuple(place)].tolist()
        apart = plain_norm([p - q for p, q in zip(a, b, strict=True)])
        expected = {
            step_norm: apart / plain_norm(a),
            distance_to: apart / plain_norm(b),
            cosine_to: plain_cosine(a, b),
        }
        for function, value in expected.items():
            assert function(x, y)[tuple(place)].item() == pytest.approx(value, abs=1e-14)
        for function in (step_norm, distance_to):
            assert function(x, y, relative=False)[tuple(place)].item() == pytest.approx(apart, abs=1e-14)


def test_what_is_divided_by_a_zero_norm_is_undefined():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert step_norm(zero, one).isnan().all() and distance_to(one, zero).isnan().all()
    assert distance_to(zero, one).item() == 1.0
    for function in (step_norm, distance_to):
        assert function(one, zero, relative=False).item() == pytest.approx(math.sqrt(3))
    assert cosine_to(zero, one).isnan().all() and cosine_to(one, zero).isnan().all()


def test_large_states_have_the_numbers_of_small_ones():
    x = torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(5))
    end = x[-1:].expand_as(x)
    for size in (1e20, 1e30):  # squares overflow in float32
        large = size * x
        for function in (step_norm, distance_to, cosine_to):
            torch.testing.assert_close(function(large, size * end), function(x, end))
        for function in (step_angle, acceleration, step_change):
            torch.testing.assert_close(over_loops(function, large), over_loops(function, x))
    beyond = torch.full((1, 8), 3e38)  # finite, but its norm is not in float32
    assert step_norm(beyond, beyond).isnan().all() and cosine_to(beyond, beyond).isnan().all()


def test_half_precision_is_computed_in_float32_and_float64_kept():
    x, y = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    for function in (step_norm, distance_to, cosine_to):
        assert function(x, y).dtype == torch.float32
        assert function(x.double(), y.double()).dtype == torch.float64
        assert torch.allclose(function(x, y).double(), function(x.double(), y.double()), atol=1e-6)
    assert cosine_to(x, x).max() <= 1


def test_a_rotation_turns_by_its_angle_and_keeps_its_step():
    angle, n = 0.7, 9
    states = circle(angle, n, radius=3.0)
    assert torch.allclose(over_loops(step_angle, states), torch.full((n - 2,), angle, dtype=torch.float64))
    chord = 6 * math.sin(angle / 2)
    norms = step_norm(states[1:], states[:-1], relative=False)
    assert torch.allclose(norms, torch.full((n - 1,), chord, dtype=torch.float64))
    assert torch.allclose(step_norm(states[1:], states[:-1]), norms / 3)
    assert over_loops(step_change, states).abs().max() < 1e-14
    turned = torch.full((n - 2,), 2 * chord * math.sin(angle / 2), dtype=torch.float64)  # of steps at that angle
    assert torch.allclose(over_loops(acceleration, states, relative=False), turned)
    assert torch.allclose(over_loops(acceleration, states), turned / 3)


def test_a_straight_line_does_not_turn_and_a_swing_turns_back():
    line = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64) + 1
    assert over_loops(step_angle, line).abs().max() < 1e-12 and over_loops(acceleration, line).abs().max() < 1e-12
    swing = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 3, dtype=torch.float64)
    assert torch.allclose(over_loops(step_angle, swing), torch.full((4,), math.pi, dtype=torch.float64))


def test_a_small_angle_is_not_rounded_away():
    states = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1e-6]])  # its cosine is 1 in float32
    assert over_loops(step_angle, states).item() == pytest.approx(1e-6, rel=1e-3)


def test_shrinking_steps_have_negative_step_changes():
    states = torch.tensor([[4.0], [8.0], [32 / 3], [256 / 21]], dtype=torch.float64)
    steps = step_norm(states[1:], states[:-1])
    assert steps.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8])
    assert over_loops(step_change, states).tolist() == pytest.approx([-1 / 4, -1 / 8])


def test_a_step_of_no_length_has_no_angle():
    states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert over_loops(step_angle, states).isnan().all()


@pytest.mark.parametrize("function", [step_angle, acceleration, step_change])
def test_three_states_must_have_one_shape(function: Any, as_a_user: None):
    with pytest.raises(InputError, match=r"must have the same shape, got \(2, 3\) and \(1, 3\)"):
        function(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 3))


@pytest.mark.parametrize("function", [step_norm, distance_to, cosine_to])
def test_shapes_must_be_the_same(function: Any, as_a_user: None):
    with pytest.raises(InputError, match=r"must have the same shape, got \(2, 3\) and \(1, 3\)"):
        function(torch.ones(2, 3), torch.ones(1, 3))


@pytest.mark.parametrize("family", helpers.TINY)
def test_measures_equal_those_of_a_full_cache(family: str):
    model = helpers.tiny(family)
    tokens = helpers.tokens_for(model, 2, 4)
    found = observe(
        model, tokens, 4, measures=MEASURES, per_token=[measure.name for measure in MEASURES], progress=False
    )
    _, cache = model.run_with_cache(tokens, 4)
    states = cache.stack("resid_post").double()
    schedule = model.cfg.schedule(4)
    for measure in MEASURES:
        for row in range(2):
            kept = found.per_token[measure.name][row]
            assert kept is not None
            for t in range(4):
                for layer in range(2):
                    got = kept[schedule.realised_depth("blocks", layer, t)]
                    expected = by_hand(measure, states[:, layer, row], t)
                    assert torch.allclose(got.double(), expected, atol=1e-5, equal_nan=True), measure.name


def by_hand(measure: Measure, states: torch.Tensor, t: int) -> torch.Tensor:
    """One measure of [loop, pos, d_model] at loop t, a token at a time."""
    values = []
    for pos in range(states.shape[1]):
        if measure.compare == "previous" and t == 0:
            values.append(float("nan"))
            continue
        x = states[t, pos].tolist()
        other = states[t - 1 if measure.compare == "previous" else -1, pos].tolist()
        apart = plain_norm([a - b for a, b in zip(x, other, strict=True)])
        values.append(
            {
                "step": apart / plain_norm(x),
                "step_norm": apart,
                "cosine": plain_cosine(x, other),
                "distance": apart / plain_norm(other),
                "cosine_to_end": plain_cosine(x, other),
            }[measure.name]
        )
    return torch.tensor(values, dtype=torch.float64)
