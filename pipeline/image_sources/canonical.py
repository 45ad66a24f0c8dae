"""Images as rows of a canonical dataset."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from pipeline import storage
from pipeline.image_sources.listing import ROWS_TOGETHER, ImageSource, Row, named

INFO_FILE = "dataset.json"


@dataclass(frozen=True)
class DatasetPart:
    """The images of one Parquet file.

    Args:
        source: the dataset.
        split: which the file belongs to.
        url: of the file.
    """

    source: ImageSource
    split: str
    url: str

    def rows(self) -> Iterator[Row | None]:
        """One for each image; those that the patterns do not admit are passed over."""
        version = storage.stat(self.url).version
        for number, image_id in enumerate(storage.explained_items(self.url, self._image_ids())):
            place = f"{self.split}/{image_id}"
            row = Row(f"{self.source.images}/{place}", version, self.url, number)
            yield named(row) if self.source.wants(place) else None

    def _image_ids(self) -> Iterator[str]:
        filesystem, path = storage.arrow_filesystem(self.url)
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(ROWS_TOGETHER, columns=["image_id"]):
                yield from batch["image_id"].to_pylist()


def is_one(url: str) -> bool:
    """Whether there is a canonical dataset at a URL; a bucket of images may hold another `dataset.json`."""
    try:
        document = storage.read_json(storage.join(url, INFO_FILE))
    except FileNotFoundError:
        return False
    return isinstance(document, dict) and {"schema_version", "splits"} <= document.keys()


def parts(source: ImageSource) -> list[DatasetPart]:
    """One for each of the dataset's files.

    Raises:
        PipelineError: if there is no dataset, or one that this version cannot read.
    """
    from pipeline import dataset  # loads torch and Ray, which the tasks that list and read do without

    splits = dataset.open(source.images).info.splits
    return [
        DatasetPart(source, name, storage.join(source.images, path))
        for name in sorted(splits)
        for path in sorted(splits[name].files)
    ]
