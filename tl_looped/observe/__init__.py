"""Measures over many prompts and any number of loops, taken while the model runs."""

from tl_looped.observe.measure import Measure as Measure
from tl_looped.observe.observation import observe as observe
from tl_looped.observe.observed import Observed as Observed
