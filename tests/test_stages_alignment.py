"""A loop's curve against a feedforward model's: resampling, correlation and both nulls by hand."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_looped.engine.errors import InputError
from tl_looped.stages import CurveAlignment, align_curves
from tl_looped.stages.alignment import resample

NAN = float("nan")
REFERENCE = torch.tensor([0.0, 1.0, 4.0, 2.0, 2.5, 5.0], dtype=torch.float64)
CURVE = torch.tensor([0.5, 3.0, 1.0, 4.0], dtype=torch.float64)


def slow_resample(values: list[float], n_points: int) -> list[float]:
    found = []
    for i in range(n_points):
        place = i / (n_points - 1) * (len(values) - 1)
        left = min(int(place), len(values) - 2)
        found.append(values[left] + (place - left) * (values[left + 1] - values[left]))
    return found


def slow_correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    together = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return together / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def slow_alignment(curve: list[float], reference: list[float], n_points: int) -> float:
    return slow_correlation(slow_resample(curve, n_points), slow_resample(reference, n_points))


def test_resampling_by_hand():
    assert resample(torch.tensor([0.0, 1.0, 0.0]), 5).tolist() == [0, 0.5, 1, 0.5, 0]
    assert resample(CURVE, 4).tolist() == pytest.approx(CURVE.tolist())
    assert resample(CURVE).tolist() == pytest.approx(slow_resample(CURVE.tolist(), 101))
    assert resample(torch.arange(7.0), 3).tolist() == [0, 3, 6]


@pytest.mark.parametrize("n_points", [4, 101])
def test_correlation_and_nulls_by_hand(n_points: int):
    result = align_curves(CURVE, REFERENCE, n_points=n_points)
    values, against = CURVE.tolist(), REFERENCE.tolist()
    own = slow_alignment(values, against, n_points)
    assert result.correlation == pytest.approx(own)
    shifts = [slow_alignment(values[-s:] + values[:-s], against, n_points) for s in range(4)]
    assert result.shifts.tolist() == pytest.approx(shifts)
    assert result.p_shift == sum(r >= own - 1e-12 for r in shifts) / 4
    orders = [slow_alignment(list(order), against, n_points) for order in itertools.permutations(values)]
    assert result.permutations.tolist() == pytest.approx(orders)  # all 24: no draw
    assert result.p_permutation == sum(r >= own - 1e-12 for r in orders) / 24


def test_the_same_shape_at_another_depth():
    reference = resample(CURVE, 10)
    result = align_curves(100 * CURVE + 3, reference)
    assert result.correlation > 0.99 and result.p_shift == 1 / 4 and result.p_permutation == 1 / 24
    assert align_curves(-CURVE, CURVE).correlation == pytest.approx(-1)
    assert align_curves(-CURVE, CURVE).p_permutation == 1


def test_permutations_of_many_layers_are_drawn_from_the_seed():
    curve, reference = torch.randn(9, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    one, same = (align_curves(curve, reference, n_permutations=200, seed=3) for _ in range(2))
    other = align_curves(curve, reference, n_permutations=200, seed=4)
    assert torch.equal(one.permutations, same.permutations) and not torch.equal(one.permutations, other.permutations)
    assert len(one.permutations) == 200 and len(one.shifts) == 9
    extreme = int((one.permutations >= one.correlation - 1e-12).sum())
    assert one.p_permutation == (1 + extreme) / 201
    least = align_curves(torch.arange(9.0), torch.arange(9.0), n_permutations=99)
    assert least.p_permutation == 1 / 100  # never zero


def test_p_values_of_unrelated_curves_are_spread_evenly():
    generator = torch.Generator().manual_seed(1)
    drawn = [
        align_curves(*torch.randn(2, 6, generator=generator, dtype=torch.float64), n_permutations=720)
        for _ in range(200)
    ]
    for name in ("p_permutation", "p_shift"):
        values = sorted(getattr(one, name) for one in drawn)
        below = [sum(value <= level for value in values) / 200 for level in (1 / 6, 1 / 2, 5 / 6)]
        assert below == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.1)


@pytest.mark.parametrize("constant", ["curve", "reference"])
def test_constant_curves_have_no_correlation(constant: str):
    curves = {"curve": CURVE, "reference": REFERENCE, constant: torch.full((5,), 0.1, dtype=torch.float64)}
    result = align_curves(**curves)
    assert math.isnan(result.correlation) and math.isnan(result.p_shift) and math.isnan(result.p_permutation)


def test_every_loop_of_a_run():
    values = torch.randn(3, 4, dtype=torch.float64)
    result = align_curves(values, REFERENCE)
    for t in range(3):
        one = align_curves(values[t], REFERENCE)
        row = result.to_dataframe().iloc[t]
        assert row["loop"] == t and row["correlation"] == one.correlation
        assert row["p_shift"] == one.p_shift and row["p_permutation"] == one.p_permutation


def test_a_loop_without_values_has_no_alignment(tmp_path: Path):
    values = torch.arange(9.0).reshape(3, 3)
    values[0, 0] = NAN
    result = align_curves(values, REFERENCE)
    assert result.correlation.isnan().tolist() == [True, False, False] == result.p_shift.isnan().tolist()
    line = result.plot().data[0]
    assert line.y[0] is None and line.y[2] == pytest.approx(float(result.correlation[2]), rel=1e-4)
    loaded = CurveAlignment.load(result.save(tmp_path / "loops"))
    assert torch.equal(loaded.p_permutation[1:], result.p_permutation[1:])


def test_table_figure_and_file(tmp_path: Path):
    result = align_curves(CURVE, REFERENCE)
    assert result.to_dataframe().iloc[0].to_dict() == {
        "loop": 0,
        "correlation": result.correlation,
        "p_shift": result.p_shift,
        "p_permutation": result.p_permutation,
        "n_permutations": 24,
    }
    one, other = result.plot().data
    assert list(one.x) == pytest.approx([0, 1 / 3, 2 / 3, 1]) and len(other.x) == 6
    expected = (CURVE - CURVE.mean()) / CURVE.std(correction=0)
    assert list(one.y) == pytest.approx(expected.tolist(), rel=1e-4)
    assert list(one.customdata) == CURVE.tolist()
    loaded = CurveAlignment.load(result.save(tmp_path / "aligned"))
    assert loaded.p_shift == result.p_shift and torch.equal(loaded.shifts, result.shifts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align_curves(CURVE[:2], REFERENCE), r"curve must hold.*three layers or more, got shape \(2,\)"),
        (lambda: align_curves(CURVE, REFERENCE[:1]), r"reference must hold.*three layers or more"),
        (lambda: align_curves(CURVE, torch.tensor([1.0, NAN, 2.0])), "reference is nan at layer 1"),
        (lambda: resample(CURVE, 1), "n_points must be at least 2"),
        (lambda: align_curves(CURVE, REFERENCE, n_permutations=0), "n_permutations must be at least 1"),
        (lambda: align_curves(CURVE, REFERENCE, seed=-1), "seed must be at least 0"),
        (lambda: align_curves(torch.ones(2, 3, 4), REFERENCE), r"curve must hold.*got shape \(3, 4\)"),
        (lambda: align_curves(torch.full((2, 3), NAN), REFERENCE), "no loop has a finite value in all of its layers"),
        (lambda: align_curves(torch.ones(2, 3), REFERENCE).plot(), "correlation.* has no finite value"),
    ],
)
def test_what_is_refused(call: Any, message: str):
    with pytest.raises(InputError, match=message):
        call()
