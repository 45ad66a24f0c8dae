"""The script in the CronJob's pod, against a server that answers as the Kubernetes API does for RayJobs."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.infra.manifests import INFRA

PATH = "/apis/ray.io/v1/namespaces/rssnet/rayjobs"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("run_rayjob", INFRA / "kuberay" / "run_rayjob.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_rayjob = _script()
TEMPLATE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "segment", "uid": "1", "resourceVersion": "7", "labels": {"app": "rssnet"}},
    "spec": {"entrypoint": "python x.py", "suspend": True, "activeDeadlineSeconds": 5},
    "status": {"jobDeploymentStatus": "Suspended"},
}


class Api(ThreadingHTTPServer):
    """RayJobs by name; one that was created goes through `statuses`, a look each; `broken` answers come first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rayjobs: dict[str, dict[str, Any]] = {"segment": TEMPLATE}
        self.statuses: list[dict[str, str]] = [{}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}]
        self.broken = 0
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    @property
    def api(self) -> Api:
        assert isinstance(self.server, Api)
        return self.server

    def do_GET(self) -> None:
        name = self.path.removeprefix(f"{PATH}/")
        found = self.api.rayjobs.get(name)
        if found is not None and found is not TEMPLATE:
            statuses = self.api.statuses
            found = found | {"status": statuses.pop(0) if len(statuses) > 1 else statuses[0]}
        self._answer(found)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if self.path != PATH:
            self._answer(None)
        elif name in self.api.rayjobs:
            self._answer({"reason": "AlreadyExists"}, 409)
        else:
            self._answer(body, 201)

    def _answer(self, body: dict[str, Any] | None, code: int = 200) -> None:
        self.api.asked.append(f"{self.command} {self.path.removeprefix(PATH)}")
        well = not self.api.broken and self.headers["Authorization"] == "Bearer secret-token"
        if self.api.broken:
            self.api.broken -= 1
            code = 503
        elif not well:
            code = 403
        elif body is None:
            code = 404
        elif code == 201:  # is there before it is said to be, for it is asked for at once
            self.api.rayjobs[body["metadata"]["name"]] = body
        said = json.dumps(body if well else {}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test says what was asked."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def rayjobs(api: Api, tmp_path: Path) -> Any:
    (tmp_path / "namespace").write_text("rssnet")
    (tmp_path / "token").write_text("secret-token\n")
    return run_rayjob.RayJobs(api.url, tmp_path)


def run(rayjobs: Any) -> bool:
    return run_rayjob.run(rayjobs, "segment", "nightly-29", "uid-of-the-job", poll_seconds=0.01)


def test_a_copy_is_started_and_watched_until_it_has_succeeded(api: Api, rayjobs: Any) -> None:
    assert run(rayjobs)
    made = api.rayjobs["nightly-29-run"]
    assert made["spec"] == {"entrypoint": "python x.py", "suspend": False, "activeDeadlineSeconds": 5}
    assert made["metadata"] == {
        "name": "nightly-29-run",
        "labels": {"app": "rssnet"},
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-29", "uid": "uid-of-the-job"}],
    }
    assert api.asked == ["GET /segment", "POST ", "GET /nightly-29-run", "GET /nightly-29-run"]


def test_a_second_pod_of_the_same_job_watches_what_the_first_has_started(api: Api, rayjobs: Any) -> None:
    assert run(rayjobs)
    first = api.rayjobs["nightly-29-run"]
    assert run(rayjobs)
    assert api.rayjobs["nightly-29-run"] is first


def test_the_copy_is_not_named_like_the_job_for_kuberay_makes_a_job_of_that_name(api: Api, rayjobs: Any) -> None:
    """KubeRay's submitter is a Job with the RayJob's name; where that is taken, nothing is ever submitted."""
    assert run(rayjobs)
    (name,) = set(api.rayjobs) - {"segment"}
    assert name != "nightly-29"
    assert api.rayjobs[name]["metadata"]["ownerReferences"][0]["name"] == "nightly-29"
    assert len(name) - len("nightly-29") + len("nightly-29380935") <= 47  # as KubeRay allows


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        {"jobDeploymentStatus": "ValidationFailed"},
    ],
)
def test_any_other_end_is_a_failure(
    api: Api, rayjobs: Any, status: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    api.statuses = [{"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, status]
    assert not run(rayjobs)
    assert ", ".join(status.values()) in capsys.readouterr().out


def test_an_api_server_that_is_busy_is_waited_for(api: Api, rayjobs: Any) -> None:
    api.broken = 2
    assert run(rayjobs)
    assert api.asked[:3] == ["GET /segment"] * 3


def test_a_refusal_is_said_in_a_sentence(api: Api, rayjobs: Any, tmp_path: Path) -> None:
    del api.rayjobs["segment"]
    with pytest.raises(run_rayjob.Unavailable, match=r"GET .*/rayjobs/segment with 404"):
        run(rayjobs)
    (tmp_path / "token").write_text("another")
    with pytest.raises(run_rayjob.Unavailable, match="403"):
        run(rayjobs)
