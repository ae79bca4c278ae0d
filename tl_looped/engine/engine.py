"""The engine: weights, hooks, and how a run is prepared and executed. Everything else that runs a model asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedRootModule
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.ends import (
    PartOptions,
    ReturnType,
    check_return,
    check_stream,
    resolve_ends,
    resolve_steps,
    resolve_stream,
    with_part_options,
)
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import Direction, HookDict, HookFn, HookName
from tl_looped.engine.network import Frame, Network, matrix
from tl_looped.engine.prompts import read_rows, remember_padding
from tl_looped.engine.reach import Reach
from tl_looped.engine.runs import (
    Prompts,
    Run,
    RunOptions,
    Runs,
    check_full_mask,
    check_puzzles,
    check_state,
    next_token_loss,
    resolve_positions,
    resolve_prefix,
    resolve_state,
    tell_of_prefixes,
    visibility,
    with_named_arguments,
    with_run_options,
)
from tl_looped.engine.schedule import PRELUDE, HookSite, LoopCount, LoopSchedule
from tl_looped.engine.tokens import Ids, PaddingSide, single_token, to_str_tokens, to_string


class _Compiled(NamedTuple):
    """A network's compiled calls, and the id of the network that they are bound to."""

    network: int
    forward: Callable[..., Tensor]
    readout: Callable[..., Tensor]


class Engine(HookedRootModule):
    """A looped transformer with its hook points and its tokenizer, and everything that one run needs.

    Users hold a `LoopedModel`, which is one. Caches, the realised-depth view, generation and observation are built on
    what is here and know no more.

    Args:
        transformer: the native model.
        tokenizer: a tokenizer of transformers, or None for token ids only.
    """

    hook_dict: HookDict

    def __init__(self, transformer: Network, tokenizer: PreTrainedTokenizerBase | None = None):
        self.hook_dict = transformer.hook_dict  # pyright: ignore[reportIncompatibleVariableOverride] - context_level's
        super().__init__()
        self.cfg: LoopedConfig = transformer.cfg
        self.transformer = transformer
        self.tokenizer = tokenizer
        self._compiled: _Compiled | None = None
        self._told_of_prefixes = not self.cfg.prefix_lm
        self.setup()

    def setup(self) -> None:
        """List the hook points by name."""
        self.hook_dict = self.transformer.hook_dict  # pyright: ignore[reportIncompatibleVariableOverride]
        self.mod_dict = {**dict(self.transformer.named_modules()), **self.hook_dict}

    # What it is.

    @property
    def schedule(self) -> LoopSchedule:
        """Which layer runs when, at the loop count the model was trained with; `cfg.schedule(n)` for another."""
        return self.cfg.schedule()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.transformer.embed.weight.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return matrix(self.transformer.embed, "embed")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, a view."""
        return matrix(self.transformer.unembed, "unembed").T

    # Text.

    def to_tokens_with_mask(
        self,
        prompts: Prompts,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Token ids on the model's device, and which of them are real: for `attention_mask=`.

        Args:
            prompts: in any form that a run takes, such as a list of texts.
            prepend_bos, padding_side: see `RunOptions`.
        """
        rows = read_rows(prompts, self.tokenizer, prepend_bos=prepend_bos, padding_side=padding_side)
        rows.check(self.cfg.n_ctx, self.cfg.d_tokens)
        tokens, real = rows.padded()
        if not bool(real.all()) and (self.tokenizer is None or self.tokenizer.pad_token_id is None):
            raise InputError(
                "prompts of different length need padding, and the tokenizer has no padding token: set "
                "tokenizer.pad_token, or pass the texts to the run itself."
            )
        tokens = tokens.to(self.device)
        return remember_padding(tokens, real), real.to(self.device)

    @with_named_arguments
    def to_tokens(
        self,
        text: Prompts,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids on the model's device, as TransformerLens's; text that is too long is an error.

        The tensor itself, as it is returned, knows which of its tokens are padding; what is sliced from it does not.

        Args:
            text: a text, or several.
            prepend_bos, padding_side: see `RunOptions`.
        """
        return self.to_tokens_with_mask(text, prepend_bos, padding_side)[0]

    def to_string(self, tokens: Ids) -> str | list[str]:
        """Text of token ids: a string for one id or [pos], a list of them for [batch, pos] or several lists."""
        return to_string(self.tokenizer, tokens)

    def to_str_tokens(self, text: str | list[str] | Ids, prepend_bos: bool | None = None) -> list[Any]:
        """The text of each token of one prompt, given as text or token ids; of several in a list, a list for each."""
        if isinstance(text, str):
            return to_str_tokens(self.tokenizer, self.to_tokens(text, prepend_bos))
        if isinstance(text, list) and not all(isinstance(one, int) for one in text):
            return [self.to_str_tokens(one, prepend_bos) for one in text]
        return to_str_tokens(self.tokenizer, text)

    def token_texts(self, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
        """The text of each token; its id where there is no tokenizer."""
        return tuple(map(str, tokens.tolist()) if self.tokenizer is None else self.to_str_tokens(tokens))

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, or an error that shows its tokens."""
        return single_token(self.tokenizer, text)

    # Preparing a run.

    @with_part_options
    def prepare(self, prompts: Prompts, n_loops: LoopCount | None = None, **options: Unpack[PartOptions]) -> Runs:
        """Read and check prompts and how to run them, once; every call takes the result in place of prompts.

        Args:
            prompts: text, token ids, a BatchEncoding, chat messages, a list of these, a Path, a dataset; see
                `engine.prompts.read_rows`. Or what this call made, as it is.
            n_loops: number of loops; None for the count the model was trained with. With two stacks that loop, loops or
                the pair (H, L): so many loops, and in each the fast stack so often.
            options: see `RunOptions`, and `PartOptions` for runs of a part.

        Raises:
            InputError: the message says what to change; nothing was run.
        """
        given = {"n_loops": n_loops, **options}
        if isinstance(prompts, Runs):
            more = [name for name, value in given.items() if value is not None]
            if more:
                raise InputError(f"these runs are prepared already: pass {more[0]} to model.prepare instead.")
            return prompts
        ends = resolve_ends(n_loops, options, self.cfg)
        prompts, stream = resolve_stream(self.cfg, ends, prompts, options)
        state, seed, mask = (options.get(name) for name in ("initial_state", "seed", "attention_mask"))
        step_sizes = resolve_steps(self.cfg, options.get("step_sizes"), ends.n_loops)
        if ends.start and state is None and stream is None:
            raise InputError(
                f"start_at_loop={ends.start} needs initial_state: the state that a run stopped there returned."
            )
        if isinstance(prompts, Tensor) and prompts.ndim == 1:
            prompts = prompts[None]
        rows = read_rows(
            prompts,
            self.tokenizer,
            field=options.get("field"),
            limit=options.get("limit"),
            prepend_bos=options.get("prepend_bos"),
            padding_side=options.get("padding_side"),
            attention_mask=mask,
        )
        rows.check(self.cfg.n_ctx, self.cfg.d_tokens)
        check_puzzles(self.cfg, rows)
        check_state(self.cfg, rows, state, seed, self.dtype)
        if stream is not None:
            check_stream(stream, (len(rows), rows.longest, self.cfg.d_model), self.dtype)
        full = mask if mask is not None and mask.ndim != 2 else None
        if full is not None:
            check_full_mask(full, len(rows), rows.longest)
        prefix = resolve_prefix(self.cfg, prompts, rows, options, full)
        if prefix is None and full is None and not self._told_of_prefixes:
            self._told_of_prefixes = True
            tell_of_prefixes(self.cfg)
        return Runs(
            rows,
            initial_state=state,
            seed=seed,
            position_ids=options.get("position_ids"),
            visible=full,
            prefix=prefix,
            step_sizes=step_sizes,
            stream=stream,
            **ends._asdict(),
        )

    @with_part_options
    def batch(self, prompts: Prompts, n_loops: LoopCount | None = None, **options: Unpack[PartOptions]) -> Run:
        """All prompts as one padded batch, ready for `execute`; arguments as in `prepare`."""
        return self.batch_of(self.prepare(prompts, n_loops, **options))

    def batch_of(self, runs: Runs, rows: Sequence[int] | None = None) -> Run:
        """Some of the rows (or all) as one batch. Rows that are named are of one length, and lose their padding."""
        positions, state, full, prefix = runs.position_ids, runs.initial_state, runs.visible, runs.prefix
        stream = runs.stream
        if rows is None:
            tokens, real = runs.rows.padded()
        else:
            tokens = torch.stack([runs.rows.unpadded(row) for row in rows])
            real = torch.ones_like(tokens, dtype=torch.bool)
            kept = [(row, runs.rows.places(row)) for row in rows]
            if positions is not None:
                positions = torch.stack([positions[row, at.to(positions.device)] for row, at in kept])
            if state is not None and state.ndim == 3:
                state = torch.stack([state[row, at.to(state.device)] for row, at in kept])
            if stream is not None:
                stream = torch.stack([stream[row, at.to(stream.device)] for row, at in kept])
            if full is not None:
                full = torch.stack([full[row, at.to(full.device)][:, at.to(full.device)] for row, at in kept])
            if prefix is not None:
                prefix = torch.stack([prefix[row, at] for row, at in kept])
        tokens, real = tokens.to(self.device), real.to(self.device)
        prefix = None if prefix is None else prefix.to(self.device)
        mask, visible = visibility(tokens, full, real, prefix)
        at = resolve_positions(mask, positions, self.cfg.n_ctx if self.cfg.learned_positions else None)
        if state is not None and state.ndim == 2:
            if int(at.max()) >= len(state):
                raise InputError(
                    f"position_ids go up to {int(at.max())}, but initial_state has {len(state)} positions: pass "
                    "[batch, pos, d_model], or a longer state."
                )
            state = state.to(self.device)[at]
        past = runs.start_at is not None and not runs.start_at.startswith(PRELUDE)  # what a state would be drawn for
        given, drawn = past or runs.initial_state is not None, None
        if state is not None or not past:
            state, drawn = resolve_state(self.cfg, at, state, runs.seed, self.dtype, self.training)
        ends = (runs.n_loops, runs.start, runs.stop, runs.reads_out)
        more = (runs.l_cycles, prefix, runs.step_sizes, runs.start_at, runs.stop_at)
        stream = None if stream is None else stream.to(self.device)
        return Run(tokens, mask, visible, at, *ends, state, drawn, given, *more, stream)

    # Running.

    @with_part_options
    def forward(
        self,
        input: Prompts,
        n_loops: LoopCount | None = None,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **options: Unpack[PartOptions],
    ) -> Any:
        """Run the model on one batch.

        Prompts of different length are filled up where the tokenizer says (usually at the right, as in
        TransformerLens): `logits[:, -1]` then reads padding in the short rows. `last_logits` gives each row's last
        real position; `padding_side="left"` puts it at -1.

        In float16 numbers above 65504 become infinite. A run does not look for that, as a GPU would have to wait;
        analyses do, and name the site where it began.

        Args:
            input: text, token ids, or any other form of prompts; see `prepare`.
            n_loops: number of loops; None for the count it was trained with.
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean next-token cross entropy in nats over real
                tokens (but those of a prefix, which their predecessors see), in float32 at least; "both" as a pair;
                None for nothing, and no logits are formed. A run that stops early returns the state instead, or the
                residual stream.
            loss_per_token: the loss at each position, [batch, pos - 1], instead of its mean.
            options: see `RunOptions`, and `PartOptions` for runs of a part.

        Raises:
            InputError: the input is wrong; nothing was run.
            HookNameError: a registered hook is at a site or loop that this run does not reach; nothing was run.
        """
        run = self.batch(input, n_loops, **options)
        return self.execute(run, return_type, loss_per_token)

    def execute(self, run: Run, return_type: ReturnType = "logits", loss_per_token: bool = False) -> Any:
        """Run a batch; returns as `LoopedModel.forward` does. With return_type None no logits are formed.

        A run that stops early returns its state, whatever the return_type.
        """
        check_return(self.cfg, run, return_type, loss_per_token)
        self.reach(run).check_hooks()
        frame, span = self.frame(run), run.span(self.cfg)
        forward, readout = self._network()
        if span.within:
            state = self.transformer.stretch(run.tokens, frame, run.state, span, run.stream)
        else:
            state = forward(run.tokens, frame, run.state, run.start, run.stop)
        if not run.reads_out:
            return state.clone()  # not the caller's own initial state, nor what a cache holds
        if return_type is None:
            if not span.within:
                self.transformer.finish(state, frame)  # for the hooks on what comes after the loops
            return None
        logits = self.transformer.unembed(state) if span.within else readout(state, frame)
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, run, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def compile(  # pyright: ignore[reportIncompatibleMethodOverride] - named options
        self, *, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None
    ) -> None:
        """Compile the network for the runs of `forward` in which no hook acts; the others go on as before.

        The first run of each loop count, and of a first few shapes, takes from seconds to minutes (the loops are
        unrolled), later ones a fraction of the time where layers are small. Numbers agree with an uncompiled run up to
        rounding. Runs with hooks, and so caches, sweeps and observations, are not compiled; nor are those of further
        loop counts and shapes once torch has compiled eight (`torch._dynamo.config.recompile_limit`).

        Args:
            backend, mode, dynamic: as in `torch.compile`.
        """
        forward, readout = (
            torch.compile(call, backend=backend, mode=mode, dynamic=dynamic)
            for call in (self.transformer.forward, self.transformer.readout)
        )
        self._compiled = _Compiled(id(self.transformer), forward, readout)

    def _network(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """What runs the loops and what reads out: compiled where that was asked for and no hook acts."""
        made = self._compiled
        if made is None or made.network != id(self.transformer):  # of a copy, whose weights are others
            return self.transformer, self.transformer.readout
        if any(point.handles() for point in self.hook_dict.points()):
            return self.transformer, self.transformer.readout
        return made.forward, made.readout

    def frame(self, run: Run) -> Frame:
        """Rotary angles and visibility of a run, for the native model."""
        return self.transformer.frame(run.visible, run.position_ids, run.tokens, run.l_cycles, run.step_sizes)

    def reach(self, run: Run) -> Reach:
        """The sites that a run calls."""
        span = run.span(self.cfg)
        return Reach(self.hook_dict, run, span, self.transformer.reads(span, run.state is not None))

    @with_run_options
    def readout(
        self, state: Tensor, prompts: Prompts, **options: Unpack[RunOptions]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The exact logits of the model if it stopped with this state.

        That is what the family does after its last loop: the head (Ouro: the state is normed already); or the final
        norm and the head; or norm, coda, norm, head (Huginn). The coda attends over all positions of the state.

        Args:
            state: a state leaving a loop (`hook_state_post`, or what `stop_at_loop` returned), [batch, pos, d_model].
                Of two states the one that the head reads, or both.
            prompts: those of that run, for positions and padding.
            options: `attention_mask`, `position_ids`, `prepend_bos`, `padding_side`: see `RunOptions`.
        """
        runs = self.prepare(prompts, **options) if not isinstance(prompts, Runs) else prompts
        check_state(self.cfg, runs.rows, state, None, self.dtype, to_read=True)
        whole = state if state.shape[-1] == self.cfg.d_state else None
        run = self.batch_of(replace(runs, initial_state=whole, seed=None))
        return self.transformer.readout(state.to(self.device), self.frame(run))

    # Hooks.

    @property
    def context_level(self) -> int:
        """How many `hooks` blocks this thread is in, as in TransformerLens."""
        return self.hook_dict.progress.level

    @context_level.setter
    def context_level(self, level: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.hook_dict.progress.level = level

    def add_hook(
        self,
        name: HookName,
        hook: HookFn,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Register a hook until `reset_hooks`.

        Args:
            name: with a loop in it ("blocks.2.loop.3.hook_resid_post"), for that loop; without
                ("blocks.2.hook_resid_post"), for every loop, in order; or a function on names with their loop.
            hook: `fn(tensor, hook)`, which may return a tensor to put in its place. `hook.name`, `hook.loop`,
                `hook.layer()` say where it is. See `SharedHookPoint` for backward hooks.
            dir: "fwd" for activations, "bwd" for their gradients.
            is_permanent, level, prepend: as in TransformerLens.

        Raises:
            HookNameError: no such name; the message has the nearest ones.
        """
        if isinstance(name, str):
            point = self.hook_dict.shared(name)
            point.add_hook(hook, dir, is_permanent, level, prepend, where=HookSite.parse(name).loop)
        elif callable(name):
            for point in self.hook_dict.points():
                point.add_hook(hook, dir, is_permanent, level, prepend, where=name)
        else:
            raise InputError(f"a hook's name must be a string or a function on names, got {name!r}.")

    @contextmanager
    def hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """Hooks for the length of a `with` block, as in TransformerLens; names as in `add_hook`.

        They act in the runs of the thread that made them and in no other's.
        """
        self.context_level += 1
        try:
            for name, hook in fwd_hooks:
                self.add_hook(name, hook, level=self.context_level)
            for name, hook in bwd_hooks:
                self.add_hook(name, hook, "bwd", level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - immutable defaults
        self,
        *model_args: Any,
        fwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        bwd_hooks: Iterable[tuple[HookName, HookFn]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Run once with hooks, as in TransformerLens; names as in `add_hook`.

        Backward hooks belong to this run's graph: they act when its output is run backward, after this call has
        returned.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)
