"""Weights & Biases: one run under the output's name. Project, mode (`WANDB_MODE=offline`) and folder are wandb's own
environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyhead_core.errors import ConfigError


class WandbTracker:
    """Implements Tracker. What the network loses, wandb sends again by itself or keeps in its folder."""

    name = "wandb"

    def __init__(self) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None

    def begin(self, run_name: str, settings: Mapping[str, str], identity: str | None) -> str | None:
        try:
            self._run = self._wandb.init(name=run_name, id=identity, resume="allow", config=dict(settings))
        except self._wandb.errors.Error as error:
            raise ConfigError(
                f"tracking.wandb = true: no run can be opened: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave tracking.wandb out"
            ) from error
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
