"""LoopedConfig: a looped language model as a composition of parts, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_looped.engine.checks import check_number
from tl_looped.engine.errors import InputError, check_count, resolve_index
from tl_looped.engine.habits import CONFIG, no_attribute
from tl_looped.engine.parts import (
    ACT_FNS,
    INJECTIONS,
    LOOP_NORMS,
    LOOP_UPDATES,
    NORM_KINDS,
    NORM_PLACEMENTS,
    STATE_INITS,
    ActFn,
    DynamicRope,
    Injection,
    LoopNorm,
    LoopUpdate,
    NormKind,
    NormPlacement,
    Puzzles,
    QKNorm,
    Rotary,
    StateInit,
    TwoStates,
    check_choice,
    read_fields,
    read_rotary,
)
from tl_looped.engine.schedule import CODA, PRELUDE, HookSite, LoopCount, LoopSchedule
from tl_looped.engine.stacks import Stacks


@dataclass(frozen=True)
class LoopedConfig(Stacks):
    """A decoder with `n_prelude` layers, `n_core` layers run `n_loops` times, and `n_coda` layers.

    Names are TransformerLens's where it has one. What a choice computes stands in the tables of `engine.parts`. With x
    the residual stream, e the prelude's output and N the norms, a run is::

        e = N(prelude(N(scale · E[token] + P[position])))      P, and these two norms, only where they are asked for
        x = initial state
        n_loops times:  x = N(update(x, core(inject(x, e))))   N as `loop_norm` says
        logits = cap(U N(coda(N(C x))))                        the coda's layers may be the core's, once more

    With `two_states` two stacks of `n_core` layers loop in place of the core: see `TwoStates`.

    What asks how a model is built asks the methods here (`sum_broken_by`, `score_terms`, ...), not the fields.
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
    layer_repeats: int = 1  # so many core layers in a row are one layer's weights, at sites of their own
    coda_is_core: bool = False  # the coda's layers are the core's: one last pass through them, outside of the loops

    # Layers.
    norm_placement: NormPlacement = "pre"
    norm: NormKind = "rms"
    eps: float = 1e-6  # added to the mean square (or the variance) in every norm
    act_fn: ActFn = "silu"
    gated_mlp: bool = True  # down(act_fn(gate(x)) · up(x)); else down(act_fn(up(x)))
    mlp_bias: bool = False  # on every map of the MLP

    # Attention: softmax(scale · q kᵀ) v.
    qk_bias: bool = False  # on queries and keys, before norm and rotary
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm | None = None
    attn_scale: float | None = None  # None: 1 / sqrt(d_head)
    scores_by_layer: bool = False  # the scale is divided by the layer's number among the distinct ones, from 1
    score_cap: float | None = None  # c: scores become c · tanh(scores / c), before the mask
    # By distinct layer, whether values have 2σ(W y)·E[token] added, y the first components of what attention reads.
    value_embeds: tuple[bool, ...] = ()
    value_gate_size: int = 32  # how many components
    windows: tuple[int | None, ...] = ()  # by distinct layer: how many keys a query sees, itself too; None or (): all
    attn_gate: bool = False  # every channel of every head's z times sigmoid(G x), x being what queries are made of
    causal: bool = True  # whether a token sees itself and those before it; else all of them
    prefix_lm: bool = False  # trained on prompts that begin with tokens that see each other in both directions

    # Position.
    rotary: Rotary | None = dataclasses.field(default_factory=Rotary)
    rotary_windowed: Rotary | None = None  # of the layers with a window; None: as in the others
    learned_positions: bool = False

    # The loop.
    injection: Injection = "none"
    loop_time: bool = False  # the core's layers are modulated by the time and the step size of the loop (adaLN)
    loop_update: LoopUpdate = "replace"
    loop_step: float = 1.0  # of the damped update
    gate_rank: int | None = None  # of the gated update: rows of W₁
    loop_norm: LoopNorm = "none"
    state_out: bool = False  # a linear map of the state, once, before what comes after the loops
    state_init: StateInit = "prelude"
    state_init_std: float = 1.0  # of the normal distribution; truncated at three of them
    state_init_scale: float = 1.0  # the drawn state is multiplied by this
    exit_gate: bool = False  # a linear gate on the state after every loop (Ouro)
    exit_norm: bool = False  # whether it reads the state through a LayerNorm (LoopUS)
    two_states: TwoStates | None = None  # two stacks that loop, each with a state; None: one core with one state
    halt_gate: bool = False  # of two states, a linear map of z_H to the logits of (halt, go on); trained at position 0

    # Embedding and head.
    embed_scale: float = 1.0
    puzzles: Puzzles | None = None  # vectors that stand before a prompt, as tokens behind the vocabulary
    d_embed: int | None = None  # of token and position embeddings; a map with bias makes them d_model wide
    n_token_types: int = 0  # how many kinds of tokens have an embedding; every token is of the first
    embed_norm: bool = False  # on what the prelude reads
    prelude_norm: bool = False  # on what comes out of the prelude
    final_norm: bool = True  # whether the head reads through a norm
    final_norm_kind: NormKind | None = None  # None: as in the layers
    head_transform: bool = False  # the head has a bias and reads N(act_fn(W x + b)), as wide as token embeddings
    logit_cap: float | None = None  # c: logits become c · tanh(logits / c)
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
        for name, table in _CHOICES.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_choice(name, getattr(self, name), table)
        for name in _NUMBERS:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_number(name, getattr(self, name))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise InputError(f"{field.name} must be True or False, got {value!r}.")
        for token in self.eos_token_ids:
            check_count("a token in eos_token_ids", token, minimum=0)
        self._check_together()

    def _check_together(self) -> None:
        for rotary in (self.rotary, self.rotary_windowed):
            size = None if rotary is None else rotary.size or self.d_head
            if size is not None and (size % 2 or size > self.d_head):
                raise InputError(f"d_head must be even for rotary embedding, got {self.d_head}, of which {size} turn.")
        if self.injection == "none" and self.state_init != "prelude":
            raise InputError(
                f"state_init={self.state_init!r} without injection would never read the tokens: "
                "take state_init='prelude', or an injection."
            )
        if self.loop_step > 1 or (self.loop_step != 1 and self.loop_update != "damped"):
            raise InputError(f"loop_step={self.loop_step} must be in (0, 1], and 1 unless loop_update='damped'.")
        if self.two_states is not None:
            others = [one for one in dataclasses.fields(self) if one.name in _OF_ONE_STATE]
            given = [one.name for one in others if getattr(self, one.name) != one.default]
            given += ["injection"] if self.injection not in ("none", "add") else []
            if given or self.loop_norm not in ("none", "each"):
                name = given[0] if given else "loop_norm"
                raise InputError(
                    f"{name}={getattr(self, name)!r} does not go with two_states, where every loop adds one state to "
                    "the other: leave it out."
                )
        elif self.puzzles is not None or self.halt_gate:
            raise InputError("puzzles and halt_gate are parts of models with two_states.")
        if self.prefix_lm and not self.causal:
            raise InputError("prefix_lm=True says who sees whom, and with causal=False all see all: leave it out.")
        if (self.gate_rank is None) != (self.loop_update != "gated"):
            raise InputError(f"gate_rank={self.gate_rank} belongs to loop_update='gated', got {self.loop_update!r}.")
        if self.gate_rank is not None:
            check_count("gate_rank", self.gate_rank)
        if self.exit_norm and not self.exit_gate:
            raise InputError("exit_norm=True is what an exit gate reads through, so it needs exit_gate=True.")
        if self.n_core % check_count("layer_repeats", self.layer_repeats):
            raise InputError(f"n_core ({self.n_core}) must be a multiple of layer_repeats ({self.layer_repeats}).")
        if self.coda_is_core and self.n_coda != self.n_core:
            raise InputError(
                f"coda_is_core=True runs the {self.n_core} core layers once more, so n_coda must be {self.n_core}, got "
                f"{self.n_coda}."
            )
        layers = len(self.layers())
        for name in ("windows", "value_embeds"):
            found = len(getattr(self, name))
            if found not in (0, layers):
                raise InputError(f"{name} must have one entry for each of {layers} layers, got {found}.")
        if not 1 <= self.value_gate_size <= self.d_model and any(self.value_embeds):
            raise InputError(f"value_gate_size must be in [1, {self.d_model}], got {self.value_gate_size}.")
        if self.loop_time and (self.norm_placement != "pre" or self.coda_is_core):
            raise InputError(
                "loop_time=True goes with norm_placement='pre' and coda_is_core=False, got "
                f"{self.norm_placement!r} and {self.coda_is_core}."
            )
        if self.d_embed is not None and not self.head_transform:
            raise InputError(f"d_embed={self.d_embed} needs head_transform=True, which makes as much for the head.")
        if self.state_out and self.loop_norm != "none":
            raise InputError(f"state_out=True goes with loop_norm='none', got {self.loop_norm!r}.")
        for window in self.windows:
            if window is not None:
                check_count("a window", window)

    # Sizes.

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(no_attribute("LoopedConfig", CONFIG, name, [one.name for one in dataclasses.fields(self)]))

    def schedule(self, n_loops: LoopCount | None = None) -> LoopSchedule:
        """The schedule of a run with `n_loops` loops (default: the count the model was trained with)."""
        loops, inner = self.counts(n_loops)
        if inner is not None:
            return LoopSchedule.nested(self.n_core, loops, inner)
        return LoopSchedule.looped(self.n_prelude, self.n_core, self.n_coda, loops)

    def layers(self) -> list[tuple[str, int]]:
        """Every distinct layer as (stack, index in it), in the order in which one loop runs them."""
        counts = [(PRELUDE, self.n_prelude), *((stack, self.n_core) for stack in self.looping), (CODA, self.n_coda)]
        return [(stack, layer) for stack, n in counts for layer in range(n)]

    @property
    def d_tokens(self) -> int:
        """How many tokens can be read: the vocabulary, and behind it the rows of puzzles."""
        return self.d_vocab + (0 if self.puzzles is None else self.puzzles.n * self.puzzles.rows)

    def puzzle_tokens(self, puzzle: int) -> list[int]:
        """The tokens that stand before a prompt of a puzzle.

        Raises:
            InputError: there is no such puzzle, or the model has none.
        """
        if self.puzzles is None:
            raise InputError(f"{self.model_name} has no puzzles: its prompts begin with themselves.")
        first = self.d_vocab + resolve_index("puzzle", puzzle, self.puzzles.n) * self.puzzles.rows
        return list(range(first, first + self.puzzles.rows))

    def window(self, stack: str | None, layer: int | None) -> int | None:
        """How many keys a query of a layer sees, itself included; None for all up to itself."""
        return (
            dict(zip(self.layers(), self.windows, strict=True)).get((stack or "", layer or 0)) if self.windows else None
        )

    def has_value_embed(self, stack: str | None, layer: int | None) -> bool:
        """Whether a layer adds an embedding of the token to its values."""
        return bool(self.value_embeds) and self.value_embeds[self.layers().index((stack or "", layer or 0))]

    @property
    def reads_tokens_in_layers(self) -> bool:
        """Whether layers read tokens themselves, so that their embeddings are not all that comes in."""
        return any(self.value_embeds)

    def score_scale(self, stack: str | None, layer: int | None) -> float | None:
        """What a layer's scores are multiplied by; None for 1 / sqrt(d_head)."""
        if not self.scores_by_layer:
            return self.attn_scale
        number = self.layers().index((stack or "", layer or 0)) - (self.n_core if self._runs_again(stack) else 0) + 1
        return (self.attn_scale or self.d_head**-0.5) / number

    def _runs_again(self, stack: str | None) -> bool:
        return self.coda_is_core and stack == CODA

    # The state.

    @property
    def draws_state(self) -> bool:
        """Whether a run draws its initial state at random when none is given."""
        return self.state_init in ("normal", "truncated_normal")

    @property
    def starts_from_prelude(self) -> bool:
        """Whether the state that enters the first loop is the prelude's output, unless one is given."""
        return self.state_init == "prelude"

    @property
    def reads_input_in_loops(self) -> bool:
        """Whether every loop mixes the prelude's output into the state."""
        return self.injection != "none"

    @property
    def resumes_in_loop(self) -> bool:
        """Whether a loop can go on from what one of its layers reads, without the state that entered it."""
        return self.loop_update == "replace" and self.two_states is None

    # Norms around the loop and the head.

    @property
    def norms_each_loop(self) -> bool:
        """Whether a norm closes every loop, so that the state is normed."""
        return self.loop_norm in ("each", "own")

    @property
    def norms_last_loop(self) -> bool:
        """Whether the state is normed once, between the last loop and what follows."""
        return self.loop_norm == "last"

    @property
    def has_final_weights(self) -> bool:
        """Whether there is a module for the final norm, which may also close loops."""
        return self.final_norm or self.loop_norm in ("each", "last")

    def head_norm_site(self, last_loop: int) -> HookSite | None:
        """The one norm through which the head reads the last layer's output; None where it is none, or two."""
        if self.readout_broken_by() is not None:
            return None
        if self.final_norm:
            return HookSite("ln_final.")
        return HookSite("ln_loop.", self.head_stack, loop=last_loop) if self.norms_each_loop else HookSite("ln_coda.")

    def sum_broken_by(self, n_loops: int) -> str | None:
        """Why the last state is not the embedding plus the layers' outputs; None where it is."""
        if self.two_states is not None:
            return "in every loop one of two states is added to the other"
        if self.norm_placement in ("residual_sandwich", "post"):
            return "its layers normalise the residual stream itself"
        if self.embed_norm or self.prelude_norm:
            return "the residual stream is normalised before the loops"
        if self.reads_input_in_loops:
            return "the prelude's output is mixed in again in every loop"
        if self.loop_update != "replace":
            return LOOP_UPDATES[self.loop_update][1]
        if self.state_out:
            return "the state goes through a linear map after the loops"
        if self.norms_each_loop and n_loops > 1:
            return "the residual stream is normalised between loops"
        if self.loop_norm != "none" and self.n_coda:
            return "the residual stream is normalised before the coda"
        return None

    def heads_mixed_by(self) -> str | None:
        """Why what attention adds is not the sum of its heads; None where it is (but for a bias)."""
        if self.loop_time:
            return "a gate that changes with the loop multiplies what attention adds"
        mixed = self.norm_placement in ("output", "output_sandwich")
        return "a norm after attention mixes the heads" if mixed else None

    def readout_broken_by(self) -> str | None:
        """Why the head does not read the last layer's output through one norm and nothing else; None where it does."""
        if self.head_transform:
            return "its head reads the last layer's output through a map with an activation function"
        norms = (self.loop_norm != "none" and self.n_coda == 0) + self.final_norm
        if self.n_coda == 0 and self.state_out:
            return "its head reads a linear map of the last layer's output"
        if self.n_coda == 0 and self.loop_update != "replace":
            return "its head reads the state that the loop updates, and not the last layer's output"
        return (
            None
            if norms == 1
            else f"its head reads the last layer's output through {('no norm', '', 'two norms')[norms]}"
        )

    def grows_rotary_from(self) -> int | None:
        """The length from which on rotary embedding depends on a prompt's length, at every position; None: never."""
        scalings = [one.scaling for one in (self.rotary, self.rotary_windowed) if one is not None]
        return min((one.original_n_ctx for one in scalings if isinstance(one, DynamicRope)), default=None)

    def score_terms(self) -> tuple[str, ...]:
        """What attention scores have that q kᵀ / sqrt(d_head) of a causal layer, linear in x, has not."""
        scale = self.attn_scale is not None and self.attn_scale != self.d_head**-0.5
        turns = [one for one in (self.rotary, self.rotary_windowed) if one is not None]
        scale = scale or any(one.attention_factor != 1 for one in turns)
        terms = {
            ROTARY_TERM: self.rotary is not None,
            "biases on queries and keys": self.qk_bias,
            "norms on queries and keys": self.qk_norm is not None,
            "a scale of their own": scale,
            "scales that differ by layer": self.scores_by_layer,
            "a soft cap": self.score_cap is not None,
            "sliding windows": any(window is not None for window in self.windows),
        }
        return tuple(term for term, is_so in terms.items() if is_so)

    # Words.

    @property
    def source(self) -> str:
        """Where e comes from."""
        return "the prelude" if self.n_prelude else "the embedding"

    @property
    def mix(self) -> str:
        """The formula of the injection."""
        return INJECTIONS[self.injection][0]

    @property
    def state_mark(self) -> str:
        """The initial state, for a drawing: what comes behind "x₀"."""
        return STATE_INITS[self.state_init][0]

    def state_in_words(self) -> str:
        """What enters the first loop."""
        if self.two_states is not None:
            one = "a learned vector, the same at every position"
            return f"z_H: {'the embedding' if self.two_states.h_start == 'embedding' else one}; z_L: {one}"
        std = self.state_init_std * self.state_init_scale
        return STATE_INITS[self.state_init][1].format(source=self.source, std=std)

    # As JSON.

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        """The config with these values; an unknown or missing field is an error that names it."""
        given = dict(read_fields(cls, values, "LoopedConfig"))
        for name in ("rotary", "rotary_windowed"):
            if given.get(name) is not None:
                given[name] = read_rotary(given[name], name)
        for name, kind in (("qk_norm", QKNorm), ("two_states", TwoStates), ("puzzles", Puzzles)):
            if given.get(name) is not None:
                given[name] = kind(**read_fields(kind, given[name], name))
        for name in ("windows", "value_embeds", "eos_token_ids"):
            given[name] = tuple(given.get(name, ()))
        return cls(**given)


ROTARY_TERM = "rotary position embedding"
_CHOICES: dict[str, Mapping[Any, object]] = {
    "norm_placement": NORM_PLACEMENTS,
    "norm": NORM_KINDS,
    "final_norm_kind": NORM_KINDS,
    "act_fn": ACT_FNS,
    "injection": INJECTIONS,
    "loop_update": LOOP_UPDATES,
    "loop_norm": LOOP_NORMS,
    "state_init": STATE_INITS,
}
_NUMBERS = ("eps", "attn_scale", "score_cap", "loop_step", "state_init_std", "state_init_scale", "embed_scale")
_NUMBERS += ("logit_cap",)
_OF_ONE_STATE = ("n_prelude", "n_coda", "loop_update", "state_init", "exit_gate", "final_norm_kind")
_OF_ONE_STATE += ("embed_norm", "prelude_norm", "learned_positions", "coda_is_core", "loop_time", "state_out")
_OF_ONE_STATE += ("d_embed", "n_token_types", "head_transform", "layer_repeats")
_OPTIONAL = ("final_norm_kind", "attn_scale", "score_cap", "logit_cap")
