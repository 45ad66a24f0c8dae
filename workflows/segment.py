"""Segment every image of a source that a model has not segmented yet, and add the masks to the output."""

from pipeline.command_line import run_workflow
from pipeline.segmentation import SegmentConfig, segment_in_turn

if __name__ == "__main__":
    run_workflow(segment_in_turn, SegmentConfig, __doc__)
