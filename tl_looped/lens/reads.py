"""What a lens reads and how, and which tokens it follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.identity import fingerprint
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Run, Runs
from tl_looped.engine.schedule import CORE, HookSite, LoopCount
from tl_looped.model import LoopedModel
from tl_looped.observe.watching import watch

LensKind = Literal["exact", "direct", "coda", "tuned", "jacobian"]
LensSite = Literal["state", "resid_pre", "resid_mid", "resid_post"]
Positions = int | slice | Sequence[int] | None
Place = tuple[int, int | None]  # (loop, core layer; None for the state)
Convert = Callable[[Tensor, Place], Tensor]
Translate = Callable[[Tensor, int, int], Tensor]  # (vectors, layer, loop) -> vectors

Targets = str | int | Sequence[str | int] | Tensor | None

TRANSLATED = {"tuned": "fit_tuned_lens", "jacobian": "jacobian_lens"}
"""Kinds that need a translator, and what makes it."""

FINAL = "final top token"
PER_ROW = "target"


@dataclass(frozen=True)
class Reads:
    """The states that a lens reads in a run.

    Attributes:
        site: "state" (leaving a loop), or a residual stream of the layers that loop.
        loops, layers, positions: in the order asked for; layers is None for the state.
        stack: whose state, or layers.
    """

    site: LensSite
    loops: tuple[int, ...]
    layers: tuple[int, ...] | None
    positions: tuple[int, ...]
    stack: str = CORE

    @property
    def streams(self) -> dict[int | None, HookSite]:
        """What is read in every loop: a site for each layer, or under None the state's."""
        if self.layers is None:
            return {None: HookSite("hook_state_post", None if self.stack == CORE else self.stack)}
        return {layer: HookSite(f"hook_{self.site}", self.stack, layer) for layer in self.layers}

    @property
    def shape(self) -> tuple[int, ...]:
        """How many loops, or loops and layers."""
        return (len(self.loops),) if self.layers is None else (len(self.loops), len(self.layers))


def choose_reads(
    model: LoopedModel,
    runs: Runs,
    site: LensSite = "state",
    loops: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    stack: str | None = None,
) -> Reads:
    """Check what is asked for and count negative numbers from the end; None is all of them.

    Where two stacks loop, a `stack` of None is the one whose state the head reads.

    Raises:
        InputError: runs of a part, a site, stack, loop, layer or position that there is not, or layers of the state.
    """
    if site not in get_args(LensSite):
        raise InputError(f"site must be one of {', '.join(map(repr, get_args(LensSite)))}, got {site!r}.")
    if not runs.whole:
        raise InputError(f"a lens reads whole runs: leave out {runs.parted_by}.")
    if site == "state" and layers is not None:
        raise InputError("the state leaves the whole loop, not a layer: leave out layers, or pass site='resid_post'.")
    stack = model.cfg.looping_stack(model.cfg.head_stack if stack is None else stack)
    schedule = model.cfg.schedule(runs.counts)
    chosen_layers = None if site == "state" else _indices("layers", layers, schedule.n_layers(stack))
    chosen_loops = _indices("loops", loops, schedule.n_loops(stack))
    return Reads(site, chosen_loops, chosen_layers, choose_positions(positions, runs.rows.longest), stack)


def choose_positions(given: Positions, size: int) -> tuple[int, ...]:
    """Positions of padded prompts, counted from the beginning; None is all of them."""
    if isinstance(given, slice):
        chosen = tuple(range(size))[given]
        if not chosen:
            raise InputError(f"positions {given} picks none of {size} positions.")
        return chosen
    return _indices("positions", [given] if isinstance(given, int) else given, size)


def _indices(name: str, given: Iterable[int] | None, size: int) -> tuple[int, ...]:
    if given is not None and not isinstance(given, Iterable):
        raise InputError(f"{name} must be indices, such as [0, -1], got {given!r}.")
    chosen = tuple(range(size)) if given is None else tuple(resolve_index(name[:-1], one, size) for one in given)
    if not chosen:
        raise InputError(f"{name} is empty, so nothing would be read: leave it out for all.")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"{name} names one twice: {list(chosen)}.")
    return chosen


def check_kind(model: LoopedModel, kind: LensKind, translated: bool, stack: str | None = None) -> None:
    """An error for a lens that there is not, or that the model (or a stack of it) can't have."""
    if kind not in get_args(LensKind):
        raise InputError(f"kind must be one of {', '.join(map(repr, get_args(LensKind)))}, got {kind!r}.")
    if kind == "coda" and not model.cfg.n_coda:
        raise InputError(f"{model.cfg.model_name} has no coda: pass kind='exact' or kind='direct'.")
    if kind == "exact" and stack is not None and stack not in (CORE, model.cfg.head_stack):
        raise InputError(
            f"the head of {model.cfg.model_name} reads the state of {model.cfg.head_stack}, so that of {stack} has no "
            "exact read-out: pass kind='direct', which reads it as if it were that."
        )
    if (kind in TRANSLATED) != translated:
        raise InputError(
            f"kind={kind!r} needs translator=: fit one with tl_looped.lens.{TRANSLATED[kind]}."
            if kind in TRANSLATED
            else f"a translator belongs to {' or '.join(f'kind={one!r}' for one in TRANSLATED)}, got kind={kind!r}."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Translator(Result):
    """What maps states before they are read out, for one model, loop count and site.

    Attributes:
        site: the residual stream it reads, or "state".
        n_loops: of the runs it was made from; of two stacks that loop, those of the one it reads.
        layers: the core layers that it knows; (0,) stands for the state.
    """

    kind: ClassVar[LensKind]

    site: LensSite
    n_loops: int
    layers: tuple[int, ...]

    def check(self, model: LoopedModel, n_loops: LoopCount, reads: Reads) -> None:
        """An error unless it was made for this model, loop count and site, and for these layers."""
        call = TRANSLATED[self.kind]
        if self.made_by["fingerprint"] != fingerprint(model):
            raise InputError(
                f"the translator was fitted on {self.made_by['model']} with other weights than this "
                f"{model.cfg.model_name}: fit one with {call}(model, prompts)."
            )
        inner = self.made_by.get("l_cycles")
        fitted = self.n_loops if inner is None else (self.made_by["n_loops"], inner)
        if fitted != n_loops:
            raise InputError(
                f"the translator was fitted on runs of {fitted} loops, this one has {n_loops}: pass "
                f"n_loops={fitted}, or fit one with {call}(model, prompts, n_loops={n_loops})."
            )
        stack = self.made_by.get("stack", reads.stack)
        if stack != reads.stack:
            raise InputError(f"the translator reads {stack}, not {reads.stack}: pass stack={stack!r}.")
        if self.site != reads.site:
            raise InputError(f"the translator reads {self.site!r}, not {reads.site!r}: pass site={self.site!r}.")
        missing = sorted({*(reads.layers or ())} - set(self.layers))
        if missing:
            raise InputError(f"the translator has the layers {list(self.layers)}, not {missing}.")

    def translate(self, x: Float[Tensor, "*dims d_model"], layer: int, loop: int) -> Float[Tensor, "*dims d_model"]:
        """A state of this layer and loop, mapped."""
        raise NotImplementedError


def direct_input(
    model: LoopedModel, site: LensSite, x: Float[Tensor, "*dims d_model"]
) -> Float[Tensor, "*dims d_read"]:
    """What the unembedding reads in the direct lens: the final norm of a state, unless the head reads it as it is."""
    return model.transformer.head_input(x, closed=site == "state")


def converter(
    model: LoopedModel, run: Run, reads: Reads, kind: LensKind, translate: Translate | None = None
) -> Convert:
    """From a state at all positions to what the unembedding reads at the chosen ones, [rows, d_model]."""
    positions, site, frame = list(reads.positions), reads.site, model.frame(run)

    def whole(x: Tensor, place: Place) -> Tensor:
        closed = x if site == "state" else model.transformer.close(x)
        return model.transformer.finish(closed, frame)[:, positions].flatten(0, 1)  # a coda sees all positions

    def direct(x: Tensor, place: Place) -> Tensor:
        vectors, (loop, layer) = x[:, positions].flatten(0, 1), place
        return direct_input(model, site, vectors if translate is None else translate(vectors, layer or 0, loop))

    def carried(x: Tensor, place: Place) -> Tensor:
        vectors, (loop, layer) = x[:, positions].flatten(0, 1), place
        return model.transformer.last_norm(vectors if translate is None else translate(vectors, layer or 0, loop))

    return whole if kind in ("exact", "coda") else carried if kind == "jacobian" else direct


def read_states(
    model: LoopedModel, run: Run, reads: Reads, convert: Convert, loops: Collection[int]
) -> tuple[dict[Place, Float[Tensor, "*lens rows d_read"]], Float[Tensor, "rows d_vocab"]]:
    """Run once; (what `convert` makes of the states in some loops, the run's own logits at the chosen positions)."""
    kept: dict[Place, Tensor] = {}

    def see(site: HookSite, x: Tensor) -> None:
        place = cast(int, site.loop), site.layer
        if site.loop in loops:
            kept[place] = convert(x, place)

    names = [site.name for site in reads.streams.values()]
    around = model.cfg.schedule(run.counts).around(reads.stack, loops)
    logits = cast(Tensor, watch(model, run, names, see, loops=around, read_out=True))
    return kept, logits[:, list(reads.positions)].flatten(0, 1)


def target_name(target: str | int) -> str:
    """What a target is called in a result: a text as it is; an id so that it is not taken for a text of digits."""
    return target if isinstance(target, str) else f"id {target}"


def resolve_targets(
    model: LoopedModel, tokens: Int[Tensor, "batch all_pos"], pos: int, targets: Targets
) -> tuple[Int[Tensor, "batch pos target"] | None, tuple[str, ...]]:
    """(ids at every position read, names); ids are None where they are the run's own top tokens, not known before it.

    Raises:
        InputError: a text that is not one token, an id out of the vocabulary, or a tensor of the wrong shape.
    """
    batch = len(tokens)
    if targets is None:
        return None, (FINAL,)
    if isinstance(targets, Tensor):
        return _per_row(targets, batch, pos, model.cfg.d_vocab).to(tokens.device), (PER_ROW,)
    wanted = [targets] if isinstance(targets, (str, int)) else list(targets)
    if not wanted:
        raise InputError("targets is empty: leave it out to follow the run's own top token.")
    ids = [resolve_target(model, target) for target in wanted]
    names = tuple(target_name(target) for target in wanted)
    if len(set(ids)) < len(ids):
        raise InputError(f"targets names a token twice: {list(wanted)}.")
    return torch.tensor(ids, device=tokens.device).expand(batch, pos, -1), names


def resolve_target(model: LoopedModel, target: str | int) -> int:
    """The id of one token, or an InputError."""
    if isinstance(target, str):
        return model.to_single_token(target)
    if isinstance(target, bool) or not isinstance(target, int):
        raise InputError(f"a target must be a text or a token id, got {target!r}.")
    if not 0 <= target < model.cfg.d_vocab:
        raise InputError(f"target {target} is out of the vocabulary [0, {model.cfg.d_vocab}).")
    return target


def _per_row(targets: Tensor, batch: int, pos: int, d_vocab: int) -> Int[Tensor, "batch pos target"]:
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise InputError(f"targets must be token ids, got {targets.dtype}.")
    if targets.shape == (batch,):
        targets = targets[:, None].expand(batch, pos)
    if targets.shape != (batch, pos):
        raise InputError(
            f"a tensor of targets has one for each row, [{batch}], or for each row and position read, "
            f"[{batch}, {pos}], got shape {tuple(targets.shape)}: pass a list to follow several tokens everywhere."
        )
    low, high = (int(end) for end in torch.aminmax(targets))
    if low < 0 or high >= d_vocab:
        raise InputError(f"target {low if low < 0 else high} is out of the vocabulary [0, {d_vocab}).")
    return targets.long()[..., None]


def table_of(
    labels: Mapping[str, Sequence[int]], where: Bool[Tensor, "*axes"], columns: Mapping[str, Tensor]
) -> pd.DataFrame:
    """A row for each place where `where` holds: what its index on each axis stands for, and the numbers there."""
    index = where.nonzero(as_tuple=True)
    frame = {name: torch.tensor(of)[at] for (name, of), at in zip(labels.items(), index, strict=True)}
    frame |= {name: values.expand(where.shape)[index] for name, values in columns.items()}
    return pd.DataFrame(
        {name: (values.double() if values.is_floating_point() else values).numpy() for name, values in frame.items()}
    )
