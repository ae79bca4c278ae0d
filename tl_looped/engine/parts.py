"""The parts that a looped model is composed of, each with its equation in the words of a report.

A choice is a line in one of the tables: its name is what `LoopedConfig` takes, its words are what a report says. x is
the residual stream, e what comes out of the prelude, f a sub-layer (attention, then MLP), F one pass through the core.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count

FLOAT32_EPS = 2.0**-23  # torch.finfo(float32).eps: what a norm without an eps adds, kept in every number format

NormKind = Literal["rms", "rms_plus_one", "weightless", "layer", "layer_no_bias"]
NORM_KINDS: Mapping[NormKind, str] = {
    "rms": "w · x / sqrt(mean(x²) + eps)",
    "rms_plus_one": "(1 + w) · x / sqrt(mean(x²) + eps)",
    "weightless": "x / sqrt(mean(x²) + eps), without weights",
    "layer": "w · (x − mean(x)) / sqrt(var(x) + eps) + b",
    "layer_no_bias": "w · (x − mean(x)) / sqrt(var(x) + eps)",
}

NormPlacement = Literal["pre", "residual_sandwich", "output_sandwich", "output", "post"]
NORM_PLACEMENTS: Mapping[NormPlacement, str] = {
    "pre": "x + f(N(x)): every attention and MLP reads a normed copy of the stream; the stream itself is not normed",
    "residual_sandwich": "N′(x + f(N(x))): a norm before every attention and MLP, and one on the stream after it",
    "output_sandwich": "x + N′(f(N(x))): a norm before every attention and MLP, and one on its output",
    "output": "x + N′(f(x)): a norm on the output of every attention and MLP, none before it",
    "post": "N′(x + f(x)): a norm on the stream after every attention and MLP, none before it",
}

Injection = Literal["none", "concat_linear", "concat_linear_prelude_first", "add", "diagonal"]
INJECTIONS: Mapping[Injection, tuple[str, str]] = {  # the formula, and what it says; {source} is where e comes from
    "none": ("x", "none: the core reads the state alone"),
    "add": ("x + e", "every loop starts by adding e, what comes out of {source}, to the state x"),
    "concat_linear": (
        "W [x; e]",
        "every loop starts with a linear map of the state x and e, what comes out of {source}",
    ),
    "concat_linear_prelude_first": (
        "W [e; x]",
        "every loop starts with a linear map of e, what comes out of {source}, and the state x",
    ),
    "diagonal": (
        "a ⊙ x + δ ⊙ B e",
        "every loop starts by shrinking each component of the state x, a = exp(−δ ⊙ exp(A)), and adding a linear map "
        "of e, what comes out of {source}",
    ),
}

LoopNorm = Literal["none", "each", "own", "last"]
LOOP_NORMS: Mapping[LoopNorm, str] = {
    "none": "none",
    "each": "after every loop, on the state that goes back in",
    "own": "after every loop, on the state that goes back in, with weights of its own",
    "last": "after the last loop only, before what follows",
}

LoopUpdate = Literal["replace", "damped", "residual", "gated"]
LOOP_UPDATES: Mapping[LoopUpdate, tuple[str, str]] = {  # what it says; why the state is no sum of what layers write
    "replace": ("F(x): the state is what comes out of the core", ""),
    "damped": (
        "x + {step:.4g} (F(x) − x): the state moves a part of the way to what comes out of the core",
        "a loop moves the state only a part of the way to what its layers make of it",
    ),
    "residual": (
        "x + F(x): what comes out of the core is added to the state",
        "a loop adds what its layers make of the state, which has the state in it, to the state once more",
    ),
    "gated": (
        "A ⊙ F(x) + (1 − A) ⊙ x, with A = exp(−δ ⊙ exp(a)) and δ = softplus(W₂ W₁ (F(x) − x) + b): a learned gate says "
        "of every component how far it moves to what comes out of the core",
        "a gate decides how far a loop moves the state to what its layers make of it",
    ),
}

StateInit = Literal["prelude", "zeros", "normal", "truncated_normal"]
STATE_INITS: Mapping[StateInit, tuple[str, str]] = {  # in a drawing, and in a sentence
    "prelude": (" = e", "e, what comes out of {source}"),
    "zeros": (" = 0", "zero everywhere"),
    "normal": (": random (normal)", "drawn from a normal distribution, std {std:.4g}"),
    "truncated_normal": (
        ": random (truncated normal)",
        "drawn from a normal distribution, std {std:.4g}, cut at three of them",
    ),
}

LOOP_TIME = (
    "x + g ⊙ f(N(x) ⊙ (1 + s)), with g and s a linear map of SiLU(c), and c an embedding of the loop's time plus one "
    "of its step size"
)

ActFn = Literal["silu", "gelu", "gelu_tanh", "relu2", "half_relu2"]
ACT_FNS: Mapping[ActFn, str] = {
    "silu": "SiLU",
    "gelu": "GELU",
    "gelu_tanh": "GELU by tanh",
    "relu2": "max(x, 0)²",
    "half_relu2": "½ max(x, 0)²",
}

RotaryStyle = Literal["halves", "adjacent"]


@dataclass(frozen=True)
class LinearRope:
    """Every frequency divided by `factor`, as if positions lay closer."""

    factor: float

    def __post_init__(self) -> None:
        check_number("scaling.factor", self.factor)


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later, by wavelength against the original context length."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_n_ctx: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"scaling.{name}", getattr(self, name))
        check_count("scaling.original_n_ctx", self.original_n_ctx)
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"scaling needs low_freq_factor < high_freq_factor, got {self.low_freq_factor} and "
                f"{self.high_freq_factor}."
            )


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): quick pairs turn as before, slow ones `factor` times slower, and scores are sharper.

    A pair that makes `beta_fast` full turns within the original context, or more, keeps its frequency; one that makes
    `beta_slow` or fewer is divided by `factor`; between the two, by a part that grows with the pair's index.

    Attributes:
        factor, original_n_ctx, beta_fast, beta_slow: see above.
        attention_factor: what cosines and sines are multiplied by; None for 1 + 0.1 log(factor).
        truncate: whether the two pairs between which frequencies change are rounded, outward.
    """

    factor: float
    original_n_ctx: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            check_number(f"scaling.{name}", getattr(self, name))
        check_count("scaling.original_n_ctx", self.original_n_ctx)
        if self.attention_factor is not None:
            check_number("scaling.attention_factor", self.attention_factor)
        if self.beta_slow > self.beta_fast:
            raise InputError(f"scaling needs beta_slow <= beta_fast, got {self.beta_slow} and {self.beta_fast}.")


@dataclass(frozen=True)
class DynamicRope:
    """A base that grows with the prompt: a row of n tokens, more than `original_n_ctx`, turns by a larger base.

    base · s^(size / (size − 2)), with s = factor · n / original_n_ctx − (factor − 1). Here n is the row's own length;
    transformers takes that of the longest row of a batch.
    """

    factor: float
    original_n_ctx: int

    def __post_init__(self) -> None:
        if check_number("scaling.factor", self.factor) < 1:
            raise InputError(f"scaling.factor must be at least 1 where scaling is dynamic, got {self.factor}.")
        check_count("scaling.original_n_ctx", self.original_n_ctx)


RopeScaling = LinearRope | Llama3Rope | YarnRope | DynamicRope
ROPE_SCALINGS = (LinearRope, Llama3Rope, YarnRope, DynamicRope)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: the pair i of a head's components, (a, b), turns by f = position · base^(−2i / size).

    (a, b) -> (a cos f − b sin f, b cos f + a sin f), or by −f where it is `reversed`.

    Attributes:
        base: of the frequencies.
        style: which components are a pair: i with i + size/2 ("halves"), or 2i with 2i + 1 ("adjacent").
        size: how many components of a head turn, from the first; None for all of them.
        scaling: of the frequencies.
        reversed: whether pairs turn backward.
        bfloat16: whether cosines and sines are rounded to bfloat16 first, whatever the model's number format.
    """

    base: float = 10000.0
    style: RotaryStyle = "halves"
    size: int | None = None
    scaling: RopeScaling | None = None
    reversed: bool = False
    bfloat16: bool = False

    def __post_init__(self) -> None:
        check_number("rotary.base", self.base)
        if self.style not in ("halves", "adjacent"):
            raise InputError(f"rotary.style must be 'halves' or 'adjacent', got {self.style!r}.")
        if self.size is not None and check_count("rotary.size", self.size) % 2:
            raise InputError(f"rotary.size must be even, got {self.size}.")

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by, so that scores grow by its square: 1 but for YaRN."""
        if not isinstance(self.scaling, YarnRope):
            return 1.0
        given, factor = self.scaling.attention_factor, self.scaling.factor
        return given if given is not None else 1 + 0.1 * math.log(max(factor, 1.0))


@dataclass(frozen=True)
class QKNorm:
    """A norm on queries and keys.

    Attributes:
        per: of every "head" by itself, or of the "whole" vector, all heads together.
        kind: which norm, see `NORM_KINDS`.
        after_rotary: whether it comes after rotary embedding, not before.
        eps: its own; None for that of the other norms.
    """

    per: Literal["head", "whole"] = "whole"
    kind: NormKind = "rms"
    after_rotary: bool = False
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.per not in ("head", "whole"):
            raise InputError(f"qk_norm.per must be 'head' or 'whole', got {self.per!r}.")
        check_choice("qk_norm.kind", self.kind, NORM_KINDS)
        if self.eps is not None:
            check_number("qk_norm.eps", self.eps)


@dataclass(frozen=True)
class TwoStates:
    """Two stacks of layers on two timescales, each with a state of its own: L (`L_blocks`) and H (`H_blocks`).

    z_L starts as a learned vector, the same at every position, and z_H as e, or as another such vector. A loop runs L
    several times, then H once: z_L ← N(L(z_L + z_H)), or with an injection N(L(z_L + (z_H + e))), `l_cycles` times;
    z_H ← N(H(z_H + z_L)). The head reads z_H.

    Attributes:
        l_cycles: how often L runs in a loop, in the model as it was trained; a run may ask for another count.
        h_start: what z_H starts as: "embedding", e; or "vector".
        one_net: whether both stacks are the same layers, in two roles.
    """

    l_cycles: int = 1
    h_start: Literal["embedding", "vector"] = "embedding"
    one_net: bool = False

    def __post_init__(self) -> None:
        check_count("two_states.l_cycles", self.l_cycles)
        if self.h_start not in ("embedding", "vector"):
            raise InputError(f"two_states.h_start must be 'embedding' or 'vector', got {self.h_start!r}.")

    def in_words(self, injects: bool) -> str:
        """What a loop does, as a report says it."""
        read = "z_L + (z_H + e)" if injects else "z_L + z_H"
        each = f"{self.l_cycles} times z_L ← N(L({read})), then z_H ← N(H(z_H + z_L))"
        return f"two, on two timescales: in every loop {each}{', L and H the same layers' if self.one_net else ''}"


@dataclass(frozen=True)
class Puzzles:
    """Learned vectors that stand before a prompt, for what it is a case of: rows of a puzzle.

    Row j of puzzle i is the token d_vocab + i · rows + j, so that a prompt begins with the tokens of one puzzle. Its
    vector is a part of the puzzle's `size` numbers, filled up with zeros to rows · d_model.

    Attributes:
        n: how many puzzles there are.
        rows: positions that one takes.
        size: learned numbers of one.
    """

    n: int
    rows: int
    size: int

    def __post_init__(self) -> None:
        for name in ("n", "rows", "size"):
            check_count(f"puzzles.{name}", getattr(self, name))


def check_choice(name: str, value: object, table: Mapping[Any, object]) -> None:
    """Raise for a choice that is not in its table."""
    if value not in table:
        raise InputError(f"{name} must be one of {tuple(table)}, got {value!r}.")


def read_fields(kind: Any, values: Any, what: str) -> Mapping[str, Any]:
    """The values, where they are the fields of a class."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping):
        raise InputError(f"{what} must have the fields {sorted(fields)}, got {values!r}.")
    unknown = sorted(set(values) - set(fields))
    missing = sorted({n for n, f in fields.items() if f.default is dataclasses.MISSING} - set(values))
    if unknown or missing:
        raise InputError(f"not a {what}: unknown fields {unknown}, missing fields {missing}.")
    return values


def read_rotary(values: Any, name: str) -> Rotary:
    """Rotary embedding from its fields as plain values."""
    rotary = dict(read_fields(Rotary, values, name))
    if rotary.get("scaling") is not None:
        given = set(rotary["scaling"]) if isinstance(rotary["scaling"], Mapping) else set()
        marks = {"low_freq_factor": Llama3Rope, "beta_fast": YarnRope, "original_n_ctx": DynamicRope}
        kind = next((kind for mark, kind in marks.items() if mark in given), LinearRope)
        rotary["scaling"] = kind(**read_fields(kind, rotary["scaling"], f"{name}.scaling"))
    return Rotary(**rotary)
