import argparse
import copy
import importlib
import itertools
import json
import math
import pathlib
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import utils
from support import backbones, weights
from support.errors import UserError
from support.layouts import to_timm_names, unwrap, vit_shapes
from support.pixels import IMAGENET_MEAN, IMAGENET_STD
from support.weights import init_from, load_backbone
from tests.conftest import call, picture
from tests.test_eval_segmentation import write_voc
from tests.test_eval_video_segmentation import make_clip
from vision_transformer import VisionTransformer

VIT_ARGS = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def vit_files(vit: dict, other: dict) -> dict[str, object]:
    """The kinds of file that hold the weights `vit` of a vit_nano; `other` are the student's."""
    head = {"head.mlp.0.bias": torch.ones(3), "head.last_layer.weight_v": torch.ones(5, 3)}
    teacher, student = (prefixed(state, "backbone.") | head for state in (vit, other))
    classifier = {"head.weight": torch.ones(1000, 128), "head.bias": torch.ones(1000)}
    rest = {
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "dino_loss": {"center": torch.ones(1, 5)},
    }
    published = argparse.Namespace(arch="vit_nano", patch_size=8, dist_url="env://", gpu=0)
    return {
        "ours.pth": {"student": student, "teacher": teacher, "args": VIT_ARGS, "fp16_scaler": {}} | rest,
        "full.pth": {"student": prefixed(student, "module."), "teacher": teacher, "args": published} | rest,
        "full_bn.pth": {"student": prefixed(student, "module."), "teacher": prefixed(teacher, "module.")},
        "backbone.pth": vit,
        "module.pth": prefixed(vit, "module."),
        "both.pth": prefixed(vit, "module.backbone."),
        "timm.pth": vit | classifier,
        "deit.pth": {"model": vit | classifier},
        "state_dict.pth": {"state_dict": prefixed(vit | classifier, "module."), "epoch": 7},
        "timm.safetensors": vit | classifier,
    }


def write(content, path) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def vits():
    """Two vit_nano with patch 8 for 32 pixels, and their states."""
    torch.manual_seed(0)
    models = [backbones.build_backbone("vit_nano", 8, 32)[0].eval() for _ in range(2)]
    return models[0].state_dict(), models[1].state_dict()


@pytest.mark.parametrize("name", list(vit_files({}, {})))
def test_every_kind_of_file_loads_and_tells_the_network(name, vits, tmp_path):
    path = write(vit_files(*vits)[name], tmp_path / name)
    model, image_size, *_ = load_backbone(path)
    torch.testing.assert_close(model.state_dict(), vits[0], rtol=0, atol=0)
    assert image_size == 32 and not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_backbone(path, None, "vit_nano", 8, 16).image_size == 16
    if "teacher" in vit_files(*vits)[name]:
        student = load_backbone(path, "student").network
        torch.testing.assert_close(student.state_dict(), vits[1], rtol=0, atol=0)
    else:
        with pytest.raises(UserError, match="no 'student' in file .*leave --checkpoint_key out"):
            load_backbone(path, "student")


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "vit_tiny_patch16_224", "resnet10t"])
def test_classifiers_of_torchvision_and_timm_are_dropped_and_nothing_else(arch, tmp_path):
    if arch in torchvision.models.list_models():
        whole = torchvision.models.get_model(arch)
    else:
        whole = timm.create_model(arch)
    path = write(whole.state_dict(), tmp_path / "whole.pth")
    model = load_backbone(path, None, arch).network
    x = torch.randn(2, 3, 224, 224)
    pooled = []
    classifier = whole.get_submodule(model.dropped_classifiers[0])
    classifier.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    with torch.no_grad():
        whole.eval()(x)
        torch.testing.assert_close(model(x), pooled[0], rtol=1e-4, atol=1e-5)


def test_the_normalization_of_timms_training_script_comes_before_the_models(tmp_path):
    arch = "vit_tiny_patch16_224"
    state = timm.create_model(arch, num_classes=0).state_dict()
    args = argparse.Namespace(model=arch, mean=[0.1, 0.2, 0.3], std=None)
    frozen = load_backbone(write({"state_dict": state, "args": args}, tmp_path / "timm.pth"), arch=arch)
    assert (tuple(frozen.mean), tuple(frozen.std)) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    args.mean = [0.4]  # for all channels
    frozen = load_backbone(write({"state_dict": state, "args": args}, tmp_path / "timm.pth"), arch=arch)
    assert (tuple(frozen.mean), tuple(frozen.std)) == ((0.4, 0.4, 0.4), (0.5, 0.5, 0.5))


def test_a_hybrid_of_timm_loads_its_own_weights(tmp_path):
    """Its patches are those of a convnet's output, whose channels are not the image's."""
    arch = "vit_tiny_r_s16_p8_224"
    network = timm.create_model(arch, num_classes=0).eval()
    frozen = load_backbone(write(network.state_dict(), tmp_path / "hybrid.pth"), arch=arch)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(frozen.network(images), network(images))


def test_xcit_loads_as_its_own_repository_names_it(tmp_path):
    torch.manual_seed(0)
    model = backbones.build_backbone("xcit_nano_12_p16")[0].eval()  # timm's xcit_nano_12_p16_224
    state = {name.replace("pos_embed.", "pos_embeder."): v for name, v in model.state_dict().items()}
    for block in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"cls_attn_blocks.{block}.attn.{part}.{kind}") for part in "qkv"]
            state[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    args = argparse.Namespace(arch="xcit_nano_12_p16", patch_size=16)
    full = {"teacher": prefixed(state, "module.backbone."), "args": args}
    for content, arch in ((state, "xcit_nano_12_p16_224"), (full, None)):
        loaded = load_backbone(write(content, tmp_path / "xcit.pth"), None, arch).network
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_load_right_or_not_at_all(vits, tmp_path):
    state = dict(vits[0])
    del state["norm.bias"]
    state["extra"] = torch.ones(1)
    state["cls_token"] = torch.ones(1, 1, 7)
    path = write({"teacher": prefixed(state, "backbone.")}, tmp_path / "odd.pth")
    message = r"1 missing \(norm.bias\), 1 unexpected \(extra\), 1 of another shape \(cls_token\)"
    with pytest.raises(UserError, match=message):
        load_backbone(path)
    with pytest.raises(UserError, match="no 'student' in file .*--checkpoint_key teacher"):
        load_backbone(path, "student")
    with pytest.raises(UserError, match="no weights in file"):
        load_backbone(write({"epoch": 3}, tmp_path / "empty.pth"))
    with pytest.raises(UserError, match="weights do not fit: .* missing"):
        load_backbone(write(vits[0], tmp_path / "vit.pth"), None, "resnet18")


def test_weights_that_are_no_numbers_are_refused(vits, tmp_path):
    state = vits[0] | {
        "norm.weight": torch.full((128,), torch.nan),
        "norm.bias": torch.full((128,), torch.inf),
    }
    path = write(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"not finite: .*norm.weight, norm.bias \(.*nan.pth\)"):
        load_backbone(path)
    new = students(32)
    with pytest.raises(UserError, match="not finite"):
        init_from(new.backbone, new.head, path, "vit_nano", 8, 32)


@pytest.mark.parametrize(
    "convert",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to_sparse_csr(),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda value: torch.nested.nested_tensor([value]),
    ],
)
def test_weights_that_are_sparse_or_quantized_are_refused(vits, convert, tmp_path):
    name = "blocks.0.mlp.fc1.weight"
    path = write(vits[0] | {name: convert(vits[0][name])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"^weights are sparse, quantized or nested: {name} \(.*odd.pth\): "):
        load_backbone(path)


@pytest.mark.parametrize("args", ["a word", {"arch": None, "patch_size": None}])
def test_a_record_that_says_nothing_leaves_it_to_the_shapes(vits, tmp_path, args):
    path = write({"teacher": prefixed(vits[0], "backbone."), "args": args}, tmp_path / "odd.pth")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0])


def test_a_digest_tells_weights_apart(vits):
    a, b = (backbones.build_backbone("vit_nano", 8, 32)[0] for _ in range(2))
    a.load_state_dict(vits[0])
    b.load_state_dict(vits[0])
    assert weights.digest_weights(a) == weights.digest_weights(b)
    b.norm.bias.data[3] += 1e-6
    assert weights.digest_weights(a) != weights.digest_weights(b)


def test_flags_that_contradict_the_checkpoint_are_an_error(vits, tmp_path):
    path = write(vit_files(*vits)["ours.pth"], tmp_path / "ours.pth")
    with pytest.raises(UserError, match=r"have arch vit_nano \(--arch vit_small\): give --arch vit_nano"):
        load_backbone(path, arch="vit_small")
    with pytest.raises(UserError, match=r"have patch_size 8 \(--patch_size 16\)"):
        load_backbone(path, patch_size=16)
    with pytest.raises(UserError, match=r"--image_size 30\): try 24 or 32"):
        load_backbone(path, image_size=30)
    with pytest.raises(UserError, match="no weights given"):
        load_backbone("")


@pytest.mark.parametrize("weights", ["ours.pth", "random", "pixels"])
@pytest.mark.parametrize(
    "argument",
    [{"image_size": size} for size in (0, -32, 8.5, "32", (), (32, 0), np.array([32, 32]))]
    + [{name: value} for name in ("patch_size", "in_chans") for value in (0, -1, "8", (8, 8), 2.0)],
    ids=repr,
)
def test_sizes_that_are_none_are_refused(weights, argument, vits, tmp_path):
    """An image size of 0 would be the default."""
    if weights == "ours.pth":
        weights = write(vit_files(*vits)[weights], tmp_path / weights)
    ((name, value),) = argument.items()
    with pytest.raises(UserError, match=re.escape(f"not a positive whole number ({name}={value!r})")):
        load_backbone(weights, **argument)


def test_random_weights_only_by_name():
    torch.manual_seed(1)
    model, size, *_ = load_backbone("random", None, "vit_nano", 8, 32)
    torch.manual_seed(1)
    torch.testing.assert_close(
        model.state_dict(), backbones.build_backbone("vit_nano", 8, 32)[0].state_dict()
    )
    assert size == 32 and isinstance(load_backbone("pixels").network, torch.nn.Flatten)


# ---- a new run from old weights


def students(image_size: int) -> utils.MultiCropWrapper:
    backbone, dim = backbones.build_backbone("vit_nano", 8, image_size)
    return utils.MultiCropWrapper(backbone, utils.DINOHead(dim, 64, hidden_dim=32, bottleneck_dim=16))


def test_a_run_begins_with_backbone_and_head(tmp_path):
    old, new = students(32), students(32)
    path = write({"teacher": old.state_dict(), "args": VIT_ARGS}, tmp_path / "old.pth")
    init_from(new.backbone, new.head, path, "vit_nano", 8, 32)
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="have arch vit_nano .*give --arch vit_nano$"):
        init_from(new.backbone, new.head, path, "vit_tiny", 8, 32)
    narrow = utils.MultiCropWrapper(
        students(32).backbone, utils.DINOHead(128, 32, hidden_dim=32, bottleneck_dim=16)
    )
    with pytest.raises(UserError, match="of another shape .*head.*give the old run's --out_dim"):
        init_from(narrow.backbone, narrow.head, path, "vit_nano", 8, 32)
    path = write({"student": old.state_dict(), "args": VIT_ARGS}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="no 'teacher' in file .*give a checkpoint with a teacher"):
        init_from(new.backbone, new.head, path, "vit_nano", 8, 32)
    one = students(32).backbone.state_dict()
    named = [{f"{name}.{key}": x for key, x in one.items()} for name in ("backbone", "momentum_backbone")]
    for several in (named[0] | named[1], {"online": one, "target": one}, named[0] | {"gate": torch.zeros(3)}):
        path = write(several, tmp_path / "several.pth")
        with pytest.raises(UserError, match="a file with the weights of one network$"):  # it has no such flag
            init_from(new.backbone, new.head, path, "vit_nano", 8, 32)


def test_a_backbone_alone_leaves_the_head_as_it_is_and_fits_another_image_size(vits, tmp_path):
    new = students(48)
    head = copy.deepcopy(new.head.state_dict())
    init_from(new.backbone, new.head, write(vits[0], tmp_path / "backbone.pth"), "vit_nano", 8, 48)
    torch.testing.assert_close(new.head.state_dict(), head, rtol=0, atol=0)
    old = backbones.build_backbone("vit_nano", 8, 32)[0]
    old.load_state_dict(vits[0])
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(new.backbone.eval()(x), old.eval()(x))


def test_a_run_with_a_convnet_begins_too(tmp_path):
    old, new = (backbones.build_backbone("resnet18")[0] for _ in range(2))
    path = write(old.state_dict(), tmp_path / "resnet.pth")
    assert init_from(new, torch.nn.Identity(), path, "resnet18", 16, 32) is None
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)


def test_the_grid_of_a_rectangle_is_the_recorded_one(tmp_path):
    """Shapes give the number of positions only: 64 x 16 pixels have as many as 32 x 32."""
    for size in ((64, 16), (16, 64), (32, 24)):
        network = backbones.build_backbone("vit_nano", 8, size)[0].eval()
        state = {"teacher": prefixed(network.state_dict(), "backbone.")}
        path = write(state | {"args": VIT_ARGS | {"global_crops_size": list(size)}}, tmp_path / "wide.pth")
        x = torch.randn(2, 3, *size)
        frozen = load_backbone(path)
        assert frozen.image_size == size and torch.equal(frozen.network(x), network(x))
        other = load_backbone(path, image_size=[32, 48])  # interpolated from the recorded grid
        y = torch.randn(2, 3, 32, 48)
        assert other.image_size == (32, 48) and torch.equal(other.network(y), network(y))
        assert other.transform(picture()).shape == (3, 32, 48)
        new = students((24, 48))
        init_from(new.backbone, new.head, path, "vit_nano", 8, (24, 48))
        z = torch.randn(2, 3, 24, 48)
        torch.testing.assert_close(new.backbone.eval()(z), network(z))
    untold = write(network.state_dict(), tmp_path / "untold.pth")
    with pytest.raises(UserError, match="of another shape .*pos_embed"):
        load_backbone(untold)
    assert torch.equal(load_backbone(untold, image_size=[32, 24]).network(x), network(x))
    with pytest.raises(UserError, match=r"--image_size 60 32\): try 56 32 or 64 32"):
        load_backbone(path, image_size=[60, 32])


def test_a_square_is_read_from_the_shapes_whatever_the_flag_says(vits, tmp_path, capsys):
    path = write(vits[0], tmp_path / "backbone.pth")
    assert load_backbone(path, image_size=[64, 16]).network.grid == (4, 4)
    expected = "16 positions assumed to be those of 32 x 32 pixels, not of --image_size 64 x 16"
    assert expected in capsys.readouterr().out
    load_backbone(path, image_size=[64, 32])
    assert "taken as" not in capsys.readouterr().out
    record = VIT_ARGS | {"global_crops_size": 36}  # not of our patches
    path = write({"teacher": prefixed(vits[0], "backbone."), "args": record}, tmp_path / "odd.pth")
    assert load_backbone(path).image_size == 32


def test_weights_beside_data_load(vits, tmp_path):
    content = vit_files(*vits)["ours.pth"] | {"best": np.float64(1), "out": pathlib.Path("runs")}
    path = write(content, tmp_path / "ours.pth")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)


def test_urls_and_folders_are_refused_and_the_home_is_expanded(vits, tmp_path, monkeypatch):
    for url in ("https://example.com/a.pth", "s3://bucket/a.pth", "hf-hub:timm/vit_small"):
        with pytest.raises(UserError, match="URLs are not downloaded.*download the file"):
            load_backbone(url)
    folder = tmp_path / "2026-11-28T10:30"  # a folder's name that looks like a URL is none
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_backbone(write(vits[0], pathlib.Path(folder.name, "vit.pth"))).arch == "vit_nano"
    write(vits[0], tmp_path / "vit.pth")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        UserError, match=r"this is a folder \(.*\): give a file in it: model.safetensors, vit.pth$"
    ):
        load_backbone(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="this is a folder .*: give a file of weights; it has none$"):
        load_backbone(str(tmp_path / "empty"))
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.testing.assert_close(load_backbone("~/vit.pth").network.state_dict(), vits[0])


def test_safetensors_by_content_whatever_the_name(vits, tmp_path):
    safetensors.torch.save_file(vits[0], tmp_path / "vit.bin")
    torch.testing.assert_close(load_backbone(str(tmp_path / "vit.bin")).network.state_dict(), vits[0])


# ---- several networks, leftovers, other projects' layouts


def two_networks(vits, one: str, two: str) -> dict:
    return prefixed(vits[0], one) | prefixed(vits[1], two) | {"projector.0.weight": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("backbone", "momentum_backbone"),
        ("student_backbone", "teacher_backbone"),
        ("encoder_q", "encoder_k"),
        ("module.online.backbone", "module.target.backbone"),
    ],
)
@pytest.mark.parametrize("entry", ["state_dict", "model", ""])
def test_one_of_several_networks_is_taken_only_by_name(one, two, entry, vits, tmp_path, capsys):
    state = two_networks(vits, f"{one}.", f"{two}.")
    path = write({entry: state, "epoch": 4} if entry else state, tmp_path / "two.pth")
    one, two = (name.removeprefix("module.") for name in (one, two))
    with pytest.raises(UserError, match=f"2 networks in file: .*give .*--checkpoint_key .*{two}") as error:
        load_backbone(path)
    assert f"--checkpoint_key {one}" in str(error.value)
    for key, expected in zip((one, two), vits, strict=True):
        frozen = load_backbone(path, key)
        torch.testing.assert_close(frozen.network.state_dict(), expected, rtol=0, atol=0)
        assert "projector" in capsys.readouterr().out
    for key in ("other", one[:-1]):
        with pytest.raises(UserError, match=f"no '{key}' in file .*--checkpoint_key .* or --checkpoint_key"):
            load_backbone(path, key)


def test_two_convnets_in_one_file_are_two_networks(tmp_path):
    states = [backbones.build_backbone("resnet18")[0].state_dict() for _ in range(2)]
    state = prefixed(states[0], "backbone.") | prefixed(states[1], "momentum_backbone.")
    path = write({"state_dict": state}, tmp_path / "two.pth")
    with pytest.raises(UserError, match="2 networks in file"):
        load_backbone(path, arch="resnet18")
    loaded = load_backbone(path, "momentum_backbone", "resnet18").network
    torch.testing.assert_close(loaded.state_dict(), states[1], rtol=0, atol=0)


def test_several_state_dicts_are_taken_only_by_name(vits, tmp_path):
    path = write({"model": vits[0], "model_ema": vits[1]}, tmp_path / "two.pth")
    with pytest.raises(
        UserError, match="several state dicts in file: model, model_ema .*--checkpoint_key model_ema"
    ):
        load_backbone(path)
    torch.testing.assert_close(load_backbone(path, "model_ema").network.state_dict(), vits[1])


def test_leftovers_are_said_when_they_are_heads_and_else_an_error(vits, tmp_path, capsys):
    state = prefixed(vits[0], "backbone.")
    path = write(
        {"state_dict": state | {"queue": torch.ones(3), "head.0.weight": torch.ones(1, 1)}}, tmp_path / "a"
    )
    load_backbone(path)
    assert f"{path}: not used: queue" in capsys.readouterr().out
    path = write({"state_dict": state | {"gate.weight": torch.ones(3)}}, tmp_path / "b")
    with pytest.raises(UserError, match="unknown purpose in file: gate .*--checkpoint_key backbone"):
        load_backbone(path)
    torch.testing.assert_close(load_backbone(path, "backbone").network.state_dict(), vits[0])
    parts = "prototypes linear_eval classifier predictor decoder fc center n_averaged".split()
    others = {f"{part}.weight": torch.ones(1) for part in parts}
    path = write({"state_dict": state | others}, tmp_path / "d")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)
    assert f"{path}: not used: {', '.join(parts)}\n" in capsys.readouterr().out
    path = write(vits[0] | {"head.weight": torch.ones(9, 128)}, tmp_path / "c")
    load_backbone(path)
    assert f"{path}: not used: head" in capsys.readouterr().out


def test_values_that_are_no_tensors_are_named(vits, tmp_path):
    teacher = prefixed(vits[0], "backbone.") | {"backbone.step": 5}
    path = write({"teacher": teacher, "student": vits[1]}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"teacher contains values that are not tensors: backbone.step \(int\)"
    ):
        load_backbone(path)
    with pytest.raises(UserError, match=r"file contains values that are not tensors: epoch \(int\)"):
        load_backbone(write(vits[0] | {"epoch": 5}, tmp_path / "b.pth"))
    with pytest.raises(UserError, match="'teacher' is a int, not weights .*: choose among student$"):
        load_backbone(write({"teacher": 5, "student": vits[1]}, tmp_path / "c.pth"))
    with pytest.raises(UserError, match="'teacher' is a int, not weights .*: choose among other files$"):
        load_backbone(write({"teacher": 5}, tmp_path / "f.pth"))
    with pytest.raises(UserError, match=r"^teacher contains nothing \(.*g.pth\): save weights only"):
        load_backbone(write({"teacher": {}, "student": vits[1]}, tmp_path / "g.pth"))
    whole = vits[0] | {"norm.bias": torch.ones(128, dtype=torch.int8)}
    with pytest.raises(UserError, match=r"1 of another type \(norm.bias\)"):
        load_backbone(write(whole, tmp_path / "d.pth"))
    with pytest.raises(UserError, match="weights without values: norm.bias"):
        load_backbone(write(vits[0] | {"norm.bias": torch.ones(128, device="meta")}, tmp_path / "e.pth"))


def test_wrappers_are_removed_wherever_they_stand(vits, tmp_path):
    state = {
        f"module._orig_mod.module.backbone._orig_mod.{n.replace('blocks.', 'blocks._orig_mod.')}": v
        for n, v in vits[0].items()
    }
    path = write({"teacher": state}, tmp_path / "a.pth")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)
    assert unwrap({"submodule.a": 1, "b.module.c": 2}, "") == {"submodule.a": 1, "b.c": 2}
    sharded = {"_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.b": 1}
    assert unwrap(sharded, "") == {"a.b": 1}
    path = write(vits[0] | prefixed(vits[1], "_orig_mod."), tmp_path / "b.pth")
    with pytest.raises(UserError, match="two entries named cls_token, once as _orig_mod.cls_token"):
        load_backbone(path)


def hugging_face(state: dict) -> dict:
    """A ViT's state in the layout of Hugging Face's ViTModel."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    parts = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }  # fmt: skip
    theirs = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                block = name.replace("blocks", "encoder.layer").replace(
                    "attn.qkv", f"attention.attention.{part}"
                )
                theirs[block] = third.clone()
            continue
        if name in ("norm.weight", "norm.bias"):
            name = "layer" + name
        for ours, other in parts.items():
            name = name.replace(f"{ours}.", f"{other}.")
        theirs[names.get(name, name.replace("blocks", "encoder.layer"))] = value
    return theirs


@pytest.mark.parametrize("prefix", ["", "vit.", "dino.", "model.backbone."])
def test_hugging_faces_layout_is_read(prefix, vits, tmp_path, capsys):
    state = prefixed(hugging_face(vits[0]), prefix) | {f"{prefix}pooler.dense.weight": torch.ones(2, 2)}
    path = write(state, tmp_path / "model.safetensors")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)
    assert "pooler" in capsys.readouterr().out


def test_hugging_faces_names_of_version_5_are_read(vits):
    """In memory; older versions have those of the files there too."""
    new = {"encoder.layer.": "layers.", "attention.output.dense": "attention.o_proj"}
    new |= {f"attention.attention.{part}": f"attention.{part[0]}_proj" for part in ("query", "key", "value")}
    state = hugging_face(vits[0])
    for old in new:
        state = {name.replace(old, new[old]): value for name, value in state.items()}
    torch.testing.assert_close(to_timm_names(state), vits[0], rtol=0, atol=0)


def test_hugging_faces_layout_without_a_part_is_one_clear_line(vits, tmp_path):
    state = hugging_face(vits[0])
    del state["encoder.layer.3.attention.attention.value.bias"]
    with pytest.raises(UserError, match="missing.*blocks.3.attn.qkv.bias"):
        load_backbone(write(state, tmp_path / "x.safetensors"), arch="vit_nano")


def test_shapes_of_a_vit_and_of_others():
    patches, position = torch.zeros(8, 3, 4, 4), torch.zeros(1, 17, 8)
    found = {"width": 8, "patch_size": 4, "patches": 16, "in_chans": 3}
    for weight, pos_embed, expected in (
        (patches, position, found),
        (patches, position[:, :0], found | {"patches": 0}),
        (patches, position[0], {}),
        (patches[:, :, None], position, {}),  # of a video
    ):
        assert vit_shapes({"x.patch_embed.proj.weight": weight, "x.pos_embed": pos_embed}) == expected


def save_pretrained(folder, means=(0.5, 0.4, 0.3), **options):
    """A random ViT and its image processor, as transformers saves them; also the network and its file."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=6, intermediate_size=512, image_size=32, patch_size=8,
        num_attention_heads=options.pop("num_attention_heads", 4), layer_norm_eps=1e-6, **options,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(image_mean=list(means), image_std=[0.2] * 3)
    processor.save_pretrained(folder)
    return model.vit, str(folder / "model.safetensors")


def test_a_state_dict_of_transformers_is_read_as_its_file(tmp_path):
    """Version 5 has other names in memory than in files."""
    model, file = save_pretrained(tmp_path)
    path = write(model.state_dict(), tmp_path / "saved.pth")
    found, expected = (load_backbone(each).network.state_dict() for each in (path, file))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_transformers_writes_beside_its_weights_is_read(tmp_path, capsys, monkeypatch):
    model, path = save_pretrained(tmp_path)
    frozen = load_backbone(path)
    assert (frozen.mean, frozen.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    assert frozen.description == f"{path}: vit, vit_nano, patch 8"  # nothing is assumed
    said = capsys.readouterr().out
    words = "num_attention_heads 4, hidden_act gelu, mean [0.5, 0.4, 0.3], std [0.2, 0.2, 0.2]"
    assert f"note: {path}: from the .json files beside it: {words}" in said
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(frozen.network(images), model(images).last_hidden_state[:, 0])
    new = students(32)
    init_from(new.backbone, new.head, path, "vit_nano", 8, 32)
    assert "expects mean (0.5, 0.4, 0.3)" in capsys.readouterr().out
    other = tmp_path / "model.pth"  # another file is not described
    torch.save(safetensors.torch.load_file(path), other)
    assert "4 heads assumed, ImageNet's mean" in load_backbone(str(other)).description
    monkeypatch.setenv("HOME", str(tmp_path))
    other.rename(tmp_path / "pytorch_model.bin")  # as older versions of transformers wrote it
    frozen = load_backbone("~/pytorch_model.bin")
    assert frozen.mean == (0.5, 0.4, 0.3) and "assumed" not in frozen.description
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"do_normalize": False}))
    frozen = load_backbone(path)
    assert (frozen.mean, frozen.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for broken in ("[broken", "[" * 100_000):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(UserError, match=r"the description of the weights: .*r_config.json\): repair it"):
            load_backbone(path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    assert load_backbone(path).description.endswith("patch 8, ImageNet's mean and deviation assumed")
    (tmp_path / "config.json").write_text('{"optimizer": "adam"}')  # of another program
    capsys.readouterr()
    assert "4 heads assumed" in load_backbone(path).description and "beside" not in capsys.readouterr().out
    for wrong in ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, {"image_mean": [0.5] * 3}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="mean and deviation in the file are not valid"):
            load_backbone(path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads 8, our ViT of this width has 4"),
        ({"hidden_act": "relu"}, "hidden_act relu, our ViT of this width has gelu"),
    ],
)
def test_a_network_of_transformers_that_ours_cannot_be_is_refused(option, words, tmp_path):
    _, path = save_pretrained(tmp_path, **option)
    with pytest.raises(UserError, match=words):
        load_backbone(path)


def test_what_transformers_writes_of_dinov2_gives_its_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, num_register_tokens=4
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    for name, value in model.named_parameters():
        if "layer_scale2" in name or "register" in name:  # no two parts are alike
            nn.init.normal_(value)
        elif "position" in name:  # the two interpolate them differently
            nn.init.constant_(value, 0.3)
    model.save_pretrained(tmp_path)
    path, images = str(tmp_path / "model.safetensors"), torch.randn(2, 3, 56, 56)
    network = load_backbone(path, arch="vit_small_patch14_reg4_dinov2").network
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images).last_hidden_state[:, 0])


def test_what_timm_writes_beside_its_weights_is_read(tmp_path, capsys):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = write(state, tmp_path / "model.safetensors")
    settings = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000}
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.4, 0.4], "input_size": [3, 224, 224]}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"pretrained_cfg": pretrained}))
    frozen = load_backbone(path)
    assert (frozen.mean, frozen.std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert frozen.arch == "vit_tiny_patch16_224"
    assert (
        "from the .json files beside it: arch vit_tiny_patch16_224, mean [0.1, 0.2, 0.3]"
        in capsys.readouterr().out
    )
    (tmp_path / "config.json").write_text(json.dumps(settings | pretrained))  # as timm wrote it before
    assert load_backbone(path).mean == (0.1, 0.2, 0.3)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_args": {"norm_layer": "rms"}}))
    assert load_backbone(path).mean == (0.5, 0.5, 0.5)  # of timm's network
    assert (
        "warning: " in (said := capsys.readouterr().out)
        and "model_args in config.json have no effect" in said
    )
    own = {"teacher": students(32).state_dict(), "args": VIT_ARGS}
    torch.save(own, tmp_path / "pytorch_model.bin")  # says itself what it is
    assert load_backbone(str(tmp_path / "pytorch_model.bin")).arch == "vit_nano"
    assert "beside it" not in capsys.readouterr().out


def test_ibots_training_file_is_read(vits, tmp_path, capsys):
    head = {"head.mlp.0.weight": torch.ones(3, 128), "head.last_layer2.weight_v": torch.ones(5, 3)}
    teacher, student = (prefixed(state, "backbone.") | head for state in vits)
    student |= {"backbone.masked_embed": torch.ones(1, 128)}
    args = argparse.Namespace(arch="vit_nano", patch_size=8, shared_head=True)
    losses = {"center": torch.ones(1, 5), "center2": torch.ones(1, 5)}
    content = {"student": student, "teacher": teacher, "args": args, "epoch": 2, "ibot_loss": losses}
    path = write(content, tmp_path / "ibot.pth")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)
    torch.testing.assert_close(load_backbone(path, "student").network.state_dict(), vits[1], rtol=0, atol=0)
    assert "not used" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2s_training_file_is_read_as_timms_network_and_named_for_ours(arch, tmp_path, capsys):
    model = backbones.build_backbone(arch)[0].eval()
    state = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    if "reg4" in arch:
        state["register_tokens"] = state.pop("reg_token")
        first = torch.zeros(1, 1, 384)  # the CLS token's position, which timm adds to the token
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    else:  # in chunks of four blocks, as they are trained
        state = {
            re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 4}.{m[1]}", n): v
            for n, v in state.items()
        }
    teacher = prefixed(state, "backbone.") | {"dino_head.mlp.0.weight": torch.ones(2, 2)}
    path = write({"teacher": teacher}, tmp_path / "dinov2.pth")
    loaded = load_backbone(path, arch=arch)
    torch.testing.assert_close(loaded.network.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.image_size == 518 and "dino_head" in capsys.readouterr().out
    with pytest.raises(UserError, match="which our ViTs lack .*give timm's name .*vit_small_patch14_dinov2"):
        load_backbone(path)


def test_a_vit_of_ones_own_may_call_its_registers_as_dinov2_does(tmp_path, monkeypatch):
    class Registers(VisionTransformer):
        def __init__(self, **settings):
            super().__init__(embed_dim=32, depth=1, num_heads=2, **settings)
            self.register_tokens = torch.nn.Parameter(torch.ones(1, 4, 32))

    monkeypatch.setitem(backbones.VITS, "registers", Registers)
    path = write(Registers(patch_size=8, img_size=32).state_dict(), tmp_path / "own.pth")
    assert load_backbone(path, arch="registers", patch_size=8).network.register_tokens.all()


def test_timm_does_not_interpolate_what_does_not_fit(tmp_path):
    state = timm.create_model("vit_tiny_patch16_384", num_classes=0).state_dict()
    path = write(state, tmp_path / "large.pth")
    with pytest.raises(UserError, match="of another shape .*pos_embed"):
        load_backbone(path, arch="vit_tiny_patch16_224")
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=224)
    state = model.state_dict() | {"mask_token": torch.zeros(1, 384)}
    state["register_tokens"] = state.pop("reg_token")  # timm converts this layout, and would interpolate
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    with pytest.raises(UserError, match="1 of another shape .pos_embed.*reg4.pth"):
        load_backbone(write(state, tmp_path / "reg4.pth"), arch="vit_small_patch14_reg4_dinov2")


def test_what_timm_cannot_convert_is_named(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    del state["norm.bias"]
    state["patch_embed.proj.weight"] = torch.ones(192, 7)
    with pytest.raises(UserError, match=r"1 missing .norm.bias., 1 of another shape .patch_embed.proj"):
        load_backbone(write(state, tmp_path / "odd.pth"), arch="vit_tiny_patch16_224")


def test_moco_v3s_small_vit_is_not_ours(tmp_path, capsys):
    weights = backbones.build_backbone("vit_small", 16, 32)[0].state_dict()
    for name in ("base_encoder", "momentum_encoder"):
        state = prefixed(weights, f"module.{name}.")
        with pytest.raises(UserError, match="12 heads, ours has 6"):
            load_backbone(write({"state_dict": state}, tmp_path / "moco.pth"))
    load_backbone(write(weights, tmp_path / "ours.pth"))
    assert "12 heads" not in capsys.readouterr().out
    weights["pos_embed"][:, 0] = 0  # as in its files of linear classification
    load_backbone(write(weights, tmp_path / "linear.pth"))
    assert "warning: " in (said := capsys.readouterr().out) and "12 heads, ours has 6" in said
    del weights["pos_embed"]
    with pytest.raises(UserError, match=r"^weights do not fit: 1 missing \(pos_embed\) "):
        load_backbone(write(weights, tmp_path / "less.pth"))


# ---- pixels and what is known of a network


def test_timms_weights_get_timms_normalization_and_ours_keep_ours(vits, tmp_path):
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    path = write(state, tmp_path / "timm.pth")
    frozen = load_backbone(path, arch="vit_tiny_patch16_224")
    assert frozen.mean == frozen.std == (0.5, 0.5, 0.5) and "mean (0.5, 0.5, 0.5), " in frozen.value_words
    white = Image.new("RGB", (300, 300), "white")
    torch.testing.assert_close(frozen.transform(white), torch.ones(3, 224, 224))
    named = {"arch": "vit_tiny_patch16_224", "args": argparse.Namespace(lr=0.1), "state_dict": state}
    frozen = load_backbone(write(named, tmp_path / "by_timms_training.pth"))
    assert frozen.mean == (0.5, 0.5, 0.5) and frozen.arch == "vit_tiny_patch16_224"
    frozen = load_backbone(write(named | {"arch": "visiontransformer"}, tmp_path / "class.pth"))
    assert frozen.mean == IMAGENET_MEAN and frozen.arch == "vit_tiny"
    trained = {"teacher": prefixed(state, "backbone."), "args": {"arch": "vit_tiny_patch16_224"}}
    path = write(trained, tmp_path / "ours.pth")
    assert load_backbone(path).mean == IMAGENET_MEAN
    convnet = timm.create_model("resnet10t", num_classes=0).state_dict()  # which fits any image size
    trained = {"teacher": convnet, "args": {"arch": "resnet10t", "global_crops_size": 96}}
    assert load_backbone(write(trained, tmp_path / "convnet.pth")).image_size == 96
    recorded = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    content = vit_files(*vits)["ours.pth"] | {"normalization": recorded}
    frozen = load_backbone(write(content, tmp_path / "recorded.pth"))
    assert (frozen.mean, frozen.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for wrong in (
        {"mean": [0.1]}, "ImageNet", {"mean": [1, 1, 1], "std": [1, 0, 1]},
        {"mean": [1, 1, 1], "std": [1, math.inf, 1]}, {"mean": [1, math.nan, 1], "std": [1, 1, 1]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="mean and deviation in the file are not valid"):
            load_backbone(write(content | {"normalization": wrong}, tmp_path / "wrong.pth"))
    endless = {name: torch.ones(1).expand(2**60) for name in ("mean", "std")}
    with pytest.raises(UserError, match="weights for 3 channels without their means"):
        load_backbone(write(content | {"normalization": endless}, tmp_path / "wrong.pth"))
    for wrong in ([], [[5, 5]], [[0, math.inf]], [[0, 1], [0, 1]]):
        path = write(content | {"normalization": recorded | {"value_range": wrong}}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=r"value_range in the file is not valid: \[.*: record pairs LOW"):
            load_backbone(path)


def test_a_checkpoint_reduced_to_weights_and_flags_keeps_mean_deviation_and_range(vits, tmp_path, capsys):
    whole = vit_files(*vits)["ours.pth"]
    flags = whole["args"] | {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "value_range": [0.0, 4095.0]}
    frozen = load_backbone(write({"teacher": whole["teacher"], "args": flags}, tmp_path / "reduced.pth"))
    assert (frozen.mean, frozen.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert frozen.value_range == ((0.0, 4095.0),)
    path = write({"teacher": whole["teacher"], "args": flags | {"value_range": None}}, tmp_path / "eight.pth")
    eight = load_backbone(path)
    assert (eight.mean, eight.std, eight.value_range) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), None)
    for other in ({"value_range": "auto"}, {"mean": None}, {"std": ["auto"]}):  # of other programs
        path = write({"teacher": whole["teacher"], "args": flags | other}, tmp_path / "other.pth")
        assert load_backbone(path).mean == IMAGENET_MEAN
    wide = Image.fromarray(np.full((40, 40), 4000, np.uint16))
    with pytest.raises(ValueError, match="needs 8-bit levels, and this image .I;16.*load_pixels"):
        frozen.transform(wide)
    assert frozen.transform(wide.convert("RGB")).shape == (3, 32, 32)  # as of 8 bits
    frozen.require_rgb("photographs")
    assert "note: photographs have 8 bits: taken as they are" in capsys.readouterr().out


def test_a_range_that_contradicts_the_weights_is_refused(vits, tmp_path):
    content = vit_files(*vits)["ours.pth"]
    normalization = {"mean": [0.5] * 3, "std": [0.5] * 3, "value_range": [[0, 4095]]}
    path = write(content | {"normalization": normalization}, tmp_path / "ranged.pth")
    assert load_backbone(path, value_range=(0.0, 4095.0)).value_range == ((0.0, 4095.0),)
    with pytest.raises(UserError, match=r"trained with 0 4095 \(--value_range 0 255\): leave it out"):
        load_backbone(path, value_range=(0.0, 255.0))
    with pytest.raises(UserError, match=r"trained with 8-bit values \(--value_range 0 255\)"):
        load_backbone(write(content, tmp_path / "plain.pth"), value_range=(0.0, 255.0))
    for baseline in (("random", None, "vit_nano", 8, 32), ("pixels",)):  # these take any
        assert load_backbone(*baseline, value_range=(0.0, 4095.0)).value_range == ((0.0, 4095.0),)
        with pytest.raises(UserError, match="takes one pair for all channels, or one for each"):
            load_backbone(*baseline, value_range=(0.0, 1.0, 0.0, 1.0))


@pytest.mark.parametrize("record", [{}, {"normalization": {"mean": [0.5] * 3, "std": [0.5] * 3}}])
def test_mean_and_deviation_of_other_channels_are_not_guessed(tmp_path, record):
    state = backbones.build_backbone("vit_nano", 8, 32, in_chans=5)[0].state_dict()
    path = write({"teacher": prefixed(state, "backbone."), "args": VIT_ARGS} | record, tmp_path / "five.pth")
    with pytest.raises(
        UserError, match=r"for 5 channels without their means and dev.*five.pth\): give a check"
    ):
        load_backbone(path)


def test_the_description_says_what_was_taken(vits, tmp_path):
    path = write(vit_files(*vits)["ours.pth"], tmp_path / "ours.pth")
    assert load_backbone(path).description == f"{path}: teacher, vit_nano, patch 8, epoch 3"
    assert load_backbone(path, "student").description.startswith(
        f"{path}: student, vit_nano, patch 8, epoch 3"
    )
    path = write({"state_dict": two_networks(vits, "backbone.", "momentum_backbone.")}, tmp_path / "two.pth")
    description = load_backbone(path, "momentum_backbone").description
    assert description == f"{path}: state_dict.momentum_backbone, vit_nano, patch 8, 4 heads assumed, " + (
        "ImageNet's mean and deviation assumed"
    )
    random = load_backbone("random", None, "vit_nano", 8, 32).description
    assert random == "random: vit_nano, patch 8"
    assert load_backbone("pixels", image_size=32).description == "pixels: no network"


def test_flags_without_effect_are_said(capsys):
    load_backbone("random", "student", "resnet18", 8, 64)
    said = capsys.readouterr().out
    assert (
        "--checkpoint_key has no effect on random" in said
        and "--patch_size has no effect on resnet18" in said
    )
    load_backbone("pixels", "student", "vit_nano", 8)
    lines = [f"note: --{name} has no effect on pixels\n" for name in ("checkpoint_key", "arch", "patch_size")]
    assert capsys.readouterr().out == "".join(lines)


def test_the_default_network_is_vit_small_with_patch_16():
    assert weights.settle_architecture(weights.Weights({}, "", {})) == (
        "vit_small", 16, 224,
    )  # fmt: skip


def test_a_run_gets_the_centre_with_the_head_and_only_then(tmp_path):
    old, new = students(32), students(32)
    center = torch.randn(1, 64)
    content = {"teacher": old.state_dict(), "args": VIT_ARGS, "dino_loss": {"center": center}}
    taken = init_from(new.backbone, new.head, write(content, tmp_path / "a.pth"), "vit_nano", 8, 32)
    assert torch.equal(taken, center)
    content["teacher"] = prefixed(old.backbone.state_dict(), "backbone.")
    taken = init_from(new.backbone, new.head, write(content, tmp_path / "b.pth"), "vit_nano", 8, 32)
    assert taken is None


def test_teacher_and_student_side_by_side_in_one_state_dict(vits, tmp_path, capsys):
    state = prefixed(vits[0], "teacher.backbone.") | prefixed(vits[1], "student.backbone.")
    state |= {"teacher.dino_head.mlp.0.weight": torch.ones(2, 2)}
    path = write({"model": state}, tmp_path / "dinov2.pth")
    torch.testing.assert_close(load_backbone(path).network.state_dict(), vits[0], rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "dino_head" in said and "student (" in said
    torch.testing.assert_close(load_backbone(path, "student").network.state_dict(), vits[1], rtol=0, atol=0)


def test_a_run_from_weights_that_expect_other_pixels_is_warned(vits, tmp_path, capsys):
    new = students(32)
    recorded = {"mean": [0.5] * 3, "std": [0.5] * 3}
    content = vit_files(*vits)["ours.pth"] | {"normalization": recorded}
    del content["teacher"]["head.mlp.0.bias"], content["teacher"]["head.last_layer.weight_v"]
    init_from(new.backbone, new.head, write(content, tmp_path / "a.pth"), "vit_nano", 8, 32)
    assert "expects mean (0.5, 0.5, 0.5)" in capsys.readouterr().out
    init_from(new.backbone, new.head, str(tmp_path / "a.pth"), "vit_nano", 8, 32, (0.5,) * 3, IMAGENET_STD)
    assert "expects mean (0.5, 0.5, 0.5), deviation (0.5, 0.5, 0.5)" in capsys.readouterr().out
    content["normalization"]["value_range"] = [[0.0, 4095.0]]
    path = write(content, tmp_path / "b.pth")
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "value_range": ((0.0, 65535.0),)}
    init_from(new.backbone, new.head, path, "vit_nano", 8, 32, **options)
    expected = "expects --value_range 0 4095; the training uses 0 65535"
    assert expected in capsys.readouterr().out
    init_from(new.backbone, new.head, path, "vit_nano", 8, 32, **options | {"value_range": ((0.0, 4095.0),)})
    assert "expects" not in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_torchvisions_weights_get_the_pixels_that_they_were_trained_with(arch, tmp_path):
    theirs = torchvision.models.get_model(arch, weights=None, init_weights=True, transform_input=True).eval()
    path = write(theirs.state_dict(), tmp_path / "full.pth")  # with the auxiliary classifiers
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(load_backbone(path, arch=arch, image_size=96).network(images), theirs(images))
    with pytest.raises(UserError, match=f"torchvision's weights of {arch} expect another mean"):
        init_from(theirs, theirs, path, arch, 16, 96)
    trained = {"teacher": backbones.build_backbone(arch)[0].state_dict(), "args": {"arch": arch}}
    network = load_backbone(write(trained, tmp_path / "ours.pth"), image_size=96).network
    assert not network.transform_input


@pytest.mark.parametrize("arch", ["levit_128s", "repvit_m0_9"])
def test_what_timm_drops_beside_a_classifier_is_dropped_too(arch, tmp_path):
    path = write(timm.create_model(arch).state_dict(), tmp_path / "full.pth")
    assert load_backbone(path, arch=arch).arch == arch


def test_a_network_whose_state_has_a_version_loads(tmp_path):
    path = write(torchvision.models.mnasnet0_5().state_dict(), tmp_path / "full.pth")
    assert load_backbone(path, arch="mnasnet0_5", image_size=64).arch == "mnasnet0_5"


@pytest.mark.parametrize("broken", ["head", "center"])
def test_a_head_that_is_not_finite_starts_no_training(tmp_path, broken):
    old, new = students(32), students(32)
    state, center = dict(old.state_dict()), torch.zeros(1, 64)
    if broken == "head":
        name = next(n for n in state if n.startswith("head."))
        state[name] = torch.full_like(state[name], torch.nan)
    else:
        center[0, 3] = torch.nan
    torch.save({"teacher": state, "dino_loss": {"center": center}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="weights are not finite"):
        init_from(new.backbone, new.head, str(tmp_path / "x.pth"), "vit_nano", 8, 32)


def test_levels_without_a_record_are_taken_for_evenly_distributed():
    assert weights.unknown_normalization(2) == ((0.5, 0.5), (0.29, 0.29))  # 1 / sqrt(12)


@pytest.mark.parametrize("name", ["copy_detection", "image_retrieval", "segmentation", "video_segmentation"])
def test_an_evaluation_follows_the_seed_the_key_and_the_recorded_normalization(name, paper_inputs, tmp_path):
    """Without one of them, its numbers look as good."""
    script, data = importlib.import_module(f"eval_{name}"), tmp_path
    flags = ["--imsize", "128", "--num_workers", "0"]
    if name == "copy_detection":
        for block in ("original", "strong"):
            (data / block).symlink_to(paper_inputs / "copydays" / block)
    elif name == "image_retrieval":
        data = paper_inputs / "retrieval"
    elif name == "segmentation":
        write_voc(data)
        flags[0] = "--image_size"
    else:
        make_clip(data)
        flags = ["--output_dir", str(tmp_path / "out")]
    networks = [backbones.build_backbone("vit_nano", 32, 128)[0].state_dict() for _ in range(2)]
    content = dict(zip(("student", "teacher"), networks, strict=True))
    plain = write(content, tmp_path / "plain.pth")
    records = {"mean": [0.9] * 3, "std": IMAGENET_STD}, {"mean": IMAGENET_MEAN, "std": [0.1, 0.2, 0.3]}
    recorded = [write(content | {"normalization": r}, tmp_path / f"{i}.pth") for i, r in enumerate(records)]

    def evaluate(*weights: str) -> dict:
        given = ["--data_path", data, *flags, "--pretrained_weights", *weights]
        return call(script, *given)

    random = "random", "--arch", "vit_nano", "--patch_size", "32", "--seed"
    found = [evaluate(*random, "0"), evaluate(*random, "1"), *map(evaluate, (plain, *recorded))]
    found.append(evaluate(plain, "--checkpoint_key", "student"))
    assert all(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("name", ["copy_detection", "image_retrieval", "video_segmentation"])
def test_a_network_for_other_channels_is_not_evaluated_on_photographs(name, tmp_path):
    script = importlib.import_module(f"eval_{name}")
    teacher = backbones.build_backbone("vit_nano", 8, 32, in_chans=1)[0].state_dict()
    normalization = {"mean": [0.5], "std": [0.5]}
    path = write({"teacher": teacher, "normalization": normalization}, tmp_path / "grey.pth")
    with pytest.raises(UserError, match=r"takes 1 channel, and .* have three \(.*grey.pth\)"):
        script.load_network(script.parse_args(["--pretrained_weights", path]))
