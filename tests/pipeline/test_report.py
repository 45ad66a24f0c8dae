"""The report: everything that a run has is in one file that needs nothing else, whatever the run did not have."""

import base64
import dataclasses
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import charts, report_pictures, storage
from pipeline.errors import PipelineError
from pipeline.report import CurvePoint, Report, Scores, Stage, Trial, ValidationPoint, render, write_report
from pipeline.report_pictures import Overlay
from pipeline.street_scenes import IGNORE_LABEL, NAMES, PALETTE, draw_scene
from rssnet.classes import Classes

CLASSES = Classes(NAMES, PALETTE)
EVIL = "<script>alert('1')</script>&\""


def overlay(number: int = 0, size: tuple[int, int] = (90, 120)) -> Overlay:
    scene = draw_scene(number, size)
    label = np.where(scene.label == IGNORE_LABEL, 0, scene.label)
    return Overlay(f"s3://photos/street_{number}.jpg", scene.image, label)


@pytest.fixture(scope="module")
def full() -> Report:
    return Report(
        title="Street scenes",
        classes=CLASSES,
        dataset="s3://data/streets",
        model="RSSNet on vit_tiny",
        counts={"training images": 1240},
        stages=[
            Stage("ingest", "s3://data/streets", 12.34, detail="300 rows"),
            Stage("train", "s3://runs/first", 3725),
            Stage("segment", "s3://masks/photos", None, "skipped"),
        ],
        scores=Scores("val", 60, 0.3456, 0.4567, 0.8765, [0.1 * index for index in range(10)] + [None], [9] * 11),
        curve=[CurvePoint(index, 3 / (index + 1), 1e-3) for index in range(40)],
        validation=[ValidationPoint(20, 0.2), ValidationPoint(39, 0.3456)],
        trials=[
            Trial(0, {"lr": 1e-3, "dca": True}, 0.3111, 200, "finished"),
            Trial(1, {"lr": 5.31234e-4, "dca": False}, 0.3222, 200, "finished"),
            Trial(2, {"lr": 1.0}, None, 10, "failed"),
        ],
        overlays=[overlay(0), overlay(1)],
        masks="s3://masks/photos",
        versions={"torch": "2.15.0", "ray": "2.60.0"},
    )


@pytest.fixture(scope="module")
def page(full: Report) -> str:
    return render(full)


class References(HTMLParser):
    """What a browser would load, and the texts that it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "srcset", "data")
        ]

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1] != "style":
            self.texts.append(" ".join(data.split()))


def text(page: str) -> str:
    return " ".join(References(page).texts)


def section(page: str, title: str) -> str:
    """The text of one section."""
    return text(page[page.index(f"<h2>{title}</h2>") :].split("</section>")[0])


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:jpeg|png);base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_it_is_written_in_one_piece_and_its_url_returned(full: Report, tmp_path: Path) -> None:
    url = write_report(f"file://{tmp_path}/run", full)
    assert url == f"{tmp_path}/run/report.html"
    assert storage.read_bytes(url).startswith(b"<!doctype html>")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]


def test_it_loads_nothing(page: str) -> None:
    references = References(page)
    assert references.loaded
    assert all(item.startswith(("data:image/", "#")) for item in references.loaded)
    assert not {"script", "link", "iframe", "object", "embed"} & set(references.tags)
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page


def test_the_head_says_what_was_run_and_how_good_it_is(page: str) -> None:
    head = text(page.split("<main>")[0])
    for part in ("Street scenes", "RSSNet on vit_tiny", "11 classes", "s3://data/streets", "training images 1,240"):
        assert part in head
    for part in ("mIoU, val 0.346", "pixel accuracy 0.876", "mean class accuracy 0.457", "1 h 02 min"):
        assert part in head
    assert "torch 2.15.0" in text(page)


def test_classes_stand_from_the_best_to_the_worst_with_their_colours(page: str) -> None:
    body = page[page.index("<ol") : page.index("</ol>")]
    names = re.findall(r'class="name">([^<]+)<', body)
    assert names == [*reversed(NAMES[:10]), NAMES[10]]
    assert re.findall(r"<b>([^<]+)</b>", body)[:2] == ["0.900", "0.800"]
    assert re.findall(r"<b>([^<]+)</b>", body)[-1] == "–"
    assert "background: #c0c080; width: 20.0%" in body  # pole, class 2
    assert body.count("9.1 %") == 11


def test_curves_are_drawn_in_the_colours_of_the_page(page: str) -> None:
    training = page[page.index("<h2>Training</h2>") : page.index("<h2>Sweep</h2>")]
    assert training.count("<svg") == 2
    assert 'aria-label="Training loss and learning rate over iterations"' in training
    assert ">0.346</text>" in training
    assert set(re.findall(r"(?:fill|stroke): (#\w+|var\(--\w+\))", training)) <= {
        f"var(--{name})" for name in ("ink", "muted", "line", "accent", "best")
    }


def test_definitions_of_different_charts_do_not_meet(page: str) -> None:
    identities = re.findall(r' id="([^"]+)"', page)
    assert identities
    assert len(identities) == len(set(identities))


def test_the_same_values_make_the_same_chart() -> None:
    assert charts.miou_chart([1, 2], [0.1, 0.2]) == charts.miou_chart([1, 2], [0.1, 0.2])


def test_trials_are_listed_and_the_best_and_the_default_marked(page: str) -> None:
    sweep = page[page.index("<h2>Sweep</h2>") :].split("</section>")[0]
    rows = [" ".join(References(row).texts) for row in re.findall(r"<tr.*?</tr>", sweep, re.DOTALL)]
    assert rows == [
        "trial mIoU lr dca iterations state",
        "0 default 0.311 0.001 True 200 finished",
        "1 best 0.322 0.0005312 False 200 finished",
        "2 – 1 – 10 failed",
    ]
    assert "Trial 1 is best with an mIoU of 0.322; the default configuration, trial 0, has 0.311." in text(sweep)
    assert 'aria-label="Validation mIoU of each trial"' in sweep


def test_the_default_may_be_the_best_and_failures_never_are(full: Report) -> None:
    trials = [
        Trial(1, {}, 0.9, 5, "failed"),
        Trial(0, {}, 0.2, 5, "finished"),
        Trial(2, {}, float("nan"), 5, "finished"),
    ]
    page = render(dataclasses.replace(full, trials=trials))
    assert "Trial 0 is best with an mIoU of 0.200; it is the default configuration." in section(page, "Sweep")
    page = render(dataclasses.replace(full, trials=trials[:1]))
    assert "1 trial. None has a score." in section(page, "Sweep")


def test_stages_say_where_their_output_is(page: str) -> None:
    stages = section(page, "Where everything is")
    assert "ingest done s3://data/streets 300 rows 12.3 s" in stages
    assert "train done s3://runs/first 1 h 02 min" in stages
    assert "segment already done s3://masks/photos –" in stages


def test_overlays_show_photograph_mask_and_both(full: Report, page: str) -> None:
    shown = pictures(page)
    assert [picture.format for picture in shown] == ["JPEG", "PNG", "JPEG"] * 2
    assert {picture.size for picture in shown} == {(120, 90)}
    photograph, mask, blend = (np.asarray(picture.convert("RGB"), np.float64) for picture in shown[:3])
    first = full.overlays[0]
    assert np.abs(photograph - first.image).mean() < 8
    assert np.array_equal(mask, np.asarray(PALETTE)[first.class_map])
    assert np.abs(blend - (photograph + mask) / 2).mean() < 8
    seen = [name for index, name in enumerate(NAMES) if any((item.class_map == index).any() for item in full.overlays)]
    legend = page[page.index('<ul class="legend">') :].split("</ul>")[0]
    assert References(legend).texts == seen


def test_many_large_noisy_photographs_stay_within_bounds(full: Report) -> None:
    random = np.random.default_rng(0)
    noisy = [
        Overlay(str(number), random.integers(0, 256, (900, 700, 3), np.uint8), random.integers(0, 11, (900, 700)))
        for number in range(report_pictures.MAX_OVERLAYS + 3)
    ]
    page = render(dataclasses.replace(full, overlays=noisy))
    assert len(page) < 4_000_000
    assert len(pictures(page)) == 3 * report_pictures.MAX_OVERLAYS
    assert max(pictures(page)[0].size) < report_pictures.PICTURE_STEPS[0][0]
    assert "The first 12 of 15 photographs" in section(page, "What the model sees")


def test_masks_of_more_classes_than_a_palette_holds() -> None:
    classes = Classes.default(300)
    class_map = np.arange(300).reshape(15, 20)
    page = render(Report("Many", classes, overlays=[Overlay("x", np.zeros((15, 20, 3), np.uint8), class_map)]))
    assert np.array_equal(np.asarray(pictures(page)[1]), np.asarray(classes.palette)[class_map])


def test_whatever_is_missing_is_left_out_with_a_sentence() -> None:
    page = render(Report("Nothing", CLASSES))
    for title, sentence in {
        "What the model sees": "No photographs are shown",
        "Scores by class": "There are no scores",
        "Training": "There are no curves",
        "Sweep": "There are no trials",
        "Where everything is": "No stages are listed",
        "Reading the masks": "There are no masks",
    }.items():
        assert sentence in section(page, title)
    assert "<svg" not in page
    assert "<dl" not in page


def test_one_curve_without_the_other(full: Report) -> None:
    assert "There is no validation curve" in section(render(dataclasses.replace(full, validation=[])), "Training")
    assert "There is no loss curve" in section(render(dataclasses.replace(full, curve=[])), "Training")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_that_cannot_be_drawn_do_no_harm(full: Report, value: float) -> None:
    render(
        dataclasses.replace(
            full,
            curve=[CurvePoint(1, value, 0.0)],
            validation=[ValidationPoint(1, value)],
            scores=Scores("val", 0, value, None, value, [value] * 11, [0] * 11),
            trials=[Trial(0, {}, value, 0, "finished")],
        )
    )


def test_texts_are_escaped_and_credentials_hidden(full: Report) -> None:
    page = render(
        dataclasses.replace(
            full,
            title=EVIL,
            model=EVIL,
            classes=Classes((EVIL, *NAMES[1:]), PALETTE),
            dataset="s3://KEY:hush@data/streets",
            counts={EVIL: 1},
            stages=[Stage(EVIL, f"s3://KEY:hush@x/{EVIL}", 1, detail=EVIL)],
            scores=Scores(EVIL, 1, 0.5, 0.5, 0.5, [0.5] * 11),
            trials=[Trial(0, {EVIL: EVIL}, 0.5, 1, EVIL)],
            overlays=[dataclasses.replace(overlay(), uri=f"s3://KEY:hush@x/{EVIL}")],
            masks=f"s3://masks/{EVIL}",
            mirror=Path("/tmp") / EVIL,
            versions={EVIL: EVIL},
        )
    )
    assert "<script" not in page
    assert page.count(html.escape("<script>")) > 12
    assert "hush" not in page


def test_the_sql_reads_the_masks(tmp_path: Path) -> None:
    """Also out of a folder whose name means something to SQL and to a glob."""
    place = tmp_path / "it's [1] *" / "masks" / "photos"
    (place / "masks").mkdir(parents=True)
    columns = ["image_uri", "height", "width", "class_ids", "class_pixels", "confidence", "mask"]
    rows = [dict.fromkeys(columns, "1") | {"status": status} for status in ("ok", "damaged")]
    pq.write_table(pa.Table.from_pylist(rows), place / "masks" / "part-1.parquet")
    for report in (
        Report("Local", CLASSES, masks=f"file://{place}"),
        Report("Mirrored", CLASSES, masks="s3://masks/photos", mirror=place.parent.parent),
    ):
        sql = re.findall(r"<pre>(.*?)</pre>", render(report), re.DOTALL)
        assert len(duckdb.execute(html.unescape(sql[0])).fetchall()) == 1
    assert "FROM read_parquet('s3://masks/photos/masks/*.parquet')" in html.unescape(
        render(Report("Remote", CLASSES, masks="s3://masks/photos"))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_map": np.zeros((9, 9), int)}, r"an image of \(90, 120, 3\) uint8 and a class map of \(9, 9\)"),
        ({"class_map": np.full((90, 120), 255)}, "ids from 255 to 255, but the report has 11 classes"),
        ({"image": np.zeros((90, 120, 3))}, "float64 and a class map"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        write_report(str(tmp_path), Report("x", CLASSES, overlays=[dataclasses.replace(overlay(), **changes)]))
    assert not list(tmp_path.iterdir())


def test_scores_of_other_classes_are_refused() -> None:
    with pytest.raises(PipelineError, match="The report has 11 classes, but 2 class scores and 0 pixel counts"):
        render(Report("x", CLASSES, scores=Scores("val", 1, 0.5, 0.5, 0.5, [0.5, 0.5])))
