"""What the report shows of each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_looped.dynamics.measures import cosine_to, step_norm
from tl_looped.engine.checks import check_eval
from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.runs import Runs
from tl_looped.engine.schedule import CODA, PRELUDE, HookSite, LoopCount
from tl_looped.lens import LogitLens, logit_lens
from tl_looped.model import LoopedModel, check_looped
from tl_looped.observe.watching import watch
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
        answer: text of the token that is tracked: the prompt's answer, or else the model's own top token in the end.
        answer_id: its id.
        initial_state: where the initial state came from: "model", or "seed 0".
        top_probs: the highest probabilities of the read-out after each loop.
        top_ids: the ids of those tokens.
        top_tokens: their texts, [loop][read][top].
        entropy: of each read-out, in nats.
        kl_to_final: KL(read-out of the last loop ‖ this read-out), in nats.
        answer_prob, answer_rank: of the answer at the last position; rank 0 is the top token.
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
        runs: the prompts as they were run, filled up at the left.
        seed: seed of the initial state; None for a model that draws none.
        n_parameters: how many weights it has.
        dtype, device: of the weights, as torch writes them.
        readings: one for each prompt.
    """

    model_name: str
    cfg: LoopedConfig
    runs: Runs
    seed: int | None
    n_parameters: int
    dtype: str
    device: str
    readings: tuple[Reading, ...]

    @property
    def n_loops(self) -> int:
        """How many loops were run: where two stacks loop, those of the one whose state the head reads."""
        return self.runs.n_loops

    @property
    def stack(self) -> str:
        """The stack whose state the head reads: of what loops, it is the one that is looked at."""
        return self.cfg.looping_stack(self.cfg.head_stack)

    @property
    def judged(self) -> slice:
        """Positions at which read-outs are judged: where all answers are known, the answers' alone."""
        known = all(reading.prompt.answer is not None for reading in self.readings)
        return slice(-1 if known else -READ_POSITIONS, None)


def collect(
    model: LoopedModel,
    questions: Iterable[Prompt],
    n_loops: LoopCount | None = None,
    seed: int | None = None,
    name: str | None = None,
    progress: bool = False,
) -> ReportData:
    """Run every prompt and keep what the report shows. All prompts are checked before the first one is run.

    Args:
        model: the model.
        questions: what to read, each with its answer where that is known.
        n_loops: how many loops to run; None for the count the model was trained with.
        seed: of the initial state, where the model draws one; None for 0.
        name: the model's name in the report; None for the one in its config.
        progress: whether to show a progress bar.

    Raises:
        InputError: a prompt that the model can't read, an answer that is not one token, or a bad loop count or seed.
    """
    check_eval(check_looped(model, several_stacks=True))
    model.cfg.check_causal("the report")
    asked = tuple(questions)
    if not asked:
        raise InputError("a report needs at least one prompt.")
    answers = [_answer_id(model, prompt) for prompt in asked]
    inputs = [list(prompt.token_ids or ()) if prompt.text is None else prompt.text for prompt in asked]
    runs = model.prepare(inputs, n_loops, seed=seed, padding_side="left")
    tops = model.last_logits(runs).argmax(-1).tolist() if None in answers else answers
    tracked = [top if answer is None else answer for answer, top in zip(answers, tops, strict=True)]
    lens = logit_lens(model, runs, positions=slice(-READ_POSITIONS, None), targets=torch.tensor(tracked), top_k=TOP)
    entries = PATTERN_ENTRIES // len(asked)
    bar = tqdm(asked, desc="Reading prompts", unit="prompt", disable=not progress)
    readings = tuple(_read(model, runs, row, prompt, lens, entries) for row, prompt in enumerate(bar))
    return ReportData(
        model_name=name or model.cfg.model_name,
        cfg=model.cfg,
        runs=runs,
        seed=model.batch_of(runs).seed,
        n_parameters=sum(weight.numel() for weight in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        readings=readings,
    )


def _answer_id(model: LoopedModel, prompt: Prompt) -> int | None:
    """The id of a prompt's answer, where it has one."""
    if prompt.token_ids is None and model.tokenizer is None:
        raise InputError("this model has no tokenizer, so it can't read text: give token ids (--tokens 1,15,2).")
    if prompt.answer is None:
        return None
    if model.tokenizer is not None:
        return model.to_single_token(prompt.answer)
    if not prompt.answer.isdecimal() or int(prompt.answer) >= model.cfg.d_vocab:
        raise InputError(
            f"this model has no tokenizer, so an answer must be a token id below {model.cfg.d_vocab}, "
            f"got {prompt.answer!r}."
        )
    return int(prompt.answer)


def _read(model: LoopedModel, runs: Runs, row: int, prompt: Prompt, lens: LogitLens, entries: int) -> Reading:
    """One more run of a prompt, for its attention and the steps of its state, beside what the lens says of it."""
    run = model.batch_of(runs, [row])
    sites, note = choose_attention(model.cfg, run.n_loops, run.tokens.shape[1], entries)
    patterns: dict[str, Tensor] = {}
    steps: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []  # the one that entered the loop that runs

    def see(site: HookSite, x: Tensor) -> None:
        if site.in_layer:
            patterns[site.name] = x[0].float().cpu()
            return
        if states:
            steps.append((step_norm(x[0], states[0]).cpu(), cosine_to(x[0], states[0]).cpu()))
        states[:] = [x[0]]

    names = [_pattern_name(*site, loop) for site, loops in sites.items() for loop in loops]
    stack = model.cfg.head_stack
    first = HookSite("hook_state_init") if stack is None else HookSite("hook_state_pre", stack, loop=0)
    watch(model, run, [first.name, HookSite("hook_state_post", stack).name, *names], see)
    read = lens.real[row]  # the last positions, without padding
    return Reading(
        prompt=prompt,
        token_ids=tuple(run.tokens[0].tolist()),
        tokens=model.token_texts(run.tokens[0]),
        answer=lens.text(int(lens.target_ids[row, -1, 0])),
        answer_id=int(lens.target_ids[row, -1, 0]),
        initial_state=str(run.describe()["initial_state"]),
        top_probs=lens.top_probs[:, row, read],
        top_ids=lens.top_ids[:, row, read],
        top_tokens=tuple(tuple(map(tuple, loop[len(loop) - int(read.sum()) :])) for loop in lens.top_tokens(row)),
        entropy=lens.entropy[:, row, read],
        kl_to_final=lens.kl_to_final[:, row, read],
        answer_prob=lens.target_probs[:, row, -1, 0],
        answer_rank=lens.target_ranks[:, row, -1, 0],
        step=torch.stack([step for step, _ in steps]),
        cosine=torch.stack([cosine for _, cosine in steps]),
        attention=tuple(
            LayerAttention(*site, loops, torch.stack([patterns[_pattern_name(*site, loop)] for loop in loops]))
            for site, loops in sites.items()
        ),
        attention_note=note,
    )


def _pattern_name(stack: str, layer: int, loop: int | None) -> str:
    return HookSite("attn.hook_pattern", stack, layer, loop).name


def choose_attention(cfg: LoopedConfig, n_loops: int, n_pos: int, entries: int) -> tuple[Sites, str]:
    """Which patterns to keep, at most `entries` numbers in all, and a sentence on what is left out.

    All of them where they fit. Else core layers and loops spread evenly, the first and last among them, loops before
    layers; prelude and coda are left out then.

    Returns:
        The kept loops of each (stack, layer), and the sentence, empty when nothing is left out.
    """
    fit = entries // (cfg.n_heads * n_pos**2)
    core = cfg.looping_stack(cfg.head_stack)
    once = [(PRELUDE, layer) for layer in range(cfg.n_prelude)], [(CODA, layer) for layer in range(cfg.n_coda)]
    if len(once[0]) + cfg.n_core * n_loops + len(once[1]) <= fit:
        looped: Sites = {(core, layer): tuple(range(n_loops)) for layer in range(cfg.n_core)}
        return dict.fromkeys(once[0], (None,)) | looped | dict.fromkeys(once[1], (None,)), ""
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
    return {(core, layer): tuple(loops) for layer in layers}, note


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
