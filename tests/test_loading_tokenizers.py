"""Tokenizers from the files that a checkpoint has, or an error that names them: never silently none, nor a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers import PARITY, make, refuse, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tl_looped import LoadError, LoopedModel
from tl_looped.adapters.tokenizer import load_tokenizer

VOCABULARY = {
    letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "<|end|>"])
}
MERGES = [("h", "e"), ("l", "l")]
END = VOCABULARY["<|end|>"]


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


BYTE_LEVEL = {
    "vocab.json": VOCABULARY,
    "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES),
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "eos_token": "<|end|>"},
}


def test_a_vocabulary_and_merges(tmp_path: Path):
    """As the tokenizers library reads the same vocabulary."""
    tokenizer = load_tokenizer(write(tmp_path / "model", BYTE_LEVEL))
    wanted = Tokenizer(models.BPE(vocab=VOCABULARY, merges=MERGES))
    wanted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wanted.decoder = decoders.ByteLevel()
    text = "hello, naïve world ☕"
    assert tokenizer is not None
    assert tokenizer(text)["input_ids"] == wanted.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == END


def test_a_model_with_a_vocabulary_and_merges_reads_text(tmp_path: Path):
    make(d_vocab=len(VOCABULARY)).save_pretrained(tmp_path / "model")
    model = LoopedModel.from_pretrained(write(tmp_path / "model", BYTE_LEVEL))
    assert model.to_tokens("hell").tolist() == [[VOCABULARY["he"], VOCABULARY["ll"]]]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained sentencepiece model."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = [f"the quick brown fox {i} jumps over a lazy dog" for i in range(99)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def test_a_sentencepiece_model(pieces: Path, tmp_path: Path):
    """As sentencepiece itself reads it."""
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    folder = write(tmp_path / "model", {"tokenizer_config.json": named})
    (folder / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer is not None
    for text in ("the quick fox", "a lazy dog jumps 12", "over the brown"):
        assert tokenizer(text)["input_ids"] == [1, *wanted.encode(text)]


def test_no_tokenizer_files_is_no_tokenizer(tmp_path: Path):
    assert load_tokenizer(write(tmp_path / "model", {"config.json": {}, "generation_config.json": {}})) is None


CODE = {"tokenizer_class": "OurTokenizer", "auto_map": {"AutoTokenizer": ["tokens.OurTokenizer", None]}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"vocab.json": VOCABULARY, "merges.txt": ""},
            r"has merges.txt, vocab.json but no .* says tokenizer_class=None",
        ),
        (BYTE_LEVEL | {"tokenizer_config.json": CODE}, r"tokenizer_class='OurTokenizer', which is no class of transf"),
        (
            BYTE_LEVEL | {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
            r"='PreTrainedTokenizerFast'",
        ),
        (BYTE_LEVEL | {"tokenizer_config.json": {"tokenizer_class": "GPT2Model"}}, r"='GPT2Model', which is no class"),
        (BYTE_LEVEL | {"tokenizer_config.json": "{"}, r"tokenizer_config.json is not JSON"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
            r"has none of the files \['vocab.json', 'merges.txt'\] of a GPT2Tokenizer, only tokenizer_config.json",
        ),
        (
            {"vocab.json": VOCABULARY, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
            r"the tokenizer in .* \(tokenizer_config.json, vocab.json\) can't be read: .*merges",
        ),
        ({"tokenizer.model": "no pieces"}, r"has tokenizer.model but no tokenizer.json, and says tokenizer_class=None"),
        ({"tokenizer.pkl": "?"}, r"has tokenizer.pkl but no tokenizer.json"),
        ({"vocab.tiktoken": "?"}, r"has vocab.tiktoken but no tokenizer.json"),
    ],
)
def test_files_that_can_not_be_read_are_named(tmp_path: Path, files: dict[str, Any], message: str):
    with pytest.raises(LoadError, match=message):
        load_tokenizer(write(tmp_path / "model", files))


def test_an_unreadable_tokenizer_is_found_before_the_weights_are_read(released: Callable[..., Path]):
    """And a tokenizer of one's own, or taking the files away, mends it."""
    folder = write(released("ouro", change=lambda w: w.clear()), {"tokenizer.model": "?"})
    refuse(
        folder, r"has tokenizer.model but .*\. Pass tokenizer=..., or take these files away to run on token ids alone"
    )
    (folder / "model.safetensors").write_bytes((PARITY / "ouro" / "model.safetensors").read_bytes())
    mine = word_tokenizer()
    assert LoopedModel.from_pretrained(folder, tokenizer=mine).tokenizer is mine


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path):
    code = {"tokens.py": "raise SystemExit('code of a checkpoint was run')"}
    folder = write(tmp_path / "model", BYTE_LEVEL | code)
    named = BYTE_LEVEL["tokenizer_config.json"] | {"auto_map": CODE["auto_map"]}
    tokenizer = load_tokenizer(write(folder, {"tokenizer_config.json": named}))
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
