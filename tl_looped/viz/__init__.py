"""Figures (plotly) and views (circuitsvis) of tensors and results, for notebooks and for the report."""

from tl_looped.viz.attention import LayerAttention as LayerAttention
from tl_looped.viz.attention import LoopAttention as LoopAttention
from tl_looped.viz.attention import attention_from_position as attention_from_position
from tl_looped.viz.attention import attention_heads as attention_heads
from tl_looped.viz.figure import Figure as Figure
from tl_looped.viz.schedule import schedule_svg as schedule_svg
from tl_looped.viz.tokens import LoopTokens as LoopTokens
