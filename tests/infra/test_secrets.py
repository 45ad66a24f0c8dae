"""No file that is under version control holds a credential, and manifests name secrets by reference only."""

import re
import subprocess

import pytest

from tests.infra.manifests import KUBERAY, documents
from tests.workflow_calls import REPOSITORY

# The forms that keys have by which they can be told from other words.
FORMS = {
    "AWS access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "Google service account": r'"private_key_id"\s*:\s*"[0-9a-f]{8}',
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "GitHub token": r"\bgh[pousr]_[0-9A-Za-z]{36}\b",
    "Hugging Face token": r"\bhf_[0-9A-Za-z]{30,}\b",
    "URL with a password": r"\b(https?|s3)://[^\s/@:{}\"']+:[^\s/@{}\"']+@(?!(127\.0\.0\.1|localhost|[\w.-]*example))",
}


def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("not a git checkout: what is under version control is not known")
    return found.stdout.splitlines()


@pytest.mark.parametrize("form", FORMS)
def test_no_file_holds_a_credential(form: str) -> None:
    found = []
    for name in tracked():
        path = REPOSITORY / name
        if name.startswith("tests/") or not path.is_file():  # tests make up credentials, to see that none is logged
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {match.group(0)[:12]}..." for match in re.finditer(FORMS[form], text)]
    assert not found


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("AWS access key", "key AKIA" + "ABCDEFGHIJKLMNOP"),
        ("private key", "-----BEGIN RSA " + "PRIVATE KEY-----"),
        ("URL with a password", "s3://me:pass" + "word@bucket/x"),
    ],
)
def test_a_credential_would_be_found(form: str, text: str) -> None:
    assert re.search(FORMS[form], text)


def test_manifests_have_secrets_by_reference_only() -> None:
    for path in KUBERAY.rglob("*.yaml"):
        for document in documents(path):
            if not isinstance(document, dict):
                continue  # a JSON patch
            assert document["kind"] != "Secret", f"{path} holds a secret"
            assert "secretGenerator" not in document
        given = r"name: (\w*(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY)\w*), value:"
        assert not re.findall(given, path.read_text("utf-8")), f"{path} gives a secret a value"


def test_the_token_of_the_local_cluster_is_not_under_version_control() -> None:
    assert "infra/compose/ray-token" in (REPOSITORY / ".gitignore").read_text("utf-8")
