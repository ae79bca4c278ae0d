"""Who writes, who reads, and which edges there are between them: forward in time, across loops."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.engine.errors import InputError, nearest
from tl_looped.engine.schedule import CORE, FAST, SLOW, HookSite, LoopCount
from tl_looped.lens.writes import write_sites
from tl_looped.model import LoopedModel

Edge = tuple[str, str]
"""(who writes, who reads), such as ("blocks.1.loop.0.attn.hook_z.0", "blocks.1.loop.1.attn.hook_q.1")."""

HEAD, MLP = "attn.hook_z", "hook_mlp_out"  # what a layer writes
READS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "gate": "attn.hook_gate"}  # by head
MLP_READS = ("mlp.hook_pre", "mlp.hook_pre_linear")
LOGITS = "logits"


@dataclass(frozen=True)
class Node:
    """Where something is written or read.

    Attributes:
        name: that of its hook point, with the head behind it; "logits".
        kind: of what writes "embed", "state", "head" or "mlp"; of what reads "q", "k", "v", "gate", "mlp" or "logits".
        stack, layer, loop, head: None where it has none; of keys and values the key-value head.
        time: when it writes or reads; what writes earlier is read.
    """

    name: str
    kind: str
    stack: str | None
    layer: int | None
    loop: int | None
    head: int | None
    time: int

    @classmethod
    def at(cls, kind: str, site: HookSite, time: int, head: int | None = None) -> Node:
        """The node at a site."""
        name = site.name if head is None else f"{site.name}.{head}"
        return cls(name, kind, site.stack, site.layer, site.loop, head, time)

    @property
    def call(self) -> tuple[str | None, int | None, int | None]:
        """The layer call that it is in."""
        return self.stack, self.layer, self.loop

    @property
    def site(self) -> HookSite:
        """Its hook point."""
        return HookSite.parse(self.name if self.head is None else self.name.rpartition(".")[0])


@dataclass(frozen=True)
class Graph:
    """All that write and read in a run, both in the order of time.

    In `edges` and `scores` of this room, [writer, reader], the order is this one.
    """

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]

    @classmethod
    def of(cls, model: LoopedModel, counts: LoopCount | None, has_state: bool) -> Graph:
        """The graph of a run. Vectors of positions are no node: two runs that are compared have the same.

        Args:
            model: what runs.
            counts: its loops.
            has_state: whether it starts from a state that is not the prelude's.
        """
        cfg, schedule = model.cfg, model.cfg.schedule(counts)
        found = write_sites(model, counts, has_state, HEAD, MLP).values()
        sites = [one for one in found if one[0] != "pos_embed"]
        began = next(d for d, (stack, _, _) in enumerate(schedule.layer_calls()) if stack in (CORE, FAST, SLOW))
        writers, readers = [], []
        for kind, site in sites:
            if site.layer is None or site.stack is None:
                writers.append(Node.at(kind, site, -1 if kind == "embed" else 3 * began))
                continue
            time = 3 * schedule.realised_depth(site.stack, site.layer, site.loop) + (1 if kind == "head" else 2)
            if kind == "mlp":
                writers.append(Node.at("mlp", site, time))
                readers.append(Node.at("mlp", HookSite(MLP_READS[0], *Node.at("", site, 0).call), time))
                continue
            writers += [Node.at("head", site, time, head) for head in range(cfg.n_heads)]
            for name, component in READS.items():
                if name != "gate" or cfg.attn_gate:
                    heads = cfg.kv_heads if name in ("k", "v") else cfg.n_heads
                    where = HookSite(component, site.stack, site.layer, site.loop)
                    readers += [Node.at(name, where, time, head) for head in range(heads)]
        readers.append(Node(LOGITS, LOGITS, None, None, None, None, 3 * schedule.depth))
        return cls(tuple(sorted(writers, key=lambda node: node.time)), tuple(readers))

    @classmethod
    def from_rows(cls, writers: Sequence[Mapping[str, Any]], readers: Sequence[Mapping[str, Any]]) -> Graph:
        """The inverse of `rows`."""
        return cls(tuple(Node(**one) for one in writers), tuple(Node(**one) for one in readers))

    def rows(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """Both as plain values, for a result."""
        return {name: tuple(map(asdict, nodes)) for name, nodes in vars(self).items() if name in ("writers", "readers")}

    @cached_property
    def possible(self) -> Bool[Tensor, "writer reader"]:
        """Which edges there are: those from an earlier write."""
        wrote, read = (torch.tensor([node.time for node in nodes]) for nodes in (self.writers, self.readers))
        return wrote[:, None] < read[None]

    @cached_property
    def inner(self) -> Bool[Tensor, "reader writer"]:
        """Which reader is an input of which writer: a head's q, k, v (those of its group) and an MLP's input."""
        found = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        heads = max((node.head or 0 for node in self.readers if node.kind == "q"), default=0) + 1
        group = heads // (max((node.head or 0 for node in self.readers if node.kind == "k"), default=0) + 1)
        at = {(writer.call, writer.kind, writer.head): i for i, writer in enumerate(self.writers)}
        for i, reader in enumerate(self.readers):
            kind = "mlp" if reader.kind == "mlp" else "head"
            first = reader.head if reader.head is None else reader.head * (group if reader.kind in ("k", "v") else 1)
            several = range(first, first + group) if first is not None and reader.kind in ("k", "v") else [first]
            for head in several if reader.kind != LOGITS else ():
                found[i, at[reader.call, kind, head]] = True
        return found

    def mask(self, edges: Collection[Edge]) -> Bool[Tensor, "writer reader"]:
        """Edges by name as a mask.

        Raises:
            InputError: there are none; no such writer or reader; an edge that runs backward in time.
        """
        if not edges:
            raise InputError("no edges are given: name at least one, as (who writes, who reads).")
        found = torch.zeros_like(self.possible)
        places = [{node.name: i for i, node in enumerate(nodes)} for nodes in (self.writers, self.readers)]
        for edge in edges:
            if isinstance(edge, str) or len(edge) != 2:
                raise InputError(f"an edge is a pair of names, (who writes, who reads), got {edge!r}.")
            for name, known, does in zip(edge, places, ("writes", "reads"), strict=True):
                if name not in known:
                    raise InputError(f"nothing called {name!r} {does} in this run.{nearest(name, known)}")
            writer, reader = (known[name] for name, known in zip(edge, places, strict=True))
            if not bool(self.possible[writer, reader]):
                raise InputError(f"{edge[0]!r} is written after {edge[1]!r} has read: an edge runs forward in time.")
            found[writer, reader] = True
        return found

    def prune(self, edges: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "writer reader"]:
        """The edges that lie on a path from an input to the logits."""
        begins = torch.tensor([node.kind in ("embed", "state") for node in self.writers])
        ends = torch.tensor([node.kind == LOGITS for node in self.readers])
        fed, leads = begins, ends
        for _ in self.writers:
            more = begins | self.inner[edges[fed].any(0)].any(0)
            back = ends | self.inner[:, edges[:, leads].any(1)].any(1)
            if torch.equal(more, fed) and torch.equal(back, leads):
                break
            fed, leads = more, back
        return edges & fed[:, None] & leads[None]

    def table(self, edges: Bool[Tensor, "writer reader"], scores: Float[Tensor, "writer reader"]) -> pd.DataFrame:
        """One row for each edge."""
        rows = []
        for w, r in edges.nonzero().tolist():
            row: dict[str, Any] = {"writer": self.writers[w].name, "reader": self.readers[r].name}
            for end, node in (("writer", self.writers[w]), ("reader", self.readers[r])):
                row |= {f"{end}_{name}": getattr(node, name) for name in ("kind", "stack", "layer", "loop", "head")}
            rows.append({**row, "score": float(scores[w, r])})
        return pd.DataFrame(rows).convert_dtypes()

    def tied(self, edges: Bool[Tensor, "writer reader"], scores: Float[Tensor, "writer reader"]) -> pd.DataFrame:
        """One row for each physical edge (the same layers and heads, so many loops apart), with its loops."""
        found: dict[tuple[Any, ...], list[tuple[int | None, float]]] = {}
        for w, r in edges.nonzero().tolist():
            writer, reader = self.writers[w], self.readers[r]
            apart = None
            if writer.loop is not None and reader.loop is not None and writer.stack == reader.stack:
                apart = reader.loop - writer.loop
            names = (_physical(writer), _physical(reader), apart)
            loop = writer.loop if reader.loop is None else reader.loop
            found.setdefault(names, []).append((loop, float(scores[w, r])))
        rows = []
        for (writer, reader, apart), several in found.items():
            loops = [loop for loop, _ in several if loop is not None]
            rows.append(
                {"writer": writer, "reader": reader, "loops_apart": apart, "n": len(several), "loops": loops}
                | {"score": sum(score for _, score in several)}
            )
        table = pd.DataFrame(rows, columns=["writer", "reader", "loops_apart", "n", "loops", "score"])
        return table.sort_values("n", ascending=False, kind="stable", ignore_index=True)


def _physical(node: Node) -> str:
    """The name of a node in every loop."""
    if node.kind == LOGITS:
        return LOGITS
    return Node.at("", node.site.at(None), 0, node.head).name
