"""Penalties, criteria and processors while text is generated, and the activations that a generation itself computes."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import load
from helpers import TINY, WORDS, make, tiny, tokens_for, word_tokenizer
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, SuppressTokensLogitsProcessor

from tl_looped import LoopedModel
from tl_looped.engine.cache import LoopedCache
from tl_looped.generation import Generated, LoopEnd
from tl_looped.generation.kept import GeneratedCache
from tl_looped.lens import LatentRule, trace_exits

N_LOOPS = 4


def generated(model: LoopedModel, tokens: Any, n_new: int, **options: Any) -> Any:
    plain = {"stop_at_eos": False, "do_sample": False, "verbose": False, "return_type": "result"}
    return model.generate(tokens, n_new, **{**plain, **options})


def assert_same_activations(found: GeneratedCache, model: LoopedModel, result: Generated, **options: Any) -> None:
    """Those of a whole run on the finished text."""
    _, wanted = model.run_with_cache(result.tokens, attention_mask=result.real, **options)
    assert set(found) == set(wanted) and found.run.tokens.equal(result.tokens)
    where = result.real[:, :, None]
    for name, value in wanted.items():
        if name.endswith(("hook_pattern", "hook_attn_scores")):
            real = result.real[:, None, :, None].expand_as(value)
        else:
            axis = 1
            assert value.shape[axis] == where.shape[1], name
            real = result.real.view(*where.shape[:2], *(1 for _ in value.shape[2:])).expand_as(value)
        torch.testing.assert_close(found[name][real], value[real], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("family", TINY)
def test_the_activations_are_those_of_a_run_on_the_text(family: str, use_past_kv_cache: bool) -> None:
    model = make(torch.float64, tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS)})
    texts = ["a b c", "d"]
    result, cache = generated(model, texts, 3, return_cache=True, use_past_kv_cache=use_past_kv_cache)
    assert_same_activations(cache, model, result)
    assert cache.made_by["max_new_tokens"] == 3 and cache.loops_run.eq(model.cfg.n_loops).all()
    assert torch.equal(result.tokens, generated(model, texts, 3).tokens)


@pytest.mark.parametrize("folder", ["hrm-text", "parcae", "looped-gpt", "ff-gemma3", "loopus-qwen3", "nanochat"])
def test_of_other_families_too(folder: str) -> None:
    model = load(folder, torch.float64)
    options = {"prefix_length": 2} if folder == "hrm-text" else {}
    result, cache = generated(model, tokens_for(model, batch=2, pos=4), 3, return_cache=True, **options)
    assert_same_activations(cache, model, result, **options)


def test_some_sites_only_and_a_row_that_ends() -> None:
    model = tiny("huginn", torch.float64)
    tokens = tokens_for(model, batch=2, pos=3)
    plain = generated(model, tokens, 4)
    ends_with = int(plain.new_tokens[0, 1])
    options = {"stop_at_eos": True, "eos_token_id": ends_with, "names_filter": ["hook_state_post", "hook_embed"]}
    result, cache = generated(model, tokens, 4, return_cache=True, **options)
    assert {name.rpartition(".")[2] for name in cache} == {"hook_state_post", "hook_embed"}
    ended = (result.new_tokens == ends_with).double().cumsum(1) > 0
    state, n_prompt = cache["state_post", -1], tokens.shape[1]
    assert ended.any() and torch.equal(state[:, n_prompt:].isnan().all(-1), ended[:, : state.shape[1] - n_prompt])
    assert torch.equal(cache.loops_run[:, n_prompt:] == 0, ended)
    _, whole = model.run_with_cache(result.tokens, attention_mask=torch.ones_like(result.tokens))
    torch.testing.assert_close(state[~state.isnan()], whole["state_post", -1][~state.isnan()])


def test_loops_that_a_token_did_not_run_are_nan(tmp_path: Path) -> None:
    model, ends = tiny("huginn", torch.float64), {}

    def watch(end: LoopEnd, position: int) -> None:
        ends[end.loop, position] = end.state

    tokens = tokens_for(model, batch=2, pos=3)
    steps = trace_exits(model, tokens, N_LOOPS, rules=[LatentRule]).statistics
    rule = LatentRule(float(steps[0, :-1].quantile(0.3)))
    options = {"n_loops": N_LOOPS, "exit_rule": rule, "watch": watch, "return_cache": True}
    result, cache = generated(model, tokens, 5, **options)
    assert torch.equal(cache.loops_run[:, 2:-1], result.loops) and bool((cache.loops_run[:, :2] == N_LOOPS).all())
    assert len(cache.loops_run.unique()) > 1  # some stopped, some did not
    for position in range(2, 8):
        for row in range(2):
            ran = int(cache.loops_run[row, position])
            for t in range(N_LOOPS):
                found = cache["state_post", t][row, position]
                if t < ran:
                    torch.testing.assert_close(found, ends[t, position][row])
                else:
                    assert bool(found.isnan().all())
                    assert bool(cache["pattern", 0, t][row, :, position].isnan().all())
    assert not bool(cache["coda.resid_post", 0].isnan().any())
    assert repr(rule) == cache.made_by["exit_rule"]
    kept = GeneratedCache.load(cache.save(tmp_path / "kept"), model)
    for other in (kept, copy(cache), cache.apply_slice_to_loops([0, 1]), LoopedCache.load(tmp_path / "kept", model)):
        assert other.made_by["exit_rule"] == repr(rule)
        assert other.made_by["loops_run"] == cache.loops_run.tolist()
    assert torch.equal(kept.loops_run, cache.loops_run)


# Penalties, processors, criteria.


def slow_text(model: LoopedModel, tokens: list[int], n_new: int, repetition: float, freq: float) -> list[int]:
    """One whole run for each token; penalties token by token."""
    for _ in range(n_new):
        logits = model(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)))[0, -1].tolist()
        for token in set(tokens):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in tokens:
            logits[token] -= freq
        tokens = [*tokens, max(range(len(logits)), key=logits.__getitem__)]
    return tokens


@pytest.mark.parametrize(("repetition", "freq"), [(1.0, 0.0), (5.0, 0.0), (1.0, 2.0), (2.0, 1.0), (0.5, 0.0)])
def test_penalties_token_by_token_and_no_padding_counts(repetition: float, freq: float) -> None:
    model = make(torch.float64, tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})
    texts = ["a b c a", "d"]
    found = generated(model, texts, 6, repetition_penalty=repetition, freq_penalty=freq)
    for row, text in enumerate(texts):
        prompt = model.to_tokens(text)[0].tolist()
        assert found.tokens[row][found.real[row]].tolist() == slow_text(model, prompt, 6, repetition, freq)
    changed = [generated(model, texts, 6).tokens.tolist() != found.tokens.tolist()]
    assert changed == [(repetition, freq) != (1.0, 0.0)]
    assert found.made_by["repetition_penalty"] == repetition and found.made_by["freq_penalty"] == freq


def test_processors_and_criteria_of_transformers() -> None:
    model = make(torch.float64, tokenizer=word_tokenizer(), **{**TINY["llama"], "d_vocab": len(WORDS)})
    tokens = tokens_for(model, batch=2, pos=3).clamp(min=2)  # none of them is the tokenizer's padding
    plain = generated(model, tokens, 6)
    banned = plain.new_tokens.unique().tolist()
    found = generated(model, tokens, 6, logits_processor=SuppressTokensLogitsProcessor(banned, device="cpu"))
    assert not set(found.new_tokens.flatten().tolist()) & set(banned)
    assert "SuppressTokens" in found.made_by["logits_processor"][0]
    seen: list[tuple[Tensor, Tensor]] = []
    short = generated(model, tokens, 6, stopping_criteria=[MaxLengthCriteria(5), lambda *at: bool(seen.append(at))])
    assert torch.equal(short.tokens, plain.tokens[:, :5])
    assert [rows.shape[1] for rows, _ in seen] == [4, 5]
    torch.testing.assert_close(seen[0][1], model(tokens)[:, -1].detach(), rtol=1e-9, atol=1e-9)
    ends_with = int(plain.new_tokens[0, 2])
    by_criterion = generated(model, tokens, 6, stopping_criteria=EosTokenCriteria(ends_with))
    by_name = generated(model, tokens, 6, stop_at_eos=True, eos_token_id=ends_with)
    assert torch.equal(by_criterion.real, by_name.real)
    assert torch.equal(by_criterion.tokens[by_name.real], by_name.tokens[by_name.real])


def test_logits_of_every_new_token() -> None:
    model = tiny("olmo2", torch.float64)
    tokens = tokens_for(model, batch=2, pos=3)
    found = model.generate(tokens, 4, output_logits=True, stop_at_eos=False, verbose=False, temperature=0.5)
    assert isinstance(found, Generated) and found.logits is not None
    whole = model(found.tokens, attention_mask=torch.ones_like(found.tokens)).detach()
    torch.testing.assert_close(found.logits, whole[:, 2:-1], rtol=1e-9, atol=1e-9)
    own = found.logits.log_softmax(-1).gather(-1, found.new_tokens[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs, own)
    assert generated(model, tokens, 4).logits is None
