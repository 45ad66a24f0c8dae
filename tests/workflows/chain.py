"""What a chain of all stages must have left."""

from collections.abc import Mapping

import pyarrow.parquet as pq

from pipeline import dataset, storage
from pipeline.command_line import load, read_yaml
from pipeline.masks import decode, read_masks
from pipeline.run_record import read_record
from pipeline.train_config import TrainConfig
from tests.workflows.conftest import TinyChain


def places_below(root: str) -> dict[str, str]:
    """Where the commands of `chain_commands` put what each stage makes."""
    places = {"ingest": "dataset", "train": "run", "evaluate": "run/eval", "sweep": "sweep", "segment": "masks"}
    return {stage: f"{root}/{place}" for stage, place in places.items()}


def assert_chain_is_there(tiny: TinyChain, places: Mapping[str, str]) -> None:
    """What each stage has made is on its contract."""
    for stage, place in places.items():
        record = read_record(place)
        assert record is not None, stage
        assert (record.outcome, record.error) == ("done", None), stage
    data = dataset.open(places["ingest"])
    assert {name: split.rows for name, split in data.info.splits.items()} == {"train": 12, "val": 4}
    scores = storage.read_json(f"{places['evaluate']}/scores.json")
    assert scores["images"] == 4
    assert 0 <= scores["miou"] <= 1
    best = read_yaml(f"{places['sweep']}/best.yaml")
    assert load(TrainConfig, best, {"run": "elsewhere"}).iterations == 2
    filesystem, path = storage.arrow_filesystem(f"{places['sweep']}/trials.parquet")
    trials = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert [trial["trial"] for trial in trials] == [0, 1]
    assert "0.001" in trials[0]["parameters"], "trial 0 is the recipe as it stands"
    rows = read_masks(places["segment"]).to_pylist()
    assert len(rows) == tiny.photographs
    for row in rows:
        assert row["status"] == "ok"
        assert decode(row).shape == (row["height"], row["width"])
