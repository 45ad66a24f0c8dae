"""A Ray head node that jobs are submitted to."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.cluster import LOCAL_ENVIRONMENT

ROOT = Path(__file__).parents[2]


class Head:
    """A Ray head node of its own, with token authentication."""

    def __init__(self, home: Path) -> None:
        self.token, self.home = secrets.token_hex(32), home
        self.port = _free_port()
        self.environment = {
            **os.environ,
            **LOCAL_ENVIRONMENT,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is the head's
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> subprocess.Popen[bytes]:
        ports = {
            "--port": _free_port(),
            "--dashboard-port": self.port,
            "--ray-client-server-port": _free_port(),
            "--dashboard-agent-listen-port": _free_port(),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"{name}={port}" for name, port in ports.items()]
        command += ["--dashboard-host=127.0.0.1", f"--object-store-memory={300 * 2**20}", "--disable-usage-stats"]
        log = (self.home / "head.log").open("wb")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            request = urllib.request.Request(f"{self.address}/api/version")
            request.add_header("Authorization", f"Bearer {self.token}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(request, timeout=5).read()
                return
            time.sleep(0.5)
        raise AssertionError(f"no head after {seconds} s: {(self.home / 'head.log').read_text()[-3000:]}")

    def submit(self, *entrypoint: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.address]
        command += ["--working-dir", ".", "--", *entrypoint]
        environment = {**self.environment, "RAY_AUTH_TOKEN": token or self.token}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
        )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
