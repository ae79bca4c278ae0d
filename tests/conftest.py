"""What every test has: no network, the same random numbers, the same number of threads."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

# The models here are tiny: a second thread costs more than it brings. With several, sums come out in another order:
# `make test-numbers` asks for them, as no test may depend on that.
torch.set_num_threads(int(os.environ.get("TL_LOOPED_TEST_THREADS", "1")))

# No deadline: the cores may be shared. Examples are the same in every run, here and elsewhere. To look for new ones:
# pytest --hypothesis-profile=search.
hypothesis.settings.register_profile("tl_looped", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("tl_looped")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without beartype's checks, which users do not have: what our own checks make of a value of a wrong type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session", autouse=True)
def no_advice_on_speed() -> None:
    """What is said of slow number formats depends on the processor, and tests run on any."""
    from tl_looped.engine import numbers

    numbers._ADVISED.update((torch.bfloat16, torch.float16))


@pytest.fixture
def released(tmp_path: Path) -> Callable[..., Path]:
    """A folder in a family's released form, with its config and weights changed."""
    parity = Path(__file__).parent / "parity"

    def write(
        family: str,
        config: dict[str, Any] | None = None,
        change: Callable[[dict[str, torch.Tensor]], Any] | None = None,
    ) -> Path:
        values = json.loads((parity / family / "config.json").read_text()) | (config or {})
        weights = load_file(parity / family / "model.safetensors")
        if change is not None:
            change(weights)
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
        return folder

    return write
