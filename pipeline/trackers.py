"""Logs of a run on tracking servers, MLflow and Weights & Biases, that never hold up or end the run.

Where a server is, and who one is there, comes from the environment, as the tracker's own documentation says.
"""

import importlib.util
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.redaction import redacted
from pipeline.run_record import flat, identity

PROJECT = "rssnet"  # among the experiments of a server, unless the tracker's own environment variable names another
WAITING = 1000  # points that may wait for a slow server; what is more is lost
CLOSING_SECONDS = 60.0  # that the end of a run waits for a server


def tracker_names(text: str | None) -> list[str]:
    """The trackers of a list separated by commas.

    Raises:
        PipelineError: for one that is not known, or whose package is not installed.
    """
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in _CLIENTS:
            raise PipelineError(f"The tracker {name!r} is not known: give some of {', '.join(_CLIENTS)}.")
        if importlib.util.find_spec(name) is None:
            raise PipelineError(f"trackers names {name}, which is not installed: pip install {name}, or leave it out.")
    return names


def start_tracker(name: str, config: Any, known: dict[str, str]) -> "Tracker":
    """The log of a training on a server, with the same curves where the server knows the run.

    Args:
        name: of the tracker.
        config: the training's, with `run`, its URL.
        known: by name, what the run is called on a server; what it is called now is put there.

    Raises:
        PipelineError: if the server cannot be reached, or does not know who asks.
    """
    try:
        client = _CLIENTS[name](config.run, identity(config), known.get(name))
    except Exception as error:  # of whatever kind the tracker's own client has
        reason = redacted(str(error).strip().partition("\n")[0])[:300] or type(error).__name__
        raise PipelineError(
            f"The tracker {name} cannot be started ({reason}): set what its documentation asks for in the environment, "
            "or leave it out of trackers."
        ) from error
    known[name] = client.run_id
    return Tracker(name, client)


class _Client(Protocol):
    run_id: str

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """A log that a thread of its own sends to a server, point after point.

    Attributes:
        lost: why points are missing there, for a person to read; empty while none is.
    """

    def __init__(self, name: str, client: _Client) -> None:
        self.lost = ""
        self._name, self._client = name, client
        self._points = queue.Queue[tuple[int, Mapping[str, float]] | bool](WAITING)
        self._thread = threading.Thread(target=self._send, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to each of some curves; not a number is none."""
        self._put((iteration, {name: value for name, value in scalars.items() if math.isfinite(value)}))

    def close(self, failed: bool) -> None:
        """Say to the server that the run is over, and wait a while for it to have heard of all."""
        self._put(failed)
        self._thread.join(CLOSING_SECONDS)

    def _put(self, item: tuple[int, Mapping[str, float]] | bool) -> None:
        try:
            self._points.put_nowait(item)
        except queue.Full:
            self.lost = f"{self._name} lacks points (too slow)"

    def _send(self) -> None:
        while True:
            item = self._points.get()
            try:
                if isinstance(item, bool):
                    self._client.close(item)
                    return
                self._client.add(*item)
            except Exception as error:  # of whatever kind the tracker's own client has
                self.lost = f"{self._name} lacks points ({type(error).__name__})"
                if isinstance(item, bool):
                    return


class _MLflow:
    def __init__(self, run: str, config: Mapping[str, Any], run_id: str | None) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)).experiment_id
        self.run_id = self._client.create_run(experiment, run_name=_name(run), tags={"url": run}).info.run_id
        for field, value in flat(config).items():
            self._client.log_param(self.run_id, field, str(value)[:500])

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self.run_id, name, value, step=iteration)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


class _Wandb:
    def __init__(self, run: str, config: Mapping[str, Any], run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(run),
            id=run_id,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run_id = self._run.id

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2]


_CLIENTS: dict[str, Callable[[str, Mapping[str, Any], str | None], _Client]] = {"mlflow": _MLflow, "wandb": _Wandb}
