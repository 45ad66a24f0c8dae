"""The README's code blocks do what they say."""

import re
from pathlib import Path

import duckdb
import pytest
import torch

from pipeline import dataset
from pipeline.command_line import parse, parser_for
from tests.pipeline.labelled_source import HEIGHT, WIDTH
from tests.workflow_calls import CONFIGS

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
MASKS = "demo-output/s3/street-scenes/results/segment"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_line_of_sql_reads_the_masks(street_masks: Path) -> None:
    (sql,) = blocks("sql")
    rows = duckdb.connect().execute(sql.replace(MASKS, str(street_masks / "masks"))).fetchall()
    assert len(rows) == 3
    assert {row[-1] for row in rows} == {"ok"}


def test_the_python_blocks_run(
    street_masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job, _, reading, counting, model = blocks("python")
    compile(job, "README", "exec")  # its places are the reader's own
    exec(reading.replace(MASKS, str(street_masks / "masks")), {})
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    exec(counting.replace(MASKS, str(street_masks / "masks")), {})
    assert "class_pixels" in capsys.readouterr().out
    names: dict[str, object] = {}
    exec(model, names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (1, 11, 48, 64)
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_a_dataset_opens_in_three_ways(two_pairs: str) -> None:
    _, opening, *_ = blocks("python")
    as_ray, as_arrow, as_torch = re.findall(r"data\.\w+\(\"\w+\"\)(?:\[0\])?", opening)
    data = dataset.open(two_pairs)
    assert eval(as_ray, {"data": data}).count() == 2
    assert eval(as_arrow, {"data": data}).num_rows == 2
    assert eval(as_torch, {"data": data})["image"].shape == (3, HEIGHT, WIDTH)
    exec(opening.replace("s3://data/mine", two_pairs), {})


@pytest.mark.parametrize("workflow", CONFIGS)
def test_each_command_is_a_valid_call(workflow: str) -> None:
    lines = re.findall(rf"python workflows/{workflow}\.py +([^#`\n]+)", README)
    config_class = CONFIGS[workflow]
    assert lines
    for line in lines:
        assert isinstance(parse(parser_for(config_class), config_class, line.split()), config_class)
