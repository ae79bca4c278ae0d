"""Text from a looped model, token by token."""

from tl_looped.generation.generated import Generated as Generated
from tl_looped.generation.generated import GeneratesText as GeneratesText
from tl_looped.generation.loop_end import ExitRule as ExitRule
from tl_looped.generation.loop_end import LoopEnd as LoopEnd
from tl_looped.generation.stream import GenerationStep as GenerationStep
from tl_looped.generation.stream import TokenStream as TokenStream
