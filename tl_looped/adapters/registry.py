"""Families of third parties: registered by a call, or by an entry point of an installed package."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from tl_looped.adapters.base import Adapter
from tl_looped.engine.errors import InputError, LoadError

GROUP = "tl_looped.adapters"
_REGISTERED: dict[str, Adapter] = {}


def register(adapter: Adapter) -> None:
    """Let checkpoints of a family of your own load, in this process.

    A package does the same for all who install it, by an entry point of the group `tl_looped.adapters` in its
    pyproject.toml, whose value is an adapter or a class of which one is made without arguments. Families of tl_looped
    itself come first; one that is registered again under its name is replaced.

    Args:
        adapter: see `Adapter`.

    Raises:
        InputError: it lacks what an adapter has.

    Example:
        >>> from tl_looped.adapters import register
        >>> from tl_looped.adapters.ouro import OuroAdapter
        >>> class MyOuro(OuroAdapter):
        ...     family = "my-ouro"
        ...     def claims(self, config):
        ...         return config.get("model_type") == "my_ouro"
        >>> register(MyOuro())
    """
    _REGISTERED[_checked(adapter, "what is registered").family] = adapter


def third_parties() -> list[Adapter]:
    """Every adapter that was registered, then those of installed packages.

    Raises:
        LoadError: an entry point that can't be imported, or is no adapter.
    """
    return [*_REGISTERED.values(), *map(_loaded, entry_points(group=GROUP))]


def _loaded(point: Any) -> Adapter:  # an EntryPoint: of importlib.metadata, or of a backport that stands in for it
    called = f"the entry point {point.name!r} ({point.value}) of the group {GROUP}"
    try:
        found = point.load()
        return _checked(found() if isinstance(found, type) else found, called)
    except Exception as error:  # of whatever kind the package's code raises
        where = "" if point.dist is None else f" {point.dist.name}"
        raise LoadError(
            f"{called} can't be used: {type(error).__name__}: {error}. Update or uninstall the package{where}."
        ) from error


def _checked(adapter: object, called: str) -> Adapter:
    if isinstance(adapter, type) or not isinstance(adapter, Adapter):
        names = ("family", "feedforward", "claims", "config", "sources", "checked")
        lacking = [name for name in names if not hasattr(adapter, name)]
        lacks = f" without {', '.join(lacking)}" if lacking else ""
        kind = f"the class {adapter.__name__}" if isinstance(adapter, type) else f"a {type(adapter).__name__}"
        raise InputError(f"{called} must be an adapter, an object as of tl_looped.adapters.Adapter, got {kind}{lacks}.")
    return adapter
