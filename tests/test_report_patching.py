"""The report's section on patching says what a plain patched run says."""

import re

import pytest
import torch

from tl_looped import LoopedModel
from tl_looped.report.patching import chain_patching
from tl_looped.report.prompts import CHAIN_TO_PATCH


@pytest.mark.parametrize("name", ["looped-hops", "looped-hops-settling"])
def test_the_positions_it_names_bring_the_answer_back(name: str) -> None:
    model = LoopedModel.from_pretrained(name, device="cpu")
    html = chain_patching(model, CHAIN_TO_PATCH).html
    corrupted = CHAIN_TO_PATCH.replace("a=4", "a=9")
    right, wrong = model.to_single_token("4"), model.to_single_token("9")
    with torch.no_grad():
        clean, cache = model.run_with_cache(CHAIN_TO_PATCH)
        base = model(corrupted)[0, -1, right] - model(corrupted)[0, -1, wrong]
        gap = clean[0, -1, right] - clean[0, -1, wrong] - base
    named = 0
    for loop, words in re.findall(r"<li>entering loop (\d+): (.*?)</li>", html):
        for share, place in re.findall(r"(\d+)% at position (\d+)", words):
            site = f"loop.{loop}.hook_state_pre"

            def patch(x: torch.Tensor, hook: object, place: int = int(place), site: str = site) -> torch.Tensor:
                x[:, place] = cache[site][:, place]
                return x

            with torch.no_grad():
                logits = model.run_with_hooks(corrupted, fwd_hooks=[(site, patch)])
            back = float((logits[0, -1, right] - logits[0, -1, wrong] - base) / gap)
            assert round(100 * back) == pytest.approx(int(share), abs=1)
            named += 1
    assert named >= 2
    assert html.count('class="plot"') == 2
