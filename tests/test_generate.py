"""Text generation against repeated full forwards, with and without a key-value cache, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FAMILIES, TINY, WORDS, make, parity, tiny, tokens_for, word_tokenizer

from tl_looped import LoopedModel
from tl_looped.engine.errors import InputError
from tl_looped.generation import Generated

MODELS = [f"tiny {family}" for family in TINY] + [f"parity {family}" for family in FAMILIES]
DRAWN = ("huginn", "llama", "olmo2")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    kind, family = request.param.split()
    return tiny(family, torch.float64) if kind == "tiny" else parity(family)


def generated(model: LoopedModel, input: Any, n_new: int, n_loops: int | None = None, **options: Any) -> Generated:
    stops = {} if "eos_token_id" in options else {"stop_at_eos": False}
    return model.generate(input, n_new, n_loops, **stops, **options, return_type="result", verbose=False)


def repeated(
    model: LoopedModel, tokens: torch.Tensor, n_new: int, n_loops: int | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Most probable tokens, one whole forward for each; and their log probabilities."""
    found = []
    for _ in range(n_new):
        real = torch.ones_like(tokens)  # a new token may look like padding
        log_probs = model(tokens, n_loops, attention_mask=real, **options)[:, -1].log_softmax(-1)
        top = log_probs.max(-1)
        tokens = torch.cat((tokens, top.indices[:, None]), dim=1)
        found.append(top.values)
    return tokens, torch.stack(found, dim=1).detach()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    limit = 1e-10 if a.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(a, b, rtol=limit, atol=limit)


# With and without the cache.


def assert_those_of_full_forwards(model: LoopedModel, n_prompt: int, n_new: int, n_loops: int | None) -> None:
    tokens = tokens_for(model, batch=2, pos=n_prompt)
    wanted, wanted_log_probs = repeated(model, tokens, n_new, n_loops)
    for cache in (True, False):
        found = generated(model, tokens, n_new, n_loops, do_sample=False, use_past_kv_cache=cache)
        assert torch.equal(found.tokens, wanted)
        assert_close(found.log_probs, wanted_log_probs)
        assert found.loops.eq(n_loops or model.cfg.n_loops).all()
        assert found.loops.shape == (2, n_new)


def test_the_most_probable_tokens_are_those_of_full_forwards(model):
    assert_those_of_full_forwards(model, n_prompt=5, n_new=2, n_loops=None)


@pytest.mark.parametrize("family", TINY)
def test_a_prompt_of_one_token_with_more_loops(family):
    assert_those_of_full_forwards(tiny(family, torch.float64), n_prompt=1, n_new=5, n_loops=3)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.7, "top_k": 9, "seed": 5}])
def test_what_is_drawn_is_the_same_with_and_without_the_cache(model, options):
    tokens = tokens_for(model, batch=3, pos=4)
    found, wanted = (generated(model, tokens, 3, use_past_kv_cache=cache, **options) for cache in (True, False))
    assert torch.equal(found.tokens, wanted.tokens)
    assert_close(found.log_probs, wanted.log_probs)


def test_one_key_head_for_all():
    model = make(torch.float64, n_key_value_heads=1, n_prelude=1, n_coda=1)
    tokens = tokens_for(model)
    found = generated(model, tokens, 6, do_sample=False)
    assert torch.equal(found.tokens, repeated(model, tokens, 6)[0])


def test_half_precision():
    """The choice is made in float32."""
    model = make(torch.bfloat16, **TINY["huginn"])
    found = generated(model, tokens_for(model), 5)
    assert found.log_probs.dtype == torch.float32
    again = generated(model, tokens_for(model), 5, use_past_kv_cache=False)
    torch.testing.assert_close(found.log_probs[:, 0], again.log_probs[:, 0], rtol=0, atol=0.2)


def test_a_text_may_fill_the_context():
    model = make(torch.float64, n_ctx=9)
    tokens = tokens_for(model, pos=4)
    found = generated(model, tokens, 5, do_sample=False)
    assert found.tokens.shape == (2, 9)
    assert torch.equal(found.tokens, repeated(model, tokens, 5)[0])


# Batches.


@pytest.mark.parametrize("family", TINY)
def test_prompts_in_a_batch_go_on_as_they_do_alone(family):
    model = make(torch.float64, word_tokenizer(bos=True), d_vocab=len(WORDS), **TINY[family])
    texts = ["a = b ; c", "a", "d = a"]
    alone = [generated(model, text, 4, do_sample=False) for text in texts]
    for cache in (True, False):
        together = generated(model, texts, 4, do_sample=False, use_past_kv_cache=cache)
        assert together.real.tolist()[1] == [False] * 4 + [True] * 6
        for row, single in enumerate(alone):
            assert torch.equal(together.new_tokens[row], single.new_tokens[0])
            assert_close(together.log_probs[row], single.log_probs[0])
            assert together.text[row] == single.text[0]
            assert together.pieces[row] == single.pieces[0]


@pytest.mark.parametrize("family", TINY)
def test_a_given_mask_says_what_is_real(family):
    """Padding with ids of real tokens, and a hole in the middle of one prompt."""
    model = tiny(family, torch.float64)
    tokens = tokens_for(model, batch=3, pos=6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])
    with_cache, without = (
        generated(model, tokens, 3, do_sample=False, attention_mask=mask, use_past_kv_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache.real[:, :6], mask.bool())
    assert torch.equal(with_cache.tokens, without.tokens)
    assert_close(with_cache.log_probs, without.log_probs)
    for row in range(3):
        alone = tokens[row][mask[row].bool()][None]
        wanted, log_probs = repeated(model, alone, 3)
        assert torch.equal(with_cache.new_tokens[row], wanted[0, -3:])
        assert_close(with_cache.log_probs[row], log_probs[0])


# Seeds and initial states.


@pytest.mark.parametrize("family", TINY)
def test_the_same_seed_gives_the_same_text(family):
    model = tiny(family, torch.float64)
    tokens = tokens_for(model)
    default, zero, one = (generated(model, tokens, 8, seed=seed) for seed in (None, 0, 1))
    torch.manual_seed(7)
    again = generated(model, tokens, 8, seed=1)
    assert torch.equal(default.tokens, zero.tokens)
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(zero.tokens, one.tokens)
    assert default.made_by["seed"] == 0
    assert one.made_by["seed"] == 1
    assert one.made_by["initial_state"] == ("seed 1" if model.cfg.draws_state else "model")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", DRAWN)
def test_the_seed_draws_the_states_too(family, training):
    model = tiny(family, torch.float64).train(training)
    tokens = tokens_for(model)
    try:
        for seed in (3, 4):
            wanted, log_probs = repeated(model, tokens, 3, seed=seed)
            found = generated(model, tokens, 3, seed=seed, do_sample=False)
            assert torch.equal(found.tokens, wanted)
            assert_close(found.log_probs, log_probs)
    finally:
        model.eval()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("policy", ["zeros", "carry"])
@pytest.mark.parametrize("family", [*DRAWN, "zeros"])
def test_policies_of_initial_states(family, policy, cache):
    """Against whole forwards from states that are put together here, position by position."""
    zeros = {"state_init": "zeros", "injection": "add", "n_coda": 1, "loop_norm": "last"}
    model = make(torch.float64, **zeros) if family == "zeros" else tiny(family, torch.float64)
    tokens = tokens_for(model)
    found = generated(model, tokens, 4, do_sample=False, new_states=policy, seed=2, use_past_kv_cache=cache)
    assert found.made_by["new_states"] == policy
    states = model.batch(tokens, seed=2).state
    for i in range(4):
        with torch.no_grad():
            logits, seen = model.run_with_cache(tokens, initial_state=states, names_filter="hook_state_post")
        top = logits[:, -1].log_softmax(-1).max(-1)
        assert torch.equal(found.new_tokens[:, i], top.indices)
        assert_close(found.log_probs[:, i], top.values)
        last = seen[f"loop.{model.cfg.n_loops - 1}.hook_state_post"][:, -1:]
        new = torch.zeros_like(last) if policy == "zeros" else last
        states = torch.cat((states, new), dim=1)
        tokens = torch.cat((tokens, top.indices[:, None]), dim=1)
    fresh = generated(model, tokens_for(model), 4, do_sample=False, seed=2, use_past_kv_cache=cache)
    same = family == "zeros" and policy == "zeros"
    assert torch.equal(fresh.log_probs[:, 1:], found.log_probs[:, 1:]) == same


# Prompts in other forms, states that are given, numbers that overflow.


def test_prompts_in_any_form_and_prepared():
    model = make(tokenizer=word_tokenizer(), d_vocab=len(WORDS), **TINY["huginn"])
    texts = ["a b c d", "e f"]
    wanted = generated(model, texts, 3, 2, seed=4)
    encoded = model.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids = [model.to_tokens(text)[0].tolist() for text in texts]
    for form in (iter(texts), ids, encoded):
        found = generated(model, form, 3, 2, seed=4)
        assert torch.equal(found.tokens, wanted.tokens) and found.made_by == wanted.made_by
    prepared = model.prepare(texts, 2, seed=4)  # padded at the right, if they ran as they are
    assert torch.equal(generated(model, prepared, 3).tokens, wanted.tokens)
    assert model.generate(prepared, 3, stop_at_eos=False, return_type="str", verbose=False) == list(wanted.text)
    assert model.generate(iter(texts[:1]), 3, stop_at_eos=False, verbose=False)[0].startswith("a b c d")
    with pytest.raises(InputError, match="pass seed to model.prepare instead"):
        generated(model, prepared, 3, seed=1)
    with pytest.raises(InputError, match="text is generated with all loops"):
        generated(model, model.prepare(texts, 2, stop_at_loop=1), 3)
    assert wanted.plot().data[1].y[0] == pytest.approx(float(wanted.log_probs[1, 0]))


@pytest.mark.parametrize("cache", [True, False])
def test_a_state_that_is_given(cache: bool):
    model = tiny("huginn", torch.float64)
    tokens = tokens_for(model, batch=2)
    states = torch.randn(tokens.shape[1] + 4, 16, dtype=torch.float64)
    wanted, log_probs = repeated(model, tokens, 4, initial_state=states)
    found = generated(model, tokens, 4, do_sample=False, initial_state=states, use_past_kv_cache=cache)
    assert torch.equal(found.tokens, wanted) and found.made_by["initial_state"] == "given"
    assert_close(found.log_probs, log_probs)
    short = generated(model, tokens, 4, do_sample=False, initial_state=states[:-4], use_past_kv_cache=cache)
    assert_close(short.log_probs[:, :1], log_probs[:, :1])  # then from drawn states
    assert not torch.allclose(short.log_probs[:, 1:], log_probs[:, 1:])


def test_states_that_new_tokens_would_not_have():
    added, bare = tiny("added"), tiny("ouro")
    state = torch.zeros(5, 16)
    with pytest.raises(InputError, match="given for the prompt alone.*for 8 positions, or pass new_states='zeros'"):
        generated(added, tokens_for(added), 3, initial_state=state)
    assert generated(added, tokens_for(added), 3, initial_state=state, new_states="zeros").loops.shape[1] == 3
    with pytest.raises(InputError, match="never reads its tokens, as it injects nothing: leave initial_state out"):
        generated(bare, tokens_for(bare), 3, initial_state=state)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_numbers_that_overflow_name_where_they_began(family: str, cache: bool):
    model = make(**TINY[family])
    with torch.no_grad():
        model.transformer.blocks[1].mlp.down.weight.fill_(1e38)
        model.transformer.blocks[1].mlp.up.weight.fill_(1e30)
    with pytest.raises(InputError, match=r"not finite, from 'blocks.1.loop.0.[\w.]+' \(layer 1, loop 0\) on"):
        generated(model, tokens_for(model), 2, use_past_kv_cache=cache)

    def spoil(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * float("inf") if hook.first_position else x  # in later steps only

    model = tiny(family)
    with model.hooks(fwd_hooks=[("blocks.0.loop.1.hook_resid_post", spoil)]):
        stream = model.generate_stream(tokens_for(model), 4, stop_at_eos=False)
        next(stream)
        with pytest.raises(InputError, match="the logits at position 5 are not finite"):
            next(stream)
