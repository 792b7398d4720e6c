import argparse
import collections
import datetime
import errno
import functools
import http.server
import io
import os
import pathlib
import shutil
import stat
import tempfile
import threading
import types
import zipfile
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import eval_knn
import eval_linear
import main_dino
import visualize_attention
from support import backbones, checkpoints
from support.checkpoints import load_checkpoint, save_checkpoint
from support.errors import UserError
from support.files import _sync_folder, appearing, replacing
from support.pickles import PlainType
from support.weights import load_backbone
from tests.conftest import FORGED, TINY, Call, call, filled_twice
from vision_transformer import VITS


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    torch.save({"student": Call(os.mkdir, str(tmp_path / "owned"))}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=f"contains {os.mkdir.__module__}.mkdir, which may run code"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    torch.save({"student": {}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("gone", "no such file"), ("short", "damaged"), ("empty", "file is empty"), ("list", "holds a list"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            load_checkpoint(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(error.value)


def test_published_files_carry_a_namespace_and_a_module_prefix(tmp_path):
    state = {"teacher": {"module.backbone.w": torch.ones(1)}, "args": argparse.Namespace(arch="vit_small")}
    torch.save(state, tmp_path / "published.pth")
    checkpoint = load_checkpoint(tmp_path / "published.pth")
    assert checkpoint["args"] == {"arch": "vit_small"} and list(checkpoint["teacher"]) == ["backbone.w"]


def test_saving_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle|local object"):
        save_checkpoint({"epoch": lambda: None}, path)
    assert load_checkpoint(path) == {"epoch": 1}


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    """As the value of a flag of an own type: the run would be lost."""
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"step": 1}, path)
    with pytest.raises(UserError, match="could not be loaded again, as it contains fractions.Fraction"):
        save_checkpoint({"step": 2, "args": {"own": Fraction(1, 3)}}, path)
    assert load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_the_file_before_is_kept_without_links_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # as on FAT

    monkeypatch.setattr(os, "link", refuse)
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth"
    for epoch in (1, 2, 3):
        save_checkpoint({"epoch": epoch}, path, previous)
    assert (load_checkpoint(path), load_checkpoint(previous)) == ({"epoch": 3}, {"epoch": 2})


def test_the_file_is_never_absent_where_there_are_links(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (moved.append(pathlib.Path(old).name), replace(old, new))
    )
    path = tmp_path / "checkpoint.pth"
    for epoch in (1, 2, 3):
        save_checkpoint({"epoch": epoch}, path, tmp_path / "checkpoint_prev.pth")
    assert len(moved) == 3 and "checkpoint.pth" not in moved


def test_the_new_file_is_on_the_disk_before_the_old_one_gets_another_name(tmp_path, monkeypatch):
    path, previous, done = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth", []
    save_checkpoint({"epoch": 1}, path, previous)
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (done.append(n), f(*a)))
    save_checkpoint({"epoch": 2}, path, previous)
    assert done[:2] == ["fsync", "link"] and "replace" in done


def test_an_error_keeps_its_text_and_gets_a_name_where_it_has_none(tmp_path):
    for error, words in ((OSError("no codec"), "^no codec$"), (OSError(5, "I/O"), "I/O: '.*x'$")):
        with pytest.raises(OSError, match=words), replacing(tmp_path / "x"):
            raise error
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_through_a_link_that_another_put_there(tmp_path):
    """As in an archive of a run that someone else has packed."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.tmp").symlink_to("mine")
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "x").read_bytes() == b"new" and not (tmp_path / "x").is_symlink()


def test_a_file_that_processes_share_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # it may be on another disk
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "x") as file:
        file.write(b"ha")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with appearing(tmp_path / "x") as file:
        file.write(b"whole")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="not a Linux")
def test_a_file_system_that_does_not_synchronise_folders_is_no_error():
    _sync_folder(pathlib.Path("/proc"))


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EIO, errno.EBADF])
def test_a_file_counts_as_written_where_its_folder_cannot_be_synchronised(number, tmp_path, monkeypatch):
    """As in network folders on a Mac and in WSL."""
    real, refused = os.fsync, []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint({"epoch": 1}, tmp_path / "checkpoint.pth")
    assert load_checkpoint(tmp_path / "checkpoint.pth") == {"epoch": 1} and refused


def test_a_file_without_permission_is_named(permissions):
    path = pathlib.Path("closed.pth")
    torch.save({}, path)
    path.chmod(0)
    with pytest.raises(UserError, match=r"no permission to read \(closed.pth\): change its permissions"):
        load_checkpoint(path)


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
    monkeypatch.setattr(checkpoints, "PUBLISHED_URL", address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder
    server.shutdown()
    server.server_close()


def test_a_published_model_is_downloaded_by_name_once(server):
    torch.manual_seed(0)
    vit_small = backbones.build_backbone("vit_small", 8)[0]
    folder = server / "dino_deitsmall8_pretrain"
    folder.mkdir()
    torch.save(vit_small.state_dict(), folder / "dino_deitsmall8_pretrain.pth")
    frozen = load_backbone("dino_vits8")
    torch.testing.assert_close(frozen.network.state_dict(), vit_small.state_dict(), rtol=0, atol=0)
    assert frozen.description == "dino_vits8: vit_small, patch 8"  # nothing is assumed
    shutil.rmtree(folder)
    load_backbone("dino_vits8", None, "vit_small", 8, 224)  # kept
    with pytest.raises(UserError, match=r"have patch_size 8 \(--patch_size 16\)"):
        load_backbone("dino_vits8", None, "vit_small", 16, 224)
    with pytest.raises(UserError, match="no 'student' in file .*leave --checkpoint_key out"):
        load_backbone("dino_vits8", "student")
    with pytest.raises(UserError, match="cannot download: HTTP Error 404.*dino_vitbase16_pretrain.pth"):
        load_backbone("dino_vitb16")


def test_a_download_that_is_cut_off_is_not_kept(server):
    folder = server / "dino_deitsmall8_pretrain"
    folder.mkdir()
    weights = io.BytesIO()
    torch.save(backbones.build_backbone("vit_small", 8)[0].state_dict(), weights)
    served = folder / "dino_deitsmall8_pretrain.pth"
    served.write_bytes(weights.getvalue()[:-1000])
    with pytest.raises(UserError, match="download is incomplete .*deitsmall8_pretrain.pth.: try again"):
        load_backbone("dino_vits8")
    served.write_bytes(weights.getvalue())
    assert load_backbone("dino_vits8").arch == "vit_small"


def test_offline_a_published_model_is_a_clear_error(server, monkeypatch):
    monkeypatch.setattr(checkpoints, "PUBLISHED_URL", "http://127.0.0.1:9/{stem}_{kind}.pth")
    with pytest.raises(UserError, match="cannot download: .*refused.*check the network"):
        load_backbone("dino_resnet50")
    with pytest.raises(UserError, match="no such file .*did you mean dino_vits16"):
        load_backbone("dino_vit_s16")


def test_the_published_models_are_known_networks():
    assert len(checkpoints.PUBLISHED) == 9 + 1  # of the paper's list, and the one trained on landmarks
    for stem, arch, patch_size in checkpoints.PUBLISHED.values():
        url = checkpoints.PUBLISHED_URL.format(stem=stem, kind="pretrain")
        assert url == f"https://dl.fbaipublicfiles.com/dino/{stem}_pretrain/{stem}_pretrain.pth"
        name = backbones.canonical(arch)
        assert name in VITS or name == "resnet50" or timm.is_model(name)
        assert not name.startswith("xcit") or f"_p{patch_size}_" in name


# ---- no entry runs code from a file


def entries(path: str, data: str, out: str) -> dict[str, tuple]:
    """Each way by which a file gets into a script: the script, its flags and the names of files in `out`."""
    evaluation = "--data_path", data, "--num_workers", "0"
    vit = "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 32".split()
    linear = (*evaluation, "--output_dir", out)
    training = (*TINY, "--data_path", data + "/train", "--output_dir", out)
    return {
        "training resumes": (main_dino, training, ["checkpoint.pth"]),
        "training begins": (main_dino, (*training, "--init_from", path), []),
        "k-NN weights": (eval_knn, (*evaluation, "--pretrained_weights", path), []),
        "k-NN features": (eval_knn, ("--load_features", out), eval_knn.FEATURE_FILES),
        "linear weights": (eval_linear, (*linear, "--pretrained_weights", path), []),
        "linear resumes": (eval_linear, (*linear, *vit), ["checkpoint.pth.tar"]),
        "linear classifier": (eval_linear, (*linear, *vit, "--evaluate", "--linear_weights", path), []),
        "attention": (visualize_attention, ("--image_path", data, "--pretrained_weights", path), []),
    }


@pytest.mark.parametrize("entry", entries("", "", ""))
def test_no_entry_runs_code_from_a_file(entry, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as some set it for another program
    owned, out = tmp_path / "owned", tmp_path / "out"
    out.mkdir()
    evil = dict.fromkeys(("student", "teacher", "state_dict"), Call(os.mkdir, str(owned)))
    torch.save(evil, tmp_path / "evil.pth")
    script, flags, names = entries(str(tmp_path / "evil.pth"), str(labelled), str(out))[entry]
    for name in names:
        shutil.copy(tmp_path / "evil.pth", out / name)
    with pytest.raises(UserError, match="file contains .*mkdir, which may run code"):
        call(script, *flags)
    assert not owned.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert owned.exists()  # so it would have


# ---- data that is not weights loads as data; what may run code is named


def test_data_types_of_numpy_pathlib_and_collections_load(tmp_path):
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = {
        "epoch": np.int64(3),
        "best": np.float64(71.5),
        "mean": numbers,
        "words": np.array(["a", "bc"]),
        "path": pathlib.Path("runs") / "1",
        "windows": pathlib.PureWindowsPath("C:/runs"),
        "dtype": torch.float16,
        "numpy dtype": np.dtype("int32"),
        "size": torch.Size([2, 3]),
        "ordered": collections.OrderedDict(a=1),
        "counts": collections.defaultdict(int, {"a": 2}),
        "queue": collections.deque([1, 2], maxlen=3),
        "set": {1, 2},
        "when": datetime.datetime(2021, 4, 29, tzinfo=datetime.timezone.utc),
        "version": torch.__version__,
        "space": types.SimpleNamespace(lr=0.1),
        "device": torch.device("cpu"),
    }
    torch.save(data, tmp_path / "data.pth")
    loaded = load_checkpoint(tmp_path / "data.pth")
    np.testing.assert_array_equal(loaded.pop("mean"), data.pop("mean"))
    np.testing.assert_array_equal(loaded.pop("words"), data.pop("words"))
    assert loaded.pop("path") == pathlib.PurePath("runs/1") and data.pop("path")
    assert list(loaded.pop("queue")) == list(data.pop("queue"))
    assert loaded == data


def change_pickle(path: pathlib.Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickled data of a torch file."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize("core", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_checkpoint_of_each_numpy_loads(core, tmp_path):
    path, own = tmp_path / "old.pth", np.empty(0).__reduce__()[0].__module__.encode()
    args = {"lr": np.float64(0.5), "arch": np.str_("vit"), "mean": np.ones(3), "big": np.array([1], ">i8")}
    data = {"epoch": np.int64(3), "args": argparse.Namespace(**args), "bits": np.array([True, False])}
    torch.save(data, path)
    change_pickle(path, lambda content: content.replace(own, core))
    loaded = load_checkpoint(path)
    assert loaded["epoch"] == 3 and type(loaded["epoch"]) is np.int64
    assert loaded["bits"].tolist() == [True, False]
    loaded = loaded["args"]
    assert loaded["lr"] == 0.5 and type(loaded["lr"]) is np.float64
    assert loaded["arch"] == "vit" and loaded["mean"].tolist() == [1, 1, 1]
    assert loaded["big"].tolist() == [1]
    torch.testing.assert_close(torch.from_numpy(loaded["mean"]), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second in Python 3.13
def test_paths_of_each_python_load(module, tmp_path):
    file, path = tmp_path / "x.pth", pathlib.Path("runs") / "1"
    torch.save({"path": path}, file)
    own = type(path).__module__
    change_pickle(file, lambda content: content.replace(f"c{own}\n".encode(), f"c{module}\n".encode()))
    assert load_checkpoint(file)["path"] == pathlib.PurePath("runs/1")


def test_tensors_of_a_gpu_load_without_one(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pth")
    places = b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"  # texts after their lengths
    change_pickle(tmp_path / "x.pth", lambda content: content.replace(*places))
    assert load_checkpoint(tmp_path / "x.pth")["weight"].device.type == "cpu"


@pytest.mark.parametrize("name", FORGED)
def test_a_file_cannot_forge_an_arrays_pointers(name, tmp_path):
    data, message = FORGED[name]
    torch.save({"x": data}, tmp_path / "forged.pth")
    with pytest.raises(UserError, match=rf"file contains {message}.* was not loaded \(.*forged.pth\)"):
        load_checkpoint(tmp_path / "forged.pth")


def test_a_file_cannot_free_an_arrays_memory(tmp_path):
    torch.save(np.ones(3), tmp_path / "forged.pth")
    change_pickle(tmp_path / "forged.pth", filled_twice)
    with pytest.raises(UserError, match="file contains an array that is filled twice"):
        load_checkpoint(tmp_path / "forged.pth")


def test_a_file_cannot_make_another_object_an_arrays_type(tmp_path):
    path, scalar = tmp_path / "forged.pth", np.float64(0).__reduce__()[0]
    torch.save(Call(scalar, argparse.Namespace(dtype="O"), b"\0" * 8), path)
    with pytest.raises(UserError, match="file contains an array without a type"):
        load_checkpoint(path)
    state = {"dtype": "O"}, {"__class__": PlainType}
    torch.save(Call(scalar, Call(argparse.Namespace, state=state), b"\0" * 8), path)
    change_pickle(path, lambda content: content.replace(b"csupport.pickles\nPlainType", b"cnumpy\ndtype"))
    with pytest.raises(UserError, match="file is damaged or of another kind"):
        load_checkpoint(path)


def test_what_may_run_code_is_named(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "model.pth")
    message = (
        r"contains torch.nn.modules.linear.Linear, which may run code, and was not loaded \(.*model.pth\)"
    )
    with pytest.raises(UserError, match=message + r": save weights only, with torch.save\(model.state_dict"):
        load_checkpoint(tmp_path / "model.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    with pytest.raises(UserError, match="is a TorchScript program"):
        load_checkpoint(tmp_path / "script.pth")
    torch.save({"model": Call(os.mkdir, "x")}, tmp_path / "newer.pth", pickle_protocol=4)
    with pytest.raises(UserError, match=r"may run code, and was not loaded \(.*newer.pth\): save weights"):
        load_checkpoint(tmp_path / "newer.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid\n", "Git LFS pointer.*git lfs pull"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("a.pth", b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        ("a.pth", b'{"error": "no"}', "is a JSON document"),
        ("a.pth", b"\x1f\x8b0000", "is compressed .*unpack it"),
        ("a.pth", b"\x89HDF\r\n", "is an HDF5 file"),
        ("a.pth", b"\x93NUMPY\1\0", "is a NumPy file"),
        ("a.pth", b"<?xml version='1.0'?><Error>", "is an XML document"),
        ("a.pth", b"<HTML><HEAD>", "is a web page"),
    ],
)  # fmt: skip
def test_files_that_are_no_weights_are_named_for_what_they_are(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / name)


def test_safetensors_whose_length_reads_like_json(tmp_path):
    """The length of the header, 31,520 bytes, is written as ` {`."""
    state = {"weight": torch.ones(2)}
    for padding in range(31_400, 31_520, 8):
        content = safetensors.torch.save(state, metadata={"note": "x" * padding})
        if content.startswith(b" {"):
            break
    assert content.startswith(b" {")
    (tmp_path / "x.safetensors").write_bytes(content)
    assert torch.equal(checkpoints.load_file(tmp_path / "x.safetensors")["weight"], state["weight"])
    (tmp_path / "x.json").write_bytes(b'{"error":{"code": 404}}')
    with pytest.raises(UserError, match="is a JSON document"):
        checkpoints.load_file(tmp_path / "x.json")


def test_a_file_for_which_there_is_no_memory_is_not_called_damaged(tmp_path):
    torch.save({"large": Call(bytearray, 2**62)}, tmp_path / "x.pth")
    with pytest.raises(MemoryError):
        load_checkpoint(tmp_path / "x.pth")


def test_a_changed_bit_is_damage(tmp_path):
    torch.save({"student": {"weight": torch.full((9,), 0.5)}}, tmp_path / "x.pth")
    whole = bytearray((tmp_path / "x.pth").read_bytes())
    whole[whole.index(torch.full((9,), 0.5).numpy().tobytes()) + 3] ^= 1
    (tmp_path / "x.pth").write_bytes(whole)
    with pytest.raises(UserError, match=r"file is damaged or of another kind \(.*x.pth\)"):
        load_checkpoint(tmp_path / "x.pth")


def test_each_published_model_is_its_own_file():
    stems = {name: stem for name, (stem, *_) in checkpoints.PUBLISHED.items()}
    assert checkpoints.PUBLISHED["dino_vits16_landmarks"][1:] == ("vit_small", 16)
    assert stems == {name: name for name in stems if "xcit" in name or "resnet" in name} | {
        "dino_vits16": "dino_deitsmall16",
        "dino_vits16_landmarks": "dino_vitsmall16_googlelandmark",
        "dino_vits8": "dino_deitsmall8",
        "dino_vitb16": "dino_vitbase16",
        "dino_vitb8": "dino_vitbase8",
    }
