"""`trainer estimate`: what a run will need per rank, part by part, before anything is loaded."""

from polyhead_trainer.estimate.estimate import estimate
from polyhead_trainer.estimate.parts import Estimate, MicroBatch

__all__ = ["Estimate", "MicroBatch", "estimate"]
