"""The launchers of clusters on bare clouds, and the rights that their machines have on buckets."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.manifests import INFRA
from tests.infra.test_docker import ray_node

LAUNCHERS = sorted((INFRA / "cloud").glob("*.yaml"))
POLICIES = sorted((INFRA / "policies").glob("aws-*.json"))
ROLES = sorted((INFRA / "policies").glob("gcp-*.yaml"))
launchers = pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)


def launcher(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


@launchers
def test_ray_accepts_the_launcher(path: Path) -> None:
    config = prepare_config(launcher(path))  # with Ray's defaults of that cloud
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(config | {"max_wokers": 3})


@launchers
def test_workers_are_spot_machines_from_none_to_many_and_the_head_is_not(path: Path) -> None:
    config = launcher(path)
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    spot = "MarketType: spot" if config["provider"]["type"] == "aws" else "provisioningModel: SPOT"
    assert spot not in yaml.safe_dump(head)
    assert set(kinds) == {"cpu", "gpu"}
    for kind in kinds.values():
        assert kind["min_workers"] == 0
        assert spot in yaml.safe_dump(kind)
    assert sum(kind["max_workers"] for kind in kinds.values()) <= config["max_workers"]
    assert kinds["gpu"]["resources"]["GPU"] == 1


@launchers
def test_nodes_are_started_by_commands_that_ray_accepts_behind_a_token(path: Path) -> None:
    config = launcher(path)
    head = ray_node(shlex.split(config["head_start_ray_commands"][-1]))
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["num_cpus"] == 0
    worker = ray_node(shlex.split(config["worker_start_ray_commands"][-1]))
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    version = re.search(r'__version__ = "(.+)"', (INFRA.parent / "rssnet/__init__.py").read_text("utf-8"))
    assert version
    assert config["docker"]["image"].endswith(f"/rssnet:{version.group(1)}-cuda")


def test_machines_of_aws_do_not_give_their_keys_to_whoever_asks_once() -> None:
    for kind in launcher(INFRA / "cloud" / "aws.yaml")["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_each_machine_of_aws_has_a_profile_whose_policies_are_told_and_the_head_may_give_workers_theirs() -> None:
    config = launcher(INFRA / "cloud" / "aws.yaml")
    for name, kind in config["available_node_types"].items():
        role = "rssnet-head" if name == config["head_node_type"] else "rssnet-worker"
        assert kind["node_config"]["IamInstanceProfile"] == {"Name": role}
    policy = json.loads((INFRA / "policies" / "aws-head.json").read_text("utf-8"))
    (passes,) = (statement for statement in policy["Statement"] if statement["Action"] == "iam:PassRole")
    assert passes["Resource"] == "arn:aws:iam::*:role/rssnet-worker"
    told = (INFRA / "cloud" / "aws.yaml").read_text("utf-8").partition("cluster_name")[0]
    assert all(path.name in told for path in POLICIES)


def test_only_machines_take_the_roles_of_the_launcher() -> None:
    (statement,) = json.loads((INFRA / "policies" / "trust-ec2.json").read_text("utf-8"))["Statement"]
    assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert statement["Action"] == "sts:AssumeRole"


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_allows_named_actions_on_named_places_only(path: Path) -> None:
    policy = json.loads(path.read_text("utf-8"))
    assert policy["Version"] == "2012-10-17"
    assert len({statement["Sid"] for statement in policy["Statement"]}) == len(policy["Statement"])
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        actions, resources = _listed(statement["Action"]), _listed(statement["Resource"])
        assert all(re.fullmatch(r"(s3|ec2|iam):[A-Z][A-Za-z]+", action) for action in actions)
        if any(action.startswith("s3:") for action in actions):
            assert all(re.fullmatch(r"arn:aws:s3:::rssnet-\w+(/.*)?", resource) for resource in resources)
            of_buckets = {"s3:ListBucket", "s3:GetBucketLocation"}
            for resource in resources:
                assert ("/" in resource) == (not set(actions) & of_buckets), "rights of buckets and of objects differ"
        elif resources == ["*"]:
            assert all(action.startswith("ec2:Describe") for action in actions)


@pytest.mark.parametrize(
    ("name", "written"), [("aws-ingest", "rssnet-data"), ("aws-train", "rssnet-runs"), ("aws-segment", "rssnet-masks")]
)
def test_a_job_may_write_to_the_place_of_its_output_alone(name: str, written: str) -> None:
    policy = json.loads((INFRA / "policies" / f"{name}.json").read_text("utf-8"))
    writable = {
        resource
        for statement in policy["Statement"]
        if {"s3:PutObject", "s3:DeleteObject"} & set(_listed(statement["Action"]))
        for resource in _listed(statement["Resource"])
    }
    assert writable == {f"arn:aws:s3:::{written}/*"}


@pytest.mark.parametrize("path", ROLES, ids=lambda path: path.stem)
def test_a_role_of_gcp_is_about_objects_of_buckets_and_a_reader_only_reads(path: Path) -> None:
    role = yaml.safe_load(path.read_text("utf-8"))
    assert set(role) == {"title", "description", "stage", "includedPermissions"}
    permissions = role["includedPermissions"]
    assert permissions == sorted(permissions)
    assert all(re.fullmatch(r"storage\.(buckets|objects|multipartUploads)\.[a-z]+", each) for each in permissions)
    if path.stem == "gcp-reader":
        assert {each.rpartition(".")[2] for each in permissions} == {"get", "list"}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
