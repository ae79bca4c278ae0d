"""ALBERT (transformers' AlbertForMaskedLM) with one group of layers: (0, k⊗N, 0), seeing tokens in both directions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import ActFn

_ACTS: dict[str, ActFn] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_LAYER = {f"attn.{name[0]}": f"attention.{name}" for name in ("query", "key", "value")}
_LAYER |= {"attn.o": "attention.dense", "ln1_post": "attention.LayerNorm", "mlp.up": "ffn", "mlp.down": "ffn_output"}
_LAYER |= {"ln2_post": "full_layer_layer_norm"}
_ENDS = {
    "ln_embed": "albert.embeddings.LayerNorm",
    "embed_map": "albert.encoder.embedding_hidden_mapping_in",
    "head_transform.inner": "predictions.dense",
    "head_transform.norm": "predictions.LayerNorm",
}
_DROPOUT = ("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout_prob")
# Of sentence order, beside the language model; and what is stored twice.
_BESIDE = ("albert.pooler.weight", "albert.pooler.bias", "sop_classifier.classifier.weight")
_BESIDE += ("sop_classifier.classifier.bias", "predictions.decoder.bias", "albert.embeddings.position_ids")


class AlbertAdapter:
    """Post-norm layers with biases, a factorised embedding, a head with a transform."""

    family = "albert"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is ALBERT's."""
        named = config.get("architectures") or ()
        return "AlbertForMaskedLM" in named or (not named and config.get("model_type") == "albert")

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        act = config.get("hidden_act", "gelu_new")
        config.only(num_hidden_groups=1, hidden_act=set(_ACTS), position_embedding_type="absolute")
        config.harmless(*_DROPOUT)
        if not config.get("tie_word_embeddings", True):
            raise LoadError("config.json has tie_word_embeddings=False, which is not implemented: the head is tied.")
        d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
        return LoopedConfig(
            d_model=d_model,
            n_heads=n_heads,
            d_head=d_model // n_heads,
            d_mlp=config.need("intermediate_size"),
            d_vocab=config.need("vocab_size"),
            n_ctx=config.need("max_position_embeddings"),
            n_core=config.get("inner_group_num", 1),
            n_loops=config.need("num_hidden_layers"),
            norm_placement="post",
            norm="layer",
            eps=config.get("layer_norm_eps", 1e-12),
            act_fn=_ACTS[act],
            gated_mlp=False,
            mlp_bias=True,
            qk_bias=True,
            v_bias=True,
            o_bias=True,
            causal=False,
            rotary=None,
            learned_positions=True,
            d_embed=config.count("embedding_size"),
            n_token_types=config.count("type_vocab_size"),
            embed_norm=True,
            final_norm=False,
            head_transform=True,
            tie_embeddings=True,
            model_name=model_name,
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = {f"{one}.weight": f"albert.embeddings.{two}_embeddings.weight" for one, two in _EMBEDDINGS.items()}
        sources |= {"unembed.weight": "predictions.decoder.weight", "unembed.bias": "predictions.bias"}
        for kind in ("weight", "bias"):
            sources |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _ENDS.items()}
            for layer in range(cfg.n_core):
                place = f"albert.encoder.albert_layer_groups.0.albert_layers.{layer}"
                sources |= {f"blocks.{layer}.{one}.{kind}": f"{place}.{two}.{kind}" for one, two in _LAYER.items()}
        return {ours: Source(theirs) for ours, theirs in sources.items()}

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """What is stored beside the language model changes nothing in it."""
        return dict.fromkeys(_BESIDE, lambda stored: None)


_EMBEDDINGS = {"embed": "word", "pos_embed": "position", "type_embed": "token_type"}
