"""Connecting to Ray: the job's cluster, the caller's, or a local one that is stopped again."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

from pipeline.errors import PipelineError
from pipeline.progress import announce
from pipeline.storage_errors import StorageOutage

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
# Of a Ray that is started here, and of its workers.
LOCAL_ENVIRONMENT = {
    # OpenMP threads that spin while they wait halve the speed of a machine that others use too.
    "OMP_WAIT_POLICY": "PASSIVE",
    # More idle workers than cores are ended after a second by default, and the next task waits for a new one to import
    # torch: on two cores that took a fifth of the time.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
IO_TASK_CPUS = 0.25  # of a task that reads, decodes or encodes: it mostly waits for storage


def io_task(function: Callable[..., Any], num_cpus: float = IO_TASK_CPUS) -> Any:
    """A function as a Ray task that is repeated when its node is lost, or the store is out of reach."""
    outages: Any = [StorageOutage]  # ray's own annotation knows True alone
    return ray.remote(num_cpus=num_cpus, max_retries=3, retry_exceptions=outages)(function)


class Interrupted(BaseException):
    """Ctrl-C or a termination signal, where Ray would make of it an exit with code 0 or a work that looks finished."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A `with` block in which a termination signal (SIGTERM) ends the work as Ctrl-C does; further ones are ignored.

    Without it Python ends at once and leaves things as they are, and Ray exits with a code and a text of its own. It is
    for whatever runs in the main thread; elsewhere it changes nothing.

    Raises:
        KeyboardInterrupt: if the signal comes. Whatever else a handler raises, `ray.get` would keep to itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what has to be tidied up is tidied up once
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A `with` block around Ray Train or Ray Tune, after which Ctrl-C means again what it meant before.

    Ray Train 2.60 puts a handler of its own in place, which leaves the process with exit code 0, and does not take it
    away again; Ray Tune's makes an interrupted search look like a finished one.

    Raises:
        Interrupted: if Ray ends the process inside the block.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not in_main_thread:  # a trial that Ray Tune stops
            raise
        raise Interrupted("the process was asked to end") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def require_capacity(cpus: float, gpus: float, what: str, remedy: str) -> None:
    """Refuse what this machine can never run; on a cluster that was joined by its address, which may grow, say so.

    Args:
        cpus, gpus: that all of it needs at the same time.
        what: in words, e.g. `2 workers and the tasks beside`.
        remedy: what to lower.

    Raises:
        PipelineError: naming what is needed and what there is.
    """
    there = ray.cluster_resources()
    have = {"CPU": there.get("CPU", 0.0), "GPU": there.get("GPU", 0.0)}
    if cpus <= have["CPU"] + 1e-6 and gpus <= have["GPU"]:
        return
    text = f"{what} need {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has {have['CPU']:g} and {have['GPU']:g}"
    if not os.environ.get("RAY_ADDRESS"):
        raise PipelineError(f"{text}: {remedy}.")
    announce(f"  {text}: not all of the work begins before it grows")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A `with` block in which Ray is connected.

    A Ray that the caller has already started is used and left running. Under `ray job submit`, or wherever RAY_ADDRESS
    is set, that cluster is joined. Otherwise a local Ray is started, and stopped at the end of the block, whatever ends
    it.

    Raises:
        PipelineError: if RAY_ADDRESS is set but no cluster answers there.
    """
    started = not ray.is_initialized()
    with terminable():
        connect()
        with terminable():  # again, for Ray has put a handler of its own in place
            try:
                yield
            finally:
                if started:
                    ray.shutdown()


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local Ray, if this process is not connected yet.

    Never the one whose address another process has left on this machine, which may long be gone.

    Raises:
        PipelineError: if RAY_ADDRESS is set but no cluster answers there.
    """
    _quiet_data()
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address="auto" if address == "auto" else address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise PipelineError(
                f"The Ray cluster at RAY_ADDRESS={address} cannot be joined ({_first_line(error)}): "
                "correct the address, or unset it to start a local Ray."
            ) from error
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # The dashboard is what removes the placement groups of killed trials (ray 2.60), so a sweep needs it.
        try:
            ray.init(
                address="local",
                num_cpus=max(2, os.cpu_count() or 2),  # one core must still decode beside a worker
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                **quiet,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise PipelineError(
                f"A local Ray could not be started ({_first_line(error)}): "
                "check free ports, and free space on the disk and in /dev/shm."
            ) from error
    for name in ("ray.train", "ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the stages say what they do and what went wrong


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _quiet_data() -> None:
    """Let Ray Data raise what a stage's own function raised, unwrapped, and leave saying so to the stage."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # its wrapper drops the cause, and with it the sentence for the reader
