"""Prompts from lists, files and datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make, tiny, word_tokenizer

from tl_looped.engine.errors import InputError
from tl_looped.observe.texts import read_prompts, tokenize_prompts

ROWS = [{"question": "a b", "answer": "c", "ids": [2, 3]}, {"question": "c d e", "answer": "f", "ids": [4]}]


class Dataset:
    """What a dataset of Hugging Face is here: rows that are mappings, again and again."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def test_lists_and_datasets() -> None:
    assert read_prompts(["a b", [1, 2], torch.tensor([3, 4]), (5,)]) == ["a b", [1, 2], [3, 4], [5]]
    assert read_prompts(Dataset(), "question") == ["a b", "c d e"]
    assert read_prompts(ROWS, "ids") == [[2, 3], [4]]
    assert read_prompts((row for row in ROWS), "answer", limit=1) == ["c"]
    assert read_prompts(["a", "b"], limit=5) == ["a", "b"]


def test_a_limit_reads_no_further() -> None:
    def rows() -> Iterator[str]:
        yield "a"
        raise AssertionError("read on")

    assert read_prompts(rows(), limit=1) == ["a"]


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a b\r\n\n  c é \u2028 d\n   \nlast".encode())
    wanted = ["a b", "  c é \u2028 d", "last"]
    assert read_prompts(path) == wanted and read_prompts(str(path), limit=2) == wanted[:2]


def test_jsonl_files(jsonl: Path) -> None:
    assert read_prompts(jsonl, "question") == ["a b", "c d e"]
    assert read_prompts(str(jsonl), "ids", limit=1) == [[2, 3]]
    strange = jsonl.with_name("strange.jsonl")
    strange.write_text(json.dumps({"text": "a \u2028 b"}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(strange, "text") == ["a \u2028 b"]


def test_tokens_are_each_of_its_own_length() -> None:
    model = make(tokenizer=word_tokenizer())
    tokens = tokenize_prompts(model, ["a b", [5, 6, 7], "c"])
    assert [row.tolist() for row in tokens] == [[2, 3], [5, 6, 7], [4]]
    assert all(row.dtype == torch.int64 for row in tokens)
    with_bos = make(tokenizer=word_tokenizer(bos=True))
    assert tokenize_prompts(with_bos, ["a"])[0].tolist() == with_bos.to_tokens("a")[0].tolist() == [1, 2]
    view = model.unrolled()
    assert [row.tolist() for row in tokenize_prompts(view, ["a b"])] == [[2, 3]]


def test_a_tensors_padding_is_cut_off() -> None:
    model = make(tokenizer=word_tokenizer())
    padded = torch.tensor([[0, 0, 3], [2, 0, 4], [5, 6, 0]])
    assert [row.tolist() for row in tokenize_prompts(model, padded)] == [[3], [2, 0, 4], [5, 6]]
    assert [row.tolist() for row in tokenize_prompts(model, padded, limit=1)] == [[3]]
    plain = tokenize_prompts(make(), padded.int())  # without a tokenizer there is no padding to see
    assert [row.tolist() for row in plain] == padded.tolist()


_CASES: list[tuple[Any, str | None, str]] = [
    ([], None, "there are no prompts"),
    ([""], None, "prompt 0 is empty"),
    (["a", []], None, "prompt 1 is empty"),
    (["a", 3], None, "prompt 1 must be text or a list of token ids, got 3"),
    ([[1, 2.5]], None, r"prompt 0 must be text or a list of token ids, got \[1, 2.5\]"),
    ([[True]], None, "prompt 0 must be text or a list of token ids"),
    ([torch.zeros(2)], None, "prompt 0 must be text or a list of token ids"),
    (ROWS, None, "prompt 0 has the fields 'question', 'answer', 'ids': pass field=, the one that holds the prompt"),
    (ROWS, "qestion", "prompt 0 has no field 'qestion', but 'question', 'answer', 'ids'. Nearest: 'question'"),
    ([*ROWS, {"text": "a"}], "answer", "prompt 2 has no field 'answer', but 'text'"),
    (["a"], "text", "prompt 0 is 'a', which has no fields: leave out field='text'"),
    ([{"text": None}], "text", "prompt 0 must be text or a list of token ids, got None"),
    ({"train": ROWS, "test": ROWS}, "question", "a mapping with 'train', 'test' is no list of prompts: pass one of"),
    (5, None, "prompts must be a list, a file, a tensor or a dataset, got int"),
    ("no such file", None, "there is no file 'no such file'; for a single prompt, pass a list of one text"),
    (Path("/nowhere/x.txt"), None, "there is no file '/nowhere/x.txt'"),
]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(("prompts", "field", "message"), _CASES, ids=[message[:40] for _, _, message in _CASES])
def test_what_is_no_prompt(prompts: Any, field: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(prompts, field)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("limit", [0, -1, True, 2.0])
def test_a_limit_is_a_count(limit: Any) -> None:
    with pytest.raises(InputError, match="limit must be"):
        read_prompts(["a"], limit=limit)
    with pytest.raises(InputError, match="limit must be"):
        tokenize_prompts(tiny("llama"), torch.tensor([[1]]), limit=limit)


def test_files_that_can_not_be_read(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(InputError, match=r"rows.jsonl' is a JSONL file: pass field="):
        read_prompts(jsonl)
    with pytest.raises(InputError, match=r"rows.jsonl', prompt 0 has no field 'text', but 'question', 'answer', 'ids'"):
        read_prompts(jsonl, "text")
    jsonl.write_text('{"a": "b"}\n\n{"a": ')
    with pytest.raises(InputError, match=r"rows.jsonl', line 3 is not JSON, which field='a' needs"):
        read_prompts(jsonl, "a")
    jsonl.write_text('"text alone"\n')
    with pytest.raises(InputError, match=r"rows.jsonl', prompt 0 is 'text alone', which has no fields"):
        read_prompts(jsonl, "a")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    with pytest.raises(InputError, match=r"there are no prompts in '.*empty.txt'"):
        read_prompts(str(empty))
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"empty.txt' can't be read as text"):
        read_prompts(empty)


def test_tokens_that_the_model_does_not_have() -> None:
    model = make(tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="prompt 1: the model's tokenizer can't read 'zebra'"):
        tokenize_prompts(model, ["a", "zebra"])
    with pytest.raises(InputError, match=r"prompt 1 has the token id 24, out of the vocabulary \[0, 24\)"):
        tokenize_prompts(model, [[1], [24]])
    with pytest.raises(InputError, match="prompt 0 has the token id -1"):
        tokenize_prompts(model, torch.tensor([[-1, 2]]))
    with pytest.raises(InputError, match="prompt 1 has 40 tokens, more than the model's context of 32"):
        tokenize_prompts(model, [[1], [1] * 40])
    with pytest.raises(InputError, match="prompt 1 is padding only"):
        tokenize_prompts(model, torch.tensor([[1, 2], [0, 0]]))
    for wrong in (torch.zeros(2, 2), torch.tensor([1, 2]), torch.zeros(0, 3, dtype=torch.long)):
        with pytest.raises(InputError, match=r"a tensor of prompts must hold token ids, \[batch, pos\], got"):
            tokenize_prompts(model, wrong)
    with pytest.raises(InputError, match="a tensor of token ids has no fields: leave out field='text'"):
        tokenize_prompts(model, torch.tensor([[1, 2]]), "text")
    with pytest.raises(InputError, match="a tensor of token ids is tokens already"):
        read_prompts(torch.tensor([[1, 2]]))
