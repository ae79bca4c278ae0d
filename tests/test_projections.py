"""Projections with something on them: what is computed is what the module computes, and weights that are not its map
are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TINY, make, tokens_for
from torch import nn
from torch.nn.utils import parametrize

from tl_looped import InputError, LoopedModel


class Adapter(nn.Module):
    """W x + B A x, which shows the base's weight as its own, as PEFT's does."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.base.in_features, self.base.out_features)
        with torch.no_grad():
            linear.weight.copy_(self.base.weight + self.b.weight @ self.a.weight)
            linear.bias.copy_(self.b.bias if self.base.bias is None else self.base.bias + self.b.bias)
        return linear


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.fixture(params=TINY)
def pair(request: pytest.FixtureRequest) -> tuple[LoopedModel, LoopedModel]:
    """A model with adapters on every projection of attention, and the same with these merged."""
    torch.manual_seed(0)
    adapted = make(**TINY[request.param])
    merged = copy.deepcopy(adapted)
    for block, other in zip(adapted.transformer.blocks, merged.transformer.blocks, strict=True):
        for name in "qkvo":
            adapter = Adapter(getattr(block.attn, name))
            setattr(block.attn, name, adapter)
            setattr(other.attn, name, adapter.merged())
    return adapted, merged


@torch.no_grad()
def test_each_heads_result_is_what_an_adapter_makes_of_it(pair):
    adapted, merged = pair
    tokens, names = tokens_for(adapted), ["blocks.1.attn.hook_result", "blocks.1.attn.hook_z"]
    clean, cache = adapted.run_with_cache(tokens, names_filter=names)
    _, wanted = merged.run_with_cache(tokens, names_filter=names)
    torch.testing.assert_close(cache["result", 1, 1], wanted["result", 1, 1], rtol=1e-4, atol=1e-5)
    o = adapted.transformer.blocks[1].attn.o
    total = cache["result", 1, 1].sum(2) + o.b.bias
    torch.testing.assert_close(total, o(cache["z", 1, 1].flatten(2)), rtol=1e-4, atol=1e-5)

    def without_head(x, hook):
        x[:, :, 2] = 0

    hooks = [("blocks.1.loop.1.attn.hook_result", without_head)]
    edited, other = (model.run_with_hooks(tokens, fwd_hooks=hooks) for model in (adapted, merged))
    torch.testing.assert_close(edited, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited, clean, atol=1e-2)
    watched = adapted.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_result", lambda x, hook: None)])
    assert torch.equal(watched, adapted(tokens))


def test_gradients_come_through_an_adapter(pair):
    tokens, name = tokens_for(pair[0]), "blocks.1.attn.hook_result"
    found = []
    for model in pair:
        _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=name)
        found.append(cache["result_grad", 1, 0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_torch_hook_on_a_projection_is_part_of_its_map():
    model = make(**TINY["llama"])
    o = model.transformer.blocks[0].attn.o
    o.register_forward_hook(lambda module, inputs, out: 3 * out)
    _, cache = model.run_with_cache(
        tokens_for(model), names_filter=["blocks.0.attn.hook_result", "blocks.0.attn.hook_z"]
    )
    torch.testing.assert_close(cache["result", 0, 1].sum(2), o(cache["z", 0, 1].flatten(2)), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"attn.o is a Linear, no plain layer, or has torch hooks on it"):
        _ = model.transformer.blocks[0].attn.W_O


def test_weights_that_are_not_the_map_are_refused():
    model = make(**TINY["llama"])
    block = model.transformer.blocks[0]
    matrices = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
    for name, part in matrices.items():
        setattr(block.attn, part, Adapter(getattr(block.attn, part)))
        message = rf"attn.{part} is a Adapter, no plain layer, .* merge the adapter first \(merge_and_unload in PEFT\)"
        with pytest.raises(InputError, match=message):
            getattr(block.attn, name)
    for name, part in {"W_gate": "gate", "W_in": "up", "W_out": "down"}.items():
        setattr(block.mlp, part, Adapter(getattr(block.mlp, part)))
        with pytest.raises(InputError, match=f"mlp.{part} is a Adapter"):
            getattr(block.mlp, name)
    model.transformer.unembed = Adapter(model.transformer.unembed)
    with pytest.raises(InputError, match="unembed is a Adapter"):
        _ = model.W_U
    model.transformer.embed.register_forward_hook(lambda module, inputs, out: 2 * out)
    with pytest.raises(InputError, match="embed is a Embedding, no plain layer, or has torch hooks on it"):
        _ = model.W_E


@torch.no_grad()
def test_a_parametrised_weight_is_its_map():
    model = make(**TINY["llama"])
    attn = model.transformer.blocks[0].attn
    before = attn.W_O.clone()
    parametrize.register_parametrization(attn.o, "weight", Doubled())
    assert torch.equal(attn.W_O, 2 * before)
