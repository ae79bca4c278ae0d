"""What the model would say at every loop and layer, and when it would stop."""

from tl_looped.lens.agreement import ReadoutAgreement as ReadoutAgreement
from tl_looped.lens.agreement import readout_agreement as readout_agreement
from tl_looped.lens.contributions import Decomposition as Decomposition
from tl_looped.lens.contributions import decompose as decompose
from tl_looped.lens.exits import AccelerationRule as AccelerationRule
from tl_looped.lens.exits import EntropyRule as EntropyRule
from tl_looped.lens.exits import GateChanceRule as GateChanceRule
from tl_looped.lens.exits import GateRule as GateRule
from tl_looped.lens.exits import KLRule as KLRule
from tl_looped.lens.exits import LatentRule as LatentRule
from tl_looped.lens.exits import StableTopRule as StableTopRule
from tl_looped.lens.exits import ThresholdRule as ThresholdRule
from tl_looped.lens.jacobian import JacobianLens as JacobianLens
from tl_looped.lens.jacobian import jacobian_lens as jacobian_lens
from tl_looped.lens.lens import logit_lens as logit_lens
from tl_looped.lens.lens import view_prompt as view_prompt
from tl_looped.lens.measures import AGREEMENT as AGREEMENT
from tl_looped.lens.measures import ENTROPY as ENTROPY
from tl_looped.lens.measures import KL_TO_FINAL as KL_TO_FINAL
from tl_looped.lens.measures import KL_TO_PREVIOUS as KL_TO_PREVIOUS
from tl_looped.lens.measures import LOSS as LOSS
from tl_looped.lens.result import LogitLens as LogitLens
from tl_looped.lens.trade_off import ExitTrace as ExitTrace
from tl_looped.lens.trade_off import trace_exits as trace_exits
from tl_looped.lens.tuned import TunedLens as TunedLens
from tl_looped.lens.tuned import fit_tuned_lens as fit_tuned_lens
