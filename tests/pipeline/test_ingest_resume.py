"""An ingest that was killed: the next one goes on where it was, or starts over where that would be wrong."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pipeline import dataset, storage
from pipeline import ingest as stage
from pipeline.conversion import ChunkConverter
from pipeline.ingest import IngestConfig, ingest
from pipeline.inventory import Cut
from pipeline.run_record import read_record
from tests.pipeline.labelled_source import REPOSITORY, photograph, refused, reject_rows, write_source

PAIRS = 20  # in each of two splits
GOES_ON = "  going on where an earlier run was stopped\n"

_KILLED = """
import sys
from pipeline import ingest as stage
from pipeline.conversion import ChunkConverter
from pipeline.inventory import Cut
stage.CUT = Cut(most_images=1)
stage.ingest(stage.IngestConfig(sys.argv[1], sys.argv[2], max_reject_fraction=0.5))
"""


@dataclass(frozen=True)
class Killed:
    """An ingest that was killed, as it lies below a folder, and how it lay there just after."""

    folder: Path
    copy: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def url(self) -> str:
        return str(self.folder / "dataset")

    @property
    def config(self) -> IngestConfig:
        return IngestConfig(str(self.source), self.url, max_reject_fraction=0.5)

    def notes(self) -> list[Path]:
        """Those of converted chunks."""
        return sorted(Path(self.url).glob("_ingest/*/*.json"))

    def again(self) -> "Killed":
        """Everything as it was after the kill, modification times included."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.copy, self.folder)
        return self


@pytest.fixture(scope="module")
def killed_once(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Killed:  # noqa: ARG001
    """The driver was killed when some chunks, of one image each, were converted and noted."""
    folder = tmp_path_factory.mktemp("killed")
    killed = Killed(folder / "work", folder / "copy")
    write_source(str(killed.source), pairs=PAIRS)
    storage.write_bytes(str(killed.source / "images/train/alone.png"), photograph(999))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-c", _KILLED, str(killed.source), killed.url]
    driver = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 200  # a busy machine takes long to start a worker
        while len(killed.notes()) < 5:
            assert driver.poll() is None, "the ingest ended before it could be killed"
            assert time.monotonic() < deadline, "no chunk was converted"
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _await_quiet(killed)
    killed.folder.rename(killed.copy)
    killed.folder.mkdir()
    return killed


def _await_quiet(killed: Killed) -> None:
    """Until the last tasks of a killed driver are at their end."""
    before = None
    while (now := list(storage.list_objects(killed.url))) != before:
        before = now
        time.sleep(1.0)


@pytest.fixture
def killed(killed_once: Killed, monkeypatch: pytest.MonkeyPatch) -> Killed:
    monkeypatch.setattr(stage, "CUT", Cut(most_images=1))
    return killed_once.again()


@pytest.fixture(scope="module")
def undisturbed(killed_once: Killed) -> str:
    """The dataset of the same source, made at one go and in large chunks."""
    killed = killed_once.again()
    url = str(killed.folder.with_name("undisturbed"))
    ingest(IngestConfig(str(killed.source), url, max_reject_fraction=0.5))
    return url


def ids(url: str) -> list[str]:
    opened = dataset.open(url)
    return sorted(row["image_id"] for split in opened.info.splits for row in opened.rows(split, ["image_id"]))


def assert_nothing_stale(url: str) -> None:
    """Beside the dataset's files are only its rejects, as many as counted, and its duplicates, if any."""
    info = dataset.open(url).info
    expected = {path for split in info.splits.values() for path in split.files} | {"dataset.json", "run.json"}
    if info.duplicates:
        expected.add("_duplicates/part-000000.parquet")
    found = {item.url.removeprefix(f"{url}/") for item in storage.list_objects(url)}
    assert {name for name in found if not name.startswith("_rejects/")} == expected
    assert len(reject_rows(url)) == info.rejected
    assert not Path(url, "_ingest").exists()


def test_a_killed_ingest_is_completed_by_the_next(
    killed: Killed, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_record(killed.url)
    assert record is not None
    assert record.outcome == "running"
    # One chunk's files are there, but not the note that says that they are whole.
    *noted, doubtful = killed.notes()
    doubtful.unlink()
    kept = {next(Path(killed.url).glob(f"*/part-*-{note.stem}.parquet")) for note in noted}
    replaced = next(Path(killed.url).glob(f"*/part-*-{doubtful.stem}.parquet"))
    replaced.write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in kept}

    record = ingest(killed.config)

    assert GOES_ON in capsys.readouterr().out
    assert len(kept) >= 4
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert record.counts == {"in": 2 * PAIRS + 1, "out": 2 * PAIRS, "rejected": 1}
    assert ids(killed.url) == ids(undisturbed)
    completed, whole = dataset.open(killed.url).info, dataset.open(undisturbed).info
    assert completed.fingerprint == whole.fingerprint
    assert [split.pixels for split in completed.splits.values()] == [split.pixels for split in whole.splits.values()]
    assert (completed.sizes, completed.duplicates) == (whole.sizes, whole.duplicates)
    assert_nothing_stale(killed.url)
    assert ingest(killed.config) == record
    assert capsys.readouterr().out.startswith("already ingested")


def test_what_a_killed_attempt_wrote_and_no_other_would_is_deleted(killed: Killed, undisturbed: str) -> None:
    written = next(Path(killed.url).glob("train/part-*.parquet"))
    for folder in ("val", "_rejects"):
        stranger = Path(killed.url, folder, written.name.rpartition("-")[0] + "-000777.parquet")
        stranger.parent.mkdir(exist_ok=True)
        shutil.copy(written, stranger)
    ingest(killed.config)
    assert ids(killed.url) == ids(undisturbed)
    assert_nothing_stale(killed.url)
    assert sorted(path.name for path in Path(killed.url, "_rejects").iterdir()) == ["part-unpaired.parquet"]


def test_a_source_that_has_changed_since_the_kill_is_read_anew(
    killed: Killed, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("images", "labels"):
        (killed.source / folder / "train/00.png").unlink()
    (killed.source / "images/train/alone.png").unlink()
    (killed.source / "images/val/19.png").write_bytes(photograph(1000))
    record = ingest(killed.config)
    assert GOES_ON not in capsys.readouterr().out
    assert record.counts == {"in": 2 * PAIRS - 1, "out": 2 * PAIRS - 1, "rejected": 0}
    assert ids(killed.url) == [name for name in ids(undisturbed) if name != "train/00"]
    (changed,) = [row for row in dataset.open(killed.url).rows("val") if row["image_id"] == "val/19"]
    assert changed["image"] == photograph(1000)
    assert_nothing_stale(killed.url)


def test_another_configuration_after_a_kill_starts_over(
    killed: Killed, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ingest(IngestConfig(str(killed.source), killed.url, splits="val", max_reject_fraction=0.5))
    assert GOES_ON not in capsys.readouterr().out
    assert record.counts == {"in": PAIRS, "out": PAIRS, "rejected": 0}
    assert ids(killed.url) == [name for name in ids(undisturbed) if name.startswith("val/")]
    assert_nothing_stale(killed.url)


def test_a_kill_before_anything_was_planned_leaves_nothing_to_go_on_with(
    killed: Killed, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in Path(killed.url).glob("_ingest/*/*"):
        path.unlink()
    ingest(killed.config)
    assert GOES_ON not in capsys.readouterr().out
    assert ids(killed.url) == ids(undisturbed)
    assert_nothing_stale(killed.url)


def test_new_starts_over_though_there_is_something_to_go_on_with(
    killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(IngestConfig(str(killed.source), killed.url, splits="val", limit=2, new=True))
    assert GOES_ON not in capsys.readouterr().out
    assert len(ids(killed.url)) == 2
    assert_nothing_stale(killed.url)


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_of_its_chunk_ends_the_ingest_which_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fatal(ChunkConverter):
        def __call__(self, batch: pa.Table) -> pa.Table:  # noqa: ARG002
            os._exit(1)

    write_source(str(tmp_path / "source"), pairs=2)
    config = IngestConfig(str(tmp_path / "source"), str(tmp_path / "set"))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "CHUNK_RETRIES", 0)
        patch.setattr(stage, "ChunkConverter", Fatal)
        assert "A worker has died 1 times while it converted some images of" in refused(config)
    assert ingest(config).counts == {"in": 4, "out": 4, "rejected": 0}
    assert GOES_ON in capsys.readouterr().out
