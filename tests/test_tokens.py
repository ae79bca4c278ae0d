"""One beginning of text, chat messages, and token ids as text in all forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import make, tiny, word_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tl_looped import InputError, LoopedModel
from tl_looped.engine.tokens import apply_chat, tokenize

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    " {{ {'system': 'd', 'user': 'e', 'assistant': 'f'}[m.role] }} {{ m.content }} ;{% endfor %}"
    "{% if add_generation_prompt %} f{% endif %}"
)
ASK = [{"role": "user", "content": "a b"}]


@pytest.fixture(params=[True, False])
def talker(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template that writes a beginning of text; it adds one to text of itself, or does not."""
    tokenizer = word_tokenizer(bos=request.param)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# One beginning of text.


def test_a_text_that_begins_already_gets_no_second_beginning(talker):
    text = talker.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<bos>")
    for prepend_bos in (None, True, False):
        assert tokenize(talker, text, prepend_bos=prepend_bos) == apply_chat(talker, ASK)
    assert tokenize(talker, "<bos>") == [1]
    assert tokenize(talker, "<bos> <bos> a", prepend_bos=False) == [1, 1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_with_and_without_a_beginning(side):
    tokenizer = word_tokenizer(bos=True)
    tokens = make(tokenizer=tokenizer).to_tokens(["<bos> a b", "a b c", "<bos> a"], padding_side=side)
    wanted = (
        [[0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 1, 2]] if side == "left" else [[1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 0, 0]]
    )
    assert tokens.tolist() == wanted


def test_what_else_a_tokenizer_adds_stays():
    tokenizer = word_tokenizer(eos_token=";")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A ;", special_tokens=[("<bos>", 1), (";", 11)]
    )
    assert tokenize(tokenizer, "<bos> a") == tokenize(tokenizer, "a") == [1, 2, 11]


def test_a_run_on_templated_text_is_a_run_on_its_tokens(talker):
    model = make(tokenizer=talker)
    text = talker.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    wanted = model(torch.tensor([apply_chat(talker, ASK)]))
    assert torch.equal(model(text), wanted)
    assert model.to_tokens(text).tolist()[0][:2] == [1, 6]


# Messages.


def test_messages_become_tokens(talker):
    assert apply_chat(talker, ASK) == [1, 6, 2, 3, 11, 7]
    more = [*ASK, {"role": "assistant", "content": "c"}, {"role": "user", "content": "", "name": "x"}]
    assert apply_chat(talker, more) == [1, 6, 2, 3, 11, 7, 4, 11, 6, 11, 7]
    assert apply_chat(talker, ASK, system="h") == [1, 5, 9, 11, 6, 2, 3, 11, 7]
    assert ASK == [{"role": "user", "content": "a b"}]  # untouched


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r'messages must be a list of \{"role": ..., "content": ...\}, got \[\]'),
        ("a b", r"messages must be a list of .*, got 'a b'"),
        (ASK[0], r"messages must be a list of .*, got \{'role'"),
        (None, r"messages must be a list of .*, got None"),
        (["a"], r"message 0 must be \{\"role\": text, \"content\": text\}, got 'a'"),
        ([*ASK, {"role": "user"}], r"message 1 must be .*, got \{'role': 'user'\}"),
        ([{"content": "a"}], r"message 0 must be .*, got \{'content': 'a'\}"),
        ([{"role": "", "content": "a"}], r"message 0 must be"),
        ([{"role": "user", "content": ["a"]}], r"message 0 must be .*, got .*\['a'\]"),
        ([{"role": "assistant", "content": "a"}], r"chat template can't read the messages: the user speaks first"),
        ([{"role": "user", "content": "z"}], r"chat template can't read the messages: .*UNK"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_messages_that_can_not_be_read(talker, messages, message: str):
    with pytest.raises(InputError, match=message):
        apply_chat(talker, messages)


def test_what_messages_need():
    with pytest.raises(InputError, match=r"no tokenizer, so it can't read messages: pass token ids, or set model.tok"):
        apply_chat(None, ASK)
    with pytest.raises(
        InputError, match=r"no chat template, so it can't read messages: pass text, or set tokenizer.chat"
    ):
        apply_chat(word_tokenizer(), ASK)
    silent = word_tokenizer()
    silent.chat_template = "{# nothing #}"
    with pytest.raises(InputError, match=r"chat template makes no tokens of \[\{"):
        apply_chat(silent, ASK)
    silent.chat_template = TEMPLATE
    with pytest.raises(
        InputError, match=r"system='d', but the messages begin with one of the role 'system': leave one"
    ):
        apply_chat(silent, [{"role": "system", "content": "a"}, *ASK], system="d")


# Words that a tokenizer does not know.


def test_the_word_that_can_not_be_read_is_named():
    """The piece that the tokenizer looks up, where it splits words itself."""
    model = LoopedModel.from_pretrained("looped-hops")
    with pytest.raises(
        InputError, match=r"can't read '!' in 'a=4; b!a': .*|can't read '!' in 'a=4; b!a' \(it knows .*\)"
    ):
        model.to_tokens(["a=4;", "a=4; b!a"])
    with pytest.raises(InputError, match=r"can't read 'hello' in 'a hello <bos> b' \(it knows ; <bos> <pad> = a b c"):
        make(tokenizer=word_tokenizer()).to_tokens("a hello <bos> b")


# Text of token ids.


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return make(tokenizer=word_tokenizer())


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (2, "a"),
        (np.int64(2), "a"),
        (torch.tensor(2), "a"),
        ([2, 3], "a b"),
        ((2, 3), "a b"),
        (np.array([2, 3]), "a b"),
        (torch.tensor([2, 3]), "a b"),
        ([], ""),
        ([[2, 3], [4]], ["a b", "c"]),
        ([[2, 3]], ["a b"]),
        (np.array([[2, 3], [4, 5]]), ["a b", "c d"]),
        (torch.tensor([[2, 3], [4, 5]]), ["a b", "c d"]),
        (list(torch.tensor([[2, 3], [4, 5]])), ["a b", "c d"]),
        ([torch.tensor(2), torch.tensor(3)], "a b"),
    ],
)
def test_tokens_of_every_form_to_text(model, tokens, text):
    assert model.to_string(tokens) == text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a b", ["a", "b"]),
        (["a b", "c"], [["a", "b"], ["c"]]),
        ([2, 3], ["a", "b"]),
        (torch.tensor([2, 3]), ["a", "b"]),
        (torch.tensor([[2, 3]]), ["a", "b"]),
        (torch.tensor(2), ["a"]),
        (np.array([2, 3]), ["a", "b"]),
        ([[2, 3], [4]], [["a", "b"], ["c"]]),
        (list(torch.tensor([[2, 3], [4, 5]])), [["a", "b"], ["c", "d"]]),
        (["a", [3], torch.tensor([4])], [["a"], ["b"], ["c"]]),
        ([], []),
    ],
)
def test_the_text_of_each_token(model, given, wanted):
    assert model.to_str_tokens(given) == wanted


def test_one_prompt_at_a_time(model):
    with pytest.raises(InputError, match=r"to_str_tokens reads one prompt, got 2: pass one row, or list\(tokens\)"):
        model.to_str_tokens(torch.tensor([[2, 3], [4, 5]]))


@pytest.mark.parametrize(
    "tokens", ["a", -1, 2**40, 2.0, True, [2, "a"], [[2], 3], [[[2]]], torch.zeros(1, 1, 1).long(), None]
)
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_token_id(model, tokens):
    with pytest.raises(
        InputError, match=r"tokens must be a token id, a list or \[pos\] of them, or \[batch, pos\], got"
    ):
        model.to_string(tokens)


def test_text_is_not_cleaned_up(model):
    """A space before a full stop is a token's own."""
    tokenizer = word_tokenizer(additional_special_tokens=["."])
    tokenizer.clean_up_tokenization_spaces = True
    spaced = make(tokenizer=tokenizer)
    assert spaced.to_string([2, len(tokenizer) - 1]) == "a ."


def test_without_a_tokenizer_no_form_is_text():
    for given in (2, [2], [[2]]):
        with pytest.raises(InputError, match=r"no tokenizer, so it can't write text"):
            tiny("ouro").to_string(given)
