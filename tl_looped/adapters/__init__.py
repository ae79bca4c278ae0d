"""The checkpoint families that can be loaded."""

from __future__ import annotations

from tl_looped.adapters import (
    albert,
    base_loop,
    feedforward,
    gpt2,
    hrm_text,
    looped_gpt,
    loopus,
    mobilellm,
    nanochat,
    native,
    ouro,
    parcae,
    puzzles,
    raven,
)
from tl_looped.adapters.base import Adapter as Adapter
from tl_looped.adapters.base import ConfigKeys as ConfigKeys
from tl_looped.adapters.base import Json
from tl_looped.adapters.base import Looping as Looping
from tl_looped.adapters.base import Source as Source
from tl_looped.adapters.registry import register as register
from tl_looped.adapters.registry import third_parties
from tl_looped.engine.errors import LoadError

ADAPTERS: tuple[Adapter, ...] = (
    native.NativeAdapter(),
    ouro.OuroAdapter(),
    raven.RavenAdapter(),
    *feedforward.FEEDFORWARD,
    gpt2.GPT2Adapter(),
    nanochat.NanochatAdapter(),
    nanochat.LoopedNanochatAdapter(),
    base_loop.BaseLoopAdapter(),
    hrm_text.HrmTextAdapter(),
    puzzles.HrmAdapter(),
    puzzles.TrmAdapter(),
    base_loop.LoopFormerAdapter(),
    looped_gpt.LoopedGPTAdapter(),
    loopus.LoopUSAdapter(),
    parcae.ParcaeAdapter(),
    albert.AlbertAdapter(),
    mobilellm.MobileLLMAdapter(),
)


def adapter_for(config: Json) -> Adapter:
    """The adapter of a config.json, or a LoadError that names the families there are."""
    for adapter in ADAPTERS:
        if adapter.claims(config):
            return adapter
    others = third_parties()
    claiming = [adapter for adapter in others if adapter.claims(config)]
    if len(claiming) == 1:
        return claiming[0]
    named = f"architectures={config.get('architectures')}, model_type={config.get('model_type')!r}"
    if claiming:
        families = ", ".join(adapter.family for adapter in claiming)
        raise LoadError(f"several adapters claim {named}: {families}. Uninstall or unregister all but one.")
    known = ", ".join(adapter.family for adapter in (*ADAPTERS, *others))
    raise LoadError(
        f"unknown family: {named}. Known families: {known}. An adapter of your own makes another load, see "
        "tl_looped.adapters.register."
    )
