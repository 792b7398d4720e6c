import math

import pytest
import torch

import main_dino
import utils
from support.checkpoints import load_checkpoint
from support.data import ImageFiles
from support.distributed import fix_random_seeds
from support.loading import TrainingViews
from support.pixels import normalize
from tests.conftest import TINY, train
from utils import DataAugmentationDINO

FLAGS = (
    "--seed 3 --epochs 3 --warmup_epochs 1 --min_lr 0.02 --weight_decay 0.1 --weight_decay_end 0.3 "
    "--momentum_teacher 0.7 --warmup_teacher_temp 0.03 --teacher_temp 0.07 --warmup_teacher_temp_epochs 2 "
    "--clip_grad 0.05 --freeze_last_layer 2 --norm_last_layer false --drop_path_rate 0.3 "
    "--global_crops_scale 0.5 1 --local_crops_scale 0.1 0.3"
).split()


def cosine(first, last, step, steps):
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_run_is_algorithm_1(images, tmp_path, name):
    """With no flag at its default, against the paper's loop written plainly: 3 epochs of 5 steps."""
    flags = [*FLAGS, "--optimizer", name, "--lr", {"sgd": "6", "adamw": "0.6", "lars": "60"}[name]]
    train(*flags, "--data_path", images, "--output_dir", tmp_path)
    args = main_dino.parse_args([*TINY, *flags])
    saved = load_checkpoint(tmp_path / "checkpoint.pth")

    fix_random_seeds(3)
    student, teacher = main_dino.build_networks(args)
    teacher.load_state_dict(student.state_dict())
    student.head.defer_last_layer = False
    augmentation = DataAugmentationDINO((0.5, 1), (0.1, 0.3), 2, 32, 16)
    data = TrainingViews(ImageFiles(images), augmentation.views, seed=3)
    groups, center = utils.get_params_groups(student), torch.zeros(1, 64)
    make = {
        "sgd": lambda g: torch.optim.SGD(g, lr=0, momentum=0.9),
        "adamw": torch.optim.AdamW,
        "lars": utils.LARS,
    }
    optimizer, peak = make[name](groups), float(flags[-1]) * 4 / 256
    for step in range(15):
        epoch = step // 5
        order = torch.randperm(20, generator=torch.Generator().manual_seed(3 + epoch))  # DistributedSampler's
        items = [data[epoch, i][0] for i in order[step % 5 * 4 :][:4].tolist()]
        views = [normalize(part[:, v]) for part in map(torch.stack, zip(*items, strict=True)) for v in (0, 1)]
        fix_random_seeds(3, 0, step)  # drop path
        q = ((teacher(views[:2]) - center) / (0.03, 0.07, 0.07)[epoch]).softmax(-1).chunk(2)
        p = (student(views) / 0.1).log_softmax(-1).chunk(4)
        pairs = [(t, s) for t in range(2) for s in range(4) if t != s]
        loss = sum(-(q[t] * p[s]).sum(-1).mean() for t, s in pairs) / len(pairs)
        with torch.no_grad():
            center = 0.9 * center + 0.1 * teacher(views[:2]).mean(0)
        optimizer.zero_grad()
        loss.backward()
        for param in student.parameters():
            param.grad *= min(1, 0.05 / (param.grad.norm().item() + 1e-6))
        if epoch < 2:
            for param in student.head.last_layer.parameters():
                param.grad = None
        optimizer.param_groups[0]["weight_decay"] = cosine(0.1, 0.3, step, 15)
        for group in optimizer.param_groups:
            group["lr"] = peak * step / 4 if epoch == 0 else cosine(peak, 0.02, step - 5, 10)
        optimizer.step()
        with torch.no_grad():
            m = cosine(0.7, 1, step, 15)
            for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
                t.mul_(m).add_((1 - m) * s)
    for part, network in (("student", student), ("teacher", teacher)):
        flat = [
            torch.cat([v.flatten() for v in state.values()]) for state in (network.state_dict(), saved[part])
        ]
        assert (flat[0] - flat[1]).norm() <= (5e-4 if name == "adamw" else 1e-6) * flat[0].norm(), part
    torch.testing.assert_close(saved["dino_loss"]["center"], center, rtol=1e-2, atol=1e-3)
