"""A running training for those who watch from outside: TensorBoard always, MLflow and Weights & Biases when asked."""

from polyhead_trainer.tracking.run_tracking import RunTracking, check_tracking, optional_trackers
from polyhead_trainer.tracking.tensorboard import EventFiles
from polyhead_trainer.tracking.termination import unwinding_at_sigterm
from polyhead_trainer.tracking.tracker import Tracker

__all__ = ["EventFiles", "RunTracking", "Tracker", "check_tracking", "optional_trackers", "unwinding_at_sigterm"]
