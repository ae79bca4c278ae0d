"""Loading checkpoints whole and exactly, or not at all; and saving them."""

from __future__ import annotations

import json
import pickle
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, PARITY, TINY, config, make, parity, refuse, same_logits, tokens_for, word_tokenizer
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tl_looped import InputError, LoadError, LoopedModel
from tl_looped.adapters import hub as hub_module
from tl_looped.adapters import saving
from tl_looped.engine import numbers

Weights = dict[str, torch.Tensor]


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
        ("tokenizer.json", b"{", r"the tokenizer in .* \(tokenizer.json\) can't be read: .*\. Pass tokenizer=..., or"),
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
    refuse(folder, r"has only pickled weights \(pytorch_model.bin\), which can run code when read: run tl-")


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


# Names.


def test_embedded_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "EMBEDDED", tmp_path)
    make().save_pretrained(tmp_path / "looped-hops")
    assert hub_module.embedded_names() == ["looped-hops"]
    assert LoopedModel.from_pretrained("looped-hops").cfg == make().cfg
    for name in ("looped-hop", "no such model", "/no/such/folder"):
        refuse(name, rf"'{name}' is no folder, no hub id \('owner/name'\) and no embedded model \(looped-hops\)")
    refuse("looped-hop", r"Nearest: 'looped-hops'\.$")


REPOSITORY = [  # what a repository may hold beside the model
    *("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("chat_template.jinja", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"),
    *("pytorch_model.bin", "optimizer.pt", "optimizer.safetensors", "scheduler.json", "consolidated.safetensors"),
    *("modeling_ouro.py", "onnx/model.safetensors", "step-10/config.json", "step-10/model.safetensors"),
    *("step-10/optimizer.safetensors", "step-10/modeling_ouro.py", "step-10/deep/model.safetensors"),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub whose every repository holds `REPOSITORY`; what was asked of it."""
    asked: dict[str, Any] = {}

    def download(name: str, *, revision: str | None, **patterns: Any) -> str:
        asked.update(name=name, revision=revision, files=list(filter_repo_objects(REPOSITORY, **patterns)))
        return str(PARITY if asked["name"] == "owner/folders" else PARITY / "ouro")

    monkeypatch.setattr(hub_module, "snapshot_download", download)
    return asked


def test_hub_ids_fetch_one_folder_and_no_code(hub: dict[str, Any]):
    """Neither the optimizer nor other copies of the weights."""
    model = LoopedModel.from_pretrained("ByteDance/Ouro-1.4B", revision="main")
    assert (hub["name"], hub["revision"]) == ("ByteDance/Ouro-1.4B", "main")
    assert hub["files"] == REPOSITORY[:9]
    assert model.cfg.model_name == "ByteDance/Ouro-1.4B"


def test_a_subfolder_of_the_hub(hub: dict[str, Any]):
    model = LoopedModel.from_pretrained("owner/folders", subfolder="ouro")
    assert model.cfg.model_name == "owner/folders/ouro"
    refuse("owner/folders", r"'owner/folders' has no folder 'step-10'", subfolder="step-10")
    assert hub["files"] == ["step-10/config.json", "step-10/model.safetensors"]


def test_a_subfolder_of_a_folder(released):
    folder = released("ouro")
    model = LoopedModel.from_pretrained(folder.parent, subfolder="ouro")
    assert same_logits(model, "ouro")
    assert model.cfg.model_name == f"{folder.parent}/ouro"
    refuse(folder, r"ouro' has no folder 'other'", subfolder="other")
    for outside in ("", "..", "a/../..", "/etc"):
        refuse(folder, r"subfolder must be the path of a folder below '.*ouro', got", InputError, subfolder=outside)


def test_a_revision_of_a_folder(released):
    """Would say nothing."""
    refuse(
        released("ouro"), r"revision='main', but '.*ouro' is no hub id: leave revision out", InputError, revision="main"
    )


def test_errors_of_the_hub_become_ours(monkeypatch: pytest.MonkeyPatch):
    def download(*args: Any, **options: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(hub_module, "snapshot_download", download)
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
    torch.testing.assert_close(again(tokens_for(model)), model(tokens_for(model)), atol=1e-5, rtol=1e-5)
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
    torch.testing.assert_close(again("a b"), model("a b"), atol=1e-5, rtol=1e-5)


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

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make().save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_a_user")
def test_our_format_has_a_version(tmp_path: Path):
    make().save_pretrained(tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    for change, message in [
        ({"format_version": 3}, r"config.json has format_version 3; this release reads 1 and 2"),
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
    assert size < large - small < 1.1 * size


def test_a_format_that_the_cpu_is_slow_in_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    for name, supported in (("fp16", False), ("bf16", True)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda supported=supported: supported)
    monkeypatch.setattr(numbers, "_ADVISED", set())
    monkeypatch.setattr(numbers, "_X86", (platform.machine(),))
    folder = PARITY / "ouro"
    with pytest.warns(UserWarning, match=r"no arithmetic for torch.float16, .* pass dtype=torch.float32, which holds"):
        LoopedModel.from_pretrained(folder, dtype="float16", device="cpu")
    recwarn.clear()
    LoopedModel.from_pretrained(folder, dtype="float16", device="cpu")  # said already
    LoopedModel.from_pretrained(folder, dtype="bfloat16", device="cpu")  # quick here
    LoopedModel.from_pretrained(folder, device="cpu")
    assert not [one for one in recwarn if "no arithmetic" in str(one.message)]
