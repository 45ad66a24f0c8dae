"""Which classes take how much of the images, by prefix and by day: a table and a plot beside the masks.

The prefix is the folders of an image's URI, as many as are asked for below what all images have in common. The day is
the first date in the URI, such as `2026-11-25`, `2026/11/25` or `20261125`; images without one have none.
"""

import datetime
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from matplotlib.figure import Figure

from pipeline import mask_store, masks, storage
from pipeline.cluster import io_task
from pipeline.errors import PipelineError
from pipeline.figure_png import figure_png
from pipeline.parquet_files import read_table, write_table
from rssnet.classes import Classes

FOLDER = "summary"
TABLE_FILE, PLOT_FILE = f"{FOLDER}/classes.parquet", f"{FOLDER}/classes.png"
CLASSES_FILE = f"{FOLDER}/classes.json"  # names and colours by the id of the model

SUMMARY_SCHEMA = pa.schema(
    [
        ("model_id", pa.string()),
        ("prefix", pa.string()),
        ("day", pa.date32()),  # null where the URI has no date
        ("class_id", pa.int32()),
        ("class_name", pa.string()),  # null where the classes of the model are not known here
        ("images", pa.int64()),  # masks of this prefix and day, with or without the class; each version counts
        ("images_with_class", pa.int64()),
        ("pixels", pa.int64()),
        ("share", pa.float64()),  # of all pixels of this prefix and day, also those of no class that was kept
    ]
)
_GROUP = ["model_id", "prefix", "day"]
_FILES_TOGETHER = 64  # that a task reads
_DATE = re.compile(r"(?<!\d)(20\d\d)([-_/]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_SHOWN_CLASSES, _SHOWN_GROUPS = 9, 40  # in the plot; the rest is put together, or left to the table


def keep_classes(url: str, model: str, classes: Classes) -> None:
    """Keep names and colours of a model's classes beside the summary, for this and later ones."""
    known = _known_classes(url)
    if known.get(model) != classes:
        document = {
            name: {"names": kept.names, "palette": kept.palette} for name, kept in (known | {model: classes}).items()
        }
        storage.write_json(storage.join(url, CLASSES_FILE), document)


def _known_classes(url: str) -> dict[str, Classes]:
    try:
        document = storage.read_json(storage.join(url, CLASSES_FILE))
        return {model: Classes(kept["names"], kept["palette"]) for model, kept in document.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PipelineError(f"{storage.join(url, CLASSES_FILE)} cannot be understood ({error}): delete it.") from error


def summarize(url: str, model: str | None = None, depth: int = 1) -> pa.Table:
    """The table of an output, made on the cluster and written with its plot below the output's `summary/`.

    Classes have the names that `keep_classes` has kept; those of other models are called by their ids.

    Args:
        url: the output.
        model: id of the model that is plotted; the one with the most masks if None.
        depth: folders of a prefix.

    Returns:
        Rows of `SUMMARY_SCHEMA`, in the order of model, prefix, day and class.
    """
    url = storage.absolute(url)
    files = mask_store.files(url)
    groups = [files[start : start + _FILES_TOGETHER] for start in range(0, len(files), _FILES_TOGETHER)]
    common = _common_folder([uri for uris in ray.get([_ends.remote(group) for group in groups]) for uri in uris])
    counted = ray.get([_counted.remote(group, len(common), depth) for group in groups])
    known = _known_classes(url)
    table = _table([images for images, _ in counted], [pixels for _, pixels in counted], known)
    write_table(storage.join(url, TABLE_FILE), table)
    storage.write_bytes(storage.join(url, PLOT_FILE), figure_png(_figure(table, model or _most_masks(table), known)))
    return table


def prefix_of(uri: str, common: int, depth: int) -> str:
    """The first `depth` folders of a URI after its first `common` characters."""
    folders = uri[common:].split("/")[:-1]
    return "/".join(folders[:depth])


def day_of(uri: str) -> datetime.date | None:
    """The first date in a URI; None if there is none, or none that a calendar has."""
    for found in _DATE.finditer(uri):
        try:
            return datetime.date(int(found[1]), int(found[3]), int(found[4]))
        except ValueError:
            continue
    return None


def _common_folder(uris: Sequence[str]) -> str:
    """The folders that all URIs begin with."""
    if not uris:
        return ""
    first, last = min(uris), max(uris)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first[:length].rfind("/") + 1]


@io_task
def _ends(files: list[str]) -> list[str]:
    """The first and the last URI in some files."""
    uris = [uri for file in files for uri in read_table(file, ["image_uri"])["image_uri"].to_pylist()]
    return [min(uris), max(uris)] if uris else []


@io_task
def _counted(files: list[str], common: int, depth: int) -> tuple[pa.Table, pa.Table]:
    """Of some files: images by group, and pixels and images by group and class."""
    columns = ["model_id", "image_uri", "status", "height", "width", "class_ids", "class_pixels"]
    rows = pa.concat_tables([read_table(file, columns) for file in files]).filter(pc.field("status") == masks.OK)
    rows = rows.combine_chunks()
    uris = rows["image_uri"].to_pylist()
    groups = pa.table(
        {
            "model_id": rows["model_id"],
            "prefix": pa.array([prefix_of(uri, common, depth) for uri in uris], pa.string()),
            "day": pa.array([day_of(uri) for uri in uris], pa.date32()),
        }
    )
    sizes = [
        height * width for height, width in zip(*(rows[name].to_pylist() for name in ("height", "width")), strict=True)
    ]
    class_ids, class_pixels = (_lists(rows[name]) for name in ("class_ids", "class_pixels"))
    of_class = groups.take(class_ids.value_parent_indices())
    of_class = of_class.append_column("class_id", class_ids.flatten())
    of_class = of_class.append_column("pixels", class_pixels.flatten())
    whole = groups.append_column("pixels", pa.array(sizes, pa.int64()))
    images = whole.group_by(_GROUP).aggregate([([], "count_all"), ("pixels", "sum")])
    pixels = of_class.group_by([*_GROUP, "class_id"]).aggregate([([], "count_all"), ("pixels", "sum")])
    return images, pixels


def _lists(column: pa.ChunkedArray) -> Any:
    """A column of lists as one array."""
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _table(images: list[pa.Table], pixels: list[pa.Table], known: dict[str, Classes]) -> pa.Table:
    if not images:
        return SUMMARY_SCHEMA.empty_table()
    sums = [("count_all", "sum"), ("pixels_sum", "sum")]
    by_group = pa.concat_tables(images).group_by(_GROUP).aggregate(sums).to_pylist()
    totals = {tuple(row[name] for name in _GROUP): (row["count_all_sum"], row["pixels_sum_sum"]) for row in by_group}
    found = []
    for row in pa.concat_tables(pixels).group_by([*_GROUP, "class_id"]).aggregate(sums).to_pylist():
        of_group, of_all = totals[tuple(row[name] for name in _GROUP)]
        classes = known.get(row["model_id"])
        found.append(
            {
                **{name: row[name] for name in (*_GROUP, "class_id")},
                "class_name": None if classes is None else classes.names[row["class_id"]],
                "images": of_group,
                "images_with_class": row["count_all_sum"],
                "pixels": row["pixels_sum_sum"],
                "share": row["pixels_sum_sum"] / of_all,
            }
        )
    no_day = datetime.date.min
    found.sort(key=lambda row: (row["model_id"], row["prefix"], row["day"] or no_day, row["class_id"]))
    return pa.Table.from_pylist(found, SUMMARY_SCHEMA)


def _most_masks(table: pa.Table) -> str:
    """The model that has made the most masks."""
    rows = table.to_pylist()
    masks_of = {(row["model_id"], row["prefix"], row["day"]): row["images"] for row in rows}
    total: dict[str, int] = {}
    for (model, _, _), count in masks_of.items():
        total[model] = total.get(model, 0) + count
    return max(total, key=lambda model: total[model], default="")


def _figure(table: pa.Table, model: str, known: dict[str, Classes]) -> Figure:
    """A bar of class shares for each prefix and day of a model."""
    classes = known.get(model)
    rows = [row for row in table.to_pylist() if row["model_id"] == model]
    groups = list(dict.fromkeys((row["prefix"], row["day"]) for row in rows))
    shown = groups[-_SHOWN_GROUPS:]
    total: dict[int, int] = {}
    for row in rows:
        total[row["class_id"]] = total.get(row["class_id"], 0) + row["pixels"]
    largest = sorted(total, key=lambda class_id: -total[class_id])[:_SHOWN_CLASSES]
    figure = Figure(figsize=(9, 1.6 + 0.28 * max(1, len(shown))), layout="constrained")
    axes = figure.subplots()
    names = [f"{prefix or '(top)'}{f'  {day}' if day else ''}" for prefix, day in shown]
    left = [0.0] * len(shown)
    shares = {(row["prefix"], row["day"], row["class_id"]): row["share"] for row in rows}
    for class_id in [*largest, None]:
        if class_id is None:
            widths, label, colour = [max(0.0, 1 - done) for done in left], "others", "#bbbbbb"
            if max(widths, default=0.0) < 1e-9:
                continue
        else:
            widths = [shares.get((*group, class_id), 0.0) for group in shown]
            label = classes.names[class_id] if classes is not None else f"class {class_id}"
            colour = None if classes is None else "#{:02x}{:02x}{:02x}".format(*classes.palette[class_id])
        axes.barh(names, widths, left=left, label=label, color=colour, edgecolor="white", linewidth=0.4)
        left = [done + width for done, width in zip(left, widths, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the pixels")
    axes.invert_yaxis()
    more = f", the last {len(shown)} of {len(groups)}" if len(shown) < len(groups) else ""
    axes.set_title(f"Classes by prefix and day{more}, model {model}" if rows else "No masks", fontsize=10)
    if rows:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    return figure
