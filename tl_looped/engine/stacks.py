"""Which stacks of a model loop, and what follows from there being one of them, or two."""

from __future__ import annotations

from tl_looped.engine.errors import HookNameError, InputError, check_count
from tl_looped.engine.parts import TwoStates
from tl_looped.engine.schedule import CORE, FAST, SLOW, HookSite, LoopCount

_KNOW_STACKS = (
    "with stack=, logit_lens, fit_tuned_lens, patch_sweep, attribution_sweep, the interventions, convergence, "
    "state_motion, limit_behaviour, long_run, cycle, similarity, trajectory and attention_stability; as they are, "
    "caches, hooks, generate, observe, record, directions, steering_sweep, trace_exits, readout_agreement, "
    "jacobian_spectrum, lyapunov_exponents, massive_activations, ablation_effect, neuron_shares, check and the report"
)


class Stacks:
    """What a config says of its stacks that loop: the core, or with `two_states` L_blocks and H_blocks."""

    d_model: int
    n_loops: int
    two_states: TwoStates | None
    model_name: str
    causal: bool

    def counts(self, n_loops: LoopCount | None = None) -> tuple[int, int | None]:
        """(loops, how often the fast of two stacks runs in each; None where one stack loops), checked.

        Raises:
            InputError: not a count, or two of them for a model that has one.
        """
        loops = self.n_loops if n_loops is None else n_loops
        if not isinstance(loops, (tuple, list)) or (self.two_states is None and not isinstance(loops, tuple)):
            inner = None if self.two_states is None else self.two_states.l_cycles
            return check_count("n_loops", loops), inner
        if self.two_states is None:
            raise InputError(f"n_loops={loops!r}, but one stack loops in {self.model_name}: pass one number of loops.")
        if len(loops) != 2:
            raise InputError(f"n_loops must be a number of loops, or the pair (H, L), got {loops!r}.")
        return check_count("H of n_loops", loops[0]), check_count("L of n_loops", loops[1])

    @property
    def looping(self) -> tuple[str, ...]:
        """The stacks that loop, in the order in which they run."""
        return (CORE,) if self.two_states is None else (FAST, SLOW)

    @property
    def head_stack(self) -> str | None:
        """The stack whose state the head reads; None where there is one state, that of the only core."""
        return None if self.two_states is None else SLOW

    @property
    def d_state(self) -> int:
        """Width of what goes from loop to loop: of the state, or of both, side by side, the one that is read first."""
        return self.d_model * (1 if self.two_states is None else 2)

    def stacks_in_words(self) -> str:
        """The stacks that loop, as the end of a sentence."""
        return " and ".join(self.looping)

    def looping_stack(self, stack: str | None = None) -> str:
        """The stack itself, if it loops; with None the only one that does.

        Raises:
            InputError: it does not loop, or there are two and none is named.
        """
        if stack is None and len(self.looping) == 1:
            return self.looping[0]
        if stack not in self.looping:
            said = "" if stack is None else f", got {stack!r}"
            raise InputError(
                f"what loops in {self.model_name} is {self.stacks_in_words()}: pass stack="
                f"{' or '.join(map(repr, self.looping))}{said}."
            )
        return stack

    def made_of(self, stack: str) -> dict[str, str]:
        """The stack, for what says what made a result; nothing where there is one."""
        return {} if len(self.looping) == 1 else {"stack": stack}

    def name_in(self, stack: str, short: str) -> str:
        """The short name of a site of a stack that loops, as a cache reads it."""
        return short if len(self.looping) == 1 else f"{stack}.{short}"

    def own_site(self, site: HookSite) -> HookSite:
        """The site, which must say its stack where several loop.

        Raises:
            HookNameError: it is of the only core, or the only state, and the model has two.
        """
        if self.two_states is not None and site.looped and site.stack in (None, CORE):
            short = site.component.replace("hook_", "")
            named = " or ".join(repr(f"{stack}.{short}") for stack in self.looping)
            raise HookNameError(
                f"{short!r} is at two places in {self.model_name}, where {self.stacks_in_words()} loop: say {named}."
            )
        return site

    def check_causal(self, what: str) -> None:
        """Raise for a model that sees tokens in both directions, where something is asked that it can't have.

        Raises:
            InputError: the message begins with `what`.
        """
        if not self.causal:
            raise InputError(
                f"{what} needs a model that reads from left to right, but {self.model_name} sees tokens in both "
                "directions, as one that fills in masked tokens: read its logits at their positions."
            )

    def check_one_core(self) -> None:
        """The one place where calls that know only one core, with one state, refuse a model.

        Raises:
            InputError: two stacks loop in it.
        """
        broken = self.one_core_broken_by()
        if broken is not None:
            raise InputError(
                f"this asks for one core with one state, but {self.model_name} is not so: {broken}. What knows such "
                f"models: {_KNOW_STACKS}."
            )

    def one_core_broken_by(self) -> str | None:
        """Why the model is not one core with one state, prelude and coda around it; None where it is."""
        if self.two_states is None:
            return None
        return f"two stacks loop in it, {self.stacks_in_words()}, each with a state of its own"
