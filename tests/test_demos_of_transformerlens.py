"""The calls of TransformerLens's Main Demo and Activation Patching demo, on a looped model and on its view.

Each runs as the notebooks write it, with the model's line changed: what works is compared with a plain computation,
what is refused holds the call that does it. docs/from_transformerlens.md shows the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import circuitsvis as cv
import pytest
import torch
from torch import Tensor
from transformer_lens import FactoredMatrix, patching
from transformer_lens.utilities import get_act_name, lm_cross_entropy_loss
from transformer_lens.utilities import test_prompt as show_prompt

from tl_looped import LoopedModel
from tl_looped.patching import patch_sweep

PAGE = Path(__file__).parent.parent / "docs" / "from_transformerlens.md"
TEXT, OTHER = "a=4; c=a; b=7; d=c; f=b; ? d", "a=4; c=a; b=7; d=b; f=b; ? d"
LOOPS, DEPTH = 6, 13  # prelude 1, blocks 2 x 6 loops

Works = Callable[[Any], None]
Told = tuple[Callable[[Any], Any], str]


@lru_cache
def looped() -> LoopedModel:
    return LoopedModel.from_pretrained("looped-hops", dtype=torch.float32)


@lru_cache
def unrolled() -> Any:
    return looped().unrolled(LOOPS)


def cached(m: Any, text: str = TEXT) -> Any:
    return m.run_with_cache(m.to_tokens(text))[1]


def metric(logits: Tensor) -> Tensor:
    """The notebooks' logit difference."""
    m = looped()
    return logits[0, -1, m.to_single_token("4")] - logits[0, -1, m.to_single_token("7")]


def same(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# What works.


def a_loss(m: Any) -> None:
    log_probs = m(TEXT).log_softmax(-1)[0, :-1]
    tokens = m.to_tokens(TEXT)
    same(m(TEXT, return_type="loss"), -log_probs.gather(1, tokens[0, 1:, None]).mean())
    same(lm_cross_entropy_loss(m(tokens), tokens), m(tokens, return_type="loss"))


def words(m: Any) -> None:
    tokens = m.to_tokens(TEXT, prepend_bos=False)
    assert m.to_str_tokens(TEXT)[1:5] == ["a", "=", "4", ";"]
    assert m.to_string(tokens[0]).replace(" ", "") == TEXT.replace(" ", "")
    assert m.to_single_token("4") == int(tokens[0, 2])


def a_pattern_shown(m: Any) -> None:
    pattern = m.run_with_cache(TEXT, remove_batch_dim=True)[1][("pattern", 1, 3) if m is looped() else ("pattern", 8)]
    same(pattern.sum(-1), torch.ones(2, 23))
    assert cv.attention.attention_patterns(tokens=m.to_str_tokens(TEXT), attention=pattern) is not None


def a_head_ablated(m: Any) -> None:
    """Without values head 0 writes nothing, in every loop; the view does it at the layers of the same depth."""

    def ablate(v: Tensor, hook: Any) -> Tensor:
        v[:, :, 0, :] = 0.0
        return v

    def by_hand(z: Tensor, hook: Any) -> None:
        z[:, :, 0, :] = 0.0

    loss = m.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[(get_act_name("v", 1), ablate)])
    places = ["blocks.1.attn.hook_z"] if m is looped() else [f"blocks.{get_act_name('z', 1)[7:]}"]
    same(loss, m.run_with_hooks(TEXT, return_type="loss", fwd_hooks=[(place, by_hand) for place in places]))


def patched_by_hand(m: Any) -> None:
    """`clean_cache[hook.name]`: the name has the loop in it, so each loop gets its own."""
    clean = cached(m)

    def patch(resid: Tensor, hook: Any, position: int) -> Tensor:
        resid[:, position, :] = clean[hook.name][:, position, :]
        return resid

    hooks = [(get_act_name("resid_pre", 1), partial(patch, position=15))]
    found = metric(m.run_with_hooks(m.to_tokens(OTHER), fwd_hooks=hooks))
    if m is looped():
        sweep = patch_sweep(
            m, OTHER, source=clean, metric=metric, site="resid_pre", axes=("layer", "pos"), when="every", progress=False
        )
        same(found, sweep.values[1, 15], 1e-4)
    else:
        there, of_loops = cached(looped()), "blocks.0.loop.0.hook_resid_pre"

        def put(resid: Tensor, hook: Any) -> None:
            resid[:, 15] = there[of_loops][:, 15]

        same(found, metric(looped().run_with_hooks(OTHER, fwd_hooks=[(of_loops, put)])), 1e-4)


def random_twice() -> Tensor:
    digits = torch.randint(0, 10, (4, 10), generator=torch.Generator().manual_seed(0)) + looped().to_single_token("0")
    return torch.cat((digits, digits), dim=1)


def induction(m: Any) -> None:
    """The notebook's hook, with a place for every loop: without one the last loop would stay alone in the table."""
    tokens, scores = random_twice(), torch.zeros(LOOPS, m.cfg.n_core, m.cfg.n_heads)

    def score(pattern: Tensor, hook: Any) -> None:
        scores[hook.loop, hook.layer()] = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 10).mean((0, -1))

    def blocks(name: str) -> bool:
        return name.startswith("blocks") and name.endswith("pattern")

    m.run_with_hooks(tokens, return_type=None, fwd_hooks=[(blocks, score)])
    patterns = m.run_with_cache(tokens)[1].stack("pattern")  # [loop, layer, batch, head, query, key]
    plain = torch.stack([patterns[..., 9 + i, i] for i in range(11)], -1)
    same(scores, plain.mean((2, -1)))


def induction_in_depth(m: Any) -> None:
    tokens, scores = random_twice(), torch.zeros(m.cfg.n_layers, m.cfg.n_heads, device=m.cfg.device)

    def score(pattern: Tensor, hook: Any) -> None:
        scores[hook.layer()] = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 10).mean((0, -1))

    m.run_with_hooks(tokens, return_type=None, fwd_hooks=[(lambda name: name.endswith("pattern"), score)])
    assert len(scores) == DEPTH
    pattern = looped().run_with_cache(tokens)[1]["pattern", 1, 5]
    same(scores[-1], torch.stack([pattern[:, :, 9 + i, i] for i in range(11)], -1).mean((0, -1)))


def some_names(m: Any) -> None:
    cache = m.run_with_cache(TEXT, names_filter=lambda name: name.endswith("hook_z"))[1]
    assert len(cache) == DEPTH and all(name.endswith("attn.hook_z") for name in cache.keys())  # noqa: SIM118


def weights(m: Any) -> None:
    first = m.blocks[0].attn
    layer = 1 if m is looped() else 0  # W_Q counts the prelude
    same(m.W_Q[layer], first.W_Q)
    same(m.W_O[layer], first.W_O)
    same(m.W_E, looped().transformer.embed.weight)
    same(m.W_U, looped().transformer.unembed.weight.T)
    assert not m.b_U.any()


def circuits(m: Any) -> None:
    """W_E W_V W_O W_U of every head, its eigenvalues, and the copying score."""
    full = m.W_E @ m.OV @ m.W_U
    plain = m.W_E @ m.W_V[-1, 1] @ m.W_O[-1, 1] @ m.W_U
    same(full[-1, 1].AB, plain, 1e-4)
    eigenvalues = full.eigenvalues
    score = (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1))[-1, 1]
    values = torch.linalg.eigvals(plain)
    same(score, values.sum().real / values.abs().sum(), 1e-3)
    same(FactoredMatrix(m.W_V[-1, 1], m.W_O[-1, 1]).norm(), (m.W_V[-1, 1] @ m.W_O[-1, 1]).norm())


def new_text(m: Any) -> None:
    """Each token is the most probable one after those before it."""
    told = {"stop_at_eos": False, "do_sample": False, "max_new_tokens": 3, "return_type": "tokens"}
    tokens = m.generate(m.to_tokens("a=4; ? a"), **told)
    for end in range(tokens.shape[1] - 3, tokens.shape[1]):
        assert m(tokens[:, :end])[0, -1].argmax() == tokens[0, end]


def hooks_stay(m: Any) -> None:
    name, seen = "blocks.0.hook_resid_pre", []
    times = LOOPS if m is looped() else 1
    m.add_hook(name, lambda x, hook: seen.append(hook.name), is_permanent=True)
    m(TEXT)
    m.reset_hooks()
    m(TEXT)
    assert len(seen) == 2 * times
    m.reset_hooks(including_permanent=True)
    m(TEXT)
    assert len(seen) == 2 * times


def contexts(m: Any) -> None:
    """`hook.ctx` is one dictionary for each loop."""
    found: list[float] = []

    def write(x: Tensor, hook: Any) -> None:
        hook.ctx["mean"] = x.mean().item()

    hooks = [("blocks.0.hook_resid_pre", one) for one in (write, lambda x, hook: found.append(hook.ctx["mean"]))]
    m.run_with_hooks(TEXT, fwd_hooks=hooks)
    cache = cached(m)
    kept = cache.stack("resid_pre", 0) if m is looped() else cache["resid_pre", 0][None]
    same(torch.tensor(found), kept.mean((1, 2, 3)))
    m.reset_hooks(clear_contexts=True)


def gradients(m: Any) -> None:
    grads: list[Tensor] = []
    site = "prelude.0.hook_resid_pre" if m is looped() else "blocks.0.hook_resid_pre"
    with m.hooks(bwd_hooks=[(site, lambda g, hook: grads.append(g))]):
        m(TEXT, return_type="loss").backward()
    same(grads[0], m.run_with_cache(TEXT, return_type="loss", incl_bwd=True)[1][f"{site}_grad"])
    m.zero_grad()


def stops(m: Any) -> None:
    cache = cached(m)
    same(m(TEXT, stop_at_layer=4), cache["resid_pre", 4])
    same(cache["resid_pre", 4], looped().run_with_cache(TEXT)[1]["resid_pre", 1, 1])


def stops_in_loops(m: Any) -> None:
    """The mend itself."""
    stream, cache = m.run_with_cache(TEXT, stop_at=(1, 1), names_filter=lambda name: name.endswith("pattern"))
    assert torch.equal(stream, cached(m)["resid_pre", 1, 1]) and len(cache) == 4
    assert torch.equal(m(stream, start_at=(1, 1), tokens=TEXT), m(TEXT))


def patches(_: Any) -> None:
    """Against a run with one hook, at one place of each kind."""
    m = looped().unrolled(2)
    clean, tokens = cached(m, "a=4; b=7; ? a"), m.to_tokens("a=9; b=7; ? a")
    for call, name, place in (
        (patching.get_act_patch_resid_pre, "resid_pre", (slice(None), 3)),
        (patching.get_act_patch_attn_out, "attn_out", (slice(None), 3)),
        (patching.get_act_patch_mlp_out, "mlp_out", (slice(None), 3)),
        (patching.get_act_patch_attn_head_out_all_pos, "z", (slice(None), slice(None), 1)),
    ):

        def put(x: Tensor, hook: Any, place: Any = place) -> Tensor:
            x[place] = clean[hook.name][place]
            return x

        by_hand = metric(m.run_with_hooks(tokens, fwd_hooks=[(get_act_name(name, 4), put)]))
        at = 1 if name == "z" else 3
        same(call(m, tokens, clean, metric)[4, at], by_hand, 1e-4)


def every(_: Any) -> None:
    """The tables of all kinds at once are those of each."""
    m = looped().unrolled(1)
    clean, tokens = cached(m, "a=4; ? a"), m.to_tokens("a=9; ? a")
    given = (m, tokens, clean, metric)
    kinds = (patching.get_act_patch_resid_pre, patching.get_act_patch_attn_out, patching.get_act_patch_mlp_out)
    same(patching.get_act_patch_block_every(*given), torch.stack([one(*given) for one in kinds]))
    heads = patching.get_act_patch_attn_head_all_pos_every(*given)
    same(heads[0], patching.get_act_patch_attn_head_out_all_pos(*given))
    assert patching.get_act_patch_attn_head_by_pos_every(*given).shape[:3] == (5, *heads.shape[1:2], tokens.shape[1])


def answers(m: Any) -> None:
    show_prompt(TEXT, "4", m, prepend_space_to_answer=False)
    assert int(m(TEXT)[0, -1].argmax()) == m.to_single_token("4")


def in_half(m: Any) -> None:
    half = type(m).from_pretrained("looped-hops", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    same(half(TEXT)[0, -1].float().softmax(-1), m(TEXT)[0, -1].softmax(-1), 0.05)


@lru_cache
def adding() -> Any:
    """The view of a model in which the sum over layers holds."""
    model = LoopedModel.from_pretrained(Path(__file__).parent.parent / "demos/models/docs-looped", dtype=torch.float32)
    return model.unrolled()


def sums(_: Any) -> None:
    m = adding()
    tokens = m.to_tokens("What a run computes")
    cache = m.run_with_cache(tokens)[1]
    parts, labels = cache.decompose_resid(layer=-1, return_labels=True)
    assert len(labels) == len(parts)
    same(parts.sum(0), cache["resid_post", m.cfg.n_layers - 1], 1e-4)
    last = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)[0]
    same(last[-1], cache["resid_post", m.cfg.n_layers - 1][:, -1])
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    same(heads[0], (cache["z", 0][:, -1, 0] @ m.W_O[0, 0]))


def a_pattern(m: Any) -> None:
    assert torch.equal(cached(m)["pattern", 8, "attn"], cached(m)["blocks.8.attn.hook_pattern"])
    same(cached(m)["pattern", 8, "attn"], cached(looped())["pattern", 1, 3, "attn"])


def at_a_depth(m: Any) -> None:
    """Depth 8 is layer 1 in loop 3, behind one layer of prelude."""

    def silence(v: Tensor, hook: Any) -> Tensor:
        return v * 0

    there = looped().run_with_hooks(TEXT, fwd_hooks=[("blocks.1.loop.3.attn.hook_v", silence)])
    same(m.run_with_hooks(TEXT, fwd_hooks=[(get_act_name("v", 8), silence)]), there)


def fields(m: Any) -> None:
    assert (m.cfg.n_layers, m.cfg.n_heads) == (DEPTH, 2) and torch.device(m.cfg.device) == looped().device


def modules(m: Any) -> None:
    assert torch.equal(m.embed.W_E, looped().W_E) and torch.equal(m.unembed.W_U, looped().W_U)
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0))
    same(m.ln_final(x), looped().transformer.head_input(x))


def results(m: Any) -> None:
    m.set_use_attn_result(True)
    found = m.run_with_cache(TEXT, names_filter=get_act_name("result", 8))[1]["result", 8]
    m.set_use_attn_result(False)
    same(found[0, -1, 1], cached(m)["z", 8][0, -1, 1] @ m.W_O[8, 1])


# What is refused: the call, and what the message says.


def told(call: Callable[[Any], Any], message: str) -> Told:
    return call, message


def hooks_of(name: str) -> Callable[[Any], Any]:
    return lambda m: m.run_with_hooks(TEXT, fwd_hooks=[(name, lambda x, hook: None)])


LAYERS = told(lambda m: m.cfg.n_layers, r"cfg.n_prelude, cfg.n_core and cfg.n_coda .* model.unrolled\(n_loops\)")
NO_SUM = told(lambda m: cached(m).decompose_resid(layer=-1), "split logits by lens.decompose, or take model.unrolled")
THIRD = told(
    lambda m: cached(m)["pattern", 0, "attn"], r"the third is the loop: cache\['pattern', layer, loop, 'attn'\]"
)
LOOPED = LoopedModel

# The call; on the looped model: a check, or what is told, and the mend in words; the same on the view.
LINES: list[tuple[str, Works | Told, str, Works | Told | None, str]] = [
    (
        "`HookedTransformer.from_pretrained(name, fold_ln=False, center_unembed=False)`",
        told(lambda m: LOOPED.from_pretrained("looped-hops", fold_ln=False), "'fold_ln': weights are never processed"),
        "leave the flags out",
        None,
        "",
    ),
    (
        "`from_pretrained_no_processing(name)`, `TransformerBridge.boot_transformers(name)`",
        told(lambda m: LOOPED.from_pretrained_no_processing, r"from_pretrained\(name\) processes no weights"),
        "`LoopedModel.from_pretrained(name)`",
        None,
        "",
    ),
    (
        "`from_pretrained(name, checkpoint_index=3)`",
        told(lambda m: LOOPED.from_pretrained("looped-hops", checkpoint_index=3), "is a revision= or a subfolder="),
        "`revision=`, `subfolder=`",
        None,
        "",
    ),
    ("`from_pretrained(name, dtype=torch.bfloat16)`", in_half, "works", None, ""),
    ('`model(text, return_type="loss")`, `utils.lm_cross_entropy_loss`', a_loss, "works", a_loss, "works"),
    ("`to_tokens`, `to_str_tokens`, `to_string`, `to_single_token`", words, "works", words, "works"),
    (
        "`to_tokens(text, move_to_device=False)`",
        told(lambda m: m.to_tokens(TEXT, move_to_device=False), "tokens come on the model's device: leave it out"),
        "leave it out",
        None,
        "",
    ),
    ("`utils.test_prompt(prompt, answer, model)`", answers, "works", answers, "works"),
    ('`cache["pattern", 0, "attn"]`', THIRD, '`cache["pattern", 0, loop, "attn"]`', a_pattern, "works"),
    (
        "`run_with_cache(text, remove_batch_dim=True)`, `cv.attention.attention_patterns(...)`",
        a_pattern_shown,
        "works, with a loop",
        a_pattern_shown,
        "works",
    ),
    (
        "`run_with_cache(tokens, stop_at_layer=1, names_filter=[name])`",
        told(lambda m: m(TEXT, stop_at_layer=1), r"stop_at=\(loop, layer\) returns the stream that enters it"),
        "`stop_at=(loop, layer)`",
        stops,
        "works",
    ),
    (
        "`model(resid, start_at_layer=4)`",
        told(lambda m: m(torch.zeros(1, 23, 64), start_at_layer=4), r"model\(stream, start_at=\(loop, layer\), "),
        "`model(stream, start_at=(loop, layer), tokens=prompts)`",
        told(lambda m: m(torch.zeros(1, 23, 64), start_at_layer=4), "goes on from a residual stream alone, but"),
        "where later loops read no more than the stream",
    ),
    ("`model(text, stop_at=(1, 1))` and on from there, the mend of both", stops_in_loops, "works", None, ""),
    (
        '`run_with_hooks(..., fwd_hooks=[(get_act_name("v", 1), head_ablation_hook)])`',
        a_head_ablated,
        "works, in every loop",
        a_head_ablated,
        "works",
    ),
    (
        "the same at a layer that there is in depth only",
        told(hooks_of(get_act_name("v", 8)), "no hook point 'blocks.8.attn.hook_v'. Nearest: 'blocks.1.attn.hook_v'"),
        '`"blocks.1.loop.3.attn.hook_v"`',
        at_a_depth,
        "works",
    ),
    (
        "a hook that reads `clean_cache[hook.name]`",
        patched_by_hand,
        "works, each loop its own",
        patched_by_hand,
        "works",
    ),
    ("`torch.zeros(model.cfg.n_layers, model.cfg.n_heads)`", LAYERS, "`cfg.n_core`, or the view", fields, "works"),
    (
        "`model.cfg.device`",
        told(lambda m: m.cfg.device, "model.device is it"),
        "`model.device`",
        fields,
        "works",
    ),
    (
        "`scores[hook.layer(), :] = ...` with `fwd_hooks=[(filter, hook)]`",
        induction,
        "`scores[hook.loop, hook.layer()]`, of `blocks` only: else the last loop stays alone, and no error can tell",
        induction_in_depth,
        "works",
    ),
    ("`names_filter=lambda name: name.endswith(...)`", some_names, "works", some_names, "works"),
    (
        "`model.W_E`, `W_U`, `b_U`, `W_Q`, `blocks[0].attn.W_Q`",
        weights,
        "works; `W_Q` counts the prelude's layers",
        weights,
        "works",
    ),
    (
        "`model.embed.W_E`, `model.unembed.W_U`, `model.ln_final`",
        told(lambda m: m.embed.W_E, "'embed': model.W_E is its matrix"),
        "`model.W_E`, `model.W_U`, `model.transformer.ln_final`",
        modules,
        "works",
    ),
    (
        "`model.W_E @ model.OV @ model.W_U`, `.eigenvalues`, copying scores, `FactoredMatrix`",
        circuits,
        "works",
        circuits,
        "works",
    ),
    ("`model.generate(prompt, max_new_tokens=, do_sample=False)`", new_text, "works", new_text, "works"),
    (
        "`generate(..., temperature=0)`",
        told(lambda m: m.generate(TEXT, max_new_tokens=1, temperature=0), "most probable token pass do_sample=False"),
        "`do_sample=False`",
        None,
        "",
    ),
    ("`add_hook(..., is_permanent=True)`, `reset_hooks()`", hooks_stay, "works", hooks_stay, "works"),
    ("`hook.ctx`", contexts, "works, one for each loop", contexts, "works"),
    ("`bwd_hooks=`, `incl_bwd=True`", gradients, "works", gradients, "works"),
    (
        "`cache.decompose_resid`, `accumulated_resid`, `stack_head_results`, `logit_attrs`",
        NO_SUM,
        "`lens.decompose`, or the view",
        sums,
        "where the sum holds",
    ),
    (
        "`model.set_use_attn_result(True)`, `cfg.use_attn_result`",
        told(lambda m: m.set_use_attn_result(True), "attn.hook_result is there without a switch"),
        "leave it out",
        results,
        "works",
    ),
    (
        "`patching.get_act_patch_resid_pre`, `attn_out`, `mlp_out`, `attn_head_out_all_pos`",
        told(lambda m: patching.get_act_patch_resid_pre(m, m.to_tokens(OTHER), cached(m), metric), "model.unrolled"),
        "`patch_sweep`, or the view",
        patches,
        "works",
    ),
    (
        "`get_act_patch_block_every`, `attn_head_all_pos_every`, `attn_head_by_pos_every`",
        told(lambda m: patching.get_act_patch_block_every(m, m.to_tokens(OTHER), cached(m), metric), "model.unrolled"),
        "`patch_sweep`, or the view",
        every,
        "works",
    ),
]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_a_call_works_or_tells_the_mend(line: tuple[str, Works | Told, str, Works | Told | None, str]) -> None:
    for model, does in ((looped(), line[1]), (unrolled(), line[3])):
        if isinstance(does, tuple):
            call, message = does
            with pytest.raises((ValueError, AttributeError, KeyError), match=message):
                call(model)
        elif does is not None:
            does(model)


def test_the_page_has_these_lines() -> None:
    page = PAGE.read_text()
    table = page[page.index("<!-- the demos' calls -->") : page.index("<!-- end of the calls -->")]
    rows = [
        [cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines() if row.startswith("| ")
    ]
    assert rows[1:] == [["---"] * 3, *([call, mend, view or "-"] for call, _, mend, _, view in LINES)]
