"""Text from a looped model: token by token, or whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, cast

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.reach import NamesFilter
from tl_looped.engine.results import Result
from tl_looped.engine.runs import DEFAULT_SEED, Prompts, Run, RunOptions, Runs, with_run_options
from tl_looped.engine.schedule import LoopCount
from tl_looped.generation.decoding import CachedDecoder, Decoder, NewStates, StatePolicy, Watch
from tl_looped.generation.kept import GeneratedCache, Kept
from tl_looped.generation.loop_end import ExitRule
from tl_looped.generation.sampling import Processor, Sampling, as_tuple
from tl_looped.generation.stopping import Criterion, Stopping
from tl_looped.generation.stream import GenerationStep, TokenStream, check_hooks
from tl_looped.viz.figure import Figure
from tl_looped.viz.style import base_layout, heading, plotly_text

GenerateReturn = Literal["input", "str", "tokens", "result"]


@dataclass(frozen=True, eq=False, repr=False)
class Generated(Result):
    """Generated text, and how it came about.

    Attributes:
        tokens: prompts and new tokens.
        real: which of them are text, not padding before it or filler after it.
        text: prompt and new text of each row, without special tokens; None without a tokenizer.
        pieces: what each new token adds to its row's text, [batch][new]; None without a tokenizer.
        log_probs: log probability of each new token under the model itself, before temperature, top_k and top_p, in
            nats; NaN in filler.
        loops: how many loops the position ran whose logits gave each new token; 0 in filler.
        logits: those that each new token was drawn from, as the model gave them; None unless asked for.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    text: tuple[str, ...] | None
    pieces: tuple[tuple[str, ...], ...] | None
    log_probs: Float[Tensor, "batch new"]
    loops: Int[Tensor, "batch new"]
    logits: Float[Tensor, "batch new d_vocab"] | None = None

    @property
    def new_tokens(self) -> Int[Tensor, "batch new"]:
        """The tokens after the prompt."""
        return self.tokens[:, -self.loops.shape[1] :]

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each new token, without filler: batch, pos, token, text (None if unknown), log_prob, loops."""
        start = self.tokens.shape[1] - self.loops.shape[1]
        rows = [
            {
                "batch": row,
                "pos": start + i,
                "token": int(self.tokens[row, start + i]),
                "text": None if self.pieces is None else self.pieces[row][i],
                "log_prob": float(self.log_probs[row, i]),
                "loops": int(self.loops[row, i]),
            }
            for row, i in self.real[:, start:].nonzero().tolist()
        ]
        return pd.DataFrame(rows, columns=["batch", "pos", "token", "text", "log_prob", "loops"])

    def plot(self) -> go.Figure:
        """The log probability of each new token, a line for each row; its text and loops when hovered over."""
        lines = [
            go.Scatter(
                x=one.pos,
                y=one.log_prob,
                text=[f"{plotly_text(str(text))} (token {token}, {n} loops)" for text, token, n in what],
                name=f"row {row}",
                mode="lines+markers",
            )
            for row, one in self.to_dataframe().groupby("batch")
            for what in [zip(one.text, one.token, one.loops, strict=True)]
        ]
        figure = Figure(lines, {"xaxis_title": "position", "yaxis_title": "log probability (nats)"})
        return base_layout(figure, 400, title=heading(f"Generated tokens: {self.made_by.get('model', '')}"))


class GeneratesText(Engine):
    """An engine that goes on writing."""

    @with_run_options
    def generate_stream(
        self,
        input: Prompts,
        max_new_tokens: int = 10,
        n_loops: LoopCount | None = None,
        *,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        freq_penalty: float = 0.0,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        new_states: StatePolicy = "fresh",
        exit_rule: ExitRule | None = None,
        watch: Watch | None = None,
        use_past_kv_cache: bool = True,
        kv_slots: int | None = None,
        **options: Unpack[RunOptions],
    ) -> TokenStream:
        """Generate text token by token: an iterator of `GenerationStep`. The same seed gives the same text.

        Hooks act at every step, at every loop and new position: `hook.loop`, and `hook.first_position` for where the
        tensor begins. The first step runs the prompt, a later one the newest token alone, so tensors have one position
        and patterns are [batch, head, 1, keys so far]. A hook that chooses positions must count from
        `hook.first_position`; without a cache, tensors hold all positions at every step, from position 0.

        Args:
            input: prompts in any form, padded at the left: a new token must follow a real one.
            max_new_tokens: the most tokens to add.
            n_loops: loops of every token; None for the count the model was trained with.
            do_sample: draw from the distribution; False takes the most probable token.
            temperature: logits are divided by it.
            top_k: draw from the k most probable tokens.
            top_p: draw from the fewest most probable tokens whose probabilities reach this sum; after `top_k`.
            repetition_penalty: of tokens that the row has, positive logits are divided by it, negative multiplied.
            freq_penalty: is subtracted from a token's logit as often as the row has the token. Both count prompt and
                new tokens, no padding, and act where the most probable token is taken too.
            logits_processor: transformers' LogitsProcessor, or functions of tokens [batch, pos] and logits, after the
                penalties and before the temperature. Padding is among the tokens.
            stop_at_eos: a row ends with `eos_token_id`.
            eos_token_id: the token, or tokens, that end a row; None: the checkpoint's own (`cfg.eos_token_ids`) and
                the tokenizer's end-of-text token, if they have any.
            stop_strings: texts that end a row: with the token that completes one in the row's generated text. Special
                tokens count as they are written.
            stopping_criteria: transformers' StoppingCriteria, or functions of tokens [batch, pos] and the newest logits
                that say for all rows, or for each, whether they end.
            new_states: the initial states of new tokens. "fresh": as in any run; where it is drawn, each position has
                its own draw, the same with and without a cache. "zeros". "carry": the final state of the token before
                (in the row); the warm start of the nanochat forks.
            exit_rule: stops tokens before their last loop, each by itself: see below. Needs the cache.
            watch: called as `watch(end, position)` with every `LoopEnd` of every new token and of the prompt's last,
                and where in the rows it is; what it wants read must be read there. Needs the cache.
            use_past_kv_cache: keep keys and values of earlier positions; False runs the whole rows for every token.
            kv_slots: slots of keys and values that a layer of the loops has; loop t writes over slot t mod kv_slots.
                None: one for every loop, so that text is that of whole runs. As published, which makes other text: 1
                for the nanochat forks (their `kv_budget`) and for Parcae's "compress-s1".
            options: of the prompt's run, see `RunOptions`. `seed` is that of the draws too: all rows draw from one
                generator, so what a row draws depends on its batch. An `initial_state` of [pos, d_model] that is long
                enough is that of new positions too.

        An exit rule judges the newest token after every loop but the last. A token that stops after loop t keeps its
        state, from which the coda and the head go on; later tokens, which may run more loops, find in loop s > t its
        keys and values of loop t in the same layer: the latest it has. A row that has stopped runs along, unused, until
        all have.

        With a rule or a watcher, the prompt's last token runs by itself, after the others have run all loops; and hooks
        on the coda and the final norm also act whenever a `LoopEnd` is read.

        Raises:
            InputError: an option is wrong or contradicts another, the text could pass the model's context, or a
                backward hook is registered; nothing was run. While it runs, where logits are not finite: the message
                names the site where that began.
            HookNameError: a hook at a site or loop that no step reaches; nothing was run.

        Source:
            arXiv 2502.05171: exits per token, keys and values of the latest loop, states carried over.
        """
        check_count("max_new_tokens", max_new_tokens)
        processors, criteria = as_tuple(logits_processor), as_tuple(stopping_criteria)
        sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, freq_penalty, processors)
        if not use_past_kv_cache and (exit_rule is not None or watch is not None):
            name = "watch" if exit_rule is None else "exit_rule"
            raise InputError(f"{name} needs the key-value cache: leave out use_past_kv_cache=False, or {name}.")
        _check_slots(self, kv_slots, exit_rule, new_states, use_past_kv_cache)
        if watch is not None and not callable(watch):
            raise InputError(f"watch must be a function of a LoopEnd and a position, got {cast(object, watch)!r}.")
        runs = _prepare(self, input, n_loops, options)
        prompt = self.batch_of(runs)
        n_positions = _check_prompt(self, prompt, max_new_tokens, use_past_kv_cache)
        batch = len(prompt.tokens)
        stopping = Stopping.checked(self.tokenizer, self.cfg, batch, stop_at_eos, eos_token_id, stop_strings, criteria)
        states = NewStates(self, runs, prompt, n_positions, new_states)
        if exit_rule is not None:
            _check_rule(self, exit_rule, prompt.n_loops)
        with torch.no_grad():
            check_hooks(self, prompt)
        if use_past_kv_cache:
            decoder = CachedDecoder(self, prompt, states, n_positions, exit_rule, watch, kv_slots)
        else:
            decoder = Decoder(self, prompt, states)
        seed = cast(int, runs.seed)
        made_by = {"model": self.cfg.model_name, **prompt.describe(), "seed": seed, "new_states": new_states}
        made_by |= {"max_new_tokens": max_new_tokens, **sampling.describe(), "use_past_kv_cache": use_past_kv_cache}
        made_by |= {"kv_slots": kv_slots}
        made_by |= {"exit_rule": None if exit_rule is None else repr(exit_rule)}
        made_by |= {"eos": list(stopping.eos), "stop_strings": list(stopping.strings)}
        made_by |= {"stopping_criteria": [repr(one) for one in criteria]}
        return TokenStream(self, prompt, decoder, sampling, stopping, max_new_tokens, seed, made_by)

    @with_run_options
    def generate(
        self,
        input: Prompts,
        max_new_tokens: int = 10,
        n_loops: LoopCount | None = None,
        *,
        return_type: GenerateReturn = "input",
        verbose: bool = True,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        freq_penalty: float = 0.0,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        new_states: StatePolicy = "fresh",
        exit_rule: ExitRule | None = None,
        watch: Watch | None = None,
        use_past_kv_cache: bool = True,
        kv_slots: int | None = None,
        output_logits: bool = False,
        return_cache: bool = False,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        **options: Unpack[RunOptions],
    ) -> str | list[str] | Tensor | Generated | tuple[str | list[str] | Tensor | Generated, GeneratedCache]:
        """Generate text. The same seed gives the same text.

        Args:
            input: prompts in any form.
            return_type: "str", the prompt and the new text as the tokenizer decodes their ids, without special tokens:
                of some tokenizers the prompt comes back spaced in another way (a list of texts for several prompts);
                "tokens", both as ids [batch, pos]; "input", whichever the input was; "result", a `Generated` with
                everything.
            verbose: show a progress bar.
            output_logits: keep the logits of every new token, in a `Generated` (return_type="input" or "result").
            return_cache: give the activations as well that this very generation computes, of prompt and new tokens
                (the last of which runs too): (text, cache). Where nothing exits they are those of a run on the finished
                text. With an exit rule, tokens attend to keys of others' exits, so they are not; loops that a token did
                not run are NaN, and `cache.loops_run` says how many it did.
            names_filter, device: which, and where to keep them, as in `run_with_cache`.
            max_new_tokens, n_loops, options: these and the others as in `generate_stream`.

        Returns:
            What return_type says. In tokens, a row that has ended goes on with the tokenizer's padding token, or
            without one with its end-of-text token.

        Raises:
            InputError: as `generate_stream`, or text is asked for without a tokenizer; nothing was run.
        """
        if return_type not in ("input", "str", "tokens", "result"):
            raise InputError(f"return_type must be 'input', 'str', 'tokens' or 'result', got {return_type!r}.")
        if return_type == "str" and self.tokenizer is None:
            raise InputError(
                "return_type='str', but this model has no tokenizer: pass return_type='tokens', or set model.tokenizer."
            )
        if output_logits and return_type not in ("input", "result"):
            raise InputError(f"logits come in a result: leave out return_type={return_type!r}, or pass 'result'.")
        if return_type == "input":
            return_type = "result" if output_logits else "tokens" if isinstance(input, (Tensor, Runs)) else "str"
        _check_kept(return_cache, names_filter, device, kv_slots, new_states)
        stream = self.generate_stream(
            input,
            max_new_tokens,
            n_loops,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            freq_penalty=freq_penalty,
            logits_processor=logits_processor,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            stop_strings=stop_strings,
            stopping_criteria=stopping_criteria,
            new_states=new_states,
            exit_rule=exit_rule,
            watch=watch,
            use_past_kv_cache=use_past_kv_cache,
            kv_slots=kv_slots,
            **options,
        )
        kept = Kept(self, stream.prompt, names_filter, device) if return_cache else None
        with nullcontext() if kept is None else kept.keeping():
            steps = list(tqdm(stream, desc="Generating", total=max_new_tokens, unit="token", disable=not verbose))
            newest, run = (None, None) if kept is None else stream.run_newest()
        result = _collect(self, stream, steps, output_logits)
        texts = list(result.text or ())
        text = texts[0] if _is_one(input) and len(texts) == 1 else texts
        output = {"result": result, "tokens": result.tokens, "str": text}[return_type]
        if kept is None or newest is None or run is None:
            return output
        return output, kept.cache(run, [*(step.loops for step in steps), newest], stream.made_by)


def _is_one(prompts: Prompts) -> bool:
    """Whether it is one prompt by its form, and not a list of one."""
    if isinstance(prompts, (list, tuple)):
        return not isinstance(prompts[0], (str, list, tuple))  # but token ids, or the messages of a chat
    return isinstance(prompts, (str, Tensor, Mapping, Runs))


def _prepare(model: Engine, prompts: Prompts, n_loops: LoopCount | None, options: RunOptions) -> Runs:
    """Prompts that end together, with the seed of their draws."""
    model.cfg.check_causal("generating text")
    side = options.get("padding_side")
    if side not in (None, "left"):
        raise InputError(f"padding_side={side!r}, but new tokens must follow real ones: leave it out, or pass 'left'.")
    if not isinstance(prompts, Runs):
        options = {**options, "padding_side": "left"}
    runs = model.prepare(prompts, n_loops, **options)
    if not runs.whole:
        raise InputError("text is generated with all loops: prepare it without start_at_loop and stop_at_loop.")
    if runs.visible is not None:
        raise InputError(
            f"attention_mask must be [batch, pos] here, got shape {tuple(runs.visible.shape)}: who sees whom in full "
            "does not say what new tokens see."
        )
    laid_out = runs.position_ids is not None or (runs.initial_state is not None and runs.initial_state.ndim == 3)
    laid_out = laid_out or runs.prefix is not None
    rows = runs.rows if laid_out else replace(runs.rows, padding_side="left")
    return replace(runs, rows=rows, seed=DEFAULT_SEED if runs.seed is None else runs.seed)


def _check_prompt(model: Engine, prompt: Run, max_new_tokens: int, cached: bool) -> int:
    """How many positions there may be in the end; an error where new tokens can't follow."""
    length, n_ctx = prompt.tokens.shape[1], model.cfg.n_ctx
    if length + max_new_tokens > n_ctx:
        room = f"max_new_tokens can be at most {n_ctx - length}" if length < n_ctx else "shorten the prompt"
        raise InputError(
            f"the prompt of {length} tokens and max_new_tokens={max_new_tokens} make {length + max_new_tokens}, more "
            f"than the model's context of {n_ctx}: {room}."
        )
    grows = model.cfg.grows_rotary_from()
    if cached and grows is not None and length + max_new_tokens > grows:
        raise InputError(
            f"the prompt of {length} tokens and max_new_tokens={max_new_tokens} make more than {grows}, from where on "
            "this model's dynamic rotary scaling turns all positions anew for every token, so keys can't be kept: pass "
            "use_past_kv_cache=False, or stay below."
        )
    behind = (~prompt.attention_mask[:, -1]).nonzero().flatten().tolist()
    if behind:
        raise InputError(
            f"rows {behind} end in padding, and a new token must follow a real one: pad at the left, or pass "
            "attention_mask=... if these tokens are real."
        )
    return length + max_new_tokens


def _check_slots(
    model: Engine, slots: int | None, exit_rule: object, new_states: StatePolicy, use_past_kv_cache: bool
) -> None:
    if not use_past_kv_cache and new_states == "carry" and model.cfg.starts_from_prelude:
        raise InputError("new_states='carry' needs the key-value cache here: leave out use_past_kv_cache=False.")
    if slots is None:
        return
    check_count("kv_slots", slots)
    broken = {
        "use_past_kv_cache=False": not use_past_kv_cache,
        "exit_rule, as later tokens read keys of every loop": exit_rule is not None,
        "two stacks that loop": model.cfg.two_states is not None,
    }
    for what, is_so in broken.items():
        if is_so:
            raise InputError(f"kv_slots={slots} does not go with {what}: leave one of them out.")


def _check_kept(
    return_cache: bool,
    names_filter: NamesFilter,
    device: torch.device | str | None,
    kv_slots: int | None,
    new_states: StatePolicy,
) -> None:
    if not return_cache and (names_filter is not None or device is not None):
        name = "device" if names_filter is None else "names_filter"
        raise InputError(f"{name} says what a cache keeps: pass return_cache=True, or leave {name} out.")
    other = "kv_slots" if kv_slots is not None else "new_states='carry'" if new_states == "carry" else None
    if return_cache and other is not None:
        raise InputError(
            f"with {other} tokens see keys, or start from states, that no run of the model has, and a cache could not "
            "say so: take activations with watch= or model.hooks, or leave it out."
        )


def _check_rule(model: Engine, rule: object, n_loops: int) -> None:
    begin = None if isinstance(rule, type) else getattr(rule, "begin", None)
    judge = begin(model, n_loops) if callable(begin) else None
    if not callable(judge):
        raise InputError(
            f"exit_rule must have a method begin(model, n_loops) that gives a judge, as those of tl_looped.lens.exits "
            f"do, got {cast(object, rule)!r}."
        )


def _collect(model: Engine, stream: TokenStream, steps: list[GenerationStep], with_logits: bool) -> Generated:
    """The steps as one result."""
    loops = torch.stack([step.loops for step in steps], dim=1)
    tokens = torch.cat((stream.prompt.tokens, torch.stack([step.tokens for step in steps], dim=1)), dim=1)
    real = torch.cat((stream.prompt.attention_mask, loops > 0), dim=1)
    text = pieces = None
    if model.tokenizer is not None:
        rows = zip(tokens, real, strict=True)
        text = tuple(
            cast(str, model.tokenizer.decode(row[mask].tolist(), skip_special_tokens=True)) for row, mask in rows
        )
        pieces = tuple(zip(*[step.text or () for step in steps], strict=True))
    log_probs = torch.stack([step.log_probs for step in steps], dim=1)
    logits = torch.stack([step.logits for step in steps], dim=1) if with_logits else None
    return Generated(stream.made_by, tokens, real, text, pieces, log_probs, loops, logits)
