"""The realised-depth view against feedforward models with copied weights: one of our own, and transformers' Llama in
TransformerLens's own bridge."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformer_lens.tools.analysis as tools
from helpers import hook_count, make, word_tokenizer
from patching_helpers import assert_same, short_prompts
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM

from tl_looped import LoopedModel
from tl_looped.engine.errors import HookNameError
from tl_looped.engine.view import UnrolledModel

LOOPS = 2
FEW = {"n_heads": 2, "d_head": 8, "n_key_value_heads": 1}


@lru_cache
def looped() -> LoopedModel:
    """(1, 2 x 2 loops, 1), pre-norm, nothing injected: a feedforward model of six layers but for the shared weights."""
    return make(n_prelude=1, n_core=2, n_coda=1, n_loops=LOOPS, tokenizer=word_tokenizer(), **FEW)


@lru_cache
def view() -> UnrolledModel:
    return looped().unrolled()


@lru_cache
def copied() -> UnrolledModel:
    """A native model with as many core layers as the view is deep, run once, with the weights copied in."""
    deep = make(n_core=view().cfg.n_layers, n_loops=1, **FEW)
    with torch.no_grad():
        for name in ("embed", "ln_final", "unembed"):
            getattr(deep.transformer, name).load_state_dict(getattr(looped().transformer, name).state_dict())
        for mine, theirs in zip(deep.transformer.blocks, view().blocks, strict=True):
            mine.load_state_dict({name: weight.clone() for name, weight in theirs.state_dict().items()})
    return deep.unrolled()


@lru_cache
def bridge(folded: bool = False) -> TransformerBridge:
    """transformers' own Llama with the weights copied in, in TransformerLens's bridge; without the hub."""
    cfg = looped().cfg
    sizes = {"hidden_size": cfg.d_model, "intermediate_size": cfg.d_mlp, "num_hidden_layers": view().cfg.n_layers}
    sizes |= {"num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.d_head}
    sizes |= {"vocab_size": cfg.d_vocab, "max_position_embeddings": cfg.n_ctx}
    other = {"rms_norm_eps": cfg.eps, "rope_theta": cfg.rotary.base, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **other)
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight.copy_(looped().W_E)
        llama.lm_head.weight.copy_(looped().W_U.T)
        llama.model.norm.weight.copy_(looped().transformer.ln_final.weight)
        for theirs, ours in zip(llama.model.layers, view().blocks, strict=True):
            theirs.input_layernorm.weight.copy_(ours.ln1.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.ln2.weight)
            for part in "qkvo":
                getattr(theirs.self_attn, f"{part}_proj").weight.copy_(getattr(ours.attn, part).weight)
            for part in ("gate", "up", "down"):
                getattr(theirs.mlp, f"{part}_proj").weight.copy_(getattr(ours.mlp, part).weight)
    built = build_bridge_from_module(llama, "LlamaForCausalLM", hf_config=config)
    if folded:
        only_norms = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
        built.enable_compatibility_mode(fold_ln=True, **only_norms)
    return built


@lru_cache
def caches() -> tuple[ActivationCache, ActivationCache, ActivationCache]:
    """The clean prompts' caches of the view, of the copy, and of the bridge."""
    clean, _ = short_prompts(looped())
    with torch.no_grad():
        return tuple(model.run_with_cache(clean)[1] for model in (view(), copied(), bridge()))


# The same numbers as a feedforward model.


def test_the_copies_compute_what_the_view_computes() -> None:
    ours, native, hub = caches()
    for name, tensor in native.items():
        if not name.startswith(("loop.", "hook_state")):
            assert_same(name, ours[name], tensor)
    shared = [name for name in ours if name in hub.cache_dict and "scores" not in name]
    assert len(shared) == 3 + 19 * 6  # the embedding, two of the final norm, and 19 in every layer
    for name in shared:
        assert_same(name, ours[name], hub[name])


_PATCHES = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "block_every"]
_PATCHES += [
    f"attn_head_{part}_{where}" for part in ("out", "q", "k", "v", "pattern") for where in ("by_pos", "all_pos")
]
_PATCHES += ["attn_head_pattern_dest_src_pos", "attn_head_by_pos_every", "attn_head_all_pos_every"]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", _PATCHES)
def test_every_patching_function_gives_the_numbers_of_a_feedforward_model(name: str) -> None:
    _, corrupted = short_prompts(looped())
    function = getattr(patching, f"get_act_patch_{name}")
    ours, native, hub = zip((view(), copied(), bridge()), caches(), strict=True)
    results = []
    for model, cache in (ours, hub) if "_every" in name or "src" in name else (ours, native, hub):
        with torch.no_grad():
            results.append(function(model, corrupted, cache, lambda logits: logits[:, -1, 3].sum()))
    assert results[0].std() > 1e-3  # the patches do something
    for other in results[1:]:
        assert_same(name, results[0], other)


def test_no_patching_function_was_forgotten() -> None:
    there = {name.removeprefix("get_act_patch_") for name in dir(patching) if name.startswith("get_act_patch_")}
    assert there - {"direct_path", "direct_path_all_sources"} == set(_PATCHES)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("options", [{"reduce": "none"}, {"reduce": "mean", "baseline": True}, {"baseline": True}])
def test_results_of_generic_activation_patch_are_those_of_a_feedforward_model(options: dict[str, Any]) -> None:
    _, corrupted = short_prompts(looped())
    scalar = options.get("reduce", "scalar") == "scalar"
    metrics: dict[str, Callable[[Tensor], Tensor]] = {
        "one": lambda logits: logits[:, -1, 3].mean() if scalar else logits[:, -1, 3],
        "other": lambda logits: logits[:, 0, 1].mean() if scalar else logits[:, 0, 1],
    }
    results = []
    for model, cache in zip((view(), bridge()), (caches()[0], caches()[2]), strict=True):
        with torch.no_grad():
            results.append(patching.get_act_patch_resid_pre(model, corrupted, cache, metrics, **options))
    ours, theirs = results
    assert ours.index_df.equals(theirs.index_df)
    assert ours.axis_names == theirs.axis_names and ours.metric_names == theirs.metric_names
    assert_same("values", ours.values, theirs.values)
    assert (ours.baseline is None) == (theirs.baseline is None)
    if ours.baseline is not None:
        assert_same("effect", ours.effect(), theirs.effect())


_ONTO = torch.ones(16)
_CACHE_CALLS: list[tuple[str, dict[str, Any]]] = [
    *[("accumulated_resid", o) for o in ({}, {"incl_mid": True, "return_labels": True}, {"layer": 3}, {"layer": 0})],
    *[("accumulated_resid", {"apply_ln": True, **o}) for o in ({}, {"layer": 3, "mlp_input": True}, {"pos_slice": -1})],
    *[("decompose_resid", o) for o in ({"return_labels": True}, {"layer": 3}, {"incl_embeds": False})],
    *[("decompose_resid", {"apply_ln": True, **o}) for o in ({"mode": "attn"}, {"layer": 2, "mlp_input": True})],
    *[("stack_head_results", o) for o in ({"return_labels": True}, {"layer": 2, "incl_remainder": True})],
    *[("stack_head_results", o) for o in ({"apply_ln": True}, {"pos_slice": -1})],
    *[("stack_neuron_results", {"layer": 3, **o}) for o in ({"apply_ln": True}, {"project_output_onto": _ONTO})],
    *[("get_full_resid_decomposition", o) for o in ({"return_labels": True}, {"apply_ln": True}, {"layer": 2})],
    *[("get_full_resid_decomposition", {"expand_neurons": False, "project_output_onto": _ONTO})],
    *[("get_neuron_results", {"layer": 4, "pos_slice": -1})],
    *[("stack_activation", o) for o in ({"activation_name": "pattern"}, {"activation_name": "z", "layer": 3})],
    ("stack_activation", {"activation_name": "scale", "sublayer_type": "ln1"}),
]


@pytest.mark.parametrize(("method", "options"), _CACHE_CALLS)
def test_activation_cache_functions_give_the_numbers_of_a_feedforward_model(
    method: str, options: dict[str, Any]
) -> None:
    with torch.no_grad():
        ours, native, hub = (getattr(cache, method)(**options) for cache in caches())
    assert_same(method, ours, native)
    assert_same(method, ours, hub)


def test_logit_lens_gives_the_numbers_of_a_feedforward_model() -> None:
    clean, _ = short_prompts(looped())
    with torch.no_grad():
        ours, native, hub = (cache.logit_lens(incl_mid=True, positions=None) for cache in caches())
        assert_same("logit_lens", (ours.values, ours.labels), (native.values, native.labels))
        assert_same("logit_lens", (ours.values, ours.labels), (hub.values, hub.labels))
        assert_same("the last entry", ours.values[-1], view()(clean))
        run = [tools.logit_lens(model, clean, top_k=3).values for model in (view(), bridge())]
        assert_same("tools.logit_lens", *run)


def test_the_parts_of_the_residual_stream_add_up() -> None:
    clean, _ = short_prompts(looped())
    cache = caches()[0]
    last = cache["resid_post", -1]
    with torch.no_grad():
        logits = view()(clean)
        assert_same("decompose_resid", cache.decompose_resid().sum(0), last)
        assert_same("full", cache.get_full_resid_decomposition().sum(0), last)
        for stack in (cache.decompose_resid(), cache.stack_head_results(incl_remainder=True)):
            parts = cache.logit_attrs(stack, clean)
            assert_same("logit_attrs", parts.sum(0), logits.gather(-1, clean[..., None])[..., 0])


@pytest.mark.parametrize(
    "tokens", [3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 4]), torch.ones(2, 3).long()]
)
def test_logit_attrs_are_those_of_a_bridge_with_its_norms_folded_in(tokens: Any) -> None:
    clean, _ = short_prompts(looped())
    with torch.no_grad():
        folded = bridge(folded=True).run_with_cache(clean)[1]
        assert_same(
            "directions",
            view().tokens_to_residual_directions(tokens),
            bridge(folded=True).tokens_to_residual_directions(tokens),
        )
        ours, theirs = (cache.logit_attrs(cache.decompose_resid(), tokens) for cache in (caches()[0], folded))
    assert_same("logit_attrs", ours, theirs)


def test_other_tools_give_the_numbers_of_a_bridge() -> None:
    clean, corrupted = short_prompts(looped())
    ours, theirs = (
        tools.attribution_patch(model, clean[:1], corrupted[:1], lambda logits: logits[0, -1, 3]).node_scores
        for model in (view(), bridge())
    )
    assert [str(node) for node in ours] == [str(node) for node in theirs]
    assert_same("attribution", torch.tensor(list(ours.values())), torch.tensor(list(theirs.values())))
    dla = tools.direct_logit_attribution(view(), clean, 3, unit="head")
    with torch.no_grad():
        assert_same("direct_logit_attribution", dla.attribution.sum(0), view()(clean)[:, -1, 3])
    assert detect_head(view(), "a b a b", "previous_token_head").shape == (6, 2)


def test_weights_read_from_the_view_are_those_of_a_bridge() -> None:
    assert_same("W_E", view().W_E, bridge().W_E)
    assert_same("W_U", view().W_U, bridge().W_U)
    assert_same("b_U", view().b_U, bridge().b_U)
    for layer in (0, 4):
        assert_same("bias", view().accumulated_bias(layer), bridge().accumulated_bias(layer))
        for part in ("W_Q", "W_O"):
            assert_same(part, getattr(view().blocks[layer].attn, part), getattr(bridge().blocks[layer].attn, part))
        assert_same("W_out", view().blocks[layer].mlp.W_out, bridge().blocks[layer].mlp.W_out)


# Names and hooks.


def test_hooks_act_at_one_realised_depth_under_the_views_names() -> None:
    clean, _ = short_prompts(looped())
    seen: list[tuple[str, int, int | None]] = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append((hook.name, hook.layer(), hook.loop))

    names = ["blocks.0.hook_resid_pre", "blocks.2.attn.hook_z", "blocks.4.hook_resid_post", "blocks.5.mlp.hook_post"]
    view().run_with_hooks(clean, fwd_hooks=[(name, look) for name in names])
    assert seen == [(names[0], 0, None), (names[1], 2, 0), (names[2], 4, 1), (names[3], 5, None)]
    seen.clear()
    view().run_with_hooks(clean, fwd_hooks=[(lambda name: name.endswith("attn.hook_pattern"), look)])
    assert [depth for _, depth, _ in seen] == list(range(6))
    with view().hooks(fwd_hooks=[(names[1], look)]):
        view()(clean)
    view().add_hook(names[1], look)
    assert hook_count(looped()) == 1
    view().reset_hooks()
    assert hook_count(looped()) == 0
    view().add_perma_hook(names[1], look)
    view().remove_all_hook_fns()
    assert hook_count(looped()) == 1
    view().remove_all_hook_fns(including_permanent=True)
    view().clear_contexts()
    assert hook_count(looped()) == 0


def test_an_edit_and_a_gradient_are_those_of_the_bridge() -> None:
    clean, _ = short_prompts(looped())
    name, grads = "blocks.3.attn.hook_z", []

    def double(x: Tensor, hook: Any) -> Tensor:
        return 2 * x

    def keep(grad: Tensor, hook: Any) -> None:
        grads.append(grad)

    edited = [model.run_with_hooks(clean, fwd_hooks=[(name, double)]) for model in (view(), bridge())]
    assert_same("edit", *edited)
    assert not torch.allclose(edited[0], view()(clean), atol=1e-3)
    for model in (view(), bridge()):
        with model.hooks(bwd_hooks=[(name, keep)]):
            model(clean)[:, -1, 3].sum().backward()
    assert_same("gradient", *grads)
    looped().zero_grad()


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"]),
        (["blocks.5.hook_resid_post", "hook_embed"], ["blocks.5.hook_resid_post", "hook_embed"]),
        (lambda name: name.startswith("blocks.4.ln1"), ["blocks.4.ln1.hook_normalized", "blocks.4.ln1.hook_scale"]),
        ("loop.1.hook_state_pre", ["loop.1.hook_state_pre"]),
    ],
)
def test_a_names_filter_takes_the_views_names(names_filter: Any, expected: list[str]) -> None:
    _, cache = view().run_with_cache(short_prompts(looped())[0], names_filter=names_filter)
    assert sorted(cache.keys()) == expected


def test_negative_layers_count_from_the_end_of_the_view() -> None:
    cache = caches()[0]
    assert torch.equal(cache["resid_post", -1], cache["blocks.5.hook_resid_post"])
    assert torch.equal(cache["z", -6, "attn"], cache["blocks.0.attn.hook_z"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.6.hook_resid_pre", "this view has 6 layers"),
        ("prelude.0.hook_resid_pre", "counts all layers as blocks"),
        ("blocks.0.loop.1.hook_resid_pre", "counts all layers as blocks"),
        ("blocks.1.attn.hook_zz", r"no hook point 'blocks.1.attn.hook_zz'. Nearest: 'blocks.1.attn.hook_z'"),
    ],
)
def test_a_name_that_the_view_does_not_have_is_an_error(name: str, message: str) -> None:
    with pytest.raises(HookNameError, match=message):
        view().run_with_hooks(torch.zeros(1, 3).long(), fwd_hooks=[(name, lambda x, hook: None)])
