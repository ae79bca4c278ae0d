"""The realised-depth view against transformers' Llama with copied weights, in TransformerLens's own bridge."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers import hook_count, make, tiny, tokens_for, word_tokenizer
from patching_helpers import assert_same, short_prompts
from torch import Tensor, nn
from transformer_lens import ActivationCache, patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights
from unrolled_tools import llama_bridge

from tl_looped import LoopedModel
from tl_looped.engine.errors import HookNameError, InputError
from tl_looped.unrolled import UnrolledModel

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
def bridge(folded: bool = False) -> TransformerBridge:
    """transformers' Llama with the same weights; folded: its norms are."""
    built = llama_bridge(looped(), LOOPS)
    if folded:
        only_norms = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
        built.enable_compatibility_mode(fold_ln=True, **only_norms)
    return built


@lru_cache
def caches() -> tuple[ActivationCache, ActivationCache]:
    """The clean prompts' caches of the view and of the bridge."""
    clean, _ = short_prompts(looped())
    with torch.no_grad():
        return view().run_with_cache(clean)[1], bridge().run_with_cache(clean)[1]


# The same numbers as a feedforward model.


def test_every_hook_point_of_a_bridge_is_there_with_the_same_values() -> None:
    ours, theirs = caches()
    angles = {n for n in theirs if n.startswith(("rotary_emb.", "hook_pos_embed")) or n.endswith(("_cos", "_sin"))}
    assert set(theirs.keys()) - set(ours.keys()) == angles
    more = set(ours.keys()) - set(theirs.keys())
    assert all(name.startswith(("loop.", "state_init.", "hook_state_init")) for name in more)
    for name in set(theirs.keys()) & set(ours.keys()):
        seen = ours[name].isfinite()  # TransformerLens hides keys by the lowest number
        assert bool((theirs[name][~seen] < -1e30).all()) and ours[name].shape == theirs[name].shape
        assert_same(name, ours[name][seen], theirs[name][seen])


# hook_resid_mid of TransformerLens's own bridges is on the way to the MLP only, so it is no reference for writing.
_PATCHES = ["resid_pre", "attn_out", "mlp_out", "attn_head_pattern_dest_src_pos"]
_PATCHES += [
    f"attn_head_{part}_{where}" for part in ("out", "q", "k", "v", "pattern") for where in ("by_pos", "all_pos")
]
_OTHERS = {"resid_mid", "block_every", "attn_head_by_pos_every", "attn_head_all_pos_every"}  # stacks of those above
_OTHERS |= {"direct_path", "direct_path_all_sources"}  # for heads of their own; see test_unrolled_tools.py


@lru_cache
def small() -> tuple[UnrolledModel, TransformerBridge]:
    """A view of three layers, with keys and values of one head, and the bridge."""
    model = make(n_core=1, n_coda=1, n_loops=LOOPS, **FEW)
    return model.unrolled(), llama_bridge(model, LOOPS)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", _PATCHES)
def test_every_patching_function_gives_the_numbers_of_a_feedforward_model(name: str) -> None:
    clean, corrupted = short_prompts(small()[0].looped)
    function = getattr(patching, f"get_act_patch_{name}")
    with torch.no_grad():
        ours, theirs = (
            function(model, corrupted, model.run_with_cache(clean)[1], lambda logits: logits[:, -1, 3].sum())
            for model in small()
        )
    assert ours.std() > 1e-3  # the patches do something
    assert_same(name, ours, theirs)


def test_no_patching_function_was_forgotten() -> None:
    there = {name.removeprefix("get_act_patch_") for name in dir(patching) if name.startswith("get_act_patch_")}
    assert there - _OTHERS == set(_PATCHES)


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
        ours, theirs = (getattr(cache, method)(**options) for cache in caches())
    assert_same(method, ours, theirs)


@lru_cache
def folded() -> UnrolledModel:
    """A view whose norms are folded in."""
    made = looped().unrolled()
    made.enable_compatibility_mode()
    return made


@pytest.mark.parametrize(
    "tokens", [3, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 4]), torch.ones(2, 3).long()]
)
def test_logit_attrs_are_those_of_a_bridge_and_add_up(tokens: Any) -> None:
    clean, _ = short_prompts(looped())
    other = llama_bridge(looped(), LOOPS, folded=True)
    with torch.no_grad():
        ours, theirs = (model.run_with_cache(clean)[1] for model in (folded(), other))
        parts = ours.logit_attrs(ours.decompose_resid(), tokens)
        assert_same("logit_attrs", parts, theirs.logit_attrs(theirs.decompose_resid(), tokens))
        if isinstance(tokens, int):
            assert_same("sum", parts.sum(0), folded()(clean)[..., tokens])


def test_weights_read_from_the_view_are_those_of_a_bridge() -> None:
    for part in ("W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"):
        assert_same(part, getattr(view(), part), getattr(bridge(), part))
    ours, theirs = view().tl_parameters(), bridge().tl_parameters()
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert_same(name, weight, theirs[name])
    wanted = {name: weight for name, weight in bridge().state_dict().items() if name != "unembed.bias"}
    assert set(view().state_dict()) == {name for name in wanted if "rotary" not in name}
    assert view().n_params_total == sum(weight.numel() for weight in looped().parameters())
    assert view().all_head_labels == bridge().all_head_labels and "mamba" not in "".join(view().layer_types())


def test_a_view_is_a_transformer_lens_model() -> None:
    assert isinstance(view(), TransformerBridge) and not isinstance(view(), LoopedModel)
    assert isinstance(view(), TransformerLensModel) and isinstance(view(), TransformerLensModelWithWeights)
    assert view().cfg.n_layers == len(view().blocks) == len(view().blocks_with("attn")) == 6
    assert not hasattr(view().cfg, "total_ut_steps")


# Parameters.


def test_the_parameters_are_those_of_the_looped_model() -> None:
    model = make(n_prelude=1, n_coda=1, tie_embeddings=True)
    unrolled, (clean, _) = model.unrolled(3), short_prompts(model)
    assert {id(weight) for weight in unrolled.parameters()} == {id(weight) for weight in model.parameters()}
    model(clean, 3, return_type="loss").backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    unrolled(clean, return_type="loss").backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-3, atol=1e-5)
    before = unrolled(clean)
    with torch.no_grad():
        model.transformer.blocks[0].mlp.down.weight.mul_(2)
    assert_same("edited", unrolled(clean), model(clean, 3))
    assert not torch.allclose(before, unrolled(clean))


def test_a_move_of_one_is_a_move_of_the_other() -> None:
    for first in (0, 1):
        model = make(n_prelude=1)
        unrolled, (clean, _) = model.unrolled(2), short_prompts(model)
        before = model(clean, 2)
        (model, unrolled)[first].to(torch.float64)
        assert model.dtype == torch.float64 and unrolled.W_U.dtype == unrolled.b_U.dtype == torch.float64
        for logits in (model(clean, 2), unrolled(clean)):
            assert logits.dtype == torch.float64
            torch.testing.assert_close(logits.float(), before, rtol=1e-4, atol=1e-5)


def test_what_processes_weights_leaves_the_looped_model_alone() -> None:
    model = make(n_prelude=1, n_coda=1, tie_embeddings=True, qk_bias=True)
    clean, _ = short_prompts(model)
    before, logits = copy.deepcopy(model.state_dict()), model(clean)
    two = [model.unrolled(), model.unrolled()]
    for unrolled in two:
        unrolled.enable_compatibility_mode()
        assert_same("folded", unrolled(clean).log_softmax(-1), logits.log_softmax(-1))
        assert bool((unrolled.blocks[0].ln1.weight == 1).all())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(clean), logits)


def test_loading_writes_into_the_looped_model_if_the_copies_of_a_layer_agree() -> None:
    model, other = make(), make()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    unrolled, (clean, _) = model.unrolled(2), short_prompts(model)
    weights = {name: weight.clone() for name, weight in other.unrolled(2).state_dict().items()}
    unrolled.load_state_dict(weights)
    assert torch.equal(model(clean, 2), other(clean, 2))
    weights["blocks.2.attn.q.weight"][0, 0] += 1
    with pytest.raises(InputError, match="'blocks.0.attn.q.weight' and 'blocks.2.attn.q.weight' are one weight of"):
        unrolled.load_state_dict(weights)
    with pytest.raises(InputError, match="shares the looped model's Parameters: leave out assign"):
        unrolled.load_state_dict(weights, assign=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        unrolled.load_state_dict({})


def test_what_is_more_than_its_weight_is_refused() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + input.mean()

    model = make()
    model.transformer.blocks[1].attn.o = Adapter(16, 16).eval()
    with pytest.raises(InputError, match=r"blocks.1.attn.o is a Adapter, no plain layer.* merge the adapter first"):
        model.unrolled()
    model = make(exit_gate=True)
    nn.utils.parametrizations.weight_norm(model.transformer.blocks[0].mlp.up)
    model.eval()
    with pytest.raises(InputError, match="blocks.0.mlp.up is parametrised, so a view can't share its weight: remove"):
        model.unrolled()


# Names and hooks.


def test_hooks_act_at_one_realised_depth_under_the_views_names_and_not_in_the_looped_model() -> None:
    clean, _ = short_prompts(looped())
    seen: list[tuple[str, int | None]] = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append((view().names.to_looped(hook.name), view().names.loop(hook.name)))

    names = ["blocks.0.hook_resid_pre", "blocks.2.attn.hook_z", "loop.1.hook_state_pre", "blocks.5.mlp.hook_post"]
    view().run_with_hooks(clean, fwd_hooks=[(name, look) for name in names])
    wanted = ["prelude.0.hook_resid_pre", "blocks.1.loop.0.attn.hook_z", "loop.1.hook_state_pre"]
    assert seen == [*zip(wanted, (None, 0, 1), strict=True), ("coda.0.mlp.hook_post", None)]
    seen.clear()
    with view().hooks(fwd_hooks=[(names[1], look)]):
        assert hook_count(looped()) == 0
        looped()(clean)
    assert not seen


def test_an_edit_and_a_gradient_are_those_of_the_bridge() -> None:
    clean, _ = short_prompts(looped())
    name, grads = "blocks.3.attn.hook_z", []
    edited = [m.run_with_hooks(clean, fwd_hooks=[(name, lambda x, hook: 2 * x)]) for m in (view(), bridge())]
    assert_same("edit", *edited)
    assert not torch.allclose(edited[0], view()(clean), atol=1e-3)
    for model in (view(), bridge()):
        with model.hooks(bwd_hooks=[(name, lambda grad, hook: grads.append(grad))]):
            model(clean)[:, -1, 3].sum().backward()
    assert_same("gradient", *grads)
    looped().zero_grad()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.6.hook_resid_pre", "this view has no hook point 'blocks.6.hook_resid_pre'. Nearest: 'blocks"),
        ("prelude.0.hook_resid_pre", "this view has no hook point 'prelude.0.hook_resid_pre'"),
        ("blocks.1.attn.hook_zz", r"no hook point 'blocks.1.attn.hook_zz'. Nearest: 'blocks.1.attn.hook_z'"),
        ("blocks.1.mlp.hook_in", "'blocks.1.mlp.hook_in' is TransformerLens's own: the looped model has no site there"),
    ],
)
def test_a_name_that_the_looped_model_does_not_have_is_an_error(name: str, message: str) -> None:
    with pytest.raises(HookNameError, match=message):
        view().names.to_looped(name)
    if "own" not in message:
        with pytest.raises(KeyError, match="does not exist on this model"):
            view().run_with_hooks(torch.zeros(1, 3).long(), fwd_hooks=[(name, lambda x, hook: None)])


def test_names_that_the_view_does_not_have() -> None:
    with pytest.raises(HookNameError, match="'blocks.0.attn.hook_z' means every loop: the realised-depth view needs"):
        view().names.to_depth("blocks.0.attn.hook_z")
    with pytest.raises(InputError, match="blocks does not run in loop 2"):
        view().names.to_depth("blocks.0.loop.2.attn.hook_z")


# Making one.


def test_text_is_read_as_the_looped_model_reads_it() -> None:
    for bos in (False, True):
        model = make(tokenizer=word_tokenizer(bos=bos))
        special = dict(model.tokenizer.special_tokens_map)
        unrolled = model.unrolled()
        assert torch.equal(unrolled.to_tokens("a b c"), model.to_tokens("a b c"))
        assert_same("text", unrolled("a b c"), model("a b c"))
        assert unrolled.to_str_tokens("a b") == model.to_str_tokens("a b")
        unrolled.tokenizer.pad_token = "h"
        assert model.tokenizer.special_tokens_map == special


def test_padding_is_masked_as_in_the_looped_model() -> None:
    for family in ("llama", "ouro"):
        model = tiny(family)
        tokens, mask = tokens_for(model), torch.ones(2, 5)
        mask[0, :2] = 0
        ours, theirs = model(tokens, attention_mask=mask), model.unrolled()(tokens, attention_mask=mask)
        assert_same("real", theirs[mask.bool()], ours[mask.bool()])
        square = torch.ones(2, 5, 5).tril()
        square[:, 3, 1] = 0
        assert_same("square", model.unrolled()(tokens, attention_mask=square), model(tokens, attention_mask=square))


def test_views_that_can_not_be() -> None:
    model = make()
    with pytest.raises(InputError, match=r"the model is in training mode: call model.eval\(\) first"):
        make().train().unrolled()
    with pytest.raises(InputError, match="n_loops must be at least 1, got 0"):
        model.unrolled(0)
    with pytest.raises(InputError, match="initial_state is torch.float64, the model torch.float32"):
        model.unrolled(initial_state=torch.zeros(3, 16, dtype=torch.float64))
    with pytest.raises(InputError, match="initial_state must be a tensor of shape"):
        model.unrolled(initial_state=torch.zeros(3, 8))
    with pytest.raises(InputError, match="seed must be an integer of at least 0, got -1"):
        tiny("huginn").unrolled(seed=-1)
    unrolled = model.unrolled(initial_state=torch.zeros(1, 3, 16))
    with pytest.raises(InputError, match=r"starts from an initial_state of shape \(1, 3, 16\), and these prompts need"):
        unrolled(tokens_for(model))
