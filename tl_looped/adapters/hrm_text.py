"""HRM-Text (transformers' HrmTextForCausalLM): two stacks on two timescales, each with a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, rotary
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.parts import TwoStates
from tl_looped.engine.schedule import FAST, SLOW

_STACKS = {FAST: "L_module", SLOW: "H_module"}
_FUSED = {  # the released form: rows of one tensor, in order; _MODULES: that of transformers' own modules
    "attn.gqkv_proj": ("attn.gate", "attn.q", "attn.k", "attn.v"),
    "attn.o_proj": ("attn.o",),
    "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
    "mlp.down_proj": ("mlp.down",),
}
_MODULES = {f"self_attn.{name}_proj": (f"attn.{name}",) for name in ("gate", "q", "k", "v", "o")}
_MODULES |= {f"mlp.{name}_proj": (f"mlp.{name}",) for name in ("gate", "up", "down")}


class HrmTextAdapter:
    """Weightless pre-norm layers with gated attention; z_H starts as the scaled embedding, z_L as a stored vector."""

    family = "hrm-text"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is HRM-Text's."""
        return "HrmTextForCausalLM" in (config.get("architectures") or ()) or config.get("model_type") == "hrm_text"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        n_heads = config.count("num_attention_heads")
        config.only(hidden_act="silu", attention_bias=False, mlp_bias=False, num_key_value_heads=n_heads)
        config.harmless("attention_dropout", "L_bp_cycles", "num_hidden_layers")  # training; the size of a cache
        fused = not any(name.endswith("q_proj.weight") for name in names)
        return LoopedConfig(
            d_model=config.need("hidden_size"),
            n_heads=n_heads,
            d_head=config.get("head_dim", 128),  # what transformers takes where it is missing
            d_mlp=config.need("intermediate_size"),
            d_vocab=config.need("vocab_size"),
            n_ctx=config.need("max_position_embeddings"),
            # Before transformers counted layer calls there, num_hidden_layers was that of a stack.
            n_core=config.get("num_layers_per_stack") or config.need("num_hidden_layers"),
            n_loops=config.need("H_cycles"),
            two_states=TwoStates(config.need("L_cycles")),
            norm="weightless",
            eps=config.need("rms_norm_eps"),
            attn_gate=True,
            prefix_lm=config.get("prefix_lm", True),
            rotary=rotary(config, default_base=10000.0),
            loop_norm="each",
            final_norm=False,
            embed_scale=config.get("embedding_scale") or 1 / config.get("initializer_range", 0.02),
            tie_embeddings=config.get("tie_word_embeddings", False),
            model_name=model_name,
            family=self.family if fused else f"{self.family}-modules",
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": Source("model.embed_tokens.weight"),
            "state_init": Source("model.z_L_init"),
            "unembed.weight": Source("lm_head.weight"),
        }
        for stack, theirs in _STACKS.items():
            for layer in range(cfg.n_core):
                of_layer = _layer(cfg, f"model.{theirs}.layers.{layer}")
                sources |= {f"{stack}.{layer}.{ours}.weight": source for ours, source in of_layer}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}


def _layer(cfg: LoopedConfig, theirs: str) -> Iterator[tuple[str, Source]]:
    """The maps of a layer, in the form in which its weights are stored."""
    rows = dict.fromkeys(("attn.gate", "attn.q", "attn.k", "attn.v"), cfg.n_heads * cfg.d_head)
    rows |= {"mlp.gate": cfg.d_mlp, "mlp.up": cfg.d_mlp}
    for name, parts in (_FUSED if cfg.family == HrmTextAdapter.family else _MODULES).items():
        if len(parts) == 1:
            yield parts[0], Source(f"{theirs}.{name}.weight")
        else:
            shape, size = (sum(rows[part] for part in parts), cfg.d_model), rows[parts[0]]
            for i, part in enumerate(parts):
                yield part, Source(f"{theirs}.{name}.weight", i * size, (i + 1) * size, shape)
