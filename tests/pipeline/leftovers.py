"""What work on a cluster must not leave behind: actors and placement groups."""

import gc
import time

import ray
from ray.util import placement_group_table

# Ray Data keeps some actors of its own, and Ray Train's cleaner outlives what it cleans up after.
RAYS_OWN = (
    "_StatsActor",
    "_AutoscalingCoordinatorActor",
    "ActorLocationTracker",
    "DatasetManager",
    "PlacementGroupCleaner",
)


def living_actors() -> list[str]:
    """Classes of the actors that are not Ray's own."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]  # pyright: ignore
    return [actor["ActorClassName"] for actor in actors if actor["ActorClassName"] not in RAYS_OWN]


def held_groups() -> list[str]:
    """Placement groups that are not removed."""
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def await_release() -> None:
    """Placement groups and processes go some time after the work that they belonged to.

    The actors of work that has failed go with the frames of its exception, which only the collector finds.
    """
    deadline = time.monotonic() + 60
    while (left := (held_groups(), living_actors())) != ([], []):
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(1)
