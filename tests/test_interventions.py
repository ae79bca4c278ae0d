"""Freezing attention, skipping a loop or a layer, injecting another prompt: against runs put together by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, hook_count, make, noise_like, tiny
from patching_helpers import CASES, case, prompts, run_clean
from plain import Plain, weights_of
from torch import Tensor

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.patching import freeze_patterns, replace_injection, skip_layer, skip_loop

LOOPS, LENGTH = 3, 4
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def tokens_of(model: LoopedModel) -> Tensor:
    return prompts(model, pos=LENGTH)[0]


@torch.no_grad()
def run(model: LoopedModel, hooks: Any, tokens: Tensor | None = None, n_loops: int = LOOPS, **options: Any) -> Tensor:
    tokens = tokens_of(model) if tokens is None else tokens
    logits = model.run_with_hooks(tokens, n_loops, fwd_hooks=hooks, **options)
    assert hook_count(model) == 0
    return logits


class Frozen:
    """A `see` for tests/plain.py: the patterns of one loop take the place of those of all later loops."""

    def __init__(self, loop: int, layers: list[int]):
        self.loop, self.layers = loop, layers
        self.kept: dict[int, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        parts = name.split(".")
        if not name.startswith("blocks") or not name.endswith("hook_pattern") or int(parts[1]) not in self.layers:
            return value
        layer, loop = int(parts[1]), int(parts[3])
        if loop == self.loop:
            self.kept[layer] = value
        return self.kept[layer] if loop > self.loop else value


@torch.no_grad()
def plain(model: LoopedModel, see: Any = lambda name, value: value) -> Tensor:
    """The logits of the slow transformer of tests/plain.py."""
    tokens = tokens_of(model)
    state = model.batch(tokens, LOOPS).state
    return Plain(model.cfg, weights_of(model), see).run(tokens, LOOPS, state)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("loop", "layers"), [(0, None), (1, None), (-2, [1]), (0, [-1])])
def test_frozen_patterns_are_those_of_one_loop(name: str, loop: int, layers: list[int] | None) -> None:
    model = case(name, torch.float64)
    n_core = model.cfg.n_core
    chosen = list(range(n_core)) if layers is None else [layer % n_core for layer in layers]
    logits = run(model, freeze_patterns(model, loop, LOOPS, layers))
    torch.testing.assert_close(logits, plain(model, Frozen(loop % LOOPS, chosen)), **EXACT)
    assert not torch.allclose(logits, plain(model), atol=1e-4)


def test_freezing_patterns_that_do_not_change_changes_nothing() -> None:
    model = make(torch.float64, n_prelude=1, injection="add")
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.q.weight.zero_()  # scores are all 0, so every pattern is uniform
    torch.testing.assert_close(run(model, freeze_patterns(model, 0, LOOPS)), run(model, []), **EXACT)


def test_freezing_takes_the_loop_count_the_model_was_trained_with() -> None:
    model = tiny("llama", torch.float64)
    ours = run(model, freeze_patterns(model, 0), n_loops=model.cfg.n_loops)
    assert torch.equal(ours, run(model, freeze_patterns(model, 0, model.cfg.n_loops), n_loops=model.cfg.n_loops))


def test_frozen_lists_may_be_added_and_used_with_a_cache() -> None:
    model = tiny("ouro", torch.float64)
    hooks = freeze_patterns(model, 0, LOOPS) + skip_loop(model, 2, LOOPS)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(tokens_of(model), LOOPS)
    assert torch.equal(cache["pattern", 1, 0], cache["pattern", 1, 1])
    assert torch.equal(cache["state_post", 2], cache["state_post", 1])


@pytest.mark.parametrize("name", CASES)
def test_skipping_a_loop_is_a_run_of_one_loop_less(name: str) -> None:
    """Of the last one, and as all loops are the same function, of any."""
    model = case(name, torch.float64)
    for loop in (-1, *range(LOOPS)):
        skipped = run(model, skip_loop(model, loop, LOOPS))
        torch.testing.assert_close(skipped, run(model, [], n_loops=LOOPS - 1), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_skipping_a_loop_hands_its_state_on(name: str) -> None:
    model = case(name, torch.float64)
    tokens = tokens_of(model)
    with torch.no_grad():
        state = model(tokens, LOOPS, stop_at_loop=1)
        expected = model(tokens, LOOPS, initial_state=state, start_at_loop=2)
    torch.testing.assert_close(run(model, skip_loop(model, 1, LOOPS)), expected, **EXACT)
    with model.hooks(fwd_hooks=skip_loop(model, 1, LOOPS)), torch.no_grad():
        _, cache = model.run_with_cache(tokens, LOOPS, names_filter=["hook_state_pre", "hook_state_post"])
    assert torch.equal(cache["state_post", 1], state) and torch.equal(cache["state_pre", 2], state)


@pytest.mark.parametrize("name", CASES)
def test_skipping_a_layer_hands_on_what_it_reads(name: str) -> None:
    model = case(name, torch.float64)
    seen: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return seen["blocks.1.loop.1.hook_resid_pre"] if name == "blocks.1.loop.1.hook_resid_post" else value

    torch.testing.assert_close(
        run(model, skip_layer(model, -1 if model.cfg.n_core == 2 else 1, 1, LOOPS)), plain(model, see), **EXACT
    )
    assert torch.equal(run(model, skip_layer(model, 1, -2, LOOPS)), run(model, skip_layer(model, 1, 1, LOOPS)))


def test_skipping_every_layer_of_a_loop_without_norms_is_skipping_the_loop() -> None:
    model = make(torch.float64, n_core=2)
    hooks = [hook for layer in range(2) for hook in skip_layer(model, layer, 1, LOOPS)]
    assert torch.equal(run(model, hooks), run(model, skip_loop(model, 1, LOOPS)))


INJECTING = [name for name in CASES if case(name).cfg.injection != "none"]


@pytest.mark.parametrize("name", INJECTING)
def test_injecting_the_prompts_own_prelude_changes_nothing(name: str) -> None:
    model = case(name, torch.float64)
    hooks = replace_injection(model, run_clean(model, tokens_of(model), LOOPS))
    torch.testing.assert_close(run(model, hooks), run(model, []), **EXACT)


@pytest.mark.parametrize("name", INJECTING)
@pytest.mark.parametrize("loops", [None, [1], [0, -1]])
def test_injecting_another_prompt_is_swapping_e_by_hand(name: str, loops: list[int] | None) -> None:
    model = case(name, torch.float64)
    transformer = model.transformer
    tokens, other = prompts(model, pos=LENGTH)
    chosen = range(LOOPS) if loops is None else [loop % LOOPS for loop in loops]
    prepared = model.batch(tokens, LOOPS)
    frame = model.frame(prepared)
    with torch.no_grad():
        mine, theirs = (transformer.read(one, frame) for one in (tokens, other))
        state = mine if prepared.state is None else prepared.state
        for t in range(LOOPS):
            state = transformer.loop(state, theirs if t in chosen else mine, frame, t)
        expected = transformer.readout(state, frame)
    logits = run(model, replace_injection(model, run_clean(model, other, LOOPS), loops))
    torch.testing.assert_close(logits, expected, **EXACT)
    assert not torch.allclose(logits, run(model, []), atol=1e-4)


def test_an_injection_may_be_replaced_from_a_cache_of_nothing_else() -> None:
    model = tiny("llama", torch.float64)
    tokens, other = prompts(model, pos=LENGTH)
    _, cache = model.run_with_cache(other, LOOPS, names_filter="loop.1.hook_injection_in")
    assert torch.equal(
        run(model, replace_injection(model, cache, [1]), tokens),
        run(model, replace_injection(model, run_clean(model, other, LOOPS), [1]), tokens),
    )
    with pytest.raises(InputError, match="the source's cache has no 'loop.0.hook_injection_in' .and 1 more"):
        replace_injection(model, cache)


def test_gradients_pass_through_frozen_and_skipped_parts() -> None:
    model = make(torch.float64, **TINY["llama"])
    tokens = tokens_of(model)
    state = noise_like(torch.empty(2, LENGTH, model.cfg.d_model, dtype=torch.float64)).requires_grad_()
    for hooks in (freeze_patterns(model, 0, LOOPS), skip_loop(model, 1, LOOPS), skip_layer(model, 0, 1, LOOPS)):
        (grad,) = torch.autograd.grad(
            model.run_with_hooks(tokens, LOOPS, fwd_hooks=hooks, initial_state=state)[:, -1, 0].sum(), state
        )
        assert bool((grad.abs().amax(-1) > 0).all())


# Bad input.


@pytest.mark.parametrize(
    ("make_hooks", "message"),
    [
        (lambda m: freeze_patterns(m, 2, 3), "loop 2 is the last of 3: there is no later loop to freeze"),
        (lambda m: freeze_patterns(m, -1, 3), "loop 2 is the last of 3"),
        (lambda m: freeze_patterns(m, 3, 3), "loop 3 is out of range: 3 exist"),
        (lambda m: freeze_patterns(m, 0, 3, [2]), "layer 2 is out of range: 2 exist"),
        (lambda m: freeze_patterns(m, 0, 3, []), "layers is empty"),
        (lambda m: freeze_patterns(m, 0, 0), "n_loops must be at least 1, got 0"),
        (lambda m: skip_loop(m, 3, 3), "loop 3 is out of range: 3 exist"),
        (lambda m: skip_layer(m, 2, 0, 3), "layer 2 is out of range: 2 exist"),
        (lambda m: skip_layer(m, 0, 3, 3), "loop 3 is out of range: 3 exist"),
        (lambda m: replace_injection(m, run_clean(m, tokens_of(m))), "has no input injection to replace"),
    ],
)
def test_what_does_not_exist_is_an_error(make_hooks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_hooks(case("bare"))


def test_a_replaced_injection_of_another_shape_or_loop_is_an_error() -> None:
    model = tiny("llama")
    cache = run_clean(model, tokens_of(model), LOOPS)
    with pytest.raises(InputError, match="loop 3 is out of range: 3 exist"):
        replace_injection(model, cache, [3])
    with pytest.raises(InputError, match="loops is empty, so nothing would change"):
        replace_injection(model, cache, [])
    with pytest.raises(InputError, match=r"returned shape \(2, 4, 16\).*but the activation has shape \(1, 4, 16\)"):
        model.run_with_hooks(tokens_of(model)[:1], LOOPS, fwd_hooks=replace_injection(model, cache))
    with pytest.raises(InputError, match=r"a hook is on 'loop.2.hook_injection_in', which this run does not reach"):
        model.run_with_hooks(tokens_of(model), 2, fwd_hooks=replace_injection(model, cache))
    with pytest.raises(InputError, match=r"'loop.2.hook_state_pre', which this run does not reach: loops 0 to 1 run"):
        model.run_with_hooks(tokens_of(model), 2, fwd_hooks=skip_loop(model, 2, 3))
