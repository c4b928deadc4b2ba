"""The loss curve as a picture. Holds no text of a user and opens no window: matplotlib's figures without its pyplot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyhead_trainer.record import RunRecord

SIZE_INCHES = (8.0, 4.5)
DPI = 100
SMOOTHING = 0.9


def loss_curve(record: RunRecord) -> bytes:
    """A PNG: the training loss of every step, the same smoothed, and the held-out loss where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    steps = [report.step for report in record.curve]
    losses = [report.loss for report in record.curve]
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, marker="." if len(steps) == 1 else "", label="training")
    axes.plot(steps, smoothed(losses), color="#1f4e8c", linewidth=2, label="training, smoothed")
    held_out = held_out_points(record)
    axes.plot(*zip(*held_out, strict=True), color="#c4541a", marker="o", markersize=4, label="held out")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure)
    # Without a version in it, equal curves are equal files.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def held_out_points(record: RunRecord) -> list[tuple[int, float]]:
    """(step, held-out loss) from before the first step on, to the end."""
    measured = record.held_out_curve or [(len(record.curve), record.after.held_out_loss)]
    return [(0, record.before.held_out_loss), *measured]


def smoothed(losses: Sequence[float]) -> list[float]:
    return list(accumulate(losses, lambda mean, loss: SMOOTHING * mean + (1 - SMOOTHING) * loss))
