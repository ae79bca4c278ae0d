"""Every family by the same battery: the public code's stored numbers, and identities that no weights excuse.

Ouro and the Raven family, which came first, have more tests of their own in test_parity.py; here are those since.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import PARITY, expected, fired, hook_count, noise_like
from torch import Tensor

from tl_looped import InputError, LoopedCache, LoopedModel
from tl_looped.report import check

ABSOLUTE = 1e-4
RELATIVE = 2e-5  # of the largest value
FOLDERS = ("ff-llama", "ff-mistral", "ff-qwen2", "ff-qwen3", "ff-gemma2", "ff-gemma3", "ff-gpt2", "nanochat")
FOLDERS += ("nanochat-recursive", "looped-nanochat", "base-loop", "hrm-text")
LOOPS = 3

# Stored key -> what gives it.
STACKED = {"resid_post": "resid_post", "pattern": "pattern", "state_post": "state_post", "injection_out": "injection"}
STACKED |= {"attn_out": "attn_out", "mlp_out": "mlp_out"}
ENDS = {"resid_post": "hook_resid_post", "pattern": "attn.hook_pattern"}
# What the published cache computes, in which all loops of a layer share one slot; here a slot a loop is the policy.
# (And HRM-Text's gradients, which its public code cuts at the last cycles: ours are held to finite differences.)
OTHER_CACHE = ("decode", "generated_greedy", "warm_full")
TOKENS = ("input_ids", "loop_layers", "token_type_ids")
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")

stored = [
    (folder, key)
    for folder in FOLDERS
    for key in expected(folder)
    if key not in TOKENS and not key.startswith(OTHER_CACHE) and not key.endswith("grad_embed_unscaled")
]
every_folder = pytest.mark.parametrize("folder", FOLDERS)


@lru_cache
def load(folder: str, dtype: torch.dtype = torch.float32, looped: bool = True) -> LoopedModel:
    """The folder's model; a feedforward one looped as the reference was, unless it is asked for as it is."""
    layers = expected(folder).get("loop_layers")
    options: dict[str, Any] = {}
    if layers is not None and looped:
        options = {"loop_layers": tuple(layers.tolist()), "n_loops": len(expected(folder)["resid_post"])}
    return LoopedModel.from_pretrained(PARITY / folder, dtype=dtype, **options)


@lru_cache
def ran(folder: str, looped: bool = True) -> tuple[LoopedModel, Tensor, LoopedCache]:
    """The model, its logits and everything in its cache, at the largest loop count stored."""
    model = load(folder, looped=looped)
    loops = len(expected(folder)["resid_post"]) if looped and "resid_post" in expected(folder) else None
    with torch.no_grad():
        logits, cache = model.run_with_cache(expected(folder)["input_ids"], loops)
    return model, logits, cache


@lru_cache
def ran_with_prefix(folder: str) -> tuple[LoopedModel, Tensor, LoopedCache]:
    """The same with the stored prefixes, whose tokens see each other in both directions."""
    model, stored = load(folder), expected(folder)
    with torch.no_grad():
        logits, cache = model.run_with_cache(stored["input_ids"], token_type_ids=stored["token_type_ids"])
    return model, logits, cache


def of_two_stacks(folder: str, key: str) -> Tensor:
    """What a model of two stacks computes for a stored key: "causal." or "prefix.", and "L_" or "H_" for the stack."""
    how, _, key = key.partition(".")
    model, logits, cache = {"causal": ran, "prefix": ran_with_prefix, "prefix_all": ran}[how](folder)
    if key == "logits":
        return logits
    if key == "generated":
        length = expected(folder)["input_ids"].shape[1]
        new = expected(folder)["prefix_all.generated"].shape[1] - length
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        return model.generate(expected(folder)["input_ids"][:1], new, prefix_length=length, **options)
    stack, name = f"{key[0]}_blocks", {"stack_in": "injection", "stack_out": "state_post"}.get(key[2:], key[2:])
    return cache.stack(f"{stack}.{name}")


def without_injection(model: LoopedModel) -> LoopedModel:
    """The recursive nanochat whose injection hands on the state alone, as the paper's variant without it."""
    copied = LoopedModel.from_pretrained(PARITY / "nanochat-recursive")
    d = model.cfg.d_model
    with torch.no_grad():
        copied.transformer.injection.weight.copy_(torch.cat((torch.zeros(d, d), torch.eye(d)), dim=1))
    return copied


def ours(folder: str, key: str) -> Tensor:
    """What our model computes for a stored key."""
    tokens, wanted = expected(folder)["input_ids"], expected(folder)[key]
    model, logits, cache = ran(folder)
    if model.cfg.two_states is not None:
        return of_two_stacks(folder, key)
    if key.startswith("noinject."):
        model, key = without_injection(model), key.removeprefix("noinject.")
        logits, cache = model.run_with_cache(tokens, 6)
    if key in (
        "logits",
        "hidden_states",
        "layer_resid_post",
        "layer_pattern",
        "layer0_in",
        "final_norm_out",
        "ln_f_out",
    ):
        if "loop_layers" in expected(folder):
            model, logits, cache = ran(folder, looped=False)
        if key == "logits":
            return logits
    with torch.no_grad():
        if key == "logits.default":
            return model(tokens)
        if key.startswith("logits.T"):
            return model(tokens, n_loops=int(key[8:]))
        if key == "logits_per_iteration":
            return torch.stack([model.readout(state, tokens) for state in cache.stack("state_post")])
        if key in ("final_norm_out", "norm_f_out"):
            return model.transformer.ln_final.affine(cache["ln_final.hook_normalized"])
        if key == "logits_before_softcap":
            x = model.transformer.ln_final.affine(cache["ln_final.hook_normalized"])
            return x @ model.transformer.unembed.weight.T
    if key in STACKED:
        return cache.stack(STACKED[key])
    if key in ("layer_resid_post", "layer_pattern"):
        return cache.stack(key.removeprefix("layer_"))[0]
    if key in ("layer0_in", "embed_normed"):
        name = "prelude.0" if model.cfg.n_prelude else "blocks.0.loop.0"
        return cache[f"{name}.hook_resid_pre"]
    if key == "embed":
        return cache["blocks.0.loop.0.hook_resid_pre"]
    if key == "hidden_states":
        last = model.transformer.ln_final.affine(cache["ln_final.hook_normalized"])
        return torch.cat((cache["resid_pre", 0, 0][None], cache.stack("resid_post")[0][:-1], last[None]))
    stack, _, rest = key.partition("_")
    assert stack in ("prelude", "coda"), f"{key} is stored, but no test knows it"
    return torch.stack([cache[f"{stack}.{layer}.{ENDS[rest]}"] for layer in range(len(wanted))])


@pytest.mark.parametrize(("folder", "key"), stored)
def test_every_stored_number(folder: str, key: str):
    found, wanted = ours(folder, key).detach(), expected(folder)[key]
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max())
    assert error <= ABSOLUTE
    assert error <= RELATIVE * max(1.0, float(wanted.abs().max()))


@every_folder
def test_what_differs_is_rounding_in_float32(folder: str):
    """In float64 our model is as near to the reference as the reference's own float32 allows."""
    key = max(key for key in expected(folder) if key.startswith(("logits.T", "causal.logits")))
    loops = int(key[8:]) if key.startswith("logits.T") else None
    with torch.no_grad():
        found = load(folder, torch.float64)(expected(folder)["input_ids"], n_loops=loops)
    assert float((found - expected(folder)[key]).abs().max()) <= RELATIVE * float(expected(folder)[key].abs().max())


@every_folder
def test_stopping_after_each_loop_is_reading_out_each_state(folder: str):
    model, tokens = load(folder), expected(folder)["input_ids"]
    with torch.no_grad():
        state = model(tokens, n_loops=LOOPS, stop_at_loop=2)
        assert torch.equal(model(tokens, n_loops=2), model.readout(state, tokens))
        resumed = model(tokens, n_loops=LOOPS, initial_state=state, start_at_loop=2)
        assert torch.equal(resumed, model(tokens, n_loops=LOOPS))


@every_folder
def test_generation_with_the_cache_is_generation_without(folder: str):
    """Greedily, and longer than any window; rows of different length too."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"][:, :8]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options: dict[str, Any] = {"n_loops": LOOPS, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for given in ({}, {"attention_mask": mask}):
        cached, whole = (
            model.generate(tokens, 5, **options, **given, use_past_kv_cache=cache) for cache in (True, False)
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
        for name in cache:
            edit = [(name, lambda x, hook: x + 0.1 * noise_like(x))]
            assert not torch.equal(model.run_with_hooks(tokens, loops, fwd_hooks=edit), plain), name


@every_folder
def test_patterns_sum_to_one_and_see_no_future(folder: str):
    model, _, cache = ran(folder)
    for stack in model.cfg.looping:
        pattern = cache.stack(f"{stack}.pattern")
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        assert torch.equal(pattern, pattern.tril())


@every_folder
def test_gradients_predict_finite_differences(folder: str):
    """Of a weight of every kind, and of an activation in the middle of a loop."""
    model, tokens = load(folder, torch.float64), expected(folder)["input_ids"]

    def loss() -> float:
        with torch.no_grad():
            return float(model(tokens, n_loops=LOOPS, return_type="loss"))

    model.zero_grad()
    model(tokens, n_loops=LOOPS, return_type="loss").backward()
    kinds = {name.replace(".1.", ".0."): (name, weight) for name, weight in model.transformer.named_parameters()}
    for name, weight in kinds.values():
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
        assert torch.equal(copy(tokens), model(tokens))


@every_folder
def test_its_own_check_passes(folder: str):
    assert [one for one in check(load(folder), n_loops=LOOPS) if not one.passed] == []


@every_folder
def test_every_part_is_said_in_words(folder: str):
    words = dict(load(folder).cfg.describe())
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
