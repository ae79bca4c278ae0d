"""Checkpoints, whole and exactly: config.json and safetensors in, no code run, nothing unpickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_looped.adapters import Adapter, Looping, Source, adapter_for
from tl_looped.adapters.base import ConfigKeys, Json, without
from tl_looped.adapters.lora import CONFIG, PREFIX, merged
from tl_looped.adapters.weights import FORMATS, FolderWeights, Weights, read_json, some
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, LoadError, check_count
from tl_looped.engine.numbers import advise
from tl_looped.nn import NativeNetwork, build

Place = Callable[[Tensor, Source], nn.Parameter]  # makes a parameter of rows of a stored tensor


@dataclass(frozen=True)
class Changes:
    """What a user asks for beside what a checkpoint says.

    Attributes:
        ignore_config_keys: keys of config.json to read as if they were not there.
        looping: how to loop the model, where it is a feedforward one.
        n_ctx: the longest prompt, where it is not the checkpoint's.
        adapter: the folder of a LoRA adapter to merge into the weights.
        adapter_name: what it is called.
    """

    ignore_config_keys: Iterable[str] = ()
    looping: Looping = field(default_factory=Looping)
    n_ctx: int | None = None
    adapter: Path | None = None
    adapter_name: str = ""

    def with_context(self, cfg: LoopedConfig) -> LoopedConfig:
        """The config with the context that is asked for.

        Raises:
            InputError: no count, or more positions than the model has learned vectors for.
        """
        if self.n_ctx is None or check_count("n_ctx", self.n_ctx) == cfg.n_ctx:
            return cfg
        if cfg.learned_positions:
            raise InputError(
                f"n_ctx={self.n_ctx}, but this model has a learned vector for each of {cfg.n_ctx} positions: leave "
                "n_ctx out, and read shorter prompts as they are."
            )
        return replace(cfg, n_ctx=self.n_ctx)


def load(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, changes: Changes | None = None
) -> NativeNetwork:
    """The model in a folder; nothing is read unless config, names, shapes and formats of all weights are right.

    Files are mapped, and a weight that stays on the CPU in its own format stays in its file until it is written to. All
    get one number format, as a forward pass needs one: weights stored in several are refused, not rounded or widened
    unasked.

    Args:
        folder: has config.json and the weights.
        name: what the model is called.
        device: where to put it.
        dtype: of the weights; None: as stored.
        changes: to what the checkpoint says.
    """
    _check_model(folder)
    values, generation = read_json(folder / "config.json"), folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    changes, weights = changes or Changes(), FolderWeights(folder)
    if changes.adapter is not None:
        keys = changes.ignore_config_keys
        keys = [keys] if isinstance(keys, str) else list(keys)
        called = {name, str(folder.resolve()), str(values.get("_name_or_path") or name)}
        ignored = [key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)]
        weights, name = merged(weights, changes.adapter, called, ignored), f"{name} + {changes.adapter_name}"
        changes = replace(changes, ignore_config_keys=[key for key in keys if not key.startswith(PREFIX)])
    plan = Plan.of(values, ends, weights, name, changes)
    kind = dtype or plan.one_dtype()
    advise(device, kind)

    def place(rows: Tensor, source: Source) -> nn.Parameter:
        weight = rows.to(device=device, dtype=kind)
        check_finite(weight, rows, source.name)
        return nn.Parameter(weight.contiguous())

    return plan.built(place)


def _check_model(folder: Path) -> None:
    """Raise where a folder holds an adapter and no model."""
    if (folder / CONFIG).exists() and not (folder / "config.json").exists():
        base = read_json(folder / CONFIG).get("base_model_name_or_path")
        raise LoadError(
            f"{folder} holds an adapter and no model: load the model that it is for, with it: "
            f"LoopedModel.from_pretrained({base!r}, adapter={str(folder)!r})."
        )


@dataclass(frozen=True)
class Plan:
    """A model that can be built, as config and headers say.

    Attributes:
        cfg: of the model.
        weights: under the family's names.
        sources: where each parameter comes from, but for a head that is tied.
        checks: of stored tensors that are not parameters.
        head: where a tied head would be stored beside the embedding.
        model: without weights.
    """

    cfg: LoopedConfig
    weights: Weights
    sources: dict[str, Source]
    checks: dict[str, Callable[[Tensor], None]]
    head: Source | None
    model: NativeNetwork

    @classmethod
    def of(cls, values: Json, ends: Any, weights: Weights, name: str, changes: Changes) -> Plan:
        """Read the config and check the headers.

        Args:
            values: of config.json.
            ends: the tokens that end a text, as generation_config.json has them; None: as config.json has them.
            weights: the stored ones.
            name: what the model is called.
            changes: to what the checkpoint says.
        """
        values = without(values, changes.ignore_config_keys)
        _check_unquantised(values)
        adapter = adapter_for(values)
        stored = _config(adapter, values, ends, frozenset(weights.headers), name)
        cfg = changes.looping.applied(stored, adapter)
        sources, checks = adapter.sources(cfg), adapter.checked(cfg)
        cfg = changes.with_context(cfg)
        with torch.device("meta"):
            model = build(cfg)
        weights = weights.named_as({source.name for source in sources.values()})
        head = sources.pop("unembed.weight", None) if cfg.tie_embeddings else None
        plan = cls(cfg, weights, sources, checks, head, model)
        plan._check_headers()
        return plan

    def _check_headers(self) -> None:
        """Raise unless the stored tensors are exactly those that make the model, and hold floating-point numbers."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        stored, extra = self.weights.headers, {*self.checks, *([self.head.name] if self.head else [])}
        shapes = {n: tuple(parameters[n].shape)[:: -1 if one.transposed else 1] for n, one in self.sources.items()}
        wanted = {source.name: source.shape or shapes[ours] for ours, source in self.sources.items()}
        known = sorted(set(stored) & set(wanted))
        odd = [f"{n} is {one.format}" for n, one in sorted(stored.items()) if one.format not in FORMATS]
        problems = {
            "missing": sorted(set(wanted) - set(stored)),
            "not known to this family": sorted(set(stored) - set(wanted) - extra),
            "misshapen": [f"{n} is {stored[n].shape}, not {wanted[n]}" for n in known if stored[n].shape != wanted[n]],
            f"not in one of the formats {', '.join(FORMATS)}, as quantised weights are": [
                one for one in odd if one.partition(" ")[0] not in extra
            ],
        }
        if any(problems.values()):
            raise LoadError(
                f"the stored weights are not those of a {self.cfg.family} model of this config. "
                + ". ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
            )

    def one_dtype(self, mend: str = "pass dtype={}") -> torch.dtype:
        """The number format that all weights have.

        Args:
            mend: the call that gives them one, with {} for it.
        """
        found: dict[torch.dtype, list[str]] = {}
        for name in dict.fromkeys(source.name for source in self.sources.values()):
            found.setdefault(FORMATS[self.weights.headers[name].format], []).append(name)
        if len(found) > 1:
            shown = ", ".join(f"{kind} ({some(names, 2)})" for kind, names in found.items())
            widest = reduce(torch.promote_types, found)
            raise LoadError(
                f"the weights are stored in several number formats: {shown}. A model runs in one: "
                f"{mend.format(widest)}, which holds all of them exactly, or another."
            )
        return next(iter(found))

    def built(self, place: Place) -> NativeNetwork:
        """The model, with every parameter as `place` makes it."""
        targets: dict[str, list[str]] = {}
        for ours, source in self.sources.items():
            targets.setdefault(source.name, []).append(ours)
        count = len(self.weights.headers)
        with tqdm(total=count, desc=f"Loading {self.cfg.model_name}", disable=count < 200) as bar:
            for name, tensor in self.weights.tensors():
                if name in self.checks:
                    self.checks[name](tensor)
                for ours in targets.get(name, ()):
                    self._assign(ours, tensor, place)
                bar.update()
        if self.cfg.tie_embeddings:
            self._tie()
        return self.model

    def _assign(self, name: str, tensor: Tensor, place: Place) -> None:
        """Make a parameter of the rows of a stored tensor."""
        owner, _, attribute = name.rpartition(".")
        module, source = self.model.get_submodule(owner), self.sources[name]
        shape = getattr(module, attribute).shape
        if tensor.shape == shape and not (source.transposed or source.start or source.stop):
            rows = tensor  # itself, so that a Parameter can be shared
        else:
            turned = tensor.T if source.transposed else tensor
            rows = turned.reshape(-1, *shape[1:])[source.start : source.stop]
        setattr(module, attribute, place(rows, source))

    def _tie(self) -> None:
        """Make a tied head the embedding itself; a head stored beside it must be equal."""
        embed = self.model.embed.weight
        self.model.unembed.weight = embed
        name = self.head.name if self.head is not None else ""
        if name in self.weights.headers and not torch.equal(self.weights.tensor(name).to(embed), embed):
            raise LoadError(f"the config ties the head to the embedding, but the stored {name!r} differs from it.")


def _check_unquantised(values: Json) -> None:
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LoadError(
            f"the weights are quantised (quantization_config: {method!r}), which is not implemented: load the model "
            "that was quantised, or LoopedModel.from_model(hf_model.dequantize(), tokenizer) with transformers."
        )


def _config(adapter: Adapter, values: Json, ends: Any, names: frozenset[str], model_name: str) -> LoopedConfig:
    """Our config, with the tokens that end a text; an error for any key of config.json that no one knows."""
    keys = ConfigKeys(values)
    ends = keys.get("eos_token_id") if ends is None else ends
    try:
        cfg = adapter.config(keys, names, model_name)
        if ends is not None:
            cfg = replace(cfg, eos_token_ids=tuple(ends if isinstance(ends, list) else [ends]))
    except InputError as error:
        raise LoadError(f"config.json: {error}") from error
    keys.refuse_rest(cfg.family)
    return cfg


def check_finite(weight: Tensor, rows: Tensor, name: str) -> None:
    """All numbers of a weight must be finite, as it was stored and as it will be."""
    if bool(torch.stack(torch.aminmax(weight)).isfinite().all()):  # one quick pass, and NaN shows in both
        return
    bad = int((~rows.isfinite()).sum())
    if bad:
        raise LoadError(f"{name!r} is stored with {bad} values that are NaN or infinite.")
    raise LoadError(
        f"{name!r} has values up to {float(rows.abs().max()):.3g}, too large for dtype={weight.dtype}: pass "
        "dtype=torch.bfloat16 or torch.float32."
    )
