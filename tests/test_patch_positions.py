"""Patching from prompts of another length: which positions correspond, and that nothing else is patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, make, tiny, tokens_for, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.patching import aligned_source, attribution_sweep, patch_sweep
from tl_looped.patching.positions import align_positions

SHORT, LONG = "a = b ; c = d", "a = b ; e = f ; c = d"


def reader(family: str = "llama") -> LoopedModel:
    return make(torch.float64, tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS)})


def positions(model: LoopedModel, ours: Any, theirs: Any, ties: Any = None) -> Tensor:
    return align_positions(model.prepare(ours).rows, model.prepare(theirs).rows, ties)


def first_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


@pytest.mark.parametrize(
    ("ours", "theirs", "ties", "wanted"),
    [
        ("a = b", "a = c", None, [0, 1, 2]),
        ("a = b", "a = = b", "before", [0, 1, 3]),
        ("a = b", "a = = b", "after", [0, 2, 3]),
        ("a b c", "a d d b c", None, [0, 3, 4]),
        ("a d b c", "a c", None, [0, -1, -1, 1]),
        ("a e b", "a c d b", None, [0, -1, 3]),
        (SHORT, LONG, "before", [0, 1, 2, 3, 8, 9, 10]),
        (SHORT, LONG, "after", [0, 1, 2, 7, 8, 9, 10]),
        (LONG, SHORT, "before", [0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6]),
        (LONG, SHORT, "after", [0, 1, 2, -1, -1, -1, -1, 3, 4, 5, 6]),
        ("a b", "a b a b", "before", [0, 1]),
        ("a b", "a b a b", "after", [2, 3]),
        ("a b c", "d d b c", None, [-1, 2, 3]),
    ],
)
def test_which_position_stands_for_which(ours: str, theirs: str, ties: Any, wanted: list[int]) -> None:
    assert positions(reader(), ours, theirs, ties).tolist() == [wanted]


def test_padded_prompts_are_aligned_by_their_own_tokens() -> None:
    found = positions(reader(), ["a b c", "d"], ["a e b c", "d"])
    assert found.tolist() == [[0, 2, 3], [0, -1, -1]]


def by_hand(model: LoopedModel, at: Tensor, cell: tuple[int, int, int], cache: Any) -> float:
    """One cell: the stream of one loop, layer and position is that of its counterpart."""
    loop, layer, pos = cell

    def write(x: Tensor, hook: LoopHookPoint) -> Tensor:
        x = x.clone()
        x[0, pos] = cache["resid_pre", layer, loop][0, int(at[0, pos])]
        return x

    hooks = [(f"blocks.{layer}.loop.{loop}.hook_resid_pre", write)]
    return first_logit(model.run_with_hooks(SHORT, fwd_hooks=hooks)).item()


@pytest.mark.parametrize("family", TINY)
def test_cells_by_hand(family: str) -> None:
    model = reader(family)
    at = positions(model, SHORT, LONG, ties="before")
    _, cache = model.run_with_cache(LONG)
    source = aligned_source(model, LONG, to=SHORT, ties="before")
    found = patch_sweep(model, SHORT, source=source, metric=lambda x: first_logit(x)[0], progress=False)
    for cell in [(0, 0, 0), (0, 1, 3), (1, 0, 4), (1, 1, 6)]:
        assert float(found.values[cell]) == pytest.approx(by_hand(model, at, cell, cache), abs=1e-10)


def test_prompts_of_one_length_are_patched_as_from_the_cache() -> None:
    model = tiny("huginn", torch.float64)
    tokens, other = tokens_for(model, batch=2), tokens_for(model, batch=2, seed=5)
    _, cache = model.run_with_cache(other)
    options: dict[str, Any] = {"metric": first_logit, "reduce": "none", "progress": False}
    for sweep in (patch_sweep, attribution_sweep):
        plain = sweep(model, tokens, source=cache, **options)
        for by_hand in (None, torch.arange(tokens.shape[1]).expand(2, -1)):
            source = aligned_source(model, other, to=tokens, positions=by_hand)
            torch.testing.assert_close(sweep(model, tokens, source=source, **options).values, plain.values)


def test_positions_without_counterpart_are_nan_and_keep_their_own() -> None:
    model = reader()
    at = positions(model, LONG, SHORT, ties="after")
    _, cache = model.run_with_cache(SHORT)
    source = aligned_source(model, SHORT, to=LONG, ties="after")
    options: dict[str, Any] = {"source": source, "metric": lambda x: first_logit(x)[0], "progress": False}
    found = patch_sweep(model, LONG, **options)
    assert found.values.isnan().all(1).all(0).tolist() == (at[0] < 0).tolist()
    assert not bool(found.values[..., (at[0] >= 0).tolist()].isnan().any())
    slopes = attribution_sweep(model, LONG, **options)
    assert torch.equal(slopes.values.isnan(), found.values.isnan())

    def write(x: Tensor, hook: LoopHookPoint) -> Tensor:
        x, there = x.clone(), at[0] >= 0
        x[0, there] = cache["resid_pre", 1, 0][0, at[0, there]]
        return x

    whole = patch_sweep(model, LONG, axes=("loop", "layer"), **options)
    wanted = model.run_with_hooks(LONG, fwd_hooks=[("blocks.1.loop.0.hook_resid_pre", write)])
    assert float(whole.values[0, 1]) == pytest.approx(first_logit(wanted).item(), abs=1e-10)


def test_each_prompt_has_its_own() -> None:
    model = reader("ouro")
    ours, theirs = ["a = b ; c", "d = e"], ["a = b ; d ; c", "d = f"]
    at = positions(model, ours, theirs, ties="before")
    options: dict[str, Any] = {"metric": first_logit, "reduce": "none", "progress": False, "axes": ("loop", "pos")}
    found = patch_sweep(model, ours, source=aligned_source(model, theirs, to=ours, ties="before"), **options)
    assert found.values[0].isnan().T.tolist() == (at < 0).tolist()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("theirs", "options", "message"),
    [
        (LONG, {}, r"1 tokens of prompt 0 \(from position 3\) may stand for .* pass ties='before' or 'after'"),
        ("e", {}, "prompt 0 and its source begin and end with other tokens: say which correspond, with positions="),
        (["a", "b"], {}, "1 prompts to patch and 2 to take from do not pair"),
        (LONG, {"ties": "left"}, "ties must be 'before', 'after' or None, got 'left'"),
        (LONG, {"positions": torch.zeros(1, 3)}, r"positions must be integers of shape \(1, 7\) = \[batch, pos\]"),
        (LONG, {"positions": torch.full((1, 7), 11)}, "there is no position 11 in prompts of 11: −1 says"),
        (LONG, {"positions": torch.full((1, 7), -2)}, "there is no position -2 in prompts of 11"),
    ],
)
def test_what_is_refused(theirs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        aligned_source(reader(), theirs, to=SHORT, **options)


@pytest.mark.usefixtures("as_a_user")
def test_a_source_of_other_prompts_or_sites() -> None:
    model = reader()
    with pytest.raises(InputError, match="patching runs all loops: prepare the prompts without .* stop_at_loop"):
        aligned_source(model, model.prepare(LONG, stop_at_loop=1), to=SHORT)
    source = aligned_source(model, LONG, to=SHORT, ties="before")
    with pytest.raises(InputError, match="source's cache has no .*hook_pattern"):
        patch_sweep(model, SHORT, source=source, metric=first_logit, site="pattern", reduce="mean")
    with pytest.raises(InputError, match="along 'pos', the patched prompts 5"):
        patch_sweep(model, "a = b ; c", source=source, metric=first_logit, reduce="mean")
