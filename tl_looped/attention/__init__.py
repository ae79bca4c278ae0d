"""Attention stability: do patterns come to rest over loops, and does the state's rest explain it."""

from tl_looped.attention.bound import AttentionBound as AttentionBound
from tl_looped.attention.bound import attention_bound as attention_bound
from tl_looped.attention.patterns import PATTERN_DISTANCE as PATTERN_DISTANCE
from tl_looped.attention.patterns import PATTERN_STEP as PATTERN_STEP
from tl_looped.attention.patterns import STABILITY as STABILITY
from tl_looped.attention.patterns import TOTAL_VARIATION as TOTAL_VARIATION
from tl_looped.attention.stability import AttentionStability as AttentionStability
from tl_looped.attention.stability import PatternDistances as PatternDistances
from tl_looped.attention.stability import attention_stability as attention_stability
from tl_looped.attention.stability import pattern_distances_of as pattern_distances_of
from tl_looped.attention.stability import stability_of as stability_of
