"""Ouro (arXiv 2510.25741): ByteDance/Ouro-1.4B, -2.6B and their -Thinking variants."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import Json, Source, head_size, need, only, rotary
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

    def claims(self, config: Json) -> bool:
        """Whether a config.json is Ouro's."""
        return "OuroForCausalLM" in (config.get("architectures") or ()) or config.get("model_type") == "ouro"

    def config(self, config: Json, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        only(config, hidden_act="silu", use_sliding_window=False, attention_bias=False, attention_dropout=0.0)
        layers = need(config, "num_hidden_layers")
        kinds = config.get("layer_types") or ["full_attention"] * layers
        if set(kinds) != {"full_attention"} or len(kinds) != layers:
            raise LoadError(
                f"config.json has layer_types={kinds}: only 'full_attention' in all {layers} layers is implemented."
            )
        base, scaling = rotary(config)
        d_model, n_heads = need(config, "hidden_size"), need(config, "num_attention_heads")
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=head_size(config, d_model, n_heads),
            d_mlp=need(config, "intermediate_size"),
            d_vocab=need(config, "vocab_size"),
            n_ctx=need(config, "max_position_embeddings"),
            n_key_value_heads=config.get("num_key_value_heads"),
            n_core=layers,
            n_loops=need(config, "total_ut_steps"),
            norm_placement="output_sandwich",
            eps=need(config, "rms_norm_eps"),
            rotary_base=base,
            rotary_scaling=scaling,
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
