"""The realised-depth view on every family: what holds, and what it refuses and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_lens.tools.analysis as tools
from helpers import FAMILIES, hook_count, make, noise_like, parity
from patching_helpers import CASES, assert_same, case, run_clean, short_prompts
from transformer_lens import patching
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

from tl_looped.engine.errors import InputError
from tl_looped.engine.schedule import CODA, CORE, PRELUDE

# What it is.


@pytest.mark.parametrize("name", CASES)
def test_the_view_meets_transformerlenss_protocols(name: str) -> None:
    model = case(name)
    unrolled = model.unrolled(3)
    assert isinstance(unrolled, TransformerLensModel)
    assert isinstance(unrolled, TransformerLensModelWithWeights)
    cfg = model.cfg
    assert unrolled.cfg.n_layers == cfg.n_prelude + 3 * cfg.n_core + cfg.n_coda == len(unrolled.blocks)
    wanted = [*getattr(model.transformer, PRELUDE), *list(getattr(model.transformer, CORE)) * 3]
    wanted += getattr(model.transformer, CODA)
    assert all(block is module for block, module in zip(unrolled.blocks, wanted, strict=True))
    assert unrolled.W_U.data_ptr() == model.transformer.unembed.weight.data_ptr()
    assert unrolled.blocks[-1].attn.W_O.data_ptr() == wanted[-1].attn.o.weight.data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_the_view_runs_the_looped_model(name: str) -> None:
    model = case(name)
    unrolled = model.unrolled(3)
    clean, _ = short_prompts(model)
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(clean)
        assert torch.equal(logits, model(clean, 3))
        assert torch.equal(unrolled(clean, return_type="loss"), model(clean, 3, return_type="loss"))
    ours = run_clean(model, clean, 3)
    for d, (stack, layer, loop) in enumerate(unrolled.names.schedule.layer_calls()):
        key = ("resid_post", layer, loop) if stack == CORE else (f"{stack}.resid_post", layer)
        assert torch.equal(cache["resid_post", d], ours[key])
    assert set(cache.keys()) == {name for name in unrolled.hook_dict if "hook_result" not in name}


def test_a_seed_and_a_state_of_the_view_are_those_of_its_runs() -> None:
    model = parity("huginn")
    clean, _ = short_prompts(model)
    with torch.no_grad():
        state = model(clean, stop_at_loop=1)
        assert torch.equal(model.unrolled(2, seed=3)(clean), model(clean, 2, seed=3))
        assert torch.equal(model.unrolled(2, initial_state=state)(clean), model(clean, 2, initial_state=state))
        assert torch.equal(model.unrolled(2)(clean, seed=4), model(clean, 2, seed=4))


# Where it can't hold, it says why.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("huginn", "its layers normalise the residual stream itself"),
        ("ouro", "the residual stream is normalised between loops"),
        ("retrofit-llama", "the prelude's output is mixed in again in every loop"),
        ("retrofit-olmo2", "the prelude's output is mixed in again in every loop"),
        ("added", "the prelude's output is mixed in again in every loop"),
    ],
)
def test_sums_that_do_not_hold_are_refused(name: str, reason: str) -> None:
    model = case(name)
    _, cache = model.unrolled(2).run_with_cache(short_prompts(model)[0])
    for part in (cache, cache.apply_slice_to_batch_dim(0)):
        for method in ("decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
            with pytest.raises(InputError, match=f"{method} adds up .* {model.cfg.family} model: {reason}"):
                getattr(part, method)()
        with pytest.raises(InputError, match=reason):
            part.stack_neuron_results(1)
    with pytest.raises(InputError, match=reason):
        tools.direct_logit_attribution(model.unrolled(2), short_prompts(model)[0], 3)
    assert cache.accumulated_resid(incl_mid=True).shape[0] == 2 * model.unrolled(2).cfg.n_layers + 1


@pytest.mark.parametrize(
    ("changes", "n_loops", "reason"),
    [
        ({"n_coda": 1, "loop_norm": "each"}, 1, "normalised before the coda"),
        ({"n_coda": 1, "loop_norm": "last"}, 2, "normalised before the coda"),
    ],
)
def test_sums_of_other_choices_are_refused(changes: dict[str, Any], n_loops: int, reason: str) -> None:
    model = make(**changes)
    _, cache = model.unrolled(n_loops).run_with_cache(short_prompts(model)[0])
    with pytest.raises(InputError, match=reason):
        cache.decompose_resid()


def test_sums_of_a_run_from_a_given_state_are_refused() -> None:
    model, clean = case("bare"), short_prompts(case("bare"))[0]
    state = noise_like(model(clean, stop_at_loop=1))
    for unrolled, options in ((model.unrolled(initial_state=state), {}), (model.unrolled(), {"initial_state": state})):
        _, cache = unrolled.run_with_cache(clean, **options)
        with pytest.raises(InputError, match="its loops started from a state that was given"):
            cache.decompose_resid()


def test_one_loop_of_ouro_adds_up_but_not_by_head() -> None:
    model = parity("ouro")
    clean, _ = short_prompts(model)
    with torch.no_grad():
        logits, cache = model.unrolled(1).run_with_cache(clean)
        assert_same("sum", cache.decompose_resid().sum(0), cache["resid_post", -1])
        assert_same("logit", cache.logit_attrs(cache.decompose_resid(), 3).sum(0), logits[..., 3])
    for method in ("stack_head_results", "get_full_resid_decomposition"):
        with pytest.raises(InputError, match=f"{method} splits attention by head, but a norm after attention"):
            getattr(cache, method)()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "huginn"])
def test_the_heads_of_post_norm_families_have_no_norm_before_a_layer(name: str) -> None:
    model = parity(name)
    _, cache = model.unrolled(2).run_with_cache(short_prompts(model)[0])
    if model.cfg.norm_placement == "output":
        with pytest.raises(KeyError, match="Layer 1 has no ln1"):
            cache.accumulated_resid(layer=1, apply_ln=True)
    else:
        assert cache.accumulated_resid(layer=1, apply_ln=True).shape[0] == 2


@pytest.mark.parametrize("name", ["ouro", "ouro-gqa"])
def test_ouros_last_closing_norm_is_the_views_final_norm(name: str) -> None:
    model = parity(name)
    clean, _ = short_prompts(model)
    unrolled = model.unrolled(3)
    with torch.no_grad():
        logits, cache = unrolled.run_with_cache(clean)
        ours = run_clean(model, clean, 3)
        assert torch.equal(cache["ln_final.hook_scale"], ours["loop.2.ln_loop.hook_scale"])
        assert torch.equal(cache["loop.1.ln_loop.hook_scale"], ours["loop.1.ln_loop.hook_scale"])
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)
        assert_same("tool", tools.logit_lens(unrolled, clean, positions=None).values[-1], logits)
    seen = []
    unrolled.run_with_hooks(clean, fwd_hooks=[("ln_final.hook_scale", lambda x, hook: seen.append(hook.name))])
    assert seen == ["ln_final.hook_scale"]
    _, only = unrolled.run_with_cache(clean, names_filter="ln_final.hook_scale")
    assert list(only.keys()) == ["ln_final.hook_scale"]


@pytest.mark.parametrize("name", CASES)
def test_the_logit_lens_of_the_last_layer_gives_the_logits(name: str) -> None:
    model = case(name)
    with torch.no_grad():
        logits, cache = model.unrolled(2).run_with_cache(short_prompts(model)[0])
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)


def test_a_last_norm_before_a_head_without_one_is_the_views_final_norm() -> None:
    model = make(loop_norm="last", final_norm=False)
    with torch.no_grad():
        logits, cache = model.unrolled(2).run_with_cache(short_prompts(model)[0])
        assert "ln_final.hook_scale" in cache
        assert_same("lens", cache.logit_lens(positions=None).values[-1], logits)
        assert_same("logit", cache.logit_attrs(cache.decompose_resid(), 3).sum(0), logits[..., 3])


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"final_norm": False}, "no norm"),
        ({"final_norm": False, "loop_norm": "last", "n_coda": 1}, "no norm"),
        ({"final_norm": True, "loop_norm": "last"}, "two norms"),
    ],
)
def test_a_head_that_does_not_read_through_one_norm_is_refused(changes: dict[str, Any], how: str) -> None:
    model = make(**changes)
    _, cache = model.unrolled(1).run_with_cache(short_prompts(model)[0])
    with pytest.raises(
        InputError, match=f"reads the last layer's output through {how}. Read states with looped.readout"
    ):
        cache.accumulated_resid(apply_ln=True)
    with pytest.raises(ValueError, match="exposes no `ln_final` component"):
        cache.logit_lens()
    assert cache.accumulated_resid(layer=1, apply_ln=True).shape[0] == 2


def test_direct_path_patching_is_refused_with_what_to_use() -> None:
    for model in (case("bare").unrolled(2), parity("huginn").unrolled(2), parity("ouro").unrolled(2)):
        clean, corrupted = short_prompts(model.looped)
        caches = (model.run_with_cache(tokens)[1] for tokens in (clean, corrupted))
        with pytest.raises(InputError, match="hook_q_input.*use tl_looped.patching.path_patch"):
            patching.get_act_patch_direct_path(model, corrupted, *caches, lambda logits: logits.sum(), 0, 0)
        assert hook_count(model.looped) == 0


def test_transformerlenss_patching_on_the_looped_model_itself_is_an_error_and_no_number() -> None:
    model = parity("ouro")
    clean, corrupted = short_prompts(model)
    cache = run_clean(model, clean)
    with pytest.raises(AttributeError, match="a looped model has no single n_layers: ask cfg.n_prelude"):
        patching.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits.sum())
