"""GPT-2, the feedforward model of transformers: LayerNorms, learned positions, biases, weights stored [in, out]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, gpt_layer
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import ActFn

_ACTS: dict[str, ActFn] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_KINDS = ("weight", "bias")
# Of training, of heads that are no language model, and of how softmax is computed.
_HARMLESS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn")
_HARMLESS += tuple(f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj"))


class GPT2Adapter:
    """All layers are the core, run once, unless some are looped."""

    family = "gpt2"
    feedforward = True

    def claims(self, config: Json) -> bool:
        """Whether a config.json is GPT-2's."""
        named = config.get("architectures") or ()
        return "GPT2LMHeadModel" in named or (not named and config.get("model_type") == "gpt2")

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.only(activation_function=set(_ACTS))
        config.harmless(*_HARMLESS)
        d_model, n_heads = config.count("n_embd"), config.count("n_head")
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=config.get("n_inner") or 4 * d_model,
            d_vocab=config.need("vocab_size"),
            n_ctx=config.need("n_positions"),
            n_core=config.need("n_layer"),
            n_loops=1,
            norm="layer",
            eps=config.get("layer_norm_epsilon", 1e-5),
            act_fn=_ACTS[config.get("activation_function", "gelu_new")],
            gated_mlp=False,
            mlp_bias=True,
            qk_bias=True,
            v_bias=True,
            o_bias=True,
            rotary=None,
            learned_positions=True,
            scores_by_layer=config.get("scale_attn_by_inverse_layer_idx", False),
            tie_embeddings=config.get("tie_word_embeddings", True),
            model_name=model_name,
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": Source("transformer.wte.weight"),
            "pos_embed.weight": Source("transformer.wpe.weight"),
            "ln_final.weight": Source("transformer.ln_f.weight"),
            "ln_final.bias": Source("transformer.ln_f.bias"),
            "unembed.weight": Source("lm_head.weight"),
        }
        for depth, (stack, layer) in enumerate(cfg.layers()):
            theirs = f"transformer.h.{depth}"
            layer_sources = gpt_layer(theirs, cfg.d_model, biased=True, transposed=True)
            layer_sources |= {f"ln{i}.{kind}": Source(f"{theirs}.ln_{i}.{kind}") for i in (1, 2) for kind in _KINDS}
            sources |= {f"{stack}.{layer}.{ours}": one for ours, one in layer_sources.items()}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Old checkpoints store the causal mask, and what masked scores are set to, beside every layer."""
        layers = range(len(cfg.layers()))
        masks = {f"transformer.h.{depth}.attn.bias": check_triangle for depth in layers}
        return masks | {f"transformer.h.{depth}.attn.masked_bias": lambda stored: None for depth in layers}


def check_triangle(stored: Tensor) -> None:
    """Raise unless a stored mask is the causal one."""
    if not torch.equal(stored.bool(), torch.ones_like(stored, dtype=torch.bool).tril()):
        raise LoadError("a stored attn.bias is no causal mask.")
