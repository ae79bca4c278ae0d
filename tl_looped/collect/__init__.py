"""Measures over many prompts and any number of loops, taken while the model runs."""

from tl_looped.collect.collected import Collected as Collected
from tl_looped.collect.engine import Measure as Measure
from tl_looped.collect.engine import collect as collect
from tl_looped.collect.texts import Prompts as Prompts
from tl_looped.collect.texts import read_prompts as read_prompts
from tl_looped.collect.texts import tokenize_prompts as tokenize_prompts
