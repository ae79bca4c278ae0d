"""Text from a looped model, one token a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_looped.engine.engine import Engine
from tl_looped.engine.errors import InputError
from tl_looped.engine.numbers import log_probs_of, wide
from tl_looped.engine.runs import Run
from tl_looped.generation.decoding import Decoder
from tl_looped.generation.sampling import Sampling
from tl_looped.generation.stopping import RowText, Stopping
from tl_looped.observe.watching import naming_origin


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
        logits: those that the token was drawn from, as the model gave them; float32 at least.
    """

    position: int
    tokens: Int[Tensor, " batch"]
    text: tuple[str, ...] | None
    log_probs: Float[Tensor, " batch"]
    loops: Int[Tensor, " batch"]
    ended: Bool[Tensor, " batch"]
    logits: Float[Tensor, "batch d_vocab"]


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
        self._over = [False] * len(self._ended)  # the same, for the CPU
        self._eos = prompt.tokens.new_tensor(stopping.eos)
        self._texts: list[RowText] | None = None
        if model.tokenizer is not None:
            rows = zip(prompt.tokens, prompt.attention_mask, strict=True)
            self._texts = [RowText(model.tokenizer, tokens[real].tolist()) for tokens, real in rows]

    @torch.no_grad()
    def __next__(self) -> GenerationStep:
        """The next token of every row. The CPU waits for the device once, for the tokens."""
        if self._n_steps == self.max_new_tokens or all(self._over):
            raise StopIteration
        check_hooks(self._model, self.prompt)
        decoder, ended, drawn = self._decoder, self._ended, self._generator.get_state()
        logits, loops = decoder.next_logits(ended)
        logits = wide(logits)
        log_probs = log_probs_of(logits)
        tokens = self._sampling.choose(logits, decoder.tokens, decoder.real, self._generator)
        tokens = tokens.masked_fill(ended, self._stopping.filler)
        finite, *told = torch.cat((logits.isfinite().all()[None], tokens)).tolist()
        if not finite:
            self._generator.set_state(drawn)
            run = decoder.whole_run()
            with nullcontext() if run is None else naming_origin(self._model, run):
                raise InputError(
                    f"the logits at position {decoder.n_positions - 1} are not finite: look at the weights and hooks, "
                    "or run in a wider dtype or with fewer loops."
                )
        chosen = log_probs.gather(-1, tokens[:, None])[:, 0].masked_fill(ended, float("nan"))
        position = decoder.n_positions
        decoder.append(tokens)
        pieces = self._end_rows(tokens, told, logits)
        self._n_steps += 1
        return GenerationStep(position, tokens, pieces, chosen, loops.masked_fill(ended, 0), self._ended, logits)

    @torch.no_grad()
    def run_newest(self) -> tuple[Int[Tensor, " batch"], Run | None]:
        """Run the newest tokens too, whose logits no step needed: (the loops that they ran, the rows as a run)."""
        _, loops = self._decoder.next_logits(self._ended)
        return loops.masked_fill(self._ended, 0), self._decoder.whole_run()

    def _end_rows(
        self, tokens: Int[Tensor, " batch"], told: list[int], logits: Float[Tensor, "batch d_vocab"]
    ) -> tuple[str, ...] | None:
        """Note which rows end with these tokens, here and on the device; the tokens' texts."""
        pieces = None
        ends, over = torch.isin(tokens, self._eos), [token in self._stopping.eos for token in told]
        if self._texts is not None:
            rows = list(zip(self._texts, told, self._over, strict=True))
            pieces = tuple("" if ended else text.add(token) for text, token, ended in rows)
            if self._stopping.strings:
                stopped = [any(string in text.text for string in self._stopping.strings) for text in self._texts]
                over = [one or other for one, other in zip(over, stopped, strict=True)]
                ends = ends | torch.tensor(stopped).to(ends.device)
        if self._stopping.criteria:
            by_criteria = self._stopping.by_criteria(self._decoder.tokens, logits)
            ends = ends | by_criteria
            over = [one or other for one, other in zip(over, by_criteria.tolist(), strict=True)]
        self._ended = self._ended | ends
        self._over = [one or other for one, other in zip(self._over, over, strict=True)]
        return pieces


def check_hooks(model: Engine, prompt: Run) -> None:
    """An error for a registered hook that could not act."""
    if any(point.bwd_hooks for point in model.hook_dict.points()):
        raise InputError(
            "a backward hook is registered, but text is generated without gradients: remove it, or run the model on "
            "the text afterwards."
        )
    model.reach(prompt).check_hooks()
