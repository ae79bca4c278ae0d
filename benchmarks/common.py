"""What the benchmarks share: the shapes, timing side by side, and the table they print."""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tl_looped import LoopedConfig, LoopedModel, Rotary

Side = Callable[[], object]

_TINY = LoopedConfig(
    d_model=64, n_heads=2, d_head=32, d_mlp=176, d_vocab=41, n_ctx=128,
    n_prelude=1, n_core=1, n_loops=6, injection="concat_linear", loop_norm="each", final_norm=False,
)  # fmt: skip
_HUGINN = LoopedConfig(
    d_model=528, n_heads=11, d_head=48, d_mlp=1792, d_vocab=6554, n_ctx=512,
    n_prelude=2, n_core=4, n_coda=2, n_loops=8, norm_placement="residual_sandwich", qk_bias=True,
    rotary=Rotary(50000.0, "adjacent"), injection="concat_linear", loop_norm="last",
    state_init="truncated_normal", state_init_std=(2 / (5 * 528)) ** 0.5, embed_scale=528**0.5,
    state_init_scale=528**0.5, tie_embeddings=True,
)  # fmt: skip
_OURO = LoopedConfig(
    d_model=2048, n_heads=16, d_head=128, d_mlp=5632, d_vocab=49152, n_ctx=4096,
    n_core=24, n_loops=4, norm_placement="output_sandwich", rotary=Rotary(1e6), loop_norm="each", final_norm=False,
    exit_gate=True,
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model and a prompt, and how many rounds measure it well in a few seconds."""

    cfg: LoopedConfig
    batch: int
    pos: int
    rounds: int

    def describe(self) -> str:
        """A line for the table."""
        cfg = self.cfg
        depth = f"({cfg.n_prelude}, {cfg.n_core}x{cfg.n_loops}, {cfg.n_coda})"
        return f"{depth} d_model {cfg.d_model}, {self.batch} x {self.pos} tokens"


SHAPES = {
    "tiny": Shape(_TINY, batch=1, pos=24, rounds=300),  # the embedded model
    "tiny-batch": Shape(_TINY, batch=64, pos=48, rounds=60),
    "small": Shape(_HUGINN, batch=1, pos=32, rounds=20),  # a tenth of Huginn's width, a quarter of its loops
    "ouro-1.4b": Shape(_OURO, batch=1, pos=128, rounds=30),
    "ouro-1.4b-2layers": Shape(replace(_OURO, n_core=2), batch=1, pos=16, rounds=8),  # for a CPU
}


@dataclass(frozen=True)
class Race:
    """Seconds of each side in each round."""

    seconds: dict[str, list[float]]

    def time(self, name: str) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile over rounds of name's time over base's in the same round."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return low, middle, high

    def row(self, shape: str, name: str, base: str) -> list[str]:
        """A line of the table: both times, the ratio of their medians, the median ratio and its quartiles."""
        low, middle, high = self.ratio(name, base)
        times = (f"{1e3 * self.time(side):.3g}" for side in (name, base))
        of_medians = self.time(name) / self.time(base)
        return [shape, name, base, *times, f"{of_medians:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]


COLUMNS = ["shape", "side", "against", "ms", "ms", "ratio of medians", "median ratio", "its quartiles"]


def race(sides: dict[str, Side], rounds: int, device: torch.device) -> Race:
    """Time the sides turn by turn, in every round each once and in changing order, without gradients.

    The clock is the thread's own CPU time, which leaves out what other processes do to a shared machine; on a GPU wall
    time up to its last kernel. A turn repeats its call until it lasts some milliseconds.
    """
    names = list(sides)

    def turn(name: str, calls: int) -> float:
        call = sides[name]
        if device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / calls
        start = time.thread_time()
        for _ in range(calls):
            call()
        return (time.thread_time() - start) / calls

    with torch.no_grad():
        slowest = max(min(turn(name, 1) for _ in range(3)) for name in names)
        calls = max(1, round(0.003 / slowest))
        gc.collect()
        gc.freeze()  # a full collection in the middle of a turn would look at every object of every import
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(turn(name, calls))
        gc.unfreeze()
    return Race(seconds)


def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[LoopedModel, torch.Tensor]:
    """A model with random weights, and a prompt of random tokens."""
    model = LoopedModel.from_config(shape.cfg, seed=0, device=device, dtype=dtype)
    tokens = torch.randint(shape.cfg.d_vocab, (shape.batch, shape.pos), generator=torch.Generator().manual_seed(0))
    return model, tokens.to(device)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise unless two results are equal up to rounding: a benchmark of two different things says nothing."""
    limit = 1e-4 if a.dtype == torch.float32 else 0.1
    distance = float((a - b).float().norm() / b.float().norm())
    if not distance < limit:
        raise AssertionError(f"the two sides differ by {distance:.2g} in relative L2")


def parser(description: str | None, shapes: list[str]) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", type=torch.device)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--shape", nargs="+", default=shapes, choices=list(SHAPES))
    options.add_argument("--rounds", type=int, help="instead of each shape's own number")
    return options


def machine(device: torch.device) -> str:
    """When and where: date, processor, versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")  # Linux has it; elsewhere the name stays the platform's
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        name += f", {torch.get_num_threads()} thread"
    return f"{datetime.date.today()}, {name}, torch {torch.__version__}, Python {platform.python_version()}"


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
