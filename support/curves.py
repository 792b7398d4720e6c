"""A run's log.txt as a picture, and for TensorBoard. Neither library is needed for training."""

from pathlib import Path

from support.logger import log
from support.restart import read_log, try_to_write
from support.weights import replacing


class Curves:
    """Draws curves.png from log.txt after each epoch; gives the same numbers to TensorBoard if asked to.

    Without matplotlib, a note says so.
    """

    PANELS = (
        ("loss", ["train_loss"]),
        ("teacher entropy and KL from the student, nats", ["train_entropy", "train_kl"]),
        ("learning rate", ["train_lr"]),
        ("weight decay", ["train_wd"]),
        ("teacher momentum", ["train_momentum"]),
        ("k-NN, %", ["knn_teacher", "knn_student"]),
    )

    def __init__(self, folder: Path, tensorboard: bool = False, first_step: int = 0):
        """`folder` is the run's; what TensorBoard has from `first_step` on is made anew."""
        self.folder, self.writer, self.can_draw = folder, None, True
        try:  # now, as after an epoch it would be late for a note
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            log(f"note: no curves.png without matplotlib ({error}): pip install matplotlib")
            self.can_draw = False
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def update(self, record: dict) -> None:
        """The epoch of `record` has come to log.txt."""
        if self.can_draw:
            try_to_write(self.folder / "curves.png", lambda path: draw_curves(self.folder / "log.txt", path))
        if self.writer:
            for name, value in record.items():
                self.writer.add_scalar(name, value, record["step"])
            self.writer.flush()


def draw_curves(log_file: Path, picture: Path) -> None:
    """The numbers of each epoch in log.txt, as a PNG."""
    from matplotlib.figure import Figure

    records = read_log(log_file)
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, Curves.PANELS, strict=True):
        for name in names:
            points = [(record["epoch"] + 1, record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=name.split("_")[1])
        if len(axes.lines) > 1:
            axes.legend()
        if not axes.lines:  # nothing to show
            axes.set_axis_off()
            continue
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=80)
