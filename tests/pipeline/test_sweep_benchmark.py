"""What the benchmark of sweeps says where something that it needs is missing."""

from pathlib import Path

import pytest

from tests.benchmarks import sweep


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", ""], "there are no curves to simulate with at"),
        (["--data", "", "--record"], "--data is missing: the CamVid folder"),
        (["--data", "/nowhere"], "/nowhere is not the CamVid folder: it has no folder trainannot"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", *arguments])
    monkeypatch.setattr(sweep, "CURVES", tmp_path / "none.json")
    with pytest.raises(SystemExit) as ended:
        sweep.main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
