"""Multi-head attention with TransformerLens's hook points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, einsum, nn

from tl_looped.engine.config import LoopedConfig
from tl_looped.engine.hooks import HookDict, HookGroup, settle, with_hook_points
from tl_looped.engine.network import Frame, bias_of, is_plain, matrix
from tl_looped.engine.numbers import wide
from tl_looped.engine.parts import RotaryStyle
from tl_looped.engine.schedule import HookSite
from tl_looped.nn.norm import NORMS
from tl_looped.nn.rotary import rotate


@with_hook_points("attn.")
class Attention(nn.Module):
    r"""o(softmax(scale · cap(q kᵀ)) v), with norms and rotary on q and k as the config says.

    With a gate, every channel of a head's values is multiplied by sigmoid(G x) before o, and `hook_z` is behind it.

    The fused attention of torch computes the output. Scores and patterns are formed beside it only at the loops where
    they are hooked, scores in float32 at least, and take its place only where a hook changed them; so watching changes
    nothing, to the bit. (With a soft cap, which the fused one does not know, they are formed always.)
    """

    def __init__(self, cfg: LoopedConfig, registry: HookDict, site: HookSite, looped: bool):
        super().__init__()
        self.cfg = cfg
        self.layer = (site.stack, site.layer)
        self.window = cfg.window(*self.layer)
        self.scale = cfg.score_scale(*self.layer)
        self.turns_apart = self.window is not None and cfg.rotary_windowed is not None
        rotary = cfg.rotary_windowed if self.turns_apart else cfg.rotary
        self.style: RotaryStyle = "halves" if rotary is None else rotary.style
        self.norm_first = cfg.qk_norm is not None and not cfg.qk_norm.after_rotary
        self.norm_last = cfg.qk_norm is not None and cfg.qk_norm.after_rotary
        self.embeds_values = cfg.has_value_embed(*self.layer)
        without = [] if rotary is not None else ["hook_rot_q", "hook_rot_k"]
        without += [] if self.embeds_values else ["hook_value_gate", "hook_value_embed"]
        without += [] if cfg.attn_gate else ["hook_gate"]
        self.hooks = HookGroup(registry, HookSite("attn.", site.stack, site.layer), looped, without)
        n_query, n_key = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
        self.q = nn.Linear(cfg.d_model, n_query, bias=cfg.qk_bias)
        self.k = nn.Linear(cfg.d_model, n_key, bias=cfg.qk_bias)
        self.v = nn.Linear(cfg.d_model, n_key, bias=cfg.v_bias)
        self.o = nn.Linear(n_query, cfg.d_model, bias=cfg.o_bias)
        if cfg.attn_gate:
            self.gate = nn.Linear(cfg.d_model, n_query, bias=False)
        if self.embeds_values:
            self.value_embed = nn.Embedding(cfg.d_vocab, n_key)
            self.value_gate = nn.Linear(cfg.value_gate_size, cfg.kv_heads, bias=False)
        if cfg.qk_norm is not None:
            kind, eps = NORMS[cfg.qk_norm.kind], cfg.qk_norm.eps or cfg.eps
            sizes = (cfg.d_head, cfg.d_head) if cfg.qk_norm.per == "head" else (n_query, n_key)
            self.q_norm, self.k_norm = (kind(size, eps) for size in sizes)

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

    @property
    def b_Q(self) -> Float[Tensor, "heads d_head"]:
        """Query biases by head, zeros where there are none, as are all `b_`."""
        return bias_of(self.q).unflatten(0, (-1, self.cfg.d_head))

    @property
    def b_K(self) -> Float[Tensor, "kv_heads d_head"]:
        """Key biases by key-value head."""
        return bias_of(self.k).unflatten(0, (-1, self.cfg.d_head))

    @property
    def b_V(self) -> Float[Tensor, "kv_heads d_head"]:
        """Value biases by key-value head."""
        return bias_of(self.v).unflatten(0, (-1, self.cfg.d_head))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Bias of what it writes."""
        return bias_of(self.o)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend from every position of `x` to those that `frame.visible` allows."""
        hooks, heads = self.hooks, (*x.shape[:2], -1, self.cfg.d_head)
        q = hooks.hook_q(self.q(x).view(heads), loop)
        k = hooks.hook_k(self.k(x).view(heads), loop)
        v = self.v(x).view(heads)
        if self.embeds_values:
            v = v + self._token_values(x, frame, loop)
        v = hooks.hook_v(v, loop)
        angles = frame.angles_windowed if self.turns_apart else frame.angles
        if self.norm_first:
            q, k = self._normed(q, k)
        if angles is not None:
            q, k = rotate(q, angles, self.style), rotate(k, angles, self.style)
        if self.norm_last:
            q, k = self._normed(q, k)
        if angles is not None:
            q, k = hooks.hook_rot_q(q, loop), hooks.hook_rot_k(k, loop)
        if frame.kv is not None:
            k, v = frame.kv.extend(self.layer, loop, k, v)
        z = self._mix(q, k, v, frame, loop)
        if self.cfg.attn_gate:
            z = z * hooks.hook_gate(self.gate(x).view(heads).sigmoid(), loop)
        z = hooks.hook_z(z, loop)
        out = self.o(z.flatten(-2))
        return self._through_result(out, z, loop) if hooks.hook_result.wants(loop) else out

    def _token_values(
        self, x: Float[Tensor, "batch pos d_model"], frame: Frame, loop: int | None
    ) -> Float[Tensor, "batch pos kv_head d_head"]:
        """What the token itself adds to the values, by a gate of every head: 2σ(W y) E[token]."""
        if frame.tokens is None:
            raise ValueError("unreachable: a model whose layers read tokens gives them to its frames")
        gate = 2 * self.value_gate(x[..., : self.cfg.value_gate_size]).sigmoid()
        embed = self.value_embed(frame.tokens).unflatten(-1, (-1, self.cfg.d_head))
        gate = self.hooks.hook_value_gate(gate, loop)
        return gate[..., None] * self.hooks.hook_value_embed(embed, loop)

    def _normed(
        self, q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos kv_head d_head"]
    ) -> tuple[Float[Tensor, "batch pos head d_head"], Float[Tensor, "batch pos kv_head d_head"]]:
        if self.cfg.qk_norm is not None and self.cfg.qk_norm.per == "head":
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(q.flatten(-2)).view(q.shape), self.k_norm(k.flatten(-2)).view(k.shape)

    def visible(self, frame: Frame, queries: int, keys: int) -> Bool[Tensor, "#batch pos key"] | None:
        """Which key each query of this layer sees; None where it is all up to itself."""
        if self.window is None or keys <= self.window:
            return frame.visible
        last = torch.arange(keys - queries, keys, device=frame.positions.device)[:, None]
        first = torch.arange(keys, device=last.device)
        near = first > last - self.window
        if frame.visible is None:
            return (near & (first <= last))[None]
        seen = near & frame.visible
        return seen | (~seen.any(-1, keepdim=True) & (first == last))  # padding, which would see nothing

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
        visible = self.visible(frame, q.shape[2], k.shape[2])
        hooked = self.hooks.hook_attn_scores.wants(loop) or self.hooks.hook_pattern.wants(loop)
        if self.cfg.score_cap is not None:
            z = self._explicit(q, k, v, visible, loop, None)
        else:
            mask = None if visible is None else visible[:, None]
            # Torch would put a lone query at the first key. (The comparison would stay a symbol in torch.compile.)
            triangle = True if mask is None and q.shape[2] == k.shape[2] else False  # noqa: SIM210
            z = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=triangle, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            if hooked:
                z = self._explicit(q, k, v, visible, loop, z)
        return z.transpose(1, 2)

    def _explicit(
        self,
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        v: Float[Tensor, "batch kv_head key d_head"],
        visible: Bool[Tensor, "#batch pos key"] | None,
        loop: int | None,
        fast: Float[Tensor, "batch head pos d_head"] | None,
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Z by scores and pattern, shown to their hooks; the fast one, where there is one and no hook changed them."""
        group, cfg = q.shape[1] // k.shape[1], self.cfg
        k, v = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (k, v))
        if visible is None:
            queries, keys = q.shape[2], k.shape[2]
            hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
        else:
            hidden = ~visible[:, None]
        scores = wide(q) @ wide(k).transpose(-1, -2) * (self.scale or cfg.d_head**-0.5)
        if cfg.score_cap is not None:
            scores = (scores / cfg.score_cap).tanh() * cfg.score_cap
        scores = scores.masked_fill(hidden, float("-inf"))
        if fast is None:
            pattern = self.hooks.hook_attn_scores(scores, loop).softmax(-1).to(v.dtype)
            return self.hooks.hook_pattern(pattern, loop) @ v
        scores, scores_changed = self.hooks.hook_attn_scores.fire(scores, loop)
        pattern, pattern_changed = self.hooks.hook_pattern.fire(scores.softmax(-1).to(v.dtype), loop)
        return settle(fast, lambda: pattern @ v, scores_changed, pattern_changed)

    def _through_result(
        self, out: Float[Tensor, "batch pos d_model"], z: Float[Tensor, "batch pos head d_head"], loop: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Show each head's contribution to its hooks; the given output, unless a hook changed one."""
        result, bias = self.results(z)
        result, changed = self.hooks.hook_result.fire(result, loop)
        return settle(out, lambda: result.sum(2) if bias is None else result.sum(2) + bias, changed)

    def results(
        self, z: Float[Tensor, "batch pos head d_head"]
    ) -> tuple[Float[Tensor, "batch pos head d_model"], Tensor | None]:
        """(what each head adds, what is added beside them)."""
        if is_plain(self.o):
            return einsum("bphd,hdm->bphm", z, self.W_O), self.o.bias
        # An adapter: the module itself, which is taken to be affine, on one head at a time.
        bias = self.o(torch.zeros_like(z[:1, :1]).flatten(-2))
        alone = torch.eye(z.shape[2], dtype=torch.bool, device=z.device)[:, :, None]
        return torch.stack([self.o(z.where(head, 0).flatten(-2)) - bias for head in alone], dim=2), bias
