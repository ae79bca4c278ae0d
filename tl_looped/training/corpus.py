"""Text that every machine with Python has: the documentation inside the standard library."""

from __future__ import annotations

import ast
import hashlib
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
_HELD_OUT = 20  # one text in so many is held out
_SHORTEST = 200  # characters


@dataclass(frozen=True)
class Corpus:
    """Texts to train on and texts to test on.

    Attributes:
        train, held_out: the texts.
        digest: of all of them: which text it was depends on the version of Python.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    digest: str


def documentation() -> Corpus:
    """The docstrings of each module of the running Python's standard library, and the topics of its language reference.

    A text is one module's docstrings in order, or one topic; very short ones are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        _docstrings(path) for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & {*path.relative_to(root).parts}
    ]
    texts += [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts = [text for text in dict.fromkeys(texts) if len(text) >= _SHORTEST]  # some modules are there twice
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    held_out = tuple(texts[_HELD_OUT - 1 :: _HELD_OUT])
    return Corpus(tuple(text for i, text in enumerate(texts) if i % _HELD_OUT != _HELD_OUT - 1), held_out, digest)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def train_tokenizer(texts: tuple[str, ...], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens; `END` begins every text, and pads."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END)
