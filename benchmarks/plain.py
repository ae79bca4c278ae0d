"""The same looped transformer without hook points, in plain PyTorch: what our forward is measured against.

Written from the equations, with the fused operations of torch and a rotary table that is made once. The parameters have
our names, so that `Plain.of(model)` holds the very tensors of one of our models. It reads what a benchmark feeds it and
checks nothing: token ids without padding, the initial state of the family or one that is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_looped import LoopedConfig, LoopedModel


class Attention(nn.Module):
    """Causal attention with rotary; `explicit` forms softmax(q kᵀ) v step by step instead of in one fused operation."""

    def __init__(self, cfg: LoopedConfig, explicit: bool):
        super().__init__()
        self.n_heads, self.kv_heads, self.d_head = cfg.n_heads, cfg.kv_heads, cfg.d_head
        self.adjacent = cfg.rotary.style == "adjacent"
        self.explicit = explicit
        self.q = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.qk_bias)
        self.k = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.d_head, bias=cfg.qk_bias)
        self.v = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.d_head, bias=False)
        self.o = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.adjacent else x.roll(self.d_head // 2, dims=-1)
        return x * cos + partner * sin

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, pos, _ = x.shape
        q = self.rotate(self.q(x).view(batch, pos, self.n_heads, self.d_head), cos, sin).transpose(1, 2)
        k = self.rotate(self.k(x).view(batch, pos, self.kv_heads, self.d_head), cos, sin).transpose(1, 2)
        v = self.v(x).view(batch, pos, self.kv_heads, self.d_head).transpose(1, 2)
        grouped = self.n_heads != self.kv_heads
        if self.explicit:
            if grouped:
                k, v = (tensor.repeat_interleave(self.n_heads // self.kv_heads, dim=1) for tensor in (k, v))
            above = torch.ones(pos, pos, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-1, -2) * self.d_head**-0.5).masked_fill(above, float("-inf"))
            z = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o(z.transpose(1, 2).reshape(batch, pos, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: LoopedConfig):
        super().__init__()
        self.gate = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.up = nn.Linear(cfg.d_model, cfg.d_mlp, bias=False)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Pre(nn.Module):
    """x + f(N(x)): Llama, and models trained from scratch."""

    def __init__(self, cfg: LoopedConfig, explicit: bool):
        super().__init__()
        self.ln1, self.ln2 = (nn.RMSNorm(cfg.d_model, cfg.eps) for _ in range(2))
        self.attn, self.mlp = Attention(cfg, explicit), MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), cos, sin)
        return x + self.mlp(self.ln2(x))


class Sandwich(Pre):
    """With a second norm a sub-layer."""

    def __init__(self, cfg: LoopedConfig, explicit: bool):
        super().__init__(cfg, explicit)
        self.ln1_post, self.ln2_post = (nn.RMSNorm(cfg.d_model, cfg.eps) for _ in range(2))


class ResidualSandwich(Sandwich):
    """N'(x + f(N(x))): Huginn."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.ln1_post(x + self.attn(self.ln1(x), cos, sin))
        return self.ln2_post(x + self.mlp(self.ln2(x)))


class OutputSandwich(Sandwich):
    """x + N'(f(N(x))): Ouro."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.ln1_post(self.attn(self.ln1(x), cos, sin))
        return x + self.ln2_post(self.mlp(self.ln2(x)))


BLOCKS = {"pre": Pre, "residual_sandwich": ResidualSandwich, "output_sandwich": OutputSandwich}


class Plain(nn.Module):
    """A (p, k⊗T, c)[I] looped transformer, from token ids to logits."""

    def __init__(self, cfg: LoopedConfig, explicit: bool = False):
        super().__init__()
        block = BLOCKS[cfg.norm_placement]
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.prelude = nn.ModuleList(block(cfg, explicit) for _ in range(cfg.n_prelude))
        if cfg.injection == "concat_linear":
            self.injection = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.blocks = nn.ModuleList(block(cfg, explicit) for _ in range(cfg.n_core))
        self.coda = nn.ModuleList(block(cfg, explicit) for _ in range(cfg.n_coda))
        self.ln_final = nn.RMSNorm(cfg.d_model, cfg.eps)
        if cfg.exit_gate:  # a parameter of the family; the logits do not need it
            self.exit_gate = nn.Linear(cfg.d_model, 1)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)

    @classmethod
    def of(cls, model: LoopedModel, n_pos: int, explicit: bool = False) -> Plain:
        """A plain model with the parameters of `model`, for prompts of `n_pos` tokens."""
        cfg = model.cfg
        if cfg.qk_norm is not None or cfg.rotary.scaling is not None:
            raise ValueError("the plain model has no norm on queries and keys, and no rotary scaling")
        with torch.device("meta"):
            plain = cls(cfg, explicit)
        plain.load_state_dict(model.transformer.state_dict(), assign=True)
        angles = torch.outer(torch.arange(n_pos), cfg.rotary.base ** -(torch.arange(0, cfg.d_head, 2) / cfg.d_head))
        pairs = torch.stack((-angles, angles), dim=1 if cfg.rotary.style == "halves" else 2)  # the first turns backward
        angles = pairs.flatten(1)[:, None].to(model.device)
        plain.register_buffer("cos", angles.cos().to(model.dtype))
        plain.register_buffer("sin", angles.sin().to(model.dtype))
        return plain.eval()

    def forward(self, tokens: Tensor, n_loops: int, state: Tensor | None = None) -> Tensor:
        cfg, cos, sin = self.cfg, self.cos, self.sin
        e = self.embed(tokens)
        if cfg.embed_scale != 1.0:
            e = e * cfg.embed_scale
        for block in self.prelude:
            e = block(e, cos, sin)
        x = e if state is None else state
        for _ in range(n_loops):
            if cfg.injection == "add":
                x = x + e
            elif cfg.injection == "concat_linear":
                x = self.injection(torch.cat((x, e), dim=-1))
            for block in self.blocks:
                x = block(x, cos, sin)
            if cfg.loop_norm == "each":
                x = self.ln_final(x)
        if cfg.loop_norm == "last":
            x = self.ln_final(x)
        for block in self.coda:
            x = block(x, cos, sin)
        return self.unembed(self.ln_final(x) if cfg.final_norm else x)
