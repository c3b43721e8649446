"""What a run has produced is written again for people and for TensorBoard."""

from tests.commands import smolray


def test_report_and_tensorboard_are_written(run):
    assert smolray("report", "demo", "--storage", str(run.parent)).exit_code == 0
    assert "Training loss" in (run / "report.html").read_text()
    done = smolray("tensorboard", "demo", "--out", str(run / "tb"), "--storage", str(run.parent))
    assert done.exit_code == 0
    assert len(list((run / "tb").iterdir())) == 1
