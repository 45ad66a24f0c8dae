"""Score a model on a labelled split of a canonical dataset."""

from pipeline.command_line import run_workflow
from pipeline.evaluation import EvaluateConfig, evaluate

if __name__ == "__main__":
    run_workflow(evaluate, EvaluateConfig, __doc__)
