"""Start a RayJob as a copy of one that stands suspended in the same namespace, and watch it until it ends.

    python run_rayjob.py segment

It runs in the pod of a Kubernetes Job, which a CronJob makes every night. The copy's name is made of the Job's, so that
a second pod of the same Job watches what the first one has started, but is another one: KubeRay makes a Job with the
RayJob's own name, the submitter, and takes one that is there already for it. The copy belongs to the Job of the night,
with which Kubernetes deletes it. Exit code 0 means that the RayJob has succeeded, 1 anything else. The pod's account
needs `create` and `get` of rayjobs, and nothing else.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

CREDENTIALS = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_SECONDS = 30.0
ENDED = {"Complete", "Failed", "ValidationFailed"}  # jobDeploymentStatus of a RayJob that will not go on


class Unavailable(Exception):
    """What the API server has refused, in a sentence."""


class RayJobs:
    """The RayJobs of a namespace, seen with the pod's own account.

    Args:
        api: URL of the API server.
        credentials: folder of the account's `token`, `namespace` and, for https, `ca.crt`.
    """

    def __init__(self, api: str, credentials: Path = CREDENTIALS) -> None:
        namespace = (credentials / "namespace").read_text().strip()
        self._url = f"{api}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = credentials / "token"
        self._session = requests.Session()
        self._session.verify = str(credentials / "ca.crt")
        # An API server that restarts or is busy is waited for, some ten minutes; asking twice to create is harmless.
        waits = Retry(total=10, backoff_factor=2, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None)
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=waits))

    def get(self, name: str) -> dict[str, Any]:
        """The RayJob of that name."""
        return self._asked("GET", f"{self._url}/{name}").json()

    def create(self, rayjob: dict[str, Any]) -> bool:
        """Create it; False if there is one of that name already."""
        return self._asked("POST", self._url, rayjob).status_code != requests.codes.conflict

    def _asked(self, method: str, url: str, body: dict[str, Any] | None = None) -> requests.Response:
        # Kubernetes renews the token every hour.
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}"}
        try:
            answer = self._session.request(method, url, json=body, headers=headers, timeout=60)
        except requests.RequestException as error:
            raise Unavailable(f"The Kubernetes API does not answer {method} {url}: {error}.") from error
        if not answer.ok and answer.status_code != requests.codes.conflict:
            raise Unavailable(f"The Kubernetes API answers {method} {url} with {answer.status_code}: {answer.text}")
        return answer


def copied(template: dict[str, Any], job_name: str, job_uid: str) -> dict[str, Any]:
    """A RayJob like the template that starts at once, by a name of its own, and is deleted with that Job."""
    return {
        "apiVersion": template["apiVersion"],
        "kind": template["kind"],
        "metadata": {
            "name": f"{job_name}-run",
            "labels": template["metadata"].get("labels", {}),
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": job_uid}],
        },
        "spec": template["spec"] | {"suspend": False},
    }


def run(rayjobs: RayJobs, template: str, job_name: str, job_uid: str, poll_seconds: float = POLL_SECONDS) -> bool:
    """Start the copy, or find the one that is there, and wait until it ends; whether it has succeeded."""
    rayjob = copied(rayjobs.get(template), job_name, job_uid)
    name = rayjob["metadata"]["name"]
    if rayjobs.create(rayjob):
        print(f"RayJob {name} is started, as a copy of {template}", flush=True)
    else:
        print(f"RayJob {name} is there already", flush=True)
    said = None
    while True:
        status = rayjobs.get(name).get("status", {})
        now = status.get("jobDeploymentStatus", ""), status.get("jobStatus", ""), status.get("message", "")
        if now != said:
            print(f"RayJob {name}: {', '.join(part for part in now if part) or 'waiting'}", flush=True)
            said = now
        if now[0] in ENDED:
            return now[:2] == ("Complete", "SUCCEEDED")
        time.sleep(poll_seconds)


if __name__ == "__main__":
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    try:
        succeeded = run(RayJobs(server), sys.argv[1], os.environ["JOB_NAME"], os.environ["JOB_UID"])
    except Unavailable as refusal:
        sys.exit(f"error: {refusal}")
    sys.exit(0 if succeeded else 1)
