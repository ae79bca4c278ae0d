"""Activations as data: streamed to disk by loop, probed, and steered with."""

from tl_looped.record.probing import Probed as Probed
from tl_looped.record.probing import probe as probe
from tl_looped.record.recorded import Recorded as Recorded
from tl_looped.record.recording import record as record
from tl_looped.record.steering import Directions as Directions
from tl_looped.record.steering import Steered as Steered
from tl_looped.record.steering import directions as directions
from tl_looped.record.steering import directions_of as directions_of
from tl_looped.record.steering import steering_sweep as steering_sweep
