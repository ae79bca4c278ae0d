"""What an adapter is: a checkpoint family's config and weight names, as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tl_looped.engine.config import Llama3Rope, LoopedConfig
from tl_looped.engine.errors import LoadError, check_count

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a stored tensor, or some rows of one.

    Attributes:
        name: the stored tensor.
        start, stop: rows of it, once it is viewed as [-1, ...] with the parameter's other axes.
        shape: the stored shape, where it is not that of the parameter.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    shape: tuple[int, ...] | None = None


@runtime_checkable
class Adapter(Protocol):
    """One checkpoint family."""

    family: str

    def claims(self, config: Json) -> bool:
        """Whether a config.json is of this family."""
        ...

    def config(self, config: Json, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config, from config.json and the names of the stored weights.

        Raises:
            LoadError: for what is not implemented.
            InputError: for a value that no model can have.
        """
        ...

    def sources(self, cfg: LoopedConfig) -> dict[str, Source]:
        """Where each of our parameters comes from."""
        ...

    def checked(self, cfg: LoopedConfig) -> dict[str, Callable[[Tensor], None]]:
        """Stored tensors that are not parameters, each with a check that raises LoadError when it is wrong."""
        ...


def need(config: Json, key: str) -> Any:
    """A value that must be there."""
    if key not in config:
        raise LoadError(f"config.json has no {key!r}, which this family needs.")
    return config[key]


def only(config: Json, **allowed: Any) -> None:
    """Refuse what is not implemented: each key may be missing, or have the value (or one of the set) given."""
    for key, values in allowed.items():
        accepted = values if isinstance(values, set) else {values}
        if key in config and config[key] not in accepted:
            shown = " or ".join(repr(value) for value in sorted(accepted, key=repr))
            raise LoadError(f"config.json has {key}={config[key]!r}, which is not implemented: only {shown} is.")


def head_size(config: Json, d_model: Any, n_heads: Any) -> int:
    """Size of a head: stored, or the model's divided among the heads."""
    return config.get("head_dim") or check_count("d_model", d_model) // check_count("n_heads", n_heads)


def rotary(config: Json, default_base: float | None = None) -> tuple[float, Llama3Rope | None]:
    """(base, scaling) of rotary embedding, in the forms that transformers has written before and since version 5."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = parameters.get("rope_theta", config.get("rope_theta", default_base))
    if base is None:
        raise LoadError("config.json has no 'rope_theta', which this family needs.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return float(base), None
    if kind != "llama3":
        raise LoadError(
            f"config.json has rope_type={kind!r}, which is not implemented: only 'default' and 'llama3' are."
        )
    scaling = Llama3Rope(
        factor=float(need(parameters, "factor")),
        low_freq_factor=float(need(parameters, "low_freq_factor")),
        high_freq_factor=float(need(parameters, "high_freq_factor")),
        original_n_ctx=int(need(parameters, "original_max_position_embeddings")),
    )
    return float(base), scaling
