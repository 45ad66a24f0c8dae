"""The fsspec filesystems that stores are reached through, one for each store, identity and process."""

import functools
import os
from typing import Any

import fsspec

from pipeline.storage_errors import StorageError


def client(scheme: str) -> Any:
    """The filesystem of a store, for this process and what its environment says now.

    Raises:
        StorageError: if the store needs a package that is not installed.
    """
    # fsspec and s3fs keep the client that they first made. Another endpoint or identity in the environment, and another
    # process after a fork, need another one.
    environment = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
    return _client(scheme, environment, os.getpid())


@functools.lru_cache(maxsize=8)
def _client(scheme: str, environment: frozenset[tuple[str, str]], process: int) -> Any:  # noqa: ARG001 - cache keys
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise StorageError(f"{scheme}:// needs a package that is not installed: {error}") from error
