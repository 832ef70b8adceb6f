"""The worker of reltrace: relevance traces by LXT (AttnLRP) on torch."""

__version__ = "0.1.0"
