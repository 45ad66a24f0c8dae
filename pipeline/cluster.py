"""Connecting to Ray: the job's cluster, the caller's, or a local one that is stopped again."""

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from pipeline.errors import PipelineError

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A `with` block in which Ray is connected.

    A Ray that the caller has already started is used and left running. Under `ray job submit`, or wherever RAY_ADDRESS
    is set, that cluster is joined. Otherwise a local Ray is started, and stopped at the end of the block, whatever ends
    it.

    Raises:
        PipelineError: if RAY_ADDRESS is set but no cluster answers there.
    """
    _quiet_data()
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address="auto" if address == "auto" else address, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise PipelineError(
                f"No Ray cluster answers at RAY_ADDRESS={address}: correct it, or unset it to start a local Ray."
            ) from error
    else:
        # Workers inherit it: OpenMP threads that spin while they wait for each other halve the speed of a shared machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # The dashboard is what removes the placement groups of killed trials (ray 2.60), so a sweep needs it.
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 2),  # one core must still decode beside a worker
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            **quiet,
        )
    for name in ("ray.train", "ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the stages say what they do and what went wrong
    try:
        yield
    finally:
        ray.shutdown()


def _quiet_data() -> None:
    """Let Ray Data raise what a stage's own function raised, unwrapped, and leave saying so to the stage."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # its wrapper drops the cause, and with it the sentence for the reader
