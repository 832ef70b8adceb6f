from reference.loaded import checkpoints
from reference.real_models import real_models

__all__ = ["checkpoints", "real_models"]
