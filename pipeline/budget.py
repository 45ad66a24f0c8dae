"""What a sweep may cost, and when it is spent."""

import time
from typing import Any

from ray import tune

_RESTART_GAP = 60.0  # seconds between two looks that are no more than a restart of the driver


class Budget(tune.Stopper):
    """Ends a sweep when its hours are spent, also those of drivers before a restart.

    Ray Tune writes it down with its own state. Wall time is looked at all the time; what devices have cost, whenever a
    trial reports, so that each running trial may go beyond it by what lies between two of its validations.

    Args:
        hours: of wall time, while a driver runs; None for no limit.
        device_hours: of GPUs, or without any of CPUs, that trials hold; None for no limit.
        devices: that a trial holds.
    """

    def __init__(self, hours: float | None, device_hours: float | None, devices: float) -> None:
        self.hours, self.device_hours, self.devices = hours, device_hours, devices
        self._seconds = 0.0
        self._looked: float | None = None
        self._device_seconds = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Note what a trial has cost since it last reported; no single trial is stopped here.

        Its whole time would not do: Ray Tune counts that anew when it starts a trial again.
        """
        self._device_seconds += float(result.get("time_this_iter_s", 0.0)) * self.devices
        return False

    def stop_all(self) -> bool:
        """Whether the budget is spent."""
        now = time.time()
        if self._looked is not None:
            self._seconds += min(max(now - self._looked, 0.0), _RESTART_GAP)
        self._looked = now
        return _reached(self._seconds, self.hours) or _reached(self._device_seconds, self.device_hours)


def _reached(seconds: float, hours: float | None) -> bool:
    return hours is not None and seconds >= 3600 * hours
