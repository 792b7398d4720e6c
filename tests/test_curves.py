import importlib.util
import json
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

import main_dino
from support.curves import Curves
from support.errors import UserError
from tests.conftest import run

RECORD = {"train_loss": 3.0, "train_entropy": 1.0, "train_kl": 2.0, "train_lr": 1e-3, "train_wd": 0.04,
          "train_momentum": 0.99, "knn_teacher": 50.0, "epoch": 0, "step": 10}  # fmt: skip


def drawn(folder, *records) -> Image.Image:
    (folder / "log.txt").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    Curves(folder, main_dino.PANELS).update(records[-1])
    with Image.open(folder / "curves.png") as picture:
        return picture.convert("RGB")


def test_the_curves_show_what_the_log_says(tmp_path):
    one = drawn(tmp_path, RECORD)
    two = drawn(tmp_path, RECORD, RECORD | {"epoch": 1, "train_loss": 2.0})
    assert one.size == two.size and one.tobytes() != two.tobytes()
    assert drawn(tmp_path, RECORD).tobytes() == one.tobytes()


def test_each_panel_has_its_numbers_over_the_epochs_from_1(tmp_path, monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda own, *args, **kw: figures.append(own) or savefig(own, *args, **kw)
    )
    records = [RECORD | {"epoch": i, "train_loss": 3.0 - i, "knn_student": 40.0 + i} for i in (0, 1)]
    for record in records:
        del record["train_momentum"]  # a panel without numbers is left out
    drawn(tmp_path, *records)
    shown = {axes.get_title(): axes for axes in figures[0].axes if axes.axison}
    assert list(shown) == [title for title, _ in main_dino.PANELS if "momentum" not in title]
    for title, expected in (
        ("loss", {"loss": [[1, 3], [2, 2]]}),
        ("k-NN, %", {"teacher": [[1, 50], [2, 50]], "student": [[1, 40], [2, 41]]}),
    ):
        assert {line.get_label(): line.get_xydata().tolist() for line in shown[title].lines} == expected
        assert bool(shown[title].get_legend()) == (len(expected) > 1)


def test_a_panel_may_show_any_number_of_the_log(tmp_path):
    (tmp_path / "log.txt").write_text(json.dumps(RECORD | {"unreadable": 3}))
    for name in ("unreadable", "train_loss"):
        Curves(tmp_path, [("a title", [name])]).update({})
        assert (tmp_path / "curves.png").exists()
        (tmp_path / "curves.png").unlink()


def test_lines_of_others_and_a_log_without_knn_are_drawn_as_well(tmp_path):
    (tmp_path / "log.txt").write_text('not of ours\n[1]\n{"epoch": 0, "train_loss": 1.0}\n')
    Curves(tmp_path, main_dino.PANELS).update({})
    assert (tmp_path / "curves.png").exists()


def test_short_epochs_are_not_all_drawn_but_the_last_one_is(tmp_path):
    """In 10,000 epochs of a second, the drawings would take an hour."""
    (tmp_path / "log.txt").write_text(json.dumps(RECORD))
    curves, drawings = Curves(tmp_path, main_dino.PANELS), []
    for last in (False, False, True):
        curves.update(RECORD, last)
        drawings.append((tmp_path / "curves.png").exists())
        (tmp_path / "curves.png").unlink(missing_ok=True)
    assert drawings == [True, False, True]
    curves.due = 0.0  # the pause is over
    curves.update(RECORD)
    assert (tmp_path / "curves.png").exists()


def test_a_picture_of_others_is_kept(tmp_path, capsys):
    drawn(tmp_path, RECORD)
    Image.new("RGB", (9, 9)).save(tmp_path / "curves.png")
    Curves(tmp_path, main_dino.PANELS).update(RECORD)
    assert "curves.png is kept" in capsys.readouterr().out
    assert Image.open(tmp_path / "curves.png").size == (9, 9)


def test_a_disk_that_fails_is_a_warning(tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "log.txt").write_text(json.dumps(RECORD))
    Curves(tmp_path, main_dino.PANELS).update(RECORD)
    assert "warning: cannot save" in capsys.readouterr().out


def test_without_matplotlib_or_tensorboard_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Curves(tmp_path, main_dino.PANELS).update(RECORD)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="pip install tensorboard"):
        main_dino.check_args(main_dino.parse_args(["--tensorboard"]))


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = Curves(tmp_path, main_dino.PANELS, tensorboard=True)
    writer.update(RECORD)
    writer.update(RECORD | {"step": 20, "train_loss": 2.0})
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train_loss")] == [(10, 3.0), (20, 2.0)]
    assert set(shown.Tags()["scalars"]) == set(RECORD)
    # After a crash, the run goes on from an earlier checkpoint.
    again = Curves(tmp_path, main_dino.PANELS, tensorboard=True, first_step=20)
    again.update(RECORD | {"step": 20, "train_loss": 1.0})
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train_loss")] == [(10, 3.0), (20, 1.0)]


FULL_DISK = """
import sys
from pathlib import Path
from support.curves import Curves
from tests.conftest import limit_files
curves = Curves(Path(sys.argv[1]), [], tensorboard=True)
curves.can_draw = False
limit_files(0)
for step in range(1000):
    curves.update({"train_loss": 1.0, "step": step})
"""


def test_a_full_disk_ends_tensorboard_and_not_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    said = run("-c", FULL_DISK, tmp_path).stdout
    assert said == "warning: stopped writing for TensorBoard: File too large\n"
