"""The whole chain as one durable run: ingest, train, evaluate, sweep, segment, report, each on its final contract.

What is done is not done again. A stage runs if it has no finished record for the same work, or if a stage before it has
run since; so deleting one stage's output, changing its configuration or its input runs that stage and those after it.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline import run_report, storage
from pipeline.cluster import connected
from pipeline.command_line import load, read_yaml
from pipeline.evaluation import EvaluateConfig, evaluate
from pipeline.inference_config import InferenceConfig
from pipeline.ingest import IngestConfig, ingest
from pipeline.progress import announce
from pipeline.run_folder import MODEL_FOLDER
from pipeline.run_record import OtherWork, RunRecord, read_record
from pipeline.run_report import ReportConfig, report
from pipeline.segment_config import SegmentConfig
from pipeline.segmentation import model_pool, segment
from pipeline.sweep import SweepConfig, search_space, sweep
from pipeline.train_config import TrainConfig
from pipeline.training import train

STAGES = (*run_report.STAGES, "report")


@dataclass(frozen=True)
class EndToEndConfig:
    """Ingest labelled images, train, evaluate, sweep, segment a bucket of photographs, and report.

    Args:
        source: URL of the labelled images.
        photos: URL of the images to segment.
        root: URL below which every stage has its place.
        layout: of the source: camvid, folders, or auto.
        train: YAML file or URL of a training configuration.
        sweep: YAML file or URL of a sweep configuration.
        inference: how the model is applied in evaluate and segment.
        workers: processes that hold a model each, in evaluate and segment.
        use_gpu: give each of them a GPU.
        cpus_per_worker: CPUs, and threads, for each of them.
        mirror: local folder that keeps the buckets, where the S3 server is the run's own; the report then says so.
    """

    source: str
    photos: str
    root: str
    layout: str = "auto"
    train: str = "workflows/presets/camvid_tiny.yaml"
    sweep: str = "workflows/presets/sweep_smoke.yaml"
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    workers: int = 1
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    mirror: str = ""


@dataclass(frozen=True)
class _Stage:
    name: str
    place: str
    work: Callable[[bool], RunRecord]


def end_to_end(config: EndToEndConfig, after_stage: Callable[[], object] | None = None) -> dict[str, RunRecord]:
    """Run what is not done yet, in order; the records of all stages by name.

    Args:
        after_stage: called each time a stage has ended well.

    Raises:
        PipelineError: from the first stage that fails. What is finished stays, and is skipped by the next run.
    """
    config = dataclasses.replace(config, root=storage.absolute(config.root))
    stages, segment_config = _stages(config)
    records: dict[str, RunRecord] = {}
    previous: RunRecord | None = None
    with connected():
        model_pool(segment_config)  # what there is no room for is refused before the first stage begins
        for number, stage in enumerate(stages, start=1):
            announce(f"[{number}/{len(stages)}] {stage.name}: {stage.place}")
            previous = _run(stage, previous)
            records[stage.name] = previous
            if after_stage:
                after_stage()
    return records


def _run(stage: "_Stage", previous: RunRecord | None) -> RunRecord:
    if _is_stale(read_record(stage.place), previous):
        return stage.work(True)
    try:
        return stage.work(False)
    except OtherWork as changed:
        announce(f"  {changed.args[0].partition(': choose')[0]}; it is replaced")
        return stage.work(True)


def _is_stale(record: RunRecord | None, previous: RunRecord | None) -> bool:
    """Whether what a stage left was begun before the stage before it ended, and so is made of something older."""
    return record is not None and previous is not None and record.started < (previous.finished or "")


def _stages(config: EndToEndConfig) -> tuple[list[_Stage], SegmentConfig]:
    places = {name: storage.join(config.root, name) for name in STAGES}
    model = storage.join(places["train"], MODEL_FOLDER)
    shared = {
        "workers": config.workers,
        "use_gpu": config.use_gpu,
        "cpus_per_worker": config.cpus_per_worker,
        "inference": config.inference,
    }

    def do_ingest(new: bool) -> RunRecord:
        return ingest(IngestConfig(config.source, places["ingest"], config.layout, new=new))

    # Read before the first stage begins: a mistake in a later stage's file must not cost the stages before it.
    train_config: TrainConfig = load(
        TrainConfig, read_yaml(config.train), {"dataset": places["ingest"], "run": places["train"]}
    )
    sweep_config: SweepConfig = load(
        SweepConfig, read_yaml(config.sweep), {"dataset": places["ingest"], "run": places["sweep"]}
    )
    search_space(sweep_config)
    segment_config = SegmentConfig(model, config.photos, places["segment"], **shared)

    def do_train(new: bool) -> RunRecord:
        return train(dataclasses.replace(train_config, new=new))

    def do_evaluate(new: bool) -> RunRecord:
        return evaluate(EvaluateConfig(model, places["ingest"], places["evaluate"], new=new, **shared))

    def do_sweep(new: bool) -> RunRecord:
        return sweep(dataclasses.replace(sweep_config, new=new))

    def do_segment(new: bool) -> RunRecord:
        return segment(dataclasses.replace(segment_config, new=new))

    def do_report(new: bool) -> RunRecord:
        return report(ReportConfig(config.root, places["report"], config.mirror, new=new))

    work = {
        "ingest": do_ingest,
        "train": do_train,
        "evaluate": do_evaluate,
        "sweep": do_sweep,
        "segment": do_segment,
        "report": do_report,
    }
    return [_Stage(name, places[name], work[name]) for name in STAGES], segment_config
