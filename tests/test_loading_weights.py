"""In which number format weights are loaded, which are refused, and that what is saved is the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, config, make, parity, refuse, same_logits, tokens_for
from torch import nn
from torch.nn.utils import parametrize

from tl_looped import InputError, LoopedModel

Weights = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


# Number formats.


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_number_format_by_name(released, dtype):
    loaded = LoopedModel.from_pretrained(released("ouro"), dtype=dtype)
    made = LoopedModel.from_config(config(), dtype=dtype)
    for model in (loaded, made):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_a_number_format_as_stored(released, dtype):
    folder = released("ouro", change=lambda w: w.update({name: weight.half() for name, weight in w.items()}))
    assert LoopedModel.from_pretrained(folder, dtype=dtype).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat", "int8", "", torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_a_number_format_that_can_not_compute(released, dtype):
    message = r"dtype must be one of float16, bfloat16, float32, float64, got "
    refuse(released("ouro"), message, InputError, dtype=dtype)
    with pytest.raises(InputError, match=message):
        LoopedModel.from_config(config(), dtype=dtype)


def test_a_misspelt_number_format_learns_the_right_one(released):
    refuse(released("ouro"), r"got 'bfloat'. Nearest: 'bfloat16'", InputError, dtype="bfloat")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", torch.device("cuda:99")])
def test_a_device_that_is_not_there(released, device):
    refuse(released("ouro"), r"device='?.* can't be used here: ", InputError, device=device)
    with pytest.raises(InputError, match=r"can't be used here: "):
        LoopedModel.from_config(config(), device=device)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", DOWN])
def test_weights_of_several_formats_are_refused_unless_one_is_asked_for(released, name: str):
    """Whichever is the odd one: taking the embedding's would round the others, or widen all, without a word."""

    def mix(weights: Weights) -> None:
        weights.update({one: weight.bfloat16() for one, weight in weights.items() if one != name})

    folder = released("ouro", change=mix)
    refuse(
        folder, rf"in several number formats: .*torch.float32 \({name}\).* pass dtype=torch.float32, which holds all"
    )
    model = LoopedModel.from_pretrained(folder, dtype="float32")
    wanted = parity("ouro").state_dict()
    for ours, weight in model.state_dict().items():
        same = torch.equal(weight, wanted[ours])
        assert same or torch.equal(weight, wanted[ours].bfloat16().float())
    assert sum(torch.equal(weight, wanted[one]) for one, weight in model.state_dict().items()) >= 1


def test_two_half_formats_need_a_wider_one(released):
    folder = released(
        "ouro", change=lambda w: w.update({n: x.bfloat16() if "proj" in n else x.half() for n, x in w.items()})
    )
    refuse(folder, r"torch.float16 \(.* and \d+ more\), .*torch.bfloat16|torch.bfloat16 .*, torch.float16 .*")
    refuse(folder, r"pass dtype=torch.float32, which holds all of them exactly")


def test_a_rotary_table_may_have_a_format_of_its_own(released):
    """It is checked, not loaded."""
    folder = released("huginn", change=lambda w: w.update({n: x.half() for n, x in w.items() if n != "freqs_cis"}))
    assert LoopedModel.from_pretrained(folder).dtype == torch.float16


# Weights that are no numbers, or not these.


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.int64, "I64")]
)
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_weights_of_whole_numbers_are_refused(released, dtype, stored: str, asked):
    """Quantised weights without their scales would load as numbers."""
    folder = released("ouro", change=lambda w: w.update({DOWN: w[DOWN].to(dtype)}))
    refuse(
        folder,
        rf"not in one of the formats F16, BF16, F32, F64, as quantised weights are: {DOWN} is {stored}",
        dtype=asked,
    )


def test_weights_of_eight_bits_are_refused(released):
    folder = released("ouro", change=lambda w: w.update({n: x.to(torch.float8_e4m3fn) for n, x in w.items()}))
    refuse(folder, r"as quantised weights are: lm_head.weight is F8_E4M3, .* and \d+ more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("family", "name"),
    [("ouro", DOWN), ("ouro", "model.embed_tokens.weight"), ("ouro", "model.early_exit_gate.bias")]
    + [("huginn", "transformer.core_block.2.attn.Wqkv.weight"), ("huginn", "transformer.coda.0.attn.qk_bias")],
)
def test_weights_that_are_not_finite_are_refused_by_name(released, family: str, name: str, value: float):
    def spoil(weights: Weights) -> None:
        weights[name].view(-1)[-1] = value

    folder = released(family, change=spoil)
    refuse(folder, f"'{name}' is stored with 1 values that are NaN or infinite")
    refuse(folder, f"'{name}' is stored with 1 values that are NaN or infinite", dtype="bfloat16")


def test_a_rotary_table_that_is_not_finite(released):
    folder = released("huginn", change=lambda w: w["freqs_cis"].view(-1)[7:8].fill_(float("nan")))
    refuse(folder, r"freqs_cis differs by nan from the rotary table")


def test_weights_too_large_for_the_format_asked_for(released):
    folder = released("ouro", change=lambda w: w[DOWN].view(-1)[3:4].fill_(1e5))
    refuse(
        folder,
        rf"'{DOWN}' has values up to 1e\+05, too large for dtype=torch.float16: pass dtype=torch.bfl",
        dtype="float16",
    )
    assert LoopedModel.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16


# Saving.


class LowRank(nn.Module):
    """An adapter around a linear map, as of PEFT."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 1, bias=False), nn.Linear(1, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def wrap(model: LoopedModel) -> None:
    attention: Any = model.transformer.blocks[1].attn
    attention.o = LowRank(attention.o)


def reparametrise(model: LoopedModel) -> None:
    parametrize.register_parametrization(model.transformer.blocks[0].mlp.down, "weight", Doubled())


def add_beside(model: LoopedModel) -> None:
    model.transformer.blocks[0].add_module("probe", nn.Linear(2, 2))


def add_weight(model: LoopedModel) -> None:
    model.transformer.ln_final.register_parameter("bias", nn.Parameter(torch.zeros(16)))


def resize(model: LoopedModel) -> None:
    model.transformer.embed = nn.Embedding(30, 16)


def untie(model: LoopedModel) -> None:
    model.transformer.unembed.weight = nn.Parameter(model.transformer.unembed.weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            wrap,
            r"not be the model: blocks.1.attn.o \(LowRank\), blocks.1.attn.o.base_layer \(Linear\), .* Merge adapters",
        ),
        (reparametrise, r"blocks.0.mlp.down \(ParametrizedLinear\), "),
        (add_beside, r"blocks.0.probe \(Linear\)\. Merge"),
        (
            add_weight,
            r"ln_final.bias \(16,\)\. Merge adapters into the weights first \(PEFT: merge_and_unload\(\)\), or",
        ),
        (resize, r"embed.weight \(24, 16\), embed.weight \(30, 16\)"),
        (untie, r"unembed.weight \(24, 16\)"),
    ],
)
def test_a_model_with_parts_that_are_not_its_own_is_not_saved(tmp_path: Path, change, message: str):
    """A folder without the adapter, or one that does not load again, is worse than none."""
    model = make(**TINY["huginn"])
    change(model)
    with pytest.raises(InputError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_saved(tmp_path: Path):
    model = make()
    base: Any = model.transformer.blocks[1].attn.o
    wrap(model)
    wrapped: Any = model.transformer.blocks[1].attn.o
    logits = model(tokens_for(model))
    base.weight = nn.Parameter(base.weight.detach() + wrapped.up.weight.detach() @ wrapped.down.weight.detach())
    attention: Any = model.transformer.blocks[1].attn
    attention.o = base
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(LoopedModel.from_pretrained(tmp_path / "model")(tokens_for(model)), logits)


def test_a_model_loaded_from_mixed_formats_saves_one(released, tmp_path: Path):
    folder = released("ouro", change=lambda w: w.update({DOWN: w[DOWN].double()}))
    LoopedModel.from_pretrained(folder, dtype="float32").save_pretrained(tmp_path / "again")
    assert same_logits(LoopedModel.from_pretrained(tmp_path / "again"), "ouro")
