"""Memory that a process has held."""

import subprocess
import sys

import pytest

from pipeline.process_memory import peak_memory

CHILD = "from pipeline.process_memory import peak_memory; print(peak_memory())"


def test_what_was_freed_counts() -> None:
    before = peak_memory()
    for _ in range(2):
        bytearray(before + 100 * 2**20)
    assert peak_memory() > before + 90 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_the_process_held_that_started_this_one_does_not_count() -> None:
    held = bytearray(500 * 2**20)
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert int(child.stdout) < len(held) / 5
