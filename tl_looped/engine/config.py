"""LoopedConfig: every choice that separates one looped language model from another, as a field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.schedule import LoopSchedule

NormPlacement = Literal["pre", "residual_sandwich", "output_sandwich", "output"]
LoopNorm = Literal["none", "each", "last"]
Injection = Literal["none", "concat_linear", "add"]
InitialState = Literal["prelude", "zeros", "normal", "truncated_normal"]
RotaryStyle = Literal["halves", "adjacent"]


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later, by wavelength against the original context length."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_n_ctx: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"rotary_scaling.{name}", getattr(self, name))
        check_count("rotary_scaling.original_n_ctx", self.original_n_ctx)
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rotary_scaling needs low_freq_factor < high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )


@dataclass(frozen=True)
class LoopedConfig:
    """A decoder with `n_prelude` layers, `n_core` layers run `n_loops` times, and `n_coda` layers.

    Names are TransformerLens's where it has one. Equations, with x the residual stream, e the prelude's output, N a
    root-mean-square norm with weight:

    ===================== =======================================================================================
    norm_placement        one sub-layer f (attention, then MLP)
    ===================== =======================================================================================
    "pre"                 x + f(N(x))            Llama, and models trained from scratch
    "residual_sandwich"   N'(x + f(N(x)))        Huginn: the residual stream itself is normalised
    "output_sandwich"     x + N'(f(N(x)))        Ouro
    "output"              x + N'(f(x))           OLMo-2
    ===================== =======================================================================================

    `injection` at the start of every loop: "none": x; "add": x + e; "concat_linear": W [x; e], the state first.
    `loop_norm`: the final norm (the same weights) on the state after "each" loop (Ouro), after the "last" one only,
    before the coda (Huginn), or "none". `final_norm`: whether the head reads through that norm (again).
    """

    # Sizes.
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_key_value_heads: int | None = None  # None: as many as n_heads

    # Depth. n_loops is the count the model was trained with; every run may ask for another.
    n_prelude: int = 0
    n_core: int = 1
    n_coda: int = 0
    n_loops: int = 4

    # Layers.
    norm_placement: NormPlacement = "pre"
    eps: float = 1e-6  # added to the mean square in every norm
    qk_bias: bool = False  # a bias on queries and keys, before rotary
    qk_norm: bool = False  # a norm on the whole query and the whole key vector, all heads together, before rotary
    act_fn: Literal["silu"] = "silu"  # the gate of the MLP: act_fn(gate) * up

    # Rotary position embedding, on the whole head.
    rotary_style: RotaryStyle = "halves"  # which components pair up: i with i + d_head/2, or 2i with 2i + 1
    rotary_base: float = 10000.0
    rotary_scaling: Llama3Rope | None = None

    # The loop.
    injection: Injection = "none"
    loop_norm: LoopNorm = "none"
    final_norm: bool = True
    initial_state: InitialState = "prelude"
    initial_state_std: float = 1.0  # of the normal distribution; truncated at three of them
    initial_state_scale: float = 1.0  # the drawn state is multiplied by this
    exit_gate: bool = False  # a linear gate on the state after every loop (Ouro)

    # Embedding and head.
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()  # tokens that end a text, beside the tokenizer's own

    # Where it comes from.
    model_name: str = "custom"
    family: str = "custom"
    exit_threshold: float = 1.0  # cumulative exit probability at which the published model stops; 1 means never early

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "n_core", "n_loops"):
            check_count(name, getattr(self, name))
        for name in ("n_prelude", "n_coda"):
            check_count(name, getattr(self, name), minimum=0)
        check_count("n_key_value_heads", self.kv_heads)
        if self.n_heads % self.kv_heads:
            raise InputError(f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({self.kv_heads}).")
        if self.d_head % 2:
            raise InputError(f"d_head must be even for rotary embedding, got {self.d_head}.")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}.")
        for name in ("eps", "rotary_base", "initial_state_std", "initial_state_scale", "embed_scale"):
            check_number(name, getattr(self, name))
        for name in ("qk_bias", "qk_norm", "final_norm", "exit_gate", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        for token in self.eos_token_ids:
            check_count("a token in eos_token_ids", token, minimum=0)
        if self.injection == "none" and self.initial_state != "prelude":
            raise InputError(
                f"initial_state={self.initial_state!r} without injection would never read the tokens: "
                "take initial_state='prelude', or an injection."
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def random_state(self) -> bool:
        """Whether a run draws its initial state at random when none is given."""
        return self.initial_state in ("normal", "truncated_normal")

    @property
    def n_layers(self) -> NoReturn:
        """A looped model has no single number of layers, so this raises and says what to ask for."""
        raise AttributeError(
            "a looped model has no single n_layers: ask cfg.n_prelude, cfg.n_core, cfg.n_coda, "
            "or model.schedule.depth for the realised depth."
        )

    def schedule(self, n_loops: int | None = None) -> LoopSchedule:
        """The schedule of a run with `n_loops` loops (default: the count the model was trained with)."""
        loops = self.n_loops if n_loops is None else n_loops
        return LoopSchedule.looped(self.n_prelude, self.n_core, self.n_coda, loops)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopedConfig:
        """The config with these values; an unknown or missing field is an error that names it."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        needed = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        missing = sorted(needed - set(values))
        if unknown or missing:
            raise InputError(f"not a LoopedConfig: unknown fields {unknown}, missing fields {missing}.")
        scaling, ends = values.get("rotary_scaling"), values.get("eos_token_ids", ())
        names = {field.name for field in dataclasses.fields(Llama3Rope)}
        if scaling and (not isinstance(scaling, dict) or set(scaling) != names):
            raise InputError(f"rotary_scaling must have the fields {sorted(names)}, got {scaling!r}.")
        return cls(
            **{**values, "rotary_scaling": Llama3Rope(**scaling) if scaling else None, "eos_token_ids": tuple(ends)}
        )


_CHOICES = {
    "norm_placement": NormPlacement,
    "act_fn": Literal["silu"],
    "rotary_style": RotaryStyle,
    "injection": Injection,
    "loop_norm": LoopNorm,
    "initial_state": InitialState,
}
