"""Longer contexts: rotary scaling as transformers computes it, and `n_ctx=` in place of the checkpoint's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import make
from torch import Tensor

from tl_looped import InputError, LoadError, LoopedModel, Rotary
from tl_looped.attention import attention_bound
from tl_looped.engine.parts import DynamicRope, YarnRope
from tl_looped.nn.rotary import inverse_frequencies

CONTEXT = 16
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": CONTEXT}
SCALINGS = {
    "yarn": YARN,
    "yarn, its original context not named": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0},
    "yarn, betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    "yarn, attention factor": YARN | {"attention_factor": 1.5},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
}
FAMILIES = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}


def theirs(family: str, scaling: dict[str, Any], **more: Any) -> Any:
    kind = FAMILIES[family]
    torch.manual_seed(0)
    return kind(kind.config_class(**SIZES, rope_parameters=scaling, **more)).eval()


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_is_that_of_transformers(name: str, family: str, tmp_path: Path) -> None:
    model = theirs(family, SCALINGS[name])
    model.save_pretrained(tmp_path)
    ours = LoopedModel.from_pretrained(tmp_path, n_ctx=4 * CONTEXT)
    for length in (5, CONTEXT, CONTEXT + 1, 3 * CONTEXT):  # within the original context, and beyond
        read = tokens(length)
        with torch.no_grad():
            wanted = model(read).logits
        torch.testing.assert_close(ours(read), wanted, rtol=1e-4, atol=1e-5)
    # the same weights in memory, and the same numbers after a round trip through our own format
    torch.testing.assert_close(LoopedModel.from_model(theirs(family, SCALINGS[name]), n_ctx=48)(read), ours(read))
    ours.save_pretrained(tmp_path / "own")
    again = LoopedModel.from_pretrained(tmp_path / "own")
    assert again.cfg.rotary == ours.cfg.rotary and again.cfg.n_ctx == 4 * CONTEXT
    torch.testing.assert_close(again(read), ours(read))


def test_each_kind_of_layer_has_its_own_scaling(tmp_path: Path) -> None:
    turns = {
        "full_attention": YARN,
        "sliding_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    }
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**SIZES, rope_parameters=turns, layer_types=kinds, sliding_window=8)
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    read = tokens(3 * CONTEXT)
    with torch.no_grad():
        wanted = model(read).logits
    torch.testing.assert_close(LoopedModel.from_pretrained(tmp_path, n_ctx=48)(read), wanted, rtol=1e-4, atol=1e-5)


def test_yarn_by_its_equation() -> None:
    scaling = YarnRope(8.0, 64, beta_fast=4.0, beta_slow=1.0, truncate=False)
    found = inverse_frequencies(Rotary(100.0, scaling=scaling), 16)
    low, high = (16 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(100.0)) for turns in (4.0, 1.0))
    for i in range(8):
        plain = 100.0 ** (-2 * i / 16)
        part = min(max((i - low) / (high - low), 0.0), 1.0)
        assert float(found[i]) == pytest.approx((1 - part) * plain + part * plain / 8, rel=1e-5)
    assert float(found[0]) == 1.0 and float(found[-1]) == pytest.approx(100.0 ** (-14 / 16) / 8)
    assert Rotary(scaling=scaling).attention_factor == pytest.approx(1 + 0.1 * math.log(8.0))


def test_a_row_turns_by_its_own_length_not_by_that_of_its_batch() -> None:
    model = make(rotary=Rotary(100.0, scaling=DynamicRope(4.0, 8)), n_ctx=64)
    long, short = (tokens(n, 1)[0].remainder(24).tolist() for n in (20, 6))
    together = model([long, short], padding_side="right")
    torch.testing.assert_close(together[0], model([long])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1, :6], model([short])[0], rtol=1e-5, atol=1e-6)
    plain = make(rotary=Rotary(100.0), n_ctx=64)
    assert torch.equal(model([short]), plain([short])) and not torch.allclose(model([long]), plain([long]), atol=1e-3)


def test_generation_keeps_no_keys_that_would_turn_anew() -> None:
    model = make(rotary=Rotary(100.0, scaling=DynamicRope(4.0, 8)), n_ctx=64)
    read = tokens(6, 1) % model.cfg.d_vocab
    options: dict[str, Any] = {"do_sample": False, "return_type": "tokens", "stop_at_eos": False}
    within: Any = model.generate(read, max_new_tokens=2, **options)
    assert within.equal(model.generate(read, max_new_tokens=2, use_past_kv_cache=False, **options))
    with pytest.raises(InputError, match=r"make more than 8, .* so keys can't be kept: pass use_past_kv_cache=False"):
        model.generate(read, max_new_tokens=3, **options)
    found: Any = model.generate(read, max_new_tokens=5, use_past_kv_cache=False, **options)
    for length in range(6, 11):
        assert int(model(found[:, :length])[0, -1].argmax()) == int(found[0, length])


def test_the_bound_says_that_yarn_sharpens_scores() -> None:
    model = make(rotary=Rotary(100.0, scaling=YarnRope(4.0, 16)))
    found = attention_bound(model, [[1, 2, 3, 4]], 2)
    assert "a scale of their own" in found.breaks and bool(found.rotary_bound[1:].isnan().all())


@pytest.mark.parametrize("family", ["ff-gpt2", "albert"])
def test_learned_positions_are_as_many_as_there_are(family: str) -> None:
    folder = Path(__file__).parent / "parity" / family
    with pytest.raises(InputError, match=r"n_ctx=4096, but this model has a learned vector for each of \d+ positions"):
        LoopedModel.from_pretrained(folder, n_ctx=4096)


def test_a_context_is_read_up_to_its_end() -> None:
    folder = Path(__file__).parent / "parity" / "ouro"
    own = LoopedModel.from_pretrained(folder)
    read = torch.arange(own.cfg.n_ctx + 1)[None] % own.cfg.d_vocab
    with pytest.raises(InputError, match="more than the model's context of"):
        own(read)
    longer = LoopedModel.from_pretrained(folder, n_ctx=own.cfg.n_ctx + 1)
    torch.testing.assert_close(longer(read)[:, :-1], own(read[:, :-1]), rtol=1e-4, atol=1e-5)
    shorter = LoopedModel.from_pretrained(folder, n_ctx=4)
    with pytest.raises(InputError, match="5 tokens, more than the model's context of 4"):
        shorter(read[:, :5])
    with pytest.raises(InputError, match="n_ctx must be at least 1, got 0"):
        LoopedModel.from_pretrained(folder, n_ctx=0)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, "rope_type='longrope', which is not implemented: 'default', "),
        (YARN | {"beta_fast": 1.0, "beta_slow": 2.0}, "scaling needs beta_slow <= beta_fast, got 2.0 and 1.0"),
        (YARN | {"short_factor": [1.0]}, r"has rope_parameters.short_factor=\[1.0\], which no llama model here uses"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 0.5}, "scaling.factor must be at least 1 where scaling"),
        ({"rope_type": "dynamic", "rope_theta": 1e4}, "has no 'rope_parameters.factor', which"),
    ],
)
def test_scalings_that_are_refused(released: Any, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        LoopedModel.from_pretrained(released("ff-llama", {"rope_parameters": scaling}))
