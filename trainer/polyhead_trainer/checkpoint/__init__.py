"""Checkpoints of an unfinished run, and its exact continuation."""

from polyhead_trainer.checkpoint.directory import CheckpointDirectory
from polyhead_trainer.checkpoint.identity import RunIdentity
from polyhead_trainer.checkpoint.writer import Checkpointer, SavedRun, Stateful, restore

__all__ = ["CheckpointDirectory", "Checkpointer", "RunIdentity", "SavedRun", "Stateful", "restore"]
