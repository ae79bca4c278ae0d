"""What the engine asks of a network: one that is run loop by loop, with hook points by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import HookDict
from tl_looped.engine.kv import Keys
from tl_looped.engine.numbers import wide


class Angles(NamedTuple):
    """Cosine and sine of rotary embedding, in the model's dtype, broadcast over heads."""

    cos: Float[Tensor, "rows pos 1 size"]
    sin: Float[Tensor, "rows pos 1 size"]


class Condition(NamedTuple):
    """What tells the layers of a loop its time: one vector for all positions, and what hooks made of it at each."""

    value: Float[Tensor, " d_model"]
    seen: Float[Tensor, "batch pos d_model"] | None = None  # None: no hook looked
    changed: Bool[Tensor, ""] | None = None  # whether hooks changed it; None: none could


class Frame(NamedTuple):
    """What all layers of one run share: positions, rotary angles, and who may attend to whom.

    With a cache the keys are those in it and then those of this run; a `visible` of None then needs an empty cache or
    one query.
    """

    positions: Int[Tensor, "rows pos"]
    angles: Angles | None = None  # None: no rotary embedding
    angles_windowed: Angles | None = None  # of layers with a window
    visible: Bool[Tensor, "#batch pos key"] | None = None  # [row, query, key]; None: every query sees all up to itself
    kv: Keys | None = None  # keys and values of earlier positions
    l_cycles: int | None = None  # of two stacks that loop, how often the fast one runs in each loop
    tokens: Int[Tensor, "batch pos"] | None = None  # where layers read them
    clock: Float[Tensor, "loop 2"] | None = None  # where layers know it: at which time each loop begins, and its step
    condition: Condition | None = None  # what the loop that is running makes of that
    gates: dict[int, Tensor] | None = None  # by loop, what exit rules read of the exit gate: filled while it runs

    def repeat(self, times: int) -> Frame:
        """The frame of a batch that holds every row so many times; what is the same for all rows stays one row."""

        def repeated(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x.repeat(times, *(1 for _ in x.shape[1:]))

        tokens = None if self.tokens is None else self.tokens.repeat(times, 1)
        return self._each(repeated)._replace(tokens=tokens)

    def part(self, rows: int | None = None, start: int = 0) -> Frame:
        """The frame of the first so many rows (None: all), from a position on; what is one row for all stays that."""
        return self._each(lambda x: (x if x.shape[0] == 1 else x[:rows])[:, start:])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Frame:
        """With every tensor of [rows, pos, ...] changed."""
        full, windowed = (one and Angles(*map(change, one)) for one in (self.angles, self.angles_windowed))
        visible, tokens = (None if one is None else change(one) for one in (self.visible, self.tokens))
        places = change(self.positions)
        return self._replace(positions=places, angles=full, angles_windowed=windowed, visible=visible, tokens=tokens)


class Network(nn.Module, ABC):
    """A network of `cfg`'s schedule.

    Its state, [batch, pos, d_state], is what goes from loop to loop: d_state is d_model, or where there are two states,
    side by side, twice that; the one that the head reads comes first.

    Attributes:
        cfg: what it was built from.
        hook_dict: its hook points by name; see `tl_looped.engine.schedule` for the names.
        embed: from token ids to vectors.
        unembed: from what `finish` returns to logits.
    """

    cfg: LoopedConfig
    hook_dict: HookDict
    embed: nn.Embedding
    unembed: nn.Linear

    @property
    def exit_logit(self) -> Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows"]] | None:
        """From states leaving a loop to the logit of stopping there; None where no gate was trained."""
        return None

    @property
    def head_gain(self) -> Float[Tensor, " d_model"] | None:
        """What multiplies every component of the residual stream just before the head; None where nothing does."""
        return None

    @abstractmethod
    def frame(
        self,
        visible: Bool[Tensor, "#batch pos key"] | None,
        positions: Int[Tensor, "rows pos"],
        tokens: Int[Tensor, "batch pos"],
        l_cycles: int | None = None,
        step_sizes: Sequence[float] | None = None,
    ) -> Frame:
        """Prepare what all layers of a run share; `l_cycles` and `step_sizes` are those of the run."""

    def read_part(self, state: Float[Tensor, "*rows d_state"]) -> Float[Tensor, "*rows d_model"]:
        """The part of a state that the head reads: all of it, or one of two states."""
        return state

    def needs_input(self, state_given: bool) -> bool:
        """Whether a run reads the tokens: for the initial state, or in a loop."""
        return self.cfg.reads_input_in_loops or not state_given

    @abstractmethod
    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_state"] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch pos d_state"], Float[Tensor, "batch pos d_model"] | None]:
        """(the state entering loop `start`, what the loops read of the tokens or None where they read nothing)."""

    @abstractmethod
    def loop(
        self,
        state: Float[Tensor, "batch pos d_state"],
        e: Float[Tensor, "batch pos d_model"] | None,
        frame: Frame,
        t: int,
        first_layer: int = 0,
    ) -> Float[Tensor, "batch pos d_state"]:
        """One pass through the core: the state entering loop t to the state leaving it.

        With `first_layer` above 0 it goes on from the middle: `state` is what that layer reads.
        """

    @abstractmethod
    def finish(self, state: Float[Tensor, "batch pos d_state"], frame: Frame) -> Float[Tensor, "batch pos d_read"]:
        """What the unembedding reads if the model stops with this state."""

    def readout(self, state: Float[Tensor, "batch pos d_state"], frame: Frame) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the model if it stops with this state."""
        return self.unembed(self.finish(state, frame))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_state"] | None,
        start: int,
        stop: int,
    ) -> Float[Tensor, "batch pos d_state"]:
        """The state after loops start, ..., stop - 1, from `state`, or from what the tokens give without one."""
        x, e = self.begin(tokens, frame, state, start)
        for t in range(start, stop):
            x = self.loop(x, e, frame, t)
        return x


@contextmanager
def frozen_weights(module: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Weights without gradients for the length of a `with` block, so that a backward leaves none on them.

    Args:
        module: whose weights.
        but: those that are asked for gradients meanwhile.
    """
    before = {weight: weight.requires_grad for weight in module.parameters()}
    try:
        for weight in before:
            weight.requires_grad_(False)
        for weight in but:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, asked in before.items():
            weight.requires_grad_(asked)


class CappedLinear(nn.Linear):
    """c · tanh(W x / c): a head with a soft cap on its logits. Its weight is the map before the cap."""

    def __init__(self, d_in: int, d_out: int, cap: float):
        super().__init__(d_in, d_out, bias=False)
        self.cap = cap

    def forward(self, input: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """The capped logits, computed in float32 at least."""
        return self.capped(super().forward(input))

    def capped(self, logits: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_out"]:
        """The cap alone."""
        return (wide(logits) / self.cap).tanh().mul(self.cap).to(logits.dtype)


def is_plain(module: nn.Module) -> bool:
    """Whether a map is its weight and bias, also if that is parametrised: nothing was put on it or in its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks  # torch has no public way to ask
    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward, CappedLinear.forward) and not hooked


def matrix(module: nn.Module, name: str) -> Float[Tensor, "rows columns"]:
    """The weight of a projection or an embedding, which is its whole map but for a bias.

    Args:
        module: a Linear or an Embedding, or what was put in its place.
        name: what the caller calls it, for the error.

    Raises:
        InputError: it has an adapter or a torch hook on it, or is quantised, so that no one matrix is its map.
    """
    if not is_plain(module):
        raise InputError(
            f"{name} is a {type(module).__name__}, no plain layer, or has torch hooks on it, so its weight is not the "
            "map that runs: merge the adapter first (merge_and_unload in PEFT), or read activations, such as "
            "attn.hook_result, which use the module itself."
        )
    return cast(Tensor, module.weight)
