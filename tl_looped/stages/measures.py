"""The stages of inference as measures for `tl_looped.observe`, on looped and on feedforward models.

`STAGE_MEASURES` are those of arXiv 2604.11791 that depend on the input; prediction and suppression neurons do not, see
`tl_looped.stages.neurons`. `observe` takes TransformerLens's models too.
"""

from __future__ import annotations

from tl_looped.observe import Measure
from tl_looped.stages.mixing import colsum_concentration, mixing_score, sink_rate, sink_score
from tl_looped.stages.residual import matrix_entropy, residual_magnitude

_PATTERN, _RESID = "attn.hook_pattern", "hook_resid_post"

COLSUM = Measure("colsum", "ColSum concentration", "", _PATTERN, colsum_concentration, axes=("head",))
"""Whether all queries look at the same few keys, from 0 to 1."""

SINK = Measure("sink", "sink score of the first token", "", _PATTERN, sink_score, axes=("head",))
"""Attention that the first token gets, mean over queries."""

SINK_RATE = Measure("sink_rate", "sink rate of the first token", "", _PATTERN, sink_rate)
"""Share of heads that give the first token at least 0.3."""

MIXING = Measure("mixing", "mixing score", "nats", _PATTERN, mixing_score, axes=("head",))
"""Entropy of each query's attention, mean over queries."""

RESIDUAL_ENTROPY = Measure("residual_entropy", "residual entropy", "nats", _RESID, matrix_entropy)
"""Matrix-based entropy of the tokens' Gram matrix after each layer."""

MAGNITUDE = Measure("magnitude", "residual magnitude ‖x‖", "L2 norm", _RESID, residual_magnitude, axes=("pos",))
"""Euclidean norm of each token after each layer."""

STAGE_MEASURES = (COLSUM, SINK, SINK_RATE, MIXING, RESIDUAL_ENTROPY, MAGNITUDE)
