"""The demo leaves nothing running, also when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import psutil
import pytest
from PIL import Image

from pipeline.masks import decode, read_masks
from tests.workflows.conftest import ROOT, Run

pytestmark = pytest.mark.slow


def test_a_wrong_data_folder_is_one_clear_line(run_script: Run, tmp_path: Path) -> None:
    finished = run_script("demo", "--data", str(tmp_path), "--output", str(tmp_path / "out"))
    assert finished.code == 1
    assert finished.errors.startswith(f"error: {tmp_path} is not CamVid's folder")
    assert len(finished.errors.strip().splitlines()) == 1


def test_ctrl_c_stops_ray_and_the_s3_server(tmp_path: Path) -> None:
    command = [sys.executable, "workflows/demo.py", "--output", str(tmp_path / "out")]
    environment = _own_environment()
    demo = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=_heed_ctrl_c,
    )  # fmt: skip
    assert demo.stdout is not None
    said = []
    for line in demo.stdout:
        said.append(line)
        if "[1/6] ingest" in line:
            break
    else:
        pytest.fail("".join(said))
    time.sleep(2)
    children = psutil.Process(demo.pid).children(recursive=True)
    names = " ".join(" ".join(child.cmdline()) for child in children)
    assert "raylet" in names
    assert "moto" in names
    demo.send_signal(signal.SIGINT)
    assert demo.wait(90) == 130
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.camvid
@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_camvid_to_its_end_and_a_second_time(camvid: Path, tmp_path: Path) -> None:
    command = [sys.executable, "workflows/demo.py", "--data", str(camvid), "--output", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, env=_own_environment(), capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]

    masks = f"{tmp_path}/s3/camvid/results/segment"
    assert duckdb.connect().execute(f"SELECT count(*) FROM '{masks}/masks/*.parquet'").fetchall() == [(101,)]
    photographs = {file.name: Image.open(file).size for file in (camvid / "val").glob("*.jpg")}
    assert len(photographs) == 101
    found = {row["image_uri"].rpartition("/")[2]: row for row in read_masks(masks).to_pylist()}
    assert len(found) == 101
    assert {name: (row["width"], row["height"]) for name, row in found.items()} == photographs
    assert {name: decode(row).shape[::-1] for name, row in found.items()} == photographs
    assert {row["status"] for row in found.values()} == {"ok"}

    scores = json.loads((tmp_path / "s3/camvid/results/evaluate/scores.json").read_text())
    assert scores["miou"] >= 0.20
    assert scores["aacc"] >= 0.60
    report = (tmp_path / "camvid-report.html").read_text()
    assert f"{scores['miou']:.3f}" in report
    assert f"{scores['aacc']:.3f}" in report

    again = subprocess.run(command, cwd=ROOT, env=_own_environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    for stage in ("ingested", "trained", "evaluated", "swept", "reported"):
        assert f"already {stage}" in again.stdout
    assert "nothing new: all 101 images" in again.stdout


def _heed_ctrl_c() -> None:
    """A shell that runs the tests in the background lets its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _own_environment() -> dict[str, str]:
    """Without the S3 server and the Ray of the other tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_") and name != "RAY_ADDRESS"}
