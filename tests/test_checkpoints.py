import argparse
import os

import pytest
import torch

import utils
from checkpoints import load_backbone, load_checkpoint, load_pretrained_weights, save_checkpoint
from utils import UserError


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


def test_weights_load_right_or_not_at_all():
    model = utils.build_backbone("vit_nano", 8, 32)[0]
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()} | {"head.mlp.0.bias": torch.ones(1)}
    other = utils.build_backbone("vit_nano", 8, 32)[0]
    load_pretrained_weights(other, {"teacher": state}, "teacher", "file")
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    del state["backbone.norm.bias"]
    state["backbone.extra"] = torch.ones(1)
    state["backbone.cls_token"] = torch.ones(1, 1, 7)
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\), 1 unexpected \(extra\), 1 misshapen"):
        load_pretrained_weights(other, {"teacher": state}, "teacher", "file")
    with pytest.raises(UserError, match="no 'student' in checkpoint .*teacher"):
        load_pretrained_weights(other, {"teacher": state}, "student", "file")


def test_flags_that_contradict_the_checkpoint_are_an_error(tmp_path):
    model = utils.build_backbone("vit_nano", 8, 32)[0]
    state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    args = {"arch": "vit_nano", "patch_size": 8, "global_crops_size": 32}
    path = str(tmp_path / "checkpoint.pth")
    save_checkpoint({"teacher": state, "args": args}, path)
    arch, patch = utils.DefaultStr("vit_small"), utils.DefaultInt(16)
    loaded, dim, trained = load_backbone(path, "teacher", arch, patch)
    assert dim == 128 and trained == args and not loaded.training
    with pytest.raises(UserError, match=r"trained with vit_nano \(--arch vit_small\)"):
        load_backbone(path, "teacher", "vit_small", patch)
    with pytest.raises(UserError, match=r"trained with 8 \(--patch_size 16\)"):
        load_backbone(path, "teacher", arch, 16)
    with pytest.raises(UserError, match="no weights given"):
        load_backbone("", "teacher", arch, patch)
