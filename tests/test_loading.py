"""Loading checkpoints whole and exactly, or not at all; and saving them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, PARITY, TINY, config, expected, make, parity, run_options, tokens_for, word_tokenizer
from safetensors.torch import load_file, save_file

from tl_looped import LoadError, LoopedModel
from tl_looped.adapters import loading

Weights = dict[str, torch.Tensor]


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., Path]:
    """A folder in a family's released form, with its config and weights changed."""

    def write(
        family: str, config: dict[str, Any] | None = None, change: Callable[[Weights], Any] | None = None
    ) -> Path:
        values = json.loads((PARITY / family / "config.json").read_text()) | (config or {})
        weights = load_file(PARITY / family / "model.safetensors")
        if change is not None:
            change(weights)
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
        return folder

    return write


def shard(folder: Path, count: int = 3) -> None:
    """Split a folder's weights over several files with an index, as large checkpoints are."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {}
    for part in range(count):
        name = f"model-{part + 1:05}-of-{count:05}.safetensors"
        chosen = {key: weights[key] for key in sorted(weights)[part::count]}
        save_file(chosen, folder / name)
        homes |= dict.fromkeys(chosen, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def same_logits(model: LoopedModel, family: str) -> bool:
    tokens, original = expected(family)["input_ids"], parity(family)
    with torch.no_grad():
        return torch.equal(
            model(tokens, **run_options(family, model)), original(tokens, **run_options(family, original))
        )


# What loads.


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_weights(released, family: str):
    folder = released(family)
    shard(folder)
    assert same_logits(LoopedModel.from_pretrained(folder), family)


def test_shards_without_an_index(released):
    folder = released("ouro")
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert same_logits(LoopedModel.from_pretrained(str(folder)), "ouro")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stored_in_bfloat16(released, family: str):
    def halve(weights: Weights) -> None:
        weights.update({name: weight.bfloat16() for name, weight in weights.items()})

    folder = released(family, change=halve)
    stored = LoopedModel.from_pretrained(folder)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    widened = LoopedModel.from_pretrained(folder, dtype=torch.float32)
    assert {weight.dtype for weight in widened.parameters()} == {torch.float32}
    assert torch.equal(widened.W_E, parity(family).W_E.bfloat16().float())


def test_a_loaded_model_is_ready(released):
    folder = released("huginn")
    model = LoopedModel.from_pretrained(folder, device="cpu")
    assert not model.training
    assert not any(weight.is_meta for weight in model.parameters())
    assert model.transformer.unembed.weight is model.transformer.embed.weight
    assert model.tokenizer is None
    assert (model.cfg.model_name, model.cfg.family) == (str(folder), "huginn")


def test_a_tied_head_may_be_stored_when_it_is_equal(released):
    folder = released("huginn", change=lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    assert same_logits(LoopedModel.from_pretrained(folder), "huginn")


def test_a_rotary_table_may_be_missing(released):
    folder = released("huginn", change=lambda w: w.pop("freqs_cis"))
    assert same_logits(LoopedModel.from_pretrained(folder), "huginn")


def test_a_tokenizer_comes_along(released):
    folder = released("ouro")
    word_tokenizer().save_pretrained(str(folder))
    model = LoopedModel.from_pretrained(folder)
    assert model.to_tokens("a b").tolist() == [[2, 3]]
    other = word_tokenizer(bos=True)
    assert LoopedModel.from_pretrained(folder, tokenizer=other).tokenizer is other


@pytest.mark.parametrize("name", [None, [], ["Other"]])
def test_a_family_is_known_by_its_model_type_too(released, name):
    folder = released("ouro", {"architectures": name})
    assert same_logits(LoopedModel.from_pretrained(folder), "ouro")


# What does not.


def refuse(folder: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(LoadError, match=message):
        LoopedModel.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("ouro", lambda w: w.pop("model.norm.weight"), r"not those of a ouro model.*missing: model.norm.weight$"),
        (
            "huginn",
            lambda w: w.pop("transformer.core_block.1.attn.qk_bias"),
            r"missing: transformer.core_block.1.attn.qk_b",
        ),
        ("ouro", lambda w: w.update(other=torch.zeros(2)), r"not known to this family: other$"),
        ("retrofit-llama", lambda w: w.update(other=torch.zeros(2)), r"a retrofit-llama model .* this family: other$"),
        (
            "ouro",
            lambda w: w.update({"model.norm.weight": torch.zeros(7)}),
            r"misshapen: model.norm.weight is \(7,\), not \(48,\)$",
        ),
        (
            "huginn",
            lambda w: w.update({"transformer.coda.0.attn.Wqkv.weight": torch.zeros(48, 144)}),
            r"misshapen: transformer.coda.0.attn.Wqkv.weight is \(48, 144\), not \(144, 48\)",
        ),
        (
            "huginn",
            lambda w: w.update({"transformer.coda.0.attn.qk_bias": torch.zeros(2, 4, 12)}),
            r"qk_bias is \(2, 4, 12\), not \(2, 1, 4, 12\)",
        ),
        (
            "huginn",
            lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}),
            r"the config ties the head to the embedding, but the stored 'lm_head.weight' differs from it",
        ),
        (
            "huginn",
            lambda w: w.update(freqs_cis=w["freqs_cis"][:, :9]),
            r"freqs_cis has shape \(1, 9, 1, 6, 2\), but the",
        ),
        ("huginn", lambda w: w.update(freqs_cis=w["freqs_cis"].flip(-1)), r"freqs_cis differs by .* of base 50000.0"),
        ("ouro", lambda w: w.clear(), r"missing: lm_head.weight, .* and \d+ more"),
    ],
)
def test_weights_that_are_not_the_models(released, family: str, change, message: str):
    refuse(released(family, change=change), message)


def test_all_that_is_wrong_is_said_at_once(released):
    def spoil(weights: Weights) -> None:
        weights["other"] = weights.pop("model.norm.weight")
        weights["lm_head.weight"] = torch.zeros(3, 3)

    refuse(
        released("ouro", change=spoil), r"missing: model.norm.weight. not known.*: other. misshapen: lm_head.weight is"
    )


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("ouro", {"hidden_act": "gelu"}, r"hidden_act='gelu', which is not implemented: only 'silu' is"),
        ("ouro", {"use_sliding_window": True}, r"use_sliding_window=True, which is not implemented: only False is"),
        ("ouro", {"attention_bias": True}, r"attention_bias=True, which is not implemented"),
        ("ouro", {"attention_dropout": 0.1}, r"attention_dropout=0.1, which is not implemented"),
        (
            "ouro",
            {"layer_types": ["sliding_attention"] * 3},
            r"layer_types=\['sliding.*only 'full_attention' in all 3 layers",
        ),
        ("ouro", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]: only .* in all 3 layers"),
        ("ouro", {"rope_scaling": {"rope_type": "yarn"}}, r"rope_type='yarn', which is not implemented"),
        ("ouro", {"rope_theta": None}, r"has no 'rope_theta'"),
        ("ouro", {"total_ut_steps": 0}, r"n_loops must be at least 1, got 0"),
        ("ouro", {"hidden_size": "48"}, r"d_model must be an integer, got '48'"),
        ("ouro", {"num_attention_heads": 0, "head_dim": None}, r"n_heads must be at least 1, got 0"),
        ("ouro", {"num_key_value_heads": 3}, r"n_heads \(4\) must be a multiple of n_key_value_heads \(3\)"),
        ("ouro", {"rms_norm_eps": 0}, r"eps must be a positive number, got 0"),
        ("huginn", {"injection_type": "add"}, r"injection_type='add', which is not implemented: only 'linear' is"),
        ("huginn", {"nonlin_name": "GELU"}, r"nonlin_name='GELU', which is not implemented: only 'SiLU' is"),
        ("huginn", {"norm_class_name": "LayerNorm"}, r"norm_class_name='LayerNorm', which is not implemented"),
        ("huginn", {"mlp_class_name": "BaseMLP"}, r"mlp_class_name='BaseMLP', which is not implemented"),
        ("huginn", {"bias": True}, r"bias=True, which is not implemented"),
        ("huginn", {"state_init": "zero"}, r"state_init='zero', which is not implemented: only 'like-init' is"),
        ("huginn", {"test_time_noise": 0.1}, r"test_time_noise=0.1, which is not implemented: only 0 or None is"),
        ("huginn", {"n_layers": 9}, r"n_layers=9, but prelude, block and coda are 2 \+ 3 \+ 1"),
        ("retrofit-llama", {"qk_bias": True}, r"qk_bias=True, which is not implemented"),
        ("retrofit-llama", {"rope_scaling": {"rope_type": "llama3"}}, r"has no 'factor', which this family needs"),
        ("retrofit-olmo2", {"n_heads": 5, "num_key_value_heads": 5}, r"misshapen: .*Wqkv.weight is"),
        (
            "huginn",
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            r"unknown family: architectures=\['GPT2LM",
        ),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_configs_that_are_not_implemented(released, family: str, config, message: str):
    refuse(released(family, config), message)


@pytest.mark.parametrize(
    ("family", "key"),
    [("ouro", "hidden_size"), ("ouro", "total_ut_steps"), ("ouro", "rms_norm_eps"), ("ouro", "rope_theta")]
    + [
        ("huginn", key)
        for key in ("n_embd", "n_layers_in_coda", "mean_recurrence", "rope_base", "init_values", "n_heads")
    ],
)
def test_configs_that_lack_a_value(released, family: str, key: str):
    folder = released(family)
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    refuse(folder, f"config.json has no {key!r}, which this family needs")


def test_unknown_families_learn_which_are_known(released):
    folder = released("ouro", {"architectures": None, "model_type": None})
    refuse(folder, r"unknown family: architectures=None, model_type=None. Known families: tl_looped, ouro, raven.")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", r"config.json is not JSON: "),
        ("config.json", b"\xff\xfe", r"config.json is not JSON: "),
        ("config.json", b"[]", r"config.json holds no JSON object"),
        ("model.safetensors.index.json", b"nothing", r"index.json is not JSON"),
        ("model.safetensors.index.json", b"{}", r"has no .safetensors weights|names no shards"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "lost.safetensors"}}',
            r"lacks the shards lost.safetensors",
        ),
        ("model.safetensors", b"", r"model.safetensors is not a whole safetensors file"),
        ("model.safetensors", b"no tensors here", r"model.safetensors is not a whole safetensors file"),
        ("tokenizer.json", b"{", r"tokenizer.json .*"),
    ],
)
def test_broken_files(released, file: str, content: bytes, message: str):
    folder = released("ouro")
    (folder / file).write_bytes(content)
    refuse(folder, message)


def test_a_truncated_file(released):
    folder = released("ouro")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refuse(folder, r"model.safetensors is not a whole safetensors file: .*")


def test_a_weight_stored_twice(released):
    folder = released("ouro")
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.zeros(48)}, folder / "again.safetensors")
    refuse(folder, r"'model.norm.weight' is stored twice: in again.safetensors and in model-0000")


def test_pickles_are_not_opened(released):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    folder = released("ouro")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refuse(folder, r"has only pickled weights \(pytorch_model.bin\), which can run code when read: convert them")


def test_code_beside_the_weights_is_not_run(released):
    folder = released("ouro")
    (folder / "modeling_ouro.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (folder / "configuration_ouro.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert same_logits(LoopedModel.from_pretrained(folder), "ouro")


def test_folders_that_hold_no_model(tmp_path: Path):
    refuse(tmp_path, r"has no config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ouro"}))
    refuse(tmp_path, r"has no .safetensors weights")
    refuse(tmp_path / "config.json", r"config.json' is a file: pass the folder that holds config.json")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_a_number_format_that_can_not_compute(released, dtype):
    refuse(released("ouro"), f"dtype must be a floating one such as torch.bfloat16, got {dtype}", dtype=dtype)


# Names.


def test_embedded_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    make().save_pretrained(tmp_path / "looped-hops")
    assert loading.embedded_names() == ["looped-hops"]
    assert LoopedModel.from_pretrained("looped-hops").cfg == make().cfg
    for name in ("looped-hop", "no such model", "/no/such/folder"):
        refuse(name, rf"'{name}' is no folder, no hub id \('owner/name'\) and no embedded model \(looped-hops\)")
    refuse("looped-hop", r"Nearest: 'looped-hops'\.$")


def test_hub_ids_fetch_weights_and_no_code(monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(PARITY / "ouro")

    monkeypatch.setattr(loading, "snapshot_download", download)
    model = LoopedModel.from_pretrained("ByteDance/Ouro-1.4B", revision="main")
    assert (asked["name"], asked["revision"]) == ("ByteDance/Ouro-1.4B", "main")
    assert model.cfg.model_name == "ByteDance/Ouro-1.4B"
    endings = {pattern.rpartition(".")[2] for pattern in asked["patterns"]}
    assert {"json", "safetensors"} <= endings
    assert not endings & {"py", "bin", "pt", "pth", "ckpt", "pkl"}


def test_errors_of_the_hub_become_ours(monkeypatch: pytest.MonkeyPatch):
    def download(*args: Any, **options: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(loading, "snapshot_download", download)
    refuse("owner/name", r"'owner/name' is no local folder, and the hub gave: ConnectionError: offline")


# Saving.


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(tmp_path: Path, family: str, dtype: torch.dtype):
    model = make(dtype, **TINY[family], model_name=f"tiny {family}")
    model.save_pretrained(tmp_path / "model")
    again = LoopedModel.from_pretrained(tmp_path / "model")
    assert again.cfg == model.cfg
    assert again.dtype == dtype
    assert torch.equal(again(tokens_for(model)), model(tokens_for(model)))
    assert (again.transformer.unembed.weight is again.transformer.embed.weight) == model.cfg.tie_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_a_released_model_saved_in_our_format(tmp_path: Path, family: str):
    parity(family).save_pretrained(tmp_path / "empty")
    again = LoopedModel.from_pretrained(tmp_path / "empty")
    assert again.cfg == parity(family).cfg
    assert same_logits(again, family)


def test_the_tokenizer_is_saved_too(tmp_path: Path):
    model = make(tokenizer=word_tokenizer(bos=True))
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    model.save_pretrained(str(tmp_path / "model"))
    again = LoopedModel.from_pretrained(tmp_path / "model")
    assert again.to_tokens(["a b", "c"], padding_side="left").tolist() == [[1, 2, 3], [0, 1, 4]]
    assert torch.equal(again("a b"), model("a b"))


def test_saving_writes_over_nothing(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LoadError, match=r"exists and is not an empty folder: choose another"):
        make().save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"notes.txt exists and is not an empty folder"):
        make().save_pretrained(tmp_path / "notes.txt")
    with pytest.raises(LoadError, match=r"below can't be written: .*"):
        make().save_pretrained(tmp_path / "notes.txt" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(loading, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_a_user")
def test_our_format_has_a_version(tmp_path: Path):
    make().save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, message in [
        ({"format_version": 2}, r"config.json has format_version 2; this release reads 1"),
        (
            {"config": values["config"] | {"new": 1}},
            r"not a LoopedConfig: unknown fields \['new'\], missing fields \[\]",
        ),
        ({"config": {"d_model": 4}}, r"missing fields \['d_head', 'd_mlp'"),
        ({"config": values["config"] | {"loop_norm": "first"}}, r"loop_norm must be one of .*, got 'first'"),
    ]:
        (tmp_path / "model" / "config.json").write_text(json.dumps(values | change))
        refuse(tmp_path / "model", message)
    del values["config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    refuse(tmp_path / "model", r"config.json has no 'config'")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_loading_needs_the_memory_of_the_weights_and_little_more(tmp_path: Path):
    """How far the peak of a process goes up from a tiny model to 120 MB of weights in eight shards."""
    code = (
        "import sys; from pathlib import Path; from tl_looped import LoopedModel\n"
        "for folder in sys.argv[1:]:\n"
        "    LoopedModel.from_pretrained(folder, device='cpu')\n"
        "    print(*(line for line in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in line))"
    )
    for name, changes in (("small", {}), ("large", {"d_model": 256, "n_core": 40, "d_mlp": 1024})):
        model = LoopedModel.from_config(config(**changes))
        model.save_pretrained(tmp_path / name)
        shard(tmp_path / name, 8)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    command = [sys.executable, "-c", code, tmp_path / "small", tmp_path / "large"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = (1024 * int(line.split()[1]) for line in done.stdout.splitlines())
    assert size > 1.2e8
    assert size < large - small < 1.4 * size
