"""Segmentation every night: by cron, by a Kubernetes CronJob, and by a RayCronJob."""

import datetime
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cronsim import CronSim, CronSimError
from ray.dashboard.modules.job.cli import submit

from pipeline.segment_config import SegmentConfig
from tests.infra.manifests import INFRA, KUBERAY, Manifest, faults, rendered
from tests.workflow_calls import calls_in, parsed

CRONTAB = INFRA / "schedule" / "segment.crontab"
NIGHTLY = "15 2 * * *"


def crontab() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The settings of the crontab, and its (schedule, command) lines."""
    settings, entries = {}, []
    for line in CRONTAB.read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        setting = re.match(r"(\w+)=(.*)", line)
        if setting:
            settings[setting.group(1)] = setting.group(2)
        else:
            fields = line.split(maxsplit=5)
            entries.append((" ".join(fields[:5]), fields[5]))
    return settings, entries


def nightly(name: str, kind: str) -> Manifest:
    folder = KUBERAY / name
    (found,) = (each for each in rendered(folder) if each["kind"] == kind)
    return found


def require_valid(schedule: str) -> None:
    """Raise CronSimError for what is no cron expression."""
    next(CronSim(schedule, datetime.datetime(2026, 1, 1)))


def test_the_crontab_has_valid_times_and_commands_that_a_shell_reads() -> None:
    _, entries = crontab()
    assert entries
    for schedule, command in entries:
        require_valid(schedule)
        assert not re.search(r"(?<!\\)%", command), "cron makes line ends of % signs"
        subprocess.run(["bash", "-n", "-c", command], check=True)
    with pytest.raises(CronSimError):
        require_valid("15 25 * * *")


def test_what_cron_runs_is_a_valid_ray_job_submit_of_a_valid_workflow() -> None:
    settings, entries = crontab()
    assert settings["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in settings
    for _, command in entries:
        words = shlex.split(command.rpartition("&&")[2])
        assert words[:3] == [".venv/bin/ray", "job", "submit"]
        with submit.make_context("ray job submit", words[3:]) as context:
            assert context.params["working_dir"] == "."
            assert context.params["no_wait"] is False  # else a failed night would be silent
            (call,) = calls_in(" ".join(context.params["entrypoint"]))
        assert isinstance(parsed(call), SegmentConfig)


def test_one_entry_segments_what_is_new_and_another_one_merges_small_files_of_the_same_output() -> None:
    configs = [parsed(call) for _, command in crontab()[1] for call in calls_in(command)]
    every_night, weekly = configs
    assert every_night.model
    assert not every_night.new
    assert weekly.compact
    assert not weekly.model
    assert weekly.out == every_night.out


def test_the_cron_job_lets_no_two_nights_overlap_and_gives_up_a_late_one() -> None:
    spec = nightly("base", "CronJob")["spec"]
    assert spec["schedule"] == NIGHTLY == crontab()[1][0][0]
    require_valid(spec["schedule"])
    assert spec["concurrencyPolicy"] == "Forbid"
    assert 0 < spec["startingDeadlineSeconds"] < 24 * 3600
    rayjob = next(each for each in rendered(KUBERAY / "base") if each["metadata"]["name"] == "segment")
    # Else the watcher would end first, and the next night could begin beside this one.
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] >= rayjob["spec"]["activeDeadlineSeconds"] + 3600


def test_the_cron_job_starts_a_ray_job_that_is_there_by_a_script_that_is_there() -> None:
    (container,) = nightly("base", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    python, script, name = container["command"]
    assert python == "python"
    assert (INFRA.parent / Path(script).relative_to("/opt/rssnet")).is_file()
    assert nightly("base", "CronJob")["metadata"]["namespace"] == "rssnet"
    assert name in {each["metadata"]["name"] for each in rendered(KUBERAY / "base") if each["kind"] == "RayJob"}


def test_its_account_may_start_ray_jobs_and_look_at_them_and_nothing_else() -> None:
    manifests = rendered(KUBERAY / "base")
    account = nightly("base", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"]
    bindings = [
        each
        for each in manifests
        if each["kind"] in ("RoleBinding", "ClusterRoleBinding")
        and account in {subject["name"] for subject in each["subjects"]}
    ]
    (binding,) = bindings
    assert binding["kind"] == "RoleBinding"
    roles = {each["metadata"]["name"]: each["rules"] for each in manifests if each["kind"] == "Role"}
    assert roles[binding["roleRef"]["name"]] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]


def test_the_ray_cron_job_runs_what_the_cron_job_starts(tmp_path: Path) -> None:
    folder = tmp_path / "overlay"
    folder.mkdir()
    base, component = (os.path.relpath(KUBERAY / name, folder) for name in ("base", "raycronjob"))  # as kustomize wants
    (folder / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    manifests = {(each["kind"], each["metadata"]["name"]): each for each in rendered(folder)}
    assert ("CronJob", "nightly") not in manifests
    scheduled, template = manifests["RayCronJob", "nightly"], manifests["RayJob", "segment"]
    assert not list(faults(scheduled))
    assert scheduled["spec"]["schedule"] == NIGHTLY
    assert scheduled["metadata"]["namespace"] == template["metadata"]["namespace"]
    assert scheduled["spec"]["jobTemplate"] | {"suspend": True} == template["spec"]
