"""tl_looped's own format: config.json with our fields, weights under our names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.nn import build

FORMAT = "tl_looped"
VERSION = 2


def to_json(cfg: LoopedConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": FORMAT, "format_version": VERSION, "config": cfg.to_dict()}


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of today from those of tl_looped 0.1."""
    rotary = {ours: values.pop(f"rotary_{ours}") for ours in ("style", "base", "scaling") if f"rotary_{ours}" in values}
    for name in ("", "_std", "_scale"):
        if f"initial_state{name}" in values:
            values[f"state_init{name}"] = values.pop(f"initial_state{name}")
    return values | {"rotary": rotary, "qk_norm": {} if values.get("qk_norm") else None}


class NativeAdapter:
    """What `LoopedModel.save_pretrained` writes."""

    family = "tl_looped"
    feedforward = False

    def claims(self, config: Json) -> bool:
        """Whether a config.json is ours."""
        return config.get("format") == FORMAT

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """The stored config; the model keeps the name that it was saved under."""
        config.only(format=FORMAT)
        version, values = config.get("format_version"), dict(config.need("config"))
        if version not in (1, VERSION):
            raise LoadError(f"config.json has format_version {version!r}; this release reads 1 and {VERSION}.")
        return LoopedConfig.from_dict(values if version == VERSION else _from_version_1(values))

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Every parameter under its own name."""
        with torch.device("meta"):
            return {name: Source(name) for name, _ in build(cfg).named_parameters()}

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}
