"""Texts that stand for functions, tensors and weights: equal for the same, different for others."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

import pytest
import torch
from helpers import TINY, make
from torch import Tensor

from tl_looped.engine.errors import InputError
from tl_looped.engine.identity import digest, identity, weights_digest


def above(x: Tensor, threshold: float = 0.5) -> Tensor:
    return (x > threshold).float()


def below(x: Tensor, threshold: float = 0.5) -> Tensor:
    return (x < threshold).float()


def closed(threshold: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: above(x, threshold)


def bodies() -> list[Callable[[Tensor], Tensor]]:
    return [lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, lambda x: x.sum(), lambda x: x.mean()]


def defaulted(value: float) -> Callable[..., Tensor]:
    def measure(x: Tensor, by: float = value, *, and_by: float = 2 * value) -> Tensor:
        return x * by * and_by

    return measure


def inside(value: float) -> Callable[[Tensor], Tensor]:
    return partial(closed(value))


def wrapped(value: float) -> Callable[[Tensor], Tensor]:
    inner = closed(value)

    @wraps(inner)
    def outer(x: Tensor) -> Tensor:
        return inner(x)

    return outer


def test_functions_that_differ_in_anything_they_hold() -> None:
    different = [above, below, torch.mean, torch.Tensor.mean, *bodies()]
    different += [partial(above, threshold=value) for value in (0.1, 0.2)] + [partial(below, threshold=0.1)]
    different += [make_one(value) for make_one in (closed, defaulted) for value in (0.1, 0.2)]
    different += [closed(torch.tensor([1.0])), closed(torch.tensor([2.0])), closed((1, 2)), closed({"a": 1})]
    texts = [identity(one) for one in different]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "make_one", [closed, defaulted, inside, wrapped, lambda value: partial(above, threshold=value)]
)
def test_the_same_function_made_twice(make_one: Callable[[float], Any]) -> None:
    assert identity(make_one(0.1)) == identity(make_one(0.1)) != identity(make_one(0.2))


def test_a_keyword_only_default_counts() -> None:
    def made(value: float) -> Callable[..., Tensor]:
        def measure(x: Tensor, *, by: float = value) -> Tensor:
            return x * by

        return measure

    assert identity(made(0.1)) == identity(made(0.1)) != identity(made(0.2))


def test_what_can_not_be_looked_into_has_its_class() -> None:
    assert identity(closed(object())) == identity(closed(object()))
    assert identity(torch.nn.Linear(2, 2)) == "torch.nn.modules.linear.Linear"

    def recursive(x: Tensor) -> Tensor:
        return recursive(x)

    assert identity(recursive) == identity(recursive)
    assert identity(lru_cache(above)) == identity(above)


def test_digests() -> None:
    x = torch.arange(6.0)
    others = [x.reshape(2, 3), x.double(), x + 1e-6, x[:5], x.flip(0), x.bfloat16(), x.long(), torch.zeros(0)]
    assert len({digest(one) for one in (x, *others)}) == 1 + len(others)
    assert digest(x.reshape(2, 3).T.T) == digest(x.reshape(2, 3)) and digest(x, x) != digest(x)


def test_weights_differ_by_any_number_and_name() -> None:
    model, other = make(**TINY["huginn"]), make(**TINY["huginn"])
    assert weights_digest(model) == weights_digest(other)
    with torch.no_grad():
        other.transformer.blocks[1].mlp.down.weight[3, 7] += 1e-4
    assert weights_digest(model) != weights_digest(other)
    assert weights_digest(model) == weights_digest(make(**TINY["huginn"]))
    assert weights_digest(torch.nn.ModuleDict({"a": torch.nn.Identity()})) == weights_digest(torch.nn.Identity())
    with pytest.raises(InputError, match="the weights of a object can't be read, so no file can be kept for it"):
        weights_digest(object())
