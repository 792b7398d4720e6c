import argparse
import copy
import functools
import http.server
import os
import shutil
import threading

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import eval_knn
import eval_linear
import main_dino
import utils
import visualize_attention
from support import backbones, cli, weights
from support.errors import UserError
from support.weights import init_from, load_backbone, load_checkpoint, save_checkpoint
from tests.conftest import TINY
from vision_transformer import VITS


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    torch.save({"student": Payload(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="wants to run code"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    torch.save({"student": {}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("gone", "no such file"), ("short", "damaged"), ("empty", "damaged"), ("list", "not a checkpoint"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            load_checkpoint(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(error.value) and "\n" not in str(error.value)


def test_published_files_carry_a_namespace_and_a_module_prefix(tmp_path):
    state = {"teacher": {"module.backbone.w": torch.ones(1)}, "args": argparse.Namespace(arch="vit_small")}
    torch.save(state, tmp_path / "published.pth")
    checkpoint = load_checkpoint(tmp_path / "published.pth")
    assert checkpoint["args"] == {"arch": "vit_small"} and list(checkpoint["teacher"]) == ["backbone.w"]


def test_saving_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint({"epoch": lambda: None}, path)
    assert load_checkpoint(path) == {"epoch": 1}


# ---- which files load


VIT_ARGS = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32}
ANY_VIT = cli.DefaultStr("vit_small"), cli.DefaultInt(16), cli.DefaultInt(224)  # flags not given
TEACHER = cli.DefaultStr("teacher")


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
    model, image_size = load_backbone(path, TEACHER, *ANY_VIT)
    torch.testing.assert_close(model.state_dict(), vits[0], rtol=0, atol=0)
    assert image_size == 32 and not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_backbone(path, TEACHER, "vit_nano", 8, 16)[1] == 16
    if "teacher" in vit_files(*vits)[name]:
        student, _ = load_backbone(path, "student", *ANY_VIT)
        torch.testing.assert_close(student.state_dict(), vits[1], rtol=0, atol=0)
    else:
        with pytest.raises(UserError, match="no 'student' in file .*leave --checkpoint_key out"):
            load_backbone(path, "student", *ANY_VIT)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "vit_tiny_patch16_224", "resnet10t"])
def test_classifiers_of_torchvision_and_timm_are_dropped_and_nothing_else(arch, tmp_path):
    if arch in torchvision.models.list_models():
        whole = torchvision.models.get_model(arch)
    else:
        whole = timm.create_model(arch)
    path = write(whole.state_dict(), tmp_path / "whole.pth")
    model, _ = load_backbone(path, TEACHER, arch, *ANY_VIT[1:])
    x = torch.randn(2, 3, 224, 224)
    pooled = []
    classifier = whole.get_submodule(model.dropped_classifiers[0])
    classifier.register_forward_hook(lambda module, inputs, output: pooled.append(inputs[0]))
    with torch.no_grad():
        whole.eval()(x)
        torch.testing.assert_close(model(x), pooled[0], rtol=1e-4, atol=1e-5)


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
    for content, arch in ((state, "xcit_nano_12_p16_224"), (full, ANY_VIT[0])):
        loaded, _ = load_backbone(write(content, tmp_path / "xcit.pth"), TEACHER, arch, *ANY_VIT[1:])
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_load_right_or_not_at_all(vits, tmp_path):
    state = dict(vits[0])
    del state["norm.bias"]
    state["extra"] = torch.ones(1)
    state["cls_token"] = torch.ones(1, 1, 7)
    path = write({"teacher": prefixed(state, "backbone.")}, tmp_path / "odd.pth")
    message = r"1 missing \(norm.bias\), 1 unexpected \(extra\), 1 misshapen \(cls_token\) \(.*odd.pth\)"
    with pytest.raises(UserError, match=message):
        load_backbone(path, TEACHER, *ANY_VIT)
    with pytest.raises(UserError, match="no 'student' in file .*--checkpoint_key teacher"):
        load_backbone(path, "student", *ANY_VIT)
    with pytest.raises(UserError, match="no weights in file"):
        load_backbone(write({"epoch": 3}, tmp_path / "empty.pth"), TEACHER, *ANY_VIT)
    with pytest.raises(UserError, match="weights do not fit: .* missing"):
        load_backbone(write(vits[0], tmp_path / "vit.pth"), TEACHER, "resnet18", *ANY_VIT[1:])


def test_weights_that_are_no_numbers_are_refused(vits, tmp_path):
    state = vits[0] | {
        "norm.weight": torch.full((128,), torch.nan),
        "norm.bias": torch.full((128,), torch.inf),
    }
    path = write(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"not finite: .*norm.weight, norm.bias \(.*nan.pth\)"):
        load_backbone(path, TEACHER, *ANY_VIT)
    new = students(32)
    with pytest.raises(UserError, match="not finite"):
        init_from(new.backbone, new.head, path, "vit_nano", 8, 32)


@pytest.mark.parametrize("args", ["a word", {"arch": None, "patch_size": None}])
def test_a_record_that_says_nothing_leaves_it_to_the_shapes(vits, tmp_path, args):
    path = write({"teacher": prefixed(vits[0], "backbone."), "args": args}, tmp_path / "odd.pth")
    torch.testing.assert_close(load_backbone(path, TEACHER, *ANY_VIT)[0].state_dict(), vits[0])


def test_a_digest_tells_weights_apart(vits):
    a, b = (backbones.build_backbone("vit_nano", 8, 32)[0] for _ in range(2))
    a.load_state_dict(vits[0])
    b.load_state_dict(vits[0])
    assert weights.digest(a) == weights.digest(b)
    b.norm.bias.data[3] += 1e-6
    assert weights.digest(a) != weights.digest(b)


def test_flags_that_contradict_the_checkpoint_are_an_error(vits, tmp_path):
    path = write(vit_files(*vits)["ours.pth"], tmp_path / "ours.pth")
    arch, patch, size = ANY_VIT
    with pytest.raises(UserError, match=r"trained with vit_nano \(--arch vit_small\): give --arch vit_nano"):
        load_backbone(path, TEACHER, "vit_small", patch, size)
    with pytest.raises(UserError, match=r"trained with 8 \(--patch_size 16\)"):
        load_backbone(path, TEACHER, arch, 16, size)
    with pytest.raises(UserError, match=r"--image_size 30\): try 24 or 32"):
        load_backbone(path, TEACHER, arch, patch, 30)
    with pytest.raises(UserError, match="no weights given"):
        load_backbone("", TEACHER, arch, patch, size)


def test_random_weights_only_by_name():
    torch.manual_seed(1)
    model, size = load_backbone("random", TEACHER, "vit_nano", 8, 32)
    torch.manual_seed(1)
    torch.testing.assert_close(
        model.state_dict(), backbones.build_backbone("vit_nano", 8, 32)[0].state_dict()
    )
    assert size == 32 and isinstance(load_backbone("pixels", TEACHER, *ANY_VIT)[0], torch.nn.Flatten)


# ---- published models


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real web server for the published files, and an empty cache; gives the folder served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{{stem}}_pretrain/{{stem}}_{{kind}}.pth"
    monkeypatch.setattr(weights, "PUBLISHED_URL", address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


def test_a_published_model_is_downloaded_by_name_once(server, vits):
    torch.manual_seed(0)
    vit_small = backbones.build_backbone("vit_small", 8)[0]
    folder = server / "dino_deitsmall8_pretrain"
    folder.mkdir()
    torch.save(vit_small.state_dict(), folder / "dino_deitsmall8_pretrain.pth")
    model, _ = load_backbone("dino_vits8", TEACHER, *ANY_VIT)
    torch.testing.assert_close(model.state_dict(), vit_small.state_dict(), rtol=0, atol=0)
    shutil.rmtree(folder)
    load_backbone("dino_vits8", TEACHER, "vit_small", 8, 224)  # kept
    with pytest.raises(UserError, match=r"trained with 8 \(--patch_size 16\)"):
        load_backbone("dino_vits8", TEACHER, "vit_small", 16, 224)
    with pytest.raises(UserError, match="no 'student' in file .*leave --checkpoint_key out"):
        load_backbone("dino_vits8", "student", *ANY_VIT)
    with pytest.raises(UserError, match="cannot download: HTTP Error 404.*dino_vitbase16_pretrain.pth"):
        load_backbone("dino_vitb16", TEACHER, *ANY_VIT)


def test_offline_a_published_model_is_a_clear_error(server, monkeypatch):
    monkeypatch.setattr(weights, "PUBLISHED_URL", "http://127.0.0.1:9/{stem}_{kind}.pth")
    with pytest.raises(UserError, match="cannot download: .*refused.*check the network"):
        load_backbone("dino_resnet50", TEACHER, *ANY_VIT)
    with pytest.raises(UserError, match="no such file .*did you mean dino_vits16"):
        load_backbone("dino_vit_s16", TEACHER, *ANY_VIT)


def test_the_nine_published_models_are_known_networks():
    assert len(weights.PUBLISHED) == 9
    for stem, arch, patch_size in weights.PUBLISHED.values():
        url = weights.PUBLISHED_URL.format(stem=stem, kind="pretrain")
        assert url == f"https://dl.fbaipublicfiles.com/dino/{stem}_pretrain/{stem}_pretrain.pth"
        name = backbones.canonical(arch)
        assert name in VITS or name == "resnet50" or timm.is_model(name)
        assert not name.startswith("xcit") or f"_p{patch_size}_" in name


# ---- a new run from old weights


def students(image_size: int) -> utils.MultiCropWrapper:
    backbone, dim = backbones.build_backbone("vit_nano", 8, image_size)
    return utils.MultiCropWrapper(backbone, utils.DINOHead(dim, 64, hidden_dim=32, bottleneck_dim=16))


def test_a_run_begins_with_backbone_and_head(tmp_path):
    old, new = students(32), students(32)
    path = write({"teacher": old.state_dict(), "args": VIT_ARGS}, tmp_path / "old.pth")
    init_from(new.backbone, new.head, path, "vit_nano", 8, 32)
    torch.testing.assert_close(new.state_dict(), old.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="trained with vit_nano .*give --arch vit_nano"):
        init_from(new.backbone, new.head, path, "vit_tiny", 8, 32)
    narrow = utils.MultiCropWrapper(
        students(32).backbone, utils.DINOHead(128, 32, hidden_dim=32, bottleneck_dim=16)
    )
    with pytest.raises(UserError, match="misshapen .*head.*give the old run's --out_dim"):
        init_from(narrow.backbone, narrow.head, path, "vit_nano", 8, 32)
    path = write({"student": old.state_dict(), "args": VIT_ARGS}, tmp_path / "student.pth")
    with pytest.raises(UserError, match="no 'teacher' in file .*give a checkpoint with a teacher"):
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


# ---- no entry runs code from a file


def entries(path: str, data: str, out: str) -> dict[str, tuple]:
    """Each way by which a file gets into a script: the script and its flags."""
    evaluation = "--data_path", data, "--num_workers", "0"
    vit = "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 32".split()
    linear = (*evaluation, "--output_dir", out)
    training = (*TINY, "--data_path", data + "/train", "--output_dir", out)
    return {
        "training resumes": (main_dino, training, "checkpoint.pth"),
        "training begins": (main_dino, (*training, "--init_from", path), None),
        "k-NN weights": (eval_knn, (*evaluation, "--pretrained_weights", path), None),
        "k-NN features": (eval_knn, ("--load_features", out), "trainfeat.pth"),
        "linear weights": (eval_linear, (*linear, "--pretrained_weights", path), None),
        "linear resumes": (eval_linear, (*linear, *vit), "checkpoint.pth.tar"),
        "linear classifier": (eval_linear, (*linear, *vit, "--evaluate", "--linear_weights", path), None),
        "attention": (visualize_attention, ("--image_path", data, "--pretrained_weights", path), None),
    }


@pytest.mark.parametrize("entry", entries("", "", ""))
def test_no_entry_runs_code_from_a_file(entry, labelled, tmp_path):
    owned, out = tmp_path / "owned", tmp_path / "out"
    out.mkdir()
    evil = dict.fromkeys(("student", "teacher", "state_dict"), Payload(owned))
    torch.save(evil, tmp_path / "evil.pth")
    script, flags, name = entries(str(tmp_path / "evil.pth"), str(labelled), str(out))[entry]
    if name:
        shutil.copy(tmp_path / "evil.pth", out / name)
    with pytest.raises(UserError, match="file wants to run code") as error:
        script.main(script.parse_args(list(flags)))
    assert "\n" not in str(error.value) and not owned.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert owned.exists()  # so it would have
