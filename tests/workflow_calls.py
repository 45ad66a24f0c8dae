"""Calls of workflows as they stand in documents and manifests, and the configuration class that each must parse to."""

import re
import shlex
from pathlib import Path
from typing import Any

from pipeline.command_line import parse, parser_for
from pipeline.end_to_end import EndToEndConfig
from pipeline.evaluation import EvaluateConfig
from pipeline.ingest import IngestConfig
from pipeline.segment_config import SegmentConfig
from pipeline.sweep import SweepConfig
from pipeline.train_config import TrainConfig

REPOSITORY = Path(__file__).parents[1]
IN_THE_IMAGE = "/opt/rssnet"  # where an image has the repository
CONFIGS = {
    "ingest": IngestConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "segment": SegmentConfig,
    "end_to_end": EndToEndConfig,
}


def calls_in(text: str) -> list[str]:
    """Each `python .../workflows/X.py ...` of a text, to the end of its line or of its command."""
    joined = text.replace("\\\n", " ")
    return [found.strip() for found in re.findall(r"python \S*workflows/\w+\.py[^#\n;&|`]*", joined)]


def parsed(call: str) -> Any:
    """The configuration that a call asks for; raises WrongCall for one that its workflow would refuse."""
    _, script, *arguments = shlex.split(call.replace(IN_THE_IMAGE, str(REPOSITORY)))
    path = Path(script) if Path(script).is_absolute() else REPOSITORY / script
    if not path.is_file():
        raise FileNotFoundError(f"{path} is called, but is not there")
    config_class = CONFIGS[path.stem]
    return parse(parser_for(config_class), config_class, arguments)
