"""Logits as sums of what is written to the stream: the sum on every family, TransformerLens's numbers, slow ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import PARITY, expected, make, tokens_for
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_looped import InputError, LoopedModel
from tl_looped.lens import Decomposition, decompose

FAMILIES = sorted(path.name for path in PARITY.iterdir() if path.is_dir() and path.name != "albert")
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained with a prefix")


def prompts_of(model: LoopedModel, family: str) -> Tensor:
    stored = expected(family)
    if model.cfg.puzzles is None:
        return stored["input_ids"]
    rows = zip(stored["puzzle_identifiers"], stored["input_ids"], strict=True)
    return torch.stack([torch.tensor([*model.cfg.puzzle_tokens(int(p)), *row]) for p, row in rows])


def logits_of(model: LoopedModel, prompts: Tensor) -> Tensor:
    with torch.no_grad():
        return model.last_logits(prompts).double()


@pytest.mark.parametrize("by", ["component", "head", "neuron", "loop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_sum_to_the_logit(family: str, by: Any) -> None:
    model = LoopedModel.from_pretrained(PARITY / family)
    prompts = prompts_of(model, family)
    logits = logits_of(model, prompts)
    found = decompose(model, prompts, by=by, progress=False)
    assert torch.equal(found.tokens[:, 0], logits.argmax(-1)) and bool((found.tokens[:, 1] == -1).all())
    torch.testing.assert_close(found.target, logits.amax(-1), rtol=1e-5, atol=1e-5)
    assert found.error() <= 1e-5
    other = decompose(model, prompts, by=by, targets=3, against=5, progress=False)
    torch.testing.assert_close(other.target, logits[:, 3] - logits[:, 5], rtol=1e-5, atol=1e-4)
    assert other.error() <= 1e-5
    assert not any(weight.grad is not None for weight in model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("family", ["ff-llama", "ff-gpt2", "ff-qwen2"])
def test_they_are_those_of_transformerlens_where_its_sum_holds(family: str) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(PARITY / family).eval()
    bridge: Any = build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)
    model = LoopedModel.from_bridge(bridge)
    prompts = expected(family)["input_ids"]
    found = decompose(model, prompts, targets=3, by="component", progress=False)
    _, cache = bridge.run_with_cache(prompts)
    parts, labels = cache.decompose_resid(mode="attn", apply_ln=False, pos_slice=-1, return_labels=True)
    mlps, mlp_labels = cache.decompose_resid(mode="mlp", apply_ln=False, pos_slice=-1, return_labels=True)
    theirs = dict(zip(labels, parts, strict=True)) | dict(zip(mlp_labels, mlps, strict=True))
    scale = cache["ln_final.hook_scale"][:, -1]
    gain = model.transformer.head_gain
    for component, ours in zip(found.components, found.contributions.T, strict=True):
        name = {"attn": "attn_out", "mlp": "mlp_out", "embed": "embed", "pos_embed": "pos_embed"}.get(component["kind"])
        if name is None:
            continue
        label = name if component["layer"] is None else f"{component['layer']}_{name}"
        written = theirs[label]
        if family == "ff-gpt2":
            written = written - written.mean(-1, keepdim=True)
        wanted = (written / scale * gain) @ model.W_U[:, 3]
        torch.testing.assert_close(ours, wanted.detach().double(), rtol=1e-3, atol=1e-4)


def frozen(model: LoopedModel, prompts: Tensor, name: str, by: float, **options: Any) -> Tensor:
    """Logits with every write and everything that is held as it was, but one write times 1 + `by`."""
    kinds = ("hook_attn_out", "hook_mlp_out", "hook_scale", "hook_update_gate", "hook_embed", "hook_pos_embed")
    _, cache = model.run_with_cache(prompts, names_filter=lambda one: one.endswith(kinds), **options)

    def put(x: Tensor, hook: Any) -> Tensor:
        return cache.cache_dict[hook.name] * (1 + by if hook.name == name else 1)

    return model.run_with_hooks(prompts, fwd_hooks=[(lambda one: one.endswith(kinds), put)], **options)[:, -1]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("huginn", "blocks.1.loop.0.hook_mlp_out"),
        ("huginn", "prelude.0.hook_attn_out"),
        ("huginn", "hook_embed"),
        ("ouro", "blocks.0.loop.1.hook_attn_out"),
        ("parcae", "blocks.0.loop.0.hook_mlp_out"),
        ("loopus-qwen3", "blocks.0.loop.1.hook_mlp_out"),
        ("hrm-text", "L_blocks.1.loop.2.hook_attn_out"),
        ("looped-gpt", "blocks.0.loop.1.hook_mlp_out"),
    ],
)
def test_a_contribution_is_what_a_larger_write_changes(family: str, name: str) -> None:
    """Linear, so a step of any length will do: the write doubled, all else held by hooks."""
    model = LoopedModel.from_pretrained(PARITY / family, dtype="float64")
    prompts, options = prompts_of(model, family), {"seed": 1} if family in ("huginn", "parcae") else {}
    found = decompose(model, prompts, targets=3, progress=False, **options)
    (at,) = (i for i, component in enumerate(found.components) if component["name"] == name)
    change = frozen(model, prompts, name, 1.0, **options) - frozen(model, prompts, name, 0.0, **options)
    torch.testing.assert_close(found.contributions[:, at], change[:, 3].double(), rtol=1e-6, atol=1e-8)


def test_heads_and_neurons_are_parts_of_their_layer() -> None:
    model = LoopedModel.from_pretrained(PARITY / "huginn")
    prompts = expected("huginn")["input_ids"]
    whole = decompose(model, prompts, targets=3, seed=0, progress=False)
    for by, kind, part in (("head", "attn", "head"), ("neuron", "mlp", "neuron")):
        split = decompose(model, prompts, targets=3, seed=0, by=by, progress=False)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(split.stack(part).sum(-1), whole.stack(kind), rtol=1e-4, atol=1e-5)
    loops = decompose(model, prompts, targets=3, seed=0, by="loop", progress=False)
    names = [component["name"] for component in loops.components]
    for t in range(model.cfg.n_loops):
        wanted = whole.stack("attn")[:, t].sum(-1) + whole.stack("mlp")[:, t].sum(-1)
        torch.testing.assert_close(loops.contributions[:, names.index(f"blocks.loop.{t}")], wanted)


def test_prompts_do_not_mix_and_padding_changes_nothing() -> None:
    model = LoopedModel.from_pretrained(PARITY / "ff-gpt2")
    rows = [[5, 7, 9, 11], [3, 8], [2, 4, 6, 8]]
    together = decompose(model, rows, targets=[1, 2, 3], progress=False)
    for i, row in enumerate(rows):
        alone = decompose(model, [row], targets=i + 1, progress=False)
        torch.testing.assert_close(together.contributions[i], alone.contributions[0], rtol=1e-4, atol=1e-5)
    padded = torch.tensor([[0, 0, 3, 8]])
    mask = torch.tensor([[0, 0, 1, 1]])
    masked = decompose(model, padded, targets=2, attention_mask=mask, progress=False)
    torch.testing.assert_close(masked.contributions[0], together.contributions[1], rtol=1e-4, atol=1e-5)


def test_zeroing_the_last_write_of_a_plain_stream_is_what_it_adds_but_for_the_norm() -> None:
    model = make(n_loops=2)
    prompts = tokens_for(model, batch=2)
    found = decompose(model, prompts, targets=3, compare=4, progress=False)
    measured = [i for i in range(len(found.components)) if not bool(found.measured[:, i].isnan().any())]
    assert len(measured) == 4 and -1 <= found.agreement() <= 1
    name = found.components[measured[0]]["name"]

    def silence(x: Tensor, hook: Any) -> Tensor:
        x[:, -1] = 0
        return x

    with torch.no_grad():
        edited = model.run_with_hooks(prompts, fwd_hooks=[(name, silence)])[:, -1, 3]
    torch.testing.assert_close(found.measured[:, measured[0]], found.target - edited.double(), rtol=1e-4, atol=1e-5)


def test_what_is_measured_does_not_hang_on_the_batches() -> None:
    model = LoopedModel.from_pretrained(PARITY / "ouro")
    torch.manual_seed(0)
    prompts = [[int(one) for one in torch.randint(40, (4 + i % 2,))] for i in range(6)]
    found = [decompose(model, prompts, by="head", compare=3, batch_size=n, progress=False) for n in (1, 2, 8)]
    for one in found:
        assert int((~one.measured.isnan()).all(0).sum()) == 3 == int((~one.measured.isnan()).any(0).sum())
        torch.testing.assert_close(one.measured, found[0].measured, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", ["ff-llama", "huginn", "hrm-text"])
def test_what_hooks_add_to_the_stream_is_no_component(family: str, dtype: str) -> None:
    model = LoopedModel.from_pretrained(PARITY / family, dtype=dtype)
    prompts = prompts_of(model, family)

    def steer(x: Tensor, hook: Any) -> Tensor:
        return x + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)

    stream, written = ([n for n in model.hook_dict if n.endswith(end)][-1] for end in ("resid_post", "mlp_out"))
    with model.hooks([(stream, steer)]), pytest.raises(InputError, match=r"misses the target by .* by your hooks"):
        decompose(model, prompts, targets=3, progress=False)
    with model.hooks([(written, steer)]):  # a write that is edited is one still
        found = decompose(model, prompts, targets=3, progress=False)
        torch.testing.assert_close(found.target, logits_of(model, prompts)[:, 3], rtol=1e-5, atol=1e-5)
    assert found.error() <= 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_whatever_the_gradient_mode(mode: Any) -> None:
    model = LoopedModel.from_pretrained(PARITY / "ouro")
    prompts = prompts_of(model, "ouro")
    wanted = decompose(model, prompts, targets=3, compare=2, progress=False)
    with mode():
        found = decompose(model, prompts.clone(), targets=3, compare=2, progress=False)
    torch.testing.assert_close(found.contributions, wanted.contributions)
    torch.testing.assert_close(found.measured, wanted.measured, equal_nan=True)


def test_a_result_is_kept_and_shown(tmp_path: Any) -> None:
    model = LoopedModel.from_pretrained("looped-hops")
    found = decompose(model, "a=4; c=a; b=7; d=c; f=b; ? d", targets="4", against="7", by="head", progress=False)
    table = found.to_dataframe()
    assert len(table) == len(found.components) and table["contribution"].sum() == pytest.approx(float(found.target[0]))
    again = Decomposition.load(found.save(tmp_path / "found"))
    assert torch.equal(again.contributions, found.contributions) and again.components == found.components
    figure = found.plot(most=5)
    assert len(figure.data) == 7 and figure.data[-1].y[0] == pytest.approx(float(found.target[0]), rel=1e-4)
    heads, mlps = found.heatmap().data[0], found.heatmap("mlp").data[0]
    cells = np.array(heads.z).reshape(found.stack().shape[1:])  # loops, layers in them, heads
    np.testing.assert_allclose(cells, found.stack().mean(0), rtol=1e-3, atol=1e-4)
    assert heads.customdata[5][1] == "loop 2, layer 1 head 1" and len(mlps.z) * len(mlps.z[0]) == 12
    with pytest.raises(InputError, match=r"no 'neuron' of a stack that loops is here \(none; kinds: "):
        found.stack("neuron")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "layer"}, "by must be one of .*, got 'layer'"),
        ({"targets": 10**6}, "target 1000000 is out of the vocabulary"),
        ({"targets": [1, 2, 3]}, "targets has 3 tokens for 1 prompts: give one for each, or one for all"),
        ({"against": [1, 2]}, "against has 2 tokens for 1 prompts"),
        ({"targets": 1.5}, "a target must be a text or a token id, got 1.5|float"),
        ({"compare": -1}, "compare must be at least 0, got -1"),
        ({"by": "loop", "compare": 2}, "compare zeroes components, and by='loop' has sums of them"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, TypeError), match=message):
        decompose(make(), torch.tensor([[1, 2, 3]]), progress=False, **options)


def test_what_is_no_sum_is_refused() -> None:
    with pytest.raises(InputError, match="reads the stream through a map with an activation function"):
        decompose(LoopedModel.from_pretrained(PARITY / "albert"), torch.tensor([[1, 2, 3]]))
    with pytest.raises(InputError, match="train"):
        decompose(make().train(), torch.tensor([[1, 2, 3]]))
