"""What the engine asks of a network: one that is run loop by loop, with hook points by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import HookDict
from tl_looped.engine.kv import KVCache


class Frame(NamedTuple):
    """What all layers of one run share: rotary angles, in the model's dtype, and who may attend to whom.

    With a cache the keys are those in it and then those of this run; a `visible` of None then needs an empty cache or
    one query.
    """

    cos: Float[Tensor, "rows pos 1 d_head"]
    sin: Float[Tensor, "rows pos 1 d_head"]
    visible: Bool[Tensor, "#batch pos key"] | None = None  # [row, query, key]; None: every query sees all up to itself
    kv: KVCache | None = None  # keys and values of earlier positions


class Network(nn.Module, ABC):
    """A network of `cfg`'s schedule.

    Attributes:
        cfg: what it was built from.
        hook_dict: its hook points by name; see `tl_looped.engine.schedule` for the names.
        embed: from token ids to vectors.
        unembed: from what `finish` returns to logits.
        exit_gate: from a state to the logit of stopping there; only where `cfg.exit_gate` says so.
    """

    cfg: LoopedConfig
    hook_dict: HookDict
    embed: nn.Embedding
    unembed: nn.Linear
    exit_gate: nn.Linear

    @abstractmethod
    def frame(self, visible: Bool[Tensor, "#batch pos key"] | None, positions: Int[Tensor, "rows pos"]) -> Frame:
        """Prepare what all layers of a run share."""

    @abstractmethod
    def needs_input(self, state_given: bool) -> bool:
        """Whether a run reads the tokens: for the initial state, or in a loop."""

    @abstractmethod
    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_model"] | None,
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"] | None]:
        """(the state entering loop `start`, what the loops read of the tokens or None where they read nothing)."""

    @abstractmethod
    def loop(
        self,
        state: Float[Tensor, "batch pos d_model"],
        e: Float[Tensor, "batch pos d_model"] | None,
        frame: Frame,
        t: int,
        first_layer: int = 0,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One pass through the core: the state entering loop t to the state leaving it.

        With `first_layer` above 0 it goes on from the middle: `state` is what that layer reads.
        """

    @abstractmethod
    def finish(self, state: Float[Tensor, "batch pos d_model"], frame: Frame) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads if the model stops with this state."""

    def readout(self, state: Float[Tensor, "batch pos d_model"], frame: Frame) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the model if it stops with this state."""
        return self.unembed(self.finish(state, frame))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        frame: Frame,
        state: Float[Tensor, "batch pos d_model"] | None,
        start: int,
        stop: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state after loops start, ..., stop - 1, from `state`, or from what the tokens give without one."""
        x, e = self.begin(tokens, frame, state, start)
        for t in range(start, stop):
            x = self.loop(x, e, frame, t)
        return x


def is_plain(module: nn.Module) -> bool:
    """Whether a map is its weight and bias, also if that is parametrised: nothing was put on it or in its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks  # torch has no public way to ask
    return type(module).forward in (nn.Linear.forward, nn.Embedding.forward) and not hooked


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
