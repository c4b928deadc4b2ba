"""How a step's examples are shared among ranks and cut into micro-batches. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from polyhead_trainer.parallel.ranks import Ranks

Item = TypeVar("Item")


def micro_batches(examples: Sequence[Item], size: int, ranks: Ranks) -> list[tuple[list[Item], float]]:
    """This rank's micro-batches of at most `size` examples, each with the weight of its loss.

    Every rank gets as many, because each forward and backward pass is one that all ranks take part in: where examples
    run out, a rank computes one of them once more, with weight 0.
    """
    own = ranks.share(examples)
    count = math.ceil(math.ceil(len(examples) / ranks.size) / size)
    parts = [own[at * size : (at + 1) * size] for at in range(count)]
    return [(part, 1.0) if part else (list(examples[:1]), 0.0) for part in parts]
