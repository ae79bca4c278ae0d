"""Checks that a user can run on any looped model: can every loop be read and written, exactly?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.errors import LoopedError
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.runs import DEFAULT_SEED
from tl_looped.engine.schedule import HookSite, LoopCount
from tl_looped.model import LoopedModel, check_looped
from tl_looped.report.data import spread

N_TOKENS = 12
"""Length of the random prompt that the checks run, where the context allows it."""
_MOST_LOOPS = 8  # of more loops, this many, evenly spread, are edited, stopped at and read out


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        name: what should hold.
        passed: whether it does.
        measured: the number behind it, in words; or the error that the model raised.
    """

    name: str
    passed: bool
    measured: str


def check(
    model: LoopedModel, n_loops: LoopCount | None = None, seed: int = 0, progress: bool = False
) -> list[CheckResult]:
    """Check a model on a random prompt.

    Args:
        model: the model; hooks that are on it act in the checks too.
        n_loops: how many loops to run; None for the count it was trained with.
        seed: of the prompt.
        progress: whether to show a progress bar.

    Returns:
        One result for each check. A check that makes the model raise has failed.

    Raises:
        InputError: `n_loops` is not a count.
    """
    checks = _Checks(check_looped(model, several_stacks=True), n_loops, _random_tokens(model, seed))
    named: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("every site fires as often, and every layer in the order, that the schedule says", checks.firing),
        ("attention patterns sum to one", checks.patterns),
        ("hooks that return nothing change nothing, to the bit", checks.watching),
        ("an edit in a loop changes the output, and no earlier loop", checks.edits_in_loops),
        ("an edit outside the loops changes the output", checks.edits_elsewhere),
        ("a run stopped before a loop and started there equals the whole run", checks.stop_and_start),
        ("the read-out of the last loop equals the logits", checks.last_readout),
        ("the read-out of a loop equals a run that ends with it", checks.readouts),
    ]
    results = []
    for name, run in tqdm(named, desc="Checking", unit="check", disable=not progress):
        try:
            with torch.no_grad():
                passed, measured = run()
        except (LoopedError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            passed, measured = False, f"raised {type(error).__name__}: {' '.join(str(error).split())}"
        results.append(CheckResult(name, passed, measured))
    return results


def _random_tokens(model: LoopedModel, seed: int) -> Int[Tensor, "1 pos"]:
    """Random token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.cfg.d_vocab, (1, min(N_TOKENS, model.cfg.n_ctx)), generator=generator)
    if model.cfg.puzzles is not None:
        tokens[0, : model.cfg.puzzles.rows] = torch.tensor(model.cfg.puzzle_tokens(0))
    padding = model.tokenizer.pad_token_id if model.tokenizer is not None else None
    if isinstance(padding, int):
        tokens[tokens == padding] = (padding + 1) % model.cfg.d_vocab
    return tokens


class _Checks:
    """The checks of one model; each returns whether it passed, and what was measured."""

    def __init__(self, model: LoopedModel, n_loops: LoopCount | None, tokens: Int[Tensor, "1 pos"]):
        self.model, self.tokens = model, tokens
        self.n_loops, self.l_cycles = model.cfg.counts(n_loops)
        self.schedule = model.cfg.schedule(n_loops)
        self.state_post = HookSite("hook_state_post", model.cfg.head_stack).name
        self.seeding: dict[str, Any] = {"seed": DEFAULT_SEED} if model.cfg.draws_state else {}
        self.picked = spread(self.n_loops, _MOST_LOOPS)
        eps = torch.finfo(model.dtype).eps
        self.limit = max(1e-5, 2 * eps)  # of a difference, as a share of the largest number
        self.logits: dict[int, Tensor] = {}

    def options(self, n_loops: int) -> dict[str, Any]:
        """Of the run that the whole one is after so many loops: where loops have a time, its steps are those."""
        return self.seeding | ({"step_sizes": (1 / self.n_loops,) * n_loops} if self.model.cfg.loop_time else {})

    def run(self, n_loops: int, hooks: list[tuple[Any, Any]] | None = None) -> Float[Tensor, "1 pos d_vocab"]:
        """Logits of a run with that many loops; of an unhooked one, kept."""
        loops = self.counted(n_loops)
        if hooks is not None:
            return self.model.run_with_hooks(self.tokens, loops, fwd_hooks=hooks, **self.options(n_loops))
        if n_loops not in self.logits:
            self.logits[n_loops] = self.model(self.tokens, loops, **self.options(n_loops))
        return self.logits[n_loops]

    def counted(self, n_loops: int) -> LoopCount:
        """So many loops, with what each of them runs as in the run that is checked."""
        return n_loops if self.l_cycles is None else (n_loops, self.l_cycles)

    @cached_property
    def states(self) -> list[Tensor]:
        """The state leaving each loop."""
        states: list[Tensor] = []
        self.run(self.n_loops, [(self.state_post, lambda x, hook: states.append(x.clone()))])
        return states

    def difference(self, value: Tensor, reference: Tensor) -> float:
        """The largest absolute difference, as a share of the largest number of the reference."""
        largest = float(reference.abs().max())
        return float((value - reference).abs().max()) / (largest or 1.0)

    def firing(self) -> tuple[bool, str]:
        """Compare what fires, and in which order, with the schedule."""
        fired: list[HookSite] = []
        self.run(self.n_loops, [(lambda name: True, lambda x, hook: fired.append(hook.site))])
        expected: Counter[str] = Counter()
        for point in self.model.hook_dict.points():
            site = point.site
            times = self.schedule.n_loops(site.stack) if site.looped else 0
            expected.update(site.at(t).name for t in (range(times) if times else [None]))
        seen = Counter(site.name for site in fired)
        wrong = [name for name in expected | seen if expected[name] != seen[name]]
        calls = [(s.stack, s.layer, s.loop) for s in fired if s.component == "hook_resid_post"]
        in_order = calls == list(self.schedule.layer_calls())
        measured = f"{seen.total()} firings of {len(seen)} sites, {len(wrong)} sites not as expected"
        measured += f" ({', '.join(wrong[:3])})" if wrong else ""
        measured += f"; {len(calls)} layer calls" + ("" if in_order else ", not in the schedule's order")
        return not wrong and in_order, measured

    def patterns(self) -> tuple[bool, str]:
        """Sum every row of every pattern."""
        off: list[float] = []

        def measure(pattern: Tensor, hook: LoopHookPoint) -> None:
            off.append(float((pattern.float().sum(-1) - 1).abs().max()))

        self.run(self.n_loops, [(lambda name: name.endswith("attn.hook_pattern"), measure)])
        worst = float(torch.tensor(off).max())  # NaN, should there be one
        enough = len(off) == self.schedule.depth
        measured = f"off by {worst:.1e} at most, in {len(off)} of {self.schedule.depth} layer calls"
        return enough and worst <= self.limit, f"{measured} (limit {self.limit:.0e})"

    def watching(self) -> tuple[bool, str]:
        """Run with a hook on everything."""
        watched = self.run(self.n_loops, [(lambda name: True, lambda x, hook: None)])
        changed = int((watched != self.run(self.n_loops)).sum())  # a NaN counts: it is not equal to itself
        return changed == 0, f"{changed} of {watched.numel()} logits changed"

    def _edit(self, site: HookSite, n_loops: int) -> tuple[float, list[Tensor]]:
        """The change of the logits by an edit at a site, and the states leaving each loop of that run."""
        states: list[Tensor] = []

        def push(x: Tensor, hook: LoopHookPoint) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(x.shape, generator=generator).to(x)
            return x + noise * (float(x.float().pow(2).mean().sqrt()) or 1.0)

        hooks = [(site.name, push), (self.state_post, lambda x, hook: states.append(x.clone()))]
        return self.difference(self.run(n_loops, hooks), self.run(n_loops)), states

    def edits_in_loops(self) -> tuple[bool, str]:
        """Edit the middle core layer in one loop, in a run that ends with that loop."""
        changes, early = [], 0
        for stack in self.schedule.stacks():
            for t in self.picked if self.schedule.n_loops(stack) else []:
                own = self.schedule.loops_in(stack, [t])[0]
                site = HookSite("hook_resid_post", stack, self.schedule.n_layers(stack) // 2, own)
                change, states = self._edit(site, t + 1)
                changes.append(change)
                early += sum(not torch.equal(*pair) for pair in zip(states[:t], self.states, strict=False))
        least = float(torch.tensor(changes).min())
        measured = f"a logit changes by at least {least:.0%} of the largest logit, in {len(changes)} edited loops"
        return least > 0 and early == 0, f"{measured}; {early} earlier states changed"

    def edits_elsewhere(self) -> tuple[bool, str]:
        """Edit the last layer of every stack that runs once, in a run of one loop."""
        changes = {}
        for stack in self.schedule.stacks():
            if not self.schedule.n_loops(stack):
                site = HookSite("hook_resid_post", stack, self.schedule.n_layers(stack) - 1)
                changes[stack] = self._edit(site, 1)[0]
        if not changes:
            return True, "no layers outside the loops"
        words = ", ".join(f"{change:.0%} ({stack})" for stack, change in changes.items())
        return all(change > 0 for change in changes.values()), f"a logit changes by {words} of the largest logit"

    def _worst(self, differences: list[float], what: str) -> tuple[bool, str]:
        worst = float(torch.tensor(differences).max())
        return worst <= self.limit, f"{what}: off by {worst:.1e} of the largest logit at most (limit {self.limit:.0e})"

    def stop_and_start(self) -> tuple[bool, str]:
        """Stop before a loop, start from the state that this returned."""
        whole, off = self.run(self.n_loops), []
        for t in self.picked:
            loops = self.counted(self.n_loops)
            state = self.model(self.tokens, loops, stop_at_loop=t, **self.seeding)
            rest = self.model(self.tokens, loops, initial_state=state, start_at_loop=t)
            off.append(self.difference(rest, whole))
        return self._worst(off, f"at {len(off)} of {self.n_loops} loops")

    def last_readout(self) -> tuple[bool, str]:
        """Read out the state that leaves the last loop."""
        off = self.difference(self.model.readout(self.states[-1], self.tokens), self.run(self.n_loops))
        return self._worst([off], f"loop {self.n_loops - 1}")

    def readouts(self) -> tuple[bool, str]:
        """Read out the states leaving other loops."""
        off = [self.difference(self.model.readout(self.states[t], self.tokens), self.run(t + 1)) for t in self.picked]
        return self._worst(off, f"at {len(off)} of {self.n_loops} loops")
