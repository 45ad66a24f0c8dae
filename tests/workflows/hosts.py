"""Hosts with addresses of their own on one machine: network namespaces, joined by a switch whose ports can be cut.

Processes of different hosts reach each other through that switch alone, and nothing else reaches them or is reached.
They share the machine's disk.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO

NETWORK = "10.77.0"
STOP_SECONDS = 20.0


def why_not() -> str | None:
    """Why there can be no network namespaces here; None if there can."""
    if shutil.which("ip") is None:
        return "no network namespaces: the command ip is not installed"
    name = f"rn{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespaces: {made.stderr.strip()}"
    bridged = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "bridge", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None if bridged.returncode == 0 else f"no bridges in network namespaces: {bridged.stderr.strip()}"


class Hosts(AbstractContextManager["Hosts"]):
    """Some hosts, for the time of a `with` block; at its end all that was started on them is ended.

    Args:
        names: of the hosts; each has the address `10.77.0.N`, N being its place in the list, from 1.
        environment: of all that runs on them.
    """

    def __init__(self, names: Sequence[str], environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
        self._prefix = f"rn{os.getpid()}"
        self._stack = ExitStack()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        with ExitStack() as stack:
            self._add_namespace(stack, "switch")
            self._ip("switch", "link", "add", "name", "bridge", "type", "bridge")
            self._ip("switch", "link", "set", "dev", "bridge", "up")
            for name, address in self.addresses.items():
                self._add_namespace(stack, name)
                port = [
                    "link",
                    "add",
                    "name",
                    name,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    self._namespace(name),
                ]
                self._ip("switch", *port)
                self._ip("switch", "link", "set", "dev", name, "master", "bridge", "up")
                self._ip(name, "address", "add", f"{address}/24", "dev", "eth0")
                self._ip(name, "link", "set", "dev", "eth0", "up")
                self._ip(name, "link", "set", "dev", "lo", "up")
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, host: str, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a host, in a process group of its own; what it says goes to a file."""
        with log.open("wb") as output:
            process = self._popen(host, command, output)
        self._started.append(process)
        return process

    def run(self, host: str, command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; what it says on both ways out is in `stdout`."""
        with tempfile.TemporaryFile() as output:
            process = self._popen(host, command, output)
            self._started.append(process)
            code = process.wait(timeout)
            output.seek(0)
            return subprocess.CompletedProcess(list(command), code, output.read().decode(errors="replace"))

    def cut(self, host: str) -> None:
        """Pull the plug of a host: from now on it reaches nobody, and nobody reaches it."""
        self._ip("switch", "link", "set", "dev", host, "down")

    def _popen(self, host: str, command: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self._namespace(host), *command]
        return subprocess.Popen(
            inside, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _add_namespace(self, stack: ExitStack, name: str) -> None:
        subprocess.run(["ip", "netns", "add", self._namespace(name)], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", self._namespace(name)], check=True)

    def _ip(self, host: str, *arguments: str) -> None:
        subprocess.run(["ip", "-n", self._namespace(host), *arguments], check=True)

    def _end(self) -> None:
        """End what was started, and whatever else still runs in the namespaces, which nobody else has."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in self.addresses:
            listed = subprocess.run(
                ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True, check=True
            )
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
