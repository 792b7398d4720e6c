import json
import math

import numpy as np
import pytest

from tests.miniature import (
    SWEEPS,
    VARIANTS,
    Row,
    Runs,
    as_json,
    compare,
    differences,
    records,
    save_figures,
    shapes_rows,
    spread,
    sweep_runs,
    sweep_table,
    table,
    train_dino,
)


def write_run(folder, speeds, knn=None):
    """A finished training of 10 steps of 4 images an epoch."""
    folder.mkdir()
    (folder / "finished.txt").write_text("--batch_size_per_gpu 4 --epochs 2")
    log = [{"epoch": i, "step": 10 * (i + 1), "train_images_per_second": s} for i, s in enumerate(speeds)]
    for record, value in zip(log, knn or [], strict=False):
        record |= {"knn_teacher": value} if value else {}
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in log))


def test_seconds_are_those_of_the_fastest_epoch(tmp_path):
    write_run(tmp_path / "a", [20, 40])
    assert [record["seconds"] for record in records(tmp_path / "a")] == [1, 2]


def test_curves_are_where_both_numbers_were_measured(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"base_seed{seed}", [40, 40, 40], [None, 30 + seed, 50 + seed])
    steps, accuracies = Runs(tmp_path, 2).curves("base", "step", "knn_teacher")
    assert steps.tolist() == [[20, 30]] * 2 and accuracies.tolist() == [[30, 50], [31, 51]]
    assert Runs(tmp_path, 2).last("base").tolist() == [50, 51]


@pytest.mark.parametrize(
    "a, b, said",
    [
        ([3, 4], [1, 1], "a > b: yes, +2.5 ± 0.7"),
        ([1, 1], [1, 4], "a > b: no, -1.5 ± 2.1"),  # no more is not more
        ([1, 5], [2, 2], "a > b: in 1 of 2 seeds, +1.0 ± 2.8"),
        ([5], [2], "a > b: yes, +3.0"),
    ],
)
def test_a_claim_shows_if_it_does_so_in_every_seed(a, b, said):
    assert compare({"a": np.array(a), "b": np.array(b)}, ("a", "b")) == said


def test_a_row_of_the_table_has_mean_and_deviation():
    row = Row("claim", "k-NN, %", {"a": np.array([1, 2, 3])}, "yes")
    assert table([row]).splitlines()[2] == "| claim | k-NN, % | a 2.0 ± 1.0 | yes |"
    assert spread(np.array([1.0])) == "1.0"


def test_a_rerun_compares_with_the_json_of_an_earlier_run():
    row = Row("claim", "k-NN after 20 s, %", {"a": np.array([1.0, 2.0, 3.0])}, "yes")
    before = json.loads(json.dumps(as_json([row, row._replace(measured="gone")])))
    assert before[0]["values"] == {"a": [1, 2, 3]}
    again = row._replace(
        measured="k-NN after 31 s, %",
        values={"a": np.array([2.0, 3.0, 4.0]), "b": np.array([5.0])},
        shows="no",
    )
    assert differences([again, row._replace(claim="new")], before).splitlines()[2:] == [
        "| claim | does it show | yes | no | |",
        "| claim | k-NN after 31 s, %: a | 2.0 ± 1.0 | 3.0 ± 1.0 | +1.0 |",
        "| claim | k-NN after 31 s, %: b | nan | 5.0 | +nan |",
        "| new | k-NN after 20 s, % | not measured | | |",
        "| claim | gone | | not measured | |",
    ]


def test_a_finished_run_is_not_done_again_and_a_failed_one_is_named(tmp_path):
    write_run(tmp_path / "run", [40, 40])
    train_dino(tmp_path / "run", "--batch_size_per_gpu 4 --epochs 2".split())
    assert not (tmp_path / "run" / "said.txt").exists()
    with pytest.raises(RuntimeError, match=r"ended with 2: see .*said.txt"):
        train_dino(tmp_path / "run", ["--epochs", "0"])


@pytest.fixture
def made_up(tmp_path) -> Runs:
    """Two seeds in which each variant ends with a k-NN of its own, higher in the order of `VARIANTS`."""
    entropies = {
        "centering": (1, 0),
        "sharpening": (0, 0),
    }  # of ln 64: of an output, and what the mean has more
    for seed in range(2):
        for place, name in enumerate(VARIANTS):
            folder = tmp_path / f"{name}_seed{seed}"
            write_run(folder, [40, 40], [30, 60 + place + seed])
            log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
            entropy, more = entropies.get(name, (0.5, 0.4))
            for record in log:
                record |= {"train_entropy": entropy * math.log(64), "train_spread": more * math.log(64)}
                record |= {"train_kl": 0.0, "knn_student": 40}
            (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in log))
        accuracies = {"base": 60, "constant_rate": 60, "supervised": 70, "random": 25, "pixels": 28}
        for name, top1 in accuracies.items():
            found = {"jaccard60": 30 - top1 / 10, "jaccard90": top1, "on_object": top1, "object": 17}
            for prefix in ("", "demo_"):
                folder = tmp_path / f"{prefix}{name}_seed{seed}"
                folder.mkdir(exist_ok=True)
                (folder / "knn.json").write_text(json.dumps({"top1": top1}))
            (folder / "segmentation.json").write_text(json.dumps(found))
    return Runs(tmp_path, 2)


def test_the_table_says_what_shows_and_what_does_not(made_up):
    shows = {row.claim + row.measured: row.shows for row in shapes_rows(made_up)}

    def said(part: str) -> str:
        (found,) = (says for claim, says in shows.items() if part in claim)
        return found

    assert said("uniform collapse") == said("one-dimension") == said("neither") == "yes"
    assert said("momentum").startswith("momentum > untrained: yes, +35.5 ± 0.7; last epoch > untrained: yes")
    assert said("momentum").endswith("momentum's student > last epoch: no, -21.5 ± 0.7")
    assert said("copying") == (
        "uniform collapse: no; momentum > copy: no, -2.0 ± 0.0; last epoch > copy: no, -1.0 ± 0.0"
    )
    assert said("throughout") == "teacher > student: yes, +10.2 ± 0.4; in 2 of 4 evaluations"
    gains = {"2": 1.0, "6": 2.0, "10": 3.0}
    crops = [f"{number} local > 0 local: yes, {gain:+.1f} ± 0.0" for number, gain in gains.items()]
    assert said("Multi-crop") == "; ".join(crops)
    assert said("Smaller").startswith("patch 16 > patch 32: no, -9.0")
    assert said("rivals").startswith("DINO - supervised: -10.0 ± 0.0; DINO > untrained: yes, +35.0 ± 0.0")
    assert said("as in the paper") == "DINO > supervised: yes, +1.0 ± 0.0; DINO > untrained: no, -3.5 ± 0.0"


def test_a_run_that_has_not_collapsed_is_not_said_to_have(made_up):
    for name in ("centering", "sharpening"):
        log = (made_up.folders("base")[0] / "log.txt").read_text()
        (made_up.folders(name)[0] / "log.txt").write_text(log)
    shows = [row.shows for row in shapes_rows(made_up) if "alone" in row.claim]
    assert shows == ["in 1 of 2 seeds"] * 2


def test_the_figures_are_written(made_up):
    save_figures(made_up)
    assert {path.name for path in made_up.out.glob("*.png")} == {"teachers.png", "collapse.png", "crops.png"}


def test_the_recipes_own_values_are_one_run_of_the_sweeps(tmp_path):
    names = sweep_runs(SWEEPS)
    values = sum(len(values) for _, values, _ in SWEEPS.values())
    assert len(names) == values - 2 and names["base"] == ""  # three of the sweeps have it
    assert names["prototypes_256"] == "--out_dim 256"
    for name in names:
        write_run(tmp_path / f"{name}_seed0", [40], [50])
        log = tmp_path / f"{name}_seed0" / "log.txt"
        more = {"knn_student": 60, "train_entropy": math.log(16), "train_spread": 1.5}
        log.write_text(json.dumps(json.loads(log.read_text()) | more))
    lines = sweep_table(Runs(tmp_path, 1), "prototypes").splitlines()[2:]
    assert lines[0] == "| 16 | 10 | 50.0 | 60.0 | 100.0 | 1.50 |"
    assert lines[2] == "| 256 | 10 | 50.0 | 60.0 | 50.0 | 1.50 |"
