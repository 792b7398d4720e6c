import pytest
import torch

from tests.collapse import STEPS, WatchedLoss, main, table
from utils import DINOLoss


def test_what_the_two_outputs_of_an_image_have_in_common_is_noted():
    torch.manual_seed(0)
    student, first, other = torch.randn(3, 6, 5).unbind()
    own = first - first.mean(dim=0)
    for second, agreement in ((first, 1), (first - 2 * own, -1)):
        loss_fn, plain = WatchedLoss(5, 2, 0.05, 0.05, 0, 1), DINOLoss(5, 2, 0.05, 0.05, 0, 1)
        args = torch.cat([student, other]), torch.cat([first, second]), 0
        assert loss_fn(*args) == plain(*args)
        assert loss_fn.noted[0]["agreement"] == pytest.approx(agreement, abs=1e-5)
        assert loss_fn.noted[0]["gain"] == pytest.approx(2 * agreement, abs=1e-4)
        deviation = own.square().mean().sqrt().item()
        assert loss_fn.noted[0]["deviation"] == pytest.approx(deviation / 0.05, rel=1e-5)


def test_table_holds_means_around_its_steps():
    lines = table([{"gain": float(i)} for i in range(250)]).splitlines()
    assert lines[:3] == ["| step | gain |", "|---|---|", "| 1 | 2.00 |"]  # of the first five
    assert lines[-1] == f"| {STEPS[-1]} | {STEPS[-1] - 1:.2f} |"


def test_a_folder_with_runs_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "0_vit_nano_seed0").mkdir()
    monkeypatch.setattr("sys.argv", ["collapse", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "give another --output_dir" in capsys.readouterr().err
