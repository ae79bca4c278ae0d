"""Tasks for small looped models."""

from tl_looped.tasks.variable_chains import Contexts as Contexts
from tl_looped.tasks.variable_chains import draw_contexts as draw_contexts
from tl_looped.tasks.variable_chains import make_tokenizer as make_tokenizer
from tl_looped.tasks.variable_chains import solve as solve
