"""Feedforward models of transformers, as they are and with some layers looped, against transformers' own code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import PARITY, refuse

from tl_looped import InputError, LoopedModel
from tl_looped.patching import patch_sweep

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 31,
    "num_hidden_layers": 4, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {"sliding_window": 3}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama 3": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8}}),
    "mistral with a window": ("Mistral", SLIDING),
    "qwen2 with windows": ("Qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3 with windows": ("Qwen3", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 12}),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 10}),
    "gemma3 without caps": ("Gemma3Text", {**SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}),
}
LAYERS, LOOPS = (1, 3), 3


def theirs(name: str) -> Any:
    """A small random model of transformers, with norms that are not all ones."""
    family, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **options, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def deeper(model: Any, loops: int) -> Any:
    """The model with some of its layers copied, one after another; a copy keeps its kind of attention."""
    (a, b), layers = LAYERS, model.model.layers
    copied = copy.deepcopy(model)
    order = [*range(a), *list(range(a, b)) * loops, *range(b, len(layers))]
    copied.model.layers = torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in order)
    copied.config.num_hidden_layers = len(order)
    if getattr(copied.config, "layer_types", None):
        copied.config.layer_types = [copied.config.layer_types[i] for i in order]
    return copied


@pytest.mark.parametrize("name", CASES)
def test_layers_that_loop_are_layers_that_are_copied(name: str, tmp_path: Path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))
    plain = LoopedModel.from_pretrained(tmp_path / "model")
    looped = LoopedModel.from_pretrained(tmp_path / "model", loop_layers=LAYERS, n_loops=LOOPS)
    assert (plain.cfg.n_core, plain.cfg.n_loops) == (4, 1)
    assert (looped.cfg.n_prelude, looped.cfg.n_core, looped.cfg.n_coda, looped.cfg.n_loops) == (1, 2, 1, LOOPS)
    with torch.no_grad():
        close = {"rtol": 1e-5, "atol": 1e-5}
        once = model(tokens, use_cache=False).logits
        torch.testing.assert_close(plain(tokens), once, **close)
        torch.testing.assert_close(looped(tokens, n_loops=1), once, **close)
        torch.testing.assert_close(looped(tokens), deeper(model, LOOPS)(tokens, use_cache=False).logits, **close)


def test_a_damped_loop_moves_a_part_of_the_way():
    """x + (F(x) - x) / n_loops; with one loop it is the feedforward model."""
    folder, layers = PARITY / "ff-llama", (2, 4)
    plain, once = LoopedModel.from_pretrained(folder), LoopedModel.from_pretrained(folder, None, None, update="damped")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(once(tokens), plain(tokens), rtol=1e-5, atol=1e-5)
        damped = LoopedModel.from_pretrained(folder, loop_layers=layers, n_loops=4, update="damped")
        _, cache = damped.run_with_cache(tokens)
        for t in range(4):
            before, core = cache["state_pre", t], cache["core_out", t]
            assert torch.equal(core, cache["resid_post", 1, t])
            torch.testing.assert_close(cache["state_post", t], before + (core - before) / 4)
        state = damped(tokens, stop_at_loop=2)
        torch.testing.assert_close(damped(tokens, initial_state=state, start_at_loop=2), damped(tokens))
        kept = damped.run_with_hooks(
            tokens, fwd_hooks=[("loop.3.hook_core_out", lambda x, hook: cache["state_pre", 3])]
        )
        torch.testing.assert_close(kept, damped.readout(cache["state_pre", 3], tokens))
    with pytest.raises(ValueError, match="a damped update needs the state that entered the loop"):
        damped.transformer.loop(state, None, damped.frame(damped.batch(tokens)), 0, first_layer=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loop_layers": (2, 6)}, r"loop_layers=\(2, 6\) must be \(first, end\) with 0 <= first < end <= 5"),
        ({"loop_layers": (3, 3)}, r"loop_layers=\(3, 3\) must be"),
        ({"loop_layers": (-2, 3)}, r"loop_layers=\(-2, 3\) must be"),
        ({"loop_layers": 3}, r"loop_layers must be \(first, end\), two integers, got 3"),
        ({"loop_layers": (1, 2, 3)}, r"loop_layers must be \(first, end\), two integers, got \(1, 2, 3\)"),
        ({"n_loops": 0}, r"n_loops must be at least 1, got 0"),
        ({"update": "half"}, r"update must be one of \('replace', 'damped'\), got 'half'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_layers_that_can_not_loop(released, options: dict[str, Any], message: str):
    """The error comes before any weight is read: this folder's are none."""
    folder = released("ff-llama")
    refuse(folder, message, InputError, **options)


@pytest.mark.parametrize("options", [{"loop_layers": (0, 1)}, {"n_loops": 2}, {"update": "damped"}])
def test_a_looped_model_is_not_looped_again(options: dict[str, Any]):
    refuse(
        PARITY / "ouro", r"is a looped ouro model: leave them out, and pass n_loops to each run", InputError, **options
    )


@pytest.mark.parametrize(
    ("folder", "config", "message"),
    [
        ("ff-llama", {"hidden_act": "gelu"}, r"hidden_act='gelu', which is not implemented: only 'silu' is"),
        ("ff-llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r"rope_type='longrope', which"),
        ("ff-qwen2", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]: .* each of 4 layers"),
        ("ff-gemma2", {"sliding_window": None}, r"layers of sliding_attention, but no sliding_window"),
        ("ff-gemma3", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True, which is not"),
        ("ff-gpt2", {"activation_function": "relu"}, r"activation_function='relu', which is not implemented"),
        ("looped-nanochat", {"model_config": {}}, r"unknown family"),
        ("base-loop", {"attention": "linear"}, r"attention='linear', which no base-loop model here uses"),
    ],
)
def test_what_a_family_does_not_have_is_refused(released, folder: str, config: dict[str, Any], message: str):
    refuse(released(folder, config), message)


@pytest.mark.parametrize(
    ("folder", "rename"),
    [
        ("ff-gpt2", lambda name: name.removeprefix("transformer.")),  # as on the hub
        ("ff-llama", lambda name: f"module.{name}"),
        ("base-loop", lambda name: f"gpt.{name}"),
        ("nanochat-recursive", lambda name: f"_orig_mod.{name}"),
        ("ff-qwen2", lambda name: name.removeprefix("model.")),
    ],
)
def test_names_with_a_prefix_more_or_less(released, folder: str, rename):
    def renamed(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[rename(name)] = weights.pop(name)

    tokens = torch.arange(7)[None]
    with torch.no_grad():
        found = LoopedModel.from_pretrained(released(folder, change=renamed))(tokens)
        torch.testing.assert_close(found, LoopedModel.from_pretrained(PARITY / folder)(tokens), atol=1e-5, rtol=1e-5)


def test_what_old_checkpoints_store_beside_their_weights(released):
    """Causal masks of GPT-2, rotary frequencies of Llama: taken where they are what the config says, else refused."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(4)}
    LoopedModel.from_pretrained(released("ff-gpt2", change=lambda weights: weights.update(masks)))
    turns = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    refuse(released("ff-llama", change=lambda weights: weights.update(turns)), "inv_freq is not that of the config")


def test_a_sweep_over_a_damped_loop_repeats_whole_loops():
    """A patch at the last layer of a loop needs the state that entered it: each cell equals a run with that hook."""
    model = LoopedModel.from_pretrained(PARITY / "ff-llama", loop_layers=(2, 4), n_loops=2, update="damped").double()
    clean, corrupted = torch.arange(6)[None], torch.arange(6).flip(0)[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    result = patch_sweep(
        model, corrupted, source=cache, metric=lambda x: x[0, -1, 3], site="resid_post", axes=("loop", "layer"),
        progress=False,
    )  # fmt: skip
    for loop in range(2):
        for layer in range(2):
            name = f"blocks.{layer}.loop.{loop}.hook_resid_post"
            patch = [(name, lambda x, hook: cache[hook.name])]
            with torch.no_grad():
                wanted = model.run_with_hooks(corrupted, fwd_hooks=patch)[0, -1, 3]
            torch.testing.assert_close(result.values[loop, layer], wanted)
