"""How an analysis that sees one layer call at a time runs a model, looped or feedforward, on prompts of any length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformer_lens.model_protocol import TransformerLensModel

from tl_looped.engine.checks import check_eval
from tl_looped.engine.errors import HookNameError, InputError, check_count, nearest
from tl_looped.engine.hooks import LoopHookPoint, SharedHookPoint
from tl_looped.engine.identity import digest, identity
from tl_looped.engine.runs import Run
from tl_looped.engine.schedule import CORE, HookSite, LoopSchedule, Pass
from tl_looped.model import LoopedModel
from tl_looped.observe.origin import first_not_finite

See = Callable[[str, int, Tensor], None]
"""What is called for a layer call: with the component, the realised depth and the activation, to be read only."""


@runtime_checkable
class Runner(Protocol):
    """Runs a model on some of its prompts, and shows what its layers do.

    Attributes:
        schedule: which layer runs when.
        tokens: of all prompts.
        n_loops: how often the core runs; 1 for a model without loops.
        one_loop: what to say, with one loop, to who wants to compare loops.
    """

    schedule: LoopSchedule
    tokens: Sequence[Tensor]
    n_loops: int
    one_loop: str

    def describe(self) -> dict[str, Any]:
        """What runs, in plain values."""
        ...

    def check_component(self, component: str) -> None:
        """Raise for a component that some layer does not have."""
        ...

    def run(self, rows: Sequence[int], components: Sequence[str], see: See, only_end: bool = False) -> None:
        """Run some prompts, all of one length; with `only_end` show the core layers of the last loop alone."""
        ...

    def origin(self, row: int) -> str | None:
        """The name of the site where a prompt's activations are first not finite; None where that can't be told."""
        ...


class LoopedRunner:
    """Runs a looped model."""

    def __init__(
        self,
        model: LoopedModel,
        tokens: Sequence[Tensor],
        n_loops: int | None,
        seed: int | None,
        initial_state: Tensor | None,
    ):
        check_eval(model)
        self.model, self.tokens, self.seed = model, tokens, seed
        self.states = _states(initial_state, tokens, model.cfg.d_model)
        self.schedule = model.cfg.schedule(n_loops)
        self.n_loops = self.schedule.n_loops()
        self.one_loop = "this run has one: pass n_loops of at least 2"
        self.first = self._prepare([0])  # whatever is wrong with seed or state is an error now

    def _prepare(self, rows: Sequence[int]) -> Run:
        tokens = torch.stack([self.tokens[row] for row in rows])
        state = None
        if self.states is not None:
            state = torch.stack([self.states[row, : tokens.shape[1]] for row in rows])
        everything = torch.ones_like(tokens)  # a token like the padding's is a token here
        return self.model.prepare(tokens, self.n_loops, seed=self.seed, initial_state=state, attention_mask=everything)

    def describe(self) -> dict[str, Any]:
        """See `Runner`."""
        hooks = [
            f"{point.name}, {identity(handle.where)}: {identity(handle.fn)}"
            for point in self.model.hook_dict.points()
            for handle in point.handles()
        ]
        given = {} if self.states is None else {"initial_state": f"given, {digest(self.states)}"}
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"model": self.model.cfg.model_name, "dtype": dtype, **self.first.describe(), **given, "hooks": hooks}

    def _points(self, component: str, stacks: Sequence[str]) -> list[SharedHookPoint]:
        sites = (HookSite(component, s, layer) for s in stacks for layer in range(self.schedule.n_layers(s)))
        return [self.model.hook_dict.shared(site.name) for site in sites]

    def check_component(self, component: str) -> None:
        """See `Runner`."""
        try:
            self._points(component, self.schedule.stacks())
        except HookNameError as error:
            raise InputError(f"not every layer has {component!r}: {error}") from error

    def run(self, rows: Sequence[int], components: Sequence[str], see: See, only_end: bool = False) -> None:
        """See `Runner`."""

        def look(x: Tensor, hook: LoopHookPoint) -> None:
            site = hook.site
            see(site.component, self.schedule.realised_depth(site.stack or "", site.layer or 0, site.loop), x)

        run = self._prepare(rows)
        stacks, where = ([CORE], run.n_loops - 1) if only_end else (self.schedule.stacks(), None)
        points = [point for component in components for point in self._points(component, stacks)]
        self._run(run, points, look, where, to_coda=not only_end)

    def _run(self, run: Run, points: Sequence[SharedHookPoint], look: Any, where: int | None, to_coda: bool) -> None:
        model = self.model
        with model.hooks():
            for point in points:
                point.add_hook(look, level=model.context_level, where=where, reads_only=True)
            model.reach(run).check_hooks()
            frame = model.frame(run)
            state = model.transformer(run.tokens, frame, run.state, run.start, run.stop)
            if to_coda:
                model.transformer.finish(state, frame)

    def origin(self, row: int) -> str | None:
        """See `Runner`."""
        return first_not_finite(self.model, self._prepare([row]))


class FeedforwardRunner:
    """Runs a model of TransformerLens whose layers run once."""

    def __init__(self, model: TransformerLensModel, tokens: Sequence[Tensor], given: Mapping[str, object]):
        for name, value in given.items():
            if value is not None:
                raise InputError(f"this model has no loops, so leave out {name}.")
        if isinstance(model, nn.Module):
            check_eval(model)
        n_layers = getattr(model.cfg, "n_layers", None)
        self.schedule = LoopSchedule((Pass(CORE, check_count("the model's cfg.n_layers", n_layers), None),))
        self.model, self.tokens, self.n_loops = model, tokens, 1
        self.one_loop = "this model has none: leave it out"

    def describe(self) -> dict[str, Any]:
        """See `Runner`."""
        cfg, points = self.model.cfg, getattr(self.model, "hook_dict", {})
        hooks = sorted(name for name, point in points.items() if getattr(point, "fwd_hooks", None))
        dtype = str(cfg.dtype).removeprefix("torch.")
        return {"model": str(getattr(cfg, "model_name", "custom")), "dtype": dtype, "hooks": hooks}

    def check_component(self, component: str) -> None:
        """See `Runner`."""
        known: Mapping[str, object] = getattr(self.model, "hook_dict", {})
        for depth in range(self.schedule.depth):
            name = HookSite(component, CORE, depth).name
            if name not in known:
                raise InputError(
                    f"not every layer has {component!r}: there is no hook point {name!r}.{nearest(name, known)}"
                )

    def run(self, rows: Sequence[int], components: Sequence[str], see: See, only_end: bool = False) -> None:
        """See `Runner`."""
        latest: list[Tensor] = []

        def look_at(component: str, depth: int) -> Callable[..., None]:
            def look(x: Tensor, hook: object) -> None:
                if not (latest and latest[0] is x):  # a bridge calls a hook once for each name that a site has
                    latest[:] = [x]
                    see(component, depth, x.clone())  # what foreign code does to x later is not known

            return look

        sites = [(component, depth) for component in components for depth in range(self.schedule.depth)]
        hooks = [(HookSite(component, CORE, depth).name, look_at(component, depth)) for component, depth in sites]
        tokens = torch.stack([self.tokens[row] for row in rows])
        if isinstance(self.model, nn.Module):
            tokens = tokens.to(next(self.model.parameters()).device)
        self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)

    def origin(self, row: int) -> str | None:
        """See `Runner`: not told."""
        return None


def _states(initial_state: Tensor | None, tokens: Sequence[Tensor], d_model: int) -> Tensor | None:
    """The given initial state of each prompt, [prompt, pos, d_model]."""
    if initial_state is None:
        return None
    longest = max(map(len, tokens))
    shape = tuple(initial_state.shape) if isinstance(initial_state, Tensor) else None
    if shape is None or len(shape) not in (2, 3) or shape[-1] != d_model or shape[-2] < longest:
        raise InputError(
            f"initial_state must be [pos, d_model] or [prompt, pos, d_model] with at least {longest} positions and "
            f"d_model {d_model}, got {type(initial_state).__name__ if shape is None else shape}."
        )
    if len(shape) == 3 and shape[0] != len(tokens):
        raise InputError(f"initial_state is for {shape[0]} prompts, but there are {len(tokens)}.")
    return initial_state.expand(len(tokens), *shape[-2:])
