"""Segment every image of a source that a model has not segmented yet, and add the masks to the output."""

from pipeline.command_line import run_workflow
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import segment_in_turn

if __name__ == "__main__":
    run_workflow(segment_in_turn, SegmentConfig, __doc__)
