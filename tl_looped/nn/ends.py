"""What all networks here share at their ends: the head, and the weights that they begin with."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.network import CappedLinear
from tl_looped.nn.block import ACTS
from tl_looped.nn.norm import NORMS, PlusOneRMSNorm

_DRAWN = (
    "embed.weight",
    "pos_embed.weight",
    "puzzles.weight",
    "state_init",
    "h_init",
)  # N(0, 1): what a residual stream begins with


class HeadTransform(nn.Module):
    """N(act(W x + b)): what a head may read in place of the residual stream."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        width = cfg.d_embed or cfg.d_model
        self.inner = nn.Linear(cfg.d_model, width)
        self.act = ACTS[cfg.act_fn]
        self.norm = NORMS[cfg.norm](width, cfg.eps)

    def forward(self, x: Float[Tensor, "*dims d_model"]) -> Float[Tensor, "*dims d_read"]:
        """What the head reads."""
        return self.norm(self.act(self.inner(x)))


def head(cfg: LoopedConfig, embed: nn.Embedding) -> nn.Linear:
    """From what the last norm gives to logits; its weight is the embedding's where the config ties them."""
    if cfg.logit_cap is None:
        width = cfg.d_embed or cfg.d_model
        unembed = nn.Linear(width, cfg.d_vocab, bias=cfg.head_transform)
    else:
        unembed = CappedLinear(cfg.d_model, cfg.d_vocab, cfg.logit_cap)
    if cfg.tie_embeddings:
        unembed.weight = embed.weight
    return unembed


@torch.no_grad()
def random_weights(network: nn.Module, seed: int) -> None:
    """Random weights from a seed, the same on every device.

    Matrices N(0, 1/fan_in), embedding N(0, 1), norms one, biases zero: streams of order one at any width. Embedding
    and head stay one tensor where they are tied.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = [m.weight for m in network.modules() if isinstance(m, PlusOneRMSNorm)]
    for name, weight in network.named_parameters():
        if weight.ndim == 1 and name not in _DRAWN:
            at_zero = name.endswith("bias") or any(weight is one for one in offsets)
            weight.fill_(0.0 if at_zero else 1.0)
        else:
            std = 1.0 if name in _DRAWN else 1 / math.sqrt(weight.shape[1])
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
