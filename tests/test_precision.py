"""Half precision: what is formed beside the run, and sums, are computed in float32 at least."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, make, tiny, tokens_for

from tl_looped import LoopedModel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_that_of_the_logits_in_float32(dtype: torch.dtype):
    model = make(dtype, **{**TINY["ouro"], "d_vocab": 2000})
    tokens = tokens_for(model, batch=4, pos=20)
    with torch.no_grad():
        logits, loss = model(tokens, return_type="both")
        each = model(tokens, return_type="loss", loss_per_token=True)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    assert loss.dtype == each.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(each.mean(), wanted, rtol=1e-6, atol=0)


def test_a_wider_loss_stays_as_wide():
    model = tiny("ouro", torch.float64)
    assert model(tokens_for(model), return_type="loss").dtype == torch.float64


def loud(dtype: torch.dtype) -> LoopedModel:
    """A model whose scores pass float16's largest number, 65504, before they are divided by sqrt(d_head)."""
    model = make(dtype, **{**TINY["llama"], "d_model": 64, "d_head": 64, "n_heads": 1, "n_key_value_heads": 1})
    with torch.no_grad():
        for block in model.transformer.blocks:
            block.attn.k.weight.copy_(block.attn.q.weight)
            for linear in (block.attn.q, block.attn.k):
                linear.weight.mul_(50)
    return model


@torch.no_grad()
@pytest.mark.parametrize("grad", [False, True])
def test_scores_do_not_overflow_in_float16(grad: bool):
    model = loud(torch.float16)
    tokens = tokens_for(model)
    with torch.set_grad_enabled(grad):
        logits, cache = model.run_with_cache(tokens, n_loops=1)
        edited = model.run_with_hooks(
            tokens, n_loops=1, fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda x, hook: x * 0.999)]
        )
    scores, pattern = cache["attn_scores", 0, 0], cache["pattern", 0, 0]
    below = torch.ones(5, 5).tril().bool().expand_as(scores)
    assert float(scores[below].abs().max()) * 8 > 65504  # what would have been infinite
    assert scores[below].isfinite().all()
    torch.testing.assert_close(pattern.float().sum(-1), torch.ones(2, 1, 5), rtol=1e-3, atol=1e-3)
    assert logits.isfinite().all()
    assert edited.isfinite().all()
    assert (scores.dtype, pattern.dtype) == (torch.float32, torch.float16)
