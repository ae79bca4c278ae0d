"""How every patching call begins: the run to patch, checked with its source before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_looped.engine.checks import check_eval
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError, resolve_index
from tl_looped.engine.runs import Prompts, Run, RunOptions
from tl_looped.engine.schedule import LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.patching.sources import Given, Source, as_source

_ASSUMED = 4 * 2**30  # bytes that are free where the system does not say
_SHARE = 0.5  # of the free memory that one batch may take
_KEPT = 0.25  # and what the unpatched run keeps for it

Positions = Literal["all", "last"] | Sequence[int]


def prepare_patch(
    model: LoopedModel,
    prompts: Prompts,
    n_loops: LoopCount | None,
    source: Given,
    options: RunOptions,
    several_stacks: bool = False,
) -> tuple[Run, Source]:
    """All prompts as one run, and the source of what is patched into it.

    Raises:
        InputError: a model in training mode or with hooks of its own, a run without all loops, or a source of another.
    """
    check_eval(check_looped(model, several_stacks=several_stacks))
    hooked = [point.name for point in model.hook_dict.points() if point.handles()]
    if hooked:
        raise InputError(f"the model has hooks already, at {hooked[0]!r}: call model.reset_hooks() before patching.")
    given = as_source(source)
    runs = model.prepare(prompts, n_loops, **options)
    if not runs.whole:
        raise InputError(f"patching runs all loops: prepare the prompts without {runs.parted_by}.")
    run = model.batch_of(runs)
    check_source(given, run)
    return run, given


def check_sites(model: LoopedModel, run: Run, names: Sequence[str]) -> None:
    """Raise for a site that the model does not have, or that the run does not reach."""
    for name in dict.fromkeys(names):
        model.hook_dict.shared(name)
        if name == "hook_embed" and not model.transformer.needs_input(run.state is not None):
            raise InputError(
                "this run never reads its tokens: its initial state was given, and the model injects nothing. "
                "Patch 'initial_state', or leave initial_state out."
            )


def check_source(source: Source, run: Run) -> None:
    """Raise unless the source's run and the patched run can be compared position by position and loop by loop."""
    theirs = source.run
    if theirs is None:
        return
    if theirs.counts != run.counts:
        raise InputError(
            f"the source ran {theirs.counts} loops, this call {run.counts}: pass n_loops={theirs.counts}, "
            "or cache the source again."
        )
    if theirs.step_sizes != run.step_sizes:
        raise InputError(
            f"the source's loops took steps {theirs.step_sizes}, this run's {run.step_sizes}: pass both the same."
        )
    if source.name == "cache" and theirs.tokens.shape != run.tokens.shape:
        raise InputError(
            f"source and patched prompts differ: tokens of shape {tuple(theirs.tokens.shape)} and "
            f"{tuple(run.tokens.shape)}. Patching needs the same number of prompts, of the same length."
        )
    if source.name == "cache" and not torch.equal(theirs.attention_mask.cpu(), run.attention_mask.cpu()):
        raise InputError("source and patched prompts have their padding at different places.")
    if source.name == "cache" and not _same_course(theirs, run):
        raise InputError("the source ran with another attention_mask, other position_ids, or from a later loop.")
    if theirs.state_given != run.state_given:
        raise InputError("only one of the source and the patched run was given an initial state: give both the same.")
    if theirs.seed != run.seed:
        raise InputError(f"the source's initial state was drawn with seed {theirs.seed}, this run's with {run.seed}.")
    if theirs.state_given and theirs.state is not None and run.state is not None:
        same = theirs.state.shape == run.state.shape and torch.equal(theirs.state.cpu(), run.state.cpu())
        if not same:
            raise InputError("the source and the patched run were given different initial states.")


def _same_course(theirs: Run, run: Run) -> bool:
    pairs = ((theirs.position_ids, run.position_ids), (theirs.visible, run.visible))
    return theirs.start == run.start and all(
        one is other if one is None or other is None else torch.equal(one.cpu(), other.cpu()) for one, other in pairs
    )


def row_bytes(cfg: LoopedConfig, pos: int, read: int, itemsize: int) -> int:
    """About how many bytes one row of a batch takes at its peak: a layer's activations, and logits of `read` tokens."""
    layer = 8 * cfg.d_model + 4 * cfg.n_heads * cfg.d_head + 3 * cfg.d_mlp + 2 * cfg.n_heads * pos
    return (pos * layer + 2 * read * cfg.d_vocab) * itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # counts what caches would give back, which sysconf's free pages do not
    if meminfo.exists():
        return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().split("\n") if "MemAvailable" in line)
    return _ASSUMED  # no portable way to ask


class Room(NamedTuple):
    """What memory there is for a sweep: half of what is free for a batch, a quarter for what the unpatched run keeps.

    Attributes:
        rows: of a batch.
        states: how many states of the unpatched run.
        keeps_keys: whether all its states, keys and values fit.
    """

    rows: int
    states: int
    keeps_keys: bool

    @classmethod
    def of(cls, model: LoopedModel, run: Run, batch_size: int | None, read: int) -> Room:
        """For the cells of a run, of which so many positions are read out.

        Raises:
            InputError: `batch_size` would exceed the memory, or is below the number of prompts.
        """
        (prompts, pos), cfg, size = run.tokens.shape, model.cfg, model.dtype.itemsize
        each, free = row_bytes(cfg, pos, read, size), free_bytes(model.device)
        fit = max(int(_SHARE * free) // each, prompts)
        state, keys = prompts * pos * cfg.d_state * size, prompts * pos * 2 * cfg.kv_heads * cfg.d_head * size
        states, depth = int(_KEPT * free) // state, cfg.schedule(run.counts).depth
        kept = max(1, states), depth * (state + keys) <= _KEPT * free
        if batch_size is None:
            return cls(max(prompts, min(256, fit)), *kept)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < prompts:
            raise InputError(
                f"batch_size counts rows, so it must be an integer of at least the {prompts} prompts, got "
                f"{batch_size!r}."
            )
        if batch_size > fit:
            raise InputError(
                f"batch_size={batch_size} would need about {batch_size * each / 2**30:.1f} GiB: {fit} fits."
            )
        return cls(batch_size, *kept)


def looks_back(cfg: LoopedConfig, run: Run) -> bool:
    """Whether no token sees a later one, so that a patch at a position changes nothing before it."""
    if not cfg.causal or run.prefix is not None:
        return False
    return run.visible is None or not bool(run.visible.triu(1).any())


def positions_read(run: Run, positions: Positions) -> Int[Tensor, "batch read"] | None:
    """Where in the rows the positions are that a metric is given; None for all.

    Raises:
        InputError: no positions, or one that a prompt does not have.
    """
    if isinstance(positions, str) and positions not in ("all", "last"):
        raise InputError(f"positions must be 'all', 'last' or a list of positions, got {positions!r}.")
    if positions == "all":
        return None
    chosen = [-1] if isinstance(positions, str) else list(positions)
    if not chosen:
        raise InputError("positions is empty, so a metric would be given nothing: pass 'all', 'last' or some.")
    real = [row.nonzero()[:, 0].tolist() for row in run.attention_mask.cpu()]
    read = [
        [at[resolve_index(f"prompt {row}: position", one, len(at))] for one in chosen] for row, at in enumerate(real)
    ]
    return torch.tensor(read).to(run.tokens.device)
