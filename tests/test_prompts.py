"""Prompts in every form, read once: padding is told or certain, and a row's numbers do not depend on its batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, make, tiny, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from tl_looped import InputError, LoopedModel
from tl_looped.engine.prompts import read_rows
from tl_looped.engine.runs import Runs

PADS = {
    "neither": {},
    "bos": {"bos_token": "<pad>"},
    "eos": {"eos_token": "<pad>"},
    "both": {"bos_token": "<pad>", "eos_token": "<pad>"},
}
MODELS = {name: make(**TINY["added"], tokenizer=word_tokenizer(**special)) for name, special in PADS.items()}
ROWS = [{"question": "a b", "ids": [2, 3]}, {"question": "c d e", "ids": [4]}]


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    return make(tokenizer=word_tokenizer())


# Padding.


@given(
    pad=st.sampled_from(sorted(PADS)),
    rows=st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=2, max_size=3),
)
def test_a_rows_numbers_do_not_depend_on_its_batch(pad: str, rows: list[list[int]]):
    """Ids with padding's id anywhere: either the batch is refused, or each row gives what it gives alone."""
    model = MODELS[pad]
    tokens = torch.tensor(rows)
    try:
        logits, real = model(tokens), model.batch(tokens).attention_mask
    except InputError:
        return
    for row, ids in enumerate(tokens):
        alone = model.batch(ids)
        assert torch.equal(real[row], alone.attention_mask[0])
        torch.testing.assert_close(logits[row][real[row]], model(ids)[0][real[row]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", PADS)
def test_ids_of_several_texts_know_their_padding(pad: str, side):
    model, texts = MODELS[pad], ["a b c", "d", "e f g h a"]
    tokens = model.to_tokens(texts, padding_side=side)
    told, mask = model.to_tokens_with_mask(texts, padding_side=side)
    runs = model.prepare(texts, padding_side=side)
    assert torch.equal(tokens, told) and torch.equal(mask, model.batch(runs).attention_mask)
    assert torch.equal(model(tokens), model(runs))
    assert torch.equal(model(tokens.clone(), attention_mask=mask), model(runs))
    torch.testing.assert_close(model(tokens, return_type="loss"), model(texts, return_type="loss", padding_side=side))


@pytest.mark.parametrize(
    ("pad", "rows", "real"),
    [
        ("neither", [[0, 0, 2], [0, 2, 0]], [[0, 0, 1], [0, 1, 0]]),
        ("neither", [[2, 0, 3]], [[1, 1, 1]]),
        ("bos", [[0, 4, 2], [0, 2, 3]], [[1, 1, 1], [1, 1, 1]]),  # a column that every row has is text
        ("eos", [[2, 0], [3, 0]], [[1, 1], [1, 1]]),
        ("both", [[0, 0, 2, 0, 0]], [[1, 1, 1, 1, 1]]),  # a row alone has no padding
        ("both", [[5, 8, 0]], [[1, 1, 1]]),
        ("bos", [[0]], [[1]]),
    ],
)
def test_certain_padding(pad: str, rows: list[list[int]], real: list[list[int]]):
    assert MODELS[pad].batch(torch.tensor(rows)).attention_mask.long().tolist() == real


@pytest.mark.parametrize(
    ("pad", "rows", "place"),
    [
        ("bos", [[0, 8, 9], [5, 6, 7]], "row 0, position 0"),
        ("eos", [[5, 6, 7], [5, 8, 0]], "row 1, position 2"),
        ("both", [[0, 0, 2], [0, 2, 3]], "row 0, position 1"),
    ],
)
def test_two_readings_are_refused(pad: str, rows: list[list[int]], place: str):
    model, tokens = MODELS[pad], torch.tensor(rows)
    message = f"token 0 at {place} may be padding, or the beginning or end of the text.*pass attention_mask="
    with pytest.raises(InputError, match=message):
        model(tokens)
    whole = model(tokens, attention_mask=torch.ones_like(tokens))
    assert torch.equal(model(rows), whole)  # lists say their own length
    for row, ids in enumerate(tokens):
        torch.testing.assert_close(whole[row], model(ids)[0], rtol=1e-5, atol=1e-5)


def test_the_loss_counts_an_end_of_text():
    model = MODELS["eos"]
    loss = model(torch.tensor([[5, 8, 0]]), return_type="loss", loss_per_token=True)
    assert loss.shape == (1, 2) and bool((loss != 0).all())


def test_changed_padding_is_not_trusted():
    model = MODELS["both"]
    tokens = model.to_tokens(["a b c", "d"])
    tokens[1, 2] = 5
    with pytest.raises(
        InputError, match="tokens that to_tokens filled in as padding were changed: pass attention_mask="
    ):
        model(tokens)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    assert torch.equal(model.batch(tokens, attention_mask=mask).attention_mask, mask.bool())  # the mend that it names


def test_only_padding(model):
    with pytest.raises(InputError, match="prompt 1 is padding only"):
        model(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(InputError, match="prompt 0 is padding only"):
        model(torch.tensor([[1, 2]]), attention_mask=torch.zeros(1, 2))


def test_logits_at_the_last_real_token(model):
    texts = ["a b c", "d", "e f"]
    alone = torch.cat([model(text)[:, -1] for text in texts])
    for side in ("left", "right"):
        torch.testing.assert_close(model.last_logits(texts, padding_side=side), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(texts)[:, -1], alone)  # padding, where rows are filled at the right


def test_a_full_mask_does_not_make_padding_count(model):
    """Who sees whom is the mask's to say; which tokens are in the loss, the prompts'."""
    texts = ["a b c", "d e f g h"]
    for side in ("left", "right"):
        run = model.batch(texts, padding_side=side)
        causal = torch.ones(5, 5, dtype=torch.bool).tril() & run.attention_mask[:, None, :]
        full = model.batch(texts, padding_side=side, attention_mask=causal)
        assert torch.equal(full.attention_mask, run.attention_mask) and torch.equal(full.position_ids, run.position_ids)
        torch.testing.assert_close(
            model(texts, padding_side=side, attention_mask=causal, return_type="loss"),
            model(texts, padding_side=side, return_type="loss"),
        )


def test_rows_keep_their_places_whatever_the_side():
    model = tiny("llama")
    for side in ("left", "right"):
        runs = model.prepare([[5, 6], [7, 8, 9], [4]], padding_side=side)
        tokens, real = runs.rows.padded()
        for row in range(3):
            assert torch.equal(tokens[row, runs.rows.places(row)], runs.rows.unpadded(row))
            assert torch.equal(runs.rows.places(row), real[row].nonzero()[:, 0])


# Dialects.


def dialects(tmp_path: Path) -> dict[str, tuple[object, dict[str, object]]]:
    """The same two prompts, (2, 3) and (4, 5, 6), in every form."""
    lines, jsonl = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("a b\n\nc d e\n")
    jsonl.write_text("\n".join(json.dumps(row) for row in ROWS))
    padded = torch.tensor([[2, 3, 0], [4, 5, 6]])
    return {
        "texts": (["a b", "c d e"], {}),
        "tuple": (("a b", "c d e"), {}),
        "generator": ((text for text in ["a b", "c d e"]), {}),
        "lists of ids": ([[2, 3], [4, 5, 6]], {}),
        "tensors": ([torch.tensor([2, 3]), torch.tensor([4, 5, 6])], {}),
        "arrays": ([np.array([2, 3]), np.array([4, 5, 6])], {}),
        "mixed": (["a b", [4, 5, 6]], {}),
        "tensor": (padded, {}),
        "array": (padded.numpy(), {}),
        "masked": (padded, {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}),
        "encoding": (word_tokenizer()(["a b", "c d e"], padding=True, return_tensors="pt"), {}),
        "ragged encoding": (word_tokenizer()(["a b", "c d e"]), {}),
        "mapping": ({"input_ids": [[2, 3], [4, 5, 6]]}, {}),
        "file": (lines, {}),
        "jsonl": (jsonl, {"field": "question"}),
        "dataset": (ROWS, {"field": "question"}),
        "more rows": ([*ROWS, {"question": "f"}], {"field": "question", "limit": 2}),
    }


@pytest.mark.parametrize("name", range(17))
def test_every_dialect_is_the_same_prompts(model, tmp_path, name):
    kind, (prompts, options) = list(dialects(tmp_path).items())[name]
    runs = model.prepare(prompts, **options)
    assert [runs.rows.unpadded(i).tolist() for i in range(len(runs))] == [[2, 3], [4, 5, 6]], kind
    torch.testing.assert_close(model.last_logits(runs), model.last_logits(["a b", "c d e"]))


def test_one_prompt_in_every_form(model):
    wanted = model("a b")
    for prompts in ("a b", ["a b"], [2, 3], torch.tensor([2, 3]), [[2, 3]], word_tokenizer()("a b"), np.array([2, 3])):
        assert torch.equal(model(prompts), wanted)
    assert torch.equal(model(BatchEncoding({"input_ids": [[2, 3]]})), wanted)


def test_prepared_runs_stand_for_prompts(model):
    runs = model.prepare(["a b", "c d e"], 3, seed=4)
    assert isinstance(runs, Runs) and len(runs) == 2 and "2 prompts" in repr(runs)
    assert torch.equal(model(runs), model(["a b", "c d e"], 3, seed=4))
    _, cache = model.run_with_cache(runs)
    assert cache.run.n_loops == 3
    with pytest.raises(InputError, match="these runs are prepared already: pass n_loops to model.prepare instead"):
        model(runs, 2)
    with pytest.raises(InputError, match="pass seed to model.prepare"):
        model(runs, seed=1)


def test_input_is_read_once(model):
    reads = []

    def rows():
        for text in ("a b", "c"):
            reads.append(text)
            yield text

    runs = model.prepare(rows())
    model(runs), model(runs), model.run_with_cache(runs)
    assert reads == ["a b", "c"]


def test_a_state_by_position():
    model = tiny("llama")
    state = torch.randn(3, model.cfg.d_model)
    prompts = [[5, 6], [7, 8, 9]]
    for side in ("left", "right"):
        last = model.last_logits(prompts, initial_state=state, padding_side=side)
        for row, prompt in enumerate(prompts):
            alone = model(prompt, initial_state=state[None, : len(prompt)])[0, -1]
            torch.testing.assert_close(last[row], alone, rtol=1e-5, atol=1e-5)


def test_a_state_that_ends_before_the_positions():
    model = tiny("llama")
    options = {"initial_state": torch.zeros(3, model.cfg.d_model), "position_ids": torch.tensor([[0, 1, 7]])}
    with pytest.raises(InputError, match="position_ids go up to 7, but initial_state has 3 positions: pass"):
        model([[4, 5, 6]], **options)


# Errors.


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (5, {}, "prompts must be text, token ids, messages, a list of these, a Path to a file or a dataset, got int"),
        ([], {}, "there are no prompts"),
        (["a", 3.5], {}, "prompt 1 must be text, a list of token ids or messages, got 3.5"),
        (["a", []], {}, "prompt 1 is empty"),
        (["a", "zebra"], {}, "prompt 1: the model's tokenizer can't read 'zebra'"),
        (["a"], {"field": "text"}, "prompt 0 is 'a', which has no fields: leave out field='text'"),
        ("a", {"field": "text"}, "a text has no rows with fields: leave out field='text'"),
        (torch.tensor([[1]]), {"field": "text"}, "a Tensor has no rows with fields"),
        (ROWS, {}, "prompt 0 has the fields 'question', 'ids': pass field="),
        (ROWS, {"field": "questoin"}, "prompt 0 has no field 'questoin', but 'question', 'ids'. Nearest: 'question'"),
        ({"train": ROWS}, {}, "a mapping with 'train' is no list of prompts: pass one of them, such as its split"),
        ([[1], [24]], {}, r"prompt 1: token id 24 is out of the vocabulary \[0, 24\)"),
        ([[1], [1] * 40], {}, "prompt 1 has 40 tokens, more than the model's context of 32"),
        (torch.tensor([[1.0]]), {}, "tokens must be integers, got dtype torch.float32"),
        (["a"], {"limit": 0}, "limit must be at least 1, got 0"),
        (["a"], {"padding_side": "top"}, "padding_side must be 'left' or 'right', got 'top'"),
        (["a b"], {"attention_mask": torch.ones(1, 3)}, r"attention_mask must have the shape of the tokens, \(1, 2\)"),
        (["a b"], {"attention_mask": torch.tensor([[2, 1]])}, "attention_mask must be of zeros and ones"),
        (Path("nowhere.txt"), {}, "there is no file 'nowhere.txt'"),
        ({"input_ids": []}, {}, "there are no prompts"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, {}, "attention_mask of prompt 0 must be .* each of its 2"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1, 2]]},
            {},
            "attention_mask of prompt 0 must be of zeros and ones",
        ),
        ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, {}, "input_ids has 2 prompts, attention_mask 1"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_prompt(model, prompts, options, message: str):
    with pytest.raises(InputError, match=message):
        model.prepare(prompts, **options)


def test_files(model, tmp_path):
    jsonl, empty, text = (tmp_path / name for name in ("rows.jsonl", "empty.txt", "prompts.txt"))
    jsonl.write_text('{"text": "a"}\nnot json\n')
    empty.write_text("\n\n")
    text.write_text("a\n")
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a \\u2028 b"}\n')
    assert read_rows(strange, word_tokenizer(), field="text").ids[0].tolist() == [2, 3]
    for path, field, message in (
        (jsonl, None, "is a JSONL file: pass field="),
        (jsonl, "text", "line 2 is not JSON, which field='text' needs"),
        (empty, None, "there are no prompts in '.*empty.txt'"),
        (str(text), None, "is the name of a file: pass pathlib.Path"),
    ):
        with pytest.raises(InputError, match=message):
            model.prepare(path, field=field)


def test_options_are_named_in_the_callers_words(model):
    with pytest.raises(InputError, match="model\\(...\\) has no argument 'n_lops'. Nearest: 'n_loops'"):
        model("a", n_lops=3)
    with pytest.raises(InputError, match="run_with_cache has no argument 'filter'"):
        model.run_with_cache("a", filter="hook_embed")
