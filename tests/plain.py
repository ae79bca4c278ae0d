"""A slow looped transformer straight from the equations: loops over heads, explicit softmax, no module, no hook point.

Written apart from the package and sharing nothing with it but the names of weights and of activations. Every activation
is handed to `see(name, value)`, and what comes back is used: that is how a test reads one, edits one or asks for its
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

See = Callable[[str, Tensor], Tensor]


def frequencies(cfg: Any) -> Tensor:
    """Rotary frequencies in float32, as every public implementation has them; Llama 3's rule by wavelength."""
    found = []
    for i in range(cfg.d_head // 2):
        exponent = torch.tensor(2.0 * i) / cfg.d_head
        frequency = 1.0 / (cfg.rotary.base**exponent)
        if (scaling := cfg.rotary.scaling) is not None:
            wavelength = 2 * math.pi / frequency
            long, short = (scaling.original_n_ctx / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
            if wavelength > long:
                frequency = frequency / scaling.factor
            elif wavelength >= short:
                share = (scaling.original_n_ctx / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - share) * frequency / scaling.factor + share * frequency
        found.append(frequency)
    return torch.stack(found)


def rotate(cfg: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Turn each pair of components of one head, [batch, pos, d_head], by position times frequency."""
    out = x.clone()
    for i, frequency in enumerate(frequencies(cfg)):
        a, b = (i, i + cfg.d_head // 2) if cfg.rotary.style == "halves" else (2 * i, 2 * i + 1)
        angle = positions.float() * frequency
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        out[..., a] = cos * x[..., a] - sin * x[..., b]
        out[..., b] = sin * x[..., a] + cos * x[..., b]
    return out


class Plain:
    """The model of a config and its weights by name; `run` returns logits."""

    def __init__(self, cfg: Any, weights: Mapping[str, Tensor], see: See = lambda name, value: value):
        self.cfg, self.w, self.see = cfg, dict(weights), see

    def norm(self, x: Tensor, weight: str, site: str | None = None) -> Tensor:
        scale = torch.sqrt((x * x).mean(-1, keepdim=True) + self.cfg.eps)
        if site is None:
            return x / scale * self.w[weight]
        scale = self.see(f"{site}.hook_scale", scale)
        return self.see(f"{site}.hook_normalized", x / scale) * self.w[weight]

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.w.get(f"{name}.bias")
        return x @ self.w[f"{name}.weight"].T + (0 if bias is None else bias)

    def attention(self, x: Tensor, where: str, at: str) -> Tensor:
        cfg, see = self.cfg, self.see
        n_kv = cfg.n_key_value_heads or cfg.n_heads
        parts = {}
        for part, count in (("q", cfg.n_heads), ("k", n_kv), ("v", n_kv)):
            heads = self.linear(x, f"{where}.attn.{part}").split(cfg.d_head, dim=-1)
            assert len(heads) == count
            parts[part] = see(f"{at}.attn.hook_{part}", torch.stack(heads, dim=2))
        for part in ("q", "k"):
            if cfg.qk_norm:
                whole = self.norm(parts[part].flatten(2), f"{where}.attn.{part}_norm.weight")
                parts[part] = torch.stack(whole.split(cfg.d_head, dim=-1), dim=2)
            turned = [rotate(cfg, head, self.positions) for head in parts[part].unbind(2)]
            parts[part] = see(f"{at}.attn.hook_rot_{part}", torch.stack(turned, dim=2))
        kv_head = [h // (cfg.n_heads // n_kv) for h in range(cfg.n_heads)]  # neighbours share their keys and values
        scores = torch.stack(
            [parts["q"][:, :, h] @ parts["k"][:, :, kv_head[h]].mT / math.sqrt(cfg.d_head) for h in range(cfg.n_heads)],
            dim=1,
        )
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        scores = see(f"{at}.attn.hook_attn_scores", scores.masked_fill(future, -torch.inf))
        raised = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        pattern = see(f"{at}.attn.hook_pattern", raised / raised.sum(-1, keepdim=True))
        z = torch.stack([pattern[:, h] @ parts["v"][:, :, kv_head[h]] for h in range(cfg.n_heads)], dim=2)
        z = see(f"{at}.attn.hook_z", z)
        columns = self.w[f"{where}.attn.o.weight"].split(cfg.d_head, dim=1)
        result = torch.stack([z[:, :, h] @ columns[h].T for h in range(cfg.n_heads)], dim=2)
        return see(f"{at}.attn.hook_result", result).sum(2)

    def mlp(self, x: Tensor, where: str, at: str) -> Tensor:
        pre = self.see(f"{at}.mlp.hook_pre", self.linear(x, f"{where}.mlp.gate"))
        pre_linear = self.see(f"{at}.mlp.hook_pre_linear", self.linear(x, f"{where}.mlp.up"))
        post = self.see(f"{at}.mlp.hook_post", pre / (1 + torch.exp(-pre)) * pre_linear)
        return self.linear(post, f"{where}.mlp.down")

    def layer(self, x: Tensor, where: str, at: str) -> Tensor:
        x = self.see(f"{at}.hook_resid_pre", x)
        for part, number, after in ((self.attention, 1, "mid"), (self.mlp, 2, "post")):
            name = "attn_out" if number == 1 else "mlp_out"
            before = (f"{where}.ln{number}.weight", f"{at}.ln{number}")
            behind = (f"{where}.ln{number}_post.weight", f"{at}.ln{number}_post")
            if self.cfg.norm_placement == "pre":  # x + f(N(x))
                x = x + self.see(f"{at}.hook_{name}", part(self.norm(x, *before), where, at))
            elif self.cfg.norm_placement == "residual_sandwich":  # N'(x + f(N(x)))
                x = x + self.see(f"{at}.hook_{name}", part(self.norm(x, *before), where, at))
                x = self.norm(x, *behind)
            elif self.cfg.norm_placement == "output_sandwich":  # x + N'(f(N(x)))
                out = self.norm(part(self.norm(x, *before), where, at), *behind)
                x = x + self.see(f"{at}.hook_{name}", out)
            else:  # x + N'(f(x))
                x = x + self.see(f"{at}.hook_{name}", self.norm(part(x, where, at), *behind))
            x = self.see(f"{at}.hook_resid_{after}", x)
        return x

    def run(self, tokens: Tensor, n_loops: int, state: Tensor | None = None) -> Tensor:
        """Logits after n loops, from `state` where the model draws one at random."""
        cfg, see = self.cfg, self.see
        self.positions = torch.arange(tokens.shape[1])
        x = see("hook_embed", self.w["embed.weight"][tokens] * cfg.embed_scale)
        for layer in range(cfg.n_prelude):
            x = self.layer(x, f"prelude.{layer}", f"prelude.{layer}")
        e = x
        if cfg.state_init == "zeros":
            x = torch.zeros_like(e)
        elif cfg.state_init != "prelude":
            assert state is not None
            x = state
        if not x.requires_grad:
            x = x.detach().clone().requires_grad_()  # a state that no weight made has a gradient all the same
        x = see("hook_state_init", x)
        for t in range(n_loops):
            x = see(f"loop.{t}.hook_state_pre", x)
            if cfg.injection == "add":
                x = x + see(f"loop.{t}.hook_injection_in", e)
            elif cfg.injection == "concat_linear":
                from_state, from_input = self.w["injection.weight"].split(cfg.d_model, dim=1)
                x = x @ from_state.T + see(f"loop.{t}.hook_injection_in", e) @ from_input.T
            x = see(f"loop.{t}.hook_injection", x)
            for layer in range(cfg.n_core):
                x = self.layer(x, f"blocks.{layer}", f"blocks.{layer}.loop.{t}")
            if cfg.loop_norm == "each":
                x = self.norm(x, "ln_final.weight", f"loop.{t}.ln_loop")
            x = see(f"loop.{t}.hook_state_post", x)
            if cfg.exit_gate:
                see(f"loop.{t}.hook_exit_gate", self.linear(x, "exit_gate")[..., 0])
        if cfg.loop_norm == "last":
            x = self.norm(x, "ln_final.weight", "ln_coda")
        for layer in range(cfg.n_coda):
            x = self.layer(x, f"coda.{layer}", f"coda.{layer}")
        if cfg.final_norm:
            x = self.norm(x, "ln_final.weight", "ln_final")
        return x @ self.w["embed.weight" if cfg.tie_embeddings else "unembed.weight"].T


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights of a LoopedModel by name, apart from its graph."""
    return {name: weight.detach().clone() for name, weight in model.transformer.named_parameters()}


class Tape:
    """A `see` that keeps every activation, in order, and after a backward pass every gradient."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        assert name not in self.values, f"{name} was seen twice"
        value = value.view_as(value)  # a node of its own, as one tensor may pass several sites
        if value.requires_grad:
            value.retain_grad()
        self.values[name] = value
        return value

    def grad(self, name: str) -> Tensor | None:
        return self.values[name].grad
