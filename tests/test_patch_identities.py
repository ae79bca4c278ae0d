"""What patching must do whatever the weights are, on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patching_helpers import (
    CASES,
    CHANGED,
    LAYER_SITES,
    ONCE_SITES,
    SITES,
    case,
    everywhere,
    legal_axes,
    prompts,
    run_clean,
)
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.patching import patch_sweep

# Many small runs: the checks of types at run time would be most of the time. Other tests of sweeps have them on.
pytestmark = pytest.mark.usefixtures("as_a_user")

LOOPS, LENGTH = 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Pair:
    """A model in float64, a clean and a corrupted prompt, and their metrics without patches."""

    def __init__(self, name: str):
        self.model: LoopedModel = case(name, torch.float64)
        self.clean, self.corrupted = prompts(self.model, pos=LENGTH)
        self.metric = everywhere(self.model)
        self.cache = run_clean(self.model, self.clean, LOOPS)
        with torch.no_grad():
            self.clean_value, self.corrupted_value = (
                self.metric(self.model(tokens, LOOPS)) for tokens in (self.clean, self.corrupted)
            )
        self.carried = self.model.cfg.injection != "none"  # whether the prompt reaches every loop by another way

    def sweep(self, site: str, axes: tuple[str, ...], corrupted: Tensor | None = None, **options: Any) -> Tensor:
        tokens = self.corrupted if corrupted is None else corrupted
        options = {"n_loops": LOOPS, "reduce": "none", "progress": False, **options}
        return patch_sweep(
            self.model, tokens, source=self.cache, metric=self.metric, site=site, axes=axes, **options
        ).values

    def restored(self, values: Tensor) -> Tensor:
        """Which cells give the clean value, for all prompts."""
        return (values - self.clean_value).abs().amax(-1) < 1e-8

    def unchanged(self, values: Tensor) -> Tensor:
        """Which cells give the corrupted value, for all prompts."""
        return (values - self.corrupted_value).abs().amax(-1) < 1e-8


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_clean_into_clean_changes_nothing(pair: Pair) -> None:
    for site in SITES:
        axes = ("pos",) if site in ONCE_SITES else ("loop", "layer") if site in LAYER_SITES else ("loop", "pos")
        values = pair.sweep(site, axes, pair.clean)
        torch.testing.assert_close(values, pair.clean_value.expand_as(values), **EXACT)
        values = pair.sweep(site, ("pos",), pair.clean, when="every" if site not in ONCE_SITES else "at")
        torch.testing.assert_close(values, pair.clean_value.expand_as(values), **EXACT)


def test_the_corrupted_prompt_is_really_another(pair: Pair) -> None:
    assert bool(((pair.clean_value - pair.corrupted_value).abs() > 1e-2).all())


@pytest.mark.parametrize("site", ["injection", "resid_pre", "resid_mid", "resid_post", "state_post"])
def test_patching_all_of_the_stream_restores_the_clean_output(pair: Pair, site: str) -> None:
    """In the last loop always, as only the stream goes on; in an earlier loop where nothing is injected later."""
    axes = ("loop", "layer") if site in LAYER_SITES else ("loop",)
    restored = pair.restored(pair.sweep(site, axes))
    assert bool(restored[-1].all())
    assert bool((restored[:-1] == (not pair.carried)).all())
    assert bool(pair.restored(pair.sweep(site, axes, when="from")).all())
    if site in LAYER_SITES:
        assert bool(pair.restored(pair.sweep(site, ("layer",), when="every")).all())


def test_patching_the_state_restores_the_clean_output_where_nothing_is_injected(pair: Pair) -> None:
    for when in ("at", "from"):
        assert bool((pair.restored(pair.sweep("state", ("loop",), when=when)) == (not pair.carried)).all())


def test_patching_the_one_embedding_that_differs_restores_the_clean_output(pair: Pair) -> None:
    restored, unchanged = pair.restored(pair.sweep("embed", ("pos",))), pair.unchanged(pair.sweep("embed", ("pos",)))
    expected = torch.arange(LENGTH) == CHANGED
    assert torch.equal(restored, expected) and torch.equal(unchanged, ~expected)


@pytest.mark.parametrize("name", ["ouro", "ouro-gqa", "bare"])
def test_patching_the_one_state_entering_the_loops_that_differs_restores_the_clean_output(name: str) -> None:
    pair = Pair(name)
    expected = torch.arange(LENGTH) == CHANGED
    for values in (
        pair.sweep("initial_state", ("pos",)),
        pair.sweep("state", ("loop", "pos"))[0],
        pair.sweep("injection", ("loop", "pos"))[0],
        pair.sweep("resid_pre", ("loop", "layer", "pos"))[0, 0],
    ):
        assert torch.equal(pair.restored(values), expected)
        assert torch.equal(pair.unchanged(values), ~expected)


def test_a_drawn_state_is_the_same_for_both_prompts(pair: Pair) -> None:
    if not pair.model.cfg.draws_state and pair.model.cfg.state_init != "zeros":
        pytest.skip("this family starts from the prelude's output")
    assert bool(pair.unchanged(pair.sweep("initial_state", ("pos",))).all())
    assert bool(pair.unchanged(pair.sweep("state", ("loop", "pos"))[0]).all())


@pytest.mark.parametrize("site", [site for site in SITES if "pos" in SITES[site][1]])
def test_positions_before_the_first_difference_have_no_effect(pair: Pair, site: str) -> None:
    has = max(legal_axes(site), key=len)
    axes = ("pos",) + tuple(axis for axis in ("loop", "layer", "head") if axis in has)
    values = pair.sweep(site, axes)
    assert bool(pair.unchanged(values[:CHANGED]).all())
    if site not in ("initial_state",):
        assert not bool(pair.unchanged(values[CHANGED:]).all())


def test_what_happens_in_the_last_loop_of_a_layer_does_not_reach_other_positions() -> None:
    """A head's query is read at its own position: patching it elsewhere changes no other position at the last layer."""
    for name in ("ouro", "bare"):
        pair = Pair(name)
        pair.metric = lambda logits: logits[:, -1, 0]
        pair.corrupted_value = pair.metric(pair.model(pair.corrupted, LOOPS).detach())
        unchanged = pair.unchanged(pair.sweep("q", ("loop", "layer", "pos")))
        assert bool(unchanged[-1, -1, :-1].all()) and not bool(unchanged[-1, -1, -1])
        assert not bool(unchanged[0, 0, CHANGED])
