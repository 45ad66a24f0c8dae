"""Sweeps that take minutes: over two nodes, and over so many trials that anything left behind would show."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweep import sweep
from pipeline.warm_start import read_trials
from tests.pipeline.leftovers import await_release, living_actors
from tests.pipeline.test_sweep import REPOSITORY, config_of, scenes, stop_all_but_the_first

__all__ = ["scenes"]  # a fixture
pytestmark = pytest.mark.heavy
TWO_NODES_SCRIPT = """
import pickle, sys
import ray
from pipeline.sweep import sweep
from tests.pipeline.two_nodes import TwoNodes
nodes = TwoNodes()
sweep(pickle.load(open(sys.argv[1], "rb")))
ray.shutdown()
nodes.cluster.shutdown()
"""


def test_eight_trials_on_two_nodes(scenes: str, tmp_path: Path) -> None:
    """Under ASHA with Optuna. Each node has room for one trial, so that two at a time are on two nodes."""
    config = config_of(scenes, tmp_path / "sweep", trials=8)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", TWO_NODES_SCRIPT, str(tmp_path / "config.pickle")]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=850)
    trials = read_trials(config.run)
    assert len(trials) == 8
    assert {trial.state for trial in trials} <= {"finished", "stopped"}
    assert trials[0].state == "finished"
    spans = sorted((trial.started, trial.started + trial.seconds) for trial in trials)
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans)), "one after the other"


@pytest.mark.timeout(3600)
def test_fifty_trials_leave_nothing_behind(scenes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first are stopped at their first validation, and killed: no group, no process, no orphaned folder."""
    stop_all_but_the_first(monkeypatch)
    before = living_actors()
    config = config_of(scenes, tmp_path / "sweep", trials=50, searcher="random", fixed={"iterations": 4})
    assert sweep(config).counts == {"trials": 50, "failed": 0}
    trials: list[Any] = read_trials(config.run)
    assert [trial.state for trial in trials[1:]] == ["stopped"] * 49
    await_release()
    assert living_actors() == before
    folders = {folder.name for folder in (tmp_path / "sweep" / "trials").iterdir()}
    assert folders == {trial.trial_id for trial in trials}
