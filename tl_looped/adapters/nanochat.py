"""nanochat and its looped forks.

They are Trelis's branch `recursive` (arXiv 2604.11791, section 5.1) and looped_nanochat (arXiv 2604.21106). Their
config.json is the meta file of a checkpoint, whose `model_config` alone makes the model. Gradients reach every loop
here, where the published code cuts them off before the last `bptt_k`. A cache of keys and values has a slot for every
loop, so that decoding equals a full forward; theirs lets all loops share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.parts import FLOAT32_EPS, QKNorm, Rotary
from tl_looped.engine.schedule import CODA, CORE, PRELUDE

_STACKS = {PRELUDE: "prelude", CORE: "recur", CODA: "coda"}
_MAPS = {"attn.q": "attn.c_q", "attn.k": "attn.c_k", "attn.v": "attn.c_v", "attn.o": "attn.c_proj"}
_MAPS |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
_NORMS = {"ln1": "n1", "ln1_post": "n2", "ln2": "n3", "ln2_post": "n4"}
_OUTER_NORMS = {"ln_embed": "norm_emb", "ln_loop": "norm_recur", "ln_final": "norm_final"}
# Of training, and of the published cache.
_HARMLESS = ("train_recur_max", "bptt_k", "recur_warm_start", "kv_cache_recur_budget", "kv_budget", "size", "n_layer")
_VOCAB_MULTIPLE = 64  # looped_nanochat pads its vocabulary to a multiple, and crops the logits


class NanochatAdapter:
    """The feedforward model: all layers are the core, run once, unless some are looped."""

    family = "nanochat"
    feedforward = True

    def claims(self, config: Json) -> bool:
        """Whether a config.json is such a meta file, of a model that does not loop."""
        return "n_embd" in _model_config(config) and "n_recur_block" not in _model_config(config)

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.harmless(*config.rest())  # what stands beside the model's own keys is of training
        keys = config.section("model_config")
        names_of: dict[str, Any] = {"model_name": model_name, "family": self.family}
        return LoopedConfig(**_common(keys), n_core=keys.need("n_layer"), n_loops=1, **names_of)

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        return _sources(cfg, [f"transformer.h.{depth}" for depth in range(len(cfg.layers()))])

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}


class LoopedNanochatAdapter(NanochatAdapter):
    """(p, k⊗T, c)_I: the two forks, told apart by their weights."""

    family = "nanochat-recursive"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is such a meta file, of a model that loops."""
        return "n_recur_block" in _model_config(config)

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        config.harmless(*config.rest())
        keys = config.section("model_config")
        keys.harmless(*_HARMLESS)
        keys.only(inject_mode="concat_linear")
        fields = _common(keys) | {
            "n_prelude": keys.count("n_prelude", 0),
            "n_core": keys.count("n_recur_block"),
            "n_coda": keys.count("n_coda", 0),
            "n_loops": int(keys.need("train_recur_mean")),
            "injection": "concat_linear_prelude_first",
            "family": self.family,
            "model_name": model_name,
        }
        if "norm_recur.weight" in names:
            fields |= _fork(keys, fields)
        return LoopedConfig(**fields)

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        sources = _sources(cfg, [f"transformer.{_STACKS[stack]}.{layer}" for stack, layer in cfg.layers()])
        if cfg.reads_input_in_loops:
            sources["injection.weight"] = Source("inject.weight")
        if cfg.family == "looped-nanochat":
            sources |= {f"{ours}.weight": Source(f"{theirs}.weight") for ours, theirs in _OUTER_NORMS.items()}
            padded = (-(-cfg.d_vocab // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE, cfg.d_model)
            for ours, theirs in (("embed", "transformer.wte"), ("unembed", "lm_head")):
                sources[f"{ours}.weight"] = Source(f"{theirs}.weight", 0, cfg.d_vocab, padded)
        return sources


def _model_config(config: Json) -> Json:
    found = config.get("model_config")
    return found if isinstance(found, dict) else {}


def _common(keys: ConfigKeys) -> dict[str, Any]:
    """What the feedforward model and the branch `recursive` share."""
    d_model, n_heads = keys.count("n_embd"), keys.count("n_head")
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "d_head": d_model // n_heads,
        "d_mlp": 4 * d_model,
        "d_vocab": keys.need("vocab_size"),
        "n_ctx": keys.need("sequence_len"),
        "n_key_value_heads": keys.get("n_kv_head"),
        "norm": "weightless",
        "eps": FLOAT32_EPS,
        "act_fn": "relu2",
        "gated_mlp": False,
        "qk_norm": QKNorm("head", "weightless", after_rotary=True),
        "rotary": Rotary(reversed=True, bfloat16=True),
        "embed_norm": True,
        "logit_cap": 15.0,
    }


def _fork(keys: ConfigKeys, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields in which looped_nanochat differs from the branch `recursive`."""
    n_ctx, layers = fields["n_ctx"], sum(fields[name] for name in ("n_prelude", "n_core", "n_coda"))
    mixed = {"inject_init_prelude": {}, "passthrough": {"injection": "none"}}
    mixed["inject_init_random"] = {"state_init": "normal", "state_init_std": fields["d_model"] ** -0.5}
    chosen, pattern = keys.get("input_injection", "inject_init_prelude"), keys.get("window_pattern", "L")
    if chosen not in mixed:
        known = ", ".join(map(repr, sorted(mixed)))
        raise LoadError(f"config.json has input_injection={chosen!r}, which is not implemented: only {known} are.")
    if not pattern or set(pattern) - {"L", "S"}:
        raise LoadError(f"config.json has window_pattern={pattern!r}, which should be of L and S.")
    kinds = [pattern[layer % len(pattern)] for layer in range(layers - 1)] + ["L"]
    windows = tuple(n_ctx // 2 + 1 if kind == "S" else None for kind in kinds)  # a window of w shows w + 1 keys
    return {
        "norm": "rms",
        "eps": 1e-6,
        "norm_placement": "residual_sandwich",
        "loop_norm": "own",
        "windows": windows if "S" in kinds else (),
        "family": "looped-nanochat",
        **mixed[chosen],
    }


def _sources(cfg: LoopedConfig, layers: list[str]) -> dict[str, Source]:
    sources = {"embed.weight": Source("transformer.wte.weight"), "unembed.weight": Source("lm_head.weight")}
    parts = _MAPS if cfg.norm == "weightless" else _MAPS | _NORMS
    for (stack, layer), theirs in zip(cfg.layers(), layers, strict=True):
        sources |= {f"{stack}.{layer}.{one}.weight": Source(f"{theirs}.{two}.weight") for one, two in parts.items()}
    return sources
