"""Training, from a canonical dataset to a model, resumable from the run's own checkpoints."""

import dataclasses
import uuid

from pipeline import dataset, storage
from pipeline.cluster import connected
from pipeline.evaluation import scores_text
from pipeline.fit import fit
from pipeline.lease import Lease
from pipeline.progress import Progress, announce
from pipeline.run_folder import (
    BEST_FOLDER,
    CHECKPOINTS_FOLDER,
    HISTORY_FILE,
    MODEL_FOLDER,
    PICTURES_FOLDER,
    TENSORBOARD_FOLDER,
)
from pipeline.run_record import RunRecord, finished_record, record_run, refuse_other_work
from pipeline.train_config import TrainConfig, completed
from pipeline.train_parts import require_buildable
from pipeline.train_resources import require_resources


def train(config: TrainConfig) -> RunRecord:
    """Train, validate, and leave the model at `<run>/model`.

    Raises:
        Held: if another process is training this run.
        PipelineError: if the configuration, the dataset or the run's place cannot serve, or the training fails.
    """
    config = dataclasses.replace(config, dataset=storage.absolute(config.dataset), run=storage.absolute(config.run))
    data = dataset.open(config.dataset)
    config = completed(config, data)
    require_buildable(config, data.classes)
    inputs = {"dataset": data.info.fingerprint}
    if not config.new:
        finished = finished_record(config.run, "train", config, inputs)
        if finished:
            announce(f"already trained: {config.run} ({scores_text(finished.results)})")
            return finished
        refuse_other_work(config.run, "train", config, inputs, resumes=True)
    outputs = [CHECKPOINTS_FOLDER, MODEL_FOLDER, HISTORY_FILE, TENSORBOARD_FOLDER, PICTURES_FOLDER]
    outputs += [BEST_FOLDER] if config.keep_best else []
    with Lease(config.run, f"train {uuid.uuid4().hex}"), connected():
        require_resources(config.resources)
        with record_run(config.run, "train", config, inputs, outputs, keep=not config.new) as record:
            with Progress("train", total=config.iterations, unit="iterations") as progress:
                fit(config, reporter=progress.reporter)
            history = storage.read_json(storage.join(config.run, HISTORY_FILE))
            split = data.split(config.train_split)
            record.counts = {"iterations": config.iterations, "skipped": len(history["skipped"]), "images": split.rows}
            record.results = history["validation"][-1]
    announce(f"trained {config.run}/{MODEL_FOLDER} ({scores_text(record.results)})")
    return record
