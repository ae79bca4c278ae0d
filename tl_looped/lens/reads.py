"""Which states a lens reads, and how a state becomes what the unembedding reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel

LensKind = Literal["exact", "direct", "coda", "tuned"]
LensSite = Literal["state", "resid_pre", "resid_mid", "resid_post"]
Positions = int | slice | Sequence[int] | None
Place = tuple[int, int]  # (loop, index among the layers read; 0 for the state)
Convert = Callable[[Tensor, Place], Tensor]
Translate = Callable[[Tensor, int, int], Tensor]  # (vectors, layer, loop) -> vectors

CHUNK = 2**24
"""How many logits of one state are formed at a time: 64 MB in float32."""

_SITES = ("state", "resid_pre", "resid_mid", "resid_post")
_KINDS = ("exact", "direct", "coda", "tuned")


@dataclass(frozen=True)
class Reads:
    """The states that a lens reads in one run.

    Attributes:
        site: "state" (leaving a loop), or a residual stream of the core layers.
        loops: in the order asked for.
        layers: core layers; None for the state.
        positions: in the order asked for.
    """

    site: LensSite
    loops: tuple[int, ...]
    layers: tuple[int, ...] | None
    positions: tuple[int, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of what is measured."""
        return ("loop", "batch", "pos") if self.layers is None else ("loop", "layer", "batch", "pos")

    def names(self, loop: int) -> list[str]:
        """The hook names that are read in a loop, layer by layer."""
        if self.layers is None:
            return [HookSite("hook_state_post", loop=loop).name]
        return [HookSite(f"hook_{self.site}", CORE, layer, loop).name for layer in self.layers]


def choose_reads(
    model: LoopedModel,
    run: Run,
    site: LensSite,
    loops: Iterable[int] | None,
    layers: Iterable[int] | None,
    positions: Positions,
) -> Reads:
    """Check what is asked for and count negative numbers from the end; None is all of them.

    Raises:
        InputError: a site, loop, layer or position that there is not, or layers of the state.
    """
    if site not in _SITES:
        raise InputError(f"site must be one of {', '.join(map(repr, _SITES))}, got {site!r}.")
    if not run.reads_out or run.start:
        raise InputError("a lens reads whole runs: leave out start_at_loop and stop_at_loop.")
    if site == "state" and layers is not None:
        raise InputError("the state leaves the whole loop, not a layer: leave out layers, or pass site='resid_post'.")
    chosen_loops = _indices("loops", loops, run.n_loops)
    chosen_layers = None if site == "state" else _indices("layers", layers, model.cfg.n_core)
    return Reads(site, chosen_loops, chosen_layers, _positions(positions, run.tokens.shape[1]))


def check_rows(run: Run, reads: Reads) -> None:
    """An error for a row of which only padding would be read."""
    blind = (~real_positions(run, reads).any(1)).nonzero().flatten().tolist()
    if blind:
        raise InputError(
            f"rows {blind} have only padding at the positions read: pass padding_side='left' to read the last tokens "
            "of prompts of different length, or positions=None for all."
        )


def _indices(name: str, given: Iterable[int] | None, size: int) -> tuple[int, ...]:
    if given is not None and not isinstance(given, Iterable):
        raise InputError(f"{name} must be indices, such as [0, -1], got {given!r}.")
    chosen = tuple(range(size)) if given is None else tuple(resolve_index(name[:-1], one, size) for one in given)
    if not chosen:
        raise InputError(f"{name} is empty, so nothing would be read: leave it out for all.")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{name} names one twice: {list(chosen)}.")
    return chosen


def _positions(given: Positions, size: int) -> tuple[int, ...]:
    if isinstance(given, slice):
        chosen = tuple(range(size))[given]
        if not chosen:
            raise InputError(f"positions {given} picks none of {size} positions.")
        return chosen
    return _indices("positions", [given] if isinstance(given, int) else given, size)


def check_kind(model: LoopedModel, kind: LensKind, translated: bool) -> None:
    """An error for a lens that there is not, or that the model can't have."""
    if kind not in _KINDS:
        raise InputError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {kind!r}.")
    if kind == "coda" and not model.cfg.n_coda:
        raise InputError(f"{model.cfg.model_name} has no coda: pass kind='exact' or kind='direct'.")
    if (kind == "tuned") != translated:
        raise InputError(
            "kind='tuned' needs translator=: fit one with tl_looped.lens.fit_tuned_lens."
            if kind == "tuned"
            else f"a translator belongs to kind='tuned', got kind={kind!r}."
        )


def direct_input(
    model: LoopedModel, site: LensSite, x: Float[Tensor, "*dims d_model"]
) -> Float[Tensor, "*dims d_model"]:
    """What the unembedding reads in the direct lens: the final norm of a state, unless the head reads it as it is."""
    return model.transformer.head_input(x, closed=site == "state")


def converter(
    model: LoopedModel, run: Run, reads: Reads, kind: LensKind, translate: Translate | None = None
) -> Convert:
    """From a state at all positions to what the unembedding reads at the chosen ones."""
    positions, site = list(reads.positions), reads.site

    def whole(x: Tensor, place: Place) -> Tensor:
        closed = x if site == "state" else model.transformer.close(x)
        return model.transformer.finish(closed, model.frame(run))[:, positions]  # a coda attends over all positions

    def direct(x: Tensor, place: Place) -> Tensor:
        vectors, (loop, index) = x[:, positions], place
        if translate is not None:
            vectors = translate(vectors, reads.layers[index] if reads.layers else 0, loop)
        return direct_input(model, site, vectors)

    return whole if kind in ("exact", "coda") else direct


@torch.no_grad()
def read_states(
    model: LoopedModel, run: Run, reads: Reads, convert: Convert, extra_loops: Iterable[int] = ()
) -> tuple[dict[Place, Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_vocab"]]:
    """Run once; (what `convert` makes of each state, the run's own logits at the chosen positions).

    Args:
        extra_loops: loops to read besides those of `reads`.
    """
    kept: dict[Place, Tensor] = {}
    loops = {*reads.loops, *extra_loops}
    places = {name: (loop, index) for loop in loops for index, name in enumerate(reads.names(loop))}

    def keep(x: Tensor, hook: LoopHookPoint) -> None:
        kept[places[hook.name]] = convert(x, places[hook.name])

    with model.hooks(fwd_hooks=[(name, keep) for name in places]):
        logits = cast(Tensor, model.execute(run))
    return kept, logits[:, list(reads.positions)]


def real_positions(run: Run, reads: Reads) -> Tensor:
    """Which of the positions read hold a real token, [batch, pos]."""
    return run.attention_mask[:, list(reads.positions)]


def chunks(rows: int, d_vocab: int) -> list[slice]:
    """Rows in pieces of at most `CHUNK` logits."""
    size = max(1, CHUNK // d_vocab)
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]
