"""What the tests of the report share: a model whose tokens try to break the page that they are shown on."""

from __future__ import annotations

import re
from typing import Any

from helpers import make
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_looped import LoopedModel
from tl_looped.report import Prompt

ATTACK = "</script><img src=x onerror=window.attacked=1>"
HOSTILE = [
    f" {ATTACK}",
    " <b>bold</b>",
    "${window.attacked=1}",
    " %{y}",
    " $x^2$",
    " &amp;",
    " \"'`",
    "\n",
    " <!--<script>",
    " é",
]


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a space before them, some of which try to break the page they are shown on."""
    words = ["The", " square", " root", " of", " 16", " is", " 4", *HOSTILE]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def hostile_model(**changes: Any) -> LoopedModel:
    """A tiny model with that tokenizer and a name of the same kind."""
    sizes = {"d_vocab": 17, "n_prelude": 1, "n_coda": 1, "injection": "concat_linear", "n_loops": 4}
    return make(tokenizer=hostile_tokenizer(), model_name=f"m{ATTACK}", **{**sizes, **changes})


def numbered(*ids: int, answer: str | None = None) -> Prompt:
    """A prompt of token ids."""
    return Prompt(token_ids=ids, answer=answer)
