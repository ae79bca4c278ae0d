"""Attention stability: do patterns come to rest over loops, and does the state's rest explain it."""

from tl_looped.attention.bound import AttentionBound as AttentionBound
from tl_looped.attention.bound import attention_bound as attention_bound
from tl_looped.attention.distances import distance_matrix as distance_matrix
from tl_looped.attention.distances import mean_total_variation as mean_total_variation
from tl_looped.attention.distances import pattern_distance as pattern_distance
from tl_looped.attention.distances import settling_loop as settling_loop
from tl_looped.attention.distances import stability_score as stability_score
from tl_looped.attention.distances import total_variation as total_variation
from tl_looped.attention.measures import PATTERN_DISTANCE as PATTERN_DISTANCE
from tl_looped.attention.measures import PATTERN_STEP as PATTERN_STEP
from tl_looped.attention.measures import TOTAL_VARIATION as TOTAL_VARIATION
from tl_looped.attention.stability import AttentionStability as AttentionStability
from tl_looped.attention.stability import PatternDistances as PatternDistances
from tl_looped.attention.stability import attention_stability as attention_stability
from tl_looped.attention.stability import pattern_distances as pattern_distances
