"""Where generated text ends, how its tokens are drawn, and the forms in which it comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TINY, WORDS, make, noise_like, tiny, tokens_for, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_looped import LoopedModel
from tl_looped.generation import Generated
from tl_looped.generation.sampling import Sampling
from tl_looped.generation.stopping import RowText


def generated(model: LoopedModel, input: Any, n_new: int, n_loops: int | None = None, **options: Any) -> Generated:
    stops = {} if "eos_token_id" in options else {"stop_at_eos": False}
    return model.generate(input, n_new, n_loops, **stops, **options, return_type="result", verbose=False)


def spoken(n_new: int = 12, **special: str) -> tuple[LoopedModel, str, list[int]]:
    """A model with a vocabulary of words, a prompt, and the tokens that it goes on with."""
    model = make(torch.float64, word_tokenizer(**special), d_vocab=len(WORDS), **TINY["llama"])
    prompt = "a = b ;"
    return model, prompt, generated(model, prompt, n_new, seed=1).new_tokens[0].tolist()


def without_special(text: str) -> str:
    return " ".join(word for word in text.split() if not word.startswith("<"))


def test_a_row_ends_with_the_end_of_text_token():
    model, prompt, tokens = spoken()
    eos = tokens[5]
    end = tokens.index(eos) + 1
    found = generated(model, prompt, 12, seed=1, eos_token_id=eos)
    assert found.new_tokens[0].tolist() == tokens[:end]
    unused = next(token for token in range(len(WORDS)) if token not in tokens)
    either = generated(model, prompt, 12, seed=1, eos_token_id=[unused, eos])
    assert torch.equal(either.tokens, found.tokens)
    assert either.made_by["eos"] == [unused, eos]
    model.tokenizer.eos_token = WORDS[eos]
    assert model.generate(prompt, 12, seed=1, return_type="tokens", verbose=False)[0, 4:].tolist() == tokens[:end]
    whole = model.generate(prompt, 12, seed=1, stop_at_eos=False, return_type="tokens", verbose=False)
    assert whole[0, 4:].tolist() == tokens


def test_a_tokenizer_without_an_end_has_nothing_to_stop_at():
    model, prompt, tokens = spoken()
    assert model.tokenizer.eos_token is None
    assert model.generate(prompt, 12, seed=1, return_type="tokens", verbose=False)[0, 4:].tolist() == tokens


def test_a_row_that_ended_is_filled_up():
    """And changes nothing in the others."""
    model, _, _ = spoken()
    texts = ["a = b ;", "c", "d ; e = f"]
    whole = generated(model, texts, 12, do_sample=False)
    eos = int(whole.new_tokens[1, 3])
    found = generated(model, texts, 12, do_sample=False, eos_token_id=eos)
    ends = []
    for row in range(3):
        new = whole.new_tokens[row].tolist()
        end = new.index(eos) + 1 if eos in new else 12
        ends.append(end)
        after = found.new_tokens.shape[1] - end
        assert found.new_tokens[row, :end].tolist() == new[:end]
        assert found.new_tokens[row, end:].tolist() == [model.tokenizer.pad_token_id] * after
        assert found.real[row, -found.loops.shape[1] :].tolist() == [True] * end + [False] * after
        torch.testing.assert_close(found.log_probs[row, :end], whole.log_probs[row, :end])
        assert found.log_probs[row, end:].isnan().all()
        assert found.loops[row].tolist() == [2] * end + [0] * after
        assert found.pieces[row] == whole.pieces[row][:end] + ("",) * after
        assert found.text[row] == without_special(texts[row] + "".join(found.pieces[row]))
    assert len(set(ends)) > 1
    assert found.loops.shape[1] == max(ends)
    frame = found.to_dataframe()
    assert len(frame) == sum(ends)
    assert frame["token"].tolist() == [int(t) for row in range(3) for t in found.new_tokens[row, : ends[row]]]


def test_without_padding_the_filler_is_the_end_of_text():
    model = tiny("ouro", torch.float64)
    tokens = tokens_for(model)
    whole = generated(model, tokens, 8, do_sample=False).new_tokens.tolist()
    eos = next(token for token in whole[0] if token not in whole[1])
    found = generated(model, tokens, 8, do_sample=False, eos_token_id=eos).new_tokens.tolist()
    end = whole[0].index(eos) + 1
    assert found == [whole[0][:end] + [eos] * (8 - end), whole[1]]


def test_a_row_ends_with_a_stop_string():
    """With the token that completes it, in the generated text: also one that reaches over several tokens."""
    model, prompt, tokens = spoken()
    words = [WORDS[token] for token in tokens]
    for stop in (words[4], f"{words[3]} {words[4]}", [f"{words[6]} {words[7]}", "no such text"]):
        strings = [stop] if isinstance(stop, str) else stop
        end = next(i for i in range(13) if any(one in " ".join(words[:i]) for one in strings))
        found = generated(model, prompt, 12, seed=1, stop_strings=stop)
        assert found.new_tokens[0].tolist() == tokens[:end]
        assert found.made_by["stop_strings"] == strings
    assert generated(model, prompt, 12, seed=1, stop_strings=prompt).new_tokens[0].tolist() == tokens


def test_a_special_token_may_be_a_stop_string():
    model, prompt, tokens = spoken(n_new=16)
    special = WORDS[tokens[7]]
    model.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    found = generated(model, prompt, 16, seed=1, stop_strings=special)
    assert found.new_tokens[0].tolist() == tokens[: tokens.index(tokens[7]) + 1]
    assert special in found.pieces[0][-1]
    assert special not in found.text[0].removeprefix(prompt)


# Sampling.


def draws(logits: torch.Tensor, n: int, **options: Any) -> torch.Tensor:
    """How often each token is drawn, as shares, [batch, d_vocab]."""
    sampling, generator = Sampling(**options), torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(logits), 1, dtype=torch.long)
    real = torch.ones_like(tokens, dtype=torch.bool)
    drawn = torch.stack([sampling.choose(logits, tokens, real, generator) for _ in range(n)])
    return torch.stack([(drawn == token).double().mean(0) for token in range(logits.shape[1])], dim=1)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.6}, {"top_p": 1.0}]
    + [{"temperature": 1.5, "top_k": 4, "top_p": 0.8}],
)
def test_draws_follow_the_distribution_asked_for(options):
    """Each row by itself, against the distribution written out."""
    logits = 1.5 * noise_like(torch.zeros(3, 8))
    shares = draws(logits, 3000, **options)
    for row in range(3):
        weights = {i: float(torch.exp(x / options.get("temperature", 1))) for i, x in enumerate(logits[row])}
        ranked = sorted(weights, key=lambda i: -weights[i])[: options.get("top_k", 8)]
        total, kept, reached = sum(weights[i] for i in ranked), [], 0.0
        for token in ranked:
            if reached < options.get("top_p", 1.0):
                kept.append(token)
            reached += weights[token] / total
        total = sum(weights[i] for i in kept)
        for token in range(8):
            wanted = weights[token] / total if token in kept else 0.0
            assert float(shares[row, token]) == pytest.approx(wanted, abs=0.03 if wanted else 0)


def test_the_log_probability_is_the_models_own():
    """Whatever shapes the draws."""
    model = tiny("huginn", torch.float64)
    tokens = tokens_for(model)
    found = generated(model, tokens, 5, temperature=3.0, top_k=5)
    logits = model(found.tokens[:, :-1])
    wanted = logits[:, 4:].log_softmax(-1).gather(-1, found.new_tokens[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs, wanted.detach())


# What comes back.


def test_return_types(tmp_path):
    model, prompt, tokens = spoken()
    options = {"seed": 1, "verbose": False}
    wanted = without_special(" ".join([prompt, *(WORDS[token] for token in tokens)]))
    ids = model.to_tokens(prompt)
    assert model.generate(prompt, 12, **options) == wanted
    assert model.generate([prompt], 12, **options) == [wanted]
    assert model.generate(ids, 12, return_type="str", **options) == wanted
    assert len(model.generate([prompt, "a"], 3, **options)) == 2
    assert model.generate(ids, 12, **options)[0].tolist() == ids[0].tolist() + tokens
    assert torch.equal(
        model.generate(prompt, 12, return_type="tokens", **options), model.generate(ids[0], 12, **options)
    )
    result = model.generate(prompt, 12, return_type="result", **options)
    loaded = Generated.load(result.save(tmp_path / "text.safetensors"))
    assert loaded.text == (wanted,)
    assert loaded.made_by == result.made_by
    assert torch.equal(loaded.log_probs, result.log_probs)
    assert loaded.to_dataframe().equals(result.to_dataframe())
    assert loaded.to_dataframe()["text"].str.strip().tolist() == [WORDS[token] for token in tokens]


def test_without_a_tokenizer_there_is_no_text():
    model = tiny("ouro")
    found = generated(model, tokens_for(model), 2)
    assert found.text is None
    assert found.pieces is None
    assert found.to_dataframe()["text"].isna().all()


def test_a_stream_gives_the_same_step_by_step():
    model, prompt, tokens = spoken()
    model.tokenizer.eos_token = WORDS[tokens[8]]
    wanted = generated(model, prompt, 12, seed=1, eos_token_id=tokens[8])
    stream = model.generate_stream(prompt, 12, seed=1)
    steps = []
    for i, step in enumerate(stream):
        assert step.position == 4 + i
        assert step.tokens.shape == step.loops.shape == step.log_probs.shape == step.ended.shape == (1,)
        assert bool(step.ended) == (tokens[i] == tokens[8])
        steps.append(step)
    assert list(stream) == []  # it has ended
    assert [int(step.tokens) for step in steps] == wanted.new_tokens[0].tolist()
    assert tuple(step.text[0] for step in steps) == wanted.pieces[0]
    assert without_special(prompt + "".join(step.text[0] for step in steps)) == wanted.text[0]
    assert stream.made_by == {**wanted.made_by, "eos": [tokens[8]]}


def test_a_progress_bar_is_shown_unless_told_otherwise(capsys):
    model = tiny("ouro")
    model.generate(tokens_for(model), 2, stop_at_eos=False, verbose=False)
    assert capsys.readouterr().err == ""
    model.generate(tokens_for(model), 2, stop_at_eos=False)
    assert "2/2" in capsys.readouterr().err


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII are several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_pieces_are_the_text_and_characters_come_whole():
    tokenizer = byte_tokenizer()
    prompt, text = "Zürich: ", "naïve ☕ , 日本 ."
    row = RowText(tokenizer, tokenizer(prompt)["input_ids"])
    pieces = [row.add(token) for token in tokenizer(text)["input_ids"]]
    assert [piece for piece in pieces if piece] == list(text)
    assert row.text == text
    assert len(pieces) == len(text.encode())
