"""What a read-out says, as numbers: tensor functions on log probabilities, in nats."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_looped.observe.measure import READOUT, Measure

LogProbs = Float[Tensor, "batch pos d_vocab"]


def entropy(log_probs: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims"]:
    """−Σ p log p, in nats: 0 for a certain read-out, log d_vocab for an undecided one."""
    probs = log_probs.exp()
    return -(probs * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)  # 0 · −∞ is 0, in its gradient too


def kl_divergence(p: Float[Tensor, "*dims d_vocab"], q: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims"]:
    """KL(p ‖ q) in nats, from log probabilities; never below zero.

    Summed as Σ (p log(p/q) − p + q), which is the same for probabilities. No term is below zero, so two read-outs that
    are nearly the same do not drown in the rounding of terms that cancel.
    """
    probs = p.exp()
    d = (q - p).masked_fill(probs == 0, 0.0)  # p log(p/q) is 0 there, and has a gradient of 0, whatever q is
    small = d.clamp(-1, 1)  # where it is not chosen, it still must have a finite gradient
    near = probs * (torch.expm1(small) - small)
    far = q.exp() - probs - probs * d
    return torch.where((d.abs() < 1) & (probs > 0), near, far).sum(-1).clamp(min=0)


def top_ids(scores: Float[Tensor, "*dims d_vocab"], k: int) -> Int[Tensor, "*dims top"]:
    """The k tokens that score highest, highest first. Of several at the top the first is argmax's, as in generation."""
    first = scores.argmax(-1, keepdim=True)
    return scores.scatter(-1, first, torch.inf).topk(k).indices  # topk alone breaks ties as it likes; bfloat16 has many


def token_rank(scores: Float[Tensor, "*dims d_vocab"], ids: Int[Tensor, "*dims target"]) -> Int[Tensor, "*dims target"]:
    """How many tokens score higher: 0 for the top token, as in TransformerLens; ties are not counted against it.

    Where scores are NaN there is no top token: the rank is then at least 1, and d_vocab where the token's own is NaN.
    """
    given = scores.gather(-1, ids)
    return torch.stack([(~(scores <= one[..., None])).sum(-1) for one in given.unbind(-1)], dim=-1)


# Over many prompts, with `tl_looped.observe.observe`: of what the model would say if it stopped after each loop.


def _kl_from(log_probs: LogProbs, other: LogProbs) -> Float[Tensor, "batch pos"]:
    return kl_divergence(other, log_probs)


def _same_top(log_probs: LogProbs, other: LogProbs) -> Float[Tensor, "batch pos"]:
    return (log_probs.argmax(-1) == other.argmax(-1)).to(log_probs.dtype)


def surprise(log_probs: LogProbs, next_tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """−log p of the token that comes next, in nats; NaN where none does (−1)."""
    found = -log_probs.gather(-1, next_tokens.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(next_tokens < 0, float("nan"))


ENTROPY = Measure("entropy", "entropy of the read-out", "nats", READOUT, entropy, axes=("pos",))
"""How undecided each loop's read-out is; see `entropy`."""

KL_TO_FINAL = Measure("kl_to_final", "KL(last loop ‖ loop)", "nats", READOUT, _kl_from, "last", ("pos",))
"""How far each loop's read-out is from the last loop's."""

KL_TO_PREVIOUS = Measure("kl_to_previous", "KL(loop before ‖ loop)", "nats", READOUT, _kl_from, "previous", ("pos",))
"""How much each loop changes the read-out."""

AGREEMENT = Measure("agreement", "same top token as the last loop", "", READOUT, _same_top, "last", ("pos",))
"""Share of tokens of which a loop's top token is the last loop's."""

LOSS = Measure("loss", "loss", "nats", READOUT, surprise, axes=("pos",), reads_tokens=True)
"""Next-token cross entropy of the model if it stopped after each loop; each prompt counts once."""
