"""Threads that run one model at the same time: what a thread hooks and caches is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import hook_count, make, tokens_for

from tl_looped import LoopedModel

THREADS, ROUNDS = 6, 4
SITE = "blocks.1.loop.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return make(n_prelude=1, injection="add", n_loops=3)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """The work of every thread, all started together; what one raises is raised."""
    ready = threading.Barrier(THREADS)

    def one(index: int) -> Any:
        ready.wait()
        return work(index)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def test_every_thread_caches_its_own_run(model: LoopedModel):
    def work(index: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        tokens = tokens_for(model, batch=1, pos=4, seed=index)
        found = [model.run_with_cache(tokens, n_loops=1 + (index + i) % 3) for i in range(ROUNDS)]
        return [(logits, dict(cache.items())) for logits, cache in found]

    wanted = [work(index) for index in range(THREADS)]
    for mine, alone in zip(at_once(work), wanted, strict=True):
        for (logits, cache), (logits_alone, cache_alone) in zip(mine, alone, strict=True):
            assert torch.equal(logits, logits_alone)
            assert list(cache) == list(cache_alone)
            assert all(torch.equal(cache[name], cache_alone[name]) for name in cache)
    assert hook_count(model) == 0


def test_a_hook_of_a_run_acts_in_no_other_thread(model: LoopedModel):
    """Edits, gradients, nested blocks and plain runs side by side; a hook may be at a loop that others do not run."""

    def work(index: int) -> list[torch.Tensor]:
        tokens, found = tokens_for(model, batch=1, pos=4, seed=index), []

        def edit(x, hook):
            return x + index

        for _ in range(ROUNDS):
            if index % 3 == 0:
                found.append(model(tokens, n_loops=1))  # does not reach the site of the others' hooks
            elif index % 3 == 1:
                with model.hooks([("hook_embed", edit)]):
                    found.append(model.run_with_hooks(tokens, fwd_hooks=[(SITE, edit)]))
                    found.append(model(tokens))
            else:
                _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=SITE)
                found += [cache[SITE], cache[SITE + "_grad"]]
        return [one.detach() for one in found]

    wanted = [work(index) for index in range(THREADS)]
    for mine, alone in zip(at_once(work), wanted, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, alone, strict=True))
    assert hook_count(model) == 0
    assert model.context_level == 0


def test_a_hook_of_the_model_acts_in_every_thread(model: LoopedModel):
    tokens = tokens_for(model, batch=1, pos=4)
    model.add_hook(SITE, lambda x, hook: 0 * x)
    hooked = model(tokens)
    assert all(torch.equal(one, hooked) for one in at_once(lambda _: model(tokens)))
    model.reset_hooks()
    assert not torch.equal(model(tokens), hooked)


def test_resetting_hooks_leaves_the_runs_of_other_threads(model: LoopedModel):
    tokens, entered, done = tokens_for(model, batch=1, pos=4), threading.Event(), threading.Event()

    def hooked() -> torch.Tensor:
        with model.hooks([(SITE, lambda x, hook: 0 * x)]):
            entered.set()
            assert done.wait(60)
            return model(tokens)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(hooked)
        assert entered.wait(60)
        clean = model(tokens)
        model.reset_hooks()
        assert model.context_level == 0
        done.set()
        assert not torch.equal(other.result(), clean)
    assert torch.equal(model(tokens), clean)
    assert hook_count(model) == 0


def test_threads_come_and_go_without_inheriting_hooks(model: LoopedModel):
    """A hook that a thread left on the model acts in none that starts after it, whatever the system calls it."""
    tokens, kept = tokens_for(model, batch=1, pos=4), []
    clean = model(tokens)

    def leave() -> None:
        model.run_with_hooks(tokens, fwd_hooks=[(SITE, lambda x, hook: 0 * x)], reset_hooks_end=False)

    def plain() -> None:
        kept.append(model(tokens))

    for work in (leave, plain, plain):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    for point in model.hook_dict.points():
        point.fwd_hooks = []
    assert len(kept) == 2
    assert all(torch.equal(one, clean) for one in kept)


def test_generation_knows_its_own_positions(model: LoopedModel):
    def work(index: int) -> tuple[list[int], list[int]]:
        seen: list[int] = []
        prompt = tokens_for(model, batch=1, pos=2 + index, seed=index)
        with model.hooks([("loop.0.hook_state_pre", lambda x, hook: seen.append(hook.first_position))]):
            out = model.generate(prompt, max_new_tokens=4, return_type="tokens", stop_at_eos=False)
        assert isinstance(out, torch.Tensor)
        return out[0].tolist(), seen

    wanted = [work(index) for index in range(THREADS)]
    assert at_once(work) == wanted
    assert wanted[3][1] == [0, 5, 6, 7]
