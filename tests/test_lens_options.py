"""A lens on a part is that part of the lens on all: loops, layers, positions, prompts. Targets; a user's hooks."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, hook_count, make, tiny, tokens_for, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.lens import LogitLens, ReadoutAgreement, logit_lens, readout_agreement
from tl_looped.observe import batch as observed_batch

MEASURES = ("top_probs", "top_ids", "entropy", "kl_to_final", "kl_to_previous", "target_probs", "target_ranks")
every_family = pytest.mark.parametrize("family", TINY)


@lru_cache
def reader(family: str, **changes: Any) -> LoopedModel:
    """A tiny model that reads words."""
    return make(tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS), "n_loops": 3, **changes})


def assert_part(part: LogitLens, whole: LogitLens, *index: Any) -> None:
    """Measures of one result are those of another at an index of its axes; a piece's sums may round another way."""
    for name in MEASURES:
        wanted = getattr(whole, name)[index]
        torch.testing.assert_close(getattr(part, name), wanted, equal_nan=True, atol=1e-6, rtol=1e-4, msg=name)


# Loops, layers, positions.


@every_family
@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_chosen_loops_layers_and_positions_are_slices_of_the_whole(family: str, kind: Any) -> None:
    """KL to the previous loop too, though that loop was not asked for; in the order asked for."""
    model = tiny(family)
    tokens = tokens_for(model)
    whole = logit_lens(model, tokens, 5, kind=kind, site="resid_mid", positions=None)
    options = {"kind": kind, "site": "resid_mid"}
    assert whole.loops == (0, 1, 2, 3, 4) and whole.layers == (0, 1) and whole.positions == (0, 1, 2, 3, 4)
    part = logit_lens(model, tokens, 5, loops=[-1, 2], layers=[-1], positions=[3, -5], **options)
    assert (part.loops, part.layers, part.positions) == ((4, 2), (1,), (3, 0))
    first = [torch.tensor([4, 2])[:, None, None, None], torch.tensor([1])[:, None, None], torch.arange(2)[:, None]]
    assert_part(part, whole, *first, torch.tensor([3, 0]))
    assert bool(part.kl_to_previous.isfinite().all())
    beginning = logit_lens(model, tokens, 5, loops=[0], positions=slice(None, None, 2), **options)
    assert beginning.positions == (0, 2, 4)
    assert_part(beginning, whole, slice(0, 1), slice(None), slice(None), slice(0, 5, 2))
    assert_part(logit_lens(model, tokens, 5, **options), whole, slice(None), slice(None), slice(None), slice(4, 5))


@every_family
def test_chosen_loops_of_the_state_are_slices_of_the_whole(family: str) -> None:
    model = tiny(family)
    tokens = tokens_for(model)
    whole = logit_lens(model, tokens, 5, positions=None)
    assert whole.layers is None
    for loop in range(5):
        part = logit_lens(model, tokens, 5, loops=[loop - 5], positions=2)
        assert part.loops == (loop,) and part.positions == (2,)
        assert_part(part, whole, slice(loop, loop + 1), slice(None), slice(2, 3))


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_says_what_each_prompt_says_alone(family: str, side: Any) -> None:
    model = reader(family)
    texts = ["a b c d e", "f = g", "h"]
    for kind, site in (("exact", "state"), ("exact", "resid_post"), ("direct", "resid_mid")):
        options = {"kind": kind, "site": site, "targets": ["a", "b"], "positions": None}
        batch = logit_lens(model, texts, padding_side=side, **options)
        assert batch.real.sum(-1).tolist() == [5, 3, 1]
        for row, text in enumerate(texts):
            alone = logit_lens(model, text, **options)
            real = batch.real[row].nonzero().flatten()
            for name in MEASURES:
                axes = getattr(batch, name).movedim(batch.axes.index("batch"), 0).movedim(batch.axes.index("pos"), 1)
                single = getattr(alone, name).movedim(batch.axes.index("batch"), 0).movedim(batch.axes.index("pos"), 1)
                torch.testing.assert_close(axes[row, real], single[0], equal_nan=True, atol=1e-5, rtol=1e-4)
                rest = axes[row, ~batch.real[row]]
                assert bool((rest.isnan() if rest.is_floating_point() else rest == -1).all())
    assert logit_lens(model, texts, padding_side="left").real.tolist() == [[True], [True], [True]]
    with pytest.raises(InputError, match=r"rows \[1, 2\] have only padding at the positions read: pass padding_side"):
        logit_lens(model, texts, padding_side="right")


@every_family
@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_pieces_of_the_vocabulary_change_nothing(family: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more rows than fit in a piece are read out at once, but for the run's own logits."""
    model = tiny(family)
    tokens = tokens_for(model)
    options = {"kind": kind, "site": "resid_post", "positions": None}
    whole, agreement = logit_lens(model, tokens, 3, **options), readout_agreement(model, tokens, 3)
    seen: list[int] = []
    handle = model.transformer.unembed.register_forward_hook(lambda m, x, out: seen.append(out.shape[:-1].numel()))
    try:
        for rows in (1, 3, 7):
            monkeypatch.setattr(observed_batch, "CHUNK", rows * model.cfg.d_vocab)
            seen.clear()
            assert_part(logit_lens(model, tokens, 3, **options), whole)
            assert seen.count(tokens.numel()) == 1  # the run's own
            assert max(size for size in seen if size != tokens.numel()) == rows
        pieces = readout_agreement(model, tokens, 3)
        torch.testing.assert_close(pieces.kl, agreement.kl, atol=1e-6, rtol=1e-4)
        assert torch.equal(pieces.same_top, agreement.same_top)
    finally:
        handle.remove()


# Targets.


def test_without_targets_the_runs_own_top_token_is_followed() -> None:
    model = tiny("llama")
    tokens = tokens_for(model)
    found = logit_lens(model, tokens, 3, positions=None)
    assert found.target_names == ("final top token",)
    assert torch.equal(found.target_ids[..., 0], model(tokens, 3).argmax(-1))
    assert found.rank_trajectory()[-1].tolist() == [[0] * 5] * 2
    torch.testing.assert_close(found.target_probs[-1], found.top_probs[-1, ..., :1])


def test_several_targets_and_targets_for_each_row_are_the_same_numbers() -> None:
    model = reader("huginn")
    tokens = model.to_tokens(["a b c d e", "f = g ; h"])
    one = logit_lens(model, tokens, targets=["c", 7], positions=None)
    assert one.target_names == ("c", "id 7")
    ids = [WORDS.index("c"), 7]
    probs = logit_lens(model, tokens, positions=None, top_k=len(WORDS))
    full = torch.zeros_like(probs.top_probs).scatter(-1, probs.top_ids, probs.top_probs)
    for name, token in (("c", ids[0]), (7, ids[1])):
        index = one.target_names.index(name if isinstance(name, str) else f"id {name}")
        torch.testing.assert_close(one.target_probs[..., index], full[..., token])
        assert torch.equal(one.rank_trajectory(name), (full > full[..., token, None]).sum(-1))
    where = torch.tensor([[ids[i % 2] for i in range(5)] for _ in range(2)])
    by_row = logit_lens(model, tokens, targets=where, positions=None)
    assert by_row.target_names == ("target",)
    even = torch.arange(5) % 2 == 0
    torch.testing.assert_close(by_row.target_probs[..., 0], torch.where(even, *one.target_probs.unbind(-1)))
    each = logit_lens(model, tokens, targets=torch.tensor(ids), positions=None)
    for row in range(2):
        torch.testing.assert_close(each.target_probs[:, row, :, 0], one.target_probs[:, row, :, row])


def test_a_text_of_digits_is_not_mistaken_for_an_id() -> None:
    """Both are followed under names of their own."""
    model = LoopedModel.from_pretrained("looped-hops", device="cpu")
    four = model.to_single_token("4")
    assert four != 4
    found = logit_lens(model, "a=4; ? a", targets=["4", 4])
    assert found.target_names == ("4", "id 4")
    assert found.target_ids[0, 0].tolist() == [four, 4]
    assert torch.equal(found.rank_trajectory("4"), found.target_ranks[..., 0])
    assert torch.equal(found.rank_trajectory(4), found.target_ranks[..., 1])


# Around the run.


@every_family
def test_a_users_hooks_act_in_the_runs_that_are_read(family: str) -> None:
    """The lens sees what a run with these hooks does, in the coda too; and leaves them and no others."""
    model = tiny(family)
    tokens = tokens_for(model)

    def halve(x: Tensor, hook: Any) -> Tensor:
        return x / 2

    hooks = [("blocks.1.attn.hook_z", halve), ("hook_state_post", halve)]
    hooks += [("coda.0.hook_mlp_out", halve)] if model.cfg.n_coda else []
    plain = logit_lens(model, tokens, 3, positions=None, top_k=model.cfg.d_vocab)
    with model.hooks(hooks):
        before = hook_count(model)
        found = logit_lens(model, tokens, 3, positions=None, top_k=model.cfg.d_vocab)
        pairs = readout_agreement(model, tokens, 3)
        assert hook_count(model) == before
        for t in range(3):
            probs = model(tokens, t + 1).softmax(-1)
            full = torch.zeros_like(probs).scatter(-1, found.top_ids[t], found.top_probs[t])
            torch.testing.assert_close(full, probs)
            last = model(tokens, 3).log_softmax(-1)
            wanted = (last.exp() * (last - probs.log())).sum(-1)
            torch.testing.assert_close(pairs.kl[2, t], wanted, atol=1e-6, rtol=1e-3)
    assert hook_count(model) == 0
    assert float((plain.entropy - found.entropy).abs().max()) > 1e-3


def test_hooks_are_gone_when_a_lens_fails() -> None:
    model = tiny("ouro")

    def stop(x: Tensor, hook: Any) -> None:
        raise RuntimeError("stop")

    with model.hooks([("loop.1.hook_state_pre", stop)]), pytest.raises(RuntimeError, match="stop"):
        logit_lens(model, tokens_for(model), 3)
    assert hook_count(model) == 0


def test_no_gradient_is_kept() -> None:
    model = tiny("ouro")
    found = logit_lens(model, tokens_for(model))
    assert not any(
        value.requires_grad
        for value in (getattr(found, field.name) for field in fields(found))
        if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_measures_are_taken_in_float32_at_least(dtype: torch.dtype) -> None:
    model = tiny("ouro", dtype)
    tokens = tokens_for(model)
    found = logit_lens(model, tokens, 3, positions=None, top_k=model.cfg.d_vocab)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.entropy.dtype == found.top_probs.dtype == found.kl_to_final.dtype == wide
    probs = model(tokens, 3).to(wide).softmax(-1)
    torch.testing.assert_close(torch.zeros_like(probs).scatter(-1, found.top_ids[-1], found.top_probs[-1]), probs)
    assert readout_agreement(model, tokens, 3).kl.dtype == wide


def test_what_made_it_is_recorded() -> None:
    model = tiny("huginn")
    tokens = tokens_for(model)
    found = logit_lens(model, tokens, 3, kind="direct", seed=7)
    assert found.made_by == {
        "model": "custom",
        "n_loops": 3,
        "start_at_loop": 0,
        "stop_at_loop": 3,
        "initial_state": "seed 7",
        "kind": "direct",
    }
    other = logit_lens(model, tokens, 3, kind="direct", seed=8)
    assert not torch.equal(found.entropy, other.entropy)
    assert torch.equal(found.tokens, tokens)


# Agreement between loops.


@every_family
@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_agreement_of_loops_pair_by_pair(family: str, kind: Any) -> None:
    model = reader(family)
    texts = ["a b c d e", "f = g"]
    found = readout_agreement(model, texts, 4, kind=kind, padding_side="left")
    single = logit_lens(model, texts, 4, kind=kind, padding_side="left", positions=None, top_k=len(WORDS))
    full = torch.zeros_like(single.top_probs).scatter(-1, single.top_ids.clamp(min=0), single.top_probs)
    means = torch.zeros(4, 4, 2, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            for row, pos in single.real.nonzero().tolist():
                p, q = full[i, row, pos].double(), full[j, row, pos].double()
                kl, same = float((p * (p / q).log()).sum()), bool(p.argmax() == q.argmax())
                assert float(found.kl[i, j, row, pos]) == pytest.approx(kl, abs=1e-6, rel=1e-3)
                assert bool(found.same_top[i, j, row, pos]) == same
                means[i, j] += torch.tensor([kl, same]) / 8
    torch.testing.assert_close(found.mean_kl().double(), means[..., 0], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(found.mean_agreement(), means[..., 1])
    assert bool(found.kl[:, :, 1, :2].isnan().all()) and int(found.kl.isnan().sum()) == 16 * 2
    assert found.real.tolist() == [[True] * 5, [False] * 2 + [True] * 3]


def test_agreement_of_chosen_loops_and_positions() -> None:
    model = tiny("added")
    tokens = tokens_for(model)
    whole = readout_agreement(model, tokens, 5)
    part = readout_agreement(model, tokens, 5, loops=[-1, 0], positions=[4, 1])
    assert (part.loops, part.positions) == ((4, 0), (4, 1))
    index = torch.tensor([4, 0])[:, None], torch.tensor([4, 0])
    torch.testing.assert_close(part.kl, whole.kl[index][..., [4, 1]], atol=1e-6, rtol=1e-4)
    assert torch.equal(part.same_top, whole.same_top[index][..., [4, 1]])


def test_the_table_of_agreement() -> None:
    found = ReadoutAgreement(
        made_by={},
        loops=(3, 1),
        positions=(7, 2),
        real=torch.tensor([[True, False]]),
        same_top=torch.tensor([[[[True, True]], [[False, True]]], [[[False, True]], [[True, True]]]]),
        kl=torch.tensor([[[[0.0, 9.0]], [[0.5, 9.0]]], [[[0.25, 9.0]], [[0.0, 9.0]]]]),
    )
    assert found.mean_agreement().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found.mean_kl().tolist() == [[0.0, 0.5], [0.25, 0.0]]
    rows = found.to_dataframe().to_dict("records")
    assert len(rows) == 4
    assert rows[1] == {"loop": 3, "other": 1, "batch": 0, "pos": 7, "same_top": False, "kl": 0.5}
    cells = found.plot().to_dict()["data"]
    assert cells[1]["z"] == [[0.0, 0.5], [0.25, 0.0]]
    assert cells[0]["customdata"][0][1] == [3, 1]
