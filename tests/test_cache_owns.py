"""What a cache holds is its own: no two activations share memory, and none is the caller's or the output's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, make, noise_like, tiny, tokens_for

from tl_looped import LoopedCache, LoopedModel

EVERY = {"names_filter": lambda _: True}


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return tiny(request.param, torch.float64)


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def assert_apart(cache: LoopedCache, *others: torch.Tensor | None) -> None:
    places = [memory(one) for one in (*cache.values(), *others, cache.run.state) if one is not None]
    shared = [name for name, one in cache.items() if places.count(memory(one)) > 1]
    assert shared == []
    parts = [name for name, x in cache.items() if x.untyped_storage().nbytes() != x.numel() * x.element_size()]
    assert parts == []  # of something larger, or one number in many places


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_at_loop": 2},
        {"return_type": "loss", "incl_bwd": True},
        {"pos_slice": (1, 3)},
        {"remove_batch_dim": True},
        {"loops": [-1]},
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_no_two_activations_share_memory(model: LoopedModel, options: dict[str, Any], given: bool):
    tokens = tokens_for(model, batch=1)
    state = noise_like(model(tokens, stop_at_loop=0)) if given else None
    out, cache = model.run_with_cache(tokens, n_loops=3, initial_state=state, **EVERY, **options)
    assert_apart(cache, state, out)


def test_an_edit_of_one_changes_no_other(model: LoopedModel):
    tokens = tokens_for(model)
    state = noise_like(model(tokens, stop_at_loop=0))
    kept_state = state.clone()
    with torch.no_grad():
        out, cache = model.run_with_cache(tokens, n_loops=3, initial_state=state, stop_at_loop=2, **EVERY)
    kept, kept_out = {name: one.clone() for name, one in cache.items()}, out.clone()
    for name in cache:
        cache[name].zero_()
        assert all(torch.equal(cache[one], kept[one]) for one in cache if one != name), name
        cache[name].copy_(kept[name])
        assert torch.equal(state, kept_state)
        assert torch.equal(out, kept_out)


@torch.no_grad()
def test_a_returned_state_is_not_the_one_given(model: LoopedModel):
    tokens = tokens_for(model)
    state = model(tokens, stop_at_loop=1)
    same = model(tokens, initial_state=state, start_at_loop=1, stop_at_loop=1)
    assert torch.equal(same, state)
    assert memory(same) != memory(state)


def test_what_hooks_put_in_is_not_what_is_kept(model: LoopedModel):
    """A tensor from another cache that a hook returns, and what a hook keeps for itself."""
    tokens = tokens_for(model)
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens, n_loops=2)
        seen: list[torch.Tensor] = []
        hooks = [
            ("loop.0.hook_state_post", lambda x, hook: clean["state_post", 0]),
            (lambda name: name.endswith("resid_post"), lambda x, hook: seen.append(x)),
        ]
        with model.hooks(hooks):
            _, cache = model.run_with_cache(tokens, n_loops=2, **EVERY)
    assert_apart(cache, *clean.values())
    assert not {memory(one) for one in cache.values()} & {memory(one) for one in seen}


@torch.no_grad()
def test_nothing_is_copied_that_is_nobody_elses(monkeypatch: pytest.MonkeyPatch):
    """Patterns, and streams of which no two are the same tensor, are kept as the run made them."""
    model, copies = tiny("huginn"), []
    original = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **kwargs: copies.append(x.shape) or original(x, **kwargs))
    names = [f"blocks.{layer}.{site}" for layer in (0, 1) for site in ("hook_resid_post", "attn.hook_pattern")]
    model.run_with_cache(tokens_for(model), n_loops=3, names_filter=names)
    assert copies == []


def test_caching_hooks_of_transformerlens(model: LoopedModel):
    """Under names with loops, the same numbers as run_with_cache; also when a later hook writes in place."""
    tokens = tokens_for(model)
    _, wanted = model.run_with_cache(tokens, n_loops=3, return_type="loss", incl_bwd=True)
    store, forward, backward = model.get_caching_hooks(lambda name: "result" not in name and "gate" not in name, True)
    model.run_with_hooks(tokens, n_loops=3, return_type="loss", fwd_hooks=forward, bwd_hooks=backward).backward()
    assert set(store) == {name for name in wanted if "gate" not in name}
    for name in store:
        torch.testing.assert_close(store[name], wanted[name], rtol=1e-10, atol=1e-12)

    def in_place(x, hook):
        x.zero_()

    with torch.no_grad():
        store = model.add_caching_hooks(["blocks.0.loop.1.hook_resid_post", "hook_state_pre"], pos_slice=-1)
        model.add_hook("blocks.0.loop.1.hook_resid_post", in_place)
        model(tokens, n_loops=2)
        model.reset_hooks()
    assert set(store) == {"loop.0.hook_state_pre", "loop.1.hook_state_pre", "blocks.0.loop.1.hook_resid_post"}
    torch.testing.assert_close(store["blocks.0.loop.1.hook_resid_post"], wanted["resid_post", 0, 1][:, -1:])


def test_the_old_names_of_caching_keep_loops_too():
    model, store = make(**TINY["ouro"]), {}
    model.cache_some(store, lambda name: name.endswith("hook_pattern"))
    model(tokens_for(model), n_loops=2)
    model.reset_hooks()
    assert list(store) == [f"blocks.{layer}.loop.{t}.attn.hook_pattern" for t in (0, 1) for layer in (0, 1)]
    store.clear()
    model.cache_all(store)
    model(tokens_for(model), n_loops=2)
    model.reset_hooks()
    assert {"loop.1.hook_state_post", "hook_embed", "blocks.1.loop.0.attn.hook_z"} <= set(store)
