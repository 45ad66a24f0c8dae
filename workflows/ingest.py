"""Turn a bucket of labelled images into a canonical dataset."""

from pipeline.command_line import run_workflow
from pipeline.ingest import IngestConfig, ingest

if __name__ == "__main__":
    run_workflow(ingest, IngestConfig, __doc__)
