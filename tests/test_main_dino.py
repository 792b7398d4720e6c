import argparse
import contextlib
import copy
import fcntl
import functools
import math
import multiprocessing
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import types

import pytest
import torch
from PIL import Image

import eval_knn
import eval_linear
import main_dino
import utils
from support import backbones, cli
from support.checkpoints import load_checkpoint, save_checkpoint
from support.data import ImageFiles, Source, open_training_images
from support.distributed import fix_random_seeds, only_one_in_process
from support.errors import TrainingError, UserError
from support.loading import to_device
from support.logger import MetricLogger
from support.monitor import Monitor
from support.pixels import normalize, normalized_views, to_pixels
from support.restart import Run
from tests.conftest import ROOT, TINY, call, log_of, run, save_images, torchrun, train
from utils import PAPER, CollapseWatch, DINOHead, Recipe
from vision_transformer import VITS, VisionTransformer

PUBLISHED = {
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True,
    "momentum_teacher": 0.996, "use_bn_in_head": False, "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "use_fp16": True, "weight_decay": 0.04,
    "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64, "epochs": 100,
    "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
    "drop_path_rate": 0.1, "global_crops_scale": (0.4, 1.0), "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4), "output_dir": ".", "saveckp_freq": 20, "seed": 0,
    "num_workers": 10, "dist_url": "env://", "local_rank": 0,
}  # fmt: skip
# Our own flags, at values that leave everything as published.
NEW = {
    "head_hidden_dim": 2048, "head_bottleneck_dim": 256, "global_crops_size": 224, "local_crops_size": 96,
    "accum_steps": 1, "teacher_update": "ema", "centering": "ema",
    "adapt_teacher_temp": 0.0, "precision": None, "max_steps": 0,
    "save_every_steps": 0, "allow_changed_args": False, "init_from": "", "knn_every": 0, "knn_data": "",
    "knn_share": 0.1, "tensorboard": False, "augment_on": "worker", "compile": False,
    "grad_checkpointing": False, "cpu_threads": 0, "data_path": "", "dataset": "", "split": "",
    "download": False, "demo": False, "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray_p": 0.2,
    "blur_p": (1.0, 0.1, 0.5), "blur_sigma": (0.1, 2.0), "solarize_p": (0.0, 0.2, 0.0), "hflip_p": 0.5,
    "vflip_p": 0.0, "quarter_turns": False, "crop_aspect": (3 / 4, 4 / 3), "preview": "",
    "in_chans": 3, "value_range": None, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


def as_lists(args) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}


def built(*flags) -> main_dino.Training:
    """The smallest training on a CPU, for twenty images."""
    args = main_dino.parse_args([*TINY, *flags])
    return main_dino.build_training(args, torch.device("cpu"), main_dino.count_steps(args, 20), False)


@pytest.fixture
def threads():
    """The number of threads, which a test may change."""
    yield torch.get_num_threads()
    torch.set_num_threads(1)  # as for all tests


# ---- flags


def test_published_flags_and_defaults():
    assert vars(main_dino.parse_args([])) == PUBLISHED | NEW


def test_recorded_arguments_replay():
    argv = []
    for name, value in PUBLISHED.items():
        values = value if isinstance(value, tuple) else (value,)
        argv += [f"--{name}", *map(str, values)]
    assert as_lists(main_dino.parse_args(argv)) == as_lists(argparse.Namespace(**PUBLISHED | NEW))
    assert main_dino.parse_args(["--local-rank", "3"]).local_rank == 3


def test_help_is_whole_and_does_not_import_timm():
    code = (
        "import sys, main_dino\n"
        "try: main_dino.parse_args(['--help'])\n"
        "except SystemExit: assert 'timm' not in sys.modules"
    )
    out = run("-c", code).stdout
    assert all(f"--{name}" in out for name in PUBLISHED)
    flags = [action for action in main_dino.get_args_parser()._actions if action.option_strings]
    assert all(action.help for action in flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs ten", "--epochs: 'ten' is not a whole number"),
        ("--batch_size 8", "--batch_size 8: did you mean --batch_size_per_gpu, --patch_size?"),
        ("--epoch 3", "unrecognized arguments: --epoch"),
        ("--norm_last_layer maybe", "neither true nor false"),
        ("--precision int8", "--precision: invalid choice: .int8. .choose from"),
        ("", "no data given .--data_path.: give a folder of images, or try --demo"),
        ("--data_path {images} --knn_every 1", "needs labelled images .--knn_every.: give --knn_data"),
        ("--data_path /nowhere", "no such file or folder"),
        ("--data_path {docs}", "no images found"),
        ("--data_path {images} --batch_size_per_gpu 21", "a batch of 21 .* larger than the dataset of 20"),
        ("--data_path {images} --batch_size_per_gpu 3 --accum_steps 7", r"lower it or --accum_steps$"),
        ("--data_path {images} --split dev", r"no folder dev/ .*the folder that holds dev/, dev.tar,"),
        ("--data_path {images} --knn_every 1 --knn_data /nowhere", r"or folder \(--knn_data /nowhere\)"),
        ("--data_path {images} --knn_every 1 --knn_data {images}", r"no folder train/ \(--knn_data"),
        ("--data_path {images} --local_crops_size 100", r"--local_crops_size 100\): try 96 or 104"),
        ("--data_path {images} --local_crops_size 32 20", r"--local_crops_size 32 20\): try 32 16 or 32 24"),
        ("--data_path {images} --global_crops_size 60 32", r"_crops_size 60 32\): try 56 32 or 64 32"),
        ("--data_path {images} --global_crops_size 8 8 8", "--global_crops_size: takes one length, or"),
        ("--data_path {images} --epochs 5 --warmup_epochs 9", "--warmup_epochs 9"),
        ("--data_path {images} --epochs 5 --warmup_teacher_temp_epochs 9", "--warmup_teacher_temp_epochs 9"),
        ("--data_path {images} --global_crops_scale 0.9 0.4", "MIN is larger than MAX"),
        ("--data_path {images} --blur_sigma 2 1", r"MIN is larger than MAX \(--blur_sigma 2.0 1.0\)"),
        ("--data_path {images} --crop_aspect 2 1", r"MIN is larger than MAX \(--crop_aspect"),
        ("--data_path {images} --jitter 0 0 0 0.6", r"changes by at most 0.5 \(--jitter 0.0 0.0 0.0 0.6\)"),
        ("--data_path {images} --blur_p 1 2 0", "--blur_p: must be at most 1, not 2"),
        ("--data_path {images} --blur_p 1 0", "--blur_p: expected 3 arguments"),
        ("--data_path {images} --quarter_turns maybe", "neither true nor false"),
        ("--data_path {images} --preview p.jpg", r"--preview p.jpg\): give a name that ends in .png"),
        ("--data_path {images} --preview {images}/p.png", "would become one of the images"),
        ("--data_path {docs} {images} --preview {images}/p.png", "would become one of the images"),
        ("--data_path {docs} --preview {images}/p.png", "no images found"),
        ("--data_path {images} --preview {images}/p.png --blur_sigma 2 1", "MIN is larger than MAX"),
        ("--data_path {images} --local_crops_number -1", "must be at least 0, not -1"),
        ("--data_path {images} --teacher_temp 0", "must be above 0, not 0"),
        ("--data_path {images} --arch vit_smal --batch_size_per_gpu 99", "did you mean vit_small"),
        (
            "--data_path {images} --arch vit_tiny_patch16_224 --local_crops_size 20",
            "vit_tiny_patch16_224 takes no images of 20 pixels",
        ),
        ("--data_path {images} --mean 0.5 116 104", r"must be from 0 to 1 \(--mean 0.5 116.*by 255"),
        ("--data_path {images} --mean -0.1 0 0", r"must be from 0 to 1 \(--mean -0.1"),
        ("--data_path {images} --mean 0 0 0 0", r"4 numbers for 3 channels \(--mean .*give one"),
        ("--data_path {images} --std 58 57 57", r"must be from 0 to 1 \(--std 58"),
        ("--demo --init_from x.pth", r"starts from random weights \(--init_from x.pth\): leave it out"),
    ],
)
def test_bad_usage_is_one_clear_line(images, tmp_path, capsys, flags, message):
    given = flags.format(images=images, docs=ROOT / "docs").split()
    argv = [*TINY, "--output_dir", str(tmp_path / "out"), *given]
    with pytest.raises(SystemExit) as end:
        cli.run_script(main_dino.main, main_dino.parse_args(argv))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_the_process_ends_with_the_line_and_code_2():
    result = run("main_dino.py", "--data_path", "/nowhere", check=False)
    assert result.returncode == 2
    assert result.stderr == "error: no such file or folder (--data_path /nowhere): check the path\n"


@pytest.mark.slow
def test_all_ranks_end_and_one_prints_the_error():
    result = torchrun(2, "main_dino.py", "--data_path", "/nowhere", check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: no such file or folder") == 1


@pytest.mark.slow
def test_batch_norms_of_several_processes_on_cpus_are_a_warning(images, tmp_path):
    flags = "--use_bn_in_head", "true", "--max_steps", "1", "--data_path", images
    said = torchrun(2, "main_dino.py", *TINY, *flags, "--output_dir", tmp_path).stdout
    assert said.count("warning: batch norms see each process's own images") == 1


MASKED = """
import torch, main_dino
from vision_transformer import VITS, VisionTransformer

class Masked(VisionTransformer):
    def __init__(self, *, patch_size, **settings):
        super().__init__(patch_size=patch_size, embed_dim=32, depth=2, num_heads=2, **settings)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, 32))

    def prepare_tokens(self, x):
        return super().prepare_tokens(x) + (self.mask_token if self.training else 0)

VITS["masked"] = Masked
main_dino.train_dino(main_dino.parse_args())
"""


@pytest.mark.slow
def test_several_processes_train_a_parameter_that_acts_in_training_only(images, tmp_path):
    (tmp_path / "masked.py").write_text(MASKED)
    flags = "--arch", "masked", "--max_steps", "2", "--data_path", images, "--output_dir", tmp_path
    torchrun(2, tmp_path / "masked.py", *TINY, *flags, env={"PYTHONPATH": str(ROOT)})


def test_warmups_left_at_their_defaults_are_shortened(capsys):
    args = main_dino.parse_args(["--epochs", "1"])
    main_dino.check_args(args)
    assert args.warmup_epochs == args.freeze_last_layer == 0.1
    out = capsys.readouterr().out
    assert "warning: --warmup_epochs shortened from 10 to 0.1, as --epochs is 1" in out
    assert "warning: --freeze_last_layer shortened from 1 to 0.1" in out
    args = main_dino.parse_args(["--epochs", "10"])
    main_dino.check_args(args)
    assert args.warmup_epochs == 10  # fits just so


def test_a_warm_up_of_all_steps_is_said(capsys):
    for epochs, warm_up, said in ((10, 10, 1), (1, 0.95, 1), (1, 0.8, 0)):  # the first as published
        args = main_dino.parse_args(["--epochs", str(epochs), "--warmup_epochs", str(warm_up)])
        main_dino.build_schedules(args, main_dino.Steps(4, 4, 5, 5 * epochs))
        expected = f"warning: --warmup_epochs {warm_up} is the whole run: the learning rate never falls"
        assert (expected in capsys.readouterr().out) == said


# ---- the recipe and its preview


def test_the_recipes_flags_reach_the_views():
    expected = Recipe(
        [0.1, 0.2, 0.3, 0.4], 0.5, 0.6, [0.1, 0.2, 0.3], [0.5, 0.7], [0.3, 0.2, 0.1], 0.1, 0.9, True,
        [0.5, 1.5],
    )  # fmt: skip
    flags = (
        "--jitter 0.1 0.2 0.3 0.4 --jitter_p 0.5 --gray_p 0.6 --blur_p 0.1 0.2 0.3 --blur_sigma 0.5 0.7 "
        "--solarize_p 0.3 0.2 0.1 --hflip_p 0.1 --vflip_p 0.9 --quarter_turns true --crop_aspect 0.5 1.5"
    )
    assert main_dino.build_augmentation(main_dino.parse_args(flags.split())).recipe == expected
    assert main_dino.build_augmentation(main_dino.parse_args([])).recipe == PAPER


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--jitter_p 0 --jitter 1 1 1 0", ["jitter"]),
        ("--jitter 0 0 0 0 --jitter_p 1", ["jitter_p"]),
        ("--blur_p 0 0 0 --blur_sigma 0.1 1", ["blur_sigma"]),
        ("--blur_p 0 0 0.1 --blur_sigma 0.1 1", []),
        ("--blur_p 0 0 0.1 --blur_sigma 0.1 1 --local_crops_number 0", ["blur_sigma"]),
        ("--blur_sigma 0 0 --blur_p 1 1 1", ["blur_p"]),
        ("--blur_p 1 0.1 1 --solarize_p 0 0.2 1 --local_crops_number 0", ["blur_p", "solarize_p"]),
        ("--blur_p 1 1 1 --solarize_p 1 0.2 1 --local_crops_number 0", []),
        ("--blur_p 1 0.1 1 --solarize_p 0 0.2 1 --blur_sigma 0 1", []),
        ("--vflip_p 0.5 --quarter_turns true", ["vflip_p"]),
        ("--vflip_p 0.5 --quarter_turns true --hflip_p 0", []),
        ("--warmup_teacher_temp 0.02", ["warmup_teacher_temp"]),
        ("--teacher_update copy --momentum_teacher 0.9", ["momentum_teacher"]),
        ("--local_crops_number 0 --local_crops_size 20", ["local_crops_size"]),  # it need not fit the patches
        ("--local_crops_number 0 --local_crops_scale 0.1 0.2", ["local_crops_scale"]),
        ("--arch resnet18 --patch_size 8", ["patch_size"]),
        ("--precision fp32 --use_fp16 false", ["use_fp16"]),
        ("--knn_data x --knn_share 0.5", ["knn_data", "knn_share"]),
        ("--demo --local_crops_number 0 --solarize_p 0 0.2 0", []),
        ("--demo --local_crops_number 0 --jitter_p 0", []),  # nor of what the demo sets itself
        ("--dist_url tcp://localhost:9999", ["dist_url"]),
        ("--epochs 20 --knn_every 21 --knn_data x", ["knn_every"]),
        ("--epochs 20 --knn_every 20 --knn_data x", []),
        ("--dataset FashionMNIST --knn_every 1", []),  # has labels, as the demo has
        ("--demo --knn_every 1", []),
        ("--jitter 0.4 0.4 0.2 0.5 --mean 0 0 0 --std 1 1 1", []),  # at their limits
        ("--in_chans 1 --gray_p 0 --jitter 0.5 0.5 0.2 0.1", []),  # nor said of what is off or the default
        ("--warmup_teacher_temp_epochs 3", ["warmup_teacher_temp_epochs"]),
    ],
)
def test_what_has_no_effect_in_a_recipe_is_said(flags, named, capsys):
    main_dino.check_args(main_dino.parse_args(flags.split()))
    assert re.findall(r"warning: --(\w+) has no effect", capsys.readouterr().out) == named


def test_local_views_larger_than_global_ones_are_said(capsys):
    flags = (
        "--global_crops_size 32 --local_crops_size 96 --global_crops_scale 0.05 0.2 --local_crops_scale 0.5 1"
    )
    for more, count in (("", 2), (" --local_crops_number 0", 0), (" --demo", 2)):
        main_dino.check_args(main_dino.parse_args((flags + more).split()))
        assert capsys.readouterr().out.count("warning: local views ") == count
    as_large = "--local_crops_size 224 --local_crops_scale 0.1 1 --global_crops_scale 0.4 0.9"
    as_much = "--local_crops_scale 0.25 1 --global_crops_scale 0.5 0.75"
    for flags in ("", "--demo", as_large, as_much):
        main_dino.check_args(main_dino.parse_args(flags.split()))
    assert "local views" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "last", "frozen", "saved"),
    [
        ("--save_every_steps 4", 10, 0, 0),
        ("--save_every_steps 5", 10, 0, 1),
        ("--save_every_steps 4 --max_steps 4", 4, 1, 1),
        ("--save_every_steps 4 --max_steps 5", 5, 1, 0),
        ("--save_every_steps 4 --max_steps 6", 6, 0, 0),
        ("--epochs 1 --warmup_epochs 0 --freeze_last_layer 0.8", 5, 0, 0),
        ("--epochs 1 --warmup_epochs 0 --freeze_last_layer 0.9", 5, 1, 0),
        ("--max_steps 99", 10, 0, 0),
    ],
)
def test_a_run_shorter_than_a_freeze_or_the_next_save_is_said(capsys, flags, last, frozen, saved):
    """An epoch has five steps."""
    assert main_dino.count_steps(main_dino.parse_args([*TINY, *flags.split()]), 20).last == last
    words = f"warning: --freeze_last_layer keeps the prototypes frozen for all {last} steps\n" * frozen
    words += f"warning: --save_every_steps has no effect: an epoch has 5 steps, the run {last}\n" * saved
    assert capsys.readouterr().out == words


def test_a_run_does_not_resume_under_another_recipe(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path
    train(*flags, "--max_steps", 1)
    path = tmp_path / "checkpoint.pth"
    for older in (False, True):
        if older:  # from before these flags existed
            checkpoint = load_checkpoint(path)
            for part in ("identity", "args"):
                for name in Recipe._fields:
                    del checkpoint[part][name]
            save_checkpoint(checkpoint, path)
        with pytest.raises(
            UserError, match=r"blur_p \[1.0, 0.1, 0.5\] -> \[0.0, 0.0, 0.0\], vflip_p 0.0 -> 0.5 "
        ):
            train(*flags, "--blur_p", 0, 0, 0, "--vflip_p", 0.5)
        assert not list(tmp_path.glob(".*.lock"))  # a notebook goes on, and others may use the folder
    train(*flags, "--max_steps", 2)
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(path)["identity"]["gray_p"] == 0.2


# 32 x 16 pixels and 16 x 8
RECTANGLES = "--global_crops_size", 32, 16, "--local_crops_size", 16, 8


def test_rectangular_views_from_training_to_evaluation(labelled, tmp_path, capsys):
    knn = "--knn_every", 1, "--knn_data", labelled, "--knn_share", 1
    flags = [*RECTANGLES, "--data_path", labelled / "train", *knn]
    train(*flags, "--output_dir", tmp_path / "whole")
    train(*flags, "--output_dir", tmp_path / "parts", "--max_steps", 4)
    with pytest.raises(UserError, match=r"global_crops_size \[32, 16\] -> 32"):
        train(*flags, "--output_dir", tmp_path / "parts", "--global_crops_size", 32)
    train(*flags, "--output_dir", tmp_path / "parts")
    path = tmp_path / "whole" / "checkpoint.pth"
    whole, parts = load_checkpoint(path), load_checkpoint(tmp_path / "parts" / "checkpoint.pth")
    assert whole["teacher"]["backbone.pos_embed"].shape == (1, 1 + 4 * 2, 128)
    for part in ("student", "teacher"):
        torch.testing.assert_close(whole[part], parts[part], rtol=0, atol=0)
    capsys.readouterr()
    weights = "--pretrained_weights", path, "--data_path", labelled, "--num_workers", 0
    found = call(eval_knn, *weights, "--nb_knn", "20")
    assert "preprocessing: 32 x 16 (H x W) pixels" in capsys.readouterr().out
    assert found[15][0] == pytest.approx(log_of(tmp_path / "whole")[-1]["knn_teacher"])
    again = main_dino.parse_args([f"@{tmp_path}/whole/args.txt"])
    assert again.global_crops_size == [32, 16] and again.local_crops_size == [16, 8]


def test_the_preview_of_rectangular_views(images, tmp_path):
    flags = [*TINY, *map(str, RECTANGLES), "--data_path", str(images), "--preview", f"{tmp_path}/p.png"]
    args = main_dino.parse_args(flags)
    main_dino.main(args)
    rows = main_dino.preview_rows(args, ImageFiles(images))
    assert [picture.size for picture in rows[0]] == [(32, 32), (16, 32), (16, 32), (8, 16), (8, 16)]
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.size == (4 + 5 * 164, 4 + 12 * 164)
        first = sheet.crop((4 + 164 + 40, 4, 4 + 164 + 120, 4 + 160))  # 5 times as large
        assert first.resize((16, 32), Image.Resampling.NEAREST).tobytes() == rows[0][1].tobytes()


@pytest.mark.parametrize("place", ["worker", "device"])
def test_the_preview_shows_the_views_of_the_training(images, place):
    flags = f"--data_path {images} --augment_on {place} --seed 3 --vflip_p 0.5 --blur_p 0 1 0".split()
    flags += "--mean 0.5 0.4 0.3 --std 0.2 0.2 0.3 --batch_size_per_gpu 12".split()
    args = main_dino.parse_args([*TINY, *flags])
    found = open_training_images(Source.of(args))
    rows = main_dino.preview_rows(args, found)
    loader = main_dino.build_loader(
        args, found, main_dino.count_steps(args, len(found)), 0, torch.device("cpu"), lambda: False
    )
    views, colours, _ = next(iter(loader))
    scale = args.mean, args.std
    seen = normalized_views(views, colours, *scale)
    assert len(rows) == 12 and len(seen) == 4
    for i, (image, *shown) in enumerate(rows):
        assert image.size == (32, 32)  # of 40 x 40
        for view, picture in zip(seen, shown, strict=True):
            assert (normalize(to_pixels(picture), *scale) - view[i]).abs().max() < 1e-5


def test_the_preview_ends_without_a_run_and_keeps_files_of_others(images, tmp_path, capsys):
    file, out = tmp_path / "new" / "preview.png", tmp_path / "out"
    flags = [*TINY, "--data_path", images, "--output_dir", out, "--preview", file]
    drawn = []
    for extra in ([], ["--hflip_p", "0"]):
        call(main_dino, *flags, *extra)
        assert "12 of 20 images" in capsys.readouterr().out
        drawn.append(file.read_bytes())
    assert drawn[0] != drawn[1]  # its own is replaced
    assert not out.exists() and [path.name for path in file.parent.iterdir()] == ["preview.png"]
    Image.new("RGB", (4, 4)).save(file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="would overwrite .*preview.png.*give another file"):
        call(main_dino, *flags)
    assert file.read_bytes() == before


def test_flags_of_another_program_that_are_not_in_args_txt_are_named(images, tmp_path, capsys):
    flags = "--data_path", str(images), "--output_dir", str(tmp_path), "--max_steps", "1"
    args = main_dino.parse_args([*TINY, *flags])
    main_dino.train_dino(argparse.Namespace(**vars(args), max_lr=7, rank=0))  # and the launcher's
    assert "args.txt lacks flags that are not of main_dino.py: max_lr\n" in capsys.readouterr().out


def test_the_flags_of_a_caller_stay_as_they_are(images, tmp_path):
    flags = f"--data_path {images} --preview {tmp_path}/p.png --epochs 2 --mean auto --std auto".split()
    args = main_dino.parse_args(flags)  # with the default warm-up of 10 epochs
    before = copy.deepcopy(vars(args))
    main_dino.main(args)
    assert vars(args) == before


def test_the_preview_names_an_image_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    save_images(tmp_path / "data", 3)
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--data_path", f"{tmp_path}/data", "--in_chans", "1", "--preview", "~/p.PNG"
    call(main_dino, *TINY, *flags)
    assert (tmp_path / "p.PNG").is_file()
    assert re.search(r"warning: another image replaces .*broken\.png \(", capsys.readouterr().out)


# ---- settings in files


def test_a_run_writes_its_settings_as_a_file_that_repeats_it(tmp_path, monkeypatch):
    save_images(tmp_path / "my images", 8)
    out = tmp_path / "first # run"
    flags = "--max_steps 2 --grad_checkpointing --blur_p 0 0 1 --quarter_turns true --min_lr 1e-7".split()
    paths = ["--data_path", f"{tmp_path}/my images", "--output_dir", str(out)]
    args = main_dino.parse_args([*TINY, *flags, *paths])
    main_dino.train_dino(args)
    file = out / "args.txt"
    assert as_lists(main_dino.parse_args([f"@{file}"])) == as_lists(args)
    monkeypatch.chdir(tmp_path)
    main_dino.train_dino(main_dino.parse_args([f"@{file}", "--output_dir", "again"]))
    first, again = (load_checkpoint(folder / "checkpoint.pth") for folder in (out, tmp_path / "again"))
    for part in ("student", "teacher"):
        torch.testing.assert_close(first[part], again[part], rtol=0, atol=0)
    assert first["identity"] == again["identity"]


def test_the_settings_of_a_trial_suit_a_longer_run(images, tmp_path, capsys):
    """The warm-ups that `--epochs 1` shortened are not the user's."""
    tiny = " ".join(TINY).replace("--warmup_epochs 1", "").split()
    flags = ["--data_path", images, "--output_dir", tmp_path / "trial", "--epochs", 1, "--max_steps", 1]
    args = main_dino.parse_args([*tiny, *map(str, flags)])
    main_dino.train_dino(args)
    assert capsys.readouterr().out.count("shortened from") == 2
    assert args.warmup_epochs == args.freeze_last_layer == 0.1
    again = main_dino.parse_args([f"@{tmp_path}/trial/args.txt"])
    main_dino.check_args(again)
    assert as_lists(again) == as_lists(args)
    args.warmup_epochs = 0.5  # the user's
    assert main_dino.shortened(args) == ["freeze_last_layer"]
    longer = main_dino.parse_args([f"@{tmp_path}/trial/args.txt", "--epochs", "100"])
    assert (longer.warmup_epochs, longer.warmup_teacher_temp_epochs, longer.freeze_last_layer) == (10, 0, 1)


def test_a_resumed_run_still_says_what_it_began_with(images, tmp_path, capsys):
    train("--data_path", images, "--output_dir", tmp_path / "first", "--max_steps", 1)
    weights, out = tmp_path / "first" / "checkpoint.pth", tmp_path / "out"
    flags = ["--data_path", images, "--output_dir", out]
    train(*flags, "--init_from", weights, "--max_steps", 1)
    train(*flags, "--max_steps", 2)
    assert "no effect: the run resumes" not in capsys.readouterr().out
    train(*flags, "--max_steps", 3, "--init_from", "others.pth")
    assert "warning: --init_from others.pth has no effect: the run resumes" in capsys.readouterr().out
    assert load_checkpoint(out / "checkpoint.pth")["args"]["init_from"] == str(weights)
    text = (out / "args.txt").read_text()
    assert f"--init_from {weights}\n" in text and "--max_steps 3\n" in text
    train(*flags, "--max_steps", 3, "--saveckp_freq", 1)  # nothing is left to do
    assert "finished at step 3" in capsys.readouterr().out and (out / "args.txt").read_text() == text
    train(*flags[:2], "--output_dir", tmp_path / "first", "--max_steps", 2, "--init_from", "others.pth")
    assert load_checkpoint(weights)["args"]["init_from"] == ""  # it began with random weights


def test_the_settings_follow_a_restart_with_other_flags(images, tmp_path, capsys):
    flags, file = ["--data_path", images, "--output_dir", tmp_path], tmp_path / "args.txt"
    train(*flags, "--max_steps", 1)
    with pytest.raises(UserError, match="seed 0 -> 3"):
        train(*flags, "--seed", 3, "--max_steps", 2)
    assert "--max_steps 1\n" in file.read_text() and "--seed 0\n" in file.read_text()
    train(*flags, "--seed", 3, "--max_steps", 2, "--allow_changed_args", "--grad_checkpointing")
    text = file.read_text()
    assert "--max_steps 2\n" in text and "--seed 3\n" in text and "--grad_checkpointing\n" in text
    assert "--allow_changed_args" not in text  # for one restart
    train(*flags, "--seed", 3, "--max_steps", 3)
    assert "# Changed at step 1: seed 0 -> 3\n" in file.read_text()
    for name in ("checkpoint", "checkpoint_prev"):
        (tmp_path / f"{name}.pth").unlink()
    train(*flags, "--seed", 3, "--max_steps", 3)
    assert "# Changed" not in file.read_text()  # it is a new run
    file.write_text("# my own\n--seed 5\n")
    train(*flags, "--seed", 3, "--max_steps", 4)
    assert file.read_text() == "# my own\n--seed 5\n"
    assert f"warning: {file} is not a file of main_dino.py and is kept" in capsys.readouterr().out
    file.unlink()
    file.mkdir()
    train(*flags, "--seed", 3, "--max_steps", 5)
    assert f"warning: cannot write the settings: Is a directory ({file})" in capsys.readouterr().out


RECIPES = sorted((ROOT / "recipes").iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_flags_of_the_training_and_say_where_they_come_from(path, capsys):
    args = main_dino.parse_args([f"@{path}"])
    main_dino.check_args(args)
    assert capsys.readouterr().out == ""  # every flag has an effect
    main_dino.build_augmentation(args)
    text = path.read_text()
    assert f"@recipes/{path.name}" in text and "\n# From: " in text
    assert re.search(r"%|not reproduced|nobody has tested", text)
    assert not (args.data_path or args.dataset or args.output_dir != ".")  # these are the user's


def flags_in(text: str, first: str) -> dict:
    """What a command in the documentation changes: the first one that contains these words."""
    command = next(line for line in text.replace("\\\n", " ").splitlines() if first in line)
    argv = re.search(rf"{re.escape(first)}[^`|(]*", command)[0].removeprefix("main_dino.py").split()
    return as_lists(main_dino.parse_args(argv))


def test_recipes_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("### Published recipes") :]
    for name, first in (
        ("vit_small_100", "--arch vit_small"),
        ("vit_small_300", "--arch vit_small --epochs 300"),
        ("resnet50", "--arch resnet50"),
    ):
        recipe = main_dino.parse_args([f"@{ROOT}/recipes/{name}.txt"])
        assert as_lists(recipe) == flags_in(table, first), name


# ---- the pieces


def test_teacher_is_a_frozen_copy_without_drop_path():
    training = built("--drop_path_rate", "0.5", "--use_bn_in_head", "true")
    student, teacher = training.student, training.teacher
    torch.testing.assert_close(teacher.state_dict(), student.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters()) and teacher.training
    assert student.backbone.blocks[-1].drop_path.p == 0.5 and utils.has_batchnorms(student.head)
    assert all(block.drop_path.p == 0 for block in teacher.backbone.blocks)


def test_a_seed_gives_the_weights_that_it_gave_in_earlier_versions():
    """Both backbones are drawn first, then the heads."""
    args = main_dino.parse_args(TINY)
    fix_random_seeds(7)
    student, _ = main_dino.build_networks(args)
    fix_random_seeds(7)
    first, _ = backbones.build_backbone("vit_nano", 8, 32)
    backbones.build_backbone("vit_nano", 8, 32)
    head = DINOHead(128, 64, hidden_dim=32, bottleneck_dim=16)
    assert torch.equal(student.backbone.pos_embed, first.pos_embed)
    assert torch.equal(student.head.mlp[0].weight, head.mlp[0].weight)


def test_schedules_run_between_their_ends():
    args = main_dino.parse_args(["--lr", "0.002", "--epochs", "20"])
    schedules = main_dino.build_schedules(args, main_dino.Steps(128, 256, per_epoch=5, last=100))
    assert {len(values) for values in schedules.values()} == {100}
    lr, wd, momentum = schedules["lr"], schedules["wd"], schedules["momentum"]
    assert lr[0] == 0 and lr.argmax() == 49 and lr.max() == pytest.approx(0.002)
    assert wd[0] == pytest.approx(0.04) and wd[-1] == pytest.approx(0.4, rel=1e-3)
    assert momentum[0] == pytest.approx(0.996) and 0.9999 < momentum[-1] < 1


@pytest.mark.parametrize(("update", "momenta"), [("epoch", [1, 1, 0, 1, 1, 0]), ("copy", [0] * 6)])
def test_other_teachers_are_other_schedules_of_the_momentum(update, momenta):
    args = main_dino.parse_args(f"--teacher_update {update} --epochs 2 --warmup_epochs 1".split())
    schedules = main_dino.build_schedules(args, main_dino.Steps(4, 4, per_epoch=3, last=6))
    assert schedules["momentum"].tolist() == momenta


@pytest.mark.parametrize(
    ("precision", "use_fp16", "device", "dtype"),
    [
        (None, True, "cuda", torch.float16), (None, True, "cpu", None),
        (None, False, "cuda", None), ("bf16", True, "cuda", torch.bfloat16),
        ("fp32", True, "cuda", None), ("bf16", True, "cpu", torch.bfloat16),
        (None, True, "mps", None),
    ],
)  # fmt: skip
def test_the_default_precision_of_each_device(precision, use_fp16, device, dtype):
    assert main_dino.autocast_dtype(precision, use_fp16, torch.device(device)) == dtype


@pytest.mark.parametrize(("precision", "scales"), [("fp16", True), ("bf16", False), ("fp32", False)])
def test_only_fp16_scales_the_loss(precision, scales):
    assert built("--precision", precision).scaler.is_enabled() == scales


def test_operations_without_a_fixed_order_are_off_on_a_gpu():
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.enable_cudnn_sdp(True)
    built()
    assert torch.backends.cudnn.deterministic and not torch.backends.cuda.cudnn_sdp_enabled()


def test_images_of_all_ranks_are_counted():
    """Two processes of two images each, at step 8 of five an epoch."""
    steps, saved = main_dino.Steps(per_rank=2, batch=4, per_epoch=5, last=10), {}
    run = types.SimpleNamespace(save=lambda values, *_: saved.update(values))
    main_dino.save(main_dino.parse_args(TINY), run, 8, steps, None, last=False)
    assert saved["sampler"] == {"seen": 12} and main_dino.first_step(saved, steps) == 8


# ---- real runs


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_networks_compute_in_the_precision_of_the_flag(images, tmp_path, monkeypatch, precision, dtype):
    seen, forward = set(), main_dino.DINOLoss.forward

    def noted(loss, student, teacher, epoch):
        seen.add((student.features.dtype, teacher.dtype))
        return forward(loss, student, teacher, epoch)

    monkeypatch.setattr(main_dino.DINOLoss, "forward", noted)
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 2, "--precision", precision)
    assert seen == {(dtype, dtype)} and math.isfinite(log_of(tmp_path)[0]["train_loss"])


def test_a_run_is_watched_for_collapse(images, tmp_path, monkeypatch):
    seen = []

    class Watch(CollapseWatch):
        def __call__(self, numbers):
            seen.append((self.max_entropy, sorted(numbers)))

    monkeypatch.setattr(main_dino, "CollapseWatch", Watch)
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 2)
    assert seen == [(math.log(64), ["entropy", "kl", "loss", "spread"])] * 2


def test_a_run_leaves_checkpoint_and_log(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path, "--saveckp_freq", 2, "--epochs", 3
    call(main_dino, *TINY, *flags)  # with its curves
    checkpoints = {"checkpoint.pth", "checkpoint_prev.pth", "checkpoint0000.pth", "checkpoint0002.pth"}
    assert {path.name for path in tmp_path.iterdir()} == checkpoints | {"log.txt", "curves.png", "args.txt"}
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    published = {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"}
    assert set(checkpoint) == published | {
        "step", "sampler", "guard", "metrics", "identity", "normalization",
    }  # fmt: skip
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 15)
    assert checkpoint["args"]["arch"] == "vit_nano" and type(checkpoint["args"]) is dict
    normalization = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "value_range": None}
    assert checkpoint["normalization"] == normalization
    assert checkpoint["dino_loss"]["center"].shape == (1, 64)
    records = log_of(tmp_path)
    # The peak rate holds for 256 images a step; the first epoch's linear warm-up averages half of it.
    assert records[0]["train_lr"] == pytest.approx(0.0005 * 4 / 256 / 2)
    assert [record["epoch"] for record in records] == [0, 1, 2] and records[0]["train_images_per_second"] > 0
    expected = "train_loss train_lr train_wd train_entropy train_kl train_spread unreadable"
    assert set(expected.split()) <= set(records[0]) and all(
        math.isfinite(record["train_loss"]) for record in records
    )


def test_a_finished_run_has_nothing_left_to_do(images, tmp_path, capsys):
    for said in ("from step 0 to 2\n", "finished at step 2\n"):
        train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 2)
        assert said in capsys.readouterr().out
    assert len(log_of(tmp_path)) == 1 and load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 2


def test_changed_flags_are_listed_and_refused_until_allowed(images, tmp_path, capsys):
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 6)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    again = ["--data_path", images, "--output_dir", tmp_path]
    with pytest.raises(UserError, match=r"teacher_temp 0.04 -> 0.05, epochs 2 -> 4 .*--allow_changed_args"):
        train(*again, "--epochs", 4, "--teacher_temp", 0.05)
    with pytest.raises(UserError, match=r"batch_size_per_gpu 4 -> 2"):
        train(*again, "--batch_size_per_gpu", 2)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    with pytest.raises(UserError, match=r"weights do not fit: .*of another shape .*student"):
        train(*again, "--out_dim", 32, "--allow_changed_args")
    capsys.readouterr()
    # Step 6 of 5 a epoch had seen 4 images of epoch 1; in batches of 2, that is step 12 of 10 an epoch.
    train(*again, "--batch_size_per_gpu", 2, "--allow_changed_args", "--max_steps", 13)
    out = capsys.readouterr().out
    assert "warning: resuming with batch_size_per_gpu 4 -> 2: a new run would give another result" in out
    assert "note: with 2 images a step, the run goes on at step 12\n" in out and "from step 12 to 13" in out
    assert "\nepoch 1 [ 3/10] loss" in out
    train(*again, "--batch_size_per_gpu", 2, "--num_workers", 1, "--max_steps", 14)  # no change of maths


def test_an_epoch_that_larger_batches_have_seen_whole_still_ends_with_its_record(images, tmp_path):
    """16 of 20 images are all that batches of 8 take: without another step, epoch 0 would have no copy."""
    flags = "--data_path", images, "--output_dir", tmp_path, "--saveckp_freq", 1
    train(*flags, "--max_steps", 4)
    train(*flags, "--batch_size_per_gpu", 8, "--allow_changed_args")
    assert [record["epoch"] for record in log_of(tmp_path)] == [0, 1]
    assert (tmp_path / "checkpoint0000.pth").exists()


def test_a_stretch_ends_with_the_epoch_and_the_run_however_often_it_is_saved():
    steps = main_dino.Steps(per_rank=4, batch=4, per_epoch=5, last=13)
    for every, ends in ((0, [5, 10, 13]), (2, [2, 4, 5, 6, 8, 10, 12, 13]), (7, [5, 7, 10, 13])):
        found = [0]
        while found[-1] < steps.last:
            found.append(main_dino.end_of_stretch(found[-1], steps, every))
        assert found[1:] == ends


def test_a_run_that_ends_within_an_epoch_keeps_the_copy_of_the_one_before(images, tmp_path):
    for steps in (5, 7):
        train("--data_path", images, "--output_dir", tmp_path, "--saveckp_freq", 1, "--max_steps", steps)
    assert load_checkpoint(tmp_path / "checkpoint0000.pth")["step"] == 5
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == 7


def test_a_run_that_stops_before_its_first_step_keeps_no_numbered_copy(tmp_path):
    args = main_dino.parse_args(["--saveckp_freq", "1"])
    with Run(tmp_path, required=()) as run:
        run.resume({}, {})
        main_dino.save(args, run, 0, main_dino.Steps(4, 4, 5, 10), None, last=True)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["checkpoint.pth"]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_that_cannot_be_saved_at_its_end_does_not_say_that_it_is(
    images, tmp_path, monkeypatch, stopped
):
    class Full(CollapseWatch):
        def __call__(self, numbers):
            (tmp_path / "checkpoint.pth").touch()
            (tmp_path / "checkpoint_prev.pth").mkdir(exist_ok=True)  # so it cannot be moved there
            if stopped:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(main_dino, "CollapseWatch", Full)
    with pytest.raises(TrainingError, match="cannot save: Is a directory .*checkpoint.pth"):
        train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 4 if stopped else 1)


def test_prototypes_are_frozen_for_a_fraction_of_an_epoch(images, tmp_path):
    flags, found = ["--data_path", images, "--output_dir", tmp_path, "--freeze_last_layer", 0.4], []
    for steps in (1, 2, 3):  # of five; the third is trained
        train(*flags, "--max_steps", steps)
        found.append(load_checkpoint(tmp_path / "checkpoint.pth")["student"]["head.last_layer.weight_v"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_a_run_does_not_resume_with_another_precision_fewer_processes_or_other_images(tmp_path):
    save_images(tmp_path / "data", 8)
    flags = "--data_path", tmp_path / "data", "--output_dir", tmp_path / "out", "--max_steps"
    train(*flags, 1)
    with pytest.raises(UserError, match=r"dtype torch.float32 -> torch.bfloat16"):
        train(*flags, 2, "--precision", "bf16")
    path = tmp_path / "out" / "checkpoint.pth"
    checkpoint = load_checkpoint(path)
    save_checkpoint(checkpoint | {"identity": checkpoint["identity"] | {"world_size": 2}}, path)
    with pytest.raises(UserError, match=r"run to resume: world_size 2 -> 1 "):
        train(*flags, 2)
    save_checkpoint(checkpoint, path)
    (tmp_path / "data" / "000.png").rename(tmp_path / "data" / "zzz.png")
    with pytest.raises(UserError, match=r"digest of the images"):
        train(*flags, 2)
    save_images(tmp_path / "data", 8)  # one more
    with pytest.raises(UserError, match=r"images 8 -> 9"):
        train(*flags, 2)


def test_a_new_run_begins_with_given_weights_and_a_resumed_one_does_not(images, tmp_path, capsys):
    flags = ["--data_path", images, "--value_range", 0, 255]
    train(*flags, "--output_dir", tmp_path / "old", "--seed", 7)
    saved = load_checkpoint(tmp_path / "old" / "checkpoint.pth")
    old, center = saved["teacher"], saved["dino_loss"]["center"]
    new = [*flags, "--output_dir", tmp_path / "new", "--init_from", tmp_path / "old" / "checkpoint.pth"]
    # The first step of a warm-up has a learning rate of 0: the student is still what it began with.
    train(*new, "--max_steps", 1)
    said = capsys.readouterr().out
    assert "starting from the weights of" in said and "expects" not in said  # another normalisation or range
    saved = load_checkpoint(tmp_path / "new" / "checkpoint.pth")
    torch.testing.assert_close(saved["student"], old, rtol=0, atol=0)
    assert (saved["dino_loss"]["center"] - center).norm() < 0.2 * center.norm()  # a step away from it
    (tmp_path / "old" / "checkpoint.pth").unlink()
    train(*new, "--max_steps", 2)
    assert "starting from" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        train(*new, "--output_dir", tmp_path / "newer")


def test_prototypes_of_given_weights_have_unit_length_unless_they_are_trained(images, tmp_path, capsys):
    flags = "--data_path", images, "--max_steps", 1
    train(*flags, "--output_dir", tmp_path / "old", "--norm_last_layer", "false")
    checkpoint = load_checkpoint(tmp_path / "old" / "checkpoint.pth")
    lengths = torch.linspace(0.5, 2, 64)[:, None]
    for key in ("student", "teacher"):
        checkpoint[key]["head.last_layer.weight_g"] = lengths
    save_checkpoint(checkpoint, tmp_path / "longer.pth")
    for norm, expected in (("true", torch.ones(64, 1)), ("false", lengths)):
        start = "--init_from", tmp_path / "longer.pth", "--norm_last_layer", norm
        train(*flags, "--output_dir", tmp_path / norm, *start)
        assert ("scaled to unit length" in capsys.readouterr().out) == (norm == "true")
        student = load_checkpoint(tmp_path / norm / "checkpoint.pth")["student"]
        torch.testing.assert_close(student["head.last_layer.weight_g"], expected)


@pytest.mark.parametrize(
    ("name", "setting", "value"), [("adamw", "betas", (0.8, 0.9)), ("sgd", "momentum", 0.5)]
)
def test_a_resumed_optimizer_keeps_its_own_settings(name, setting, value):
    """Else a setting that became a flag would be recorded as changed, and have no effect."""
    saved, own = (main_dino.build_optimizer(name, torch.nn.Linear(3, 2)) for _ in range(2))
    for group in own.param_groups:
        group |= {setting: value, "d": 0.0}
    for group in saved.param_groups:
        group["d"] = 1.0  # state, as Prodigy and schedule-free optimizers keep it
    own.load_state_dict(saved.state_dict())
    assert [(group[setting], group["d"]) for group in own.param_groups] == [(value, 1.0)] * 2
    for count in (1, 3):
        groups = [{"params": [torch.zeros(1)]} for _ in range(count)]
        with pytest.raises(ValueError, match="number of parameter groups"):
            own.load_state_dict(torch.optim.SGD(groups, lr=0.1).state_dict())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_resumes_from_one_that_was_not_fused_with_loss_scaling(name):
    """As of a published checkpoint, in fp16."""
    plain = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, momentum=0.9)}[name]
    networks = [torch.nn.Linear(3, 2) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    theirs = plain([{"params": [networks[0].weight]}, {"params": [networks[0].bias]}], lr=0.1, weight_decay=0)
    ours = main_dino.build_optimizer(name, networks[1])
    x, scaler = torch.randn(4, 3), torch.amp.GradScaler("cpu", init_scale=8.0)
    networks[0](x).sum().backward()
    theirs.step()
    networks[1].load_state_dict(networks[0].state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    utils.set_schedules(ours, 0.1, 0.0)
    theirs.zero_grad()
    networks[0](x).square().sum().backward()
    theirs.step()
    scaler.scale(networks[1](x).square().sum()).backward()
    scaler.step(ours)
    assert all(bool(group["fused"]) == (name == "adamw") for group in ours.param_groups)
    torch.testing.assert_close(networks[1].state_dict(), networks[0].state_dict())


def test_a_published_checkpoint_does_not_resume_with_what_is_not_in_it(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path
    train(*flags, "--max_steps", 1)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    del checkpoint["identity"], checkpoint["args"]["centering"], checkpoint["args"]["adapt_teacher_temp"]
    save_checkpoint(checkpoint, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="centering ema -> none, adapt_teacher_temp 0.0 -> 2.0 "):
        train(*flags, "--centering", "none", "--adapt_teacher_temp", 2)
    train(*flags, "--max_steps", 2)


def test_a_checkpoint_without_student_teacher_or_optimizer_does_not_resume(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path
    train(*flags, "--max_steps", 1)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    for name in ("student", "teacher", "optimizer"):
        save_checkpoint({n: v for n, v in checkpoint.items() if n != name}, tmp_path / "checkpoint.pth")
        with pytest.raises(UserError, match=f"checkpoint lacks {name} .*: give another --output_dir"):
            train(*flags, "--max_steps", 2)


def test_each_epoch_is_counted_and_averaged_by_itself_and_an_unreadable_image_is_named(tmp_path, capsys):
    save_images(tmp_path / "data", 8)
    (tmp_path / "data" / "003.png").write_bytes(b"broken")
    train("--data_path", tmp_path / "data", "--output_dir", tmp_path / "out")
    records = log_of(tmp_path / "out")
    assert [record["unreadable"] for record in records] == [1, 1]
    assert re.search(r"warning: cannot read .*003\.png.*: another image", capsys.readouterr().out)
    schedules = main_dino.build_schedules(main_dino.parse_args(TINY), main_dino.Steps(4, 4, 2, 4))
    for name, values in schedules.items():
        means = values.reshape(2, 2).mean(axis=1)
        assert [record[f"train_{name}"] for record in records] == pytest.approx(means), name


@pytest.mark.parametrize(("place", "fields"), [("worker", 0), ("device", 5)])
def test_colours_change_where_the_flag_says(images, place, fields):
    args = main_dino.parse_args([*TINY, "--augment_on", place])
    views, colours, _ = main_dino.build_views(args, ImageFiles(images))[0, 0]
    assert len(views) == 2 and len(colours) == fields


@pytest.mark.parametrize(
    ("every", "share", "expected"),
    [(2, 1, [False, True, False]), (1, 0, [True, False, False])],  # the first takes some of the time
)
def test_knn_is_measured_every_so_many_epochs_for_its_share_of_the_time(
    images, labelled, tmp_path, capsys, every, share, expected
):
    knn = "--epochs", 3, "--knn_data", labelled, "--knn_every", every, "--knn_share", share
    train("--data_path", images, "--output_dir", tmp_path, "--batch_size_per_gpu", 20, *knn)
    assert ["knn_teacher" in record for record in log_of(tmp_path)] == expected
    words = "no k-NN: it has taken more than --knn_share 0 of the time"
    assert capsys.readouterr().out.count(words) == (2 if share == 0 else 0)


def test_knn_is_of_student_and_teacher_in_the_precision_of_the_training(
    images, labelled, tmp_path, monkeypatch
):
    seen, accuracy = [], eval_knn.PeriodicKNN.accuracy

    def noted(knn, network):
        seen.append(knn.dtype)
        is_student = any(weights.requires_grad for weights in network.parameters())
        return accuracy(knn, network) + 1000 * is_student

    monkeypatch.setattr(eval_knn.PeriodicKNN, "accuracy", noted)
    knn = "--knn_every", 1, "--knn_data", labelled, "--knn_share", 1, "--precision", "bf16"
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 3, *knn)
    assert seen == [torch.bfloat16] * 2
    [record] = log_of(tmp_path)
    assert record["knn_teacher"] <= 100 and record["knn_student"] >= 1000


def test_an_unreadable_image_of_knn_data_does_not_end_the_training(images, labelled, tmp_path, capsys):
    shutil.copytree(labelled, tmp_path / "data")
    broken = next((tmp_path / "data" / "val").rglob("*.png"))
    broken.write_bytes(b"not an image")
    knn = "--knn_every", 1, "--knn_data", tmp_path / "data", "--knn_share", 1
    train("--data_path", images, "--output_dir", tmp_path / "run", *knn)
    out = capsys.readouterr().out
    assert "1 of 9 checked images cannot be read" in out.partition("epoch 0")[0]  # at the start
    assert out.count(": no k-NN: cannot read image") == 2 and out.count(str(broken)) == 3
    assert ["knn_teacher" in record for record in log_of(tmp_path / "run")] == [False, False]


@pytest.mark.slow
def test_an_unreadable_image_of_knn_data_ends_all_processes(images, labelled, tmp_path):
    """They compute features together, so one cannot go on without the others."""
    shutil.copytree(labelled, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val").rglob("*.png"))[1]  # of rank 1
    broken.write_bytes(b"not an image")
    flags = ["--data_path", images, "--output_dir", tmp_path / "run", "--batch_size_per_gpu", 2]
    knn = ["--knn_every", 1, "--knn_data", tmp_path / "data", "--knn_share", 1]
    ended = torchrun(2, "main_dino.py", *TINY, *flags, *knn, check=False)
    assert ended.returncode and f"cannot read image: cannot identify image file ({broken})" in ended.stderr


def test_a_run_of_the_first_step_of_the_warmup_learns_nothing_and_says_so(images, tmp_path, capsys):
    for steps, named in ((1, True), (2, False)):
        train("--data_path", images, "--output_dir", tmp_path / str(steps), "--max_steps", steps)
        assert ("learning rate is 0 in all 1 steps" in capsys.readouterr().out) == named


@pytest.mark.parametrize("flags", [["--momentum_teacher", 1], ["--teacher_update", "epoch"]])
def test_a_teacher_that_never_moves_is_named(images, tmp_path, capsys, flags):
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 1, *flags)
    assert "teacher's momentum is 1 in all 1 steps, so it keeps its first weights" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [2, 3])  # at the end of an epoch, and within one
def test_tensorboard_keeps_the_epochs_before_a_restart(images, tmp_path, stop):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = "--tensorboard", "--batch_size_per_gpu", 10
    for last in (stop, 4):
        train("--data_path", images, "--output_dir", tmp_path, *flags, "--max_steps", last)
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train_loss")] == [2, 4]


def test_threads_are_those_of_the_flag(threads):
    with pytest.raises(UserError, match="no data given"):
        train("--cpu_threads", threads + 1)
    assert torch.get_num_threads() == threads + 1


def test_threads_beyond_the_cores_are_named(capsys, monkeypatch, threads):
    monkeypatch.setattr(main_dino, "num_cores", lambda: threads)
    torch.set_num_threads(threads + 1)
    for given, said in ((0, f"--cpu_threads {threads} is faster\n"), (threads, ""), (0, "")):
        main_dino.set_threads(given, torch.device("cpu"))
        out = capsys.readouterr().out
        assert out.endswith(said) and bool(out) == bool(said)


def mean_gradient(images, precision: str, clip: str = "0.01") -> torch.Tensor:
    """AdamW's first moments after two steps whose gradients were clipped."""
    flags = "--warmup_epochs 0 --drop_path_rate 0 --freeze_last_layer 0 --precision"
    flags = [*flags.split(), precision, "--clip_grad", clip, "--data_path", str(images)]
    args = main_dino.parse_args([*TINY, *flags])
    cpu, data = torch.device("cpu"), open_training_images(Source.of(args))
    steps = main_dino.count_steps(args, len(data))
    fix_random_seeds(0)
    training = main_dino.build_training(args, cpu, steps, resumes=False)
    # The usual first scale of 65,536 overflows here: the first steps would be left out.
    training.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision == "fp16")
    loader = main_dino.build_loader(args, data, steps, 0, cpu, lambda: False)
    with contextlib.closing(to_device(iter(loader), cpu)) as batches:
        main_dino.train_one_epoch(training, batches, range(2), Monitor(9), MetricLogger())
    return torch.cat([state["exp_avg"].flatten() for state in training.optimizer.state.values()])


def test_loss_scaling_is_undone_before_gradients_are_clipped(images):
    exact, half = (mean_gradient(images, precision) for precision in ("fp32", "fp16"))
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_clip_grad_0_does_not_clip(images):
    free, limited = (mean_gradient(images, "fp32", clip) for clip in ("0", "1e9"))
    assert free.any() and torch.equal(free, limited)


def test_the_demo_has_its_own_values_for_flags_that_are_not_given():
    expected = vars(main_dino.parse_args([])) | main_dino.demo_defaults() | {"demo": True, "epochs": 7}
    assert vars(main_dino.parse_args(["--demo", "--epochs", "7"])) == expected


def test_the_student_of_the_last_epoch_and_of_the_last_step_as_teacher(images, tmp_path):
    def networks(update, steps):
        out = tmp_path / update
        train("--data_path", images, "--output_dir", out, "--teacher_update", update, "--max_steps", steps)
        checkpoint = load_checkpoint(out / "checkpoint.pth")
        return [{n: w for n, w in checkpoint[key].items() if "mlp" in n} for key in ("student", "teacher")]

    student, teacher = networks("epoch", 5)  # an epoch
    torch.testing.assert_close(student, teacher, rtol=0, atol=0)
    later, kept = networks("epoch", 7)
    torch.testing.assert_close(kept, teacher, rtol=0, atol=0)
    assert any(not torch.equal(later[name], weight) for name, weight in kept.items())
    torch.testing.assert_close(*networks("copy", 3), rtol=0, atol=0)


def test_knn_is_logged_and_does_not_change_the_training(images, labelled, tmp_path):
    flags = ["--data_path", images, "--drop_path_rate", 0.3, "--use_bn_in_head", "true", "--output_dir"]
    train(*flags, tmp_path / "without")
    train(*flags, tmp_path / "with", "--knn_every", 1, "--knn_data", labelled, "--knn_share", 1)
    without, with_ = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("without", "with"))
    for part in ("student", "teacher", "dino_loss"):
        torch.testing.assert_close(without[part], with_[part], rtol=0, atol=0)
    weights = ["--pretrained_weights", tmp_path / "with" / "checkpoint.pth"]
    argv = ["--data_path", labelled, *weights, "--nb_knn", "20", "--num_workers", "0"]
    [(top1, _)] = call(eval_knn, *argv).values()
    records = log_of(tmp_path / "with")
    assert records[1]["knn_teacher"] == pytest.approx(top1)
    assert all({"knn_student", "knn_teacher"} <= set(record) for record in records)


def test_no_worker_outlives_the_training(images, tmp_path):
    """They ignore Python's signal at its exit, which would then wait for ever."""
    flags = "--output_dir", tmp_path, "--num_workers", 1, "--lr", 1e20, "--clip_grad", 0
    with pytest.raises(TrainingError) as error:
        train("--data_path", images, *flags)
    assert error.tb and multiprocessing.active_children() == []  # its traceback keeps the frames


@pytest.mark.slow
@pytest.mark.parametrize(("centering", "adapt"), [("ema", 0), ("sinkhorn", 0), ("ema", 2)])
def test_two_processes_of_batch_b_train_as_one_of_batch_2b(images, tmp_path, centering, adapt):
    flags = ["--data_path", images, "--drop_path_rate", 0, "--optimizer", "sgd", "--freeze_last_layer", 0]
    flags += ["--centering", centering, "--adapt_teacher_temp", adapt]
    train(*flags, "--output_dir", tmp_path / "one", "--max_steps", 4)
    halves = [*flags, "--output_dir", tmp_path / "two", "--batch_size_per_gpu", 2, "--max_steps", 4]
    torchrun(2, "main_dino.py", *TINY, *halves)
    assert log_of(tmp_path / "two")[0]["train_loss"] == pytest.approx(
        log_of(tmp_path / "one")[0]["train_loss"], rel=1e-5
    )
    assert ("train_temp" in log_of(tmp_path / "two")[0]) == bool(adapt)
    one, two = (load_checkpoint(tmp_path / n / "checkpoint.pth") for n in ("one", "two"))
    assert_same_training(one, two)
    assert two["dino_loss"]["center"].any() == (centering == "ema")


def assert_same_training(one, two, rtol=1e-4, atol=1e-5) -> None:
    """Centre, summed gradients (in SGD's momentum) and weights of two checkpoints agree."""
    torch.testing.assert_close(two["dino_loss"]["center"], one["dino_loss"]["center"], rtol=rtol, atol=1e-6)
    pairs = zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True)
    for a, b in pairs:
        a, b = a["momentum_buffer"], b["momentum_buffer"]
        assert (a - b).norm() <= rtol * a.norm() + 1e-7
    torch.testing.assert_close(two["student"], one["student"], rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "clip"), [(1, 0), (1, 0.01), (2, 0.01)])
def test_accumulated_batches_train_as_one_large_batch(images, tmp_path, processes, clip):
    """Without clipping, gradients have the size of one batch's; with it, they are added up before."""
    flags = ["--data_path", images, "--drop_path_rate", 0, "--optimizer", "sgd", "--freeze_last_layer", 0]
    flags += ["--max_steps", 4, "--clip_grad", clip]
    train(*flags, "--output_dir", tmp_path / "one", "--batch_size_per_gpu", 4)
    parts = [*flags, "--output_dir", tmp_path / "parts", "--accum_steps", 2]
    parts += ["--batch_size_per_gpu", 2 // processes]
    if processes == 1:
        train(*parts)
    else:
        torchrun(2, "main_dino.py", *TINY, *parts)
    assert_same_training(*(load_checkpoint(tmp_path / n / "checkpoint.pth") for n in ("one", "parts")))
    one, two = (log_of(tmp_path / name)[0] for name in ("one", "parts"))
    for name in ("train_loss", "train_entropy", "train_spread", "train_kl"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


def test_dropout_of_other_networks_is_named(capsys):
    for arch, dropout in (("mobilenet_v2", True), ("resnet18", False)):
        argv = ["--arch", arch, "--grad_checkpointing", "--drop_path_rate", "0"]
        main_dino.build_networks(main_dino.parse_args(argv))
        said = f"note: {arch} has dropout, which acts in the teacher too" in capsys.readouterr().out
        assert said == dropout


def test_colours_on_the_device_and_checkpointing_leave_the_training_as_it_is(images, tmp_path):
    flags = ["--data_path", images, "--drop_path_rate", 0.3, "--optimizer", "sgd", "--freeze_last_layer", 0]
    flags += ["--max_steps", 3]
    train(*flags, "--output_dir", tmp_path / "plain")
    plain = load_checkpoint(tmp_path / "plain" / "checkpoint.pth")
    for name, change, tolerance in (
        ("device", ("--augment_on", "device"), 1e-2),  # a grey level here and there
        ("memory", ("--grad_checkpointing",), 1e-6),
    ):
        train(*flags, "--output_dir", tmp_path / name, *change)
        assert_same_training(plain, load_checkpoint(tmp_path / name / "checkpoint.pth"), tolerance, tolerance)
    with pytest.raises(UserError, match="resnet18 cannot recompute activations .*--grad_checkpointing"):
        train(*flags, "--output_dir", tmp_path / "resnet", "--arch", "resnet18", "--grad_checkpointing")


@pytest.mark.slow
def test_compiled_networks_train_alike_and_compile_once(images, tmp_path, monkeypatch):
    """One compilation per network, shape and mode, all in the first step."""
    flags = ["--data_path", images, "--drop_path_rate", 0, "--optimizer", "sgd", "--freeze_last_layer", 0]
    train(*flags, "--max_steps", 3, "--output_dir", tmp_path / "plain")

    def first_step_only(views, *args):
        if len(steps) == 1:
            torch.compiler.set_stance("fail_on_recompile")
        steps.append(1)
        return normalized_views(views, *args)

    steps = []
    monkeypatch.setattr(main_dino, "normalized_views", first_step_only)
    try:
        train(*flags, "--max_steps", 3, "--output_dir", tmp_path / "compiled", "--compile")
    finally:
        torch.compiler.set_stance("default")
    assert len(steps) == 3
    assert_same_training(*(load_checkpoint(tmp_path / n / "checkpoint.pth") for n in ("plain", "compiled")))


@pytest.mark.slow
def test_what_cannot_be_compiled_is_one_clear_line(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path, "--max_steps", "1", "--compile"
    result = run("main_dino.py", *TINY, *flags, check=False, env={"CXX": "/no/compiler"})
    assert result.returncode == 2
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(error) == 1
        and "cannot compile the network" in error[0]
        and "(--compile): leave it out" in error[0]
    )


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(images, tmp_path, capsys):
    flags = ["--data_path", images, "--output_dir", tmp_path]
    train(*flags, "--max_steps", "5")
    good = (tmp_path / "checkpoint.pth").read_bytes()
    broken = *map(str, flags), "--lr", "1e30", "--clip_grad", "0", "--allow_changed_args"
    with pytest.raises(SystemExit) as end:
        cli.run_script(main_dino.main, main_dino.parse_args([*TINY, *broken]))
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.startswith("error: loss is nan (step ") and "--lr" in said
    assert (tmp_path / "checkpoint.pth").read_bytes() == good


def test_weights_that_a_step_ruined_are_not_saved(images, tmp_path):
    flags = "--lr", "1e30", "--clip_grad", 0, "--max_steps", 2  # the last loss is still finite
    with pytest.raises(TrainingError, match="student has weights .*: not saved .*: try --precision fp32"):
        train("--data_path", images, "--output_dir", tmp_path, *flags)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_loss_that_is_not_finite_at_once_after_a_restart_is_advised_the_checkpoint_before(images, tmp_path):
    flags = ["--data_path", images, "--output_dir", tmp_path, "--lr", "1e20", "--clip_grad", "0"]
    for steps in ("1", "2"):  # during the first step the rate is 0, the second ruins the weights
        train(*flags, "--max_steps", steps)
    with pytest.raises(TrainingError, match="remove .*checkpoint.pth to resume from checkpoint_prev.pth"):
        train(*flags)
    (tmp_path / "checkpoint.pth").unlink()
    train(*flags, "--lr", "0.001", "--allow_changed_args")
    assert math.isfinite(log_of(tmp_path)[-1]["train_loss"])


def test_batch_norms_on_gpus_see_the_images_of_all_processes(monkeypatch):
    monkeypatch.setattr(main_dino, "get_world_size", lambda: 2)
    networks = main_dino.build_networks(main_dino.parse_args([*TINY, "--use_bn_in_head", "true"]))
    main_dino.synchronize_batchnorms(networks, torch.device("cuda"))
    for network in networks:
        norms = [module for module in network.modules() if "BatchNorm" in type(module).__name__]
        assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)


def test_batch_norm_that_would_get_one_value_per_channel_is_refused_before_the_training(images, tmp_path):
    flags = ["--data_path", images, "--output_dir", tmp_path, "--arch", "resnet18", "--max_steps", "1"]
    flags += ["--local_crops_number", "1", "--batch_size_per_gpu"]
    words = "batch norm cannot train: .*--batch_size_per_gpu 1.*larger local crops"
    with pytest.raises(UserError, match=words):
        train(*flags, "1")
    train(*flags, "2")


def test_a_check_of_batch_norms_leaves_the_network_as_it_is():
    flags = "--arch resnet18 --batch_size_per_gpu 1 --local_crops_number 1 --local_crops_size 64"
    args = main_dino.parse_args([*TINY, *flags.split()])
    backbone, _ = backbones.build_backbone("resnet18")
    before = copy.deepcopy(backbone.state_dict())
    main_dino.check_batch_norms(args, torch.device("cpu"), backbone)
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


def test_one_hundredth_of_many_images_may_be_unreadable(images, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(main_dino, "Monitor", lambda *args: limits.append(args[0]) or Monitor(*args))
    for count in (900, 1200):
        (tmp_path / "list.txt").write_text(f"{next(images.glob('*.png'))}\n" * count)
        flags = "--data_path", tmp_path / "list.txt", "--output_dir", tmp_path / f"{count}"
        train(*flags, "--max_steps", 1)
    assert limits == [9, 12]


def test_unreadable_images_do_not_end_a_run_until_they_are_many(tmp_path, capsys):
    save_images(tmp_path / "data", 30)
    for i in range(4):
        (tmp_path / "data" / f"{i:03}.png").write_bytes(b"broken")
    train("--data_path", tmp_path / "data", "--output_dir", tmp_path / "out")
    assert sum(record["unreadable"] for record in log_of(tmp_path / "out")) >= 4
    assert capsys.readouterr().out.count("cannot read") == 4
    ends = pytest.raises(UserError, match="10 images of this epoch cannot be read")
    for broken, outcome in ((9, contextlib.nullcontext()), (10, ends)):
        for i in range(4, broken):
            (tmp_path / "data" / f"{i:03}.png").write_bytes(b"broken")
        flags = "--output_dir", tmp_path / f"{broken}", "--batch_size_per_gpu", 10, "--max_steps", 3
        with outcome:  # the three batches are all of the images
            train("--data_path", tmp_path / "data", *flags)


@pytest.mark.parametrize(
    "flags", [["--arch", "resnet18"], ["--local_crops_number", "0"], ["--num_workers", "2"]]
)
def test_other_backbones_and_settings_train(images, tmp_path, flags):
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 2, *flags)
    assert math.isfinite(log_of(tmp_path)[0]["train_loss"])


@pytest.mark.slow
def test_the_demo_keeps_a_picture_of_the_user(images, tmp_path, monkeypatch, capsys):
    train("--data_path", images, "--output_dir", tmp_path, "--max_steps", 1)
    args = main_dino.parse_args([*TINY, "--output_dir", str(tmp_path)])
    knn = {"raw pixels": 1, "random initialisation": 2, "trained teacher": 3}
    path = tmp_path / "demo.png"
    path.write_bytes(b"the user's")
    with pytest.raises(UserError, match=r"would overwrite .*demo.png\): give another --output_dir"):
        main_dino.draw_demo(args, str(tmp_path / "checkpoint.pth"), knn)
    monkeypatch.setattr("support.shapes.Shapes.__len__", lambda shapes: min(shapes.length, 24))
    main_dino.report_demo(args)  # the figures come all the same
    assert re.search(r"trained teacher .* %\n(.*\n)*note: no picture: would overw", capsys.readouterr().out)
    assert path.read_bytes() == b"the user's"
    path.unlink()
    for _ in range(2):  # its own is replaced
        main_dino.draw_demo(args, str(tmp_path / "checkpoint.pth"), knn)
    with Image.open(path) as picture:
        assert picture.width > 100


@pytest.mark.slow
def test_a_short_demo_learns_and_shows_it(tmp_path):
    """Half of the demo: the teacher is already ahead of both baselines, with any version of torch."""
    flags = "--demo", "--epochs", "3", "--output_dir", tmp_path
    out = run("main_dino.py", *flags).stdout
    table, _, attention = out.partition("attention on the object")
    table, attention = (
        dict(re.findall(r"^  (\S.*?) +([\d.]+) %$", part, flags=re.MULTILINE)) for part in (table, attention)
    )
    assert float(attention["trained teacher"]) > float(attention["random initialisation"])
    accuracy = {name: float(value) for name, value in table.items()}
    assert set(accuracy) == {"raw pixels", "random initialisation", "trained student", "trained teacher"}
    assert accuracy["trained teacher"] > 5 + max(accuracy["raw pixels"], accuracy["random initialisation"])
    with Image.open(tmp_path / "demo.png") as picture:
        assert len(picture.getcolors(2**24)) > 1000 and picture.width > 1000


@pytest.mark.slow
def test_the_demo_runs_under_torchrun_and_without_matplotlib(tmp_path):
    (tmp_path / "few.py").write_text(
        "import sys\n"
        "sys.modules['matplotlib'] = None  # as if it were not there\n"
        "import main_dino\nfrom support import cli\n"
        "from support.shapes import Shapes\n"
        "main_dino.eval_knn.open_checked = lambda *_: (Shapes('train', 64), Shapes('val', 32))\n"
        "cli.run_script(main_dino.main, main_dino.parse_args())\n"
    )
    flags = "--demo", "--max_steps", "2", "--batch_size_per_gpu", "4", "--output_dir", tmp_path
    out = torchrun(2, tmp_path / "few.py", *flags, env={"PYTHONPATH": str(ROOT)}).stdout
    assert out.count("trained teacher") == 2 and "2 processes" in out  # accuracy and attention
    assert "note: no curves.png without matplotlib" in out and out.count("attention on the object") == 1
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > picture.height


@pytest.mark.slow
def test_a_terminal_gets_a_live_progress_bar(images, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "main_dino.py", *TINY, "--data_path", images, "--output_dir", tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"TQDM_MININTERVAL": "0"},  # show each of the few steps
    )
    out, _ = process.communicate(timeout=300)
    os.close(theirs)
    shown = os.read(ours, 2**16).decode()
    assert process.returncode == 0 and "epoch 0 [" not in out
    assert "epoch 0:   0%" in shown and "img/s" in shown and "5/5" in shown


def test_a_run_among_its_images_is_refused(images):
    """Its curves.png would be an image, and the run could not resume."""
    with pytest.raises(UserError, match=r"curves.png would become one of the images \(--output_dir"):
        train("--data_path", images, "--output_dir", images / "run")
    assert not (images / "run").exists()


def test_training_computes_only_the_cls_token_in_the_last_block():
    for network in main_dino.build_networks(main_dino.parse_args(TINY)):
        seen = []
        network.backbone.norm.register_forward_hook(lambda _, inputs, out, seen=seen: seen.append(out.shape))
        network([torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 16)])
        assert seen == [(2, 1, 128)] * 2


def test_a_subclass_of_our_vit_has_all_tokens_in_training(monkeypatch):
    class Mean(VisionTransformer):
        def forward(self, x):
            return self.get_intermediate_layers(x)[0].mean(dim=1)

    def make(patch_size=8, **kwargs):
        return Mean(patch_size=patch_size, embed_dim=32, depth=2, num_heads=2, **kwargs)

    monkeypatch.setitem(VITS, "mean", make)
    for network in main_dino.build_networks(main_dino.parse_args([*TINY, "--arch", "mean"])):
        assert not network.backbone.cls_only


def test_the_state_of_another_optimizer_is_refused(images, tmp_path):
    flags = "--data_path", images, "--output_dir", tmp_path, "--allow_changed_args"
    train(*flags, "--max_steps", "1")
    for other in ("sgd", "lars"):
        with pytest.raises(UserError, match="optimizer does not fit: another optimizer saved it"):
            train(*flags, "--optimizer", other)


def test_two_trainings_at_once_in_one_process_are_refused(images, tmp_path):
    """As of a sweep in threads: both would draw from one random state."""
    flags = "--data_path", images, "--max_steps", 1, "--output_dir", tmp_path / "run"
    probe = eval_linear.parse_args(["--pretrained_weights", "random", "--output_dir", str(tmp_path / "run")])
    with only_one_in_process():
        for start in (lambda: train(*flags), lambda: eval_linear.main(probe)):
            with pytest.raises(UserError, match="this process already trains, in another thread: start each"):
                start()
    assert not (tmp_path / "run").exists()
    train(*flags)
    with pytest.raises(UserError, match="no such file or folder"):  # an error ends it too
        train("--data_path", tmp_path / "absent")
    train(*flags)
