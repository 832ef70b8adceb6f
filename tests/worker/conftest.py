from reference.loaded import checkpoints

__all__ = ["checkpoints"]
