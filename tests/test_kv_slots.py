"""The published caches, in which loops share slots of keys and values, by name; numbers of the public code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PARITY, expected, make
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.engine.engine import Engine
from tl_looped.generation.decoding import CachedDecoder, NewStates, StatePolicy

CASES: dict[tuple[str, str], tuple[int | None, StatePolicy]] = {
    ("nanochat-recursive", "decode_cold"): (1, "fresh"),
    ("nanochat-recursive", "decode_warm"): (1, "carry"),
    ("looped-nanochat", "decode_cold"): (1, "fresh"),
    ("looped-nanochat", "decode_cold_budget2"): (2, "fresh"),
    ("looped-nanochat", "decode_cold_budget4"): (4, "fresh"),
    ("looped-nanochat", "decode_warm"): (1, "carry"),
    ("parcae", "decode_compress-s1"): (1, "fresh"),
    ("parcae", "decode_full"): (None, "fresh"),
}


def decoded(
    model: Engine, tokens: Tensor, first: int, slots: int | None, policy: StatePolicy, drawn: Tensor | None = None
) -> Tensor:
    """Logits at the end of the prompt and after each token that follows, one at a time.

    `drawn`, [batch, pos, d_model], are the initial states of all positions.
    """
    options: dict[str, Any] = {} if drawn is None else {"initial_state": drawn[:, :first]}
    runs = model.prepare(tokens[:, :first], padding_side="left", **options)
    prompt = model.batch_of(runs)
    states = NewStates(model, runs, prompt, tokens.shape[1], policy)
    if drawn is not None:
        rows = torch.arange(len(tokens))[:, None]
        states.of = lambda position_ids, carried: drawn[rows, position_ids]  # pyright: ignore[reportAttributeAccessIssue]
    decoder = CachedDecoder(model, prompt, states, tokens.shape[1], None, None, slots)
    going = torch.zeros(len(tokens), dtype=torch.bool)
    found = [decoder.next_logits(going)[0]]
    for token in tokens[:, first:].T:
        decoder.append(token)
        found.append(decoder.next_logits(going)[0])
    return torch.stack(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("family", "key"), CASES)
def test_what_a_published_cache_decodes(family: str, key: str) -> None:
    model, stored = LoopedModel.from_pretrained(PARITY / family), expected(family)
    slots, policy = CASES[family, key]
    first, wanted = int(stored["decode.prefill_len"]), stored[f"{key}.logits"]
    drawn = stored["input_states"] if family == "parcae" else None
    found = decoded(model, stored["input_ids"], first, slots, policy, drawn)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    if slots == 1:  # and that is not what a slot for every loop gives
        assert float((decoded(model, stored["input_ids"], first, None, "fresh", drawn) - wanted).abs().max()) > 0.01


def test_text_of_the_project_s_own_engine() -> None:
    model, stored = LoopedModel.from_pretrained(PARITY / "nanochat-recursive"), expected("nanochat-recursive")
    prompt = stored["input_ids"][:1, :-3]
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens"}
    found: Any = model.generate(prompt, 6, new_states="carry", kv_slots=1, **options)
    assert found[0].tolist() == stored["generated_greedy"].tolist()


@torch.no_grad()
def test_as_many_slots_as_loops_change_nothing() -> None:
    model = make(injection="concat_linear", n_loops=3)
    tokens = torch.arange(9)[None]
    for slots in (3, 7, None):
        torch.testing.assert_close(
            decoded(model, tokens, 4, slots, "fresh"), model(tokens)[:, 3:], rtol=1e-4, atol=1e-5
        )
    one = decoded(model, tokens, 4, 1, "fresh")
    torch.testing.assert_close(one[:, 0], model(tokens[:, :4])[:, -1], rtol=1e-4, atol=1e-5)  # a prompt is a whole run
    assert float((one[:, 1:] - model(tokens)[:, 4:]).abs().max()) > 1e-3


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_slots": 0}, "kv_slots must be at least 1, got 0"),
        ({"kv_slots": 1, "use_past_kv_cache": False}, "kv_slots=1 does not go with use_past_kv_cache=False"),
        ({"new_states": "carry", "use_past_kv_cache": False}, "new_states='carry' needs the key-value cache here"),
        ({"new_states": "zeros"}, "new_states='zeros', but .* starts every position from its embedding"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    model = make(injection="concat_linear", n_loops=2)
    with pytest.raises(InputError, match=message):
        model.generate(torch.arange(4)[None], 2, stop_at_eos=False, **options)
    hrm = LoopedModel.from_pretrained(PARITY / "hrm-text")
    with pytest.raises(InputError, match="kv_slots=1 does not go with two stacks that loop"):
        hrm.generate(torch.arange(4)[None], 2, stop_at_eos=False, kv_slots=1, prefix_length=0)
