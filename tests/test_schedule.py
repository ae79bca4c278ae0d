"""HookSite and LoopSchedule: names and places are each other's inverse, whatever the model's shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_looped import HookNameError, HookSite, InputError, LoopSchedule
from tl_looped.engine.schedule import BLOCK_AXES, CODA, CORE, LOOP_AXES, MODEL_AXES, PRELUDE

indices = st.integers(0, 200)
counts = st.integers(1, 6)
grad = st.sampled_from(["", "_grad"])
# Everything that a model can have: a layer's site, a loop's (of one stack of several, too), and one that fires once.
layer_sites = st.builds(
    lambda component, end, stack, layer, loop: HookSite(component + end, stack, layer, loop),
    st.sampled_from(sorted(BLOCK_AXES)),
    grad,
    st.sampled_from([CORE, "L_blocks", "H_blocks"]),
    indices,
    st.none() | indices,
)
once_sites = st.builds(HookSite, st.sampled_from(sorted(BLOCK_AXES)), st.sampled_from([PRELUDE, CODA]), indices)
loop_sites = st.builds(
    HookSite, st.sampled_from(sorted(LOOP_AXES)), st.sampled_from([None, "L_blocks"]), st.none(), st.none() | indices
)
sites = st.one_of(layer_sites, once_sites, loop_sites, st.builds(HookSite, st.sampled_from(sorted(MODEL_AXES))))
# Schedules are built in the tests: beartype draws at random which items of a tuple it checks, which hypothesis forbids
# inside a strategy.
looped = st.tuples(st.just(LoopSchedule.looped), st.integers(0, 4), counts, st.integers(0, 4), counts)
shapes = looped | st.tuples(st.just(LoopSchedule.nested), counts, counts, counts)


@given(sites)
def test_a_name_gives_back_its_site(site: HookSite):
    assert HookSite.parse(site.name) == site


@given(sites)
def test_a_name_is_the_only_one_of_its_site(site: HookSite):
    assert HookSite.parse(site.name).name == site.name


@given(layer_sites, st.none() | indices)
def test_at_changes_the_loop_and_nothing_else(site: HookSite, loop: int | None):
    moved = site.at(loop)
    assert moved.loop == loop
    assert moved.at(site.loop) == site


@given(layer_sites)
def test_transformerlens_reads_the_layer_from_a_name(site: HookSite):
    assert site.name.split(".")[1] == str(site.layer)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("hook_embed", HookSite("hook_embed")),
        ("prelude.0.hook_resid_post", HookSite("hook_resid_post", PRELUDE, 0)),
        ("blocks.2.loop.3.attn.hook_pattern", HookSite("attn.hook_pattern", CORE, 2, 3)),
        ("blocks.12.ln2_post.hook_scale", HookSite("ln2_post.hook_scale", CORE, 12)),
        ("loop.0.hook_state_pre", HookSite("hook_state_pre", loop=0)),
        ("hook_state_post", HookSite("hook_state_post")),
        ("L_blocks.1.loop.5.mlp.hook_post", HookSite("mlp.hook_post", "L_blocks", 1, 5)),
        ("ln_final.hook_normalized", HookSite("ln_final.hook_normalized")),
    ],
)
def test_names_of_the_design(name: str, site: HookSite):
    assert HookSite.parse(name) == site
    assert site.name == name


NO_NAMES = """
blocks | blocks.0 | blocks.0. | hook_ | hook_Z | blocks.0.attn.W_Q | blocks.x.hook_z | blocks.-1.hook_z | loop.1
loop.1.loop.2.hook_embed | loop.-1.hook_state_post | blocks.0.loop.hook_z | blocks.0.loop.1.attn.attn.hook_z
attn.0.hook_z | blocks.0.loop.1.5.hook_z | blocks.²0.hook_z
"""


@pytest.mark.parametrize("name", ["", "blocks.0.hook_z ", " hook_embed", *NO_NAMES.replace("|", " ").split()])
def test_what_is_no_name_is_refused(name: str):
    with pytest.raises(HookNameError, match=r"does not have the form of a hook name, such as 'blocks.2.loop.3"):
        HookSite.parse(name)


@pytest.mark.parametrize("name", ["blocks.00.hook_z", "blocks.0.loop.01.hook_z", "blocks.٣.hook_z"])
def test_one_site_has_one_name(name: str):
    with pytest.raises(HookNameError, match="is not written as hook names are: the same site is 'blocks"):
        HookSite.parse(name)


@given(sites)
def test_axes_begin_with_the_batch_and_have_one_of_positions(site: HookSite):
    assert site.axes[0] == "batch"
    assert site.axes[site.pos_axis] in ("pos", "query")


@given(shapes)
def test_depth_and_place_are_inverse(shape):
    schedule = shape[0](*shape[1:])
    calls = [schedule.at_depth(depth) for depth in range(schedule.depth)]
    assert [schedule.realised_depth(*call) for call in calls] == list(range(schedule.depth))
    assert calls == list(schedule.layer_calls())
    assert len(set(calls)) == schedule.depth


@given(shapes, st.data())
def test_depths_count_from_the_end_too(shape, data: st.DataObject):
    schedule = shape[0](*shape[1:])
    depth = data.draw(st.integers(-schedule.depth, -1))
    assert schedule.at_depth(depth) == schedule.at_depth(depth + schedule.depth)


@given(st.integers(0, 4), counts, st.integers(0, 4), counts)
def test_the_looped_family_in_closed_form(p: int, k: int, c: int, loops: int):
    schedule = LoopSchedule.looped(p, k, c, loops)
    assert schedule.depth == p + k * loops + c
    assert (schedule.n_layers(PRELUDE), schedule.n_layers(CORE), schedule.n_layers(CODA)) == (p, k, c)
    assert (schedule.n_loops(), schedule.n_loops(PRELUDE), schedule.n_loops(CODA)) == (loops, 0, 0)
    for t in range(loops):
        assert schedule.coordinates(CORE, t) == (t,)
        for layer in range(k):
            assert schedule.realised_depth(CORE, layer, t) == p + k * t + layer
    if c:
        assert schedule.realised_depth(CODA, 0) == p + k * loops
        assert schedule.realised_depth(CODA, -1) == schedule.depth - 1


@given(counts, counts, counts)
def test_nested_loops_run_l_then_h_in_every_cycle(layers: int, h_cycles: int, l_cycles: int):
    schedule = LoopSchedule.nested(layers, h_cycles, l_cycles)
    order = []
    for h in range(h_cycles):
        order += [("L_blocks", (h, i)) for i in range(l_cycles)] + [("H_blocks", (h,))]
    seen = [
        (stack, schedule.coordinates(stack, loop))
        for stack, layer, loop in schedule.layer_calls()
        if layer == 0 and loop is not None
    ]
    assert seen == order
    assert schedule.depth == layers * h_cycles * (l_cycles + 1)
    assert (schedule.n_loops("L_blocks"), schedule.n_loops("H_blocks")) == (h_cycles * l_cycles, h_cycles)
    for stack in schedule.stacks():  # the flat count of a stack goes up by one
        loops = [loop for name, layer, loop in schedule.layer_calls() if name == stack and layer == 0]
        assert loops == list(range(schedule.n_loops(stack)))


def test_a_description_for_messages():
    assert LoopSchedule.looped(2, 4, 2, 32).describe() == "prelude 2, blocks 4 x 32 loops, coda 2"
    assert LoopSchedule.looped(0, 24, 0, 4).describe() == "blocks 24 x 4 loops"
    assert LoopSchedule.nested(2, 3, 4).describe() == "L_blocks 2 x 12 loops, H_blocks 2 x 3 loops"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.realised_depth(CORE, 3, 0), r"layer 3 is out of range: 3 exist, so it must lie in \[-3, 2\]"),
        (
            lambda s: s.realised_depth(CORE, 0, 4),
            r"blocks does not run in loop 4: prelude 2, blocks 3 x 4 loops, coda 1",
        ),
        (lambda s: s.realised_depth(CORE, 0), r"blocks does not run in loop None"),
        (lambda s: s.realised_depth(PRELUDE, 0, 0), r"prelude does not run in loop 0"),
        (lambda s: s.realised_depth("H_blocks", 0, 0), r"H_blocks does not run in loop 0"),
        (lambda s: s.at_depth(15), r"depth 15 is out of range: 15 exist"),
        (lambda s: s.at_depth(-16), r"depth -16 is out of range"),
        (lambda s: s.at_depth(True), r"depth must be an integer, got True \(bool\)"),
        (lambda s: s.coordinates(CORE, 4), r"loop 4 is out of range: 4 exist"),
        (lambda s: s.coordinates(PRELUDE, 0), r"loop 0 is out of range: 0 exist"),
        (lambda s: LoopSchedule.looped(0, 0, 0, 4), r"n_core must be at least 1, got 0"),
        (lambda s: LoopSchedule.looped(0, 1, 0, 0), r"n_loops must be at least 1, got 0"),
        (lambda s: LoopSchedule.nested(1, 0, 1), r"h_cycles must be at least 1, got 0"),
    ],
)
def test_places_that_do_not_exist_are_refused(call, message: str):
    with pytest.raises(InputError, match=message):
        call(LoopSchedule.looped(2, 3, 1, 4))
