"""The demo leaves nothing running, also when it is interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.workflows.conftest import ROOT, Run

pytestmark = pytest.mark.slow


def test_a_wrong_data_folder_is_one_clear_line(run_script: Run, tmp_path: Path) -> None:
    finished = run_script("demo", "--data", str(tmp_path), "--output", str(tmp_path / "out"))
    assert finished.code == 1
    assert finished.errors.startswith(f"error: {tmp_path} is not CamVid's folder")
    assert len(finished.errors.strip().splitlines()) == 1


def test_ctrl_c_stops_ray_and_the_s3_server(tmp_path: Path) -> None:
    command = [sys.executable, "workflows/demo.py", "--output", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment.pop("RAY_ADDRESS", None)
    demo = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
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
