r"""Does a state that moves little explain attention that moves little? Proposition 4.2, evaluated.

    ‖S(X_t) − S(X_{t−1})‖ ≤ L · (2 B κ / sqrt(d_head)) · ‖X_t − X_{t−1}‖

with S(X) the row softmax of X W_Q W_Kᵀ Xᵀ / sqrt(d_head), X what W_Q reads, B a bound on ‖X‖, κ = ‖W_Q W_Kᵀ‖ and
L = 1/2. The paper does not say which norms. The inequality holds with Frobenius norms of the two differences and
spectral norms of X and of W_Q W_Kᵀ, and that is what is evaluated here:

- Z − Z' = [(X − X') W Xᵀ + X' W (X − X')ᵀ] / sqrt(d_head), and ‖P Q‖_F ≤ ‖P‖_F ‖Q‖_2, so ‖Z − Z'‖_F ≤
  (2 B κ / sqrt(d_head)) ‖X − X'‖_F with B ≥ ‖X‖_2, ‖X'‖_2.
- The Jacobian of a softmax, diag(p) − p pᵀ, has a spectral norm of at most 1/2, so each row moves by at most half of
  what its scores do, and so do all rows in the Frobenius norm. Keys behind the causal mask only leave terms out.

It does not hold with spectral norms of the differences (rows are mixed, and a softmax of each row is no contraction by
1/2 there), nor with the largest token norm as B (too small by up to sqrt(S) for S tokens); tests have a counterexample
for each. Without the norm's weight in X it would be a statement about another matrix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_looped.attention.patterns import checked_pattern, pattern_distance
from tl_looped.engine.checks import check_eval, check_finite
from tl_looped.engine.config import ROTARY_TERM, LoopedConfig
from tl_looped.engine.errors import InputError
from tl_looped.engine.results import Result
from tl_looped.engine.runs import Prompts, Run, RunOptions, check_one_prompt, check_whole_run, with_run_options
from tl_looped.engine.schedule import CORE, HookSite
from tl_looped.model import LoopedModel, check_looped, one_core
from tl_looped.nn.block import Block
from tl_looped.observe.watching import naming_origin, watch
from tl_looped.viz.stability import bound_scatter

LIPSCHITZ = 0.5
"""L: how much a softmax can move, relative to its scores, in the Euclidean norm."""


def score_norm(
    W_Q: Float[Tensor, "head d_model d_head"], W_K: Float[Tensor, "kv_head d_model d_head"]
) -> Float[Tensor, " head"]:
    """κ = ‖W_Q W_Kᵀ‖_2 of each head: the largest singular value.

    Query head h reads key head h // (heads / kv_heads). The singular values are those of R_Q R_Kᵀ, with R from the QR
    decompositions, [d_head, d_head]: the product over d_model is never formed.

    Args:
        W_Q, W_K: as TransformerLens has them, `model.W_Q[layer]`, or `block.attn.W_Q` here.
    """
    W_K = _for_queries(W_K, len(W_Q))
    r_q, r_k = (torch.linalg.qr(weight.double(), mode="r").R for weight in (W_Q, W_K))
    return torch.linalg.matrix_norm(r_q @ r_k.mT, ord=2)


def plain_pattern(
    x: Float[Tensor, "pos d_model"],
    W_Q: Float[Tensor, "head d_model d_head"],
    W_K: Float[Tensor, "kv_head d_model d_head"],
    visible: Bool[Tensor, "query key"] | None = None,
) -> Float[Tensor, "head query key"]:
    """S(X), the attention that the proposition speaks of: no rotary embedding, biases, or norms on queries and keys.

    Args:
        x: what W_Q reads, the normed input times the norm's weight.
        W_Q, W_K: as in `score_norm`.
        visible: who may look at whom; None for the causal triangle.
    """
    x, W_Q, W_K = x.double(), W_Q.double(), _for_queries(W_K.double(), len(W_Q))
    scores = (x @ W_Q) @ (x @ W_K).mT / math.sqrt(W_Q.shape[-1])
    if visible is None:
        visible = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def pattern_bound(
    x: Float[Tensor, "pos d_model"], other: Float[Tensor, "pos d_model"], kappa: Float[Tensor, " head"], d_head: int
) -> Float[Tensor, " head"]:
    """L · (2 B κ / sqrt(d_head)) · ‖X − X'‖_F with B the larger of ‖X‖_2 and ‖X'‖_2: see the head of this module.

    Args:
        x, other: X and X', as in `plain_pattern`.
        kappa: of each head, from `score_norm`.
        d_head: width of a head.

    Source:
        arXiv 2604.11791, Proposition 4.2.
    """
    x, other = x.double(), other.double()
    bound = max(torch.linalg.matrix_norm(one, ord=2) for one in (x, other))
    return LIPSCHITZ * 2 * bound * kappa.double() / math.sqrt(d_head) * torch.linalg.matrix_norm(x - other)


def _rotary_bound(x: Tensor, other: Tensor, W_Q: Tensor, W_K: Tensor) -> Float[Tensor, " head"]:
    """The same for attention with rotary embedding.

    Rotary turns every row of X W_Q and X W_K by itself. That keeps Frobenius norms, of which it takes one more, and
    the product W_Q W_Kᵀ is no longer one matrix: κ becomes ‖W_Q‖ ‖W_K‖, and B the larger Frobenius norm.
    """
    norms = [torch.linalg.matrix_norm(w.double(), ord=2) for w in (W_Q, _for_queries(W_K, len(W_Q)))]
    bound = max(torch.linalg.matrix_norm(one) for one in (x, other))
    return LIPSCHITZ * 2 * bound * norms[0] * norms[1] / math.sqrt(W_Q.shape[-1]) * torch.linalg.matrix_norm(x - other)


def _for_queries(W_K: Tensor, n_heads: int) -> Tensor:
    if n_heads % len(W_K):
        raise InputError(
            f"{n_heads} query heads can't share {len(W_K)} key heads evenly: pass W_Q and W_K of one layer."
        )
    return W_K.repeat_interleave(n_heads // len(W_K), dim=0)


@dataclass(frozen=True, eq=False, repr=False)
class AttentionBound(Result):
    """Proposition 4.2 beside what happened, for one prompt, in Frobenius norms of each head's pattern.

    Everything but κ compares with the loop before, so it is NaN at loop 0.

    Attributes:
        breaks: the assumptions of the proposition that this model does not meet. So `observed` may exceed `bound`,
            and `plain` may not.
        n_tokens: S. No two patterns are further apart than sqrt(2 S): a bound above says nothing.
        step: ‖X_t − X_{t−1}‖_F.
        norm: B, the larger of ‖X_t‖_2 and ‖X_{t−1}‖_2.
        kappa: κ of each head.
        bound: of the proposition.
        observed: ‖A_t − A_{t−1}‖ of the model's own patterns.
        plain: the same of the patterns that the proposition speaks of, computed from the same X without rotary
            embedding, biases and norms on queries and keys, in float64.
        rotary_bound: a bound for attention with rotary embedding (κ becomes ‖W_Q‖ ‖W_K‖, and B the Frobenius norm),
            which `observed` may not exceed; NaN for models with biases or norms on queries and keys.
    """

    breaks: tuple[str, ...]
    n_tokens: int
    step: Float[Tensor, "loop layer"]
    norm: Float[Tensor, "loop layer"]
    kappa: Float[Tensor, "layer head"]
    bound: Float[Tensor, "loop layer head"]
    observed: Float[Tensor, "loop layer head"]
    plain: Float[Tensor, "loop layer head"]
    rotary_bound: Float[Tensor, "loop layer head"]

    def looseness(self) -> Float[Tensor, "loop layer head"]:
        """How many times the observed change the bound would allow; below 1 where the change exceeds it.

        Infinite where nothing changed though X moved, NaN where neither did.
        """
        return self.bound / self.observed

    def vacuous(self) -> Bool[Tensor, "loop layer head"]:
        """Where the bound is at or above sqrt(2 S), which no two patterns exceed anyway."""
        return self.bound >= math.sqrt(2 * self.n_tokens)

    def exceeded(self) -> Bool[Tensor, "loop layer head"]:
        """Where the model's patterns changed by more than the bound: only an assumption that it breaks allows that.

        Changes up to 1e-6 are rounding, and do not count.
        """
        return (self.observed > self.bound) & (self.observed > 1e-6)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each loop from 1 on, core layer and head: all the numbers, and the looseness."""
        loop, layer, head = np.indices(self.bound.shape).reshape(3, -1)
        table = pd.DataFrame({"loop": loop, "layer": layer, "head": head})
        table["step"], table["norm"] = (one.numpy()[loop, layer] for one in (self.step, self.norm))
        table["kappa"] = self.kappa.numpy()[layer, head]
        for name in ("bound", "observed", "plain", "rotary_bound"):
            table[name] = getattr(self, name).numpy()[loop, layer, head]
        table["looseness"] = self.looseness().numpy()[loop, layer, head]
        return table.query("loop > 0").reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Bound against change, a point for each loop, layer and head: below the diagonal the change exceeds it."""
        title = f"Proposition 4.2: {self.made_by.get('model', '')}, {self.n_tokens} tokens"
        limit = math.sqrt(2 * self.n_tokens)
        return bound_scatter(self.bound[1:], self.observed[1:], self.plain[1:], limit, title)


@with_run_options
def attention_bound(
    model: LoopedModel, prompts: Prompts, n_loops: int | None = None, **options: Unpack[RunOptions]
) -> AttentionBound:
    """Proposition 4.2 for every loop, core layer and head, beside the change that was observed.

    The proposition assumes no rotary embedding, which every model here has, and no biases or norms on queries and keys,
    which some have. What the model breaks is in the result, with the change as it would be without, so that the
    inequality and its assumptions can be judged apart. X is `ln1.hook_normalized` times the norm's weight, or
    `hook_resid_pre` where the norm comes after attention (OLMo-2). Keeps two loops, whatever their number.

    Args:
        model, options: as in `LoopedModel.forward`.
        prompts: one prompt, of two tokens or more.
        n_loops: loops to run, two or more; None for the count the model was trained with.

    Raises:
        InputError: before the run, for one loop, one token or several prompts; in it, for activations that are not
            finite: the message names the layer and loop where that began.

    Source:
        arXiv 2604.11791, Proposition 4.2; the bound for rotary embedding is this library's.
    """
    check_eval(check_looped(model))
    core = one_core(model)
    run = model.batch_of(model.prepare(prompts, n_loops, **options))
    check_whole_run(run)
    check_one_prompt(run, tokens=2)
    cfg = model.cfg
    layers = [_Layer(block, cfg, run) for block in core.blocks if isinstance(block, Block)]
    source = layers[0].source

    def see(site: HookSite, x: Tensor) -> None:
        layer = layers[site.layer or 0]
        if site.component == source:
            check_finite(x[0], (f"{site.name!r}, position",))
            layer.read(x[0])
        else:
            checked_pattern(x, repr(site.name))
            layer.compare(x[0])

    names = [HookSite(name, CORE, i).name for i in range(len(layers)) for name in (source, "attn.hook_pattern")]
    with naming_origin(model, run):
        watch(model, run, names, see, only_loops=True)
    numbers = {name: torch.stack([torch.stack(one.found[name]) for one in layers], dim=1) for name in layers[0].found}
    return AttentionBound(
        made_by={"model": cfg.model_name, **run.describe()},
        breaks=cfg.score_terms(),
        n_tokens=run.tokens.shape[1],
        kappa=torch.stack([one.kappa for one in layers]),
        **numbers,
    )


class _Layer:
    """Compares a core layer's attention with that of the loop before, while the model runs; float64, on the CPU.

    Attributes:
        kappa: of each head.
        found: the numbers of `AttentionBound`, a tensor for each loop.
    """

    def __init__(self, block: Block, cfg: LoopedConfig, run: Run):
        self.W_Q, self.W_K = (weight.detach().cpu() for weight in (block.attn.W_Q, block.attn.W_K))
        self.kappa = score_norm(self.W_Q, self.W_K)
        self.source, self.input = block.query_input
        self.covered = set(cfg.score_terms()) <= {ROTARY_TERM}
        self.visible = None if run.visible is None else run.visible[0].cpu()
        self.previous: tuple[Tensor, Tensor, Tensor] | None = None  # X, pattern, plain pattern
        self.found: dict[str, list[Tensor]] = defaultdict(list)

    def read(self, x: Float[Tensor, "pos d_model"]) -> None:
        """See what the attention of a loop reads."""
        self.x = self.input(x.double()).detach().cpu()

    def compare(self, pattern: Float[Tensor, "head query key"]) -> None:
        """See its pattern."""
        x, pattern = self.x, pattern.cpu()
        plain = plain_pattern(x, self.W_Q, self.W_K, self.visible)
        of_heads, nan = torch.full_like(self.kappa, math.nan), torch.tensor(math.nan, dtype=torch.float64)
        found = dict.fromkeys(("bound", "observed", "plain", "rotary_bound"), of_heads) | {"step": nan, "norm": nan}
        if self.previous is not None:
            other, pattern_before, plain_before = self.previous
            found["bound"] = pattern_bound(x, other, self.kappa, self.W_Q.shape[-1])
            found["observed"] = pattern_distance(pattern, pattern_before).double()
            found["plain"] = pattern_distance(plain, plain_before)
            found["rotary_bound"] = _rotary_bound(x, other, self.W_Q, self.W_K) if self.covered else of_heads
            found["step"] = torch.linalg.matrix_norm(x - other)
            found["norm"] = torch.stack([torch.linalg.matrix_norm(one, ord=2) for one in (x, other)]).max()
        for name, value in found.items():
            self.found[name].append(value)
        self.previous = (x, pattern, plain)
