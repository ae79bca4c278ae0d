"""Families of third parties: by a call, and by the entry point of an installed package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARITY, refuse, same_logits
from safetensors.torch import save_file

from tl_looped import InputError, LoopedConfig, LoopedModel, adapters
from tl_looped.adapters import register, registry
from tl_looped.adapters.ouro import OuroAdapter

DOCS = Path(__file__).parents[1] / "docs" / "loading.md"
PLUGIN = """
from tl_looped.adapters.ouro import OuroAdapter


class Theirs(OuroAdapter):
    family = "theirs"

    def claims(self, config):
        return config.get("model_type") == "theirs"
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "toy-family"
version = "1.0"

[project.entry-points."tl_looped.adapters"]
theirs = "toy_family:Theirs"
"""


class Mine(OuroAdapter):
    family = "mine"

    def claims(self, config: Any) -> bool:
        return config.get("model_type") == "mine"


@pytest.fixture(autouse=True)
def none_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})


def of(released: Any, model_type: str) -> Path:
    """Ouro's folder under another name."""
    return released("ouro", {"architectures": None, "model_type": model_type})


def test_a_family_by_a_call(released):
    folder = of(released, "mine")
    refuse(folder, r"model_type='mine'. Known .*: tl_looped, ouro, .* adapter of your own .*tl_looped.adapters.reg")
    register(Mine())
    register(Mine())  # as when a notebook's cell runs again
    model = LoopedModel.from_pretrained(folder)
    assert model.cfg.family == "mine" and same_logits(model, "ouro")


def test_our_own_families_come_first(released):
    class Greedy(Mine):
        family = "greedy"

        def claims(self, config: Any) -> bool:
            return True

    register(Greedy())
    assert LoopedModel.from_pretrained(PARITY / "ouro").cfg.family == "ouro"
    register(Mine())
    refuse(of(released, "mine"), r"several adapters claim .*model_type='mine': greedy, mine. Uninstall or unregister")


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Mine, r"what is registered must be an adapter, .* got the class Mine\.$"),
        ({"family": "mine"}, r"got a dict without family, feedforward, claims, config, sources, checked\.$"),
    ],
)
def test_what_is_no_adapter(wrong: Any, message: str):
    with pytest.raises(InputError, match=message):
        register(wrong)


def test_a_package_that_is_installed(released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By pip, offline, into a folder of its own, which is then on the path."""
    pytest.importorskip("hatchling", reason="the build backend is not installed: pip install '.[test]'")
    project, target = tmp_path / "project", tmp_path / "installed"
    project.mkdir()
    (project / "toy_family.py").write_text(PLUGIN)
    (project / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, project], check=True, capture_output=True)
    monkeypatch.syspath_prepend(target)
    assert LoopedModel.from_pretrained(of(released, "theirs")).cfg.family == "theirs"


def test_a_package_that_is_broken(released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said by name where its families are asked for, and in no one's way where they are not."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tl_looped.adapters]\nbroken = no_such_module:Adapter\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert LoopedModel.from_pretrained(PARITY / "ouro").cfg.family == "ouro"
    refuse(of(released, "mine"), r"'broken' \(no_such_module:Adapter\) .* used: ModuleNotFoundError: .* broken\.$")


def test_the_adapter_of_the_documentation(tmp_path: Path):
    """Loads what it says it loads."""
    page = DOCS.read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class MyAdapter" in block)
    exec(compile(code, "loading.md", "exec"), {})
    sizes = {"width": 16, "heads": 4, "mlp": 12, "vocab": 9, "context": 8, "layers": 2}
    cfg = LoopedConfig(16, 4, 4, 12, 9, 8, n_core=2, family="my-family", model_name=str(tmp_path))
    wanted = LoopedModel.from_config(cfg, seed=1)
    (adapter,) = registry.third_parties()
    weights = dict(wanted.transformer.named_parameters())
    stored = {source.name: weights[ours].detach().clone() for ours, source in adapter.sources(cfg).items()}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my_family", "hidden_act": "silu", **sizes}))
    model, tokens = LoopedModel.from_pretrained(tmp_path), torch.arange(8)[None]
    assert model.cfg == cfg
    torch.testing.assert_close(model(tokens), wanted(tokens), atol=1e-5, rtol=1e-5)
    assert adapters.adapter_for({"model_type": "my_family"}) is adapter
