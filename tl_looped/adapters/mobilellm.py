"""MobileLLM (arXiv 2402.14905): Llama, and with `layer_sharing` each layer twice in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.adapters.feedforward import FEEDFORWARD
from tl_looped.engine.config import LoopedConfig

_LLAMA = next(base for base in FEEDFORWARD if base.family == "llama")
_TIMES = 2  # a shared layer runs


class MobileLLMAdapter:
    """No part of it loops as a whole: what runs twice is a layer, so that its calls are layers of a core run once."""

    family = "mobilellm"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is MobileLLM's."""
        named = config.get("architectures") or ()
        return "MobileLLMForCausalLM" in named or (not named and config.get("model_type") == "mobilellm")

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config from theirs."""
        base = _LLAMA.config(config, names, model_name)
        times = _TIMES if config.get("layer_sharing", False) else 1
        tied = config.get("share_embedding", False) or base.tie_embeddings
        return replace(base, n_core=times * base.n_core, layer_repeats=times, tie_embeddings=tied, family=self.family)

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        times = cfg.layer_repeats
        stored = _LLAMA.sources(replace(cfg, n_core=cfg.n_core // times, layer_repeats=1))
        sources = {}
        for ours, source in stored.items():
            stack, _, rest = ours.partition(".")
            layer, _, name = rest.partition(".")
            sources[f"{stack}.{times * int(layer)}.{name}" if stack == "blocks" else ours] = source
        return sources

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}
