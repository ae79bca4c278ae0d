"""Trajectories whose long run is known, and the table of what `judge_states` says of them.

`python tests/trajectories.py` writes the table of docs/long-run.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from tl_looped.dynamics.verdicts import VERDICTS, judge_states

D_MODEL = 16
Make: TypeAlias = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""From times [loop, 1], orthonormal directions [i, D_MODEL] and a source of numbers to states [loop, D_MODEL]."""


def _turn(f: float, t: Tensor, u: Tensor, v: Tensor) -> Tensor:
    angle = 2 * math.pi * f * t
    return angle.cos() * u + angle.sin() * v


def _iterate(step: Callable[[Tensor], Tensor], start: Tensor, n: int, skip: int) -> Tensor:
    states = []
    for i in range(n + skip):
        start = step(start)
        if i >= skip:
            states.append(start)
    return torch.stack(states)


def _logistic(t: Tensor, u: Tensor, draws: torch.Generator, r: float) -> Tensor:
    start = torch.rand(1, generator=draws, dtype=torch.float64) * 0.6 + 0.2
    return _iterate(lambda x: r * x * (1 - x), start, len(t), 50) * u[1]


def _henon(t: Tensor, u: Tensor, draws: torch.Generator) -> Tensor:
    start = torch.rand(2, generator=draws, dtype=torch.float64) * 0.2 - 0.1
    return 0.3 * _iterate(lambda p: torch.stack((1 - 1.4 * p[0] ** 2 + p[1], 0.3 * p[0])), start, len(t), 100) @ u[1:3]


def _visits(t: Tensor, draws: torch.Generator, period: int) -> Tensor:
    stops = torch.randn(period, D_MODEL, generator=draws, dtype=torch.float64) / 4
    return stops[t[:, 0].long() % period]


GOLDEN = (math.sqrt(5) - 1) / 2

# What it is -> (its words, how it is made around the unit vector u[0]).
KINDS: dict[str, tuple[set[str], dict[str, Make]]] = {
    "contraction": (
        {"rest", "approaching"},
        {
            f"rate {rate:g}": lambda t, u, draws, rate=rate: u[0] + 3 * rate**t * u[1]
            for rate in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
        },
    ),
    "damped spiral": (
        {"rest", "approaching"},
        {
            f"rate {rate:g}, {period:g} loops a turn": (
                lambda t, u, draws, rate=rate, f=1 / period: u[0] + 2 * rate**t * _turn(f, t, u[1], u[2])
            )
            for rate in (0.8, 0.95, 0.99, 0.999)
            for period in (2.7, 9, 40)
        },
    ),
    "orbit": (
        {"orbit"},
        {f"{period} loops": lambda t, u, draws, p=period: u[0] + _visits(t, draws, p) for period in range(2, 10)},
    ),
    "turn by an irrational angle": (
        {"quasi-periodic"},
        {
            f"{f:.4f} turns, radius {radius:g}": (
                lambda t, u, draws, f=f, radius=radius: u[0] + radius * _turn(f, t, u[1], u[2])
            )
            for f in (1 / math.pi, GOLDEN / 2, math.sqrt(2) / 20)
            for radius in (0.1, 1)
        },
    ),
    "two frequencies": (
        {"quasi-periodic"},
        {
            f"{f:.4f} and {g:.4f} turns": (
                lambda t, u, draws, f=f, g=g: u[0] + 0.5 * _turn(f, t, u[1], u[2]) + 0.4 * _turn(g, t, u[3], u[4])
            )
            for f, g in ((GOLDEN / 5, 1 / math.pi), (math.sqrt(2) / 20, math.e / 10))
        },
    ),
    "drift of direction": (
        {"drifting", "quasi-periodic"},  # over many loops it goes round
        {
            f"{angle:g} radians a loop": (lambda t, u, draws, f=angle / (2 * math.pi): _turn(f, t, u[0], u[1]))
            for angle in (0.003, 0.01, 0.02, 0.05)
        },
    ),
    "straight drift": (
        {"drifting"},
        {f"speed {speed:g}": lambda t, u, draws, speed=speed: u[0] + speed * t * u[1] for speed in (0.01, 0.1, 1)},
    ),
    "drift of norm": ({"drifting"}, {"0.1 a loop": lambda t, u, draws: (1 + 0.1 * t) * u[0]}),
    "wobbling drift": (
        {"drifting"},
        {
            f"speed {speed:g}, {f:.4f} turns": (
                lambda t, u, draws, speed=speed, f=f: u[0] + speed * t * u[1] + 0.1 * _turn(f, t, u[2], u[3])
            )
            for speed in (0.02, 0.1)
            for f in (0.2, math.sqrt(2) / 20)
        },
    ),
    "chaos": (
        {"chaotic"},
        {
            "logistic map, 4": lambda t, u, draws: u[0] + _logistic(t, u, draws, 4.0),
            "logistic map, 3.8": lambda t, u, draws: u[0] + _logistic(t, u, draws, 3.8),
            "Hénon map": lambda t, u, draws: u[0] + _henon(t, u, draws),
        },
    ),
    "noise about a point": ({"rest"}, {"": lambda t, u, draws: u[0].expand(len(t), -1)}),
}


def states(make: Make, n_loops: int, noise: float = 0.0, seed: int = 0) -> Tensor:
    """One trajectory, [loop, D_MODEL] in float64, with noise relative to the state's length at each loop."""
    draws = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=draws, dtype=torch.float64))[0]
    x = make(torch.arange(n_loops, dtype=torch.float64)[:, None], u, draws)
    added = torch.randn(x.shape, generator=draws, dtype=torch.float64) / math.sqrt(D_MODEL)
    return x + noise * x.norm(dim=1, keepdim=True) * added


def judge(kind: str, n_loops: int, noise: float, step: int = 1) -> Counter[str]:
    """How often each verdict falls on the trajectories of a kind, or on every second or third of them."""
    made = [states(make, n_loops, noise) for make in [*KINDS[kind][1].values()][::step]]
    found = judge_states(torch.stack(made, dim=1))["verdict"].tolist()
    return Counter(VERDICTS[index] for index in found)


LOOPS, NOISES = (32, 64, 128, 256), (0.0, 0.001, 0.01, 0.1)


def table() -> str:
    """Markdown: for each kind, loop count and noise, the share of each verdict that fell, and the wrong ones."""
    lines = ["| it is | loops | " + " | ".join(f"noise {100 * noise:g} %" for noise in NOISES) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(NOISES))
    wrong = total = 0
    for kind, (words, _) in KINDS.items():
        for n_loops in LOOPS:
            cells = []
            for noise in NOISES:
                found = judge(kind, n_loops, noise)
                wrong += sum(n for verdict, n in found.items() if verdict not in words | {"undecided"})
                total += found.total()
                cells.append(", ".join(f"{verdict} {n}" for verdict, n in found.most_common()))
            lines.append(f"| {kind} | {n_loops} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{total} trajectories, {wrong} wrong words."])


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "long-run.md"
    before, _, _ = page.read_text(encoding="utf-8").partition("<!-- table -->")
    page.write_text(f"{before}<!-- table -->\n\n{table()}\n", encoding="utf-8")
