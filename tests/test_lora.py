"""LoRA adapters of PEFT, merged while a model loads: as PEFT itself merges them, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, refuse
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from test_memory import TOKENS, close, logits, theirs
from torch import Tensor

from tl_looped import LoadError, LoopedModel
from tl_looped.adapters import hub

BASE = "ff-llama"
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": f"someone/{BASE}", "r": 2, "lora_alpha": 6, "bias": "none"}
CONFIG |= {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": True}
Write = Callable[..., Path]


def pairs(base: str = BASE, rank: int = 2) -> dict[str, Tensor]:
    """An adapter's weights, for two maps of every layer."""
    found, generator = {}, torch.Generator().manual_seed(5)
    for name, weight in load_file(PARITY / base / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) / 4
            found[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) / 4
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Write:
    def write(config: dict[str, Any] | None = None, weights: dict[str, Tensor] | None = None) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
        save_file(pairs() if weights is None else weights, folder / "adapter_model.safetensors")
        return folder

    return write


# What it computes.


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, 3.0)],
)
def test_a_low_rank_map_is_added(adapter: Write, config: dict[str, Any], scale: float):
    """W + s B A, by hand."""
    folder, base = adapter(config), load_file(PARITY / BASE / "model.safetensors")
    model = LoopedModel.from_pretrained(PARITY / BASE, adapter=folder, loop_layers=(2, 4), n_loops=3)
    assert model.cfg.model_name == f"{PARITY / BASE} + {folder}"
    halves, plain = pairs(), LoopedModel.from_pretrained(PARITY / BASE, loop_layers=(2, 4), n_loops=3)
    for depth, (stack, layer) in enumerate(model.cfg.layers()):
        block, same = (getattr(one.transformer, stack)[layer] for one in (model, plain))
        for ours, name in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
            module = f"model.layers.{depth}.{name}"
            down, up = (halves[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
            s = 0.5 if config.get("alpha_pattern") and module.endswith("layers.0.self_attn.q_proj") else scale
            wanted = base[f"{module}.weight"] + s * up @ down
            torch.testing.assert_close(block.get_submodule(ours).weight.detach(), wanted)
        assert torch.equal(block.attn.k.weight, same.attn.k.weight)


def test_the_sum_is_formed_in_float32_and_then_cast(adapter: Write):
    folder = adapter()
    whole = LoopedModel.from_pretrained(PARITY / BASE, adapter=folder)
    half = LoopedModel.from_pretrained(PARITY / BASE, adapter=folder, dtype="bfloat16")
    for ours, wanted in zip(half.parameters(), whole.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, wanted.bfloat16())


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "rank-stabilised": ("Qwen3", {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}),
    "ranks of their own": ("Llama", {"target_modules": r".*layers\.[01]\..*o_proj", "rank_pattern": {"0.*o_proj": 3}}),
    "some layers": ("Olmo2", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "gpt2": ("GPT2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gemma": ("Gemma2", {"target_modules": "all-linear", "alpha_pattern": {"layers.1.mlp.up_proj": 5}}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_peft_merges(name: str, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[test]'")
    family, options = CASES[name]
    model = theirs(family)
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight += 0.2 * torch.randn_like(weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = LoopedModel.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    wanted = wrapped.merge_and_unload()
    close(logits(ours), logits(wanted))
    assert not torch.allclose(logits(ours), logits(LoopedModel.from_pretrained(tmp_path / "base")), atol=1e-3)
    close(logits(LoopedModel.from_model(wanted)), logits(wanted))
    rewrapped = peft.PeftModel.from_pretrained(theirs(family), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"with an adapter around the weights: merge it first"):
        LoopedModel.from_model(rewrapped)
    with pytest.raises(ValueError, match=r"adapters that are not merged: (model|transformer)"):
        LoopedModel.from_model(rewrapped.get_base_model())


# What is refused.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"adapter_config.json has use_dora=True, .* ignore_config_keys=\['adapter.use_dora'\]"),
        ({"peft_type": "IA3"}, r"adapter_config.json has peft_type='IA3', which is not implemented: only 'LORA' is"),
        ({"bias": "all"}, r"bias='all', which is not implemented: only 'none' is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which no LoRA model here uses"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which is not implemented"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication=\[\[0, 2\], \[1, 3\]\], which no LoRA"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\], which no LoRA"),
        ({"of_the_future": 2}, r"of_the_future=2, which no LoRA model here uses, so the numbers could come out wrong"),
        ({"r": 4}, r"has rank 2 for model.layers.0.mlp.down_proj, but adapter_config.json says 4"),
        (
            {"base_model_name_or_path": "meta-llama/Llama-3.2-1B"},
            r"is for 'meta-llama/Llama-3.2-1B', not for .*ff-llama'.*\['adapter.base_model_name_or_path'\]",
        ),
        (
            {"target_modules": ["q_proj", "down_proj", "o_proj"]},
            r"not one for this model. without weights: model.layers.0.self_attn.o_proj, .*layers.4.self_attn.o_proj$",
        ),
    ],
)
def test_what_is_not_merged_is_refused(adapter: Write, config: dict[str, Any], message: str):
    refuse(PARITY / BASE, message, adapter=adapter(config))


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name.replace(old, new): one for name, one in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("layers.1", "layers.11"), r"modules that the model does not have: model.layers.11.mlp.down_proj, "),
        (rename("lora_A", "lora_embedding_A"), r"no LoRA of a linear map: .*lora_embedding_A"),
        (rename("lora_B.weight", "lora_magnitude_vector"), r"no LoRA of a linear map: .*lora_magnitude_vector"),
        (lambda w: {n: x for n, x in w.items() if "lora_A" in n}, r"down_proj without lora_B, "),
        (rename("lora_A", "base_layer"), r"down_proj.base_layer.weight, .* save_pretrained\(..., save_embedding"),
        (lambda w: {}, r"no LoRA of a linear map: none at all"),
        (
            lambda w: {n: x[..., :-1].contiguous() if "lora_A" in n else x for n, x in w.items()},
            r"of another shape: model",
        ),
        (lambda w: {n: x for n, x in w.items() if "layers.4" not in n}, r"without weights: model.layers.4.mlp.down_p"),
    ],
)
def test_weights_for_another_model(adapter: Write, change: Callable[..., dict[str, Tensor]], message: str):
    """As of a base with more layers, fewer, or wider ones."""
    refuse(PARITY / BASE, message, adapter=adapter(weights=change(pairs())))


def test_a_base_under_another_name(adapter: Write):
    folder = adapter({"base_model_name_or_path": "someone/copy"})
    keys = ["adapter.base_model_name_or_path"]
    LoopedModel.from_pretrained(PARITY / BASE, adapter=folder, ignore_config_keys=keys)
    refuse(PARITY / BASE, "has no 'base' to ignore", adapter=folder, ignore_config_keys="adapter.base")
    cached = "/home/me/hub/models--meta--ff-llama/snapshots/0123abc"
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": cached}))
    LoopedModel.from_pretrained(PARITY / BASE, adapter=folder)


def test_folders_that_hold_no_adapter_or_nothing_else(adapter: Write, tmp_path: Path):
    refuse(PARITY / BASE, r"has no adapter_config.json", adapter=tmp_path)
    folder = adapter()
    refuse(folder, r"holds an adapter and no model: .* LoopedModel.from_pretrained\('someone/ff-llama', adapter='")
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    refuse(PARITY / BASE, r"adapter_model.safetensors is not a whole safetensors file", adapter=folder)
    (folder / "adapter_model.safetensors").unlink()
    refuse(PARITY / BASE, r"has no adapter_model.safetensors: save the adapter with safe_s", adapter=folder)


# Beside it: what fine-tuning leaves in names, and repositories that are not for all.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.model.{name}",
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._fsdp_wrapped_module.mlp.')}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
        lambda name: f"model.{name}",
    ],
)
def test_names_of_training_runs(released, wrap: Callable[[str], str]):
    def change(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[wrap(name)] = weights.pop(name)

    model = LoopedModel.from_pretrained(released(BASE, change=change))
    close(logits(model), logits(LoopedModel.from_pretrained(PARITY / BASE)))
    assert len(TOKENS)


@pytest.mark.parametrize(
    ("kind", "mend"),
    [
        (
            GatedRepoError,
            r"ask for access at https://huggingface.co/owner/name, then run `hf auth login` or set",
        ),
        (RepositoryNotFoundError, r"401 Where the repository is private, run `hf auth login` or set HF_TOKEN\.$"),
    ],
)
def test_a_repository_that_is_not_for_all(kind: Any, mend: str, monkeypatch: pytest.MonkeyPatch):
    """The hub's own error, and what to do."""

    def download(*args: Any, **options: Any) -> str:
        error = kind.__new__(kind)
        Exception.__init__(error, "401")
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(LoadError, match=rf"the hub gave: {kind.__name__}: .*{mend}"):
        LoopedModel.from_pretrained("owner/name")
