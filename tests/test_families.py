"""Every family by the same battery: the public code's stored numbers, and identities that no weights excuse.

Ouro and the Raven family, which came first, have more tests of their own in test_parity.py; here are those since.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FOLDERS, STORED, given, load, loops_for, ours, ran, stopped
from helpers import expected, fired, hook_count, noise_like
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.engine.schedule import DEAD_ENDS
from tl_looped.engine.words import describe
from tl_looped.report import check

ABSOLUTE = 1e-4  # up to values of 50: those of more the reference itself, in float32, has rounded by more
RELATIVE = 2e-5  # of the largest value
LOOPS = 3

every_folder = pytest.mark.parametrize("folder", FOLDERS)
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")


@pytest.mark.parametrize(("folder", "key"), STORED)
def test_every_stored_number(folder: str, key: str):
    found, wanted = ours(folder, key), expected(folder)[key]
    assert found.shape == wanted.shape
    error, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert error <= ABSOLUTE * max(1.0, largest / 50)
    assert error <= RELATIVE * max(1.0, largest)


@every_folder
def test_what_differs_is_rounding_in_float32(folder: str):
    """In float64 our model is as near to the reference as the reference's own float32 allows."""
    key = max((key for key in expected(folder) if key.startswith(("logits.T", "causal.logits"))), default="logits")
    loops = int(key[8:]) if key.startswith("logits.T") else None
    with torch.no_grad():
        loops = None if loops is None else loops_for(folder, loops)
        options = given(folder, torch.float64)
        found = load(folder, torch.float64)(expected(folder)["input_ids"], loops, **options)
    assert float((found - expected(folder)[key]).abs().max()) <= RELATIVE * float(expected(folder)[key].abs().max())


@every_folder
def test_stopping_after_each_loop_is_reading_out_each_state(folder: str):
    model, tokens = load(folder), expected(folder)["input_ids"]
    with torch.no_grad():
        state = model(tokens, n_loops=LOOPS, stop_at_loop=2)
        assert torch.equal(model(tokens, **stopped(model, LOOPS, 2)), model.readout(state, tokens))
        resumed = model(tokens, n_loops=LOOPS, initial_state=state, start_at_loop=2)
        assert torch.equal(resumed, model(tokens, n_loops=LOOPS))


@every_folder
def test_generation_with_the_cache_is_generation_without(folder: str):
    """Greedily, and longer than any window; rows of different length too."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"][:, :8]
    if not model.cfg.causal:
        with pytest.raises(InputError, match="generating text needs a model that reads from left to right"):
            model.generate(tokens, 5)
        return
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options: dict[str, Any] = {"n_loops": LOOPS, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for masked in ({}, {"attention_mask": mask}):
        cached, whole = (
            model.generate(tokens, 5, **options, **masked, use_past_kv_cache=cache) for cache in (True, False)
        )
        assert torch.equal(cached, whole)


@every_folder
def test_padding_changes_nothing(folder: str):
    """A prompt alone, and beside a longer one, padded at either side."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"]
    short = tokens[:1, :7]
    with torch.no_grad():
        alone = model(short, n_loops=LOOPS)
        for left in (True, False):
            padded = torch.cat((tokens[1:, :4], short) if left else (short, tokens[1:, :4]), dim=1)
            mask = torch.ones_like(padded)
            mask[:, : 4 if left else None][:, 0 if left else 7 :] = 0
            found = model(
                torch.cat((padded, tokens[1:])), n_loops=LOOPS, attention_mask=torch.cat((mask, torch.ones_like(mask)))
            )
            torch.testing.assert_close(found[:1, 4:] if left else found[:1, :7], alone, rtol=1e-9, atol=1e-9)


@every_folder
def test_hooks_that_return_nothing_change_nothing_to_the_bit(folder: str):
    model, tokens = load(folder), expected(folder)["input_ids"]
    with torch.no_grad():
        plain = model(tokens, n_loops=LOOPS)
        seen = fired(model, tokens, n_loops=LOOPS)
        hooked = model.run_with_hooks(tokens, n_loops=LOOPS, fwd_hooks=[(lambda _: True, lambda x, hook: None)])
    assert torch.equal(plain, hooked)
    assert len(set(seen)) == len(seen) and hook_count(model) == 0


@every_folder
def test_patching_clean_into_clean_changes_nothing(folder: str):
    """Every activation at once, each by a copy of itself: exactly what ran, by the explicit way of every module."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"]
    loops = LOOPS if model.cfg.two_states is None else (1, 2)
    with torch.no_grad():
        plain, cache = model.run_with_cache(tokens, loops, names_filter=lambda _: True)
        same = [(name, lambda x, hook: cache[hook.name].clone()) for name in cache]
        torch.testing.assert_close(model.run_with_hooks(tokens, loops, fwd_hooks=same), plain, rtol=1e-9, atol=1e-9)
        # An edit at any site does something: one run, in which every row is edited at another.
        names = [name for name in cache if not name.endswith(tuple(DEAD_ENDS))]
        rows = tokens[:1].expand(len(names), -1)
        edits = [(name, partial(_push, row=row)) for row, name in enumerate(names)]
        edited, plain = model.run_with_hooks(rows, loops, fwd_hooks=edits), model(tokens[:1], loops)
        for name, one in zip(names, edited, strict=True):
            assert float((one - plain[0]).abs().max()) > 1e-9, name


def _push(x: Tensor, hook: object, row: int) -> None:
    x[row] += 0.1 * noise_like(x[row])


@every_folder
def test_patterns_sum_to_one_and_see_no_future(folder: str):
    model, _, cache = ran(folder)
    for stack in model.cfg.looping:
        pattern = cache.stack(f"{stack}.pattern")
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        assert torch.equal(pattern, pattern.tril()) == load(folder).cfg.causal


@every_folder
def test_gradients_predict_finite_differences(folder: str):
    """Of a weight of every kind, and of an activation in the middle of a loop."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"]

    def of_logits() -> Tensor:
        return F.cross_entropy(model(tokens, n_loops=LOOPS)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def loss() -> float:
        with torch.no_grad():
            return float(of_logits())

    model.zero_grad()
    of_logits().backward()
    kinds = {name.replace(".1.", ".0."): (name, weight) for name, weight in model.transformer.named_parameters()}
    for name, weight in kinds.values():
        if name.startswith("exit_"):  # which no output reads
            continue
        if weight.grad is None:
            raise AssertionError(f"{name} has no gradient")
        move = noise_like(weight) / weight.numel() ** 0.5
        with torch.no_grad():
            weight += 1e-6 * move
            above = loss()
            weight -= 2e-6 * move
            below = loss()
            weight += 1e-6 * move
        assert (above - below) / 2e-6 == pytest.approx(float((weight.grad * move).sum()), rel=1e-4, abs=1e-7), name
    model.zero_grad()


@every_folder
def test_a_saved_copy_is_the_model(folder: str, tmp_path):
    model, tokens = load(folder), expected(folder)["input_ids"]
    model.save_pretrained(tmp_path / "copy")
    copy = LoopedModel.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert copy.cfg == model.cfg
        kept = dict(copy.named_parameters())
        assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())
        # Where weights lie in memory changes the order in which kernels add.
        torch.testing.assert_close(copy(tokens), model(tokens), atol=1e-4, rtol=1e-5)


@every_folder
def test_its_own_check_passes(folder: str):
    assert [one for one in check(load(folder), n_loops=LOOPS) if not one.passed] == []


@every_folder
def test_every_part_is_said_in_words(folder: str):
    words = dict(describe(load(folder).cfg))
    assert words["norm placement"] and words["position"] and all(words.values())


@every_folder
def test_the_realised_depth_view_adds_up_where_it_says_so(folder: str):
    """What the layers wrote, biases too, is the last state; of the others the view says why not."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"]
    try:
        view = model.unrolled(LOOPS)
    except InputError as error:  # a part that it does not build
        if "the realised-depth view does not build" not in str(error):
            raise
        return
    with torch.no_grad():
        logits, cache = view.run_with_cache(tokens)
        torch.testing.assert_close(logits, model(tokens, n_loops=LOOPS), rtol=1e-5, atol=1e-5)
        if model.cfg.sum_broken_by(LOOPS) is not None:
            with pytest.raises(InputError, match=model.cfg.sum_broken_by(LOOPS)):
                cache.decompose_resid()
            return
        last = cache[f"blocks.{view.cfg.n_layers - 1}.hook_resid_post"]
        torch.testing.assert_close(cache.decompose_resid().sum(0), last)
        if model.cfg.heads_mixed_by() is None:
            cache.compute_head_results()
            torch.testing.assert_close(cache.get_full_resid_decomposition(expand_neurons=False).sum(0), last)
