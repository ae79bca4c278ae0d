"""Figures (plotly) and views (circuitsvis) of tensors and results, for notebooks and for the report."""

from tl_looped.viz.attention import LayerAttention as LayerAttention
from tl_looped.viz.attention import LoopAttention as LoopAttention
from tl_looped.viz.attention import attention_from_position as attention_from_position
from tl_looped.viz.attention import attention_heads as attention_heads
from tl_looped.viz.browser import circuitsvis_script as circuitsvis_script
from tl_looped.viz.readout import lens_heatmap as lens_heatmap
from tl_looped.viz.readout import readout_curves as readout_curves
from tl_looped.viz.readout import readout_heatmap as readout_heatmap
from tl_looped.viz.schedule import schedule_svg as schedule_svg
from tl_looped.viz.state import state_convergence as state_convergence
from tl_looped.viz.state import step_by_position as step_by_position
from tl_looped.viz.style import loop_colors as loop_colors
from tl_looped.viz.style import show_token as show_token
from tl_looped.viz.tokens import LoopTokens as LoopTokens
from tl_looped.viz.tokens import token_log_probs as token_log_probs
from tl_looped.viz.tokens import top_tokens_table as top_tokens_table
