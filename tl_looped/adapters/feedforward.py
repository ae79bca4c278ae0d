"""Feedforward models of transformers with Llama's skeleton: Llama, Mistral, Qwen2, Qwen3, OLMo-2, Gemma 2, Gemma 3.

All layers are the core, run once, unless some of them are looped (`loop_layers`): those before are then the prelude and
those after the coda.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, head_size, rotary, scaling
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import QKNorm, Rotary
from tl_looped.nn.rotary import inverse_frequencies

Differences = dict[str, Any]

PRE_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
_OUTPUT = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
_SANDWICH = {**_OUTPUT, "ln1": "input_layernorm", "ln2": "pre_feedforward_layernorm"}
_TURNS_TOLERANCE = 1e-2  # as a share: a table stored in bfloat16 is off by up to 2^-9


@dataclass(eq=False)
class FeedforwardAdapter:
    """One family.

    Attributes:
        family: what it is called.
        architecture, model_type: as config.json says.
        differences: the fields of our config in which it differs from Llama, from its keys and number of layers.
        norms: our norms of a layer, and theirs.
    """

    family: str
    architecture: str
    model_type: str
    differences: Callable[[ConfigKeys, int], Differences]
    norms: dict[str, str] = field(default_factory=lambda: PRE_NORMS)
    feedforward = True

    def claims(self, config: Json) -> bool:
        """Whether a config.json is of this family."""
        named = config.get("architectures") or ()
        return self.architecture in named or (not named and config.get("model_type") == self.model_type)

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs: all layers are the core, run once."""
        config.only(attention_dropout=0.0)
        d_model, n_heads = config.need("hidden_size"), config.need("num_attention_heads")
        layers = config.count("num_hidden_layers")
        fields = {
            "d_model": d_model,
            "n_heads": n_heads,
            "d_head": head_size(config, d_model, n_heads),
            "d_mlp": config.need("intermediate_size"),
            "d_vocab": config.need("vocab_size"),
            "n_ctx": config.need("max_position_embeddings"),
            "n_key_value_heads": config.get("num_key_value_heads"),
            "n_core": layers,
            "n_loops": 1,
            "eps": config.get("rms_norm_eps", 1e-6),
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "model_name": model_name,
            "family": self.family,
        }
        return LoopedConfig(**{**fields, **self.differences(config, layers)})

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": Source("model.embed_tokens.weight"),
            "ln_final.weight": Source("model.norm.weight"),
            "unembed.weight": Source("lm_head.weight"),
        }
        for depth, (stack, layer) in enumerate(cfg.layers()):
            theirs = f"model.layers.{depth}"
            sources |= {f"{stack}.{layer}.{ours}": s for ours, s in decoder_layer(cfg, theirs, self.norms).items()}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Old checkpoints store rotary frequencies beside every layer."""
        check = partial(_check_frequencies, cfg)
        layers = range(len(cfg.layers()))
        return {f"model.layers.{depth}.self_attn.rotary_emb.inv_freq": check for depth in layers}


def decoder_layer(cfg: LoopedConfig, theirs: str, norms: dict[str, str]) -> dict[str, Source]:
    """Where the parameters of one layer come from, in the names that transformers has for decoders."""
    biased = {"q": cfg.qk_bias, "k": cfg.qk_bias, "v": cfg.v_bias, "o": cfg.o_bias}
    maps = {f"attn.{one}": (f"self_attn.{one}_proj", has_bias) for one, has_bias in biased.items()}
    maps |= {f"mlp.{one}": (f"mlp.{one}_proj", cfg.mlp_bias) for one in ("gate", "up", "down")}
    sources = {f"{ours}.weight": f"{name}.weight" for ours, (name, _) in maps.items()}
    sources |= {f"{ours}.bias": f"{name}.bias" for ours, (name, has_bias) in maps.items() if has_bias}
    sources |= {f"{ours}.weight": f"{name}.weight" for ours, name in norms.items()}
    if cfg.qk_norm is not None:
        sources |= {f"attn.{one}.weight": f"self_attn.{one}.weight" for one in ("q_norm", "k_norm")}
    return {ours: Source(f"{theirs}.{name}") for ours, name in sources.items()}


def _check_frequencies(cfg: LoopedConfig, stored: Tensor) -> None:
    ours = inverse_frequencies(cfg.rotary or Rotary(), cfg.d_head)
    if stored.shape != ours.shape or not bool(((stored.float() - ours).abs() <= _TURNS_TOLERANCE * ours).all()):
        raise LoadError("a stored rotary_emb.inv_freq is not that of the config.")


def windows(config: ConfigKeys, kinds: list[str], layers: int, width: int | None) -> tuple[int | None, ...]:
    """The window of each layer; `kinds` says what they are where config.json has no layer_types."""
    kinds = config.get("layer_types", kinds)
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise LoadError(
            f"config.json has layer_types={kinds}: 'full_attention' or 'sliding_attention' for each of {layers} "
            "layers is implemented."
        )
    if "sliding_attention" not in kinds:
        return ()
    if width is None:
        raise LoadError("config.json has layers of sliding_attention, but no sliding_window.")
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def _llama(config: ConfigKeys, layers: int) -> Differences:
    config.only(hidden_act="silu")
    biased = config.get("attention_bias", False)
    mlp = config.get("mlp_bias", False)
    return {"rotary": rotary(config, 10000.0), "qk_bias": biased, "v_bias": biased, "o_bias": biased, "mlp_bias": mlp}


def _mistral(config: ConfigKeys, layers: int) -> Differences:
    config.only(hidden_act="silu")
    config.need("num_key_value_heads")
    width = config.get("sliding_window")
    kinds = ["full_attention" if width is None else "sliding_attention"] * layers
    return {"rotary": rotary(config, 10000.0), "windows": windows(config, kinds, layers, width)}


def _qwen(config: ConfigKeys, layers: int) -> Differences:
    config.only(hidden_act="silu")
    config.need("num_key_value_heads")
    width, first = config.get("sliding_window"), config.get("max_window_layers", layers)
    if not config.get("use_sliding_window", False):
        width, first = None, layers
    kinds = ["sliding_attention" if width and layer >= first else "full_attention" for layer in range(layers)]
    return {"rotary": rotary(config, 10000.0), "windows": windows(config, kinds, layers, width)}


def _qwen2(config: ConfigKeys, layers: int) -> Differences:
    return {**_qwen(config, layers), "qk_bias": True, "v_bias": True}


def _qwen3(config: ConfigKeys, layers: int) -> Differences:
    config.need("head_dim")
    biased = config.get("attention_bias", False)
    return {**_qwen(config, layers), "qk_bias": biased, "v_bias": biased, "o_bias": biased, "qk_norm": QKNorm("head")}


def _olmo2(config: ConfigKeys, layers: int) -> Differences:
    return {**_llama(config, layers), "norm_placement": "output", "qk_norm": QKNorm()}


def _gemma(config: ConfigKeys, layers: int, period: int) -> Differences:
    config.harmless("hidden_act")  # superseded by hidden_activation
    config.only(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    config.need("head_dim")
    config.need("num_key_value_heads")
    kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    biased = config.get("attention_bias", False)
    return {
        "norm_placement": "output_sandwich",
        "norm": "rms_plus_one",
        "act_fn": "gelu_tanh",
        "qk_bias": biased,
        "v_bias": biased,
        "o_bias": biased,
        "attn_scale": config.need("query_pre_attn_scalar") ** -0.5,
        "score_cap": config.get("attn_logit_softcapping"),
        "logit_cap": config.get("final_logit_softcapping"),
        "embed_scale": config.need("hidden_size") ** 0.5,
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "windows": windows(config, kinds, layers, config.get("sliding_window")),
    }


def _gemma2(config: ConfigKeys, layers: int) -> Differences:
    return {**_gemma(config, layers, 2), "rotary": rotary(config, 10000.0)}


def _gemma3(config: ConfigKeys, layers: int) -> Differences:
    period = config.one_of("sliding_window_pattern", "_sliding_window_pattern", default=6)
    since = config.section("rope_parameters")
    if since:
        full, near = since.section("full_attention"), since.section("sliding_attention")
        n_ctx = config.get("max_position_embeddings")
        turns = [Rotary(one.need("rope_theta"), scaling=scaling(one, n_ctx)) for one in (full, near)]
    else:
        turns = [rotary(config, 1e6), Rotary(config.get("rope_local_base_freq", 10000.0))]
    return {
        **_gemma(config, layers, period),
        "qk_norm": QKNorm("head", "rms_plus_one"),
        "rotary": turns[0],
        "rotary_windowed": turns[1],
    }


FEEDFORWARD = (
    FeedforwardAdapter("llama", "LlamaForCausalLM", "llama", _llama),
    FeedforwardAdapter("mistral", "MistralForCausalLM", "mistral", _mistral),
    FeedforwardAdapter("qwen2", "Qwen2ForCausalLM", "qwen2", _qwen2),
    FeedforwardAdapter("qwen3", "Qwen3ForCausalLM", "qwen3", _qwen3),
    FeedforwardAdapter("olmo2", "Olmo2ForCausalLM", "olmo2", _olmo2, _OUTPUT),
    FeedforwardAdapter("gemma2", "Gemma2ForCausalLM", "gemma2", _gemma2, _SANDWICH),
    FeedforwardAdapter("gemma3", "Gemma3ForCausalLM", "gemma3_text", _gemma3, _SANDWICH),
)
