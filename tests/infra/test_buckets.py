"""The stores that come with the local clusters have the buckets that jobs read and write."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
import yaml

from pipeline.local_s3 import LocalS3
from tests.infra.manifests import INFRA, KUBERAY, documents, rendered, strings

COMPOSE = INFRA / "compose" / "compose.yaml"
OVERLAY = KUBERAY / "overlays" / "local"


def in_compose() -> str:
    (script,) = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]["buckets"]["command"]
    return script


def in_kubernetes() -> str:
    (job,) = (each for each in documents(OVERLAY / "s3.yaml") if each["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    return script


@pytest.mark.parametrize("script", [in_compose, in_kubernetes])
def test_every_bucket_that_a_job_names_is_made_and_made_again_without_harm(
    script: Callable[[], str], tmp_path: Path
) -> None:
    named = set(re.findall(r"s3://(rssnet-\w+)", (INFRA.parent / "docs" / "deployment.md").read_text("utf-8")))
    for manifest in rendered(OVERLAY):
        named |= {bucket for text in strings(manifest) for bucket in re.findall(r"s3://(rssnet-\w+)", text)}
    assert len(named) >= 4
    with LocalS3(tmp_path):
        for _ in range(2):
            subprocess.run([sys.executable, "-c", script()], check=True, timeout=120)
        made = {bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]}
    assert named <= made
