"""Looped language models in TransformerLens: every activation of every loop, by name.

from tl_looped import LoopedModel
model = LoopedModel.from_pretrained("looped-hops")
logits, cache = model.run_with_cache("a=4; c=a; b=7; d=c; f=b; ? d")
cache["pattern", 0, 2]   # layer 0 in loop 2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_looped.engine.cache import LoopedCache as LoopedCache
    from tl_looped.engine.config import LoopedConfig as LoopedConfig
    from tl_looped.engine.errors import HookNameError as HookNameError
    from tl_looped.engine.errors import InputError as InputError
    from tl_looped.engine.errors import LoadError as LoadError
    from tl_looped.engine.errors import LoopedError as LoopedError
    from tl_looped.engine.hooks import LoopHookPoint as LoopHookPoint
    from tl_looped.engine.parts import LinearRope as LinearRope
    from tl_looped.engine.parts import Llama3Rope as Llama3Rope
    from tl_looped.engine.parts import QKNorm as QKNorm
    from tl_looped.engine.parts import Rotary as Rotary
    from tl_looped.engine.parts import TwoStates as TwoStates
    from tl_looped.engine.runs import DEFAULT_SEED as DEFAULT_SEED
    from tl_looped.engine.schedule import HookSite as HookSite
    from tl_looped.engine.schedule import LoopSchedule as LoopSchedule
    from tl_looped.model import LoopedModel as LoopedModel

__version__ = "0.2.0"

# The names above, by home. They are imported when first asked for, so that `tl-looped --help` need not wait for torch.
_NAMES = {
    "engine.cache": ("LoopedCache",),
    "engine.config": ("LoopedConfig",),
    "engine.errors": ("HookNameError", "InputError", "LoadError", "LoopedError"),
    "engine.hooks": ("LoopHookPoint",),
    "engine.parts": ("LinearRope", "Llama3Rope", "QKNorm", "Rotary", "TwoStates"),
    "engine.runs": ("DEFAULT_SEED",),
    "engine.schedule": ("HookSite", "LoopSchedule"),
    "model": ("LoopedModel",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tl_looped' has no attribute {name!r}: {', '.join(_HOMES)} are here.")
    globals()[name] = value = getattr(import_module(f"tl_looped.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
