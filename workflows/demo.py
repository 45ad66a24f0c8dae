"""The whole chain on this machine: a local S3 server and a local Ray, generated street scenes or CamVid photographs."""

from dataclasses import dataclass

from pipeline.command_line import run_workflow
from pipeline.demo import demo


@dataclass(frozen=True)
class DemoConfig:
    """Run the demo.

    Args:
        data: folder of CamVid (train, trainannot, val, valannot); empty for generated street scenes.
        output: folder for the local S3 server's buckets and the report.
    """

    data: str = ""
    output: str = "demo-output"


if __name__ == "__main__":
    run_workflow(lambda config: demo(config.data, config.output), DemoConfig, __doc__)
