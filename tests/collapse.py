"""Why small networks collapse at the start: what the teacher's outputs do in the first steps.

    python -m tests.collapse                    # ten minutes on one core
    python -m tests.collapse --arch vit_tiny    # half an hour

Trains the miniature's network, or another, on shapes for 250 steps with several settings, and writes, for
some steps, a table of means over the nine steps around each (five at the first), over 32 images a step, so
they are noisy:

- deviation: of the teacher's outputs over images and views, in temperatures;
- agreement: the correlation of an image's two outputs, over the images. 0: they have nothing in common;
- gain: agreement * student's temperature / teacher's. Near the uniform output the student's best answer
  deviates by that many times what the teacher's do, so below 1 the deviation dies out;
- centre's error: the root mean square distance between the outputs' mean and the centre, in deviations;
- entropy: of the teacher's outputs, in percent of ln K.
"""

import argparse
import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import main_dino
import utils
import vision_transformer
from tests.miniature import FULL, SWEEPS, draw_shapes, lasting, on_shapes

STEPS = 1, 50, 100, 150, 200, 246
FLAGS, WAYS, _ = SWEEPS["start"]  # under the temperature 0.04
STARTS = [FLAGS.format(way) for way in WAYS]
PLAIN, BATCH_NORM, SINKHORN = STARTS[0], STARTS[2], STARTS[4]
SETTINGS = [
    *STARTS,
    f"{PLAIN} --warmup_teacher_temp 0.02 --teacher_temp 0.02",
    f"{BATCH_NORM} --warmup_teacher_temp 0.02 --teacher_temp 0.02",
    f"{BATCH_NORM} --warmup_teacher_temp 0.02 --teacher_temp 0.02 --momentum_teacher 0.98",
    f"{BATCH_NORM} --jitter_p 0",
    f"{SINKHORN} --warmup_teacher_temp 0.01 --teacher_temp 0.01",
]


class WatchedLoss(utils.DINOLoss):
    """A loss that notes what the teacher's outputs are in each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.noted: list[dict[str, float]] = []

    def forward(
        self, student_output: Tensor | utils.Prototypes, teacher_output: Tensor, epoch: float
    ) -> Tensor:
        mean = teacher_output.mean(dim=0, keepdim=True)
        first, second = (teacher_output - mean).chunk(2)
        variance = (first.square().mean() + second.square().mean()) / 2
        error = (mean - self.center).square().mean().sqrt() if self.centering == "ema" else torch.zeros(())
        loss = super().forward(student_output, teacher_output, epoch)
        temp = float(self.stats.get("temp", self.teacher_temp(epoch)))
        agreement = float((first * second).mean() / variance)
        self.noted.append(
            {
                "deviation": float(variance.sqrt()) / temp,
                "agreement": agreement,
                "gain": agreement * self.student_temp / temp,
                "centre's error": float(error / variance.sqrt()),
                "entropy": 100 * float(self.stats["entropy"]) / np.log(teacher_output.shape[1]),
            }
        )
        return loss


def watch(flags: list[str]) -> list[dict[str, float]]:
    """Train with these flags; what was noted in each step."""
    losses: list[WatchedLoss] = []

    def watched(*args, **kwargs) -> WatchedLoss:
        losses.append(WatchedLoss(*args, **kwargs))
        return losses[-1]

    with mock.patch.object(main_dino, "DINOLoss", watched):
        main_dino.main(main_dino.parse_args(flags))
    return losses[0].noted


def table(noted: list[dict[str, float]]) -> str:
    """In Markdown: a line for each of `STEPS`."""
    lines = [f"| step | {' | '.join(noted[0])} |", "|---" * (1 + len(noted[0])) + "|"]
    for step in STEPS:
        around = noted[max(step - 5, 0) : step + 4]
        means = (np.mean([numbers[name] for numbers in around]) for name in noted[0])
        lines.append(f"| {step} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def main() -> None:
    """Train with each of `SETTINGS`; write the tables and the numbers of all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="collapse", help="for the images, the runs and the results")
    parser.add_argument("--arch", choices=vision_transformer.VITS, default="vit_nano")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out, name = Path(args.output_dir).absolute(), f"{args.arch}_seed{args.seed}"
    if any(out.glob(f"*_{name}")):  # a run that resumes has no first steps to watch
        parser.error(f"{out} has runs of {args.arch} with this seed: give another --output_dir")
    draw_shapes(out / "shapes", {"train": FULL.images, "val": FULL.held_out})
    noted = {}
    for i, setting in enumerate(SETTINGS):
        run = out / f"{i}_{name}"
        recipe = [*on_shapes(out / "shapes", args.seed), *lasting(FULL.epochs)]
        flags = [*recipe, *setting.split(), "--arch", args.arch]
        with open(out / f"{run.name}.txt", "w") as said, contextlib.redirect_stdout(said):
            noted[setting] = watch([*flags, "--max_steps", "250", "--output_dir", str(run)])
        print(f"`{setting}`\n\n{table(noted[setting])}\n", flush=True)
    (out / f"{name}.json").write_text(json.dumps(noted))
    (out / f"{name}.md").write_text("\n\n".join(f"`{s}`\n\n{table(n)}" for s, n in noted.items()) + "\n")


if __name__ == "__main__":
    main()
