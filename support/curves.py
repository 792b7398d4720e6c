"""Draws a run's log and writes it for TensorBoard. Training needs neither matplotlib nor TensorBoard."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from support.errors import reason_of
from support.files import replacing
from support.logger import log
from support.pictures import has_mark
from support.restart import read_log, try_to_write

MARK = "DINO curves of a run"  # text in the PNG, which identifies our pictures

# A title, and the names of the numbers that share its panel.
Panels = Sequence[tuple[str, Sequence[str]]]


class Curves:
    """Draws curves.png from log.txt after each epoch; writes the same numbers for TensorBoard if asked to.

    Leaves out a drawing where epochs are so short that all drawings would take more than `SHARE` of the time.
    Logs a note if matplotlib is missing.
    """

    SHARE = 0.02  # a drawing takes 0.3 s, and 0.6 s after 10,000 epochs

    def __init__(self, folder: Path, panels: Panels, tensorboard: bool = False, first_step: int = 0):
        """`folder` is the run's; TensorBoard discards its earlier records from `first_step` on."""
        self.folder, self.panels, self.writer, self.can_draw = folder, panels, None, True
        try:  # checked at the start, so that the user learns it before training
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            log(f"note: no curves.png without matplotlib ({error}): pip install matplotlib")
            self.can_draw = False
        self.picture, self.due = folder / "curves.png", 0.0  # when to draw again
        if self.picture.is_file() and not has_mark(self.picture, MARK):
            cause = "no run of this version drew it"
            log(f"warning: {self.picture} is kept, as {cause}: move it away to get the curves")
            self.can_draw = False
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def update(self, record: dict, last: bool = False) -> None:
        """Redraw the curves, after `record` was added to log.txt; always if it is the `last` of the run."""
        begun = time.monotonic()
        if self.can_draw and (last or begun >= self.due):
            with try_to_write(self.picture):
                draw_curves(self.folder / "log.txt", self.picture, self.panels)
            self.due = begun + (time.monotonic() - begun) / self.SHARE
        if self.writer:
            try:
                for name, value in record.items():
                    self.writer.add_scalar(name, value, record["step"])
                self.writer.flush()
            except OSError as error:  # the writer's thread has ended, and raises this again
                log(f"warning: stopped writing for TensorBoard: {reason_of(error)}")
                self.writer = None


def draw_curves(log_file: Path, picture: Path, panels: Panels) -> None:
    """Draw the numbers of each epoch in log.txt as a PNG."""
    from matplotlib.figure import Figure

    records = read_log(log_file)
    figure = Figure(figsize=(12, 6))
    # matplotlib's own layout would take longer than the drawing, after each epoch
    margins = dict(left=0.05, right=0.98, bottom=0.09, top=0.94, wspace=0.25, hspace=0.4)
    grid = figure.subplots(2, math.ceil(len(panels) / 2), gridspec_kw=margins).flat
    for axes, (title, names) in zip(grid, [*panels, ("", [])], strict=False):  # the last place may be empty
        for name in names:
            points = [(record["epoch"] + 1, record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=name.partition("_")[2] or name)
        if len(axes.lines) > 1:
            axes.legend()
        if not axes.lines:  # nothing to show
            axes.set_axis_off()
            continue
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
    with replacing(picture) as file:
        figure.savefig(file, format="png", dpi=80, metadata={"Software": MARK})
