"""Text from a looped model, token by token."""

from tl_looped.generation.loop_end import ExitRule as ExitRule
from tl_looped.generation.loop_end import LoopEnd as LoopEnd
