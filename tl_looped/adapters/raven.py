"""The Raven family: Huginn (arXiv 2502.05171), and models with retrofitted recurrence (arXiv 2511.07384).

The latter come from Llama, TinyLlama and OLMo-2. All of them say `RavenForCausalLM`; the weights tell them apart:
`norm_3` is Huginn's, `q_norm` OLMo-2's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source, head_size, rotary
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import QKNorm, Rotary
from tl_looped.engine.schedule import CODA, CORE, PRELUDE
from tl_looped.nn.rotary import inverse_frequencies

_STACKS = {PRELUDE: "prelude", CORE: "core_block", CODA: "coda"}
# Which of our norms norm_1, norm_2, ... are.
_NORMS = {
    "residual_sandwich": ("ln1", "ln1_post", "ln2", "ln2_post"),
    "output": ("ln1_post", "ln2_post"),
    "pre": ("ln1", "ln2"),
}
# How it was trained and initialised.
_TRAINING = ("activation_checkpoint_impl", "effective_expected_depth", "hf_config", "init_orthogonal", "init_strategy")
_TRAINING += ("mean_backprop_depth", "padding_multiple", "sampling_scheme")
_ROTARY_TOLERANCE = 1e-2  # a table stored in bfloat16 is off by up to 2^-9


class RavenAdapter:
    """(p, k⊗T, c) with concat-linear injection and a random initial state."""

    family = "raven"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is of the Raven family."""
        return "RavenForCausalLM" in (config.get("architectures") or ()) or config.get("model_type") == "huginn_raven"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs and the weights' names."""
        config.only(
            architecture_class_name="RecurrentGPT",
            block_class_name="SandwichBlock",  # of the retrofitted models too, whose blocks are none
            injection_type="linear",
            nonlin_name="SiLU",
            norm_class_name="RMSNorm_llama",
            mlp_class_name="GatedMLP",
            bias=False,
            state_init="like-init",
            test_time_noise=0,
        )
        config.harmless(
            *_TRAINING, "test_time_noise_type", "vocab_size", "max_position_embeddings", "num_hidden_layers"
        )
        p, k, c = (config.count(f"n_layers_in_{part}", 0) for part in ("prelude", "recurrent_block", "coda"))
        total = config.get("n_layers", p + k + c)
        if total != p + k + c:
            raise LoadError(f"config.json has n_layers={total}, but prelude, block and coda are {p} + {k} + {c}.")
        d_model = config.one_of("n_embd", "hidden_size") or config.need("n_embd")
        n_heads = config.one_of("n_heads", "num_attention_heads") or config.need("n_heads")
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=head_size(config, d_model, n_heads),
            d_mlp=config.need("intermediate_size"),
            d_vocab=config.get("padded_vocab_size") or config.need("vocab_size"),
            n_ctx=config.need("block_size"),
            n_key_value_heads=config.get("num_key_value_heads"),
            n_prelude=p,
            n_core=k,
            n_coda=c,
            n_loops=config.need("mean_recurrence"),
            eps=config.need("norm_eps"),
            injection="concat_linear",
            state_init="truncated_normal",
            tie_embeddings=config.one_of("tie_embeddings", "tie_word_embeddings", default=False),
            model_name=model_name,
            **self._variant(config, names),
        )

    @staticmethod
    def _variant(config: ConfigKeys, names: frozenset[str]) -> dict[str, Any]:
        """The fields in which Huginn and the retrofitted models differ, and those that hang together with them."""
        init = config.section("init_values")
        init.harmless("embedding", "out_proj")
        scale, first = init.get("embed_scale", 1.0), f"transformer.{_STACKS[CORE]}.0"
        common = {"state_init_std": init.need("std"), "embed_scale": scale}
        if f"{first}.norm_3.weight" in names:
            return common | {
                "family": "huginn",
                "norm_placement": "residual_sandwich",
                "loop_norm": "last",
                "qk_bias": config.get("qk_bias", False),
                "rotary": Rotary(config.need("rope_base"), "adjacent"),
                "state_init_scale": scale,
            }
        config.only(qk_bias=False)
        olmo = f"{first}.attn.q_norm.weight" in names
        return common | {
            "family": "retrofit-olmo2" if olmo else "retrofit-llama",
            "norm_placement": "output" if olmo else "pre",
            "qk_norm": QKNorm() if olmo else None,
            "rotary": rotary(config, config.get("rope_base")),
        }

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": Source("transformer.wte.weight"),
            "injection.weight": Source("transformer.adapter.weight"),
            "ln_final.weight": Source("transformer.ln_f.weight"),
            "unembed.weight": Source("lm_head.weight"),
        }
        for stack, n_layers in ((PRELUDE, cfg.n_prelude), (CORE, cfg.n_core), (CODA, cfg.n_coda)):
            for layer in range(n_layers):
                theirs = f"transformer.{_STACKS[stack]}.{layer}"
                sources |= {f"{stack}.{layer}.{ours}": source for ours, source in self._layer(cfg, theirs).items()}
        return sources

    @staticmethod
    def _layer(cfg: LoopedConfig, theirs: str) -> dict[str, Source]:
        n_query, n_key = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        ends = {"q": (0, n_query), "k": (n_query, n_query + n_key), "v": (n_query + n_key, n_query + 2 * n_key)}
        qkv = (n_query + 2 * n_key, cfg.d_model)
        sources = {
            **{f"attn.{name}.weight": Source(f"{theirs}.attn.Wqkv.weight", *rows, qkv) for name, rows in ends.items()},
            "attn.o.weight": Source(f"{theirs}.attn.proj.weight"),
            "mlp.gate.weight": Source(f"{theirs}.mlp.fc.weight", 0, cfg.d_mlp, (2 * cfg.d_mlp, cfg.d_model)),
            "mlp.up.weight": Source(f"{theirs}.mlp.fc.weight", cfg.d_mlp, None, (2 * cfg.d_mlp, cfg.d_model)),
            "mlp.down.weight": Source(f"{theirs}.mlp.proj.weight"),
        }
        for number, ours in enumerate(_NORMS[cfg.norm_placement], start=1):
            sources[f"{ours}.weight"] = Source(f"{theirs}.norm_{number}.weight")
        if cfg.qk_bias:
            shape = (2, 1, cfg.n_heads, cfg.d_head)
            sources["attn.q.bias"] = Source(f"{theirs}.attn.qk_bias", 0, n_query, shape)
            sources["attn.k.bias"] = Source(f"{theirs}.attn.qk_bias", n_query, None, shape)
        if cfg.qk_norm is not None:
            sources |= {f"attn.{name}.weight": Source(f"{theirs}.attn.{name}.weight") for name in ("q_norm", "k_norm")}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Huginn stores its rotary table; ours is computed, so the two must agree."""
        return {"freqs_cis": partial(check_rotary_table, cfg)}


def check_rotary_table(cfg: LoopedConfig, table: Tensor) -> None:
    """Raise unless a stored table of cosines and sines is that of the config."""
    shape = (1, cfg.n_ctx, 1, cfg.d_head // 2, 2)
    if tuple(table.shape) != shape:
        raise LoadError(f"freqs_cis has shape {tuple(table.shape)}, but the config says {shape}.")
    rotary = cfg.rotary or Rotary()
    angles = torch.arange(cfg.n_ctx, dtype=torch.float32)[:, None] * inverse_frequencies(rotary, cfg.d_head)
    ours = torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]
    error = float((table.float() - ours).abs().max())
    if not error <= _ROTARY_TOLERANCE:  # so that NaN is refused too
        raise LoadError(f"freqs_cis differs by {error:.3g} from the rotary table of base {rotary.base}.")
