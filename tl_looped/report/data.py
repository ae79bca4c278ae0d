"""Everything that the report shows, measured on a model in two runs a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.engine.checks import check_eval
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.numbers import cosine, length, ratio
from tl_looped.engine.runs import DEFAULT_SEED, Run
from tl_looped.engine.schedule import CODA, CORE, PRELUDE, HookSite
from tl_looped.lens.measures import entropy, kl_divergence
from tl_looped.model import LoopedModel
from tl_looped.report.prompts import Prompt
from tl_looped.viz import LayerAttention

TOP = 5
"""How many of the most probable tokens are kept."""
READ_POSITIONS = 64
"""Of a longer prompt, only the read-outs at this many last positions are kept."""
PATTERN_ENTRIES = 1_200_000
"""How many numbers of attention patterns a report holds, all prompts together: about 4 MB of page."""

Sites = dict[tuple[str, int], tuple[int | None, ...]]


@dataclass(frozen=True)
class Reading:
    """What a model did with one prompt. The position axis `read` is the last positions, up to `READ_POSITIONS`.

    Attributes:
        prompt: the prompt as asked for.
        token_ids: what the model read.
        tokens: the text of each; for a model without tokenizer, its id.
        answer: text of the token that is tracked.
        answer_id: its id.
        answer_given: whether it was given; if not, it is the model's own top token after the last loop.
        initial_state: where the initial state came from: "model", or "seed 0".
        top_probs: the highest probabilities of the read-out after each loop.
        top_ids: the ids of those tokens.
        top_tokens: their texts, [loop][read][top].
        entropy: of each read-out, in nats.
        kl_to_final: KL(read-out of the last loop ‖ this read-out), in nats.
        answer_prob, answer_rank: of the answer at the last position; rank 1 is the top token.
        step: ‖x_{t+1} − x_t‖ / ‖x_{t+1}‖, with x_t the state that enters loop t.
        cosine: of x_{t+1} and x_t; NaN where one is zero.
        attention: attention patterns, as many as `PATTERN_ENTRIES` allows.
        attention_note: what was left out of them; empty when nothing was.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    answer: str
    answer_id: int
    answer_given: bool
    initial_state: str
    top_probs: Float[Tensor, "loop read top"]
    top_ids: Int[Tensor, "loop read top"]
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    entropy: Float[Tensor, "loop read"]
    kl_to_final: Float[Tensor, "loop read"]
    answer_prob: Float[Tensor, " loop"]
    answer_rank: Int[Tensor, " loop"]
    step: Float[Tensor, "loop pos"]
    cosine: Float[Tensor, "loop pos"]
    attention: tuple[LayerAttention, ...]
    attention_note: str

    @property
    def first_read(self) -> int:
        """The position of the first kept read-out."""
        return len(self.tokens) - self.entropy.shape[1]


@dataclass(frozen=True)
class ReportData:
    """A model and what it did with every prompt.

    Attributes:
        model_name: the name it was loaded by.
        cfg: its config.
        n_loops: how many loops were run.
        seed: seed of the initial state; None for a model that draws none.
        n_parameters: how many weights it has.
        dtype, device: of the weights, as torch writes them.
        readings: one for each prompt.
    """

    model_name: str
    cfg: LoopedConfig
    n_loops: int
    seed: int | None
    n_parameters: int
    dtype: str
    device: str
    readings: tuple[Reading, ...]


def collect(
    model: LoopedModel,
    prompts: Iterable[Prompt],
    n_loops: int | None = None,
    seed: int | None = None,
    name: str | None = None,
    progress: bool = False,
) -> ReportData:
    """Run every prompt and keep what the report shows. All prompts are checked before the first one is run.

    Args:
        model: the model.
        prompts: what to read.
        n_loops: how many loops to run; None for the count the model was trained with.
        seed: of the initial state, where the model draws one; None for `DEFAULT_SEED`.
        name: the model's name in the report; None for the one in its config.
        progress: whether to show a progress bar.

    Raises:
        InputError: a prompt that the model can't read, an answer that is not one token, or a bad loop count or seed.
    """
    check_eval(model)
    if model.cfg.random_state and seed is None:
        seed = DEFAULT_SEED
    asked = [(prompt, *_prepare(model, prompt, n_loops, seed)) for prompt in prompts]
    if not asked:
        raise InputError("a report needs at least one prompt.")
    loops = asked[0][1].n_loops
    entries = PATTERN_ENTRIES // len(asked)
    with tqdm(total=len(asked) * (loops + 1), desc="Reading prompts", unit="loop", disable=not progress) as bar:
        readings = tuple(_read(model, prompt, run, answer, entries, bar) for prompt, run, answer in asked)
    return ReportData(
        model_name=name or model.cfg.model_name,
        cfg=model.cfg,
        n_loops=loops,
        seed=seed if model.cfg.random_state else None,
        n_parameters=sum(weight.numel() for weight in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        readings=readings,
    )


def _prepare(model: LoopedModel, prompt: Prompt, n_loops: int | None, seed: int | None) -> tuple[Run, int | None]:
    """A checked run of the prompt, and the id of its answer."""
    if prompt.token_ids is None and model.tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't read text: give token ids (--tokens 1,15,2).")
    input = torch.tensor([prompt.token_ids], dtype=torch.long) if prompt.text is None else prompt.text
    run = model.batch(input, n_loops, seed=seed)
    if prompt.answer is None:
        return run, None
    if model.tokenizer is not None:
        return run, model.to_single_token(prompt.answer)
    if not prompt.answer.isdecimal() or int(prompt.answer) >= model.cfg.d_vocab:
        raise InputError(
            f"this model has no tokenizer, so an answer must be a token id below {model.cfg.d_vocab}, "
            f"got {prompt.answer!r}."
        )
    return run, int(prompt.answer)


@torch.no_grad()
def _read(model: LoopedModel, prompt: Prompt, run: Run, answer: int | None, entries: int, bar: tqdm[Any]) -> Reading:
    """Two runs: one for the final read-out and the layers that run once, one that measures every loop as it passes."""
    n_pos = run.tokens.shape[1]
    sites, note = choose_attention(model.cfg, run.n_loops, n_pos, entries)
    patterns: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: LoopHookPoint) -> None:
        patterns[hook.name] = pattern[0].float().cpu()

    def hooked(*stacks: str) -> list[tuple[str, Any]]:
        kept = [(site, loop) for site, loops in sites.items() if site[0] in stacks for loop in loops]
        return [(_pattern_name(*site, loop), keep) for site, loop in kept]

    # A read-out of a loop runs the coda too, so the coda's patterns are kept in a run that reads out once.
    with model.hooks(hooked(PRELUDE, CODA)):
        final = model.execute(run)[0, -READ_POSITIONS:].float().log_softmax(-1)
    bar.update()
    tracked = int(final[-1].argmax()) if answer is None else answer
    meter = LoopMeter(model, run, final, tracked, bar)
    with model.hooks([("hook_state_init", meter.start), ("hook_state_post", meter.measure), *hooked(CORE)]):
        model.execute(run, return_type=None)
    return Reading(
        prompt=prompt,
        token_ids=tuple(run.tokens[0].tolist()),
        tokens=model.token_texts(run.tokens[0]),
        answer=model.token_texts(torch.tensor([tracked]))[0],
        answer_id=tracked,
        answer_given=answer is not None,
        initial_state=str(run.describe()["initial_state"]),
        attention=tuple(
            LayerAttention(*site, loops, torch.stack([patterns[_pattern_name(*site, loop)] for loop in loops]))
            for site, loops in sites.items()
        ),
        attention_note=note,
        **meter.result(),
    )


def _pattern_name(stack: str, layer: int, loop: int | None) -> str:
    return HookSite("attn.hook_pattern", stack, layer, loop).name


class LoopMeter:
    """Measures every loop while it runs; of the states it holds only the last one.

    Args:
        model: the model.
        run: the run that is measured.
        final: log probabilities after the last loop, [read, d_vocab].
        answer: the token to track at the last position.
        bar: is moved on by one a loop.
    """

    def __init__(self, model: LoopedModel, run: Run, final: Float[Tensor, "read d_vocab"], answer: int, bar: tqdm[Any]):
        self.model, self.run, self.final, self.answer, self.bar = model, run, final, answer, bar
        self.state: Tensor  # the one that entered the loop that runs
        self.rows: dict[str, list[Tensor]] = {}
        self.top_tokens: list[tuple[tuple[str, ...], ...]] = []

    def start(self, state: Float[Tensor, "1 pos d_model"], hook: LoopHookPoint) -> None:
        """A hook on the state that enters loop 0."""
        self.state = state[0].float()

    def measure(self, state: Float[Tensor, "1 pos d_model"], hook: LoopHookPoint) -> None:
        """A hook on the state that leaves a loop."""
        x, before = state[0].float(), self.state
        self._keep("step", ratio(length(x - before), length(x)))
        self._keep("cosine", cosine(x, before))
        self.state = x
        logits = self.model.readout(state, self.run.tokens)[0, -READ_POSITIONS:].float()
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        self._keep("entropy", entropy(log_probs))
        self._keep("kl_to_final", kl_divergence(self.final, log_probs))
        self._keep("answer_prob", probs[-1, self.answer])
        self._keep("answer_rank", 1 + (logits[-1] > logits[-1, self.answer]).sum())
        top = probs.topk(min(TOP, probs.shape[-1]))
        self._keep("top_probs", top.values)
        self._keep("top_ids", top.indices)
        self.top_tokens.append(tuple(self.model.token_texts(ids) for ids in top.indices))
        self.bar.update()

    def _keep(self, name: str, value: Tensor) -> None:
        self.rows.setdefault(name, []).append(value.cpu())

    def result(self) -> dict[str, Any]:
        """The measures by name, stacked over loops."""
        return {name: torch.stack(rows) for name, rows in self.rows.items()} | {"top_tokens": tuple(self.top_tokens)}


def choose_attention(cfg: LoopedConfig, n_loops: int, n_pos: int, entries: int) -> tuple[Sites, str]:
    """Which patterns to keep, at most `entries` numbers in all, and a sentence on what is left out.

    All of them where they fit. Else core layers and loops spread evenly, the first and last among them, loops before
    layers; prelude and coda are left out then.

    Returns:
        The kept loops of each (stack, layer), and the sentence, empty when nothing is left out.
    """
    fit = entries // (cfg.n_heads * n_pos**2)
    once = [(PRELUDE, layer) for layer in range(cfg.n_prelude)], [(CODA, layer) for layer in range(cfg.n_coda)]
    if len(once[0]) + cfg.n_core * n_loops + len(once[1]) <= fit:
        core: Sites = {(CORE, layer): tuple(range(n_loops)) for layer in range(cfg.n_core)}
        return dict.fromkeys(once[0], (None,)) | core | dict.fromkeys(once[1], (None,)), ""
    if fit < 2:
        return {}, (
            f"Attention is left out: with {n_pos} positions, the {cfg.n_heads} heads of a layer have "
            f"{cfg.n_heads * n_pos**2:,} numbers in one loop."
        )
    layers = spread(cfg.n_core, max(1, fit // min(n_loops, 8)))
    loops = spread(n_loops, max(2, fit // len(layers)))
    note = (
        f"To keep the page small, attention is shown for core layers {_list(layers)} of {cfg.n_core} "
        f"in loops {_list(loops)} of {n_loops}."
    )
    return {(CORE, layer): tuple(loops) for layer in layers}, note


def spread(size: int, most: int) -> list[int]:
    """At most `most` indices below `size`, evenly spaced, the first and the last among them.

    >>> spread(32, 5)
    [0, 8, 16, 23, 31]
    """
    if most >= size:
        return list(range(size))
    return [round(i * (size - 1) / (most - 1)) for i in range(most)] if most > 1 else [size - 1]


def _list(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))
