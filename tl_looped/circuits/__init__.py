"""Circuits over loops: which write is read where, edge by edge, and what the largest edges do alone."""

from tl_looped.circuits.attribution import edge_attribution as edge_attribution
from tl_looped.circuits.patching import faithfulness as faithfulness
from tl_looped.circuits.patching import patch_edges as patch_edges
from tl_looped.circuits.results import Circuit as Circuit
from tl_looped.circuits.results import EdgeScores as EdgeScores
from tl_looped.circuits.results import Faithfulness as Faithfulness
