"""One table of sites: a line in it is a hook point of the modules, a name, a short name, and a place in the cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, fired, make, tokens_for

from tl_looped import HookNameError, HookSite, TwoStates
from tl_looped.engine import schedule
from tl_looped.engine.schedule import BLOCK_AXES, LOOP_AXES, MODEL_AXES, find_site
from tl_looped.nn.block import MLP
from tl_looped.nn.transformer import LoopedTransformer


def test_a_line_in_the_table_is_a_site(monkeypatch: pytest.MonkeyPatch):
    """It exists, is named, listed, cached, stacked, edited and has a gradient, with one call where it is computed."""

    def forward(self, x, loop):
        pre = self.hooks.hook_pre(self.gate(x), loop)
        act = self.hooks.hook_act(F.silu(pre), loop)
        return self.down(self.hooks.hook_post(act * self.hooks.hook_pre_linear(self.up(x), loop), loop))

    monkeypatch.setitem(BLOCK_AXES, "mlp.hook_act", schedule.NEURON)
    monkeypatch.setattr(MLP, "forward", forward)
    model = make(**TINY["huginn"])
    tokens = tokens_for(model)
    assert {"blocks.1.mlp.hook_act", "prelude.0.mlp.hook_act"} <= set(model.hook_dict)
    assert "blocks.1.loop.2.mlp.hook_act" in fired(model, tokens, n_loops=3)
    loss, cache = model.run_with_cache(tokens, n_loops=3, return_type="loss", incl_bwd=True)
    assert torch.equal(cache["act", 1, 2], F.silu(cache["pre", 1, 2]))
    assert cache["prelude.act", 0].shape == cache["act_grad", 0, 1].shape == (2, 5, model.cfg.d_mlp)
    assert cache.stack("act").shape == (3, 2, 2, 5, model.cfg.d_mlp)
    _, last = model.run_with_cache(tokens, n_loops=3, names_filter="blocks.1.mlp.hook_act", pos_slice=-1)
    assert last["mlp.act", 1, 0].shape == (2, 1, model.cfg.d_mlp)
    edit = [("blocks.0.loop.1.mlp.hook_act", lambda x, hook: 0 * x)]
    assert not torch.equal(model.run_with_hooks(tokens, 3, return_type="loss", fwd_hooks=edit), loss)
    with pytest.raises(HookNameError, match=r"there is no site 'acts'. Nearest: 'act'"):
        cache["acts", 0, 0]


def test_a_line_for_the_loop_is_a_site(monkeypatch: pytest.MonkeyPatch):
    loop = LoopedTransformer.loop

    def marked(self, state, e, frame, t, first_layer=0):
        return self.loop_hooks.hook_state_mark(loop(self, state, e, frame, t, first_layer), t)

    monkeypatch.setitem(LOOP_AXES, "hook_state_mark", schedule.RESID)
    monkeypatch.setattr(LoopedTransformer, "loop", marked)
    model = make(**TINY["ouro"])
    _, cache = model.run_with_cache(tokens_for(model), n_loops=3)
    assert torch.equal(cache.stack("state_mark"), cache.stack("state_post"))


@pytest.mark.parametrize("family", TINY)
def test_every_point_is_in_the_table_and_every_line_is_a_point_of_some_family(family: str):
    points = make(**TINY[family]).hook_dict.points()
    for point in points:
        table = BLOCK_AXES if point.site.layer is not None else LOOP_AXES if point.looped else MODEL_AXES
        assert point.site.component in table
        assert (point.site.looped, point.site.in_layer) == (point.looped, table is BLOCK_AXES)


def test_every_line_is_a_point_of_some_family():
    rare = {"learned_positions": True, "embed_norm": True, "prelude_norm": True}
    rare |= {"loop_update": "gated", "gate_rank": 2}
    rarer = {"injection": "diagonal", "state_out": True, "value_embeds": (True, False), "value_gate_size": 8}
    gated = {"two_states": TwoStates(), "attn_gate": True, "halt_gate": True}
    models = [
        make(**fields) for fields in (*TINY.values(), rare, rarer, gated, {"loop_time": True}, {"head_transform": True})
    ]
    points = {point.site.component for model in models for point in model.hook_dict.points()}
    assert points == {*BLOCK_AXES, *LOOP_AXES, *MODEL_AXES}


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("pattern", HookSite("attn.hook_pattern", "blocks")),
        ("attn.pattern", HookSite("attn.hook_pattern", "blocks")),
        ("attn.hook_pattern", HookSite("attn.hook_pattern", "blocks")),
        ("attn", HookSite("attn.hook_pattern", "blocks")),  # TransformerLens's words
        ("mlp_post", HookSite("mlp.hook_post", "blocks")),
        ("ln1_post.scale", HookSite("ln1_post.hook_scale", "blocks")),
        (("scale", "ln2"), HookSite("ln2.hook_scale", "blocks")),
        (("k", "a"), HookSite("attn.hook_k", "blocks")),
        ("coda.resid_post", HookSite("hook_resid_post", "coda")),
        ("state_post", HookSite("hook_state_post")),
        ("ln_loop.scale", HookSite("ln_loop.hook_scale")),
        ("embed", HookSite("hook_embed")),
        ("resid_post_grad", HookSite("hook_resid_post_grad", "blocks")),
        ("blocks.2.loop.3.attn.hook_z", HookSite("attn.hook_z", "blocks", 2, 3)),
        ("blocks.2.hook_resid_pre_grad", HookSite("hook_resid_pre_grad", "blocks", 2)),
        ("loop.1.hook_state_pre", HookSite("hook_state_pre", loop=1)),
        ("L_blocks.loop.1.hook_state_post", HookSite("hook_state_post", "L_blocks", None, 1)),
    ],
)
def test_short_and_full_names(name, site: HookSite):
    assert find_site(*((name,) if isinstance(name, str) else name)) == site


@pytest.mark.parametrize("component", [*BLOCK_AXES, *LOOP_AXES, *MODEL_AXES])
def test_every_site_has_a_short_name(component: str):
    assert find_site(component.replace("hook_", "")).component == component
    assert find_site(component).component == component


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_pst", r"there is no site 'resid_pst'. Nearest: 'resid_post'"),
        ("blocks.1.hook_resid_pst", r"there is no site 'blocks.1.hook_resid_pst'. Nearest: 'hook_resid_post'"),
        ("scale", r"'scale' is at several places: say which of 'ln1.hook_scale', "),
        ("k0", r"there is no site 'k0'"),
        ("prelude.state_post", r"'hook_state_post' belongs to no layer: leave 'prelude' out of 'prelude.state_post'"),
        ("blocks.x.hook_z", r"does not have the form of a hook name"),
    ],
)
def test_what_is_no_site(name: str, message: str):
    with pytest.raises(HookNameError, match=message):
        find_site(name)
