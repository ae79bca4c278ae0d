"""The arithmetic and the checks that all rooms share."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tl_looped import InputError
from tl_looped.engine.checks import check_floats, check_number, undefined_series
from tl_looped.engine.numbers import (
    cosine,
    first_met,
    held_to_end,
    length,
    median,
    met_from,
    quantile,
    ratio,
    unit,
    wide,
)

NAN = math.nan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wide_is_float32_at_least(dtype: torch.dtype) -> None:
    assert wide(torch.ones(2, dtype=dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (1e-42, 1e-30, 1e30)), (torch.float64, (1e-200, 1e200))])
def test_lengths_whose_squares_overflow_or_vanish(dtype: torch.dtype, sizes: tuple[float, ...]) -> None:
    x = torch.tensor([3.0, 4.0], dtype=dtype)
    for size in sizes:
        assert length(size * x).item() == pytest.approx(5 * size, rel=1e-2 if size < 1e-38 else 1e-6, abs=0)
        assert cosine(size * x, x.flip(0)).item() == pytest.approx(0.96, abs=1e-2 if size < 1e-38 else 1e-6)
    rows = torch.stack([x, sizes[0] * x, 0 * x, sizes[-1] * x])
    assert torch.equal(length(rows), torch.stack([length(row) for row in rows]))  # a row does not depend on others
    assert unit(rows)[2].isnan().all() and unit(rows)[0].tolist() == pytest.approx([0.6, 0.8])
    assert length(torch.full((4,), torch.finfo(dtype).max, dtype=dtype)).isnan()
    assert length(torch.tensor([NAN, 1.0], dtype=dtype)).isnan()


def test_a_ratio_to_nothing_is_no_number() -> None:
    assert ratio(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 2.0])).nan_to_num(-1).tolist() == [-1, -1, 1.5]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_the_median_is_the_true_one(n: int) -> None:
    x = torch.randn(3, n, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(2):
            assert median(x, 1)[i, j].item() == pytest.approx(statistics.median(x[i, :, j].tolist()))


def test_quantiles_leave_nan_out() -> None:
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    x[torch.rand(4, 9, 5) < 0.3] = NAN
    x[1, :, 2] = NAN
    for q in (0.0, 0.1, 0.25, 0.5, 1.0):
        expected = x.nanquantile(q, dim=1)
        torch.testing.assert_close(quantile(x, q, 1), expected, equal_nan=True)
        if q == 0.5:
            torch.testing.assert_close(median(x, 1), expected, equal_nan=True)
    assert quantile(torch.tensor([1, 2]).half(), 0.5).dtype == torch.float32
    huge = torch.tensor([3e38, 3e38, math.inf])
    assert median(huge).item() == quantile(huge, 0.5).item() == pytest.approx(3e38)


def test_quantiles_of_more_numbers_than_torch_takes() -> None:
    x = torch.arange(2**24 + 2, dtype=torch.float64).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        x.nanquantile(0.25)
    assert quantile(x, 0.25).item() == (2**24 + 1) / 4 and median(x).item() == (2**24 + 1) / 2


def test_numbers_that_share_memory_have_a_median() -> None:
    x = torch.randn(2, 1, 4).expand(2, 3, 4)
    for found in (median(x, 1), quantile(x, 0.5, 1), quantile(x, 0.2, 1)):
        assert torch.equal(found, x[:, 0])


CONDITIONS = {  # -> loops held to the end, from which on, first
    (True, True, True): (3, 0.0, 0.0),
    (False, True, True): (2, 1.0, 1.0),
    (True, False, True): (1, 2.0, 0.0),
    (True, True, False): (0, NAN, 0.0),
    (False, False, False): (0, NAN, NAN),
}


def test_from_which_loop_on() -> None:
    met = torch.tensor(list(CONDITIONS)).T
    held, since, first = zip(*CONDITIONS.values(), strict=True)
    assert held_to_end(met).tolist() == list(held)
    for found, expected in ((met_from(met), since), (first_met(met), first)):
        np.testing.assert_array_equal(found.numpy(), np.array(expected))
    assert met_from(met[..., None]).shape == (5, 1)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (0, {}, "x must be a finite number above 0, got 0"),
        (NAN, {}, "x must be a finite number above 0, got nan"),
        (math.inf, {"low_too": True}, "x must be a finite number of at least 0, got inf"),
        (True, {}, "x must be a finite number above 0, got True"),
        ("1", {"high": 1.0}, "x must be a number above 0 and below 1, got '1'"),
        (1.0, {"high": 1.0}, "x must be a number above 0 and below 1, got 1.0"),
        (-0.1, {"high": 1.0, "low_too": True, "high_too": True}, "of at least 0 and at most 1, got -0.1"),
        (
            1.5,
            {"high": 1.0, "high_too": True, "mend": "a share"},
            "above 0 and at most 1, got 1.5: a share.$",
        ),
    ],
)
def test_numbers_out_of_range(value: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_number("x", value, **options)


def test_numbers_in_range() -> None:
    assert check_number("x", 1e-300) == 1e-300 and check_number("x", 0, low_too=True) == 0.0
    assert check_number("x", 1, 0.0, 1.0, high_too=True) == 1.0


@pytest.mark.parametrize("values", [[1.0], torch.ones(2, 2), torch.ones(2, 2, 3).long(), torch.ones(2, 0, 3)])
def test_what_are_no_floats_of_three_axes(values: Tensor) -> None:
    with pytest.raises(InputError, match=r"x must be floats \[a, b, c\], not empty, got (list|torch)"):
        check_floats(values, "x", "[a, b, c]", 3)


def test_series_with_and_without_numbers() -> None:
    values = torch.tensor([[1.0, NAN], [2.0, NAN]])
    assert undefined_series(values, "x").tolist() == [False, True]
    values[1, 0] = NAN
    with pytest.raises(InputError, match=r"x is NaN at loop 1, series \(0,\): other loops have a value"):
        undefined_series(values, "x")
    values[1, 0] = -math.inf
    with pytest.raises(InputError, match=r"x is infinite at loop 1, series \(0,\): look for states so large"):
        undefined_series(values, "x")
