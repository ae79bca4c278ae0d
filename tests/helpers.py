"""What several test files share: the parity models, tiny configs, a tokenizer, and ways to look at a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from tl_looped import LoadError, LoopedConfig, LoopedModel, QKNorm, Rotary, TwoStates

PARITY = Path(__file__).parent / "parity"
# Ouro and the Raven family; those since have a battery of their own in test_families.py.
FAMILIES = ["huginn", "ouro", "ouro-gqa", "retrofit-llama", "retrofit-olmo2", "retrofit-tinyllama"]
_ENDS = {"n_prelude": 1, "n_coda": 1}
_DRAWN = {"state_init": "truncated_normal", "state_init_std": 0.3, "injection": "concat_linear"}
# Two small layers of each family, for what does not need the published weights.
TINY: dict[str, dict[str, Any]] = {
    "huginn": {**_ENDS, **_DRAWN, "norm_placement": "residual_sandwich", "loop_norm": "last", "qk_bias": True}
    | {"rotary": Rotary(style="adjacent"), "tie_embeddings": True, "embed_scale": 4.0, "state_init_scale": 4.0},
    "ouro": {"norm_placement": "output_sandwich", "loop_norm": "each", "final_norm": False, "exit_gate": True}
    | {"n_key_value_heads": 2},
    "llama": {**_ENDS, **_DRAWN, "n_key_value_heads": 2},
    "olmo2": {**_ENDS, **_DRAWN, "norm_placement": "output", "qk_norm": QKNorm()},
    "added": {**_ENDS, "injection": "add", "state_init": "prelude"},
}
# Two stacks that loop, as HRM-Text has them: L_blocks twice in each of two loops, then H_blocks once.
TWO_STATES: dict[str, Any] = {
    "two_states": TwoStates(2),
    "norm": "weightless",
    "loop_norm": "each",
    "final_norm": False,
}
TWO_STATES |= {"attn_gate": True, "prefix_lm": True}
WORDS = ["<pad>", "<bos>", "a", "b", "c", "d", "e", "f", "g", "h", "=", ";"]


@lru_cache
def parity(family: str, dtype: torch.dtype = torch.float32) -> LoopedModel:
    """The model of a parity folder. Tests share it, so they leave no hook and no changed weight behind."""
    return LoopedModel.from_pretrained(PARITY / family, dtype=dtype)


@lru_cache
def expected(family: str) -> dict[str, Tensor]:
    """What the public reference code computed for it."""
    return load_file(PARITY / family / "expected.safetensors")


def run_options(family: str, model: LoopedModel) -> dict[str, Tensor]:
    """The initial state that the reference was given, where the family draws one."""
    states = expected(family).get("input_states")
    return {} if states is None else {"initial_state": states.to(model.dtype)}


def config(**changes: Any) -> LoopedConfig:
    """A tiny config: two core layers, two loops."""
    sizes = {
        "d_model": 16,
        "n_heads": 4,
        "d_head": 4,
        "d_mlp": 12,
        "d_vocab": 24,
        "n_ctx": 32,
        "n_core": 2,
        "n_loops": 2,
    }
    return LoopedConfig(**{**sizes, **changes})


def make(dtype: torch.dtype = torch.float32, tokenizer: Any = None, **changes: Any) -> LoopedModel:
    """A tiny random model. Norm weights and biases are random too, else a missing one would go unseen."""
    model = LoopedModel.from_config(config(**changes), seed=1, tokenizer=tokenizer, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


@lru_cache
def tiny(family: str, dtype: torch.dtype = torch.float32) -> LoopedModel:
    """One of `TINY`, shared as the parity models are."""
    return make(dtype, **TINY[family])


def tokens_for(model: LoopedModel, batch: int = 2, pos: int = 5, seed: int = 3) -> Tensor:
    """Random token ids, [batch, pos]."""
    return torch.randint(model.cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(seed))


def noise_like(x: Tensor, seed: int = 4) -> Tensor:
    """Standard normal numbers in the shape of x."""
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw.to(x)


def fired(model: LoopedModel, *args: Any, **options: Any) -> list[str]:
    """The names of all sites that a run calls, in order."""
    names: list[str] = []
    model.run_with_hooks(*args, fwd_hooks=[(lambda _: True, lambda _, hook: names.append(hook.name))], **options)
    return names


def hook_count(model: LoopedModel) -> int:
    """How many hooks are registered on the model."""
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.points())


def word_tokenizer(bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single words (`WORDS`) that knows no others; with `bos` it starts every text with one."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{"pad_token": "<pad>", "bos_token": "<bos>", **special})


def same_logits(model: LoopedModel, family: str) -> bool:
    """Whether a model computes what the family's parity model does, to the bit."""
    tokens, original = expected(family)["input_ids"], parity(family)
    with torch.no_grad():
        ours, theirs = (one(tokens, **run_options(family, one)) for one in (model, original))
    return torch.equal(ours, theirs)


def refuse(folder: Path | str, message: str, error: type[Exception] = LoadError, **options: Any) -> None:
    """Loading it must raise, with this message."""
    with pytest.raises(error, match=message):
        LoopedModel.from_pretrained(folder, **options)


class Waits(TorchDispatchMode):
    """Counts where a program asks for a number on the device: `.item()`, `bool`, `torch.equal`, `.tolist()` and such.

    Attributes:
        seen: what was asked, one entry each time.
    """

    _asking = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "unique2", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in self._asking:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Record every time that numbers leave the device, as if the CPU were one, for the length of a `with` block."""
    mode, names = Waits(), ("tolist", "cpu", "numpy")
    methods = {name: getattr(Tensor, name) for name in names}

    def seen(name: str) -> Any:
        return lambda self, *args, **kwargs: mode.seen.append(name) or methods[name](self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, seen(name))
        with mode:
            yield mode.seen
