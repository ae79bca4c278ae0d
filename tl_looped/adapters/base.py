"""What an adapter is: a checkpoint family's config and weight names, as ours."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import GenerationConfig

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, LoadError, check_count, nearest
from tl_looped.engine.parts import (
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LoopUpdate,
    RopeScaling,
    Rotary,
    YarnRope,
    check_choice,
)

Json = Mapping[str, Any]

# Keys of any config.json that do not change a forward pass: of transformers, of its generation, and of tools.
_NO_ARITHMETIC = {
    *GenerationConfig().to_dict(),
    *("architectures", "auto_map", "custom_pipelines", "model_type", "name", "_name_or_path", "_commit_hash"),
    *("dtype", "torch_dtype", "torchscript", "transformers_version", "unsloth_version", "unsloth_fixed"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"),
    *("gradient_checkpointing", "initializer_range", "pretraining_tp", "is_decoder", "return_dict", "use_return_dict"),
    *("finetuning_task", "id2label", "label2id", "problem_type", "task_specific_params"),
    *("tokenizer_class", "sep_token_id", "cls_token_id"),
}
_ALWAYS = ("is_causal", "scale_attn_weights", "use_rope")  # every model here does this, so false is not "off"
_MULTIPLIES = ("multiplier", "scale", "scaling", "factor")  # such a key is off at 1, any other at 0


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a stored tensor, or some rows of one.

    Attributes:
        name: the stored tensor.
        start, stop: rows of it, once it is viewed as [-1, ...] with the parameter's other axes.
        shape: the stored shape, where it is not that of the parameter.
        transposed: whether the stored matrix is [in, out]; rows are then counted after it is turned.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    shape: tuple[int, ...] | None = None
    transposed: bool = False


class ConfigKeys:
    """The keys of a config.json, each of which is used, known to change nothing, or refused by name.

    An adapter asks here for what it builds on. `refuse_rest` then raises for the keys that nobody asked for, except
    those that transformers writes beside any model, and those whose value says "off": null, false, empty, 0, or 1 for
    a multiplier. So a feature that a family gets later is an error here, and never a number that is silently wrong. A
    key that is null counts as missing.

    Args:
        values: the JSON object.
        where: what its keys are called in messages, before the key itself.
        whole: whether these are the keys of a whole config.json, among which are those that transformers writes.
        file: what it was read from, in messages.
        ignored_as: what stands before a key in `ignore_config_keys`.
    """

    def __init__(
        self, values: Json, where: str = "", whole: bool = True, file: str = "config.json", ignored_as: str = ""
    ):
        self._values, self._where, self._whole = values, where, whole
        self._file, self._ignored_as = file, ignored_as
        self._asked: set[str] = set()
        self._sections: list[ConfigKeys] = []

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default where it is missing."""
        self._asked.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """A value that must be there."""
        value = self.get(key)
        if value is None:
            raise LoadError(f"{self._file} has no {self._where + key!r}, which this family needs.")
        return value

    def one_of(self, *keys: str, default: Any = None) -> Any:
        """The value of the keys that name one thing; those that are there must agree."""
        given = {key: self.get(key) for key in keys if self.get(key) is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            shown = " and ".join(f"{self._where}{key}={value!r}" for key, value in given.items())
            raise LoadError(f"{self._file} has {shown}, which should be the same.")
        return values[0] if values else default

    def only(self, **allowed: Any) -> None:
        """Refuse what is not implemented: each key may be missing, or have the value (or one of the set) given."""
        for key, values in allowed.items():
            accepted = values if isinstance(values, set) else {values}
            value = self.get(key)
            if value is not None and (isinstance(value, (list, dict)) or value not in accepted):
                shown = " or ".join(repr(one) for one in sorted(accepted, key=repr))
                raise LoadError(
                    f"{self._file} has {self._where}{key}={reprlib.repr(value)}, which is not implemented: only "
                    f"{shown} is."
                )

    def harmless(self, *keys: str) -> None:
        """Take note of keys that change nothing here, whatever they say: of training, or of features that are off."""
        self._asked.update(keys)

    def count(self, key: str, minimum: int = 1) -> int:
        """An integer that must be there."""
        return check_count(key, self.need(key), minimum)

    def section(self, key: str, whole: bool = False) -> ConfigKeys:
        """The keys below a key, none where it is missing; they too must all be used. `whole`: see the class."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise LoadError(f"{self._file} has {self._where}{key}={reprlib.repr(value)}, which should be an object.")
        self._sections.append(ConfigKeys(value, f"{self._where}{key}.", whole, self._file))
        return self._sections[-1]

    def __bool__(self) -> bool:
        """Whether there are any keys."""
        return bool(self._values)

    def rest(self) -> dict[str, Any]:
        """The keys that nobody asked for and whose values may mean something, by their full names."""
        known = self._asked | _NO_ARITHMETIC if self._whole else self._asked
        left = {
            self._where + key: value
            for key, value in self._values.items()
            if key not in known and not _is_off(key, value)
        }
        return left | {key: value for section in self._sections for key, value in section.rest().items()}

    def refuse_rest(self, family: str) -> None:
        """Raise LoadError for the keys that are left, with their values."""
        left = self.rest()
        if left:
            shown = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in sorted(left.items()))
            raise LoadError(
                f"{self._file} has {shown}, which no {family} model here uses, so the numbers could come out wrong. If "
                "you know that it changes nothing in a forward pass, pass ignore_config_keys="
                f"{[self._ignored_as + key for key in sorted(left)]}."
            )


def _is_off(key: str, value: Any) -> bool:
    if key in _ALWAYS:
        return value is None or value is True
    if isinstance(value, (bool, str, list, dict)) or value is None:
        return not value
    return value == (1 if key.endswith(_MULTIPLIES) else 0)


def without(config: Json, keys: Iterable[str]) -> Json:
    """A config.json without some keys; a dot leads to a key in an object ("rope_parameters.attention_factor").

    Raises:
        LoadError: a key that is not there.
    """
    for name in [keys] if isinstance(keys, str) else keys:
        key, dot, below = name.partition(".")
        if key not in config or (dot and not isinstance(config[key], Mapping)):
            raise LoadError(f"config.json has no {key!r} to ignore.{nearest(key, config)}")
        kept = {one: value for one, value in config.items() if one != key}
        config = {**kept, key: without(config[key], [below])} if dot else kept
    return config


@runtime_checkable
class Adapter(Protocol):
    """One checkpoint family.

    Attributes:
        family: what it is called.
        feedforward: whether its models are feedforward: all layers the core, one loop. Such a model can be looped.
    """

    family: str
    feedforward: bool

    def claims(self, config: Json) -> bool:
        """Whether a config.json is of this family."""
        ...

    def config(self, config: ConfigKeys, names: frozenset[str], model_name: str) -> LoopedConfig:
        """Our config, from config.json and the names of the stored weights.

        The loader refuses the keys that this did not ask for, and reads the end-of-text tokens itself.

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


# What a loop may make of the state of a model that was not trained to loop; other updates have weights or habits.
_UPDATES: Mapping[LoopUpdate, str] = {"replace": "F(x)", "damped": "x + (F(x) - x) / n_loops"}


@dataclass(frozen=True)
class Looping:
    """How to loop a feedforward model.

    Attributes:
        layers: (a, b): layers a to b - 1 become the core, those before the prelude, those after the coda; None for all.
        n_loops: how often they run; None for once.
        update: what a loop makes of the state x, with F(x) what comes out of the core: "replace": F(x). "damped":
            x + (F(x) - x) / n_loops, so that all loops together go about as far as one. With one loop both are the
            feedforward model.
    """

    layers: tuple[int, int] | None = None
    n_loops: int | None = None
    update: LoopUpdate | None = None

    def applied(self, cfg: LoopedConfig, adapter: Adapter) -> LoopedConfig:
        """The config of a model looped so.

        Raises:
            InputError: no such layers, no such update, or a family that is looped already.
        """
        if self == Looping():
            return cfg
        if not adapter.feedforward:
            raise InputError(
                f"loop_layers, n_loops and update loop a feedforward model, but {cfg.model_name} is a looped "
                f"{cfg.family} model: leave them out, and pass n_loops to each run."
            )
        loops = check_count("n_loops", 1 if self.n_loops is None else self.n_loops)
        update = "replace" if self.update is None else self.update
        check_choice("update", update, _UPDATES)
        a, b = (0, cfg.n_core) if self.layers is None else self._checked_layers(cfg.n_core)
        step = 1 / loops if update == "damped" else 1.0
        counts = {"n_prelude": a, "n_core": b - a, "n_coda": cfg.n_core - b, "n_loops": loops}
        return replace(cfg, **counts, loop_update=update, loop_step=step)

    def _checked_layers(self, n_layers: int) -> tuple[int, int]:
        layers = self.layers
        if not isinstance(layers, (tuple, list)) or [type(one) for one in layers] != [int, int]:
            raise InputError(f"loop_layers must be (first, end), two integers, got {layers!r}.")
        a, b = layers
        if not 0 <= a < b <= n_layers:
            raise InputError(
                f"loop_layers={tuple(layers)} must be (first, end) with 0 <= first < end <= {n_layers}, the number of "
                "layers: the end does not belong to the loop."
            )
        return a, b


def gpt_layer(theirs: str, d: int, biased: bool, transposed: bool = False) -> dict[str, Source]:
    """Where the maps of one layer come from in GPT-2's names: queries, keys and values are parts of one map.

    Args:
        theirs: what their layer is called.
        d: the model's width.
        biased: whether the maps have biases.
        transposed: whether they are stored [in, out].
    """
    sources: dict[str, Source] = {}
    for kind in ("weight", "bias") if biased else ("weight",):
        turned = transposed and kind == "weight"
        shape = (3 * d,) if kind == "bias" else (d, 3 * d) if turned else (3 * d, d)
        for i, name in enumerate("qkv"):
            rows = (f"{theirs}.attn.c_attn.{kind}", i * d, (i + 1) * d, shape, turned)
            sources[f"attn.{name}.{kind}"] = Source(*rows)
        for ours, stored in (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            sources[f"{ours}.{kind}"] = Source(f"{theirs}.{stored}.{kind}", transposed=turned)
    return sources


def head_size(config: ConfigKeys, d_model: Any, n_heads: Any) -> int:
    """Size of a head: stored, or the model's divided among the heads."""
    return config.get("head_dim") or check_count("d_model", d_model) // check_count("n_heads", n_heads)


def rotary(config: ConfigKeys, default_base: float | None = None) -> Rotary:
    """Rotary embedding in halves, in the forms that transformers has written before and since version 5.

    Before: `rope_theta`, and `rope_scaling` for all else. Since: `rope_parameters`, or one such for each kind of layer,
    of which full attention's is taken here. Where both forms stand side by side they must agree.
    """
    before, since = config.section("rope_scaling"), config.section("rope_parameters")
    sections = [section for section in (before, since.section("full_attention") or since) if section]
    scalings = [scaling(section, config.get("max_position_embeddings")) for section in sections]
    bases = [base for base in (config.get("rope_theta"), *(one.get("rope_theta") for one in sections)) if base]
    for what, values in (("rope_theta", bases), ("rotary scaling", scalings)):
        if any(value != values[0] for value in values):
            raise LoadError(f"config.json says two things of {what}, which should be the same: {values}.")
    base = next(iter(bases), default_base)
    if base is None:
        raise LoadError("config.json has no 'rope_theta', which this family needs.")
    return Rotary(base, scaling=next(iter(scalings), None))


def scaling(section: ConfigKeys, n_ctx: int | None) -> RopeScaling | None:
    """Scaling of the frequencies, as the keys of one kind of layer say.

    Args:
        section: the keys.
        n_ctx: max_position_embeddings, the original context where the section names none.
    """
    kind = section.one_of("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRope(section.need("factor"))
    if kind == "dynamic":  # it grows from max_position_embeddings on, whatever else may be written
        section.get("original_max_position_embeddings")
        return DynamicRope(section.need("factor"), check_count("max_position_embeddings", n_ctx))
    if kind not in ("llama3", "yarn"):
        raise LoadError(
            f"config.json has rope_type={kind!r}, which is not implemented: 'default', 'linear', 'dynamic', 'llama3' "
            "and 'yarn' are."
        )
    factor = section.get("factor") if kind == "yarn" else section.need("factor")
    original = check_count("original_max_position_embeddings", section.get("original_max_position_embeddings", n_ctx))
    if kind == "yarn":
        return _yarn(section, factor or check_count("max_position_embeddings", n_ctx) / original, original)
    return Llama3Rope(factor, section.need("low_freq_factor"), section.need("high_freq_factor"), original)


def _yarn(section: ConfigKeys, factor: float, original: int) -> YarnRope:
    sharper, one, all_dims = (section.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if sharper is None and one and all_dims:
        grown = [1 + 0.1 * scale * math.log(max(factor, 1.0)) for scale in (one, all_dims)]
        sharper = grown[0] / grown[1]
    fast, slow = section.get("beta_fast") or 32.0, section.get("beta_slow") or 1.0
    return YarnRope(factor, original, fast, slow, sharper, section.get("truncate", True))
