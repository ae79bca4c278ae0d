"""Parcae (arXiv 2604.12946): (p, k⊗T, c)_I with a diagonal injection and value embeddings.

The published forward draws its loop count at random; here it is `mean_recurrence`, as in the published generation,
unless a run says otherwise. The initial state is drawn as for Huginn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.adapters.raven import check_rotary_table
from tl_looped.engine.checks import check_number
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import FLOAT32_EPS, QKNorm, Rotary
from tl_looped.engine.schedule import CODA, CORE, PRELUDE

_STACKS = {PRELUDE: "prelude", CORE: "core_block", CODA: "coda"}
_LAYER = {"ln1": "norm_1", "ln2": "norm_2", "mlp.up": "mlp.fc", "mlp.down": "mlp.proj", "attn.o": "attn.c_proj"}
_LAYER |= {f"attn.{name}": f"attn.c_{name}" for name in "qkv"}
_GATE_READS = 32  # components of what attention reads
_BASE = 50000.0
# Of training, of kernels, and of names.
_HARMLESS = ("name", "hf_config", "padding_multiple", "vocab_size", "attn_impl", "init_orthogonal", "use_fused_head")
_HARMLESS += ("skip_initialization", "activation_checkpoint_impl", "simple_ops", "strategy", "sampling_scheme")
_HARMLESS += ("mean_backprop_depth", "lockstep_n", "lockstep_k", "curriculum_target", "recurrent_iteration_method")
_HARMLESS += ("model_class_name", "_is_recurrent_block_config")


class ParcaeAdapter:
    """Pre-norm layers, an ungated ½relu², a linear map of the state after the loops."""

    family = "parcae"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is Parcae's."""
        return config.get("_class_name") == "ParcaeConfig" or config.get("model_class_name") == "Parcae"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs and the weights' names."""
        d_model, n_heads, d_mlp = (config.count(key) for key in _SIZES)
        config.only(
            _class_name="ParcaeConfig",
            block_class_name="TransformerPreNormBlock",
            norm_class_name="RMSNorm",
            mlp_class_name="BaseMLP",
            nonlin_name="ReLU2",
            bias=False,
            qk_bias=False,
            qk_norm=True,
            injection_type="diagonal",
            state_init="like-init",
            init_strategy="scaled-zero",  # others scale embedding, state and logits
            recurrent_embedding_dimension=d_model,
            recurrent_num_attention_heads=n_heads,
            recurrent_intermediation_embedding_dimension=d_mlp,
        )
        config.harmless(*_HARMLESS)
        turns = config.section("rope_settings")
        turns.only(use_rope=True, rope_condense_ratio=1)
        p, k, c = (config.count(f"n_layers_in_{part}", 0) for part in ("prelude", "recurrent_block", "coda"))
        fields = LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=d_mlp,
            d_vocab=config.get("padded_vocab_size") or config.need("vocab_size"),
            n_ctx=config.need("block_size"),
            n_key_value_heads=config.get("num_key_value_heads"),
            n_prelude=p,
            n_core=k,
            n_coda=c,
            n_loops=config.need("mean_recurrence"),
            eps=config.need("norm_eps"),
            act_fn="half_relu2",
            gated_mlp=False,
            qk_norm=QKNorm("head", "weightless", after_rotary=True, eps=FLOAT32_EPS),
            rotary=Rotary(check_number("rope_base", turns.get("rope_base", _BASE)), "adjacent"),
            injection="diagonal",
            state_out=True,
            state_init="truncated_normal",
            state_init_std=math.sqrt(2 / (5 * d_model)),
            prelude_norm=config.get("prelude_norm", False),
            logit_cap=config.get("logit_softcap"),
            tie_embeddings=config.get("tie_embeddings", True),
            model_name=model_name,
            family=self.family,
            value_gate_size=_GATE_READS,
            value_embeds=_live(p, k, c, names),
        )
        if k and fields.kv_heads != n_heads:
            raise LoadError(
                f"config.json has num_key_value_heads={fields.kv_heads} for {n_heads} heads, which core layers here "
                "never share: only as many is implemented."
            )
        return fields

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {
            "embed.weight": "transformer.wte.weight",
            "injection.log_rate": "transformer.adapter.A_log",
            "injection.step_bias": "transformer.adapter.dt_bias",
            "injection.input.weight": "transformer.adapter.B",
            "state_out.weight": "transformer.C.weight",
            "ln_final.weight": "transformer.ln_f.weight",
            "unembed.weight": "lm_head.weight",
        }
        if cfg.prelude_norm:
            sources["ln_prelude.weight"] = "transformer.ln_prelude.weight"
        for number, (stack, layer) in enumerate(cfg.layers()):
            ours, theirs = f"{stack}.{layer}", f"transformer.{_STACKS[stack]}.{layer}"
            sources |= {f"{ours}.{one}.weight": f"{theirs}.{two}.weight" for one, two in _LAYER.items()}
            if cfg.has_value_embed(stack, layer):
                sources[f"{ours}.attn.value_embed.weight"] = _table(number)
                sources[f"{ours}.attn.value_gate.weight"] = _gate(stack, layer)
        return {ours: Source(theirs) for ours, theirs in sources.items()}

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """The rotary table must agree with ours; a gate without a table, or a table without a gate, is never read."""
        unread = [
            name
            for number, (stack, layer) in enumerate(cfg.layers())
            if not cfg.has_value_embed(stack, layer)
            for name in (_table(number), _gate(stack, layer))
        ]
        return {"freqs_cis": partial(check_rotary_table, cfg), **dict.fromkeys(unread, lambda stored: None)}


def _table(number: int) -> str:
    return f"value_embeds.{number}.weight"


def _gate(stack: str, layer: int) -> str:
    return f"transformer.{_STACKS[stack]}.{layer}.attn.ve_gate.weight"


def _live(p: int, k: int, c: int, names: frozenset[str]) -> tuple[bool, ...]:
    """Which layers have both a table of value embeddings and a gate: only together do they act."""
    places = [(stack, layer) for stack, count in ((PRELUDE, p), (CORE, k), (CODA, c)) for layer in range(count)]
    return tuple({_table(number), _gate(*place)} <= names for number, place in enumerate(places))


_SIZES = ("n_embd", "num_attention_heads", "intermediate_size")
