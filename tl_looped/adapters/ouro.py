"""Ouro (arXiv 2510.25741): ByteDance/Ouro-1.4B, -2.6B and their -Thinking variants."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, head_size, rotary
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError

_LAYER = {
    "ln1.weight": "input_layernorm.weight",
    "ln1_post.weight": "input_layernorm_2.weight",
    "ln2.weight": "post_attention_layernorm.weight",
    "ln2_post.weight": "post_attention_layernorm_2.weight",
    **{f"attn.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"mlp.{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}


class OuroAdapter:
    """(0, k⊗T, 0): output sandwich, the final norm after every loop, an exit gate."""

    family = "ouro"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is Ouro's."""
        return "OuroForCausalLM" in (config.get("architectures") or ()) or config.get("model_type") == "ouro"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.only(hidden_act="silu", use_sliding_window=False, attention_bias=False, attention_dropout=0.0)
        config.harmless("sliding_window", "max_window_layers")  # without use_sliding_window they say nothing
        layers = config.count("num_hidden_layers")
        kinds = config.get("layer_types", ["full_attention"] * layers)
        if kinds != ["full_attention"] * layers:
            raise LoadError(
                f"config.json has layer_types={kinds}: only 'full_attention' in all {layers} layers is implemented."
            )
        d_model, n_heads = config.need("hidden_size"), config.need("num_attention_heads")
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=head_size(config, d_model, n_heads),
            d_mlp=config.need("intermediate_size"),
            d_vocab=config.need("vocab_size"),
            n_ctx=config.need("max_position_embeddings"),
            n_key_value_heads=config.get("num_key_value_heads"),
            n_core=layers,
            n_loops=config.need("total_ut_steps"),
            norm_placement="output_sandwich",
            eps=config.need("rms_norm_eps"),
            rotary=rotary(config),
            loop_norm="each",
            final_norm=False,
            exit_gate=True,
            exit_threshold=config.get("early_exit_threshold", 1.0),
            tie_embeddings=config.get("tie_word_embeddings", False),
            model_name=model_name,
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": "model.embed_tokens.weight",
            "ln_final.weight": "model.norm.weight",
            "unembed.weight": "lm_head.weight",
            "exit_gate.weight": "model.early_exit_gate.weight",
            "exit_gate.bias": "model.early_exit_gate.bias",
        }
        for layer in range(cfg.n_core):
            sources |= {f"blocks.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in _LAYER.items()}
        return {ours: Source(theirs) for ours, theirs in sources.items()}

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}
