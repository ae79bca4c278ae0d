"""What a user of TransformerLens tries: it works, or the message holds the call that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PARITY, make
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.utilities import test_prompt as show_prompt

from tl_looped import LoopedModel
from tl_looped.engine.habits import ATTRIBUTES, CONFIG, OPTIONS

PROMPT = "a=4; c=a; b=7; d=c; f=b; ? d"


@pytest.fixture(scope="module")
def hops() -> LoopedModel:
    return LoopedModel.from_pretrained("looped-hops")


def cached(model: LoopedModel) -> Any:
    return model.run_with_cache(PROMPT)[1]


MISTAKES: dict[str, tuple[Callable[[LoopedModel], Any], str]] = {
    "patching with TransformerLens": (
        lambda m: patching.get_act_patch_resid_pre(m, m.to_tokens(PROMPT), cached(m), lambda logits: logits.sum()),
        r"'n_layers': .* TransformerLens's own tools take model.unrolled\(n_loops\)",
    ),
    "finding heads with TransformerLens": (
        lambda m: detect_head(m, PROMPT, "previous_token_head"),
        "LoopedConfig has no 'device': model.device is it",
    ),
    "folding": (
        lambda m: LoopedModel.from_pretrained("looped-hops", fold_ln=True),
        "'fold_ln': weights are never ",
    ),
    "a device map": (
        lambda m: LoopedModel.from_pretrained("looped-hops", device_map="auto"),
        "'device_map': a model lies on one device: device=",
    ),
    "torch_dtype": (
        lambda m: LoopedModel.from_pretrained("looped-hops", torch_dtype=torch.float32),
        "from_pretrained has no argument 'torch_dtype': it is called dtype",
    ),
    "a slip": (lambda m: LoopedModel.from_pretrained("looped-hops", n_loop=3), "'n_loop'. Nearest: 'n_loops'"),
    "max_tokens": (
        lambda m: m.generate(PROMPT, max_tokens=3),
        "no argument 'max_tokens': it is called max_new_tokens",
    ),
    "a layer's type where the loop stands": (
        lambda m: cached(m)["pattern", 0, "attn"],
        r"the third is the loop: cache\['pattern', layer, loop, 'attn'\]",
    ),
    "no loop": (
        lambda m: cached(m)["resid_post", 0],
        "fires once in every loop: say which, or take cache.stack",
    ),
    "a name without its loop": (lambda m: cached(m)["blocks.0.hook_resid_post"], "fires once in every loop: say which"),
    "text the tokenizer does not know": (
        lambda m: m("Hello world"),
        r"can't read 'H' in 'Hello world' \(it knows 0 1",
    ),
    "an unknown argument": (
        lambda m: m(PROMPT, n_loop=3),
        r"model\(...\) has no argument 'n_loop'. Nearest: 'n_l",
    ),
    "another unknown argument": (lambda m: m.run_with_cache(PROMPT, loop=[3]), "run_with_cache has no argument 'loop'"),
    "a layer to stop at": (
        lambda m: m(PROMPT, stop_at_layer=1),
        r"'stop_at_layer': a layer runs in every loop, so stop_at=\(loop, layer\) returns",
    ),
    "a layer to start at": (
        lambda m: m(torch.zeros(1, 23, 64), start_at_layer=1),
        r"'start_at_layer': .* model\(stream, start_at=\(loop, layer\), tokens=prompts\) goes on from",
    ),
    "a hook's name": (
        lambda m: m.run_with_hooks(PROMPT, fwd_hooks=[("blocks.0.attn.hook_pattrn", lambda x, hook: x)]),
        "no hook point 'blocks.0.attn.hook_pattrn'. Nearest: 'blocks.0.attn.hook_pattern'",
    ),
    "positions": (lambda m: m.W_pos, "this model has no W_pos: its positions are rotary"),
    "adding up": (lambda m: cached(m).accumulated_resid(), "accumulated_resid adds up a feedforward model's residual"),
    "embedding": (
        lambda m: m.input_to_embed(PROMPT),
        r"'input_to_embed': model\(prompts, stop_at_loop=0\) is the ",
    ),
    "a switch": (lambda m: m.set_use_attn_result(True), "'set_use_attn_result': attn.hook_result is there without"),
    "a slip in a name": (lambda m: m.to_token("4"), "LoopedModel has no 'to_token'. Nearest: 'to_tokens'"),
    "a class's constructor": (
        lambda m: LoopedModel.boot_transformers,
        r"LoopedModel has no 'boot_transformers': LoopedModel.from_pretrained\(name\) loads",
    ),
    "a slip in a class": (
        lambda m: LoopedModel.from_pretraind,
        "LoopedModel has no 'from_pretraind'. Nearest: 'from_",
    ),
    "a checkpoint of training": (
        lambda m: LoopedModel.from_pretrained("looped-hops", checkpoint_value=1000),
        "is a revision= or a subfolder=",
    ),
    "text cut short": (
        lambda m: m.to_tokens(PROMPT, truncate=False),
        "no argument 'truncate': text that",
    ),
    "a point of the model": (lambda m: m.hook_embed, r"'hook_embed': model.hook_dict\[\"hook_embed\"\] is the point"),
    "a field": (lambda m: m.cfg.attention_dir, "LoopedConfig has no 'attention_dir': cfg.causal says it"),
    "a point of a norm": (
        lambda m: m.blocks[0].ln1.hook_scale.add_hook(print),
        r"a norm may serve several sites: hook one of them, model.hook_dict\[\"blocks.0.ln1.hook_scale\"\]",
    ),
    "a token that is not there": (lambda m: m.get_token_position("z", PROMPT), "the token 'z' does not occur in"),
}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_the_mend(name: str, hops: LoopedModel) -> None:
    call, message = MISTAKES[name]
    with pytest.raises((ValueError, AttributeError, KeyError), match=message):
        call(hops)


def test_mends_are_for_what_is_not_there(hops: LoopedModel) -> None:
    assert not [name for name in ATTRIBUTES if hasattr(hops, name)]
    assert not [name for name in CONFIG if hasattr(hops.cfg, name)]
    assert not set(OPTIONS) & set(LoopedModel.from_pretrained.__annotations__)


def test_what_works_as_it_does_there(hops: LoopedModel, capsys: pytest.CaptureFixture[str]) -> None:
    show_prompt(PROMPT, "4", hops, prepend_space_to_answer=False)
    assert "Ranks of the answer tokens: [('4', 0)]" in capsys.readouterr().out
    logits, tokens = hops(PROMPT), hops.to_tokens(PROMPT)
    torch.testing.assert_close(hops.loss_fn(logits, tokens), hops(PROMPT, return_type="loss"))
    each = hops.loss_fn(logits, tokens, per_token=True)
    torch.testing.assert_close(each, hops(PROMPT, return_type="loss", loss_per_token=True))
    assert hops.to_single_str_token(hops.to_single_token("4")) == "4"
    assert hops.get_token_position("d", PROMPT) == 13 and hops.get_token_position("d", PROMPT, "last") == 22
    assert hops.to_str_tokens(PROMPT)[13] == "d"


@pytest.mark.parametrize("part", ["attn.hook_z", "mlp.hook_post", "hook_resid_mid"])
def test_a_part_of_a_layer_has_its_hook_points(part: str) -> None:
    model = make(n_core=2, n_loops=3)
    tokens = torch.arange(5)[None]
    where: Any = model.blocks[1]
    for name in part.split("."):
        where = getattr(where, name)
    seen: list[int | None] = []
    where.add_hook(lambda x, hook: seen.append(hook.loop))
    model(tokens)
    assert seen == [0, 1, 2]
    model.reset_hooks()
    model(tokens)
    assert len(seen) == 3
    with pytest.raises(AttributeError, match="hook_result_of"):
        model.blocks[1].attn.hook_result_of  # noqa: B018 - a slip is an error as anywhere


def test_two_stacks_have_no_one_core() -> None:
    model = LoopedModel.from_pretrained(PARITY / "hrm-text")
    with pytest.raises(ValueError, match="no one core: its stacks of layers are model.transformer.L_blocks and "):
        model.blocks  # noqa: B018


def test_layers_have_their_biases_and_norms_their_weights() -> None:
    with_bias = LoopedModel.from_pretrained(PARITY / "ff-gpt2", loop_layers=(1, 3))
    for model, layer in ((with_bias, 1), (make(n_key_value_heads=2), 0)):  # the second has none: zeros
        attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
        for part, names in ((attn, ("b_Q", "b_K", "b_V", "b_O")), (mlp, ("b_in", "b_out"))):
            for name in names:
                assert torch.equal(getattr(part, name), getattr(model, name)[layer])
    attn = with_bias.blocks[0].attn
    assert torch.equal(attn.b_K.flatten(), attn.k.bias) and bool(attn.b_K.any())
    assert torch.equal(with_bias.blocks[0].ln1.w, with_bias.blocks[0].ln1.weight)
    assert not make(n_key_value_heads=2).blocks[0].attn.b_V.any()
