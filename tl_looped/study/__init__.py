"""Studies of architectures before any training."""

from tl_looped.study.architectures import ArchitectureStudy as ArchitectureStudy
from tl_looped.study.architectures import architecture as architecture
from tl_looped.study.architectures import initialise as initialise
from tl_looped.study.architectures import study_architectures as study_architectures
