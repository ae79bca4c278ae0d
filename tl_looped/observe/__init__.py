"""Measures over many prompts and any number of loops, taken while the model runs."""

from tl_looped.observe.collected import Collected as Collected
from tl_looped.observe.engine import Measure as Measure
from tl_looped.observe.engine import collect as collect
from tl_looped.observe.texts import Prompts as Prompts
from tl_looped.observe.texts import read_prompts as read_prompts
from tl_looped.observe.texts import tokenize_prompts as tokenize_prompts
