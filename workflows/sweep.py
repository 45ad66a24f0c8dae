"""Search for the training configuration with the best validation score."""

from pipeline.command_line import run_workflow
from pipeline.sweep import SweepConfig, sweep

if __name__ == "__main__":
    run_workflow(sweep, SweepConfig, __doc__)
