"""How much memory a process has held."""

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Bytes that this process has held at most.

    On Linux not what `getrusage` tells, which begins with what the process held that started this one; elsewhere that.
    """
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:  # not in every sandbox
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
