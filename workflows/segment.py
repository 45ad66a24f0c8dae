"""Segment every image below a URL that a model has not segmented yet, and add the masks to the output."""

from pipeline.command_line import run_workflow
from pipeline.segmentation import SegmentConfig, segment

if __name__ == "__main__":
    run_workflow(segment, SegmentConfig, __doc__)
