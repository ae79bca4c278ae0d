"""What bad input gets from a lens and from the agreement of loops: a message with the value and the remedy, no run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, make, parity, tiny, tokens_for, word_tokenizer

from tl_looped import InputError, LoopedModel
from tl_looped.lens import fit_tuned_lens, logit_lens, readout_agreement

pytestmark = pytest.mark.usefixtures("as_a_user")


def reader() -> LoopedModel:
    """A tiny model that reads words."""
    return make(tokenizer=word_tokenizer(), **{**TINY["ouro"], "d_vocab": len(WORDS)})


def refused(call: Any, model: LoopedModel, message: str, input: Any = "a b c", **options: Any) -> None:
    """The call raises this message, and nothing was run."""
    ran: list[str] = []
    hook = ("hook_embed", lambda x, hook: ran.append(hook.name))
    with model.hooks([hook]), pytest.raises(InputError, match=message):
        call(model, input, **options)
    assert ran == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("a b", r"'a b' is 2 tokens, not one: \['a', 'b'\]"),
        (["a", "c d e"], r"'c d e' is 3 tokens, not one: \['c', 'd', 'e'\]"),
        ("Paris", "the model's tokenizer can't read"),
        ("", "an empty prompt has nothing to run"),
        (12, r"target 12 is out of the vocabulary \[0, 12\)"),
        (-1, r"target -1 is out of the vocabulary \[0, 12\)"),
        (["a", True], "a target must be a text or a token id, got True"),
        ([1.5], "a target must be a text or a token id, got 1.5"),
        ([], "targets is empty: leave it out to follow the run's own top token"),
        (["a", 2], r"targets names a token twice: \['a', 2\]"),
        (["b", "b"], r"targets names a token twice: \['b', 'b'\]"),
        (
            torch.tensor([1, 2]),
            r"one for each row, \[1\], or for each row and position read, \[1, 1\], got shape \(2,\)",
        ),
        (torch.tensor([[1, 2, 3]]), r"got shape \(1, 3\): pass a list to follow several tokens everywhere"),
        (torch.tensor(3), r"got shape \(\)"),
        (torch.tensor([12]), r"target 12 is out of the vocabulary \[0, 12\)"),
        (torch.tensor([[-100]]), r"target -100 is out of the vocabulary"),
        (torch.tensor([1.0]), "targets must be token ids, got torch.float32"),
        (torch.tensor([True]), "targets must be token ids, got torch.bool"),
    ],
)
def test_targets(targets: Any, message: str) -> None:
    refused(logit_lens, reader(), message, targets=targets)


def test_a_text_as_target_needs_a_tokenizer() -> None:
    model = tiny("ouro")
    refused(logit_lens, model, "this model has no tokenizer, so it can't read text", tokens_for(model), targets="a")


@pytest.mark.parametrize("call", [logit_lens, readout_agreement])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 3}, r"position 3 is out of range: 3 exist, so it must lie in \[-3, 2\]"),
        ({"positions": [0, -4]}, r"position -4 is out of range: 3 exist"),
        ({"positions": [1, -2]}, r"positions names one twice: \[1, 1\]"),
        ({"positions": []}, "positions is empty, so nothing would be read: leave it out for all"),
        ({"positions": slice(3, None)}, r"positions slice\(3, None, None\) picks none of 3 positions"),
        ({"positions": 1.0}, r"positions must be indices, such as \[0, -1\], got 1.0"),
        ({"positions": [0.5]}, r"position must be an integer, got 0.5 \(float\)"),
        ({"positions": [True]}, r"position must be an integer, got True \(bool\)"),
        ({"loops": [2]}, r"loop 2 is out of range: 2 exist, so it must lie in \[-2, 1\]"),
        ({"loops": []}, "loops is empty"),
        ({"loops": [0, 0, -1]}, r"loops names one twice: \[0, 0, 1\]"),
        ({"loops": -1}, r"loops must be indices, such as \[0, -1\], got -1"),
        ({"kind": "logit"}, "kind must be one of 'exact', 'direct', 'coda', 'tuned', 'jacobian', got 'logit'"),
        ({"kind": "coda"}, "custom has no coda: pass kind='exact' or kind='direct'"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
        ({"stop_at_loop": 1}, "has no argument 'stop_at_loop'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_places_and_kinds(call: Any, options: dict[str, Any], message: str) -> None:
    refused(call, reader(), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "attn_out"}, "site must be one of 'state', 'resid_pre', 'resid_mid', 'resid_post', got 'attn_out'"),
        ({"layers": [0]}, "the state leaves the whole loop, not a layer: leave out layers, or pass site='resid_post'"),
        ({"site": "resid_mid", "layers": [2]}, r"layer 2 is out of range: 2 exist"),
        ({"site": "resid_mid", "layers": []}, "layers is empty"),
        ({"site": "resid_mid", "layers": 0}, r"layers must be indices, such as \[0, -1\], got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"kind": "tuned"}, "kind='tuned' needs translator=: fit one with tl_looped.lens.fit_tuned_lens"),
    ],
)
def test_sites_layers_and_tops(options: dict[str, Any], message: str) -> None:
    refused(logit_lens, reader(), message, **options)


def test_a_translator_for_another_kind_of_lens() -> None:
    """It is named before anything is asked of it."""
    message = "a translator belongs to kind='tuned' or kind='jacobian', got kind='exact'"
    refused(logit_lens, reader(), message, translator=object())


def test_a_translator_that_is_none() -> None:
    refused(logit_lens, reader(), "translator must be a TunedLens, .* got 'mine'", kind="tuned", translator="mine")


def test_runs_of_a_part() -> None:
    model = tiny("ouro")
    tokens = tokens_for(model)
    state = model(tokens, stop_at_loop=1).detach()
    message = "a lens reads whole runs: leave out start_at_loop and stop_at_loop"
    for prepared in (
        model.prepare(tokens, start_at_loop=1, initial_state=state),
        model.prepare(tokens, stop_at_loop=1),
    ):
        for call in (logit_lens, readout_agreement, fit_tuned_lens):
            refused(call, model, message, prepared)


def test_agreement_needs_two_loops_and_the_models_own_words() -> None:
    message = r"agreement compares loops, got loops=\[1\]: pass two or more"
    refused(readout_agreement, reader(), message, loops=[-1])
    refused(readout_agreement, reader(), r"got loops=\[0\]: pass two or more", n_loops=1)
    refused(
        readout_agreement, reader(), "agreement compares what the model itself says: pass kind='exact'", kind="tuned"
    )


def test_more_top_tokens_than_there_are_are_all_of_them() -> None:
    model = parity("ouro")
    found = logit_lens(model, tokens_for(model), top_k=10**6)
    assert found.top_ids.shape[-1] == model.cfg.d_vocab
