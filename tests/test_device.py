"""Training and evaluation on torch's meta device, which has shapes but no values.

There, the host cannot wait for a value (`.item()`, a boolean, `nonzero`, a copy to the CPU), and a tensor
left on the CPU does not combine with the others. So these tests fail without a GPU where a GPU would be
slow or would fail.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

import eval_knn
import eval_linear
import main_dino
import utils
from support.attention import attention_map, keep_mass
from support.backbones import build_backbone
from support.data import Source, open_labelled_images, open_training_images
from support.distributed import choose_device
from support.errors import UserError
from support.features import compute, extract_features, frozen_features, patch_tokens
from support.loading import to_device
from support.logger import MetricLogger
from support.monitor import Monitor
from support.pixels import eval_transform
from tests.conftest import TINY

META = torch.device("meta")


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """Lets `Tensor.tolist` return zeros on the meta device, and notes each call. Nothing else may wait.

    Two things are replaced that the meta device does not have: autocast, and the fused AdamW.
    """
    found: list[str] = []
    tolist, adamw = Tensor.tolist, torch.optim.AdamW
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def noted(tensor: Tensor):
        if not tensor.is_meta:
            return tolist(tensor)
        found.append(str(tuple(tensor.shape)))
        return tolist(torch.zeros(tensor.shape))

    def on_meta_too(device_type: str, *args, **kwargs):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    monkeypatch.setattr(Tensor, "tolist", noted)
    monkeypatch.setattr(torch, "autocast", on_meta_too)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: adamw(groups))
    return found


@functools.cache
def weight_norm_works() -> bool:
    """Whether this torch has the gradient of weight norm on the meta device; 2.7 has not."""
    v, g = (torch.ones(2, n, device=META, requires_grad=True) for n in (3, 1))
    try:
        torch._weight_norm(v, g).sum().backward()
    except NotImplementedError:
        return False
    return True


@contextlib.contextmanager
def training_on(device: torch.device, images, *flags: str):
    """Yields a function that makes the given steps with the script's own pieces, and returns the last."""
    if device == META and not weight_norm_works():
        pytest.skip("torch is too old for weight norm on the meta device")
    args = main_dino.parse_args([*TINY, *flags, "--data_path", str(images)])
    main_dino.check_args(args)
    data = open_training_images(Source.of(args))
    steps = main_dino.count_steps(args, len(data))
    training = main_dino.build_training(args, device, steps, resumes=False)
    monitor, logger = Monitor(9), MetricLogger()
    loader = main_dino.build_loader(args, data, steps, 0, device, monitor.stop_asked)
    with contextlib.closing(to_device(iter(loader), device)) as batches:
        yield lambda steps: main_dino.train_one_epoch(training, batches, steps, monitor, logger)


def train_two_steps(images, *flags: str) -> int:
    with training_on(META, images, *flags) as train:
        return train(range(2))


RECIPES = {
    "as the paper": [],
    "sinkhorn": ["--centering", "sinkhorn"],
    "an adapted temperature": ["--adapt_teacher_temp", "2"],
    "colours on the device": ["--augment_on", "device"],
    "LARS, batch norm in the head": ["--optimizer", "lars", "--use_bn_in_head", "true"],
    "a trained last layer": ["--norm_last_layer", "false", "--freeze_last_layer", "0"],
    "drop path": ["--drop_path_rate", "0.3"],
    "checkpointing": ["--grad_checkpointing"],
    "accumulation": ["--accum_steps", "2", "--batch_size_per_gpu", "2"],
    "resnet18": ["--arch", "resnet18", "--optimizer", "sgd", "--clip_grad", "0"],
    "timm": ["--arch", "xcit_nano_12_p16_224", "--drop_path_rate", "0", "--local_crops_size", "32"],
}


BACKBONE = build_backbone("vit_nano")[0]


def test_recomputed_blocks_and_drop_path_are_refused_where_torch_draws_other_numbers():
    args = main_dino.parse_args(["--data_path", "x", "--grad_checkpointing"])
    with pytest.raises(UserError, match="--grad_checkpointing.*--drop_path_rate 0"):
        main_dino.check_device(args, torch.device("mps"), BACKBONE)
    main_dino.check_device(args, torch.device("cuda"), BACKBONE)
    args.drop_path_rate = 0.0
    main_dino.check_device(args, torch.device("mps"), BACKBONE)


def test_fp16_is_refused_where_torch_takes_steps_that_overflow():
    args = main_dino.parse_args(["--data_path", "x", "--precision", "fp16"])
    with pytest.raises(UserError, match="--precision fp16.*bf16"):
        main_dino.check_device(args, torch.device("mps"), BACKBONE)
    main_dino.check_device(args, torch.device("cuda"), BACKBONE)


def test_a_network_whose_gradients_an_older_torch_gets_wrong_is_refused(monkeypatch):
    args = main_dino.parse_args(["--data_path", "x", "--arch", "inception_v3"])
    backbone, _ = build_backbone("inception_v3")
    for version, refused in (("2.13.1", True), ("2.14.0", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        words = pytest.raises(
            UserError, match="wrong gradients .*--arch inception_v3.: upgrade torch to 2.14"
        )
        with words if refused else contextlib.nullcontext():
            main_dino.check_device(args, torch.device("cuda"), backbone)
        main_dino.check_device(args, torch.device("cpu"), backbone)


def test_a_mac_trains_on_the_cpu_when_its_gpu_is_hidden(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cpu = torch.device("cpu")
    assert choose_device() == cpu  # as conftest.py hides all GPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "mps")
    views = [torch.zeros(2, 3, 4, 4)]
    assert [batch[0][0].device for batch in to_device([(views, 1), (views, 2)], cpu)] == [cpu, cpu]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_waits_once_for_the_device(images, waits, recipe):
    """Once, in `Monitor.check`, for four statistics, or five, and two counts."""
    assert train_two_steps(images, *RECIPES[recipe]) == 2
    assert waits == ["(7,)" if "--adapt_teacher_temp" in RECIPES[recipe] else "(6,)"] * 2


def test_the_plain_loss_does_not_wait(waits):
    loss = utils.DINOLoss(8, 4, 0.04, 0.04, 0, 1).to(META)
    student = torch.zeros(4 * 3, 8, device=META, requires_grad=True)
    loss(student, torch.zeros(2 * 3, 8, device=META), 0).backward()
    assert student.grad is not None and not waits


@pytest.mark.parametrize("wait", [Tensor.item, bool, Tensor.nonzero, Tensor.cpu])
def test_a_wait_within_the_step_is_found(images, waits, monkeypatch, wait):
    clip = utils.clip_gradients

    def waiting(model, limit):
        norms = clip(model, limit)
        wait(norms.max())
        return norms

    monkeypatch.setattr(utils, "clip_gradients", waiting)
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        train_two_steps(images)


def test_a_tensor_left_on_the_cpu_is_found(images, waits, monkeypatch):
    normalized = main_dino.normalized_views
    offset = torch.zeros(3, 1, 1)
    monkeypatch.setattr(
        main_dino, "normalized_views", lambda *args: [view + offset for view in normalized(*args)]
    )
    with pytest.raises(RuntimeError, match="device"):
        train_two_steps(images)


def test_knn_waits_once_for_each_k(waits):
    x, y = torch.zeros(20, 8, device=META), torch.zeros(20, dtype=torch.long, device=META)
    eval_knn.knn_accuracies(F.normalize(x, dim=1), y, x[:7], y[:7], [1, 5], 0.07, 3)
    assert waits == ["(2,)", "(2,)"]


def test_features_of_images_wait_once_at_the_end(labelled, waits):
    network = build_backbone("vit_nano", 8, 32)[0].eval().to(META)
    data = open_labelled_images(Source(str(labelled)), "val")
    x, y = extract_features(network, data, eval_transform(32), META, batch_size=4)
    assert x.shape == (9, 128) and y.shape == (9,) and x.is_meta and waits == ["(2,)"]


def test_linear_probe_waits_once_for_a_validation(waits):
    network = build_backbone("vit_nano", 8, 32)[0].eval().to(META)
    images, labels = torch.zeros(6, 3, 32, 32, device=META), torch.zeros(6, dtype=torch.long, device=META)
    features = functools.partial(frozen_features, n_last_blocks=4, avgpool_patchtokens=True)
    x = compute(features, network, images).clone()
    classifiers = eval_linear.LinearClassifiers(2, x.shape[1], 6).to(META)
    optimizer = eval_linear.build_optimizer(classifiers, [0.1, 0.01])
    assert len(list(eval_linear.train(classifiers, optimizer, [(x, labels)] * 2))) == 2 and not waits
    eval_linear.validate_network(classifiers, x, labels)
    assert len(waits) == 1


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny_patch16_224"])
def test_attention_and_patch_tokens_do_not_wait(waits, arch):
    network = build_backbone(arch, 16, 64)[0].eval().to(META)
    images = torch.zeros(2, 3, 64, 96, device=META)
    assert keep_mass(attention_map(network, images), 0.6).shape[-2:] == (4, 6)
    assert patch_tokens(network, images).shape[1:3] == (4, 6) and not waits
