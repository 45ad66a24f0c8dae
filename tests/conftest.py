"""What tests share: one Ray and one local S3 server for the session, and the CamVid photographs if they are here."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one takes its time
hypothesis.settings.load_profile("any machine")
os.environ["RAY_AUTH_MODE"] = "disabled"  # else ray writes a token file into the home folder
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a test without `ray_cluster` that needs it is to fail, not to start one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what shares the session's Ray, and the workflows, which start their own: not to be run side by side."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) or item.path.parent.name == "workflows":
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`s3://` URLs mean a server on this machine. The bucket `test` is there."""
    from pipeline.local_s3 import LocalS3

    with LocalS3(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("test")
        yield


@pytest.fixture(scope="session")
def ray_cluster(s3: None) -> Iterator[None]:  # noqa: ARG001 - ray's workers inherit the server's environment
    """A local Ray with two CPUs, which stages then use instead of starting their own."""
    import ray

    from pipeline.cluster import connected

    with connected():
        assert ray.is_initialized()
        yield


@pytest.fixture
def bucket(s3: None, request: pytest.FixtureRequest) -> str:  # noqa: ARG001
    """An `s3://` prefix of this test's own."""
    return f"s3://test/{request.node.nodeid.replace('/', '_').replace('::', '/')}"


@pytest.fixture(scope="session")
def street_masks(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    """A folder with the `photos` of three street scenes, an untrained `model`, and what it predicts, `masks`."""
    import torch

    from pipeline.segment_config import SegmentConfig
    from pipeline.segmentation import segment
    from pipeline.street_scenes import write_street_scenes
    from rssnet import RSSNet, RSSNetConfig

    folder = tmp_path_factory.mktemp("street")
    write_street_scenes(folder, train=1, val=1, photos=3, size=(96, 128))
    torch.manual_seed(0)
    config = RSSNetConfig(
        backbone="vit_tiny_patch16_224", backbone_options={"depth": 1}, num_classes=11, image_size=(64, 96)
    )
    RSSNet(config).save_pretrained(str(folder / "model"))
    segment(SegmentConfig(str(folder / "model"), str(folder / "photos"), str(folder / "masks")))
    return folder


@pytest.fixture(scope="session")
def two_pairs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001
    """A canonical dataset of two labelled images."""
    from pipeline.ingest import IngestConfig, ingest
    from tests.pipeline.labelled_source import write_source

    folder = tmp_path_factory.mktemp("pairs")
    write_source(str(folder / "source"), pairs=2)
    ingest(IngestConfig(str(folder / "source"), str(folder / "set")))
    return str(folder / "set")


@pytest.fixture(scope="session")
def camvid() -> Path:
    """The CamVid folder; the test is skipped, saying so, where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data" / "camvid"
    folder = Path(os.environ.get("CAMVID_DIR", default))
    if not (folder / "trainannot").is_dir():
        pytest.skip(f"no CamVid photographs at {folder}: set CAMVID_DIR")
    return folder
