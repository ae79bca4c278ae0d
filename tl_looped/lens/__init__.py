"""What the model would say at every loop and layer, and when it would stop."""

from tl_looped.lens.agreement import LoopAgreement as LoopAgreement
from tl_looped.lens.agreement import loop_agreement as loop_agreement
from tl_looped.lens.exits import AccelerationRule as AccelerationRule
from tl_looped.lens.exits import EntropyRule as EntropyRule
from tl_looped.lens.exits import GateRule as GateRule
from tl_looped.lens.exits import KLRule as KLRule
from tl_looped.lens.exits import LatentRule as LatentRule
from tl_looped.lens.exits import StableTopRule as StableTopRule
from tl_looped.lens.exits import ThresholdRule as ThresholdRule
from tl_looped.lens.exits import exit_distribution as exit_distribution
from tl_looped.lens.exits import threshold_exit as threshold_exit
from tl_looped.lens.exits import weighted_logits as weighted_logits
from tl_looped.lens.lens import loop_lens as loop_lens
from tl_looped.lens.measures import entropy as entropy
from tl_looped.lens.measures import kl_divergence as kl_divergence
from tl_looped.lens.measures import token_rank as token_rank
from tl_looped.lens.reads import LensKind as LensKind
from tl_looped.lens.reads import LensSite as LensSite
from tl_looped.lens.result import LoopLensResult as LoopLensResult
from tl_looped.lens.trade_off import ExitCurves as ExitCurves
from tl_looped.lens.trade_off import ExitTrace as ExitTrace
from tl_looped.lens.trade_off import trace_exits as trace_exits
from tl_looped.lens.tuned import TunedLens as TunedLens
from tl_looped.lens.tuned import fit_tuned_lens as fit_tuned_lens
from tl_looped.lens.views import view_prompt as view_prompt
from tl_looped.lens.views import view_top_tokens as view_top_tokens
