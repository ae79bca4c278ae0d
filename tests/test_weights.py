"""Weights under TransformerLens's names, on every family, and how heads compose: against products written out."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import transformers
from helpers import PARITY, make
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_looped import InputError, LoopedModel

FAMILIES = sorted(path.parent.name for path in PARITY.glob("*/config.json"))
MODES = ("Q", "K", "V")


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_names(family: str) -> None:
    model = LoopedModel.from_pretrained(PARITY / family)
    cfg, n = model.cfg, len(model.cfg.layers())
    d, heads, kv, d_head = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head
    assert model.W_Q.shape == (n, heads, d, d_head) and model.W_O.shape == (n, heads, d_head, d)
    assert model.W_K.shape == model.W_V.shape == (n, kv, d, d_head)
    assert model.W_in.shape == (n, d, cfg.d_mlp) and model.W_out.shape == (n, cfg.d_mlp, d)
    assert (model.W_gate is not None) == cfg.gated_mlp
    assert model.b_Q.shape == (n, heads, d_head) and model.b_K.shape == model.b_V.shape == (n, kv, d_head)
    assert model.b_O.shape == model.b_out.shape == (n, d) and model.b_in.shape == (n, cfg.d_mlp)
    assert model.b_U.shape == (cfg.d_vocab,)
    assert model.QK.shape == model.OV.shape == (n, heads, d, d)
    assert len(model.all_head_labels) == n * heads == len(set(model.all_head_labels))
    assert model.n_params_total == sum(weight.numel() for weight in model.parameters())
    assert model.tokens_to_residual_directions(torch.tensor([[0, 1]])).shape == (1, 2, model.W_U.shape[0])
    if cfg.learned_positions:
        assert model.W_pos.shape[0] == cfg.n_ctx


@pytest.mark.parametrize("family", ["ff-gpt2", "ff-llama", "ff-qwen2"])
def test_they_are_those_of_a_bridge(family: str) -> None:
    bridge = bridge_of(family)
    model = LoopedModel.from_bridge(bridge)
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_E", "W_U"):
        torch.testing.assert_close(getattr(model, name), getattr(bridge, name), msg=name)
    for name, one in (("b_Q", "q"), ("b_K", "k"), ("b_V", "v"), ("b_O", "o")):
        ours = getattr(model, name)
        if getattr(model.blocks[0].attn, one).bias is None:
            assert not ours.any()  # zeros; a bridge has none, or zeros
        else:
            torch.testing.assert_close(ours.flatten(1), getattr(bridge, name).flatten(1), msg=name)
    torch.testing.assert_close(model.QK.AB, bridge.QK.AB)
    torch.testing.assert_close(model.OV.AB, bridge.OV.AB)
    assert model.all_head_labels == bridge.all_head_labels


def bridge_of(family: str, plain_norms: bool = False) -> Any:
    """A parity model in an ordinary TransformerBridge."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(PARITY / family).eval()
    for name, weight in hf.named_parameters():
        if plain_norms and "norm" in name:
            weight.data.fill_(1.0)
    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def test_what_is_written_into_a_layer_changes_the_model_and_a_stack_is_a_copy() -> None:
    model = make()
    tokens = torch.arange(5)[None]
    before = model(tokens)
    with torch.no_grad():
        model.W_O[0].zero_()
        assert torch.equal(model(tokens), before)
        model.blocks[0].attn.W_O.zero_()
    assert not torch.allclose(model(tokens), before)
    model.W_V.sum().backward()
    assert model.blocks[0].attn.v.weight.grad is not None


def test_a_head_s_result_is_its_pattern_times_OV() -> None:
    model = make(n_key_value_heads=1, n_heads=2)
    tokens = torch.arange(6)[None]
    _, cache = model.run_with_cache(tokens, n_loops=2, names_filter=lambda name: True)
    read = cache["normalized", 0, 1, "ln1"] * model.blocks[0].ln1.weight
    for head in range(2):
        moved = cache["pattern", 0, 1][0, head] @ read[0] @ model.OV[model.cfg.n_prelude, head].AB
        torch.testing.assert_close(cache["result", 0, 1][0, :, head], moved, rtol=1e-4, atol=1e-5)


# Composition.


def norms_set(model: LoopedModel) -> LoopedModel:
    """Weights of norms that are not one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            if "ln" in name and weight.ndim == 1:
                weight.copy_(1 + 0.5 * torch.rand(weight.shape, generator=generator))
    return model


def score(left: Tensor, right: Tensor) -> float:
    return float((left @ right).norm() / (left.norm() * right.norm()))


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_block_s_own_scores_are_those_of_transformerlens(mode: Any) -> None:
    bridge = bridge_of("ff-llama", plain_norms=True)
    ours = LoopedModel.from_bridge(bridge).all_composition_scores(mode)
    torch.testing.assert_close(ours, bridge.all_composition_scores(mode).scores, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_across_loops_by_products_written_out(mode: Any) -> None:
    """Huginn's form: a norm on the stream after each sub-layer, W [x; e], prelude and coda."""
    model = norms_set(LoopedModel.from_pretrained(PARITY / "huginn"))
    cfg, net = model.cfg, cast(Any, model.transformer)
    layers, d = cfg.layers(), cfg.d_model

    def gain(block: Any, name: str) -> Tensor:
        return torch.diag(getattr(block, name).weight.detach())

    def circuit(block: Any, head: int) -> dict[str, Tensor]:
        own = gain(block, "ln1")
        q, k, v, o = (getattr(block.attn, name)[head].detach() for name in ("W_Q", "W_K", "W_V", "W_O"))
        return {"Q": own @ q @ k.T @ own, "K": own @ k @ q.T @ own, "V": own @ v @ o, "OV": v @ o}

    state_map = net.injection.weight.detach()[:, :d].T
    input_map = net.injection.weight.detach()[:, d:].T
    across, within = model.all_composition_scores(mode, 1).detach(), model.all_composition_scores(mode).detach()
    core, a, b = list(net.blocks), 2, 1  # from core layer 2 to core layer 1 of the next loop
    path = gain(core[2], "ln1_post") @ gain(core[2], "ln2_post") @ state_map
    path = path @ gain(core[0], "ln1_post") @ gain(core[0], "ln2_post")
    i, j = layers.index(("blocks", a)), layers.index(("blocks", b))
    for h in range(cfg.n_heads):
        for g in range(cfg.n_heads):
            wanted = score(circuit(core[a], h)["OV"], path @ circuit(core[b], g)[mode])
            assert float(across[i, h, j, g]) == pytest.approx(wanted, rel=1e-4)
    # from the last layer of the prelude, through the injection, to layer 0
    i, j, first = layers.index(("prelude", cfg.n_prelude - 1)), layers.index(("blocks", 0)), net.prelude[-1]
    path = gain(first, "ln1_post") @ gain(first, "ln2_post") @ input_map
    wanted = score(circuit(first, 0)["OV"], path @ circuit(core[0], 1)[mode])
    assert float(within[i, 0, j, 1]) == pytest.approx(wanted, rel=1e-4)
    # from the last core layer to the coda, through the norm after the last loop
    i, j, last = layers.index(("blocks", cfg.n_core - 1)), layers.index(("coda", 0)), core[-1]
    path = gain(last, "ln1_post") @ gain(last, "ln2_post") @ torch.diag(net.ln_final.weight.detach())
    wanted = score(circuit(last, 1)["OV"], path @ circuit(net.coda[0], 0)[mode])
    assert float(within[i, 1, j, 0]) == pytest.approx(wanted, rel=1e-4)
    assert float(within[layers.index(("blocks", 1)), :, layers.index(("blocks", 0))].abs().max()) == 0
    assert float(across[layers.index(("prelude", 0))].abs().max()) == 0
    assert bool(within[layers.index(("prelude", 0)), :, layers.index(("coda", 0))].isnan().all())  # no one map
    assert float(within[layers.index(("coda", 0)), :, layers.index(("prelude", 0))].abs().max()) == 0


NO_MAP = ("hrm-act", "hrm-text", "loopformer", "loopus-qwen3", "trm")


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_MAP])
def test_every_family_has_scores(family: str) -> None:
    model = LoopedModel.from_pretrained(PARITY / family)
    scores = model.all_composition_scores("V", loops_apart=1)
    core = [i for i, (stack, _) in enumerate(model.cfg.layers()) if stack == "blocks"]
    found = scores[core][:, :, core]
    assert bool(found.isfinite().all()) and float(found.min()) > 0 and float(found.max()) <= 1


@pytest.mark.parametrize("family", NO_MAP)
def test_where_no_linear_map_lies_between_there_are_none(family: str) -> None:
    with pytest.raises(InputError, match="as what lies between two heads is no linear map: .*path_patch"):
        LoopedModel.from_pretrained(PARITY / family).all_composition_scores("V")


@pytest.mark.usefixtures("as_a_user")
def test_bad_input() -> None:
    model = make()
    with pytest.raises(InputError, match="mode must be 'Q', 'K' or 'V', got 'QK'"):
        model.all_composition_scores("QK")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="loops_apart must be at least 0, got -1"):
        model.all_composition_scores("Q", -1)
