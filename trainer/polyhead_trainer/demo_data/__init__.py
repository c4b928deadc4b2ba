"""The demo's two tasks and its general text, made from real data in published packages, with source and licence."""

from polyhead_trainer.demo_data.prepare import prepare

__all__ = ["prepare"]
