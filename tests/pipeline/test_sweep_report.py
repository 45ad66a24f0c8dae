"""The report of a sweep: everything is in one file that needs nothing else, and a browser shows it."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from PIL import Image

from pipeline.importance import FEWEST, importances
from pipeline.objectives import Objectives
from pipeline.retraining import Retrained
from pipeline.search_space import SearchSpace
from pipeline.sweep_report import render
from pipeline.trial_book import TrialRecord

EVIL = "<script>alert('1')</script>$x_$"
SWITCH, KERNEL = "model.separation.enabled", "model.separation.kernel_size"
SPACE = SearchSpace(
    {"model": {"backbone_options": {"note": "none"}}},
    {},
    {
        "optimizer.lr": {"loguniform": [1e-5, 1e-3]},
        SWITCH: {"choice": [True, False]},
        KERNEL: {"choice": [3, 5], "when": {SWITCH: [True]}},
        "model.local_pathway.width": {"choice": [None, 32]},
        "model.backbone_options.note": {"choice": ["none", EVIL]},
    },
)
MIOU, BOTH = Objectives(("miou",)), Objectives(("miou", "gflops"))
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
CHARTS = ["Learning curves", "Parallel coordinates", "Importance", "Slices", "Cost"]


def swept(count: int = 24) -> list[TrialRecord]:
    """Trials whose score hangs on the learning rate alone."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = []
    for number in range(count):
        point = SPACE.suggest(study.ask()) if number else SPACE.default()
        end = 0.5 - 0.2 * abs(np.log10(point["optimizer.lr"]) + 3.5)
        state = ("finished", "stopped", "failed")[number % 3]
        curve: list[dict[str, Any]] = [
            {"iteration": 10 * step, "miou": end * step / 4, "gflops": 1 + number % 5}
            for step in range(1, 5 - number % 3)
        ]
        error = EVIL if state == "failed" else None
        trials.append(TrialRecord(number, f"id{number}", point, 40, 2.0, state, curve, 10.0 + number, 1.0, error))
    return trials


def test_the_report_has_all_its_parts_and_says_what_is_best() -> None:
    trials = swept()
    page = render("s3://runs/sweep", SPACE, MIOU, trials, Retrained([0, 1, 2], [0.4, 0.42, 0.44]))
    assert re.findall(r"<h2>(.*?)</h2>", page) == [*CHARTS, "Trials"]
    assert page.count("<svg") == len(CHARTS)
    best = max((trial for trial in trials if trial.metrics), key=lambda trial: trial.metrics["miou"])
    text = " ".join(re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    assert f"Trial {best.trial} is best" in text
    assert "0.42 ± 0.02" in text
    saved = sum(trial.saved for trial in trials)
    spent = sum(trial.device_seconds for trial in trials)
    assert f"saved by stopping early {100 * saved / (saved + spent):.0f} %" in text
    rows = re.findall(r"<tr.*?</tr>", page[page.index("<tbody>") :], re.DOTALL)
    assert len(rows) == len(trials)


def test_two_objectives_have_a_front() -> None:
    trials = swept()
    page = render("s3://runs/sweep", SPACE, BOTH, trials)
    assert "<h2>Pareto front</h2>" in page
    assert page.count(">front</span>") == len(BOTH.front([trial.metrics for trial in trials])) > 1


def test_what_a_parameter_matters_is_found_out() -> None:
    found = importances(swept(60), SPACE, MIOU)
    assert next(iter(found)) == "optimizer.lr"
    assert found["optimizer.lr"] > 0.5
    assert sum(found.values()) == pytest.approx(1)
    assert importances(swept(FEWEST - 1), SPACE, MIOU) == {}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sweep_of_few_trials_is_reported_too(count: int) -> None:
    page = render("s3://runs/sweep", SPACE, BOTH, swept(count))
    assert "<h2>Importance</h2>" not in page
    assert "<h2>Trials</h2>" in page


def test_a_sweep_without_a_score_is_reported_too() -> None:
    page = render("s3://runs/sweep", SPACE, MIOU, [trial for trial in swept() if trial.state == "failed"])
    assert "None has a score" in page


class References(HTMLParser):
    """What a page would load, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def test_the_report_loads_nothing_and_runs_nothing_whatever_it_is_told() -> None:
    page = render("s3://runs/sweep", SPACE, BOTH, swept())
    references = References(page)
    assert [name for name in references.loaded if not name.startswith("#")] == []
    assert "script" not in references.tags
    assert html.escape(EVIL, quote=False).replace("'", "&#39;") in page
    assert not re.search(r"url\((?!#)", page)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed, which would show the report")
def test_a_browser_shows_the_report(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render("s3://runs/sweep", SPACE, BOTH, swept()))
    picture = tmp_path / "report.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,4600"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert picture.exists(), done.stderr[-2000:]
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    # Each chart has the accent's green in it: the page's own style has come to what is drawn.
    green = (abs(pixels - np.array([0x0D, 0x7A, 0x5F])).sum(axis=2) < 60).sum(axis=1)
    bands = np.flatnonzero(np.diff((green > 0).astype(int)) == 1)
    assert green.sum() > 5000
    assert len(bands) > 10
