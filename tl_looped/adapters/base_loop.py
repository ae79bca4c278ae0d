"""Base-Loop, the unconditioned model of LoopFormer (arXiv 2602.11451): (0, k⊗T, 0) with learned positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, gpt_layer
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.parts import FLOAT32_EPS

_LOOPS = 8  # what the published code runs when it is not told


class BaseLoopAdapter:
    """Pre-norm layers without rotary, an ungated GELU, a head tied to the embedding."""

    family = "base-loop"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is Base-Loop's."""
        return config.get("model_type") == "base_loop"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.harmless("dropout")  # never active in evaluation
        d_model = config.one_of("n_embd", "hidden_size") or config.need("n_embd")
        n_heads = config.one_of("n_head", "num_attention_heads") or config.need("n_head")
        biased = config.get("bias", False)
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=config.one_of("intermediate_dim", "intermediate_size") or config.need("intermediate_dim"),
            d_vocab=config.need("vocab_size"),
            n_ctx=config.one_of("block_size", "n_positions", "max_position_embeddings") or config.need("block_size"),
            n_core=config.one_of("n_layer", "num_hidden_layers") or config.need("n_layer"),
            n_loops=_LOOPS,
            eps=FLOAT32_EPS,
            act_fn="gelu",
            gated_mlp=False,
            qk_bias=biased,
            v_bias=biased,
            o_bias=biased,
            mlp_bias=biased,
            rotary=None,
            learned_positions=True,
            tie_embeddings=True,
            model_name=model_name,
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": Source("transformer.wte.weight"),
            "pos_embed.weight": Source("transformer.wpe.weight"),
            "ln_final.weight": Source("transformer.norm_f.weight"),
            "unembed.weight": Source("lm_head.weight"),
        }
        for layer in range(cfg.n_core):
            ours, theirs = f"blocks.{layer}", f"transformer.h.blocks.{layer}"
            maps = gpt_layer(theirs, cfg.d_model, biased=cfg.mlp_bias)
            sources |= {f"{ours}.{name}": source for name, source in maps.items()}
            for i in (1, 2):
                sources[f"{ours}.ln{i}.weight"] = Source(f"{theirs}.norm_{i}.weight")
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}
