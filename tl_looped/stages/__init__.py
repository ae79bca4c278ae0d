"""Stages of inference: what layers do with attention and the residual stream, over depth and over loops."""

from tl_looped.stages.ablation import AblationEffect as AblationEffect
from tl_looped.stages.ablation import MassiveActivations as MassiveActivations
from tl_looped.stages.ablation import ablation_effect as ablation_effect
from tl_looped.stages.ablation import massive_activations as massive_activations
from tl_looped.stages.ablation import silence_mlp as silence_mlp
from tl_looped.stages.alignment import CurveAlignment as CurveAlignment
from tl_looped.stages.alignment import align_curves as align_curves
from tl_looped.stages.measures import COLSUM as COLSUM
from tl_looped.stages.measures import MAGNITUDE as MAGNITUDE
from tl_looped.stages.measures import MIXING as MIXING
from tl_looped.stages.measures import RESIDUAL_ENTROPY as RESIDUAL_ENTROPY
from tl_looped.stages.measures import SINK as SINK
from tl_looped.stages.measures import SINK_RATE as SINK_RATE
from tl_looped.stages.measures import STAGE_MEASURES as STAGE_MEASURES
from tl_looped.stages.neurons import NeuronShares as NeuronShares
from tl_looped.stages.neurons import logit_effects as logit_effects
from tl_looped.stages.neurons import neuron_shares as neuron_shares
