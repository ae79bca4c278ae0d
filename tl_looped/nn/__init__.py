"""The native networks and their parts."""

from tl_looped.engine.config import LoopedConfig
from tl_looped.nn.transformer import LoopedTransformer as LoopedTransformer
from tl_looped.nn.two_states import TwoStateTransformer as TwoStateTransformer

NativeNetwork = LoopedTransformer | TwoStateTransformer
"""What is built from a config."""


def build(cfg: LoopedConfig) -> NativeNetwork:
    """The network of a config, its weights as torch leaves them."""
    return LoopedTransformer(cfg) if cfg.two_states is None else TwoStateTransformer(cfg)
