"""Pickled checkpoints of training runs, converted: the released forms, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PARITY
from safetensors.torch import load_file
from torch import Tensor

from tl_looped import LoadError, LoopedModel
from tl_looped.__main__ import main
from tl_looped.adapters.convert import convert

State = dict[str, Tensor]


def nanochat(folder: Path, state: State, config: dict[str, Any]) -> Path:
    compiled = {f"_orig_mod.{name}": one for name, one in state.items()}
    torch.save(compiled, folder / "model_000650.pt")
    torch.save({"exp_avg": torch.zeros(3)}, folder / "optim_000650.pt")
    (folder / "meta_000650.json").write_text(json.dumps(config))
    (folder / "meta_000001.json").write_text("{}")
    return folder


def parcae(folder: Path, state: State, config: dict[str, Any]) -> Path:
    torch.save({"model": state, "step": 7}, folder / "ckpt.pth")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "ckpt.pth"


def hrm(folder: Path, state: State, config: dict[str, Any]) -> Path:
    torch.save({f"_orig_mod.{name}": one for name, one in state.items()}, folder / "step_1234")
    data = config.pop("dataset")
    (folder / "all_config.yaml").write_text(yaml.safe_dump(config))
    (folder / "dataset.json").write_text(json.dumps(data))
    return folder


def ouro(folder: Path, state: State, config: dict[str, Any]) -> Path:
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, held in shards.items():
        torch.save({name: state[name] for name in held}, folder / file, _use_new_zipfile_serialization=False)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FORMS = {"nanochat": nanochat, "parcae": parcae, "hrm-act": hrm, "trm": hrm, "ouro": ouro}


@pytest.fixture
def pickled(tmp_path: Path) -> Callable[..., Path]:
    """A parity model as its training run wrote it."""

    def write(family: str) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        state = load_file(PARITY / family / "model.safetensors")
        config = json.loads((PARITY / family / "config.json").read_text())
        return FORMS[family](folder, state, config)

    return write


@pytest.mark.parametrize("family", FORMS)
def test_a_converted_checkpoint_loads(family: str, pickled: Any, tmp_path: Path) -> None:
    made = convert(pickled(family), tmp_path / "new" / family)
    again, model = LoopedModel.from_pretrained(made), LoopedModel.from_pretrained(PARITY / family)
    assert again.cfg == type(model.cfg).from_dict({**model.cfg.to_dict(), "model_name": again.cfg.model_name})
    for name, weight in model.transformer.named_parameters():
        assert torch.equal(again.transformer.get_parameter(name), weight), name


def test_the_command_says_how_to_load(pickled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = pickled("parcae"), tmp_path / "out"
    config = source.parent / "config.json"
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(json.loads(config.read_text())))
    config.unlink()
    assert main(["convert", str(source), str(out)]) == 2
    assert (
        "has no config.json and no all_config.yaml: pass the model's config, --config FILE" in capsys.readouterr().err
    )
    assert main(["convert", str(source), str(out), "--config", str(tmp_path / "elsewhere.yaml")]) == 0
    assert f"LoopedModel.from_pretrained('{out}')" in capsys.readouterr().out
    assert main(["convert", str(source), str(out), "--config", str(tmp_path / "elsewhere.yaml")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_a_folder_of_pickles_names_the_command(pickled: Any) -> None:
    folder = pickled("parcae").parent
    with pytest.raises(
        LoadError, match=rf"only pickled weights \(ckpt.pth\).* run tl-looped convert {folder} NEW_FOLDER"
    ):
        LoopedModel.from_pretrained(folder)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_runs_code_when_read_is_refused(pickled: Any, tmp_path: Path) -> None:
    source = pickled("parcae")
    trace = tmp_path / "was-here"
    torch.save({"model": {"x": torch.zeros(1)}, "evil": Evil(trace)}, source)
    with pytest.raises(LoadError, match=r"ckpt.pth' is not converted: reading it would run code or make objects"):
        convert(source, tmp_path / "out")
    source.write_bytes(pickle.dumps(Evil(trace)))
    with pytest.raises(LoadError, match=r"is not converted: .*Path|is not converted: .*touch|is not converted: .*code"):
        convert(source, tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_modules_beside_a_checkpoint_are_not_imported(
    pickled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, trace = pickled("parcae"), tmp_path / "was-here"
    for name in ("torch", "json", "safetensors", "tl_looped"):
        (source.parent / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()")
    monkeypatch.chdir(source.parent)
    assert convert(source.name, tmp_path / "out").is_dir() and not trace.exists()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"args": 3, "epoch": 1},
            r"holds more than tensors by name \(args, epoch\), and nothing under model, state_dict",
        ),
        ([torch.zeros(1)], "holds no tensors by name, but a list"),
        ({"model": {"x": torch.zeros(2)}}, r"the stored weights are not those of a parcae model of this config"),
        ({"model": {"x": torch.zeros(2).to_sparse()}}, r"tensors that safetensors cannot hold: x \(Tensor\)"),
        (None, "it is no checkpoint that torch can read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content: Any, message: str, pickled: Any, tmp_path: Path) -> None:
    source = pickled("parcae")
    if content is None:
        source.write_bytes(source.read_bytes()[:100])
    else:
        torch.save(content, source)
    with pytest.raises(LoadError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.usefixtures("as_a_user")
def test_which_file_and_which_config(pickled: Any, tmp_path: Path) -> None:
    folder = pickled("hrm-act")
    (folder / "dataset.json").rename(tmp_path / "dataset.json")
    with pytest.raises(LoadError, match="has all_config.yaml, but no dataset.json: copy that of the training data"):
        convert(folder, tmp_path / "out")
    shutil.copy(folder / "step_1234", folder / "step_99")
    with pytest.raises(LoadError, match="has several checkpoints, step_1234, step_99: give one of them"):
        convert(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match=r"has no pickled checkpoint \(.bin, .pt"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(LoadError, match="is no file and no folder: give a pickled checkpoint"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(LoadError, match="list.yaml holds no plain YAML object"):
        convert(folder / "step_99", tmp_path / "out", tmp_path / "list.yaml")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(LoadError, match="code.yaml is not plain YAML"):
        convert(folder / "step_99", tmp_path / "out", tmp_path / "code.yaml")
