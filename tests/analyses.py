"""Every public call that runs a model on prompts, with what it needs besides them; for tests that walk over all."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

import tl_looped
from tl_looped import LoopedModel
from tl_looped.circuits import Circuit
from tl_looped.dynamics import STEP
from tl_looped.engine.runs import Runs
from tl_looped.patching import Receiver, Sender, zero

ROOMS = [
    "observe", "generation", "lens", "dynamics", "attention", "stages", "patching", "circuits", "record", "claims",
    "training", "viz", "report", "adapters",
]  # fmt: skip
ONE_PROMPT = {"path_independence", "trajectory", "jacobian_spectrum", "massive_activations", "view_prompt"}
ONE_PROMPT |= {"state_motion", "attention_bound", "attention_stability", "lyapunov_exponents"}


def total(logits: Tensor) -> Tensor:
    """A metric: the sum of all logits."""
    return logits.sum()


NEEDS: dict[str, dict[str, Any]] = {
    "observe": {"measures": [STEP], "progress": False},
    "fit_tuned_lens": {"steps": 1},
    "compare_lenses": {"resamples": 100, "progress": False},
    "jacobian_lens": {"skip_first": 0, "progress": False},
    "path_independence": {"noise": 0.5},
    "patch_sweep": {"source": zero(), "metric": total, "axes": ("loop",), "progress": False},
    "attribution_sweep": {"source": zero(), "metric": total},
    "path_patch": {"metric": total, "sender": Sender(0, 0, "mlp"), "receivers": [Receiver("readout")]},
    "edge_attribution": {"source": zero(), "metric": total, "progress": False},
    "patch_edges": {"source": zero(), "metric": total, "edges": [("hook_embed", "logits")], "progress": False},
    "faithfulness": {"source": zero(), "metric": total, "draws": 0, "progress": False},
    "ablation_effect": {"layer": 0, "progress": False},
    "paper_claims": {"null_seeds": 1, "resamples": 100, "progress": False},
}
"""Arguments that have no default, and those that keep a call short."""


def room(name: str) -> ModuleType:
    """A room of the package."""
    return importlib.import_module(f"tl_looped.{name}")


def public(module: ModuleType) -> dict[str, Any]:
    """Its public names of ours, without the modules in it."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }


def analyses() -> dict[str, Callable[..., Any]]:
    """Every public function of the rooms that takes a model and prompts."""
    functions = {called: value for name in ROOMS for called, value in public(room(name)).items() if _runs(value)}
    return dict(sorted(functions.items()))


def _runs(value: Any) -> bool:
    return inspect.isfunction(value) and {"model", "prompts"} <= set(inspect.signature(value).parameters)


def call(name: str, model: LoopedModel, prompts: Any, n_loops: int | None = None, **options: Any) -> Any:
    """Make one of the calls, with what it needs."""
    needs = dict(NEEDS.get(name, {}))
    if name == "path_patch":
        _, needs["source"] = model.run_with_cache(prompts, n_loops)
    if name == "aligned_source":
        needs["to"] = prompts
    if name == "faithfulness":
        loops = prompts.n_loops if isinstance(prompts, Runs) else n_loops
        needs["circuits"] = Circuit.of(model, [("hook_embed", "logits")], loops)
    return analyses()[name](model, prompts, n_loops, **needs, **options)


TOP = tuple(tl_looped._HOMES)  # what is asked for only has come so far; all of it counts
