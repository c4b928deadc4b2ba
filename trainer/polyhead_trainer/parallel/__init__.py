"""Several processes that train one model: who they are, how they start, and how they share the work."""

from polyhead_trainer.parallel.ranks import Ranks

__all__ = ["Ranks"]
