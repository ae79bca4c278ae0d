"""The paper's claims on a model, and studies of architectures before any training."""

from tl_looped.claims.architectures import ArchitectureStudy as ArchitectureStudy
from tl_looped.claims.architectures import architecture as architecture
from tl_looped.claims.architectures import initialise as initialise
from tl_looped.claims.architectures import study_architectures as study_architectures
from tl_looped.claims.evidence import Evidence as Evidence
from tl_looped.claims.evidence import paper_claims as paper_claims
