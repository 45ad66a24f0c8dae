"""Labelled street scenes, drawn in code: the pictures of the demo and of the tests."""

from pipeline.street_scenes.classes import CLASSES, IGNORE_LABEL, NAMES, PALETTE
from pipeline.street_scenes.scene import Scene, draw_scene, write_street_scenes

__all__ = ["CLASSES", "IGNORE_LABEL", "NAMES", "PALETTE", "Scene", "draw_scene", "write_street_scenes"]
