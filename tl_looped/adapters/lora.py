"""Fine-tuned checkpoints kept as LoRA adapters of PEFT (arXiv 2106.09685): merged into the weights as they are loaded.

W becomes W + s · B A, with s = alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised; computed in float32
at least, then cast. Other kinds of adapters, and LoRA with more than that, are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_looped.adapters.base import ConfigKeys, without
from tl_looped.adapters.weights import Header, Weights, read_json, some
from tl_looped.engine.errors import LoadError
from tl_looped.engine.numbers import wide

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "adapter."  # of a key of adapter_config.json among the keys to ignore
_PAIR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
# Of training, and of how an adapter was begun where that leaves the base as it is.
_HARMLESS = ("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode")
_HARMLESS += ("layers_pattern", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision")
_HARMLESS += ("runtime_config", "task_type")


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to a stored matrix: scale · up @ down, turned where the matrix is stored [in, out]."""

    down: Tensor
    up: Tensor
    scale: float
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stored matrix."""
        rows, columns = self.up.shape[0], self.down.shape[1]
        return (columns, rows) if self.turned else (rows, columns)

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged matrix, in float32 at least."""
        delta = wide(self.up) @ wide(self.down) * self.scale
        return wide(weight) + (delta.T if self.turned else delta)


class MergedWeights:
    """Weights to which an adapter's are added while they are read.

    Args:
        base: the weights of the model that the adapter was trained on.
        pairs: by the name of the module in that model.
        targets: which modules the adapter says it is for, as PEFT understands it: a pattern, or ends of names; None
            where it says no more than the pairs do.
    """

    def __init__(self, base: Weights, pairs: Mapping[str, Pair], targets: str | list[str] | None):
        self._base, self._pairs, self._targets = base, pairs, targets

    @property
    def headers(self) -> Mapping[str, Header]:
        """Of every tensor."""
        return self._base.headers

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor."""
        for name, tensor in self._base.tensors():
            yield name, self._merged(name, tensor)

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        return self._merged(name, self._base.tensor(name))

    def named_as(self, wanted: set[str]) -> MergedWeights:
        """See `Weights`; what the adapter is for has these names, so here it is known whether it fits.

        Raises:
            LoadError: a module that the model does not have or has in another shape, or one that the adapter says it is
                for and has no weights for: it is of another base.
        """
        base = self._base.named_as(wanted)
        matrices = {n.removesuffix(".weight"): one.shape for n, one in base.headers.items() if len(one.shape) == 2}
        unknown = sorted(set(self._pairs) - set(matrices))
        odd = [
            f"{name} is for {pair.shape}, not {matrices[name]}"
            for name, pair in self._pairs.items()
            if name in matrices and pair.shape != matrices[name]
        ]
        left = sorted(name for name in matrices if name not in self._pairs and self._is_target(name))
        problems = {"modules that the model does not have": unknown, "of another shape": odd, "without weights": left}
        if any(problems.values()):
            shown = ". ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
            raise LoadError(f"the adapter is not one for this model. {shown}")
        return MergedWeights(base, self._pairs, self._targets)

    def _is_target(self, name: str) -> bool:
        if isinstance(self._targets, str):
            return re.fullmatch(self._targets, name) is not None
        return any(name == one or name.endswith(f".{one}") for one in self._targets or ())

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        pair = self._pairs.get(name.removesuffix(".weight"))
        return tensor if pair is None else pair.added_to(tensor)


def merged(base: Weights, adapter: Path, names: set[str], ignore: Iterable[str]) -> MergedWeights:
    """A model's weights with an adapter's.

    Args:
        base: the model's weights.
        adapter: the folder of the adapter.
        names: what the model is called: the adapter must be for one of these.
        ignore: keys of adapter_config.json to read as if they were not there.

    Raises:
        LoadError: another kind of adapter, or one for another model; no weights of it were read, nor of the base.
    """
    values = without(read_json(adapter / CONFIG), ignore)
    keys = ConfigKeys(values, file=CONFIG, ignored_as=PREFIX)
    keys.only(peft_type="LORA", bias="none", init_lora_weights={True, False, "gaussian", "eva", "orthogonal"})
    keys.harmless(*_HARMLESS)
    scalings = [keys.get(name, default) for name, default in (("r", 8), ("lora_alpha", 8), ("use_rslora", False))]
    patterns = [keys.get(name, {}) for name in ("rank_pattern", "alpha_pattern")]
    turned, targets = keys.get("fan_in_fan_out", False), keys.get("target_modules")
    chosen = [keys.get(name) for name in ("layers_to_transform", "exclude_modules")]
    keys.refuse_rest("LoRA")
    _check_base(values.get("base_model_name_or_path"), names)
    pairs = {}
    for module, (down, up) in _halves(adapter).items():
        rank = _by_pattern(patterns[0], module, scalings[0])
        if down.shape[0] != rank or up.shape[1] != rank:
            raise LoadError(f"{WEIGHTS} has rank {down.shape[0]} for {module}, but {CONFIG} says {rank}.")
        alpha = _by_pattern(patterns[1], module, scalings[1])
        pairs[module] = Pair(down, up, alpha / (rank**0.5 if scalings[2] else rank), turned)
    return MergedWeights(base, pairs, None if any(chosen) else targets)


def _check_base(base: str | None, names: set[str]) -> None:
    """Raise where an adapter says that it is for a model of another name."""
    if base and _last(base) not in {_last(name) for name in names}:
        raise LoadError(
            f"the adapter is for {base!r}, not for {' or '.join(sorted(map(repr, names)))}. If that is the same model "
            f"under another name, pass ignore_config_keys=['{PREFIX}base_model_name_or_path']."
        )


def _last(name: str) -> str:
    """The end of a hub id or path, also of a snapshot in the hub's cache, in lower case."""
    cached = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/", name)
    return (cached[1] if cached else Path(name).name).lower()


def _halves(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module."""
    if not (adapter / WEIGHTS).exists():
        raise LoadError(f"{adapter} has no {WEIGHTS}: save the adapter with safe_serialization=True, PEFT's default.")
    try:
        stored = load_file(adapter / WEIGHTS)
    except SafetensorError as error:
        raise LoadError(f"{adapter / WEIGHTS} is not a whole safetensors file: {error}") from error
    found = {name: _PAIR.fullmatch(name) for name in stored}
    halves = {(one["module"], one["half"]): stored[name] for name, one in found.items() if one}
    modules = dict.fromkeys(module for module, _ in halves)
    odd = [name for name, one in found.items() if one is None]
    odd += [f"{module} without lora_{half}" for module in modules for half in "AB" if (module, half) not in halves]
    odd += [name for name, one in found.items() if one and stored[name].ndim != 2]
    if odd or not halves:
        whole = any(".base_layer." in name for name in odd)
        mend = " Save the adapter alone: save_pretrained(..., save_embedding_layers=False) in PEFT." if whole else ""
        raise LoadError(f"{WEIGHTS} has weights that are no LoRA of a linear map: {some(odd) or 'none at all'}.{mend}")
    return {module: (halves[module, "A"], halves[module, "B"]) for module in modules}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, as PEFT matches them."""
    return next((value for one, value in patterns.items() if re.match(rf"(.*\.)?({one})$", module)), default)
