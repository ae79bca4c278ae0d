"""Text from a looped model, one token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError, check_count
from tl_looped.engine.numbers import wide
from tl_looped.engine.runs import DEFAULT_SEED, Prompts, Run
from tl_looped.engine.tokens import PaddingSide
from tl_looped.generation.decoding import CachedDecoder, Decoder, NewStates, StatePolicy, Watch
from tl_looped.generation.loop_end import ExitRule
from tl_looped.generation.sampling import Sampling
from tl_looped.generation.stopping import RowText, Stopping


@dataclass(frozen=True, eq=False)
class GenerationStep:
    """One new token in every row.

    Attributes:
        position: where in the rows it stands, padding included.
        tokens: the tokens; the filler in rows that had ended before.
        text: what each adds to its row's text, special tokens written out; "" in rows that had ended, and for all but
            the last token of a character. None without a tokenizer.
        log_probs: log probability of each under the model itself, before temperature, top_k and top_p, in nats; NaN in
            rows that had ended.
        loops: how many loops the position ran whose logits gave it; 0 in rows that had ended.
        ended: the rows that end with this token or had ended before.
    """

    position: int
    tokens: Int[Tensor, " batch"]
    text: tuple[str, ...] | None
    log_probs: Float[Tensor, " batch"]
    loops: Int[Tensor, " batch"]
    ended: Bool[Tensor, " batch"]


class TokenStream(Iterator[GenerationStep]):
    """An iterator over the steps of one generation; make one with `generate_stream`.

    It ends when every row has ended or `max_new_tokens` have come. A step that an error interrupts, as of a hook, has
    changed nothing and may be asked for again.

    Attributes:
        prompt: the checked prompt.
        made_by: model, loop count, initial state, seed and options.
        max_new_tokens: the most steps there will be.
    """

    def __init__(
        self,
        model: Engine,
        prompt: Run,
        decoder: Decoder,
        sampling: Sampling,
        stopping: Stopping,
        max_new_tokens: int,
        seed: int,
        made_by: dict[str, Any],
    ):
        self.prompt = prompt
        self.made_by = made_by
        self.max_new_tokens = max_new_tokens
        self._model, self._decoder, self._sampling, self._stopping = model, decoder, sampling, stopping
        self._generator = torch.Generator().manual_seed(seed)
        self._n_steps = 0
        self._ended = torch.zeros_like(prompt.attention_mask[:, 0])
        self._texts: list[RowText] | None = None
        if model.tokenizer is not None:
            rows = zip(prompt.tokens, prompt.attention_mask, strict=True)
            self._texts = [RowText(model.tokenizer, tokens[real].tolist()) for tokens, real in rows]

    @torch.no_grad()
    def __next__(self) -> GenerationStep:
        """The next token of every row."""
        if self._n_steps == self.max_new_tokens or bool(self._ended.all()):
            raise StopIteration
        _check_hooks(self._model, self.prompt)
        decoder, ended = self._decoder, self._ended
        logits, loops = decoder.next_logits(ended)
        logits = wide(logits)
        log_probs = logits.log_softmax(-1)
        if bool(log_probs.isnan().any()):
            raise InputError(
                f"the logits at position {decoder.n_positions - 1} are not numbers (NaN): look for it in the weights, "
                "the dtype or a hook."
            )
        tokens = self._sampling.choose(logits, decoder.tokens, self._generator)
        tokens = tokens.masked_fill(ended, self._stopping.filler)
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0].masked_fill(ended, float("nan"))
        position = decoder.n_positions
        decoder.append(tokens)
        pieces = self._end_rows(tokens)
        self._n_steps += 1
        return GenerationStep(position, tokens, pieces, chosen, loops.masked_fill(ended, 0), self._ended)

    def _end_rows(self, tokens: Int[Tensor, " batch"]) -> tuple[str, ...] | None:
        """Note which rows end with these tokens; the tokens' texts."""
        pieces = None
        ends = torch.isin(tokens, tokens.new_tensor(self._stopping.eos))
        if self._texts is not None:
            rows = list(zip(self._texts, tokens.tolist(), self._ended.tolist(), strict=True))
            pieces = tuple("" if ended else text.add(token) for text, token, ended in rows)
            stopped = [any(string in text.text for string in self._stopping.strings) for text in self._texts]
            ends = ends | torch.tensor(stopped, device=ends.device)
        self._ended = self._ended | ends
        return pieces


def generate_stream(
    model: Engine,
    input: Prompts,
    max_new_tokens: int = 10,
    n_loops: int | None = None,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_at_eos: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    initial_state: StatePolicy = "fresh",
    exit_rule: ExitRule | None = None,
    watch: Watch | None = None,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Tensor | None = None,
) -> TokenStream:
    """Generate text token by token: an iterator of `GenerationStep`. The same seed gives the same text.

    Hooks act at every step, at every loop and new position: `hook.loop`, and `hook.first_position` for where the tensor
    begins. The first step runs the prompt, a later one the newest token alone, so tensors have one position and
    patterns are [batch, head, 1, keys so far]. A hook that chooses positions must count from `hook.first_position`;
    with `use_past_kv_cache=False`, tensors hold all positions at every step, from position 0.

    Args:
        model: the model.
        input: prompts in any form, padded at the left.
        max_new_tokens: the most tokens to add.
        n_loops: loops of every token; None for the count the model was trained with.
        do_sample: draw from the distribution; False takes the most probable token.
        temperature: logits are divided by it.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest most probable tokens whose probabilities reach this sum; after `top_k`.
        stop_at_eos: a row ends with `eos_token_id`.
        eos_token_id: the token, or tokens, that end a row; None: the checkpoint's own (`cfg.eos_token_ids`) and the
            tokenizer's end-of-text token, if they have any.
        stop_strings: texts that end a row: with the token that completes one in the row's generated text. Special
            tokens count as they are written.
        seed: of the draws, and of the initial states where the model draws them; None for 0. All rows draw from one
            generator, so what a row draws depends on its batch.
        initial_state: of new tokens. "fresh": as in any run; where it is drawn, each position has its own draw, the
            same with and without a cache. "zeros". "carry": the final state of the token before (in the row).
            Positions of the prompt start as in any run.
        exit_rule: stops tokens before their last loop, each by itself: see below. Needs the cache.
        watch: called as `watch(end, position)` with every `LoopEnd` of every new token and of the prompt's last, and
            where in the rows it is; what it wants read must be read there. Needs the cache.
        use_past_kv_cache: keep keys and values of earlier positions; False runs the whole rows for every token.
        prepend_bos: as in `LoopedModel.to_tokens`.
        padding_side: "left" or None: a new token must follow a real one.
        attention_mask: which tokens of the prompt are real, [batch, pos]; None: all but the padding.

    An exit rule judges the newest token after every loop but the last. A token that stops after loop t keeps its state,
    from which the coda and the head go on; later tokens, which may run more loops, find in loop s > t its keys and
    values of loop t in the same layer: the latest it has. A row that has stopped runs along, unused, until all have.

    With a rule or a watcher, the prompt's last token runs by itself, after the others have run all loops; and hooks on
    the coda and the final norm also act whenever a `LoopEnd` is read.

    Raises:
        InputError: an option is wrong or contradicts another, the text could pass the model's context, or a backward
            hook is registered; nothing was run.
        HookNameError: a hook at a site or loop that no step reaches; nothing was run.

    Source:
        arXiv 2502.05171: exits per token, keys and values of the latest loop, states carried over.
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p)
    check_count("max_new_tokens", max_new_tokens)
    if not use_past_kv_cache and (exit_rule is not None or watch is not None):
        name = "watch" if exit_rule is None else "exit_rule"
        raise InputError(f"{name} needs the key-value cache: leave out use_past_kv_cache=False, or {name}.")
    if watch is not None and not callable(watch):
        raise InputError(f"watch must be a function of a LoopEnd and a position, got {cast(object, watch)!r}.")
    if padding_side not in (None, "left"):
        raise InputError(
            f"padding_side={padding_side!r}, but new tokens must follow real ones: leave it out, or pass 'left'."
        )
    seed = DEFAULT_SEED if seed is None else seed
    prompt = model.batch(
        input, n_loops, seed=seed, attention_mask=attention_mask, prepend_bos=prepend_bos, padding_side="left"
    )
    n_positions = _check_prompt(model, prompt, max_new_tokens, attention_mask)
    batch = len(prompt.tokens)
    stopping = Stopping.checked(model.tokenizer, model.cfg, batch, stop_at_eos, eos_token_id, stop_strings)
    states = NewStates(model, prompt, n_positions, initial_state)
    if exit_rule is not None:
        _check_rule(model, exit_rule, prompt.n_loops)
    with torch.no_grad():
        _check_hooks(model, prompt)
    if use_past_kv_cache:
        decoder = CachedDecoder(model, prompt, states, n_positions, exit_rule, watch)
    else:
        decoder = Decoder(model, prompt, states)
    made_by = {"model": model.cfg.model_name, **prompt.describe(), "seed": seed, "new_states": initial_state}
    made_by |= {"max_new_tokens": max_new_tokens, **asdict(sampling), "use_past_kv_cache": use_past_kv_cache}
    made_by |= {"exit_rule": None if exit_rule is None else repr(exit_rule)}
    made_by |= {"eos": list(stopping.eos), "stop_strings": list(stopping.strings)}
    return TokenStream(model, prompt, decoder, sampling, stopping, max_new_tokens, seed, made_by)


def _check_hooks(model: Engine, prompt: Run) -> None:
    """An error for a registered hook that could not act."""
    if any(point.bwd_hooks for point in model.hook_dict.points()):
        raise InputError(
            "a backward hook is registered, but text is generated without gradients: remove it, or run the model on "
            "the text afterwards."
        )
    model.reach(prompt).check_hooks()


def _check_prompt(model: Engine, prompt: Run, max_new_tokens: int, attention_mask: Tensor | None) -> int:
    """How many positions there may be in the end; an error where new tokens can't follow."""
    length, n_ctx = prompt.tokens.shape[1], model.cfg.n_ctx
    if length + max_new_tokens > n_ctx:
        room = f"max_new_tokens can be at most {n_ctx - length}" if length < n_ctx else "shorten the prompt"
        raise InputError(
            f"the prompt of {length} tokens and max_new_tokens={max_new_tokens} make {length + max_new_tokens}, more "
            f"than the model's context of {n_ctx}: {room}."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(
            f"attention_mask must be [batch, pos] here, got shape {tuple(attention_mask.shape)}: who sees whom in full "
            "does not say what new tokens see."
        )
    behind = (~prompt.attention_mask[:, -1]).nonzero().flatten().tolist()
    if behind:
        raise InputError(
            f"rows {behind} end in padding, and a new token must follow a real one: pad at the left, or pass "
            "attention_mask=... if these tokens are real."
        )
    return length + max_new_tokens


def _check_rule(model: Engine, rule: object, n_loops: int) -> None:
    begin = None if isinstance(rule, type) else getattr(rule, "begin", None)
    judge = begin(model, n_loops) if callable(begin) else None
    if not callable(judge):
        raise InputError(
            f"exit_rule must have a method begin(model, n_loops) that gives a judge, as those of tl_looped.lens.exits "
            f"do, got {cast(object, rule)!r}."
        )
