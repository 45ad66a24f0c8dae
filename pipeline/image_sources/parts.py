"""What kind of source a URL is, and how it is divided into parts."""

import dataclasses
from collections.abc import Iterator
from typing import get_args

from pipeline import storage
from pipeline.errors import PipelineError
from pipeline.image_sources import canonical, manifests, prefixes, s3_inventory, tars
from pipeline.image_sources.listing import ImageSource, Kind, Listed, Part, in_tables


def resolved(source: ImageSource) -> ImageSource:
    """The same source with a full URL, and in place of `auto` the kind that it is of.

    Raises:
        PipelineError: for an unknown kind, or if the store cannot say.
    """
    if source.kind not in get_args(Kind):
        raise PipelineError(f"kind {source.kind!r} is none of {', '.join(get_args(Kind))}.")
    images = storage.absolute(source.images)
    return dataclasses.replace(source, images=images, kind=_kind(images) if source.kind == "auto" else source.kind)


def parts(source: ImageSource) -> list[Part]:
    """The parts of a source, up to some hundreds, in a fixed order; made by looking at its top alone.

    Raises:
        PipelineError: if there is nothing, or something that is not of the kind asked for.
    """
    source = resolved(source)
    found: list[Part]
    if source.kind == "tar":
        found = [*tars.parts(source)]
    elif source.kind == "manifest" and s3_inventory.is_one(source.images):
        found = [*s3_inventory.parts(source)]
    elif source.kind == "manifest":
        found = [*manifests.parts(source)]
    elif source.kind == "dataset":
        found = [*canonical.parts(source)]
    else:
        found = [*prefixes.parts(source)]
    return found


def list_part(part: Part) -> Iterator[Listed]:
    """The images of a part, in tables of some thousands; memory is bounded however many there are.

    Raises:
        PipelineError: if the store or a file cannot be read.
    """
    return in_tables(part.rows())


def _kind(images: str) -> Kind:
    if _is_object(images):
        if tars.is_one(images):
            return "tar"
        return "manifest" if manifests.is_one(images) or s3_inventory.is_one(images) else "prefix"
    return "dataset" if canonical.is_one(images) else "prefix"


def _is_object(url: str) -> bool:
    """Whether a URL names an object, and not only others below it."""
    first = next(storage.list_objects(url), None)
    return first is not None and first.url == url
