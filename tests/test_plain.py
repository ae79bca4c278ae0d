"""The native model against the equations, written out slowly in plain.py, and against feedforward models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, config, expected, make, parity, run_options, tokens_for
from plain import Plain, Tape, weights_of
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from tl_looped import Llama3Rope, LoopedModel, QKNorm, Rotary

PLACEMENTS = ("pre", "residual_sandwich", "output_sandwich", "output")
INJECTIONS = ("none", "add", "concat_linear")
LOOP_NORMS = ("none", "each", "last")
STACKS = {"n_prelude": 1, "n_coda": 1}
SCALING = Llama3Rope(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_n_ctx=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "adjacent rotary": {"rotary": Rotary(500.0, "adjacent")},
    "llama3 rotary": {"rotary": Rotary(500.0, scaling=SCALING), "d_head": 8},
    "grouped heads": {"n_key_value_heads": 2},
    "one key head": {"n_key_value_heads": 1, "qk_bias": True, "qk_norm": QKNorm()},
    "qk bias": {"qk_bias": True},
    "qk norm": {"qk_norm": QKNorm(), "norm_placement": "output"},
    "heads wider than the model": {"d_head": 10},
    "state from prelude": {**STACKS, "state_init": "prelude", "injection": "add"},
    "state of zeros": {**STACKS, "state_init": "zeros", "injection": "concat_linear"},
    "state drawn": {
        "state_init": "normal",
        "state_init_std": 0.5,
        "injection": "concat_linear",
        "embed_scale": 3.0,
    },
    "state truncated": {"state_init": "truncated_normal", "state_init_scale": 2.0, "injection": "add"},
    "tied head": {"tie_embeddings": True, "embed_scale": 0.25},
    "no final norm": {"final_norm": False, "loop_norm": "each", "exit_gate": True},
    "no norm but in layers": {"final_norm": False},
    "both norms before the head": {**STACKS, "final_norm": True, "loop_norm": "last", "exit_gate": True},
    "large eps": {"eps": 0.5, "qk_norm": QKNorm()},
    "one layer, five loops": {"n_core": 1, "n_loops": 5},
}


def assert_same(model: LoopedModel, tokens: torch.Tensor, tolerance: float = 1e-11, **options: Any) -> None:
    """Logits, every activation and every gradient of a float64 model are those of plain.py, under the same names."""
    run = model.batch(tokens, **options)
    tape = Tape()
    weights = {name: weight.requires_grad_() for name, weight in weights_of(model).items()}
    wanted = Plain(model.cfg, weights, tape).run(tokens, run.n_loops, run.state)
    wanted_loss = F.cross_entropy(wanted[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    wanted_loss.backward()

    model.zero_grad()
    loss, cache = model.run_with_cache(
        tokens, names_filter=lambda _: True, incl_bwd=True, return_type="loss", **options
    )
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(model(tokens, **options), wanted, **close)
    torch.testing.assert_close(loss, wanted_loss, **close)
    assert [name for name in cache if not name.endswith("_grad")] == list(tape.values)  # in the order of firing, too
    for name, value in tape.values.items():
        torch.testing.assert_close(cache[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}", **close)
        gradient = tape.grad(name)
        assert (f"{name}_grad" in cache) == (gradient is not None), name
        if gradient is not None:
            torch.testing.assert_close(
                cache[f"{name}_grad"], gradient, msg=lambda text, name=name: f"{name}_grad: {text}", **close
            )
    for name, parameter in model.transformer.named_parameters():
        theirs = weights[name].grad
        assert (parameter.grad is None) == (theirs is None), name
        if theirs is not None:
            torch.testing.assert_close(parameter.grad, theirs, **close)


@pytest.mark.parametrize("loop_norm", LOOP_NORMS)
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_injection_and_loop_norm(placement: str, injection: str, loop_norm: str):
    model = make(torch.float64, norm_placement=placement, injection=injection, loop_norm=loop_norm, n_core=1, **STACKS)
    assert_same(model, tokens_for(model, pos=4))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_other_choice(name: str):
    model = make(torch.float64, **VARIANTS[name])
    # Llama 3's interpolation rounds differently in float32, in which frequencies are computed.
    assert_same(model, tokens_for(model, pos=7), 1e-6 if name == "llama3 rotary" else 1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_families(family: str):
    model = parity(family, torch.float64)
    tokens = expected(family)["input_ids"]
    assert_same(model, tokens, 1e-5 if model.cfg.rotary.scaling else 1e-9, n_loops=3, **run_options(family, model))
    model.zero_grad()


@torch.no_grad()
def test_the_plain_model_sees_what_the_parity_data_hold():
    """So that plain.py is itself held to the public reference code."""
    model = parity("huginn", torch.float64)
    tape, stored = Tape(), expected("huginn")
    logits = Plain(model.cfg, weights_of(model), tape).run(stored["input_ids"], 7, stored["input_states"].double())
    assert float((logits - stored["logits.T7"]).abs().max()) < 1e-4
    for t in range(7):
        assert float((tape.values[f"loop.{t}.hook_injection"] - stored["injection_out"][t]).abs().max()) < 1e-4


def load_weights(model: LoopedModel, theirs: dict[str, torch.Tensor], layer_names: dict[str, str]) -> None:
    """Copy a feedforward model's weights, layer i into core layer i."""
    names = {"embed.weight": "model.embed_tokens.weight", "ln_final.weight": "model.norm.weight"}
    names["unembed.weight"] = "lm_head.weight"
    for layer in range(model.cfg.n_core):
        for ours, stored in layer_names.items():
            names[f"blocks.{layer}.{ours}.weight"] = f"model.layers.{layer}.{stored}.weight"
    assert set(names.values()) == set(theirs)
    model.transformer.load_state_dict({ours: theirs[stored] for ours, stored in names.items()})


SUBLAYERS = {f"attn.{name}": f"self_attn.{name}_proj" for name in "qkvo"} | {
    f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
OURS = {"d_model": 32, "d_mlp": 48, "n_core": 3, "n_heads": 4, "d_head": 8, "d_vocab": 50, "n_ctx": 64, "n_loops": 1}


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.ndim > 1 else 1.0))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_loop_of_a_llama_is_transformers_llama(kv_heads: int, scaled: bool):
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 16
    theirs = LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=kv_heads, rope_parameters=rope, max_position_embeddings=64)
    ).eval()
    randomise(theirs)
    scaling = SCALING if scaled else None
    ours = LoopedModel.from_config(config(**OURS, n_key_value_heads=kv_heads, rotary=Rotary(scaling=scaling)))
    norms = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    load_weights(ours, theirs.state_dict(), SUBLAYERS | norms)
    tokens = tokens_for(ours, pos=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_loop_of_an_olmo2_is_transformers_olmo2(kv_heads: int):
    theirs = Olmo2ForCausalLM(Olmo2Config(**SIZES, num_key_value_heads=kv_heads, max_position_embeddings=64)).eval()
    randomise(theirs)
    theta, eps = theirs.config.rope_parameters["rope_theta"], theirs.config.rms_norm_eps
    options = {"n_key_value_heads": kv_heads, "rotary": Rotary(float(theta)), "eps": eps}
    ours = LoopedModel.from_config(config(**OURS, **options, norm_placement="output", qk_norm=QKNorm()))
    norms = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
    qk_norms = {f"attn.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")}
    load_weights(ours, theirs.state_dict(), SUBLAYERS | norms | qk_norms)
    tokens = tokens_for(ours, pos=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_two_loops_are_the_same_layers_twice():
    """A looped model is a deeper feedforward one with its weights copied."""
    looped = make(torch.float64, n_core=2, n_loops=3)
    deep = LoopedModel.from_config(config(n_core=6, n_loops=1), dtype=torch.float64)
    weights = weights_of(looped)
    copies = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
    for t, layer in itertools.product(range(3), range(2)):
        for name, weight in weights.items():
            if name.startswith(f"blocks.{layer}."):
                copies[name.replace(f"blocks.{layer}.", f"blocks.{2 * t + layer}.", 1)] = weight
    deep.transformer.load_state_dict(copies)
    tokens = tokens_for(looped)
    torch.testing.assert_close(looped(tokens), deep(tokens), rtol=1e-13, atol=1e-13)
