"""LoopUS (arXiv 2605.11011): the layers of a Qwen3 or Llama model as prelude, core and coda, with a learned gate.

The published code stops a whole prompt at inference once its exit head says so at the last position. Here all loops run
unless an exit rule is given, and a rule judges every token by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.adapters.feedforward import FEEDFORWARD, PRE_NORMS, decoder_layer
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.engine.schedule import CODA, CORE, PRELUDE

_STACKS = {PRELUDE: "encoder", CORE: "reasoning", CODA: "decoder"}
_BASES = {base.model_type: base for base in FEEDFORWARD if base.model_type in ("llama", "qwen3")}
# When the published inference stops early, and what it was made from; the base's sizes stand in base_config_dict.
_HARMLESS = ("q_threshold", "q_eval_interval", "convergence_epsilon", "base_model_name_or_path")
_CHANNELS_PER_RANK = 16


class LoopUSAdapter:
    """(p, k⊗T, c): e is the first state and never injected again."""

    family = "loopus"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is LoopUS's."""
        return config.get("model_type") == "lds"

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs and that of the base model."""
        config.only(halting_strategy={"threshold", "cdf", "convergence"})
        config.harmless(*_HARMLESS)
        if any(name.startswith("plateau.") for name in names):
            raise LoadError("the weights are of the older form, which says 'plateau.': rename these to 'reasoning.'.")
        keys = config.section("base_config_dict", whole=True)
        kind = keys.need("model_type")
        if kind not in _BASES:
            raise LoadError(
                f"config.json has base_config_dict.model_type={kind!r}, which is not implemented: only "
                f"{' and '.join(map(repr, _BASES))} are."
            )
        base = _BASES[kind].config(keys, names, model_name)
        for key, size in (("hidden_size", base.d_model), ("vocab_size", base.d_vocab)):
            config.only(**{key: size})
        stacks = {part: _indices(config, f"{part}_layer_indices", base.n_core) for part in _STACKS.values()}
        ends = keys.get("eos_token_id")
        order = [layer for part in stacks.values() for layer in part]
        return replace(
            base,
            n_prelude=len(stacks["encoder"]),
            n_core=len(stacks["reasoning"]),
            n_coda=len(stacks["decoder"]),
            n_loops=config.need("N"),
            windows=tuple(base.windows[layer] for layer in order) if base.windows else (),
            loop_update="gated",
            gate_rank=-(-base.d_model // _CHANNELS_PER_RANK),
            exit_gate=True,
            exit_norm=True,
            eos_token_ids=tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
            tie_embeddings=False,  # the head is stored by itself, whatever the base does
            family=self.family,
        )

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        names = {
            "embed.weight": "encoder.embed_tokens.weight",
            "ln_final.weight": "decoder.norm.weight",
            "unembed.weight": "decoder.lm_head.weight",
            "update_gate.inner.weight": "reasoning.gate.dt_input_proj.weight",
            "update_gate.log_rate": "reasoning.gate.A_log",
        }
        for kind in ("weight", "bias"):
            names[f"update_gate.outer.{kind}"] = f"reasoning.gate.delta_proj.{kind}"
            names |= {f"exit_{ours}.{kind}": f"q_head.{i}.{kind}" for i, ours in enumerate(("norm", "gate"))}
        sources = {ours: Source(theirs) for ours, theirs in names.items()}
        for stack, layer in cfg.layers():
            theirs = decoder_layer(cfg, f"{_STACKS[stack]}.layers.{layer}", PRE_NORMS)
            sources |= {f"{stack}.{layer}.{ours}": source for ours, source in theirs.items()}
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}


def _indices(config: ConfigKeys, key: str, layers: int) -> list[int]:
    """Which of the base's layers a part has; a single -n is n to the last."""
    given: Any = config.need(key)
    if not isinstance(given, list) or not all(type(one) is int for one in given):
        raise LoadError(f"config.json has {key}={given!r}, which should be a list of layers.")
    if len(given) == 1 and given[0] < 0 and not key.startswith("reasoning"):
        given = list(range(-given[0], layers))
    if not all(0 <= one < layers for one in given):
        raise LoadError(f"config.json has {key}={given!r}, but the base has {layers} layers.")
    return given
