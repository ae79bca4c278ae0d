"""Looped-GPT, a nanoGPT whose layers refine a state: (0, k⊗T, k), the coda being the core once more.

Its `loop_steps` counts passes: all but the last add what the layers make of the state to it, and the last is plain, its
output being what the head reads. So a run here has a loop fewer than theirs has passes, and then the plain pass, as the
coda; that is also how the state after any loop is read out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, gpt_layer
from tl_looped.adapters.gpt2 import check_triangle
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError


class LoopedGPTAdapter:
    """GPT-2's layers, all biases or none, a residual update of the state, a tied head."""

    family = "looped-gpt"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json has the keys that it adds to nanoGPT's."""
        return "loop_steps" in config and "n_embd" in config

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.need("recurrent_refinement")
        config.only(recurrent_refinement=True)
        config.harmless("dropout")  # never active in evaluation
        d_model, n_heads, layers = config.count("n_embd"), config.count("n_head"), config.count("n_layer")
        passes = config.count("loop_steps")
        if passes == 1:
            raise LoadError(
                "config.json has loop_steps=1: the one pass through the layers is then the plain one, so no loop "
                "updates a state. At least 2 is needed."
            )
        biased = config.get("bias", True)
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=4 * d_model,
            d_vocab=config.need("vocab_size"),
            n_ctx=config.need("block_size"),
            n_core=layers,
            n_coda=layers,
            coda_is_core=True,
            n_loops=passes - 1,
            loop_update="residual",
            norm="layer" if biased else "layer_no_bias",
            eps=1e-5,
            act_fn="gelu_tanh",
            gated_mlp=False,
            qk_bias=biased,
            v_bias=biased,
            o_bias=biased,
            mlp_bias=biased,
            scores_by_layer=config.get("scale_attn_by_inverse_layer_idx", False),
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
            "unembed.weight": Source("lm_head.weight"),
        }
        norms = {"ln_final": "transformer.ln_f"}
        for layer in range(cfg.n_core):
            theirs = f"transformer.h.{layer}"
            maps = gpt_layer(theirs, cfg.d_model, biased=cfg.mlp_bias)
            sources |= {f"blocks.{layer}.{ours}": source for ours, source in maps.items()}
            norms |= {f"blocks.{layer}.ln{i}": f"{theirs}.ln_{i}" for i in (1, 2)}
        for kind in ("weight", "bias") if cfg.norm == "layer" else ("weight",):
            sources |= {f"{ours}.{kind}": Source(f"{theirs}.{kind}") for ours, theirs in norms.items()}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Without fused attention the causal mask is stored beside every layer."""
        return {f"transformer.h.{layer}.attn.bias": check_triangle for layer in range(cfg.n_core)}
