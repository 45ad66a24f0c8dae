"""Writing to storage while something else goes on: one thing after the other, and with patience for outages."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.storage_errors import patiently


class Uploads:
    """Calls that another thread makes in the order in which they were handed in, each until its store is reachable.

    What a call writes must not change any more: hand in bytes, or files that nobody touches.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._pending: deque[Future[None]] = deque()

    def add(self, write: Callable[[], None]) -> None:
        """Let `write` be called soon.

        Raises:
            Exception: what an earlier one has raised.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(patiently, write))

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            Exception: what one of them has raised.
        """
        while self._pending:
            self._pending.popleft().result()
        self._executor.shutdown()
