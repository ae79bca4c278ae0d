"""The realised-depth view: a looped model as a TransformerBridge, for TransformerLens's own tools."""

from tl_looped.unrolled.view import UnrolledModel as UnrolledModel
