"""Every form of prompts says the same, to every call of the lens; each reads them once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, hook_count, make, word_tokenizer
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.lens import ENTROPY, fit_tuned_lens, logit_lens, readout_agreement, trace_exits, view_prompt
from tl_looped.lens.measures import entropy
from tl_looped.observe import observe

TEXTS = ["a b c d e", "f = g", "h a", "a c e g", "b d", "f h"]


def reader(family: str) -> LoopedModel:
    """A tiny model that reads words."""
    return make(tokenizer=word_tokenizer(), **{**TINY[family], "d_vocab": len(WORDS), "n_loops": 3})


def forms(model: LoopedModel, folder: Path, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """The same prompts in other forms; a generator is new in every call."""
    ids = [[WORDS.index(word) for word in text.split()] for text in texts]
    path = folder / "prompts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    tokenizer = word_tokenizer()
    tokens, mask = model.to_tokens_with_mask(texts)
    return {
        "a generator of texts": lambda: (text for text in texts),
        "ids of unequal length": lambda: ids,
        "a BatchEncoding": lambda: tokenizer(texts, padding=True, return_tensors="pt"),
        "a BatchEncoding of lists": lambda: tokenizer(texts),
        "a Path": lambda: path,
        "ids with their mask": lambda: {"input_ids": tokens, "attention_mask": mask},
        "prepared runs": lambda: model.prepare(texts),
    }


def numbers(result: Any) -> list[Tensor]:
    """What a result measured."""
    names = ("entropy", "kl_to_final", "target_ranks", "kl", "same_top", "statistics", "weight", "held_out_tuned_loss")
    return [getattr(result, name) for name in names if hasattr(result, name)]


@pytest.mark.parametrize("family", ["huginn", "ouro"])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, prompts: logit_lens(model, prompts, positions=None),
        readout_agreement,
        trace_exits,
        lambda model, prompts: trace_exits(model, prompts, batch_size=2, positions=[0, 1]),
        lambda model, prompts: fit_tuned_lens(model, prompts, steps=2, progress=False),
    ],
    ids=["logit_lens", "readout_agreement", "trace_exits", "trace_exits in batches", "fit_tuned_lens"],
)
def test_the_form_of_prompts_changes_nothing(family: str, call: Callable[..., Any], tmp_path: Path) -> None:
    model = reader(family)
    wanted = numbers(call(model, TEXTS))
    assert wanted
    for name, prompts in forms(model, tmp_path, TEXTS).items():
        for found, value in zip(numbers(call(model, prompts())), wanted, strict=True):
            torch.testing.assert_close(found, value, equal_nan=True, atol=1e-6, rtol=1e-5, msg=name)
    assert hook_count(model) == 0


def test_the_form_of_a_viewed_prompt_changes_nothing(tmp_path: Path) -> None:
    model = reader("ouro")
    wanted = view_prompt(model, TEXTS[0]).fragment()
    for prompts in forms(model, tmp_path, TEXTS[:1]).values():
        assert view_prompt(model, prompts()).fragment() == wanted
    assert view_prompt(model, WORDS.index("a") * torch.ones(4, dtype=torch.long), 2).loops == (0, 1)


def test_held_out_prompts_take_every_form(tmp_path: Path) -> None:
    model = reader("huginn")
    options = {"steps": 1, "progress": False, "seed": 3}
    lens = fit_tuned_lens(model, TEXTS[:2], held_out=TEXTS[2:], **options)
    wanted = lens.held_out_direct_loss
    assert (lens.made_by["initial_state"], lens.made_by["held_out_prompts"]) == ("seed 3", 4)
    for name, prompts in forms(model, tmp_path, TEXTS[2:]).items():
        held_out = model.prepare(TEXTS[2:], seed=3) if name == "prepared runs" else prompts()
        found = fit_tuned_lens(model, TEXTS[:2], held_out=held_out, **options).held_out_direct_loss
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5, msg=name)
    with pytest.raises(InputError, match=r"held_out must be whole runs of 3 loops, as the prompts are, got Runs\("):
        fit_tuned_lens(model, TEXTS[:2], held_out=model.prepare(TEXTS, 2), **options)


def test_a_state_of_each_prompt_is_the_one_it_runs_from() -> None:
    """In calls that run prompts of one length together, without the padding that the state was given with."""
    model = reader("huginn")
    state = torch.randn(len(TEXTS), 5, model.cfg.d_model)
    wanted = trace_exits(model, TEXTS, initial_state=state)
    found = trace_exits(model, TEXTS, initial_state=state, batch_size=3)
    torch.testing.assert_close(found.statistics, wanted.statistics, equal_nan=True, atol=1e-5, rtol=1e-3)
    losses = [
        fit_tuned_lens(model, TEXTS, initial_state=state, steps=1, batch_size=size, progress=False).direct_loss
        for size in (2, 6)
    ]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)
    rows = [0, 1, 2, 3, 5]  # every fifth is held out
    options: dict[str, Any] = {"kind": "direct", "site": "resid_post", "positions": None}
    lens = logit_lens(model, [TEXTS[row] for row in rows], initial_state=state[rows], **options)
    torch.testing.assert_close(lens.kl_to_final[..., lens.real].double().mean(-1), losses[0], atol=1e-6, rtol=1e-5)


def test_a_full_mask_goes_with_its_rows_into_every_batch() -> None:
    model = reader("ouro")
    tokens = torch.tensor([[4, 1, 2, 3], [4, 5, 6, 7], [4, 1, 2, 3]])
    mask = torch.ones(3, 4, 4, dtype=torch.bool).tril()
    mask[1, 3, 0] = mask[2, 2, 1] = False
    logits = model(tokens, attention_mask=mask).detach()
    assert float((logits[2] - logits[0]).abs().max()) > 0.01  # the same tokens, who see others
    for size in (1, 2):
        found = observe(model, tokens, measures=[ENTROPY], attention_mask=mask, batch_size=size, progress=False)
        expected = entropy(logits.log_softmax(-1)).mean(-1)
        torch.testing.assert_close(found[ENTROPY.name][:, -1].float(), expected, atol=1e-5, rtol=1e-5)
    assert trace_exits(model, tokens, attention_mask=mask, batch_size=2).pos.tolist() == [0, 1, 2, 3] * 3
    with pytest.raises(InputError, match=r"or \(3, 4, 4\) to say who sees whom, got \(3, 4, 3\)"):
        observe(model, tokens, measures=[ENTROPY], attention_mask=mask[..., :3], progress=False)


def test_positions_that_hold_only_padding_judge_nothing() -> None:
    model = reader("ouro")
    with pytest.raises(InputError, match="the positions hold only padding: leave out positions to judge all tokens"):
        trace_exits(model, torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]), positions=-1)


def test_a_tuned_lens_is_fitted_where_gradients_are_off() -> None:
    model = reader("ouro")
    with torch.no_grad():
        quiet = fit_tuned_lens(model, TEXTS, steps=2, progress=False)
    assert torch.equal(quiet.weight, fit_tuned_lens(model, TEXTS, steps=2, progress=False).weight)
    assert bool((quiet.weight != 0).any())
