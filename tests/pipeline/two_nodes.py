"""Trainings on two Ray nodes of one machine, to one of which something happens; `test_training_faults.py` runs this.

A process of its own, for a test session has one Ray already.
"""

import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.scripts import scripts as ray_cli

from pipeline.train_config import TrainConfig
from pipeline.training import train
from tests.pipeline.training_runs import has_checkpoint

NODE_CPUS = 1  # one worker, and what feeds it


class TwoNodes:
    """A head and a second node, each with room for one worker."""

    def __init__(self) -> None:
        node: dict[str, Any] = {"num_cpus": NODE_CPUS, "object_store_memory": 100 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.second = self.cluster.add_node(**node)
        self.node = node
        ray.init(address=self.cluster.address, log_to_driver=False)

    def kill_second(self) -> None:
        """As a machine that loses power."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def replace_second(self) -> None:
        self.kill_second()
        self.second = self.cluster.add_node(**self.node)

    def announce_preemption(self) -> None:
        """As a cloud does minutes before it takes a spot machine back."""
        ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        (other,) = set(ids) - {ray.get_runtime_context().get_node_id()}
        arguments = ["--address", self.cluster.address, "--node-id", other]
        arguments += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        arguments += ["--deadline-remaining-seconds", "600"]
        ray_cli.drain_node.main(arguments, standalone_mode=False)


def main(config_file: str, fault: str) -> None:
    config: TrainConfig = pickle.loads(Path(config_file).read_bytes())
    nodes = TwoNodes()
    happens = {"none": lambda: None, "kill": nodes.kill_second, "replace": nodes.replace_second}
    happens["preempt"] = nodes.announce_preemption
    with ThreadPoolExecutor(1) as executor:  # nodes can be added in the main thread alone
        training = executor.submit(train, config)
        while not has_checkpoint(config.run) and not training.done():
            time.sleep(0.05)
        if not training.done():
            happens[fault]()
            print(f"{fault} has happened", flush=True)
        training.result()
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
