"""The native looped transformer and its parts."""

from tl_looped.nn.transformer import LoopedTransformer as LoopedTransformer
