"""Runs in which every reader sees its own choice of writes: those of this run, or the other one's."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_looped.circuits.graph import MLP_READS, READS, Graph
from tl_looped.engine.hooks import LoopHookPoint
from tl_looped.engine.runs import Run
from tl_looped.model import LoopedModel
from tl_looped.patching.sources import Source


@torch.no_grad()
def run_edges(
    model: LoopedModel, run: Run, source: Source, graph: Graph, kept: Bool[Tensor, "writer reader"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a run in which a reader sees a write as this run makes it along `kept` edges, else the source's.

    It is one run of several streams side by side, one for each set of writes that some reader sees. A stream goes
    through whatever lies on it, norms and injections too, so what a reader gets is exact in every model. At a reader's
    place what it reads of its own stream is put into all of them, so that all compute what the layer writes.

    Args:
        model, run: what runs, without hooks.
        source: of the other values.
        graph: of the run.
        kept: the edges.
    """
    # What is written after a reader has read may be as it likes there: as it makes fewer streams.
    choices = [(mask.T.unique(dim=0, return_inverse=True)) for mask in (kept & graph.possible, kept | ~graph.possible)]
    streams, stream_of = min(choices, key=lambda choice: len(choice[0]))  # [stream, writer], [reader]
    streams, n, batch = streams.to(model.device), len(streams), len(run.tokens)
    written: dict[str, list[int]] = {}  # who writes at a site
    read: dict[str, list[int]] = {}  # the stream that each reads at a site
    for i, writer in enumerate(graph.writers):
        written.setdefault(writer.site.name, []).append(i)
    for reader, stream in zip(graph.readers[:-1], stream_of.tolist(), strict=False):
        read.setdefault(reader.site.name, []).append(stream)

    def write(x: Tensor, hook: LoopHookPoint) -> Tensor:
        own = x.unflatten(0, (n, batch))
        mine = streams[:, None, None, written[hook.name]]
        mine = mine[..., None] if "head" in hook.site.axes else mine
        return torch.where(mine, own, source.values(hook.site, own[0])).flatten(0, 1)

    def heads(x: Tensor, hook: LoopHookPoint) -> Tensor:
        own = x.unflatten(0, (n, batch))
        seen = torch.stack([own[stream, :, :, head] for head, stream in enumerate(read[hook.name])], dim=2)
        return seen.expand_as(own).flatten(0, 1)

    def mlp(x: Tensor, hook: LoopHookPoint) -> Tensor:
        own = x.unflatten(0, (n, batch))
        return own[read[replace(hook.site, component=MLP_READS[0]).name][0]].expand_as(own).flatten(0, 1)

    at_heads, at_mlps = (lambda name, ends=ends: name.endswith(ends) for ends in (tuple(READS.values()), MLP_READS))
    state = None if run.state is None else run.state.repeat(n, 1, 1)
    network, frame = model.transformer, model.frame(run).repeat(n)
    with model.hooks([*((name, write) for name in written), (at_heads, heads), (at_mlps, mlp)]):
        state = network(run.tokens.repeat(n, 1), frame, state, run.start, run.stop)
        out = network.finish(state, frame).unflatten(0, (n, batch))
    return network.unembed(out[int(stream_of[-1])])
