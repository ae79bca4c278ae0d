"""Models of transformers in memory, and in a TransformerBridge: the same numbers, and the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import PARITY, expected, parity, word_tokenizer
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_looped import InputError, LoadError, LoopedModel

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 31,
    "num_hidden_layers": 3, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "vocab_size": 31}
GEMMA = {**SIZES, "sliding_window": 3, "head_dim": 8, "query_pre_attn_scalar": 10}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": {**SIZES, "sliding_window": 4},
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Olmo2": SIZES,
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA,
    "GPT2": GPT2,
}
TOKENS = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES)


def theirs(family: str = "Llama", **options: Any) -> Any:
    """A small random model of transformers, with norms that are not all ones."""
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], "attn_implementation": "eager", **options})
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def bridge(family: str = "Llama") -> TransformerBridge:
    model = theirs(family)
    built = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    built.tokenizer = word_tokenizer()
    return built


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS) if not isinstance(model, transformers.PreTrainedModel) else model(TOKENS).logits
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# The same model.


@every_family
def test_a_model_in_memory_is_the_one_that_is_saved_and_loaded(family: str, tmp_path: Path):
    model = theirs(family)
    ours = LoopedModel.from_model(model)
    model.save_pretrained(tmp_path)
    loaded = LoopedModel.from_pretrained(tmp_path)
    assert ours.cfg == type(ours.cfg)(**{**vars(loaded.cfg), "model_name": ours.cfg.model_name})
    close(logits(ours), logits(model))
    close(logits(ours), logits(loaded))
    with torch.no_grad():
        looped = LoopedModel.from_model(model, loop_layers=(1, 2), n_loops=3, update="damped")
        saved = LoopedModel.from_pretrained(tmp_path, loop_layers=(1, 2), n_loops=3, update="damped")
        close(looped(TOKENS), saved(TOKENS))


@every_family
def test_no_memory_is_taken_twice(family: str):
    """Whatever way the weights are stored."""
    model = theirs(family)
    places = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    ours = LoopedModel.from_model(model)
    assert {weight.untyped_storage().data_ptr() for weight in ours.parameters()} == places
    same = {id(weight) for weight in model.parameters()} & {id(weight) for weight in ours.parameters()}
    if family != "GPT2":
        assert len(same) == len(list(ours.parameters()))


@every_family
def test_an_edit_or_a_step_of_one_is_seen_by_the_other(family: str):
    model = theirs(family)
    ours = LoopedModel.from_model(model)
    for trained, forward in ((model, lambda: model(TOKENS).logits), (ours, lambda: ours(TOKENS))):
        before = logits(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        forward().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.allclose(logits(model), before, atol=1e-3)
        close(logits(ours), logits(model))
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS[0]] *= 2
    close(logits(ours), logits(model))


def test_what_is_frozen_stays_frozen():
    model = theirs("GPT2")
    for name, weight in model.named_parameters():
        weight.requires_grad_("c_attn" not in name)
    free = {name for name, weight in LoopedModel.from_model(model).named_parameters() if not weight.requires_grad}
    assert free == {f"transformer.blocks.{i}.attn.{one}.{kind}" for i in range(3) for one in "qkv"
                    for kind in ("weight", "bias")}  # fmt: skip


def test_a_shared_model_is_saved_alone(tmp_path: Path):
    """Weights that lie in one tensor of the other model are written one by one."""
    ours = LoopedModel.from_model(theirs("GPT2"), word_tokenizer())
    ours.save_pretrained(tmp_path / "model")
    again = LoopedModel.from_pretrained(tmp_path / "model")
    close(logits(again), logits(ours))
    assert again.to_tokens("a b").tolist() == ours.to_tokens("a b").tolist()


@pytest.mark.parametrize("family", ["ouro", "huginn", "retrofit-olmo2"])
def test_a_model_of_remote_code_comes_in_by_its_released_names(family: str):
    model = remote(family)
    ours = LoopedModel.from_model(model)
    assert ours.cfg.model_name == "RemoteForCausalLM"
    states = expected(family).get("input_states")
    options = {} if states is None else {"initial_state": states}
    with torch.no_grad():
        tokens = expected(family)["input_ids"]
        assert torch.equal(ours(tokens, **options), parity(family)(tokens, **options))
    places = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert {weight.untyped_storage().data_ptr() for weight in ours.parameters()} <= places


def remote(family: str) -> Any:
    """A model class that is not in transformers, with a released model's config and weights, at its names."""
    values = json.loads((PARITY / family / "config.json").read_text())
    kind = values["model_type"]
    config = type("RemoteConfig", (transformers.PretrainedConfig,), {"model_type": kind})(**values)
    named = type("RemoteForCausalLM", (transformers.PreTrainedModel,), {"config_class": type(config)})
    model = named(config)
    for name, weight in load_file(PARITY / family / "model.safetensors").items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if name == "freqs_cis":
            module.register_buffer(last, weight)
        else:
            module.register_parameter(last, nn.Parameter(weight))
    return model


@pytest.mark.filterwarnings("ignore:.*was trained with a prefix")
def test_two_stacks_in_memory():
    """HRM-Text, whose modules are named in another way than its checkpoints are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(PARITY / "hrm-text", attn_implementation="eager").eval()
    ours, tokens = LoopedModel.from_model(model), expected("hrm-text")["input_ids"]
    with torch.no_grad():
        close(ours(tokens), model(tokens).logits)
        model.lm_head.weight *= 2
        close(ours(tokens), model(tokens).logits)


def test_a_compiled_or_wrapped_model_is_the_model_inside():
    model = theirs()
    wanted = logits(model)
    close(logits(LoopedModel.from_model(torch.compile(model))), wanted)
    close(logits(LoopedModel.from_model(nn.DataParallel(model))), wanted)


def test_the_generation_config_says_what_ends_a_text():
    model = theirs()
    model.generation_config.eos_token_id = [5, 7]
    assert LoopedModel.from_model(model).cfg.eos_token_ids == (5, 7)


# In a bridge.


@every_family
def test_a_bridge_brings_its_models_own_weights(family: str):
    built = bridge(family)
    ours = LoopedModel.from_bridge(built)
    assert ours.tokenizer is built.tokenizer
    close(logits(ours), logits(built))
    originals = {weight.untyped_storage().data_ptr() for weight in built.original_model.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in ours.parameters()} <= originals
    with torch.no_grad():
        for weight in ours.parameters():
            weight *= 1.1
    close(logits(ours), logits(built))
    looped = LoopedModel.from_bridge(built, loop_layers=(1, 2), n_loops=2)
    assert (looped.cfg.n_prelude, looped.cfg.n_core, looped.cfg.n_coda) == (1, 1, 1)


def test_processed_weights_are_refused():
    built = bridge()
    built.enable_compatibility_mode(no_processing=True)
    close(logits(LoopedModel.from_bridge(built)), logits(built))
    built = bridge()
    built.enable_compatibility_mode()
    with pytest.raises(InputError, match=r"in this bridge are processed .* enable_compatibility_mode\(no_processing="):
        LoopedModel.from_bridge(built)


@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_bridge_or_holds_no_model_of_transformers():
    wrong: Any = theirs()
    with pytest.raises(InputError, match=r"takes a TransformerBridge .*, got LlamaForCausalLM: .*from_model\(hf_mod"):
        LoopedModel.from_bridge(wrong)
    with pytest.raises(InputError, match=r"inside a TransformerBridge, .* LoopedModel.from_bridge\(bridge\)"):
        LoopedModel.from_model(bridge().original_model)
    with pytest.raises(InputError, match=r"this bridge holds a Realised, no model of transformers"):
        LoopedModel.from_bridge(LoopedModel.from_model(wrong).unrolled())


# What is refused.


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Lora(nn.Module):
    """What PEFT puts in the place of a linear map."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer


class Merging(nn.Module):
    def merge_and_unload(self) -> None: ...


def quantise(model: Any) -> None:
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[1].mlp.up_proj = kind(32, 48, bias=False)


def adapt(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = Lora(nn.Linear(32, 32, bias=False))


def reparametrise(model: Any) -> None:
    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Doubled())


def subclass(model: Any) -> None:
    kind = type("Packed", (torch.Tensor,), {})
    weight = model.lm_head.weight.detach().as_subclass(kind)
    model.lm_head.weight = nn.Parameter(weight)


def offload(model: Any) -> None:
    model.lm_head.to("meta")


def mix(model: Any) -> None:
    model.lm_head.to(torch.bfloat16)


def spoil(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")


def stretch(model: Any) -> None:
    model.model.rotary_emb.inv_freq /= 4


def claim(model: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(model.config, name, value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (quantise, InputError, r"no plain layers, .*: model.layers.1.mlp.up_proj \(Linear4bit\). .* hf_model.dequant"),
        (
            adapt,
            InputError,
            r"adapters that are not merged: model.layers.0.self_attn.q_proj \(Lora\). Merge them",
        ),
        (reparametrise, InputError, r"model.layers.0.mlp.down_proj.* \(Parametri"),
        (subclass, InputError, r"weights that are no plain tensors, .*: lm_head.weight \(Packed\)"),
        (offload, InputError, r"the LlamaForCausalLM has weights that are not in memory \(on \['cpu', 'meta'\]\)"),
        (
            mix,
            LoadError,
            r"torch.bfloat16 \(lm_head.weight\).* cast the model first, hf_model.to\(torch.float32\)",
        ),
        (spoil, LoadError, r"'lm_head.weight' is stored with 1 values that are NaN"),
        (stretch, LoadError, r"the model's model.rotary_emb.inv_freq is not what its config says: load it again"),
        (partial(claim, hidden_act="gelu"), LoadError, r"hidden_act='gelu', which is not implemented"),
        (partial(claim, quantization_config={"quant_method": "awq"}), LoadError, r"quantised \(.*'awq'\), .*dequant"),
        (partial(claim, num_hidden_layers=2), LoadError, r"not known to this family: model.layers.2.input_layernorm"),
    ],
)
def test_what_is_not_plain_is_refused(change: Callable[[Any], None], error: type[Exception], message: str):
    model = theirs()
    change(model)
    with pytest.raises(error, match=message):
        LoopedModel.from_model(model)


def test_what_is_no_language_model_that_is_known():
    with pytest.raises(LoadError, match=r"unknown family: architectures=\['OPTForCausalLM'\]"):
        config = transformers.OPTConfig(hidden_size=32, num_attention_heads=4, ffn_dim=32, vocab_size=31,
                                        num_hidden_layers=1, word_embed_proj_dim=32)  # fmt: skip
        LoopedModel.from_model(transformers.OPTForCausalLM(config))
    with pytest.raises(LoadError, match=r"unknown family: architectures=\['LlamaModel'\]"):
        LoopedModel.from_model(theirs().model)
    with pytest.raises(InputError, match=r"takes a language model of transformers, .* got Linear"):
        LoopedModel.from_model(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"a Merging with an adapter .*from_model\(model.merge_and_unload\(\), tok"):
        LoopedModel.from_model(Merging())
    with pytest.raises(InputError, match=r"loop_layers=\(2, 9\) must be"):
        LoopedModel.from_model(theirs(), loop_layers=(2, 9))


def test_a_model_on_several_devices(monkeypatch: pytest.MonkeyPatch):
    """As it would be on two GPUs: the weights say where they are."""
    model = theirs()
    real = torch.Tensor.device
    monkeypatch.setattr(
        torch.Tensor,
        "device",
        property(lambda x: torch.device("cuda", 1) if x.shape == (31, 32) else real.__get__(x)),
    )
    with pytest.raises(InputError, match=r"on several devices, cpu, cuda:1: load it on one, .* hf_model.to\('cuda:1'"):
        LoopedModel.from_model(model)
