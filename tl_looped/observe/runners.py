"""How an observation runs a model, looped or feedforward, some prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_protocol import TransformerLensModel

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError, check_count, nearest
from tl_looped.engine.identity import digest, identity
from tl_looped.engine.numbers import log_probs_of
from tl_looped.engine.prompts import Rows, read_rows
from tl_looped.engine.runs import Prompts, Run, RunOptions, Runs
from tl_looped.engine.schedule import CORE, HookSite, LoopCount, LoopSchedule, Pass, find_component, find_site
from tl_looped.observe.measure import READOUT
from tl_looped.observe.places import Places
from tl_looped.observe.watching import See, first_not_finite, watch


@runtime_checkable
class Runner(Protocol):
    """Runs a model on some of its prompts, and shows what happens at some sites.

    Attributes:
        schedule: which layer runs when.
        runs: the prompts.
        n_loops: how often the core runs; 1 for a model without loops.
        one_loop: what to say, with one loop, to who wants to compare loops.
        vocabulary: how many log probabilities a read-out has; 0 where there are no read-outs.
    """

    schedule: LoopSchedule
    runs: Runs
    n_loops: int
    one_loop: str
    vocabulary: int

    def describe(self) -> dict[str, Any]:
        """What runs, in plain values."""
        ...

    def places(self, site: str) -> Places:
        """Where a site fires; an InputError where it does not, in every layer if it is a layer's."""
        ...

    def run(self, rows: Sequence[int], keys: Collection[str], see: See, only_end: bool = False) -> None:
        """Run some prompts of one length; with `only_end` show what loops in its last loop alone, and nothing else."""
        ...

    def log_probs(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The read-out, of what the unembedding reads; float32 at least."""
        ...

    def origin(self, rows: Sequence[int]) -> tuple[str, int] | None:
        """Where activations are first not finite, and in which of the rows; None where that can't be told."""
        ...


class LoopedRunner:
    """Runs a looped model."""

    def __init__(self, engine: Engine, runs: Runs):
        self.engine, self.runs = engine, runs
        if not runs.whole:
            raise InputError(f"an observation looks at whole runs: leave out {runs.parted_by}.")
        self.schedule = engine.cfg.schedule(runs.counts)
        self.n_loops = runs.n_loops
        self.one_loop = "this run has one: pass n_loops of at least 2"
        self.vocabulary = engine.cfg.d_vocab

    def describe(self) -> dict[str, Any]:
        """See `Runner`."""
        hooks = [
            f"{point.name}, {identity(handle.where)}: {identity(handle.fn)}"
            for point in self.engine.hook_dict.points()
            for handle in point.handles()
        ]
        made_by = self.engine.batch_of(self.runs, [0]).describe()
        given = {
            "initial_state": self.runs.initial_state,
            "position_ids": self.runs.position_ids,
            "attention_mask": self.runs.visible,
            "prefix": self.runs.prefix,
        }
        made_by |= {name: f"given, {digest(value)}" for name, value in given.items() if value is not None}
        dtype = str(self.engine.dtype).removeprefix("torch.")
        return {"model": self.engine.cfg.model_name, "dtype": dtype, **made_by, "hooks": hooks}

    def places(self, site: str) -> Places:
        """See `Runner`."""
        if site == READOUT:
            return Places.of_loops(READOUT, self.schedule)
        named = find_site(site)
        if named.looped and not named.in_layer:  # of the only core's loops, or of those of one of two stacks
            component = find_component(site.removeprefix(f"{named.stack}."))
            named = self.engine.cfg.own_site(HookSite(component, named.stack))
            places = Places.of(component, self.schedule, named.stack)
        else:
            places = Places.of(find_component(site), self.schedule)
        for name in places.names:
            self.engine.hook_dict.shared(name)
        return places

    def run(self, rows: Sequence[int], keys: Collection[str], see: See, only_end: bool = False) -> None:
        """See `Runner`."""
        names: list[str] = []
        for key in keys:
            if key == READOUT:
                names.append(READOUT)
            else:
                sites = Places.of_key(key, self.schedule).sites
                kept = [site for site in sites if site.loop is not None or site.layer is None or not only_end]
                names += dict.fromkeys(site.at(None).name for site in kept)
        loops = [self.n_loops - 1] if only_end else None
        watch(self.engine, self._batch(rows), names, see, loops=loops, only_loops=only_end)

    def _batch(self, rows: Sequence[int]) -> Run:
        return self.engine.batch_of(self.runs, rows)

    def log_probs(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """See `Runner`."""
        return log_probs_of(self.engine.transformer.unembed(out))

    def origin(self, rows: Sequence[int]) -> tuple[str, int] | None:
        """See `Runner`."""
        return first_not_finite(self.engine, self._batch(rows))


class FeedforwardRunner:
    """Runs a model of TransformerLens whose layers run once."""

    def __init__(self, model: TransformerLensModel, prompts: Prompts, n_loops: LoopCount | None, options: RunOptions):
        self.model = model
        refused = {"n_loops": n_loops} | {
            name: options.get(name)
            for name in ("seed", "initial_state", "position_ids", "attention_mask", "step_sizes")
        }
        for name, value in refused.items():
            if value is not None:
                raise InputError(f"this model has no loops, so leave out {name}.")
        if isinstance(prompts, Runs):
            raise InputError("these runs were prepared by a looped model: pass the prompts themselves.")
        n_layers = check_count("the model's cfg.n_layers", getattr(model.cfg, "n_layers", None))
        self.schedule = LoopSchedule((Pass(CORE, n_layers, None),))
        self.runs = Runs(self._rows(prompts, options), 1, 0, 1, True)
        self.n_loops = 1
        self.one_loop = "this model has none: leave it out"
        self.vocabulary = 0

    def _rows(self, prompts: Prompts, options: RunOptions) -> Rows:
        prepend = options.get("prepend_bos")

        def encode(text: str) -> Int[Tensor, " pos"]:
            return self.model.to_tokens(text, prepend_bos=prepend)[0].long().cpu()

        tokenizer = getattr(self.model, "tokenizer", None)
        rows = read_rows(prompts, tokenizer, field=options.get("field"), limit=options.get("limit"), encode=encode)
        n_ctx, d_vocab = (getattr(self.model.cfg, name, None) for name in ("n_ctx", "d_vocab"))
        rows.check(n_ctx, d_vocab)
        return rows

    def describe(self) -> dict[str, Any]:
        """See `Runner`."""
        cfg, points = self.model.cfg, getattr(self.model, "hook_dict", {})
        hooks = sorted(name for name, point in points.items() if getattr(point, "fwd_hooks", None))
        dtype = str(cfg.dtype).removeprefix("torch.")
        return {"model": str(getattr(cfg, "model_name", "custom")), "dtype": dtype, "hooks": hooks}

    def places(self, site: str) -> Places:
        """See `Runner`."""
        if site == READOUT:
            raise InputError("read-outs by loop are those of a looped model, and this one has no loops")
        places = Places.of(find_component(site), self.schedule)
        known: Mapping[str, object] = getattr(self.model, "hook_dict", {})
        for name in places.names:
            if name not in known:
                raise InputError(f"there is no hook point {name!r}.{nearest(name, known)}")
        return places

    def run(self, rows: Sequence[int], keys: Collection[str], see: See, only_end: bool = False) -> None:
        """See `Runner`."""
        latest: list[Tensor] = []

        def look_at(site: HookSite) -> Callable[..., None]:
            def look(x: Tensor, hook: object) -> None:
                if not (latest and latest[0] is x):  # a bridge calls a hook once for each name that a site has
                    latest[:] = [x]
                    see(site, x.clone())  # what foreign code does to x later is not known

            return look

        names = [name for key in keys for name in Places.of_key(key, self.schedule).names]
        hooks = [(name, look_at(HookSite.parse(name))) for name in names]
        tokens = torch.stack([self.runs.rows.unpadded(row) for row in rows])
        if isinstance(self.model, nn.Module):
            tokens = tokens.to(next(self.model.parameters()).device)
        self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)

    def log_probs(self, out: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """See `Runner`: there are none."""
        raise InputError("read-outs by loop are those of a looped model, and this one has no loops.")

    def origin(self, rows: Sequence[int]) -> tuple[str, int] | None:
        """See `Runner`: not told."""
        return None
