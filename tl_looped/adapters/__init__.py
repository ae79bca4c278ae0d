"""The checkpoint families that can be loaded."""

from __future__ import annotations

from tl_looped.adapters.base import Adapter as Adapter
from tl_looped.adapters.base import ConfigKeys as ConfigKeys
from tl_looped.adapters.base import Json
from tl_looped.adapters.base import Looping as Looping
from tl_looped.adapters.base import Source as Source
from tl_looped.adapters.base_loop import BaseLoopAdapter, LoopFormerAdapter
from tl_looped.adapters.feedforward import FEEDFORWARD
from tl_looped.adapters.gpt2 import GPT2Adapter
from tl_looped.adapters.hrm_text import HrmTextAdapter
from tl_looped.adapters.looped_gpt import LoopedGPTAdapter
from tl_looped.adapters.loopus import LoopUSAdapter
from tl_looped.adapters.nanochat import LoopedNanochatAdapter, NanochatAdapter
from tl_looped.adapters.native import NativeAdapter
from tl_looped.adapters.ouro import OuroAdapter
from tl_looped.adapters.parcae import ParcaeAdapter
from tl_looped.adapters.raven import RavenAdapter
from tl_looped.engine.errors import LoadError

ADAPTERS: tuple[Adapter, ...] = (
    NativeAdapter(),
    OuroAdapter(),
    RavenAdapter(),
    *FEEDFORWARD,
    GPT2Adapter(),
    NanochatAdapter(),
    LoopedNanochatAdapter(),
    BaseLoopAdapter(),
    HrmTextAdapter(),
    LoopFormerAdapter(),
    LoopedGPTAdapter(),
    LoopUSAdapter(),
    ParcaeAdapter(),
)


def adapter_for(config: Json) -> Adapter:
    """The adapter of a config.json, or a LoadError that names the families there are."""
    for adapter in ADAPTERS:
        if adapter.claims(config):
            return adapter
    known = ", ".join(adapter.family for adapter in ADAPTERS)
    raise LoadError(
        f"unknown family: architectures={config.get('architectures')}, model_type={config.get('model_type')!r}. "
        f"Known families: {known}."
    )
