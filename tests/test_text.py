"""Text in: tokens, padding and masks, with a tokenizer of single words."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, WORDS, make, word_tokenizer

from tl_looped import InputError, LoopedModel

TEXTS = ["a b c", "d", "e f g h a"]
IDS = {word: index for index, word in enumerate(WORDS)}


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> LoopedModel:
    return make(torch.float64, **TINY[request.param], tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def plain() -> LoopedModel:
    """One family, where the family does not matter."""
    return make(tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def with_bos() -> LoopedModel:
    return make(tokenizer=word_tokenizer(bos=True))


# Padding.


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_each_prompt_what_it_gets_alone(model, side):
    """The same first state, the same positions, no padding seen."""
    logits = model(TEXTS, padding_side=side)
    for row, text in enumerate(TEXTS):
        real = len(ids(text))
        part = logits[row, -real:] if side == "left" else logits[row, :real]
        torch.testing.assert_close(part, model(text)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_cache_of_a_padded_batch(model, side):
    _, batch = model.run_with_cache(TEXTS, padding_side=side)
    _, alone = model.run_with_cache(TEXTS[0])
    real = slice(2, 5) if side == "left" else slice(0, 3)
    for name in ("state_post", "state_init"):
        stacked, wanted = (batch.stack(name), alone.stack(name)) if name == "state_post" else (batch[name], alone[name])
        torch.testing.assert_close(stacked[..., 0, real, :], wanted[..., 0, :, :], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        batch["pattern", 1, 1][0, :, real, real], alone["pattern", 1, 1][0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_counts_real_tokens(model, side):
    per_token = model(TEXTS, padding_side=side, return_type="loss", loss_per_token=True)
    alone = [model(text, return_type="loss", loss_per_token=True) for text in (TEXTS[0], TEXTS[2])]
    counted = torch.cat(alone, dim=1)
    torch.testing.assert_close(per_token.sum(), counted.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model(TEXTS, padding_side=side, return_type="loss"), counted.mean(), rtol=1e-5, atol=1e-5
    )


# Tokens.


def test_text_to_tokens(plain):
    assert plain.to_tokens("a b c").tolist() == [ids("a b c")]
    assert plain.to_tokens(["a b", "c d"]).tolist() == [ids("a b"), ids("c d")]
    assert plain.to_tokens(["a", "c d"], padding_side="left").tolist() == [[0, *ids("a")], ids("c d")]
    assert plain.to_tokens(["a", "c d"], padding_side="right").tolist() == [[*ids("a"), 0], ids("c d")]
    assert plain.to_tokens("a").dtype == torch.int64


def test_the_beginning_of_text_is_the_tokenizers_choice(plain, with_bos):
    assert plain.to_tokens("a").tolist() == [ids("a")]
    assert plain.to_tokens("a", prepend_bos=True).tolist() == [[1, *ids("a")]]
    assert plain.to_tokens("a", prepend_bos=False).tolist() == [ids("a")]
    assert with_bos.to_tokens("a").tolist() == [[1, *ids("a")]]
    assert with_bos.to_tokens("a", prepend_bos=True).tolist() == [[1, *ids("a")]]
    assert with_bos.to_tokens("a", prepend_bos=False).tolist() == [ids("a")]
    assert torch.equal(with_bos("a", prepend_bos=False), with_bos(torch.tensor([ids("a")])))
    assert torch.equal(plain("a", prepend_bos=True), plain(torch.tensor([[1, *ids("a")]])))


def test_tokens_to_text(plain):
    tokens = plain.to_tokens(["a b", "c ="])
    assert plain.to_string(tokens) == ["a b", "c ="]
    assert plain.to_string(tokens[0]) == "a b"
    assert plain.to_str_tokens("a b =") == ["a", "b", "="]
    assert plain.to_str_tokens(tokens[0]) == ["a", "b"]
    assert plain.to_single_token("c") == IDS["c"]


def test_a_run_on_text_is_a_run_on_its_tokens(model):
    assert torch.equal(model("a b = c"), model(torch.tensor([ids("a b = c")])))
    _, cache = model.run_with_cache(["a b = c"])
    assert cache.run.tokens.tolist() == [ids("a b = c")]
    state = model("a b = c", stop_at_loop=1)
    assert torch.equal(model.readout(state, "a b = c"), model("a b = c", n_loops=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(""), r"the prompt is empty, so there is nothing to run"),
        (lambda m: m(["a", ""]), r"prompt 1 is empty, so there is nothing to run"),
        (lambda m: m("  "), r"a prompt without tokens has nothing to run: '  '"),
        (lambda m: m(["a", " "]), r"a prompt without tokens has nothing to run"),
        (lambda m: m(None), r"prompts must be text, token ids, messages, a list of these, a Path .* got NoneType"),
        (lambda m: m([[1, 2], 3]), r"prompt 1 must be text, a list of token ids or messages, got 3"),
        (lambda m: m([]), r"there are no prompts"),
        (lambda m: m("a z"), r"the model's tokenizer can't read 'z' in 'a z' \(it knows .* a b c d e f g h\): .*"),
        (lambda m: m(["a", "b z c"]), r"prompt 1: the model's tokenizer can't read 'z' in 'b z c'"),
        (
            lambda m: m.to_tokens("a " * 33),
            r"the prompt has 33 tokens, more than the model's context of 32: shorten it",
        ),
        (lambda m: m("a " * 33), r"the prompt has 33 tokens, more than the model's context of 32"),
        (lambda m: m.to_single_token("a b"), r"'a b' is 2 tokens, not one: \['a', 'b'\]"),
        (lambda m: m.to_single_token(""), r"an empty prompt has nothing to run"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_text_that_can_not_be_run(plain, call, message: str):
    with pytest.raises(InputError, match=message):
        call(plain)


def test_without_a_tokenizer():
    model = make()
    for call in (model, model.to_tokens, model.to_str_tokens, model.to_single_token):
        with pytest.raises(InputError, match=r"this model has no tokenizer, so it can't read text: pass token ids"):
            call("a")
    for call in (model.to_string, model.to_str_tokens):
        with pytest.raises(InputError, match=r"this model has no tokenizer, so it can't write text"):
            call(torch.tensor([1, 2]))
    model.tokenizer = word_tokenizer()
    assert model("a").shape == (1, 1, model.cfg.d_vocab)


def test_a_tokenizer_without_padding():
    model = make(tokenizer=word_tokenizer(pad_token=None))
    assert model("a b").shape[1] == 2
    assert model(["a b", "c"]).shape[:2] == (2, 2)  # a run knows which positions are filled
    assert model.to_tokens(["a b", "c d"]).shape == (2, 2)
    with pytest.raises(InputError, match=r"prompts of different length need padding, and the tokenizer has no padding"):
        model.to_tokens(["a b", "c"])  # ids do not


def test_a_tokenizer_without_a_beginning():
    model = make(tokenizer=word_tokenizer(bos_token=None))
    with pytest.raises(InputError, match=r"prepend_bos=True, but the tokenizer has no beginning-of-text token"):
        model("a", prepend_bos=True)


def test_a_tokenizer_with_more_words_than_the_model():
    model = make(tokenizer=word_tokenizer(), d_vocab=8)
    assert model("a b").shape == (1, 2, 8)
    with pytest.raises(InputError, match=r"token id 11 is out of the vocabulary \[0, 8\)"):
        model("a ;")
