"""Every key of a config.json is used, known to change nothing, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import FAMILIES, make, parity, refuse, same_logits, tokens_for, word_tokenizer

from tl_looped import LoopedConfig, LoopedModel, adapters
from tl_looped.adapters import ConfigKeys
from tl_looped.engine.parts import Llama3Rope, Rotary

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("ouro", {"hidden_act": "gelu"}, r"hidden_act='gelu', which is not implemented: only 'silu' is"),
        ("ouro", {"use_sliding_window": True}, r"use_sliding_window=True, which is not implemented: only False is"),
        ("ouro", {"attention_bias": True}, r"attention_bias=True, which is not implemented"),
        ("ouro", {"attention_dropout": 0.1}, r"attention_dropout=0.1, which is not implemented"),
        (
            "ouro",
            {"layer_types": ["sliding_attention"] * 3},
            r"layer_types=\['sliding.*only 'full_attention' in all 3 layers",
        ),
        ("ouro", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]: only .* in all 3 layers"),
        ("ouro", {"rope_scaling": {"rope_type": "longrope"}}, r"rope_type='longrope', which is not implemented"),
        ("ouro", {"rope_theta": None}, r"has no 'rope_theta'"),
        ("ouro", {"total_ut_steps": 0}, r"n_loops must be at least 1, got 0"),
        ("ouro", {"hidden_size": "48"}, r"d_model must be an integer, got '48'"),
        ("ouro", {"num_attention_heads": 0, "head_dim": None}, r"n_heads must be at least 1, got 0"),
        ("ouro", {"num_key_value_heads": 3}, r"n_heads \(4\) must be a multiple of n_key_value_heads \(3\)"),
        ("ouro", {"rms_norm_eps": 0}, r"eps must be a finite number above 0, got 0"),
        ("huginn", {"injection_type": "add"}, r"injection_type='add', which is not implemented: only 'linear' is"),
        ("huginn", {"nonlin_name": "GELU"}, r"nonlin_name='GELU', which is not implemented: only 'SiLU' is"),
        ("huginn", {"norm_class_name": "LayerNorm"}, r"norm_class_name='LayerNorm', which is not implemented"),
        ("huginn", {"mlp_class_name": "BaseMLP"}, r"mlp_class_name='BaseMLP', which is not implemented"),
        ("huginn", {"bias": True}, r"bias=True, which is not implemented"),
        ("huginn", {"state_init": "zero"}, r"state_init='zero', which is not implemented: only 'like-init' is"),
        ("huginn", {"test_time_noise": 0.1}, r"test_time_noise=0.1, which is not implemented: only 0 is"),
        ("huginn", {"n_layers": 9}, r"n_layers=9, but prelude, block and coda are 2 \+ 3 \+ 1"),
        ("retrofit-llama", {"qk_bias": True}, r"qk_bias=True, which is not implemented"),
        (
            "retrofit-llama",
            {"rope_scaling": {"rope_type": "llama3"}},
            r"has no 'rope_scaling.factor', which this family needs",
        ),
        ("retrofit-olmo2", {"n_heads": 5, "num_key_value_heads": 5}, r"misshapen: .*Wqkv.weight is"),
        (
            "huginn",
            {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"},
            r"unknown family: architectures=\['GPTNeoX",
        ),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_configs_that_are_not_implemented(released, family: str, config, message: str):
    refuse(released(family, config), message)


@pytest.mark.parametrize(
    ("family", "key"),
    [("ouro", "hidden_size"), ("ouro", "total_ut_steps"), ("ouro", "rms_norm_eps"), ("ouro", "rope_theta")]
    + [
        ("huginn", key)
        for key in ("n_embd", "n_layers_in_coda", "mean_recurrence", "rope_base", "init_values", "n_heads")
    ],
)
def test_configs_that_lack_a_value(released, family: str, key: str):
    folder = released(family)
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, f"config.json has no '{key}(.std)?', which this family needs")


# Keys that nobody knows.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5),
        ("mlp_bias", True),
        ("attention_multiplier", 0.0625),
        ("residual_multiplier", 0),
        ("logits_scaling", 8.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30),
        ("qk_norm", True),
        ("num_experts", 8),
        ("attention_chunk_size", 16),
        ("is_causal", False),
        ("scale_attn_weights", False),
        ("use_rope", False),
        ("is_encoder_decoder", True),
        ("no_rope_layers", [0, 1]),
        ("vision_config", {"hidden_size": 4}),
        ("text_config", "other.json"),
    ],
)
def test_a_key_that_a_family_does_not_use_is_refused(released, family: str, key: str, value: Any):
    name = parity(family).cfg.family
    message = rf"config.json has {key}=.*, which no {name} model here uses, so .* pass ignore_config_keys=\['{key}'\]"
    refuse(released(family, {key: value}), message)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_say_off_or_nothing_are_fine(released, family: str):
    off = dict.fromkeys(("quantization_config", "attn_logit_softcapping", "sliding_window", "rope_scaling_extra"))
    off |= {"mlp_bias": False, "attention_bias": False, "num_experts": 0, "qk_norm": False, "no_rope_layers": []}
    off |= {"partial_rotary_factor": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0, "vision_config": {}}
    off |= {"is_causal": True, "scale_attn_weights": True, "use_rope": True, "is_encoder_decoder": False}
    beside = {
        "use_cache": True,
        "initializer_range": 0.1,
        "_name_or_path": "x",
        "dtype": "bfloat16",
        "id2label": {"0": 1},
    }
    beside |= {"temperature": 0.6, "max_length": 20, "pad_token_id": 3, "bos_token_id": 1, "pretraining_tp": 2}
    assert same_logits(LoopedModel.from_pretrained(released(family, off | beside)), family)


def test_keys_of_features_that_are_off(released):
    """A window that is not used, and what the published configs have beside the model."""
    assert same_logits(
        LoopedModel.from_pretrained(released("ouro", {"sliding_window": 64, "max_window_layers": 2})), "ouro"
    )
    beside = {"activation_checkpoint_impl": "per-iteration", "name": "raven", "hf_config": {"org": "o"}}
    beside |= {"num_attention_heads": 4, "hidden_size": 48, "num_hidden_layers": 6, "padded_vocab_size": None}
    assert same_logits(LoopedModel.from_pretrained(released("huginn", beside)), "huginn")


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "huginn",
            {"block_class_name": "TransformerPreNormBlock"},
            r"block_class_name='Trans.* only 'SandwichBlock' is",
        ),
        ("huginn", {"architecture_class_name": "GPT"}, r"architecture_class_name='GPT', which is not implemented"),
        ("huginn", {"num_attention_heads": 8}, r"n_heads=4 and num_attention_heads=8, which should be the same"),
        ("huginn", {"tie_word_embeddings": False}, r"tie_embeddings=True and tie_word_embeddings=False, which should"),
        ("huginn", {"rope_scaling": LLAMA3}, r"has rope_scaling=\{.*\}, which no huginn model here uses"),
        ("huginn", {"init_values": {"std": 1.0, "head": 2.0}}, r"has init_values.head=2.0, which no huginn model"),
        ("huginn", {"init_values": 3}, r"has init_values=3, which should be an object"),
        ("huginn", {"n_layers_in_coda": "1"}, r"n_layers_in_coda must be an integer, got '1'"),
        ("ouro", {"num_hidden_layers": "3"}, r"num_hidden_layers must be an integer, got '3'"),
        ("ouro", {"early_exit_step": 2}, r"has early_exit_step=2, which no ouro model here uses"),
        ("ouro", {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\], which is not implemented: only 'silu' is"),
        ("ouro", {"layer_types": "full_attention"}, r"layer_types=full_attention: only .* in all 3 layers"),
        ("ouro", {"tie_word_embeddings": "no"}, r"tie_embeddings must be True or False, got 'no'"),
        (
            "ouro",
            {"mlp_bias": True, "qk_norm": True},
            r"has mlp_bias=True, qk_norm=True, which .*\['mlp_bias', 'qk_norm'\]",
        ),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_values_that_would_be_another_model(released, family: str, config, message: str):
    refuse(released(family, config), message)


def test_a_key_may_be_ignored_on_the_users_word(released):
    folder = released("ouro", {"mlp_bias": True, "attention_bias": True, "rope_parameters": {"mscale": 2.0}})
    keys = ["mlp_bias", "attention_bias"]
    refuse(folder, r"has rope_parameters.mscale=2.0, which .*=\['rope_parameters.mscale'\]", ignore_config_keys=keys)
    keys.append("rope_parameters.mscale")
    assert same_logits(LoopedModel.from_pretrained(folder, ignore_config_keys=keys), "ouro")
    refuse(folder, r"has no 'mlp_bia' to ignore. Nearest: 'mlp_bias'", ignore_config_keys=["mlp_bia"])
    refuse(folder, r"has no 'mlp_bia' to ignore", ignore_config_keys="mlp_bia")
    refuse(folder, r"has no 'mscal' to ignore", ignore_config_keys=["rope_parameters.mscal"])
    refuse(folder, r"has no 'mlp_bias' to ignore", ignore_config_keys=["mlp_bias.deep"])


def test_a_new_family_refuses_unknown_keys_without_its_doing(released, monkeypatch: pytest.MonkeyPatch):
    class Eager(adapters.ouro.OuroAdapter):
        """Knows sizes only."""

        family = "eager"

        def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
            return make().cfg

    monkeypatch.setattr(adapters, "ADAPTERS", (Eager(),))
    refuse(released("ouro"), r"has early_exit_threshold=1.0, head_dim=12, hidden_act='silu', .* which no custom model")


# Rotary embedding, as transformers 4 and 5 write it.


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("ouro", {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("ouro", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("ouro", {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
        ("ouro", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0, "factor": 1.0}}),
        ("ouro", {"rope_scaling": {"type": "default"}}),
        ("retrofit-llama", {"rope_scaling": None, "rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        ("retrofit-llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
        ("retrofit-llama", {"rope_parameters": {"full_attention": LLAMA3}}),
        ("retrofit-llama", {"rope_scaling": LLAMA3 | {"type": "llama3"}}),
    ],
)
def test_forms_of_rotary_embedding(released, family: str, config):
    assert same_logits(LoopedModel.from_pretrained(released(family, config)), family)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("ouro", {"rope_parameters": {"rope_theta": 1e4}}, r"two things of rope_theta.*: \[1000000.0, 10000.0\]"),
        (
            "ouro",
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            r"rs.partial_rotary_factor=0.5,",
        ),
        (
            "ouro",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"has rope_parameters.sliding_attention=\{'rope_theta': 10000.0\}, which no ouro model",
        ),
        ("ouro", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e6}}}, r"has rope_parameters.sliding_att"),
        ("ouro", {"rope_parameters": "default"}, r"has rope_parameters='default', which should be an object"),
        ("ouro", {"rope_theta": "1e6"}, r"rotary.base must be a finite number above 0, got '1e6'"),
        ("ouro", {"rope_theta": [1e6]}, r"rotary.base must be a finite number above 0, got \[1000000.0\]"),
        ("retrofit-llama", {"rope_parameters": {"rope_type": "default"}}, r"says two things of rotary scaling, which"),
        (
            "retrofit-llama",
            {"rope_scaling": LLAMA3 | {"type": "yarn"}},
            r"rope_scaling.rope_type='llama3' and .*'yarn'",
        ),
        ("retrofit-llama", {"rope_scaling": LLAMA3 | {"factor": "8"}}, r"factor must be a finite number above 0"),
        ("retrofit-llama", {"rope_scaling": LLAMA3 | {"mscale": 0.7}}, r"has rope_scaling.mscale=0.7, which no retro"),
        (
            "retrofit-llama",
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
            r"low_freq_factor < high_freq_factor, got 4",
        ),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_rotary_embeddings_that_are_not_implemented(released, family: str, config, message: str):
    refuse(released(family, config), message)


@pytest.mark.usefixtures("as_a_user")
def test_our_own_config_with_a_broken_part(tmp_path):
    make(rotary=Rotary(scaling=Llama3Rope(8.0, 1.0, 4.0, 16))).save_pretrained(tmp_path / "model")
    assert LoopedModel.from_pretrained(tmp_path / "model").cfg.rotary.scaling == Llama3Rope(8.0, 1.0, 4.0, 16)
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["config"]["rotary"]["scaling"] = {"factor": 8.0, "low_freq_factor": 1.0}
    path.write_text(json.dumps(values))
    refuse(tmp_path / "model", r"not a rotary.scaling: unknown fields \[\], missing fields \['high_freq_factor', .*'\]")
    values["config"]["rotary"]["scaling"] = 8.0
    values |= {"more": 3}
    path.write_text(json.dumps(values))
    refuse(tmp_path / "model", r"rotary.scaling must have the fields \['factor'\], got 8.0")
    del values["config"]["rotary"]["scaling"]
    path.write_text(json.dumps(values))
    refuse(tmp_path / "model", r"config.json has more=3, which no custom model here uses")


# The end of a text.


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 2]}, (7, 2)),
        (2, {"eos_token_id": 3}, (3,)),
        (2, {"temperature": 0.6}, (2,)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, None, ()),
    ],
)
def test_the_tokens_that_end_a_text_are_loaded(released, tmp_path, config, generation, wanted):
    """Of generation_config.json, or else of config.json; and kept."""
    folder = released("ouro", {"eos_token_id": config})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    model = LoopedModel.from_pretrained(folder)
    assert model.cfg.eos_token_ids == wanted
    model.save_pretrained(tmp_path / "again")
    assert LoopedModel.from_pretrained(tmp_path / "again").cfg == model.cfg


@pytest.mark.parametrize("value", ["2", [2.5], -1, True])
@pytest.mark.usefixtures("as_a_user")
def test_tokens_that_can_not_end_a_text(released, value):
    refuse(released("ouro", {"eos_token_id": value}), r"a token in eos_token_ids must be (an integer|at least 0), got")


def test_generation_ends_where_the_checkpoint_says(released):
    """Also where its tokenizer says another token, as Ouro's does; and there too."""
    folder = released("ouro")
    model = LoopedModel.from_pretrained(folder)
    tokens, options = tokens_for(model, batch=1), {"seed": 1, "return_type": "tokens", "verbose": False}
    whole = model.generate(tokens, 12, stop_at_eos=False, **options)[0, 5:].tolist()
    end, later = whole[4], next(token for token in whole[5:] if token not in whole[:5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 96]}))
    stopping = LoopedModel.from_pretrained(folder)
    assert stopping.generate(tokens, 12, **options)[0, 5:].tolist() == whole[: whole.index(end) + 1]
    stopping.tokenizer = word_tokenizer(eos_token="<pad>")
    assert stopping.generate(tokens, 12, **options)[0, 5:].tolist() == whole[: whole.index(end) + 1]
    assert (
        stopping.generate(tokens, 12, eos_token_id=later, **options)[0, 5:].tolist() == whole[: whole.index(later) + 1]
    )
    assert stopping.generate(tokens, 12, stop_at_eos=False, **options)[0, 5:].tolist() == whole
    result = stopping.generate(tokens, 12, return_type="result", verbose=False)
    assert result.made_by["eos"] == [end, 96, 0]


def test_an_end_that_the_model_can_not_say_ends_nothing():
    model = make(tokenizer=word_tokenizer(eos_token=";"), d_vocab=8, eos_token_ids=(40,))
    result = model.generate("a b", 3, return_type="result", verbose=False)
    assert result.made_by["eos"] == []
    assert result.new_tokens.shape == (1, 3)
