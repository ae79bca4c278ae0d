"""In training mode a drawn state is another one in every run: every analysis that runs a model refuses first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import TINY, make, tokens_for
from torch import Tensor

from tl_looped import InputError, LoopedModel
from tl_looped.attention import attention_bound, attention_stability
from tl_looped.dynamics import (
    STEP,
    convergence,
    cycle,
    jacobian_spectrum,
    limit_behaviour,
    long_run,
    path_independence,
    similarity,
    state_motion,
    trajectory,
)
from tl_looped.lens import (
    compare_lenses,
    fit_tuned_lens,
    jacobian_lens,
    logit_lens,
    readout_agreement,
    trace_exits,
    view_prompt,
)
from tl_looped.observe import observe
from tl_looped.patching import Receiver, Sender, attribution_sweep, mean_source, patch_sweep, path_patch, zero
from tl_looped.report.data import collect as read_prompts
from tl_looped.report.prompts import Prompt
from tl_looped.stages import ablation_effect, massive_activations

Call = Callable[[LoopedModel, Tensor], Any]


def total(logits: Tensor) -> Tensor:
    return logits.sum()


def path(model: LoopedModel, tokens: Tensor) -> Any:
    _, cache = model.run_with_cache(tokens)
    return path_patch(
        model, tokens, source=cache, metric=total, sender=Sender(0, 0, "mlp"), receivers=[Receiver("readout")]
    )


ANALYSES: list[Call] = [
    attention_bound,
    attention_stability,
    limit_behaviour,
    long_run,
    convergence,
    cycle,
    jacobian_spectrum,
    state_motion,
    similarity,
    lambda model, tokens: path_independence(model, tokens, seeds=[0, 1]),
    trajectory,
    lambda model, tokens: fit_tuned_lens(model, tokens.expand(5, -1), steps=1),
    readout_agreement,
    compare_lenses,
    jacobian_lens,
    logit_lens,
    trace_exits,
    view_prompt,
    lambda model, tokens: observe(model, tokens, measures=[STEP]),
    lambda model, tokens: attribution_sweep(model, tokens, source=zero(), metric=total),
    mean_source,
    lambda model, tokens: patch_sweep(model, tokens, source=zero(), metric=total),
    path,
    lambda model, tokens: read_prompts(model, [Prompt(text=None, token_ids=tuple(tokens[0].tolist()))]),
    lambda model, tokens: ablation_effect(model, tokens, layer=0),
    massive_activations,
]


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("part", ["", "transformer.blocks.0"])
def test_training_mode_is_refused(analysis: Call, part: str) -> None:
    model = make(**TINY["huginn"])
    torch.nn.Module.get_submodule(model, part).train()
    with pytest.raises(InputError, match=r"the model is in training mode: call model.eval\(\) first"):
        analysis(model, tokens_for(model, batch=1))
