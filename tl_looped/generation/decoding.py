"""Runs a growing batch of rows: with a key-value cache one token at a time, or as a whole for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.kv import KVCache
from tl_looped.engine.network import Frame
from tl_looped.engine.runs import Run, Runs, visibility
from tl_looped.engine.state import draw_noise
from tl_looped.generation.loop_end import ExitRule, LoopEnd

StatePolicy = Literal["fresh", "zeros", "carry"]
Watch = Callable[[LoopEnd, int], object]
Logits = Float[Tensor, "batch d_vocab"]
State = Float[Tensor, "batch pos d_state"]
NewState = Float[Tensor, "batch new d_state"]


class NewStates:
    """The initial states of new positions; `generate_stream` says what each policy is.

    Args:
        model: the model.
        runs, run: the prompt, with its seed.
        n_positions: how many positions there will be, at most.
        policy: "fresh", "zeros" or "carry".
    """

    def __init__(self, model: Engine, runs: Runs, run: Run, n_positions: int, policy: StatePolicy):
        if policy not in ("fresh", "zeros", "carry"):
            raise InputError(f"new_states must be 'fresh', 'zeros' or 'carry', got {policy!r}.")
        self.policy = policy
        self.table: Float[Tensor, "pos d_model"] | None = None  # of fresh ones, by position; None for zeros
        if run.state is None:
            reads = model.transformer.needs_input(state_given=True)
            if policy == "zeros" or (policy == "carry" and not reads):
                raise InputError(
                    f"new_states={policy!r}, but {model.cfg.model_name} starts every position from its embedding, "
                    "through the prelude: leave new_states out."
                )
            return
        if not model.transformer.needs_input(state_given=True):
            raise InputError(
                f"with initial_state given {model.cfg.model_name} never reads its tokens, as it injects nothing: leave "
                "initial_state out."
            )
        given = runs.initial_state
        if given is not None and given.ndim == 2 and len(given) >= n_positions:
            self.table = given.to(run.state)
        elif model.cfg.draws_state:
            self.table = draw_noise(model.cfg, n_positions, runs.seed).to(run.state)
        elif policy == "fresh" and model.cfg.starts_from_prelude:
            raise InputError(
                "initial_state is given for the prompt alone, and new tokens would start from another kind of state: "
                f"give [pos, d_model] for {n_positions} positions, or pass new_states='zeros' or 'carry'."
            )

    def of(self, position_ids: Int[Tensor, "batch new"], carried: NewState) -> NewState:
        """The states of new positions, mostly of one, whose predecessors ended with `carried`."""
        if self.policy == "carry":
            return carried
        return torch.zeros_like(carried) if self.policy == "zeros" or self.table is None else self.table[position_ids]


class Decoder:
    """The rows so far, and the logits that follow them. Without a cache: every token runs the whole rows again."""

    def __init__(self, model: Engine, run: Run, new_states: NewStates):
        self.transformer = model.transformer
        self.prompt = run
        self.new_states = new_states
        self.n_loops = run.n_loops
        self.tokens, self.real, self.positions = run.tokens, run.attention_mask, run.position_ids
        self.states = run.state  # the initial states of all positions
        self.prefix = run.prefix  # tokens that see each other in both directions
        self.final: NewState  # the final state of the newest position

    @property
    def n_positions(self) -> int:
        """How many positions the rows have."""
        return self.tokens.shape[1]

    def append(self, tokens: Int[Tensor, " batch"]) -> None:
        """Put a token at the end of every row."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)
        self.real = torch.cat((self.real, torch.ones_like(self.real[:, :1])), dim=1)
        self.positions = torch.cat((self.positions, self.positions[:, -1:] + 1), dim=1)
        if self.prefix is not None:
            self.prefix = torch.nn.functional.pad(self.prefix, (0, 1))
        if self.states is not None or self.new_states.policy == "carry":
            self.states = self._with_new(self.states, self.new_states.of(self.positions[:, -1:], self.final))

    def _with_new(self, states: State | None, new: NewState) -> Float[Tensor, "batch kept d_state"]:
        if states is None:
            raise ValueError("unreachable: states are carried on from a prompt without states by a cache alone")
        return torch.cat((states, new), dim=1)

    def whole_run(self) -> Run | None:
        """The rows so far, as a run that can be looked at; None where their initial states are not known any more."""
        states, start = self.prompt.state, self.prompt.tokens.shape[1]
        if self.new_states.policy == "carry" and start < self.n_positions:
            return None
        if states is not None and start < self.n_positions:
            places = self.positions[:, start:]
            new = self.new_states.of(places, states.new_zeros(*places.shape, states.shape[-1]))
            states = torch.cat((states, new), dim=1)
        _, visible = visibility(self.tokens, self.real, None, self.prefix)
        rows = {"tokens": self.tokens, "attention_mask": self.real, "position_ids": self.positions}
        return replace(self.prompt, **rows, visible=visible, state=states, prefix=self.prefix)

    def next_logits(self, ended: Bool[Tensor, " batch"]) -> tuple[Logits, Int[Tensor, " batch"]]:
        """(the logits that follow the newest tokens, the loops that these ran).

        Args:
            ended: rows of which nobody needs either any more.
        """
        _, visible = visibility(self.tokens, self.real, None, self.prefix)
        run = self.prompt
        frame = self.transformer.frame(visible, self.positions, self.tokens, run.l_cycles, run.step_sizes)
        x = self.transformer(self.tokens, frame, self.states, 0, self.n_loops)
        self.final = x[:, -1:]
        logits = self.transformer.unembed(self.transformer.finish(x, frame)[:, -1])
        return logits, torch.full_like(self.tokens[:, 0], self.n_loops)


class CachedDecoder(Decoder):
    """A decoder that runs only what is new, with the keys and values of what came before.

    Where loops are looked at one by one, for an exit rule or a watcher, only the newest position is: of a prompt the
    last one, after the others have run.

    Args:
        model, run, new_states: as for `Decoder`.
        n_positions: how many positions there will be, at most.
        exit_rule: which rows stop after a loop; None for none.
        watch: is given every loop's end, and the position.
        kv_slots: see `KVCache`.
    """

    def __init__(
        self,
        model: Engine,
        run: Run,
        new_states: NewStates,
        n_positions: int,
        exit_rule: ExitRule | None,
        watch: Watch | None,
        kv_slots: int | None = None,
    ):
        super().__init__(model, run, new_states)
        self.model = model
        self.progress = model.hook_dict.progress
        self.kv = KVCache(model.cfg.schedule(run.counts), n_positions, kv_slots)
        self.exit_rule = exit_rule
        self.watch = watch
        self.by_loop = exit_rule is not None or watch is not None

    def _with_new(self, states: State | None, new: NewState) -> Float[Tensor, "batch kept d_state"]:
        return new  # those of positions that are done are not needed again

    def next_logits(self, ended: Bool[Tensor, " batch"]) -> tuple[Logits, Int[Tensor, " batch"]]:
        """As in `Decoder`."""
        if self.by_loop:
            if self.n_positions - self.kv.length > 1:
                newest_is_seen = self.prefix is not None and bool(self.prefix[:, -1].any())
                self._run_to(self.n_positions - 1, with_next=newest_is_seen)
            return self._newest_by_loop(ended)
        out = self._run_to(self.n_positions)
        return self.transformer.unembed(out[:, -1]), torch.full_like(self.tokens[:, 0], self.n_loops)

    def _frame(self, start: int, stop: int) -> Frame:
        """For the positions from `start` to `stop`: some of the prompt's, or the newest."""
        visible = self.prompt.visible
        if visible is not None:
            in_prompt = stop <= visible.shape[1]
            visible = visible[:, start:stop, :stop] if in_prompt else self.real[:, None, :stop]
        places, run = slice(start, stop), self.prompt
        frame = self.transformer.frame(
            visible, self.positions[:, places], self.tokens[:, places], run.l_cycles, run.step_sizes
        )
        return frame._replace(kv=self.kv)

    def _run_to(self, stop: int, with_next: bool = False) -> State:
        """Run what is new up to a position, all loops; what the unembedding would read.

        With `with_next` the position behind them runs along, as they see it, and is run again by who asks.
        """
        start, done = self.kv.length, stop
        stop = stop + 1 if with_next else stop
        frame = self._frame(start, stop)
        states = None if self.states is None else self.states[:, : stop - start]
        with self.progress.at(start):
            x = self.transformer(self.tokens[:, start:stop], frame, states, 0, self.n_loops)
            out = self.transformer.finish(x, frame)
        self.final = x[:, -1:]
        self.kv.commit(done - start)
        return out

    def _newest_by_loop(self, ended: Bool[Tensor, " batch"]) -> tuple[Logits, Int[Tensor, " batch"]]:
        """Run the newest position, and after every loop ask the rule and the watcher."""
        start = self.kv.length
        frame = self._frame(start, start + 1)._replace(gates={})
        judge = None if self.exit_rule is None else self.exit_rule.begin(self.model, self.n_loops)
        going_on, last_loop, some_left = ~ended, torch.where(ended, 0, self.n_loops - 1), False
        with self.progress.at(start):
            states = None if self.states is None else self.states[:, -1:]
            x, e = self.transformer.begin(self.tokens[:, start:], frame, states)
        for t in range(self.n_loops):
            with self.progress.at(start):
                after = self.transformer.loop(x, e, frame, t)
            before, x = x, torch.where(going_on[:, None, None], after, x)
            end = self._loop_end(t, before, x, frame)
            if self.watch is not None:
                self.watch(end, start)
            if judge is not None and t < self.n_loops - 1:
                exits = going_on & _checked(judge(end), ended, self.exit_rule)
                last_loop = last_loop.masked_fill(exits, t)
                going_on = going_on & ~exits
                left, go_on = torch.stack((exits.any(), going_on.any())).tolist()  # the one wait of a loop
                some_left |= left
                if not go_on:
                    break
        if some_left:
            self.kv.share(last_loop)
        with self.progress.at(start):
            out = self.transformer.finish(x, frame)
        self.final = x
        self.kv.commit(1)
        return self.transformer.unembed(out[:, -1]), last_loop + 1

    def _loop_end(self, t: int, before: State, after: State, frame: Frame) -> LoopEnd:
        start, transformer = self.kv.length, self.transformer

        def read() -> Logits:
            if self.kv.length != start:
                raise InputError(
                    f"the end of loop {t} at position {start} can't be read any more, as later positions have run: "
                    "read it when it is given, and keep what you need of it."
                )
            with torch.no_grad(), self.progress.at(start):
                return transformer.readout(after, frame)[:, -1]

        said, said_before = transformer.read_part(after[:, -1]), transformer.read_part(before[:, -1])
        gate = (frame.gates or {}).get(t)
        return LoopEnd(t, said, said_before, read, None if gate is None else lambda: gate[:, -1])


def _checked(exits: object, ended: Bool[Tensor, " batch"], rule: object) -> Bool[Tensor, " batch"]:
    if not isinstance(exits, Tensor) or exits.dtype != torch.bool or exits.shape != ended.shape:
        kind = f"{exits.dtype} of shape {tuple(exits.shape)}" if isinstance(exits, Tensor) else type(exits).__name__
        raise InputError(
            f"exit_rule {rule!r} gave {kind}: it must say for each of {len(ended)} rows whether it stops, as a "
            f"boolean tensor of shape {tuple(ended.shape)}."
        )
    return exits.to(ended.device)
