"""A model of transformers that is in memory, or in a TransformerBridge: its own weights, as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedModel

from tl_looped.adapters.base import Source
from tl_looped.adapters.loading import Changes, Plan, check_finite
from tl_looped.adapters.weights import MemoryWeights, some
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, LoadError
from tl_looped.nn import NativeNetwork
from tl_looped.nn.rotary import inverse_frequencies

_PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")
_WRAPPERS = ("DataParallel", "DistributedDataParallel")
_TURNS_TOLERANCE = 1e-2  # as a share: frequencies in bfloat16 are off by up to 2^-9


def share(model: nn.Module, changes: Changes | None = None) -> NativeNetwork:
    """A native model of the very weights of one of transformers; see `LoopedModel.from_model`."""
    model = _unwrapped(model)
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise InputError(
            "this model is inside a TransformerBridge, which may have changed its weights: pass the bridge, "
            "LoopedModel.from_bridge(bridge)."
        )
    return _shared(model, changes or Changes(), MemoryWeights(dict(_own_tensors(model))))


def share_bridge(bridge: TransformerBridge, changes: Changes | None = None) -> NativeNetwork:
    """A native model of the very weights in a bridge; see `LoopedModel.from_bridge`."""
    if not isinstance(bridge, TransformerBridge):
        raise InputError(
            f"from_bridge takes a TransformerBridge of TransformerLens, got {type(bridge).__name__}: for a model of "
            "transformers, LoopedModel.from_model(hf_model, tokenizer)."
        )
    if bridge._weights_processed:  # TransformerLens has no public way to ask
        raise InputError(
            "the weights in this bridge are processed (norms folded, or weights centred), so they are not the model's "
            "own: build it again, and call enable_compatibility_mode(no_processing=True), or not at all."
        )
    model = bridge.original_model
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"this bridge holds a {type(model).__name__}, no model of transformers. Of `model.unrolled()` you have the "
            "looped model already."
        )
    # A bridge gives its linear maps a bias of zeros where they have none.
    tensors = {name: one for name, one in _own_tensors(model) if not (name == "lm_head.bias" and not one.any())}
    return _shared(model, changes or Changes(), MemoryWeights(tensors))


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model itself, without what compiles it or runs it on many devices."""
    while hasattr(model, "_orig_mod") or type(model).__name__ in _WRAPPERS:
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    if hasattr(model, "merge_and_unload"):
        raise InputError(
            f"this is a {type(model).__name__} with an adapter around the weights: merge it first, "
            "LoopedModel.from_model(model.merge_and_unload(), tokenizer)."
        )
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"from_model takes a language model of transformers, such as AutoModelForCausalLM.from_pretrained(...), "
            f"got {type(model).__name__}."
        )
    return model


def _shared(model: PreTrainedModel, changes: Changes, weights: MemoryWeights) -> NativeNetwork:
    kind, config = type(model).__name__, model.config
    values = {**json.loads(config.to_json_string()), "architectures": [kind]}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    _check_modules(model)
    _check_tensors(kind, dict(weights.tensors()))
    plan = Plan.of(values, ends, weights, getattr(config, "_name_or_path", "") or kind, changes)
    plan.one_dtype("cast the model first, hf_model.to({})")
    _check_frequencies(model, plan.cfg)

    def place(rows: Tensor, source: Source) -> nn.Parameter:
        check_finite(rows.detach(), rows.detach(), source.name)
        if isinstance(rows, nn.Parameter):
            return rows
        whole = weights.tensor(source.name)
        if rows.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            raise InputError(
                f"{source.name!r} is laid out in memory so that a part of it can't be shared: make its data contiguous "
                "first."
            )
        return nn.Parameter(rows.detach(), requires_grad=whole.requires_grad)

    return plan.built(place)


def _own_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and lasting buffers under the model's own names, also where a bridge stands in a module's place."""
    while isinstance(model, GeneralizedComponent) and isinstance(model.original_component, nn.Module):
        model = model.original_component
    for name, weight in model.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, weight
    buffers = dict(model.named_buffers(recurse=False, remove_duplicate=False))
    if buffers:
        lasting = set(model.state_dict(keep_vars=True))
        yield from ((prefix + name, buffer) for name, buffer in buffers.items() if name in lasting)
    for name, child in model.named_children():
        yield from _own_tensors(child, f"{prefix}{name}.")


def _check_modules(model: PreTrainedModel) -> None:
    """Raise unless every weight belongs to a plain module, so that it is the map that runs."""
    own, odd, adapters = type(model).__module__, [], []
    for name, module in model.named_modules():
        kind, home = type(module).__name__, type(module).__module__
        if home.startswith("peft.tuners.") and isinstance(getattr(module, "base_layer", None), nn.Module):
            adapters.append(f"{name} ({kind})")
        elif home.startswith("transformer_lens.") or not list(module.parameters(recurse=False)):
            continue
        elif home != own and not home.startswith(_PLAIN):
            odd.append(f"{name} ({kind})")
    if adapters:
        raise InputError(
            f"the model has adapters that are not merged: {some(adapters, 2)}. Merge them first "
            "(PEFT: merge_and_unload())."
        )
    if odd:
        raise InputError(
            f"the model has modules that are no plain layers, such as quantised ones: {some(odd, 2)}. Their weights "
            "are not the maps that run: load the model unquantised and unchanged, or hf_model.dequantize() it."
        )


def _check_tensors(kind: str, tensors: dict[str, Tensor]) -> None:
    """Raise unless all weights are plain tensors on one device."""
    types = {type(one.data).__name__: name for name, one in tensors.items() if type(one.data) is not Tensor}
    if types:
        shown = some([f"{name} ({one})" for one, name in types.items()], 2)
        raise InputError(f"the {kind} has weights that are no plain tensors, as quantised or sharded ones: {shown}.")
    places = sorted({str(one.device) for one in tensors.values()})
    if "meta" in places:
        raise InputError(f"the {kind} has weights that are not in memory (on {places}): load it whole, on one device.")
    if len(places) > 1:
        raise InputError(
            f"the {kind} lies on several devices, {', '.join(places)}: load it on one, such as "
            f"from_pretrained(..., device_map={{'': {places[-1]!r}}}), or hf_model.to({places[-1]!r})."
        )


def _check_frequencies(model: PreTrainedModel, cfg: LoopedConfig) -> None:
    """Raise where the model turns by other frequencies than its config says, as when either was changed since."""
    ours = [inverse_frequencies(one, cfg.d_head) for one in (cfg.rotary, cfg.rotary_windowed) if one is not None]
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or "original" in name:
            continue
        turns = buffer.detach().float().cpu()
        if not any(
            one.shape == turns.shape and torch.allclose(one, turns, rtol=_TURNS_TOLERANCE, atol=0.0) for one in ours
        ):
            raise LoadError(
                f"the model's {name} is not what its config says: load it again with the rotary settings that you want."
            )
