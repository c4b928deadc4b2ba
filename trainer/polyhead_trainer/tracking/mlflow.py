"""MLflow: one run under the output's name. Where it goes is MLflow's own affair (MLFLOW_TRACKING_URI, ...)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from polyhead_core.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 250
MAX_VALUE_CHARACTERS = 500
"""Of a setting: what every MLflow store takes."""
_NOT_IN_NAMES = re.compile(r"[^\w.\- :/]")
"""What they refuse, and a setting's name has where it is a pattern (adapter.rank_pattern)."""


class MlflowTracker:
    """Implements Tracker."""

    name = "mlflow"

    def __init__(self) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        self._is_open = False

    def begin(self, run_name: str, settings: Mapping[str, str], identity: str | None) -> str | None:
        try:
            run = self._mlflow.start_run(run_id=identity, run_name=None if identity else run_name)
            self._is_open = True
            if identity is None:
                self._mlflow.log_params(_accepted(settings))
        except self._mlflow.exceptions.MlflowException as error:
            if self._is_open:  # or MLflow itself would call it finished when the process ends
                self.end(finished=False)
            raise ConfigError(
                f"tracking.mlflow = true: no run can be opened at {self._mlflow.get_tracking_uri()}: {error}; set "
                "MLFLOW_TRACKING_URI to a server's address, or pip install mlflow, which unlike mlflow-skinny has a "
                "database of its own, or leave tracking.mlflow out"
            ) from error
        return str(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if not self._is_open:
            return
        try:
            self._mlflow.log_metrics(dict(values), step=step)
        except self._mlflow.exceptions.MlflowException as error:
            logger.warning("MLflow takes nothing more after step %s, training goes on: %s", step, error)
            self._is_open = False

    def flush(self) -> None:
        pass

    def end(self, *, finished: bool) -> None:
        try:
            self._mlflow.end_run("FINISHED" if finished else "FAILED")
        except self._mlflow.exceptions.MlflowException as error:
            logger.warning("MLflow was not told that the run has ended: %s", error)


def _accepted(settings: Mapping[str, str]) -> dict[str, str]:
    return {
        _NOT_IN_NAMES.sub("_", name)[:MAX_NAME_CHARACTERS]: value[:MAX_VALUE_CHARACTERS]
        for name, value in settings.items()
    }
