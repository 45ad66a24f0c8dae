"""Train RSSNet on a canonical dataset."""

from pipeline.command_line import run_workflow
from pipeline.train_config import TrainConfig
from pipeline.training import train

if __name__ == "__main__":
    run_workflow(train, TrainConfig, __doc__)
