"""What wrong options of generation get: an error with the value and what mends it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, hook_count, make, tiny, tokens_for, word_tokenizer

from tl_looped import InputError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer, got 2.0"),
    (
        {"max_new_tokens": 28},
        "the prompt of 5 tokens and max_new_tokens=28 make 33, more than the model's context of 32: max_new_tokens can "
        "be at most 27",
    ),
    ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ({"temperature": 0}, "temperature must be a finite number above 0, got 0: .* pass do_sample=False"),
    ({"temperature": -1.0}, "temperature must be a finite number above 0, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be a finite number above 0, got nan"),
    ({"temperature": float("inf")}, "temperature must be a finite number above 0, got inf"),
    ({"temperature": "hot"}, "temperature must be a finite number above 0, got 'hot'"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
    ({"top_p": 0.0}, r"top_p must be a number above 0 and at most 1, got 0.0"),
    ({"top_p": 1.1}, r"top_p must be a number above 0 and at most 1, got 1.1"),
    ({"top_p": True}, r"top_p must be a number above 0 and at most 1, got True"),
    (
        {"do_sample": False, "temperature": 0.7},
        "do_sample=False takes the most probable token, so temperature=0.7 would",
    ),
    ({"do_sample": False, "top_k": 3, "top_p": 0.5}, "so top_k=3 and top_p=0.5 would change nothing"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": 0.5}, "seed must be an integer of at least 0, got 0.5"),
    ({"new_states": "warm"}, "new_states must be 'fresh', 'zeros' or 'carry', got 'warm'"),
    ({"stop_at_eos": False, "eos_token_id": 3}, "stop_at_eos=False, but eos_token_id=3 says where to stop"),
    ({"eos_token_id": 12}, r"eos_token_id 12 is out of the vocabulary \[0, 12\)"),
    ({"eos_token_id": [1, -1]}, "eos_token_id must be at least 0, got -1"),
    ({"eos_token_id": []}, "eos_token_id must be a token id or a list of at least one"),
    ({"eos_token_id": "a"}, "eos_token_id must be a token id or a list of at least one, got 'a'"),
    ({"eos_token_id": True}, "eos_token_id must be an integer, got True"),
    ({"stop_strings": ""}, "stop_strings must be a text or a list of at least one, none empty, got ''"),
    ({"stop_strings": []}, "stop_strings must be a text"),
    ({"stop_strings": ["a", 3]}, "stop_strings must be a text"),
    ({"padding_side": "right"}, "padding_side='right', but new tokens must follow real ones"),
    ({"padding_side": "middle"}, "padding_side='middle'"),
    ({"return_type": "text"}, "return_type must be 'input', 'str', 'tokens' or 'result', got 'text'"),
    ({"return_type": None}, "return_type must be 'input', 'str', 'tokens' or 'result', got None"),
    ({"watch": 3}, "watch must be a function of a LoopEnd and a position, got 3"),
    ({"use_past_kv_cache": False, "watch": print}, "watch needs the key-value cache"),
    ({"use_past_kv_cache": False, "exit_rule": object()}, "exit_rule needs the key-value cache"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a finite number above 0, got 0.0.*1.0 is none"),
    ({"freq_penalty": -1.0}, "freq_penalty must be a finite number of at least 0, got -1.0.*0.0 is none"),
    ({"logits_processor": [3]}, "logits_processor is a list of functions of tokens and logits, .* got 3 in it"),
    ({"stopping_criteria": 3}, "stopping_criteria is a list of functions of tokens and logits, .* got 3 in it"),
    ({"output_logits": True, "return_type": "str"}, "logits come in a result: leave out return_type='str'"),
    ({"names_filter": "hook_embed"}, "names_filter says what a cache keeps: pass return_cache=True"),
    ({"device": "cpu"}, "device says what a cache keeps: pass return_cache=True"),
    ({"return_cache": True, "kv_slots": 1}, "with kv_slots tokens see keys, .* that no run of the model has"),
    ({"return_cache": True, "new_states": "carry"}, "with new_states='carry' tokens see keys, or start from states"),
    ({"return_cache": True, "names_filter": "blocks.9.hook_resid_post"}, "blocks.9.hook_resid_post"),
    ({"attention_mask": torch.tensor([[1, 1, 0, 1, 0]])}, r"rows \[0\] end in padding, and a new token must follow"),
    ({"attention_mask": torch.ones(1, 5, 5)}, r"attention_mask must be \[batch, pos\] here, got shape \(1, 5, 5\)"),
    ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must have the shape of the tokens, \(1, 5\)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_option_is_an_error_before_anything_runs(options, message, as_a_user):
    model, ran = make(tokenizer=word_tokenizer(), d_vocab=len(WORDS), **TINY["huginn"]), []
    hooks = [("hook_embed", lambda x, hook: ran.append(hook.name))]
    with model.hooks(fwd_hooks=hooks), pytest.raises(InputError, match=message):
        model.generate("a = b ; c", verbose=False, **options)
    assert ran == []
    assert hook_count(model) == 0


def test_a_prompt_that_fills_the_context():
    model = tiny("ouro")
    with pytest.raises(InputError, match="context of 32: shorten the prompt"):
        model.generate(tokens_for(model, pos=32), 1, stop_at_eos=False)
    with pytest.raises(InputError, match="33 tokens, more than the model's context of 32"):
        model.generate(tokens_for(model, pos=33), 1, stop_at_eos=False)


@pytest.mark.parametrize(("family", "policy"), [("ouro", "zeros"), ("ouro", "carry"), ("added", "zeros")])
def test_states_that_start_from_the_prelude_have_no_policy(family, policy):
    model = tiny(family)
    with pytest.raises(InputError, match=f"new_states='{policy}', but custom starts every position from its emb"):
        model.generate(tokens_for(model), 1, stop_at_eos=False, new_states=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "neither this model's config nor a tokenizer says which token ends a text: pass eos_token_id=..., or stop",
        ),
        ({"stop_at_eos": False, "stop_strings": "a"}, "stop_strings needs a tokenizer, and this model has none"),
        ({"stop_at_eos": False, "return_type": "str"}, "return_type='str', but this model has no tokenizer"),
    ],
)
def test_what_needs_a_tokenizer(options, message):
    model = tiny("ouro")
    with pytest.raises(InputError, match=message):
        model.generate(tokens_for(model), 1, **options)
    with pytest.raises(InputError, match="this model has no tokenizer, so it can't read text"):
        model.generate("a", 1)


def test_rows_of_padding_at_the_right():
    """By the tokenizer's padding; a mask may say that it is none."""
    model = make(tokenizer=word_tokenizer(), d_vocab=len(WORDS))
    tokens = torch.tensor([[2, 3, 4], [5, 0, 0], [6, 7, 0]])
    with pytest.raises(InputError, match=r"rows \[1, 2\] end in padding.*pad at the left, or pass attention_mask"):
        model.generate(tokens, 1)
    assert model.generate(tokens, 1, attention_mask=torch.ones_like(tokens), verbose=False).shape == (3, 4)


def test_rows_that_end_need_a_filler():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    model = make(tokenizer=tokenizer, d_vocab=len(WORDS))
    tokens = torch.tensor([[2, 3], [4, 5]])
    with pytest.raises(InputError, match="has neither a padding nor an end-of-text token: set tokenizer.pad_token"):
        model.generate(tokens, 1, stop_strings="a")
    assert model.generate(tokens[:1], 1, stop_strings="a", verbose=False).shape == (1, 3)
    assert model.generate(tokens, 1, verbose=False).shape == (2, 3)


def test_an_option_that_there_is_not():
    model = tiny("ouro")
    with pytest.raises(InputError, match="generate has no argument 'num_beams'"):
        model.generate(tokens_for(model), 1, stop_at_eos=False, num_beams=2)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"logits_processor": lambda tokens, logits: logits[0]},
            r"gave torch.float\d+ of shape \(12,\): it must give logits",
        ),
        ({"logits_processor": lambda tokens, logits: None}, "gave NoneType: it must give logits of shape"),
        (
            {"stopping_criteria": lambda tokens, logits: 1},
            r"gave torch.int64 of shape \(\): it must give True or False",
        ),
    ],
)
def test_what_functions_give_is_checked_as_it_comes(options: dict[str, Any], message: str):
    model = make(tokenizer=word_tokenizer(), d_vocab=len(WORDS), **TINY["huginn"])
    with pytest.raises(InputError, match=message):
        model.generate("a = b ; c", verbose=False, **options)
