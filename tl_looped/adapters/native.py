"""tl_looped's own format: config.json with our fields, weights under our names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, Json, Source
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import LoadError
from tl_looped.nn import LoopedTransformer

FORMAT = "tl_looped"
VERSION = 1


def to_json(cfg: LoopedConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": FORMAT, "format_version": VERSION, "config": cfg.to_dict()}


class NativeAdapter:
    """What `LoopedModel.save_pretrained` writes."""

    family = "tl_looped"

    def claims(self, config: Json) -> bool:
        """Whether a config.json is ours."""
        return config.get("format") == FORMAT

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """The stored config; the model keeps the name that it was saved under."""
        config.only(format=FORMAT)
        version = config.get("format_version")
        if version != VERSION:
            raise LoadError(f"config.json has format_version {version!r}; this release reads {VERSION}.")
        return LoopedConfig.from_dict(dict(config.need("config")))

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Every parameter under its own name."""
        with torch.device("meta"):
            return {name: Source(name) for name, _ in LoopedTransformer(cfg).named_parameters()}

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Nothing beside the parameters is stored."""
        return {}
