"""What a reader would say about a model and its numbers, in plain sentences. Only what the numbers show."""

from __future__ import annotations

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.numbers import median
from tl_looped.engine.words import describe
from tl_looped.report.data import Reading, ReportData
from tl_looped.viz.style import show_token


def percent(ratio: float) -> str:
    """A ratio in percent, to two significant digits; from 10% on in whole percents.

    >>> percent(0.0512), percent(0.37), percent(1.0), percent(0.9999999), percent(4e-6)
    ('5.1%', '37%', '100%', '>99.99%', '0.0004%')
    """
    value = 100 * ratio
    if 99 < value < 100:  # not 100 while something is missing
        return f"{value:.2f}%" if value < 99.99 else ">99.99%"
    if value >= 10:
        return f"{value:.0f}%"
    text = f"{value:.2g}"
    return f"{float(text):.10f}".rstrip("0").rstrip(".") + "%" if "e" in text else f"{text}%"


def model_in_words(data: ReportData) -> list[tuple[str, str]]:
    """The choices that make up the model, as (name, what it is) in the order of the drawing."""
    cfg = data.cfg
    loops = f"{data.n_loops} loops" + (f" (trained with {cfg.n_loops})" if data.n_loops != cfg.n_loops else "")
    depth = cfg.schedule(data.n_loops).depth
    heads = f"{cfg.n_heads} heads of {cfg.d_head}"
    if cfg.kv_heads != cfg.n_heads:
        heads += f", which share {cfg.kv_heads} keys and values"
    words = [
        ("family", cfg.family),
        ("layers", f"{_stacks(cfg)}; with {loops}, {depth} layer calls in one run"),
        ("width", f"d_model {cfg.d_model}, MLP {cfg.d_mlp}, {heads}; vocabulary {cfg.d_vocab:,}"),
        ("weights", f"{data.n_parameters:,} in {data.dtype}, run on {data.device}"),
    ]
    return words + [(name, state_in_words(data) if name == "initial state" else text) for name, text in describe(cfg)]


def state_in_words(data: ReportData) -> str:
    """What enters loop 0, and the seed that drew it."""
    words = data.cfg.state_in_words()
    return words if data.seed is None else f"{words}, seed {data.seed}"


def _stacks(cfg: LoopedConfig) -> str:
    counts = [(cfg.n_prelude, "prelude"), (cfg.n_core, "core"), (cfg.n_coda, "coda")]
    return ", ".join(f"{n} {name} layer{'s' if n > 1 else ''}" for n, name in counts if n)


def answer_in_words(reading: Reading) -> str:
    """When the answer comes to the top of the read-out at the last position, and whether it stays."""
    answer = f"“{show_token(reading.answer)}”"
    ranks = reading.answer_rank.tolist()
    last, prob = len(ranks) - 1, percent(float(reading.answer_prob[-1]))
    end = f"after the last loop its probability is {prob}"
    if ranks[-1] != 0:
        top = f"“{show_token(reading.top_tokens[-1][-1][0])}”"
        seen = [t for t, rank in enumerate(ranks) if rank == 0]
        before = f" It was the top token after loop {seen[-1]}, and lost that place." if seen else ""
        return f"{answer} is not the top token at the end: {end}, rank {ranks[-1]:,}; the top token is {top}.{before}"
    settled = last
    while settled > 0 and ranks[settled - 1] == 0:
        settled -= 1
    if settled == 0:
        return f"{answer} is the top token after every loop, from loop 0 on; {end}."
    if settled == last:
        return f"{answer} becomes the top token only after the last loop, loop {last}, with probability {prob}."
    return f"{answer} is the top token after loop {settled} and every later one; {end}."


def convergence_in_words(reading: Reading) -> str:
    """How much the last loop still moves the state at the last position, and at the median position."""
    steps = reading.step[:, -1].tolist()
    here, middle = steps[-1], f"the median position {percent(float(median(reading.step[-1])))}"
    if here < 1e-3:
        moves = f"The state at the last position has all but stopped: the last loop moves it by {percent(here)} of its "
        moves += f"length, {middle}."
    else:
        moves = f"The state at the last position still moves {percent(here)} of its length in the last loop, {middle}."
    if len(steps) < 3:
        return moves
    # Loop 0 starts from the initial state, which may be on another scale, so it is not compared with the others.
    largest = max(range(1, len(steps)), key=steps.__getitem__)
    if largest == len(steps) - 1:
        return f"{moves} That is the last position’s largest step after loop 0."
    return f"{moves} The last position’s largest step after loop 0 was {percent(steps[largest])}, in loop {largest}."
