"""What only a GPU can show: `python -m pytest -m gpu -n 7`, minutes on one GPU.

`docs/gpu.md` lists the paths that only a GPU reaches, with the test for each. Tests that need more GPUs
than there are, or another device than asked for, are skipped and say so. To try the tests themselves
where there is no GPU: `--gpu-device cpu`.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.checkpoints import load_checkpoint
from support.distributed import choose_device
from support.pixels import normalized_views, to_pixels
from tests import golden
from tests.conftest import ROOT, TINY, picture, run, torchrun, wait_for
from tests.test_device import training_on
from utils import DataAugmentationDINO
from vision_transformer import Attention

pytestmark = pytest.mark.gpu

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
TRAINING = ["main_dino.py", *TINY, "--seed", "1"]
# The devices round differently, which Adam enlarges in gradients that are zero, and draw other numbers.
ALIKE = ["--optimizer", "sgd", "--lr", "0.3", "--drop_path_rate", "0", "--momentum_teacher", "0.9"]
# The outputs of TINY's head are so small that in float16 gradients overflow, and all ten steps are skipped.
PAPERS_HEAD = "--head_hidden_dim 2048 --head_bottleneck_dim 256".split()


@pytest.fixture(scope="module")
def gpu(request) -> torch.device:
    """The device of --gpu-device, with exact float32 products, in the scripts too."""
    device = torch.device(request.config.getoption("--gpu-device"))
    if choose_device().type != device.type:
        pytest.skip(f"no {device.type} here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # by default, convolutions in float32 are rounded to TF32
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield device


def trained(images, folder, *flags: str, env: dict | None = None) -> dict:
    """The checkpoint of a run of two epochs, by the script."""
    run(*TRAINING, *flags, "--data_path", images, "--output_dir", folder, env=env)
    return load_checkpoint(folder / "checkpoint.pth")


def skip_float16_without_scaler(device: torch.device, precision: str) -> None:
    if precision == "fp16" and device.type == "mps":
        pytest.skip(f"no training in float16 on {device.type}")


def distance(a: dict, b: dict, part: str = "student") -> float:
    """Relative distance of two checkpoints' weights."""
    x, y = (torch.cat([v.double().flatten() for v in c[part].values()]) for c in (a, b))
    return ((x - y).norm() / y.norm()).item()


def assert_same_bits(a: dict, b: dict) -> None:
    """Of two trained checkpoints: also those of runs whose steps were all skipped would have the same."""
    assert max(state["step"] for state in a["optimizer"]["state"].values()) > 1
    for part in ("student", "teacher", "dino_loss"):
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), f"{part}.{name}"


# ---- numbers


def test_golden_numbers(gpu, monkeypatch):
    """All numbers of the published code, with weights and inputs on the GPU."""
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(gpu))
    torch.manual_seed(0)
    with gpu:
        found = golden.run(golden.load(str(ROOT)))
    reference = json.loads((ROOT / "tests" / "data" / "golden.json").read_text())
    # The top 5 of 5 neighbours contain classes without a vote, whose order depends on the device.
    differing = {path: values for path, *values in golden.compare(reference, found)}
    assert differing.keys() <= {"/knn/k5[1]"}, differing


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("tokens", [37, 197, 785])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_and_its_gradients_equal_float64s(gpu, dtype, tokens, cls_only):
    """Of ViT-S, for the tokens of a local view, a global view, and one of patch 8: kernels may differ."""
    torch.manual_seed(0)
    exact = Attention(384, 6, qkv_bias=True).double()
    x = torch.randn(4, tokens, 384, dtype=torch.float64, requires_grad=True)
    q, k, v = exact.project(x, cls_only)
    expected = exact.proj((exact.weights(q, k) @ v).transpose(1, 2).flatten(2))
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()

    attention, there = Attention(384, 6, qkv_bias=True).to(gpu), x.detach().float().to(gpu).requires_grad_()
    attention.load_state_dict(exact.state_dict())
    with torch.autocast(gpu.type, getattr(torch, dtype), enabled=dtype != "float32"):
        out, _ = attention(there, cls_only=cls_only)
        with torch.no_grad():  # as the teacher does
            without_gradients, _ = attention(there, cls_only=cls_only)
    (out.float() * direction.to(gpu, torch.float32)).sum().backward()
    limit = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    pairs = [(out, expected), (without_gradients, expected), (there.grad, x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(attention.parameters(), exact.parameters(), strict=True)]
    for a, b in pairs:
        assert (a.cpu().double() - b).norm() < limit * b.norm()


@pytest.mark.parametrize(
    ("flags", "lr", "limit"),
    [
        ([], "0.3", 1e-4),
        # Batch norm over few values enlarges rounding: two kernels of one CPU differ by 2e-4 after ten
        # steps, in which the weights move by 1e-2.
        (["--arch", "resnet18", "--use_bn_in_head", "true"], "0.1", 2e-3),
    ],
)
def test_weights_after_ten_steps_equal_the_cpus(gpu, images, tmp_path, flags, lr, limit):
    flags = [*ALIKE, *flags, "--lr", lr]
    here = trained(images, tmp_path / "gpu", *flags)
    cpu = trained(images, tmp_path / "cpu", *flags, env=ON_CPU)
    assert here["step"] == 10
    assert distance(here, cpu) < limit and distance(here, cpu, "teacher") < limit


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "flags", [[], ["--grad_checkpointing", "--drop_path_rate", "0"], ["--accum_steps", "2"]]
)
def test_half_precision_follows_float32(gpu, images, tmp_path, precision, flags):
    skip_float16_without_scaler(gpu, precision)
    flags = [*ALIKE, *PAPERS_HEAD, *flags]
    begun = trained(images, tmp_path / "begun", *flags, "--max_steps", "1")
    exact, half = (
        trained(images, tmp_path / name, *flags, "--precision", name) for name in ("fp32", precision)
    )
    for part in ("student", "teacher"):
        assert distance(half, exact, part) < 0.1 * distance(begun, exact, part)


@pytest.mark.parametrize("flag", ["--grad_checkpointing", "--compile", "--augment_on=device"])
def test_a_flag_that_saves_time_or_memory_gives_the_same_weights(gpu, images, tmp_path, flag):
    plain = trained(images, tmp_path / "plain", *ALIKE)
    other = trained(images, tmp_path / "other", *ALIKE, *flag.split("="))
    # Colours on the device may differ from the worker's by a grey level.
    assert distance(other, plain) < (1e-2 if "augment" in flag else 1e-4)


def test_views_coloured_on_the_device_equal_the_workers(gpu):
    """At most one grey level in at most one pixel of a thousand."""
    augmentation = DataAugmentationDINO((0.4, 1), (0.05, 0.4), 4, 96, 48)
    pixels = to_pixels(picture(0, (120, 90)))
    for seed in range(20):
        done, none = augmentation.views(pixels, random.Random(seed))
        crops, colours = augmentation.crops(pixels, random.Random(seed))
        there = normalized_views([part[None].to(gpu) for part in crops], [field[None] for field in colours])
        expected = normalized_views([part[None] for part in done], none)
        for a, b in zip(there, expected, strict=True):
            levels = (a.cpu() - b).abs() * 0.229 * 255
            assert levels.max() < 1.2 and (levels > 0.5).float().mean() < 1e-3


# ---- evaluations


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    trained(images, folder)
    return str(folder / "checkpoint.pth")


def test_knn_equals_the_cpus(gpu, labelled, weights, tmp_path):
    said = []
    for name, env in (("gpu", None), ("cpu", ON_CPU)):
        (tmp_path / name).mkdir()
        flags = ["--data_path", labelled, "--num_workers", "2", "--dump_features", tmp_path / name]
        result = run("eval_knn.py", "--pretrained_weights", weights, "--nb_knn", "5", *flags, env=env)
        said.append([line for line in result.stdout.splitlines() if "Top1" in line])
    a, b = (torch.load(tmp_path / name / "trainfeat.pth") for name in ("gpu", "cpu"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert said[0] == said[1] != []


def test_linear_probe_equals_the_cpus(gpu, labelled, weights, tmp_path):
    found = []
    for name, env in (("gpu", None), ("cpu", ON_CPU)):
        words = ["--pretrained_weights", weights, "--data_path", labelled, "--epochs", "3"]
        words += ["--num_workers", "0", "--batch_size_per_gpu", "5", "--output_dir", tmp_path / name]
        run("eval_linear.py", *words, env=env)
        lines = (tmp_path / name / "log_linear.txt").read_text().splitlines()
        found.append([json.loads(line)["train_loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_attention_equals_the_cpus(gpu, images, weights, tmp_path):
    pictures = []
    for name, env in (("gpu", None), ("cpu", ON_CPU)):
        words = ["--pretrained_weights", weights, "--image_path", images / "000.png"]
        run("visualize_attention.py", *words, "--image_size", "64", "--output_dir", tmp_path / name, env=env)
        pictures.append(np.asarray(Image.open(tmp_path / name / "attn-mean.png"), dtype=float))
    assert np.abs(pictures[0] - pictures[1]).max() <= 3


# ---- restarts


def kill_at(step: int, folder: Path, *command: str) -> None:
    """Start the script, and kill it as soon as it has saved this step."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as `run`, for the same bits in a trial on the CPU
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, start_new_session=True)
    wait_for(lambda: process.poll() is not None or saved_step(folder) >= step, f"step {step}")
    with contextlib.suppress(ProcessLookupError):  # it may have ended in between
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def saved_step(folder: Path) -> int:
    path = folder / "checkpoint.pth"
    return load_checkpoint(path)["step"] if path.exists() else 0


NO_ORDER = pytest.mark.xfail(
    reason="fused attention in fp32 has no fixed order: docs/gpu.md", raises=AssertionError
)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=NO_ORDER), "fp16", "bf16"])
def test_a_killed_run_ends_with_the_same_bits(gpu, images, tmp_path, precision):
    skip_float16_without_scaler(gpu, precision)
    flags = [*PAPERS_HEAD, "--precision", precision, "--save_every_steps", "2", "--num_workers", "2"]
    whole = trained(images, tmp_path / "whole", *flags)
    command = [*TRAINING, *flags, "--data_path", str(images), "--output_dir", str(tmp_path / "killed")]
    for step in (2, 4):
        kill_at(step, tmp_path / "killed", *command)
    run(*command)
    assert_same_bits(load_checkpoint(tmp_path / "killed" / "checkpoint.pth"), whole)


# The paper's crops and batches of several images; few prototypes keep the files small.
PAPERS = "--patch_size 16 --global_crops_size 224 --local_crops_size 96 --local_crops_number 8".split()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["vit_small", "resnet50"])
def test_a_run_in_two_parts_ends_with_the_same_bits(gpu, images, tmp_path, arch, precision):
    """With crops of the paper's sizes, whose sums need several blocks of a kernel, unlike those of TINY."""
    skip_float16_without_scaler(gpu, precision)
    flags = [*PAPERS, *PAPERS_HEAD, "--arch", arch, "--precision", precision, "--batch_size_per_gpu", "8"]
    whole = trained(images, tmp_path / "whole", *flags)
    trained(images, tmp_path / "parts", *flags, "--max_steps", "2")
    parts = trained(images, tmp_path / "parts", *flags)
    assert parts["step"] == 4
    assert_same_bits(parts, whole)


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_continues_on_another_device(gpu, images, tmp_path, first):
    """With AdamW, whose state has to move, too."""
    envs = [ON_CPU, None] if first == "cpu" else [None, ON_CPU]
    flags = ["--drop_path_rate", "0", "--lr", "0.1", "--momentum_teacher", "0.9"]
    whole = trained(images, tmp_path / "whole", *flags, env=ON_CPU)
    half = trained(images, tmp_path / "moved", *flags, "--max_steps", "5", env=envs[0])
    moved = trained(images, tmp_path / "moved", *flags, env=envs[1])
    assert moved["step"] == whole["step"] == 10
    for part in ("student", "teacher"):
        assert distance(moved, whole, part) < 0.1 * distance(half, whole, part)


# ---- several processes


@pytest.mark.parametrize(
    "flags", [[], ["--use_bn_in_head", "true"], ["--centering", "sinkhorn"], ["--adapt_teacher_temp", "2"]]
)
def test_two_processes_train_as_one_of_twice_the_batch(gpu, images, tmp_path, flags):
    """Over NCCL on two GPUs; else over gloo on the CPU, where batch norms are those of each process."""
    env = ON_CPU if torch.cuda.device_count() < 2 else None
    if env and "--use_bn_in_head" in flags:
        pytest.skip("batch norms over all processes need two GPUs")
    one = trained(images, tmp_path / "one", *ALIKE, *flags, env=env)
    words = [*TRAINING, *ALIKE, *flags, "--data_path", images, "--output_dir", tmp_path / "two"]
    torchrun(2, *words, "--batch_size_per_gpu", "2", env=env)
    two = load_checkpoint(tmp_path / "two" / "checkpoint.pth")
    assert two["step"] == one["step"] == 10 and distance(two, one) < (2e-3 if "bn" in str(flags) else 1e-4)


# ---- speed


def test_a_step_waits_once_for_the_gpu(gpu, images):
    """torch counts what waits: the copy of the statistics in `Monitor.check` alone."""
    if gpu.type != "cuda":
        pytest.skip("torch counts waits on CUDA only; tests/test_device.py covers the rest")
    with (
        training_on(gpu, images, "--precision", "bf16") as train,
        warnings.catch_warnings(record=True) as found,
    ):
        train(range(2))  # loads the kernels
        found.clear()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(range(2, 4))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in found if "called a synchronizing" in str(warning.message)]
    assert [Path(w.filename).name for w in waits] == ["monitor.py"] * 2, [str(w.message) for w in waits]
