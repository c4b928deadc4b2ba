"""Several processes that train one model: who they are, how they start, and how they share model and work."""

from polyhead_trainer.parallel.apply import (
    Parallel,
    check_possible,
    clip_grad_norm,
    gather_trained,
    held_as,
    layers_to_shard,
    parallelize,
    reshard,
    without_backward,
)
from polyhead_trainer.parallel.ranks import Ranks, joined
from polyhead_trainer.parallel.work import micro_batches

__all__ = [
    "Parallel",
    "Ranks",
    "check_possible",
    "clip_grad_norm",
    "gather_trained",
    "held_as",
    "joined",
    "layers_to_shard",
    "micro_batches",
    "parallelize",
    "reshard",
    "without_backward",
]
