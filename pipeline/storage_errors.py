"""Failures of a store in one sentence each, and the patience to wait for one that is out of reach for a while."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from pipeline.errors import PipelineError
from pipeline.local_files import NOTHING_THERE
from pipeline.redaction import redacted

OUTAGE_SECONDS = 300.0  # that `patiently` waits for a store
_LONGEST_WAIT = 15.0  # seconds between two attempts
# What pyarrow says of answers 5xx; s3fs makes of some of them "device or resource busy".
_OVERLOADED = (
    "SLOW_DOWN",
    "UNAVAILABLE",
    "INTERNAL_FAILURE",
    "THROTTLING",
    "HTTP status 50",
    "RequestTimeout",
    "ConditionalRequestConflict",
)

T = TypeVar("T")


class StorageError(PipelineError):
    """A place that cannot be reached, read or written, with what to do about it."""


class StorageOutage(StorageError):
    """A store that cannot be reached, or asks for patience: the same call may succeed later."""


def patiently(work: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """What `work` returns; while it raises StorageOutage it is done again, with growing pauses.

    For work in the middle of a long job, which an outage of a few minutes must not end. What begins a job fails at
    once, for then a wrong address is the likelier cause.

    Args:
        work: can be repeated.
        seconds: after which the outage is raised.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(StorageOutage),
        wait=wait_random_exponential(multiplier=0.5, max=_LONGEST_WAIT),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return attempts(work)


def explanation(url: str, error: Exception) -> StorageError:
    """The one sentence for a failure of a store's client library, whose classes differ by store and by layer."""
    place, text = redacted(url), str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    scheme, separator, path = url.partition("://")
    if not separator:
        scheme = "file"
    if any(said in text for said in ("bucket does not exist", "NO_SUCH_BUCKET", "NoSuchBucket")):
        return no_bucket(url)
    if scheme != "file" and "/" not in path and "ParamValidationError" in kinds:
        return StorageError(f"{place} is a bucket: name an object or a prefix in it.")
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{place} does not exist: correct the URL, or run the step that writes it.")
    if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
        return StorageError(
            f"{place}: a file and a folder of the same name are in each other's way: choose another place."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"{place}: no space left on the device: free some, or choose another place.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return StorageError(f"{place[:80]}...: the name is too long for this disk: shorten it.")
    if scheme == "file" and isinstance(error, PermissionError):
        return StorageError(f"{place}: permission denied: change the folder's permissions, or choose another place.")
    if "Invalid endpoint" in text:
        endpoint = redacted(os.environ.get("AWS_ENDPOINT_URL", ""))
        return StorageError(f"AWS_ENDPOINT_URL={endpoint} is not a URL: write it like https://host:port.")
    if (
        kinds & {"ConnectionError", "HTTPClientError", "TimeoutError", "ClientConnectionError"}
        or "NETWORK_CONNECTION" in text
    ):
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "the store's default endpoint")
        return StorageOutage(f"{place}: no connection to {redacted(endpoint)}: check AWS_ENDPOINT_URL and the network.")
    busy = getattr(error, "errno", None) == errno.EBUSY or any(said in text for said in _OVERLOADED)
    busy = busy or str(getattr(error, "code", "")).startswith("5")  # gcsfs.retry.HttpError
    if scheme != "file" and busy:
        return StorageOutage(f"{place}: the store is overloaded or failing: try again later ({_short(text)}).")
    if kinds & {"NoCredentialsError", "PartialCredentialsError"}:
        return StorageError(
            f"{place}: no credentials found: set them in the environment or give the machine an identity."
        )
    if isinstance(error, PermissionError) or any(
        said in text for said in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
    ):
        return StorageError(
            f"{place}: access denied: check the credentials in the environment and the bucket's policy."
        )
    return StorageError(f"{place}: {type(error).__name__}: {_short(text)}")


def _short(text: str) -> str:
    # Without pyarrow's "AWS Error", by which Ray Train would know an upload that it should try again after `patiently`.
    return redacted(" ".join(text.replace("AWS Error ", "AWS ").split()))[:300]


def no_bucket(url: str) -> StorageError:
    """That the bucket of a URL does not exist."""
    bucket = url.partition("://")[2].partition("/")[0]
    return StorageError(f"{redacted(url)}: there is no bucket named {bucket}: create it, or correct the name.")


@contextlib.contextmanager
def explained(url: str, *, absence: bool = True) -> Iterator[None]:
    """A `with` block whose errors become a StorageError; that nothing is there only if `absence` is to be explained."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        nothing_there = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in NOTHING_THERE
        nothing_there = nothing_there or "NO_SUCH_KEY" in str(error)  # pyarrow's, of an object that was just deleted
        if nothing_there and not absence:
            raise FileNotFoundError(f"{url} does not exist") from error
        raise explanation(url, error) from error


def explained_items(url: str, items: Iterator[T]) -> Iterator[T]:
    """The items, as they are made; what fails in making them is explained as by `explained`."""
    while True:
        with explained(url):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
