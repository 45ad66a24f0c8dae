"""Turn a bucket of labelled images into a canonical dataset."""

from pipeline.command_line import run_workflow
from pipeline.ingest import IngestConfig, ingest
from pipeline.source_preview import preview_source


def work(config: IngestConfig) -> None:
    """Look at the source, or ingest it."""
    if config.dry_run or config.preview:
        preview_source(config)
    else:
        ingest(config)


if __name__ == "__main__":
    run_workflow(work, IngestConfig, __doc__)
