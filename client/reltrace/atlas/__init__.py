"""Atlases: the strongest examples of neurons and heads in a corpus, computed by workers."""
