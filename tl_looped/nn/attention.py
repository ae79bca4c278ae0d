"""Multi-head attention with TransformerLens's hook points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, einsum, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup, settle
from tl_looped.engine.network import Frame, is_plain, matrix
from tl_looped.engine.numbers import wide
from tl_looped.engine.schedule import HookSite
from tl_looped.nn.norm import RMSNorm
from tl_looped.nn.rotary import rotate


class Attention(nn.Module):
    r"""o(softmax(q kᵀ / sqrt(d_head)) v), with rotary on q and k and as many key-value heads as the config says.

    The fused attention of torch computes the output. Scores and patterns are formed beside it only at the loops where
    they are hooked, scores in float32 at least, and take its place only where a hook changed them; so watching changes
    nothing, to the bit.
    """

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()
        self.cfg = cfg
        self.layer = (site.stack, site.layer)
        self.hooks = HookGroup(registry, HookSite("attn.", site.stack, site.layer), looped)
        n_query, n_key = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        self.q = nn.Linear(cfg.d_model, n_query, bias=cfg.qk_bias)
        self.k = nn.Linear(cfg.d_model, n_key, bias=cfg.qk_bias)
        self.v = nn.Linear(cfg.d_model, n_key, bias=False)
        self.o = nn.Linear(n_query, cfg.d_model, bias=False)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(n_query, cfg.eps)
            self.k_norm = RMSNorm(n_key, cfg.eps)

    def _by_head(self, name: str) -> Float[Tensor, "heads d_model d_head"]:
        return matrix(getattr(self, name), f"attn.{name}").unflatten(0, (-1, self.cfg.d_head)).transpose(1, 2)

    @property
    def W_Q(self) -> Float[Tensor, "heads d_model d_head"]:
        """Query weights by head, a view."""
        return self._by_head("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_heads d_model d_head"]:
        """Key weights by key-value head, a view."""
        return self._by_head("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_heads d_model d_head"]:
        """Value weights by key-value head, a view."""
        return self._by_head("v")

    @property
    def W_O(self) -> Float[Tensor, "heads d_head d_model"]:
        """Output weights by head, a view."""
        return matrix(self.o, "attn.o").unflatten(1, (-1, self.cfg.d_head)).permute(1, 2, 0)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend from every position of `x` to those that `frame.visible` allows."""
        hooks, heads = self.hooks, (*x.shape[:2], -1, self.cfg.d_head)
        q = hooks.hook_q(self.q(x).view(heads), loop)
        k = hooks.hook_k(self.k(x).view(heads), loop)
        v = hooks.hook_v(self.v(x).view(heads), loop)
        if self.cfg.qk_norm:
            q = self.q_norm(q.flatten(-2)).view(heads)
            k = self.k_norm(k.flatten(-2)).view(heads)
        q = hooks.hook_rot_q(rotate(q, frame.cos, frame.sin, self.cfg.rotary_style), loop)
        k = hooks.hook_rot_k(rotate(k, frame.cos, frame.sin, self.cfg.rotary_style), loop)
        if frame.kv is not None:
            k, v = frame.kv.extend(self.layer, loop, k, v)
        z = hooks.hook_z(self._mix(q, k, v, frame, loop), loop)
        out = self.o(z.flatten(-2))
        return self._through_result(out, z, loop) if hooks.hook_result.wants(loop) else out

    def _mix(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch key kv_head d_head"],
        v: Float[Tensor, "batch key kv_head d_head"],
        frame: Frame,
        loop: int | None,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The weighted values of each head, z."""
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        mask = None if frame.visible is None else frame.visible[:, None]
        # Torch would put a lone query at the first key. (The comparison itself would stay a symbol in torch.compile.)
        triangle = True if mask is None and q.shape[2] == k.shape[2] else False  # noqa: SIM210
        grouped = k.shape[1] != q.shape[1]
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=triangle, enable_gqa=grouped)
        if self.hooks.hook_attn_scores.wants(loop) or self.hooks.hook_pattern.wants(loop):
            z = self._through_pattern(z, q, k, v, frame, loop)
        return z.transpose(1, 2)

    def _through_pattern(
        self,
        z: Float[Tensor, "batch head pos d_head"],
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        frame: Frame,
        loop: int | None,
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Show the scores and the pattern to their hooks; the given z, unless a hook changed them."""
        group = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (k, v))
        if frame.visible is None:
            queries, keys = q.shape[2], k.shape[2]
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
        else:
            hidden = ~frame.visible[:, None]
        scores = (wide(q) @ wide(k).transpose(-1, -2) * self.cfg.d_head**-0.5).masked_fill(hidden, float("-inf"))
        scores, scores_changed = self.hooks.hook_attn_scores.fire(scores, loop)
        pattern, pattern_changed = self.hooks.hook_pattern.fire(scores.softmax(-1).to(v.dtype), loop)
        return settle(z, lambda: pattern @ v, scores_changed, pattern_changed)

    def _through_result(
        self, out: Float[Tensor, "batch pos d_model"], z: Float[Tensor, "batch pos head d_head"], loop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Show each head's contribution to its hooks; the given output, unless a hook changed one."""
        if is_plain(self.o):
            result, bias = einsum("bphd,hdm->bphm", z, self.W_O), self.o.bias
        else:  # an adapter: the module itself, which is taken to be affine, on one head at a time
            bias = self.o(torch.zeros_like(z[:1, :1]).flatten(-2))
            alone = torch.eye(z.shape[2], dtype=torch.bool, device=z.device)[:, :, None]
            result = torch.stack([self.o(z.where(head, 0).flatten(-2)) - bias for head in alone], dim=2)
        result, changed = self.hooks.hook_result.fire(result, loop)
        return settle(out, lambda: result.sum(2) if bias is None else result.sum(2) + bias, changed)
