"""The durable run, begun as a job: what is finished is skipped, what depends on something newer is made again."""

import pytest

from pipeline import storage
from pipeline.end_to_end import STAGES, EndToEndConfig, end_to_end
from pipeline.errors import PipelineError
from pipeline.run_record import read_record
from tests.workflows.chain import assert_chain_is_there
from tests.workflows.conftest import TinyChain
from tests.workflows.ray_head import Head

pytestmark = pytest.mark.slow


def test_a_job_makes_all_and_then_only_what_was_deleted_is_made_again_with_what_follows_from_it(
    tiny: TinyChain,
    head: Head,
    ray_cluster: None,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = EndToEndConfig(tiny.labelled, tiny.photos, "s3://test/end-to-end", train=tiny.train, sweep=tiny.sweep)
    given = {name: getattr(config, name) for name in ("source", "photos", "root", "train", "sweep")}
    flags = [text for name, value in given.items() for text in (f"--{name}", value)]
    job = head.submit("python", "workflows/end_to_end.py", *flags, timeout=800)
    assert job.returncode == 0, f"{job.stdout[-3000:]}{job.stderr[-1000:]}"
    first = {name: read_record(f"{config.root}/{name}") for name in STAGES}
    assert all(record is not None and record.outcome == "done" for record in first.values()), first
    assert_chain_is_there(tiny, {name: f"{config.root}/{name}" for name in STAGES})
    page = storage.read_bytes("s3://test/end-to-end/report/report.html").decode()
    assert "mIoU" in page

    capsys.readouterr()
    again = end_to_end(config)
    assert again == first
    assert list(again) == list(STAGES)
    said = capsys.readouterr().out
    for stage in ("ingested", "trained", "evaluated", "swept", "reported"):
        assert f"already {stage}" in said
    assert "[3/6] evaluate" in said

    storage.delete("s3://test/end-to-end/segment")
    third = end_to_end(config)
    rerun = [name for name in STAGES if third[name] != first[name]]
    assert rerun == ["segment", "report"]


def test_a_later_stage_s_bad_configuration_is_refused_before_the_first_begins(tiny: TinyChain) -> None:
    config = EndToEndConfig(tiny.labelled, tiny.photos, "s3://test/refused", train=tiny.train, sweep="none.yaml")
    with pytest.raises(PipelineError, match=r"none\.yaml"):
        end_to_end(config)
    assert not storage.exists("s3://test/refused")


def test_a_failing_stage_says_why_and_what_is_finished_stays(
    tiny: TinyChain,
    ray_cluster: None,  # noqa: ARG001
) -> None:
    root = "s3://test/fails"
    config = EndToEndConfig(tiny.labelled, tiny.photos, root, train=tiny.train, sweep=tiny.sweep)
    storage.write_bytes(f"{root}/train/run.json", b"not a record")
    with pytest.raises(PipelineError, match=r"train/run\.json"):
        end_to_end(config)
    record = read_record(f"{root}/ingest")
    assert record is not None
    assert record.outcome == "done"
    assert not storage.exists(f"{root}/train/model")
