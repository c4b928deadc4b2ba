"""Classification heads: their modules, and the two files in which a head is kept."""

from polyhead_trainer.heads.files import HEAD_TYPE, is_head_directory, load_head, save_head
from polyhead_trainer.heads.modules import ScoreHead, classifier, without_scores

__all__ = ["HEAD_TYPE", "ScoreHead", "classifier", "is_head_directory", "load_head", "save_head", "without_scores"]
