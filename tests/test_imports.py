"""How the house is built: imports run one way, and every file is named after what it holds."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FORBIDDEN = {
    "rssnet": {"pipeline", "workflows", "ray", "infra", "tests"},
    "pipeline": {"workflows", "infra", "tests"},
    "workflows": {"infra", "tests"},
}
MEANINGLESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def imported(source: str) -> Iterator[str]:
    """The full name of every module that a source text imports, also within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays within its package, as no package here has a parent.
            yield "." if node.level else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "?"


def modules(package: str) -> list[Path]:
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_from_workflows_to_pipeline_to_rssnet(package: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in modules(package)
        for name in imported(path.read_text("utf-8"))
        if name.partition(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_the_network_knows_nothing_of_storage_or_arrow() -> None:
    strangers = {"pyarrow", "s3fs", "boto3", "jsonargparse", "PIL"}
    wrong = [
        f"{path.name} imports {name}"
        for path in modules("rssnet")
        for name in imported(path.read_text("utf-8"))
        if name.partition(".")[0] in strangers
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import ray.data as data", "ray.data"),
        ("from ray import tune", "ray"),
        ("def late():\n    from ray.train import report", "ray.train"),
        ("if True:\n    import torch, ray", "ray"),
        ("import importlib\nimportlib.import_module('ray')", "ray"),
        ("__import__('ray')", "ray"),
    ],
)
def test_no_form_of_import_is_overlooked(source: str, found: str) -> None:
    assert found in set(imported(source))


def test_files_and_folders_are_named_after_what_they_hold() -> None:
    named = [
        path.relative_to(REPOSITORY)
        for package in ("rssnet", "pipeline", "workflows", "tests", "infra")
        for path in (REPOSITORY / package).rglob("*")
        if "__pycache__" not in path.parts
    ]
    assert named
    assert not [str(path) for path in named if path.stem.lower() in MEANINGLESS]


def test_no_module_hides_one_of_the_standard_library_where_a_script_would_find_it_first() -> None:
    """`python workflows/x.py` puts that folder before all others."""
    assert not {path.stem for path in modules("workflows")} & sys.stdlib_module_names
