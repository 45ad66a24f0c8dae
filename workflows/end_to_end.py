"""Ingest labelled images, train, evaluate, sweep, segment a bucket of photographs, and report, as one durable run."""

from pipeline.command_line import run_workflow
from pipeline.end_to_end import EndToEndConfig, end_to_end

if __name__ == "__main__":
    run_workflow(end_to_end, EndToEndConfig, __doc__)
