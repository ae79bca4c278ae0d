"""Studies of architectures before any training."""

from tl_looped.claims.architectures import ArchitectureStudy as ArchitectureStudy
from tl_looped.claims.architectures import architecture as architecture
from tl_looped.claims.architectures import initialise as initialise
from tl_looped.claims.architectures import study_architectures as study_architectures
