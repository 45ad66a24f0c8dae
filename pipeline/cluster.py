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
        # The dashboard is what removes the placement groups of killed trials (ray 2.60), so a sweep needs it.
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            **quiet,
        )
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the stages announce what they do themselves
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
