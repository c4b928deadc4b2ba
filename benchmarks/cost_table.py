"""What it costs to keep N fine-tunes ready and to answer a demand: plain arithmetic over measured parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

HOURS_PER_MONTH = 730


@dataclass(frozen=True, kw_only=True)
class Machine:
    price_per_hour: float
    memory_bytes: int
    usable: float
    """Part of the memory that weights and adapters may take; the rest is for KV cache, code and system."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    machines_for_memory: int
    machines_for_demand: int
    """0 where no demand is looked at."""
    machines: int
    per_month: float
    per_month_per_fine_tune: float


def cost(machine: Machine, fine_tunes: int, memory_bytes: float, demand: float = 0.0, per_machine: float = 1.0) -> Cost:
    """`demand` and `per_machine`, what one machine can do, in tokens per second."""
    for_memory = max(1, math.ceil(memory_bytes / (machine.memory_bytes * machine.usable)))
    for_demand = math.ceil(demand / per_machine - 1e-9)
    machines = max(for_memory, for_demand)
    per_month = machines * machine.price_per_hour * HOURS_PER_MONTH
    return Cost(
        machines_for_memory=for_memory,
        machines_for_demand=for_demand,
        machines=machines,
        per_month=per_month,
        per_month_per_fine_tune=per_month / fine_tunes,
    )
