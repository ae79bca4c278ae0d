"""The report's sections on read-outs say what plain runs say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TINY, make, parity
from report_helpers import ATTACK, hostile_model, numbered

from tl_looped import LoopedModel
from tl_looped.lens import trace_exits
from tl_looped.report import Prompt, ReportData, built_in, collect, report_page
from tl_looped.report.readouts import (
    agreement_in_words,
    exits_in_words,
    exits_section,
    lens_section,
    readout_sections,
    top_tokens_in_words,
)

IDS = ((5, 9, 2, 30, 7), (3, 8), (1, 6, 4))  # no token twice in a row: states that tie are told apart by rounding


def figures(html: str) -> list[dict[str, Any]]:
    """The plotly figures of a section."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html)]


def report_data(family: str, n_loops: int = 4, **options: Any) -> tuple[LoopedModel, ReportData]:
    model = parity(family)
    return model, collect(model, [numbered(*ids) for ids in IDS], n_loops=n_loops, **options)


@pytest.mark.parametrize("family", ["huginn", "ouro-gqa", "retrofit-olmo2"])
def test_the_lens_section_draws_what_a_stopped_run_says(family: str) -> None:
    """The last core layer's row is the read-out of the loop; with the report's seed."""
    model, data = report_data(family, seed=3)
    shown = figures(lens_section(model, data).html)
    assert len(shown) == len(IDS) + 1
    for ids, drawn in zip(IDS, shown, strict=False):
        (cells,) = drawn["data"]
        assert len(cells["z"][0]) == model.cfg.n_core
        for t, row in enumerate(cells["z"]):
            probs = model(torch.tensor([ids]), t + 1, seed=3)[0, -1].softmax(-1).detach()
            assert row[-1] == pytest.approx(float(probs.max()), rel=1e-3)
            assert cells["text"][t][-1] == str(int(probs.argmax()))


def test_agreement_is_over_all_positions_of_all_prompts() -> None:
    model, data = report_data("retrofit-llama")
    html = lens_section(model, data).html
    same, kl = (panel["z"] for panel in figures(html)[-1]["data"])
    logs = torch.cat([torch.stack([model(torch.tensor([ids]), t + 1)[0] for t in range(4)]) for ids in IDS], dim=1)
    logs = logs.log_softmax(-1).detach()
    for i in range(4):
        for j in range(4):
            wanted = (logs[i].exp() * (logs[i] - logs[j])).sum(-1).mean()
            assert kl[i][j] == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
            agree = (logs[i].argmax(-1) == logs[j].argmax(-1)).double().mean()
            assert same[i][j] == pytest.approx(float(agree), rel=1e-4)
    assert f"has the last loop’s top token at {100 * same[0][3]:.0f}% of 10 positions" in html


@pytest.mark.parametrize("family", ["huginn", "ouro"])
def test_the_exits_section_names_the_best_rule(family: str) -> None:
    """Its table and its sentence, from traces of each prompt alone."""
    model, data = report_data(family, 7, seed=2)
    html = exits_section(model, data).html
    alone = [trace_exits(model, torch.tensor([ids]), n_loops=7, seed=2) for ids in IDS]
    parts = {
        name: torch.cat([getattr(trace, name) for trace in alone], dim=-1)
        for name in ("batch", "pos", "statistics", "kl_to_final", "same_top")
    }
    best = replace(alone[0], **parts).curves().most_saved(0.99).to_dict("records")
    assert len(best) >= 1
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", html)
    assert [row[0] for row in rows] == [row["rule"] for row in best]
    for found, row in zip(rows, best, strict=True):
        threshold, _, unit = found[1].partition(" ")
        assert float(threshold) == pytest.approx(row["threshold"], rel=6e-3) and unit == row["unit"]
        assert float(found[2]) == pytest.approx(7 - row["saved"], abs=6e-3)
        assert float(found[3].strip("%>")) == pytest.approx(100 * row["agreement"], abs=0.6)
        assert float(found[4]) == pytest.approx(row["kl"], rel=6e-2, abs=1e-9)
    assert "on 10 positions of all prompts" in html
    assert (
        f"the best rule is {rows[0][0]}, with the threshold {rows[0][1]}: tokens stop after {rows[0][2]} of 7" in html
    )


@pytest.mark.usefixtures("as_a_user")
def test_the_sections_of_an_embedded_model_say_what_a_full_run_says() -> None:
    model = LoopedModel.from_pretrained("looped-hops", device="cpu")
    prompts = built_in("looped-hops")
    data = collect(model, prompts)
    lens, exits = readout_sections(model, data)
    for prompt in prompts:
        tops = [model.to_str_tokens(model(prompt.name, t + 1)[0, -1:].argmax(-1))[0] for t in range(6)]
        words = next(
            words for words in re.findall(r'<p class="finding">(.*?)</p>', lens.html) if f"“{tops[0]}”" in words
        )
        assert f"“{tops[-1]}”" in words or tops[0] == tops[-1]
    # The answers are due at the last position alone, so nothing is averaged over others.
    tops = torch.stack([model(prompt.name, t + 1)[0, -1].argmax() for t in range(6) for prompt in prompts]).view(6, 3)
    share = float((tops[0] == tops[-1]).double().mean())
    assert f"top token at {share:.0%} of 3 positions" in lens.html
    assert "over the last position of 3 prompts, where the answer is due" in lens.html
    assert "on the last position of 3 prompts, where the answer is due" in exits.html
    page = report_page(data, extra=[lens, exits])
    assert page.index("What each layer would say") < page.index("When it could stop") < page.index("Prompt 1 of 3")


def test_one_loop_has_nothing_to_compare() -> None:
    model, data = report_data("ouro", 1)
    (section,) = readout_sections(model, data)
    assert "Which loops agree" not in section.html
    assert len(figures(section.html)) == len(IDS)


def test_of_many_loops_some_are_shown() -> None:
    model = make(**TINY["added"])
    data = collect(model, [numbered(1, 2, 3)], n_loops=40)
    html = lens_section(model, data).html
    assert "Of so many loops and layers some are shown, evenly spaced." in html
    assert "The read-outs after 12 loops of 40, each beside each, over 3 positions" in html
    lens, agreement = figures(html)
    assert len(lens["data"][0]["z"]) == 32
    assert len(agreement["data"][0]["z"]) == 12
    assert agreement["data"][0]["customdata"][0][-1] == [0, 39]


def test_no_text_of_a_model_is_html() -> None:
    model = hostile_model()
    data = collect(model, [Prompt(f"The{' <b>bold</b>'}\n")])
    for section in readout_sections(model, data):
        assert ATTACK not in section.html
        assert "<b>bold" not in section.html


# Words.


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([4, 4, 4, 4], "The top token is “·a” after every loop."),
        ([4, 4, 5, 5], "After loop 0 the top token is “·a”. It changes to “·b” in loop 2."),
        (
            [4, 5, 4, 6],
            "top token is “·a”. It changes to “·b” in loop 1, back to “·a” in loop 2 and to “·c” in loop 3.",
        ),
        (
            [4, 5] * 5,
            "back to “·b” in loop 7 and back to “·a” in loop 8. It changes 9 times in all, at last to “·b” in loop 9.",
        ),
    ],
)
def test_changes_of_the_top_token_in_words(ids: list[int], said: str) -> None:
    (reading,) = collect(hostile_model(), [numbered(1, 2)], n_loops=len(ids)).readings
    names = {4: " a", 5: " b", 6: " c"}
    top_ids = torch.tensor(ids)[:, None, None].expand(-1, 2, 5)
    tops = tuple((("x",) * 5, (names[token],) * 5) for token in ids)
    assert top_tokens_in_words(replace(reading, top_ids=top_ids, top_tokens=tops)).endswith(said)


@pytest.mark.parametrize(
    ("with_last", "said"),
    [
        ([1.0, 1.0, 1.0], "at 100% of 50 positions, and that after every later loop at all of them."),
        ([0.5, 0.8, 1.0], "at 50% of 50 positions; even that after loop 1 has another one at 20% of them."),
        ([0.3, 1.0, 1.0], "at 30% of 50 positions; that after loop 1 and every later one at all of them."),
        ([0.3, 0.995, 1.0], "at 30% of 50 positions; that after loop 1 and every later one at 99.50% of them or more."),
        ([1.0, 0.5, 1.0], "at 100% of 50 positions; even that after loop 1 has another one at 50% of them."),
        ([0.5, 1.0, 0.5, 1.0, 1.0], "at 50% of 50 positions; that after loop 3 and every later one at all of them."),
    ],
)
def test_agreement_in_words(with_last: list[float], said: str) -> None:
    assert agreement_in_words(torch.tensor(with_last, dtype=torch.float64), 50).endswith(said)


def test_exits_in_words() -> None:
    best = [
        {"rule": "KL", "unit": "nats", "threshold": 0.01234, "saved": 2.5, "agreement": 1.0, "kl": 0.001},
        {"rule": "gate", "unit": "share", "threshold": 0.5, "saved": 1.0, "agreement": 1.0, "kl": 0.001},
    ]
    price = "If 99% of the tokens are to keep the full run’s top token, "
    words = exits_in_words(best, ["gate", "KL", "entropy"], 4)
    assert words == (
        f"{price}the best rule is KL, with the threshold 0.0123 nats: tokens stop after 1.50 of 4 loops on average. "
        "Nothing is saved at that price by entropy."
    )
    assert exits_in_words(best, ["gate", "KL"], 4).endswith("on average.")
    assert exits_in_words(best, ["gate", "KL", "a", "b", "c"], 4).endswith("at that price by a, b and c.")
    assert exits_in_words([], ["gate", "KL"], 4) == f"{price}no rule saves anything: every loop counts."
