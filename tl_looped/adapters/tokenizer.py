"""The tokenizer of a checkpoint, without running its code."""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_looped.adapters.weights import read_json, some
from tl_looped.engine.errors import LoadError

_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "*.bpe.model", "*.tiktoken")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where no file belongs to one. Runs no code of the checkpoint.

    It is read from tokenizer.json; without that, by the class of transformers that tokenizer_config.json names, from
    the files of that class (vocab.json and merges.txt, a sentencepiece model, ...).

    Raises:
        LoadError: there are files of a tokenizer that can't be read.
    """
    files = sorted({path.name for pattern in _TOKENIZER for path in folder.glob(pattern)})
    if not files:
        return None
    mend = "Pass tokenizer=..., or take these files away to run on token ids alone."
    kind = PreTrainedTokenizerFast
    if "tokenizer.json" not in files:
        named = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
        kind = getattr(transformers, str(named.get("tokenizer_class")), None)
        if not _reads_own_files(kind):
            raise LoadError(
                f"{folder} has {some(files)} but no tokenizer.json, and says tokenizer_class="
                f"{named.get('tokenizer_class')!r}, which is no class of transformers that could read them. {mend}"
            )
        own = [file for file in kind.vocab_files_names.values() if file != "tokenizer.json"]
        if not any((folder / file).exists() for file in own):
            raise LoadError(f"{folder} has none of the files {own} of a {kind.__name__}, only {some(files)}. {mend}")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise LoadError(f"the tokenizer in {folder} ({some(files)}) can't be read: {error}. {mend}") from error


def _reads_own_files(kind: object) -> TypeGuard[type[PreTrainedTokenizerBase]]:
    """Whether this is a tokenizer of one model, which knows how to split; the general classes need a tokenizer.json."""
    return (
        isinstance(kind, type)
        and issubclass(kind, PreTrainedTokenizerBase)
        and kind.__module__.startswith("transformers.models.")
    )
