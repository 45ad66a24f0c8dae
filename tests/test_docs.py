"""What `docs/` says is so: its commands are valid calls, its code runs, its tables name what there is."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import duckdb
import pyarrow as pa
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import submit

from pipeline import dataset, lease, mask_changes, mask_store, masks, metrics, run_record, storage
from pipeline.train_config import TrainConfig
from rssnet import LossConfig
from tests.infra.manifests import rendered
from tests.workflow_calls import CONFIGS, REPOSITORY, calls_in, parsed

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
OF_EVERY_WORKFLOW = {"config", "help", "print_config"}
TESTED = {"python", "shell", "sql", "yaml"}


def text(name: str) -> str:
    return (REPOSITORY / "docs" / f"{name}.md").read_text("utf-8")


def blocks(language: str, name: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(name), re.DOTALL)


def section(name: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text(name), re.DOTALL | re.MULTILINE)
    assert found, f"{name} has no section {title}"
    return found.group(1)


def named(part: str) -> list[str]:
    """What the first cells of a section's tables name in code."""
    cells = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture
def places(street_masks: Path, two_pairs: str) -> dict[str, str]:
    """A dataset, a model and masks, by the URLs that documents have for them."""
    return {
        "s3://data/mine": two_pairs,
        "s3://runs/first/model": str(street_masks / "model"),
        "s3://masks/photos": str(street_masks / "masks"),
    }


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_links_lead_somewhere_and_every_block_is_of_a_language_that_is_tested(path: Path) -> None:
    found = path.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", found):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    assert set(re.findall(r"```(\w+)\n", found)) <= TESTED
    assert len(re.findall(r"^```", found, re.MULTILINE)) % 2 == 0
    for place in re.findall(r"`((?:infra|pipeline|rssnet|tests|workflows)/[\w./-]+)`", found):
        assert (REPOSITORY / place).exists(), f"{path.name} speaks of {place}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_each_command_is_one_that_a_shell_and_the_workflow_accept(path: Path) -> None:
    for block in blocks("shell", path.stem):
        subprocess.run(["bash", "-n", "-c", block], check=True, timeout=30)
        for call in calls_in(block):
            assert parsed(call)
        for line in block.splitlines():
            if line.startswith("ray job submit"):
                with submit.make_context("ray job submit", shlex.split(line)[3:]) as context:
                    assert context.params["working_dir"] == "."
        for place in re.findall(r"(?<![\w/>])infra/[\w./-]+", block):
            assert place == "infra/compose/ray-token" or (REPOSITORY / place).exists(), f"{place} is not there"


def test_the_python_blocks_run(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python", "data-formats"):
        exec(_at(places, block), {})
        assert capsys.readouterr().out.strip()


def test_the_line_of_sql_reads_the_masks(places: dict[str, str]) -> None:
    (sql,) = blocks("sql", "data-formats")
    assert duckdb.connect().execute(_at(places, sql)).fetchall() == [("ok", 3)]


def _at(places: dict[str, str], block: str) -> str:
    for url, place in places.items():
        block = block.replace(url, place)
    assert "s3://" not in block
    return block


def test_the_steps_leave_no_name_of_an_example_in_what_is_sent(tmp_path: Path) -> None:
    """The lines that set names, run on a copy; what they make is still what Kubernetes and Ray accept."""
    shutil.copytree(REPOSITORY / "infra", tmp_path / "infra")
    lines = [line for block in blocks("shell", "deployment") for line in block.splitlines()]
    edits = [line for line in lines if "sed -i" in line or ">> infra/" in line]
    assert len(edits) >= 7
    names = {"PROJECT": "mine", "PREFIX": "acme", "ACCOUNT": "42", "REPOSITORY": "images.example/rssnet"}
    environment = os.environ | names | {"KUBECONFIG": "/dev/null"}  # no cluster to ask, so none with an operator
    subprocess.run(["bash", "-ec", "\n".join(edits)], cwd=tmp_path, env=environment, check=True, timeout=120)
    launcher = yaml.safe_load((tmp_path / "infra/cloud/aws.yaml").read_text("utf-8"))
    validate_config(prepare_config(launcher))
    policies = "".join(path.read_text("utf-8") for path in (tmp_path / "infra/policies").glob("*.json"))
    manifests = [*rendered(tmp_path / "infra/kuberay/overlays/gke"), *rendered(tmp_path / "infra/kuberay/overlays/eks")]
    assert {"PodMonitor", "PrometheusRule"}.isdisjoint(each["kind"] for each in manifests)
    sent = policies + yaml.safe_dump(launcher) + yaml.safe_dump_all(manifests)
    for example in ("registry.example.com", "PROJECT", "111122223333", *re.findall(r"(?:://|:::)rssnet-", sent)):
        assert example not in sent
    for place in ("gs://acme-photos", "s3://acme-photos", "s3:::acme-photos", "images.example/rssnet"):
        assert place in sent


def test_the_lines_of_python_bring_images_and_read_masks(
    bucket: str, street_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = [
        script for block in blocks("shell", "deployment") for script in re.findall(r'python -c "([^"]+)"', block)
    ]
    bring = [script for script in scripts if "upload_folder" in script]
    read = [script for script in scripts if "read_masks" in script]
    assert len(bring) == 2
    assert len(read) == 3
    for part in ("labelled", "photos"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.txt").write_text(part)
    for number, script in enumerate(bring):
        local = re.sub("/tmp/scenes|demo-output/s3/street-scenes", str(tmp_path), script)
        exec(local.replace("s3://", f"{bucket}/{number}/"), {})
        assert storage.read_bytes(f"{bucket}/{number}/rssnet-raw/scenes/labelled.txt") == b"labelled"
        assert storage.read_bytes(f"{bucket}/{number}/rssnet-photos/incoming/photos.txt") == b"photos"
    for script in read:
        exec(re.sub(r"\w+://\S+-masks/incoming", str(street_masks / "masks"), script), {})
        assert capsys.readouterr().out.count("'status': 'ok'") == 3


def test_the_overlay_with_a_ray_cron_job_names_what_there_is() -> None:
    (block,) = blocks("yaml", "deployment")
    kustomization = yaml.safe_load(block)
    for place in kustomization["resources"] + kustomization["components"]:
        assert (REPOSITORY / place / "kustomization.yaml").is_file()


def test_tables_name_every_column_and_field_of_what_is_written(places: dict[str, str]) -> None:
    def fields(kind: type) -> list[str]:
        return [field.name for field in dataclasses.fields(kind)]

    assert named(section("data-formats", "Dataset")) == dataset.SCHEMA.names
    assert sorted(named(section("data-formats", "Run record: `run.json`"))) == sorted(fields(run_record.RunRecord))
    told = section("data-formats", "Predictions")
    columns, beside = told.split("Beside `masks/`:")
    assert named(columns) == masks.PREDICTION_SCHEMA.names
    assert all(f"`{name}`" in told for name in masks.PRODUCT_COLUMNS.names)
    assert all(f"`{name}`" in beside for name in mask_changes.PRUNED_SCHEMA.names)
    for kind in (mask_store.Transaction, mask_store.Move, lease._State):
        assert all(f"`{name}`" in beside for name in fields(kind))
    out = Path(places["s3://masks/photos"])
    for name in ("lease.json", "transaction.json", "run.json"):
        assert name in named(beside)
        assert json.loads((out / name).read_text("utf-8"))
    described = section("data-formats", "Dataset")
    info = json.loads((Path(places["s3://data/mine"]) / "dataset.json").read_text("utf-8"))
    assert all(f"`{name}`" in described for name in info)
    assert isinstance(masks.PREDICTION_SCHEMA, pa.Schema)


def test_metrics_are_told_as_they_are_exported() -> None:
    told = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", section("deployment", "Monitoring"), re.MULTILINE)
    assert told == [(metric.exported, metric.kind, metric.meaning) for metric in metrics.ALL]


def test_the_weights_of_losses_are_the_default_ones() -> None:
    told = re.findall(r"`loss\.(\w+)` \| ([\d.]+) \|", section("method", "Losses (`rssnet/losses.py`)"))
    assert len(told) == 6
    for name, value in told:
        assert getattr(LossConfig(), name) == float(value)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_fields_of_configurations_are_called_what_they_are_called_there(path: Path) -> None:
    groups = "model|loss|optimizer|resources|inference|augmentation"
    for name in re.findall(rf"`((?:{groups})\.[\w.]+)`", path.read_text("utf-8")):
        if name.endswith((".json", ".safetensors")):  # a file of that name
            continue
        kind: type = TrainConfig
        for part in name.split("."):
            assert part in get_type_hints(kind), f"{path.name} speaks of {name}"
            kind = get_type_hints(kind)[part]


@pytest.mark.parametrize("path", [*DOCS, REPOSITORY / "README.md"], ids=lambda path: path.stem)
def test_flags_are_called_what_workflows_call_them(path: Path) -> None:
    known = OF_EVERY_WORKFLOW.union(*(_flags(kind) for kind in CONFIGS.values()))
    prose = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        for flag in re.findall(r"(?<!\S)--([\w.]+)(?![\w-])", code):
            assert flag in known, f"{path.name} speaks of --{flag}"


def _flags(kind: type, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _flags(hint, f"{prefix}{name}.")


def test_every_message_that_is_explained_is_one_that_is_said() -> None:
    said = list(_messages())
    told = re.findall(r"^\| `([^|]+)` \|", text("troubleshooting"), re.MULTILINE)
    assert len(told) > 30
    for message in told:
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(pattern, known) for known in said), f"nothing says: {message}"
    assert not any(re.search("no such message", known) for known in said)


def _messages() -> Iterator[str]:
    """Every text in the pipeline's code, with `…` for each value in it."""
    for path in (REPOSITORY / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
