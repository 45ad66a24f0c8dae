"""A Ray head node that jobs are submitted to."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pipeline.cluster import LOCAL_ENVIRONMENT


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
        """The process of a head that begins to run, in a session of its own."""
        ports = {
            "--port": _free_port(),
            "--dashboard-port": self.port,
            "--ray-client-server-port": _free_port(),
            "--dashboard-agent-listen-port": _free_port(),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"{name}={port}" for name, port in ports.items()]
        command += ["--dashboard-host=127.0.0.1", f"--object-store-memory={300 * 2**20}", "--disable-usage-stats"]
        with (self.home / "head.log").open("wb") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Until the head takes jobs; AssertionError with its log if it ends before, or takes longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            request = urllib.request.Request(f"{self.address}/api/version")
            request.add_header("Authorization", f"Bearer {self.token}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(request, timeout=5).read()
                return
            time.sleep(0.5)
        raise AssertionError(f"no head after {seconds} s: {(self.home / 'head.log').read_text()[-3000:]}")

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Asks the head to end, and ends it with all that it has started if it does not."""
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    def submit(
        self, *entrypoint: str, token: str | None = None, timeout: float = 500
    ) -> subprocess.CompletedProcess[str]:
        """A command as a job, once it has ended; `subprocess.TimeoutExpired` with what it has said if it does not."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.address]
        command += ["--working-dir", ".", "--", *entrypoint]
        environment = {**self.environment, "RAY_AUTH_TOKEN": token or self.token}
        options: Any = {"cwd": Path(__file__).parents[2], "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, **options, timeout=timeout, check=False)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
