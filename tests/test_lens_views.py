"""What the circuitsvis views of a lens hold; that they draw themselves is tested in a browser, with the page."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, make, tiny, tokens_for, word_tokenizer
from report_helpers import ATTACK, HOSTILE, hostile_model

from tl_looped import InputError, LoopedModel
from tl_looped.lens import logit_lens, view_prompt
from tl_looped.viz import LoopTokens


def reader() -> LoopedModel:
    """A tiny model that reads words."""
    return make(tokenizer=word_tokenizer(), **{**TINY["huginn"], "d_vocab": len(WORDS)})


def held(view: LoopTokens) -> dict[str, Any]:
    """The data in a view's element, as a browser reads it."""
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', view.fragment(), re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize("kind", ["exact", "direct"])
def test_a_prompts_tokens_have_the_log_probabilities_of_a_run(kind: Any) -> None:
    model, text = reader(), "a b c d e"
    view = view_prompt(model, text, 3, loop=1, kind=kind, top_k=4)
    data, tokens = held(view), model.to_tokens(text)
    assert (data["component"], data["loops"], data["start"]) == ("TokenLogProbs", [0, 1, 2], 1)
    whole = logit_lens(model, text, 3, kind=kind, positions=None, top_k=len(WORDS))
    full = torch.zeros_like(whole.top_probs).scatter(-1, whole.top_ids, whole.top_probs)[:, 0]
    for t, props in enumerate(data["props"]):
        assert props["prompt"] == text.split()
        for i, token in enumerate(tokens[0, 1:].tolist()):
            probs = full[t, i]
            assert props["correctTokenLogProb"][i] == pytest.approx(float(probs[token].log()), rel=1e-4)
            assert props["correctTokenRank"][i] == int((probs > probs[token]).sum())
            top = probs.topk(4)
            assert props["topKLogProbs"][i] == pytest.approx(top.values.log().tolist(), rel=1e-4)
            assert props["topKTokens"][i] == [WORDS[k].replace("<", "&lt;").replace(">", "&gt;") for k in top.indices]
    if kind == "exact":
        said = model(text, 3).log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        assert data["props"][-1]["correctTokenLogProb"] == pytest.approx(said.tolist(), rel=1e-4)


def test_a_probability_of_zero_is_not_shown_as_certain() -> None:
    """In JSON there is no infinity, and the component takes a gap for a log probability of 0."""
    model = make(d_vocab=4)
    with torch.no_grad():
        model.transformer.unembed.weight *= 1e4
    (first, *_) = held(view_prompt(model, torch.tensor([[0, 1, 2, 3]])))["props"]
    values = first["correctTokenLogProb"] + [value for top in first["topKLogProbs"] for value in top]
    assert all(isinstance(value, float) for value in values)
    assert min(values) < -80


def test_a_table_of_top_tokens_has_those_of_the_lens() -> None:
    model = reader()
    for site, names in (("state", ["state"]), ("resid_post", ["leaving core layer 0", "leaving core layer 1"])):
        result = logit_lens(model, ["a b c", "d e f"], 3, site=site, positions=[0, 2], loops=[0, 2])
        data = held(result.view_top_tokens(batch=1))
        (props,) = data["props"]
        assert (data["component"], data["loops"]) == ("TopkTokens", [])
        assert (props["sampleLabels"], props["firstDimensionLabels"]) == (["loop 0", "loop 2"], names)
        assert "The columns are the positions 0, 2." in result.view_top_tokens().fragment()
        probs = result.top_probs.select(result.axes.index("batch"), 1).reshape(2, len(names), 2, 5)
        ids = result.top_ids.select(result.axes.index("batch"), 1).reshape(2, len(names), 2, 5)
        for loop in range(2):
            for layer in range(len(names)):
                for pos in range(2):
                    for k in range(5):
                        shown = props["topkVals"][loop][layer][k][pos]
                        assert shown == pytest.approx(float(probs[loop, layer, pos, k]), rel=1e-4)
                        token = props["tokens"][loop][props["topkIdxs"][loop][layer][k][pos]]
                        assert token == WORDS[ids[loop, layer, pos, k]].replace("<", "&lt;").replace(">", "&gt;")


def test_no_text_of_a_token_is_html() -> None:
    model = hostile_model()
    tokens = torch.arange(model.cfg.d_vocab)[None]
    for view in (view_prompt(model, tokens), logit_lens(model, tokens, positions=None).view_top_tokens()):
        assert ATTACK not in view.fragment()
        strings = re.findall(r'"([^"]*)"', json.dumps(held(view), ensure_ascii=False))
        assert any("&lt;b&gt;" in string for string in strings)
        assert not any("<" in string for string in strings)
    assert view_prompt(model, f"The{HOSTILE[0]}").fragment().count("<script") == 1


@pytest.mark.parametrize(
    ("input", "options", "message"),
    [
        (["a b", "c d"], {}, "this looks at one prompt, got 2: call it for each"),
        ("a", {}, "the prompt has one token, which nothing predicts: pass one of at least two"),
        (
            torch.tensor([[0, 2, 3]]),
            {},
            "the prompt has padding, which would count as tokens: pass it without",
        ),
        ("a b", {"loop": 2}, r"loop 2 is out of range: 2 exist"),
        ("a b", {"kind": "tuned"}, "kind='tuned' needs translator="),
        ("a b", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_prompts_that_can_not_be_shown(input: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        view_prompt(reader(), input, **options)


def test_a_prompt_of_a_batch_that_there_is_not() -> None:
    model = tiny("ouro")
    with pytest.raises(InputError, match="batch 2 is out of range: 2 exist"):
        logit_lens(model, tokens_for(model)).view_top_tokens(batch=2)
