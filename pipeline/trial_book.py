"""The book of a sweep: what each trial has tried, reported and cost, kept beside Ray Tune's own state.

The sweep's driver keeps it, as a callback of Ray Tune; so it is written down with Ray Tune's state, and a driver that
takes over goes on with it.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import yaml
from ray import PlacementGroupID, tune
from ray.tune.experiment import Trial as RayTrial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipeline.errors import PipelineError, mendable_cause
from pipeline.objectives import METRICS
from pipeline.schedulers import SweepScheduler
from pipeline.searchers import FAILURE, PLANNED
from pipeline.train_loop import PLACEMENT_GROUP
from pipeline.trial import ERROR, PARENT, RUN, is_out_of_memory

TRIALS_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("trial_id", pa.string()),
        ("parameters", pa.string()),
        *((name, pa.float64()) for name in METRICS),
        ("iterations", pa.int32()),
        ("planned_iterations", pa.int32()),
        ("started", pa.float64()),
        ("seconds", pa.float64()),
        ("device_seconds", pa.float64()),
        ("state", pa.string()),
        ("error", pa.string()),
        ("on_front", pa.bool_()),
        ("parents", pa.list_(pa.int32())),
        ("run", pa.string()),
        ("curve", pa.list_(pa.struct([("iteration", pa.int32()), *((name, pa.float64()) for name in METRICS)]))),
    ]
)


@dataclass
class TrialRecord:
    """One trial of a sweep.

    Args:
        trial: its number, from 0, which is the recipe itself.
        trial_id: Ray Tune's.
        parameters: what is tried, by dotted field name; of a population, what it ends with.
        planned_iterations: of a trial that nobody stops.
        devices: GPUs, or without any CPUs, that it holds while it runs.
        state: `waiting`, `running` or `paused`, and in the end `finished`, `stopped` by the scheduler, `out_of_budget`,
            `out_of_memory` or `failed`.
        curve: each validation that was reported: `iteration`, and the metrics by name.
        seconds: that it has held its devices.
        started: when it first held them, in seconds since 1970; 0 if it never did.
        error: why it has failed.
        parents: of a population: the numbers of the trials whose weights it has taken over, in order.
        run: URL of its training, where the model lies.
    """

    trial: int
    trial_id: str
    parameters: dict[str, Any]
    planned_iterations: int
    devices: float
    state: str = "waiting"
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    started: float = 0.0
    error: str | None = None
    parents: list[int] = field(default_factory=list)
    run: str = ""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last ones reported; none of a trial that has failed."""
        return self.curve[-1] if self.curve and self.state not in FAILED else {}

    @property
    def iterations(self) -> int:
        """How far it got."""
        return int(self.curve[-1]["iteration"]) if self.curve else 0

    @property
    def device_seconds(self) -> float:
        """What it has cost."""
        return self.seconds * self.devices

    @property
    def saved(self) -> float:
        """Device seconds that stopping it early has saved, at the pace that it had."""
        if self.state != "stopped" or not self.iterations:
            return 0.0
        return self.device_seconds * (self.planned_iterations - self.iterations) / self.iterations

    def row(self, on_front: bool) -> dict[str, Any]:
        """Its row of `TRIALS_SCHEMA`."""
        text = yaml.safe_dump(plain(self.parameters), default_flow_style=True, width=10_000, sort_keys=False).strip()
        return {
            "trial": self.trial,
            "trial_id": self.trial_id,
            "parameters": text,
            **{name: self.metrics.get(name) for name in METRICS},
            "iterations": self.iterations,
            "planned_iterations": self.planned_iterations,
            "started": self.started,
            "seconds": self.seconds,
            "device_seconds": self.device_seconds,
            "state": self.state,
            "error": self.error,
            "on_front": on_front,
            "parents": self.parents,
            "run": self.run,
            "curve": self.curve,
        }


FAILED = ("failed", "out_of_memory")
ENDED = ("finished", "stopped", "out_of_budget", *FAILED)
_STATES = {RayTrial.PENDING: "waiting", RayTrial.RUNNING: "running", RayTrial.PAUSED: "paused"}


class NotRestored(PipelineError):
    """Ray Tune was to go on with trials, and would begin anew: it keeps it to itself when it cannot read them."""


class TrialBook(tune.Callback):
    """Keeps a record of every trial, and removes what a trial that was killed has held.

    A trial that the scheduler stops or pauses is killed, and with it what would have removed its workers' placement
    group. Ray Train's own cleaner gives up where several Ray instances run on a host (ray 2.60); the next trial would
    then wait for ever.

    Args:
        planned_iterations, devices: of each trial, as in `TrialRecord`.
        scheduler: of the sweep; what it knows is kept here, where it needs that to go on after a restart.
        resumes: whether Ray Tune is to go on with what a driver that was killed has written down.
        over: is told of each trial that will not be gone on with, not even by a driver that takes over.
    """

    def __init__(
        self,
        planned_iterations: int,
        devices: float,
        scheduler: SweepScheduler,
        resumes: bool = False,
        over: Callable[[TrialRecord], None] | None = None,
    ) -> None:
        self.planned_iterations, self.devices = planned_iterations, devices
        self.scheduler, self.resumes, self.over = scheduler, resumes, over
        self.lock = threading.Lock()
        self._records: dict[str, TrialRecord] = {}
        self._held: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._trials: Sequence[RayTrial] = ()
        self._ended: list[TrialRecord] = []  # since the state was last written down
        self._written: list[TrialRecord] = []  # for the first time then

    @property
    def trials(self) -> list[TrialRecord]:
        """The records, by number."""
        with self.lock:
            return list(self._records.values())

    def busy(self) -> int:
        """How many trials run, or are about to."""
        return sum(trial.status in (RayTrial.PENDING, RayTrial.RUNNING) for trial in self._trials)

    def on_step_begin(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:  # noqa: ARG002
        """Note which trials there are, and which of them run.

        Raises:
            NotRestored: before there is any new trial, if those that are to be gone on with are not there.
        """
        if self.resumes and not self._trials and (not trials or not self._records):
            raise NotRestored(
                "Ray Tune's state of the trials is damaged, or of another version, so none of them was touched: start "
                "afresh with --new true, or choose another place."
            )
        self._trials = trials
        now = time.monotonic()
        for trial in trials:
            record = self._record(trial)
            running = trial.status == RayTrial.RUNNING
            since = self._since.pop(trial.trial_id, None)
            if since is not None:
                record.seconds += now - since
            if running:
                record.started = record.started or time.time()
                self._since[trial.trial_id] = now
            else:
                self._free(trial)
            if trial.status in _STATES:
                record.state = _STATES[trial.status]

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[RayTrial],  # noqa: ARG002
        trial: RayTrial,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Note a validation, or the failure that a trial has reported of itself."""
        record = self._record(trial)
        record.parameters, record.run = dict(trial.config), str(result[RUN])
        record.planned_iterations = int(result.get(PLANNED, record.planned_iterations))
        if result.get(PLACEMENT_GROUP):
            self._held[trial.trial_id] = result[PLACEMENT_GROUP]
        parent = self._records.get(str(result.get(PARENT)))
        if parent is not None:
            record.parents.append(parent.trial)
        if FAILURE in result:
            record.state, record.error = result[FAILURE], result[ERROR]
            return
        point = {name: float(result[name]) for name in METRICS if result.get(name) is not None}
        done = int(result["iteration"])
        with self.lock:  # a training that went on from its last checkpoint may say something again
            record.curve = [earlier for earlier in record.curve if earlier["iteration"] < done]
            record.curve.append({"iteration": done, **point})

    def on_trial_complete(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:  # noqa: ARG002
        """Note that a trial is over, and free what it has held."""
        record = self._record(trial)
        if record.state not in FAILED:
            record.state = "finished" if record.iterations >= record.planned_iterations else "stopped"
        self._free(trial)
        self._ended.append(record)

    def on_trial_error(self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any) -> None:  # noqa: ARG002
        """Note why a trial that was tried often enough is given up."""
        record = self._record(trial)
        error = trial.get_pickled_error() or trial.get_error() or RuntimeError("no reason was given")
        record.state = "out_of_memory" if is_out_of_memory(error) else "failed"
        record.error = one_line(error)
        self._free(trial)

    def on_experiment_end(self, trials: list[RayTrial], **info: Any) -> None:  # noqa: ARG002
        """Free everything, and note which trials the budget has cut short."""
        self.on_step_begin(0, trials)
        for trial in trials:
            record = self._record(trial)
            if trial.status == RayTrial.TERMINATED and record.state not in ENDED:
                done = record.iterations >= record.planned_iterations
                record.state = "finished" if done else "out_of_budget"
            self._free(trial)

    def get_state(self) -> dict[str, Any]:
        """What Ray Tune writes down with its own state, and stores while trials go on.

        So it is the next time that this is asked for that a trial is known to be over whatever is killed.
        """
        over, self._written, self._ended = self._written, self._ended, []
        for record in over:
            if self.over is not None and record.run:
                self.over(record)
        records = [dataclasses.asdict(record) for record in self._records.values()]
        return {"records": records, "scheduler": self.scheduler.known()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with what a driver that was killed has written down."""
        records = [TrialRecord(**values) for values in state["records"]]
        self._records = {record.trial_id: record for record in records}
        if state["scheduler"] is not None:
            self.scheduler.recall(state["scheduler"])

    def _record(self, trial: RayTrial) -> TrialRecord:
        if trial.trial_id not in self._records:
            record = TrialRecord(
                trial=len(self._records),
                trial_id=trial.trial_id,
                parameters=dict(trial.config),
                planned_iterations=self.planned_iterations,
                devices=self.devices,
            )
            with self.lock:
                self._records[trial.trial_id] = record
        return self._records[trial.trial_id]

    def _free(self, trial: RayTrial) -> None:
        group = self._held.pop(trial.trial_id, None)
        if group:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def one_line(error: BaseException) -> str:
    """What has gone wrong, for a table: the sentence for the reader, or the last line of all that Ray says."""
    lines = str(mendable_cause(error) or error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:500]


def plain(value: Any) -> Any:
    """A parameter's value, or a dict of them, as YAML and JSON can hold it."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
