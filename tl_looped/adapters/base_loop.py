"""LoopFormer (arXiv 2602.11451), whose loops have a time, and Base-Loop, which it is compared with: (0, k⊗T, 0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
            if not cfg.loop_time:
                sources |= {f"{ours}.ln{i}.weight": Source(f"{theirs}.norm_{i}.weight") for i in (1, 2)}
                continue
            for kind in ("weight", "bias"):
                sources[f"{ours}.modulation.{kind}"] = Source(f"{theirs}.adaLN_modulation.1.{kind}")
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}


class LoopFormerAdapter(BaseLoopAdapter):
    """The same with layers modulated by the time and the step size of the loop, norms in them without weights."""

    family = "loopformer"

    def claims(self, config: Json) -> bool:
        """Whether a config.json is LoopFormer's."""
        return config.get("model_type") == "loopformer"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        base = super().config(config, names, model_name)
        return replace(base, loop_time=True, norm="weightless", final_norm_kind="rms")

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = super().sources(cfg)
        for ours, theirs in (("time_embed", "time_embedder"), ("step_embed", "dt_embedder")):
            for kind in ("weight", "bias"):
                sources[f"{ours}.inner.{kind}"] = Source(f"{theirs}.mlp.0.{kind}")
                sources[f"{ours}.outer.{kind}"] = Source(f"{theirs}.mlp.2.{kind}")
        return sources
