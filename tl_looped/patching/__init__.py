"""Recurrence-aware patching: at, from, across and between loops."""

from tl_looped.patching.attribution import attribution_sweep as attribution_sweep
from tl_looped.patching.interventions import freeze_patterns as freeze_patterns
from tl_looped.patching.interventions import replace_injection as replace_injection
from tl_looped.patching.interventions import skip_layer as skip_layer
from tl_looped.patching.interventions import skip_loop as skip_loop
from tl_looped.patching.paths import Receiver as Receiver
from tl_looped.patching.paths import Sender as Sender
from tl_looped.patching.paths import path_patch as path_patch
from tl_looped.patching.positions import aligned_source as aligned_source
from tl_looped.patching.results import LoopPatchingResult as LoopPatchingResult
from tl_looped.patching.sources import Source as Source
from tl_looped.patching.sources import fixed as fixed
from tl_looped.patching.sources import mean_source as mean_source
from tl_looped.patching.sources import zero as zero
from tl_looped.patching.sweep import patch_sweep as patch_sweep
