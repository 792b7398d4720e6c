import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models import VisionTransformer as TimmViT
from torch import nn

import eval_knn
import extract_features
from extract_features import PAGE, Store, read_features
from support.backbones import build_backbone
from support.data import Source, class_number, open_any_images
from support.distributed import fix_random_seeds
from support.errors import UserError
from support.features import cls_and_patches, frozen_features, last_cls_tokens, patch_tokens
from support.formats import load_image
from support.loading import num_cores
from support.pixels import eval_transform
from support.weights import load_backbone
from tests.conftest import ROOT, call, free_port, run, save_images, taken_by, torchrun, wait_for

PIXELS = ("--pretrained_weights", "pixels", "--image_size", "16")
VIT = ("--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32")
DEMO = ("--demo", "--split", "val", "--batch_size_per_gpu", "8")


def extract(folder: Path, *flags, weights: tuple = PIXELS) -> Path:
    return call(extract_features, *weights, "--output_dir", folder, "--num_workers", 0, *flags)


def names(folder: Path) -> list[str]:
    return (folder / "names.txt").read_text().splitlines()


def vit():
    fix_random_seeds(0)
    return build_backbone("vit_nano", 8, 32)[0].eval()


# ---------------------------------------------------------------------------------------------
# What is taken, and what is written
# ---------------------------------------------------------------------------------------------


def test_features_do_not_become_images(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        np.save(data / f"{i}.npy", np.random.default_rng(i).random((16, 16), np.float32))
    flags = "--data_path", data, "--in_chans", 1, "--value_range", 0, 1
    with pytest.raises(UserError, match=r"features.npy would become one of the images .*--output_dir"):
        extract(data / "features", *flags)
    assert len(np.load(extract(tmp_path / "beside", *flags))) == 3
    extract(data / "features", *flags, "--format", "pt")
    assert len(np.load(extract(tmp_path / "again", *flags))) == 3


def test_rows_names_and_labels_are_in_one_order(labelled, tmp_path, capsys):
    path = extract(tmp_path, "--data_path", labelled, "--split", "train", "--batch_size_per_gpu", "4")
    rows, transform = np.load(path, mmap_mode="r"), eval_transform(16)
    assert rows.shape == (15, 768) and rows.dtype == np.float32
    for row, label, name in zip(rows, np.load(tmp_path / "labels.npy"), names(tmp_path), strict=True):
        image = load_image(str(labelled / "train" / name))
        assert np.array_equal(row, transform(image).flatten().numpy())
        assert "abc"[label] == name[0]
    record = json.loads((tmp_path / "features.json").read_text())
    assert record["classes"] == ["a", "b", "c"] and record["identity"]["shape"] == [15, 768]
    assert record["identity"]["mean"] == [0.485, 0.456, 0.406]
    assert record["identity"]["std"] == [0.229, 0.224, 0.225]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))
    said = capsys.readouterr().out
    assert "/train: 15 images, 3 classes (.png 15)" in said and "preprocessing: 16 pixels" in said
    assert "features: cls, (15, 768) float32, 4.61e-05 GB" in said


def test_images_beside_folders_have_no_classes(images, tmp_path):
    extract(tmp_path, "--data_path", images)
    found = read_features(tmp_path)
    assert found.labels is None and found.classes == [] and not (tmp_path / "labels.npy").exists()
    (tmp_path / "features.npy").unlink()
    (tmp_path / "labels.npy").touch()  # of earlier features
    extract(tmp_path, "--data_path", images)
    assert not (tmp_path / "labels.npy").exists()
    assert names(tmp_path) == [f"{i:03}.png" for i in range(8)] + [f"nested/{i:03}.png" for i in range(12)]


@pytest.mark.parametrize("name", ["features", "labels", "names.txt"])
@pytest.mark.parametrize("format", ["npy", "pt"])
def test_no_file_of_the_user_is_overwritten(labelled, images, tmp_path, name, format):
    path = tmp_path / (name if "." in name else f"{name}.{format}")
    path.write_text("the user's")
    for data in (labelled / "train", images):  # with classes and without
        with pytest.raises(UserError, match=rf"would overwrite .*{path.name}\): give another --output_dir"):
            extract(tmp_path, "--data_path", data, "--format", format)
    assert path.read_text() == "the user's"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_features_are_not_written_through_a_link_that_another_put_there(images, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("features", "labels"):
        (tmp_path / f"{name}.npy.partial").symlink_to("mine")
    assert not extract(tmp_path, "--data_path", images).is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_dataset_whose_classes_have_no_names_has_labels():
    images = [(Image.new("RGB", (16, 16)), 3)]
    pixels, label, readable = extract_features.Rows(images, load_backbone("pixels"), False)[0]
    assert pixels.shape == (3, 224, 224) and (label, readable) == (3, True)


def test_a_list_gives_its_order_and_its_names(images, labelled, tmp_path):
    other = labelled / "val" / "a" / "001.png"
    listed = images / "some images.txt"
    listed.write_bytes(f"nested/003.png\r\n\n{other}\n  000.png".encode())
    extract(tmp_path / "list", "--data_path", listed)
    listed.unlink()
    assert names(tmp_path / "list") == ["nested/003.png", str(other), "000.png"]
    single = read_features(extract(tmp_path / "one", "--data_path", other).parent)
    assert torch.equal(read_features(tmp_path / "list").features[1], single.features[0])
    assert single.labels is None and names(tmp_path / "one") == [str(other)]


def test_a_name_that_is_no_text_keeps_its_bytes(tmp_path):
    save_images(tmp_path / "images", 1)
    os.rename(tmp_path / "images" / "000.png", os.fsencode(tmp_path / "images") + b"/\xe9.png")
    extract(tmp_path, "--data_path", tmp_path / "images")
    assert (tmp_path / "names.txt").read_bytes() == b"\xe9.png\n"


def test_the_demo_and_datasets_are_taken_as_the_evaluations_take_them(tmp_path, monkeypatch):
    monkeypatch.setattr("support.data.Shapes.__len__", lambda shapes: 20)
    extract(tmp_path / "val", *DEMO)
    extract(tmp_path / "train", "--demo")
    val = read_features(tmp_path / "val")
    assert len(val.labels) == 20 and "fine blobs" in val.classes
    assert not torch.equal(val.features, read_features(tmp_path / "train").features)
    with pytest.raises(UserError, match="the demo has train and val"):
        extract(tmp_path / "test", "--demo", "--split", "test")


@pytest.mark.parametrize("kind", extract_features.KINDS)
def test_kinds_are_what_the_evaluations_use(images, tmp_path, kind):
    extract(tmp_path, "--data_path", images, "--kind", kind, weights=VIT)
    network = vit()
    transform = eval_transform(32)
    pixels = torch.stack([transform(load_image(str(images / name))) for name in names(tmp_path)])
    expected = {
        "cls": network(pixels),
        "patches": patch_tokens(network, pixels),
        "last4": frozen_features(network, pixels, 4, False),
        "avgpool": frozen_features(network, pixels, 1, True),
    }[kind]
    found = read_features(tmp_path).features
    assert kind != "patches" or found.shape == (20, 4, 4, 128)
    digits = json.loads((tmp_path / "features.json").read_text())["identity"]["network"]
    assert digits == extract_features.digest_weights(network)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_precision_is_the_flags(images, tmp_path):
    found = [
        np.load(extract(tmp_path / name, "--data_path", images, "--precision", name, weights=VIT))
        for name in ("fp32", "bf16")
    ]
    assert not np.array_equal(*found) and np.allclose(*found, rtol=0.1, atol=0.1)


def test_the_seed_is_the_flags(images, tmp_path):
    flags = "--data_path", images, "--seed"
    found = [np.load(extract(tmp_path / seed, *flags, seed, weights=VIT)) for seed in "01"]
    assert not np.allclose(*found, atol=0.1)


def test_an_image_that_cannot_be_read_has_no_class(labelled, tmp_path):
    shutil.copytree(labelled / "val", tmp_path / "val")
    (tmp_path / "val" / "b" / "001.png").write_bytes(b"no image")
    extract(tmp_path / "out", "--data_path", tmp_path / "val", "--skip_unreadable")
    assert read_features(tmp_path / "out").labels.tolist() == [0, 0, 0, 1, -1, 1, 2, 2, 2]


def test_likely_mistakes_in_the_images_are_named(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    (tmp_path / "images").mkdir()
    for name in "ab":  # which may be alike
        Image.fromarray(values).save(tmp_path / "images" / f"{name}.png")
    extract(tmp_path, "--data_path", tmp_path / "images")
    said = capsys.readouterr().out
    assert "2 of 2 checked images" in said and said.count("warning") == 1


def test_features_of_rectangular_images(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "nested" / "002.png").write_bytes(b"no image")
    flags = "--data_path", tmp_path / "images", "--kind", "patches", "--skip_unreadable"
    extract(tmp_path / "out", *flags, weights=(*VIT, "16"))
    rows = np.load(tmp_path / "out" / "features.npy")
    assert rows.shape == (20, 4, 2, 128) and np.isnan(rows).all(axis=(1, 2, 3)).sum() == 1
    assert json.loads((tmp_path / "out" / "features.json").read_text())["identity"]["pixels"] == [32, 16]
    assert "complete already" not in capsys.readouterr().out
    extract(tmp_path / "out", *flags, weights=(*VIT, "16"))
    assert "complete already" in capsys.readouterr().out


def test_torchvisions_vit_has_no_mean_of_its_patches():
    network = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 8)
    with pytest.raises(UserError, match="--kind avgpool"):
        extract_features.KINDS["avgpool"](network, torch.zeros(1, 3, 32, 32))


def test_kinds_of_other_networks():
    x = torch.randn(2, 3, 64, 64)
    resnet, timm = build_backbone("resnet18")[0].eval(), build_backbone("vit_tiny_patch16_224")[0].eval()
    kinds = extract_features.KINDS
    torch.testing.assert_close(kinds["avgpool"](resnet, x), resnet(x))
    both = kinds["avgpool"](timm, x)
    cls, patches = cls_and_patches(timm, x)
    torch.testing.assert_close(both[:, ::2], cls)
    torch.testing.assert_close(both[:, 1::2], patches.mean(dim=(1, 2)))
    averaging = TimmViT(img_size=64, embed_dim=32, depth=2, num_heads=2, global_pool="avg", num_classes=0)
    cls, patches = cls_and_patches(averaging.eval(), x)
    tokens = averaging.forward_intermediates(x, norm=True, intermediates_only=True, return_prefix_tokens=True)
    torch.testing.assert_close(cls, tokens[-1][1][:, 0])  # not its output, which is the mean of the patches
    without = TimmViT(
        img_size=64, embed_dim=32, depth=2, num_heads=2, global_pool="avg", class_token=False, num_classes=0
    ).eval()
    torch.testing.assert_close(kinds["avgpool"](without, x), without(x))
    four = kinds["last4"](timm, x)
    assert four.shape == (2, 4 * 192)
    torch.testing.assert_close(four[:, -192:], timm.forward_features(x)[:, 0])
    for network, kind in ((resnet, "patches"), (resnet, "last4"), (nn.Flatten(), "patches")):
        with pytest.raises(UserError, match="has no (patch tokens|CLS token in its blocks)"):
            kinds[kind](network, x)
    with pytest.raises(UserError, match="Xcit: .*return_prefix_tokens"):
        last_cls_tokens(build_backbone("xcit_nano_12_p16_224")[0].eval(), x, 4)
    with pytest.raises(UserError, match="no CLS token in its blocks"):
        sizes = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
        last_cls_tokens(TimmViT(class_token=False, global_pool="avg", **sizes).eval(), x, 2)


def test_torch_files_and_half_precision_hold_the_same(images, tmp_path):
    found = {}
    for name, flags in {"npy": [], "pt": ["--format", "pt"], "half": ["--dtype", "float16"]}.items():
        path = extract(tmp_path / name, "--data_path", images, *flags)
        found[name] = read_features(path.parent).features
    assert torch.equal(found["pt"], found["npy"]) and torch.equal(found["half"], found["npy"].half())
    there = {path.name for path in (tmp_path / "pt").iterdir()}
    assert there == {"features.pt", "features.json", "names.txt"}


# ---------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def half_done(images, tmp_path, monkeypatch) -> Path:
    """Features of twenty images whose eleventh could not be read; below `images`, the images."""
    monkeypatch.setattr(extract_features, "RECORD", 4)
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "nested" / "002.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image: .*nested/002.png.*, or add --skip_unreadable"):
        extract(tmp_path, "--data_path", tmp_path / "images", "--batch_size_per_gpu", "4")
    return tmp_path


def test_a_stopped_run_continues_where_it_was(half_done, images, capsys):
    assert json.loads((half_done / "features.json").read_text())["blocks"] == 2
    assert not (half_done / "features.npy").exists()
    with pytest.raises(UserError, match="features are not complete .*: run extract_features.py again"):
        read_features(half_done)
    partial = np.load(half_done / "features.npy.partial", mmap_mode="r+")
    partial[3] = 7  # a value that no image has: it stays only if the row is not computed again
    del partial
    record = json.loads((half_done / "features.json").read_text()) | {"unreadable": ["nested/000.png"]}
    (half_done / "features.json").write_text(json.dumps(record))  # as if it had been so before the stop
    (half_done / "images").rename(half_done / "moved")
    flags = "--data_path", half_done / "moved", "--batch_size_per_gpu", "4", "--skip_unreadable"
    extract(half_done, *flags)
    rows = np.load(half_done / "features.npy")
    whole = np.load(extract(half_done / "whole", "--data_path", images))
    kept = np.array([i for i in range(20) if i not in (3, 10)])
    assert np.array_equal(rows[kept], whole[kept]) and (rows[3] == 7).all() and np.isnan(rows[10]).all()
    said = capsys.readouterr().out
    assert "resuming" in said and "at row 8 of 20" in said
    assert "warning: row 10 is NaN: " in said and "warning: rows that are NaN: 2" in said
    record = json.loads((half_done / "features.json").read_text())
    assert record["unreadable"] == ["nested/000.png", "nested/002.png"] and record["blocks"] == 5
    (half_done / "labels.npy.partial").touch()  # as if the run had been stopped at the end
    extract(half_done, *flags)
    assert "is complete already" in capsys.readouterr().out and not list(half_done.glob("*.partial"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "avgpool"], "differs from the features in it: kind cls -> avgpool "),
        (["--precision", "bf16"], "precision fp32 -> bf16"),
        (["--dtype", "float16"], "differs from the features in it: dtype float32 -> float16 "),
        (["--batch_size_per_gpu", "8"], "batch_size_per_gpu 4 -> 8"),
        (["--image_size", "24"], r"pixels 16 -> 24"),
        (["--value_range", "0", "255"], r"value_range None -> \[\[0.0, 255.0\]\]"),
        (["--format", "pt"], "format npy -> pt"),
        (["--pretrained_weights", "random", "--arch", "vit_nano"], "network .* -> "),
        ("images", "images .* -> "),
    ],
)
def test_other_features_are_not_continued(half_done, images, flags, message):
    data = str(half_done / "images")
    if flags == "images":
        flags, data = [], str(images)
    common = "--batch_size_per_gpu", "4", "--skip_unreadable"
    with pytest.raises(UserError, match=message) as error:
        extract(half_done, *common, "--data_path", data, *flags)
    assert str(error.value).endswith("or another --output_dir")
    extract(half_done, *common, "--data_path", half_done / "images")
    with pytest.raises(UserError, match=message):
        extract(half_done, *common, "--data_path", data, *flags)


@pytest.mark.parametrize("lost", ["features", "labels"])
def test_lost_files_are_computed_again(half_done, capsys, lost):
    flags = "--data_path", half_done / "images", "--batch_size_per_gpu", "4", "--skip_unreadable"
    (half_done / f"{lost}.npy.partial").unlink()
    whole = np.load(extract(half_done, *flags))
    assert "resuming" not in capsys.readouterr().out and np.isfinite(whole).all(axis=1).sum() == 19
    (half_done / "features.npy").unlink()
    assert np.array_equal(np.load(extract(half_done, *flags)), whole, equal_nan=True)
    for record in ("{}", '{"identity": {}, "blocks": "2"}', '{"identity": [], "blocks": 2}'):
        (half_done / "features.json").write_text(record)
        with pytest.raises(UserError, match="does not say what the features are"):
            extract(half_done, *flags)
    (half_done / "features.json").unlink()
    with pytest.raises(UserError, match="would overwrite a file that this script did not write"):
        extract(half_done, *flags)


def test_progress_is_forgotten_before_its_rows_are(half_done, monkeypatch):
    def lengthen(file, size):
        if file.name.endswith("labels.npy.partial"):
            raise OSError(errno.ENOSPC, "No space left on device")

    (half_done / "labels.npy.partial").unlink()
    monkeypatch.setattr(extract_features, "_lengthen", lengthen)
    with pytest.raises(UserError, match="cannot reserve .*labels.npy.partial"):
        extract(half_done, "--data_path", half_done / "images", "--batch_size_per_gpu", "4")
    assert json.loads((half_done / "features.json").read_text())["blocks"] == 0


def test_a_file_of_another_shape_or_type_or_cut_short_is_refused(half_done):
    path = half_done / "features.npy.partial"
    rows, width = np.load(path, mmap_mode="r").shape
    whole = path.read_bytes()
    for shape, dtype in (((width, rows), "float32"), ((rows, width), "int32")):  # of the same length
        extract_features._create(path, shape, np.dtype(dtype))
        with pytest.raises(UserError, match="file is damaged .*features.npy.partial.: remove it to begin"):
            extract(half_done, "--data_path", half_done / "images", "--batch_size_per_gpu", "4")
    for content in (whole[:-1], whole + b"\0", b"x" * len(whole)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="file is damaged .*features.npy.partial.: remove it to begin"):
            extract(half_done, "--data_path", half_done / "images", "--batch_size_per_gpu", "4")
    with pytest.raises(UserError, match="file is damaged .*absent"):  # as on a disk that is not shared
        extract_features._map(half_done / "absent", (rows, width), np.dtype("float32"))


def test_the_network_gets_batches_of_the_flag_whatever_the_blocks(images, tmp_path):
    found, sizes = open_any_images(Source(str(images))), []
    identity = {"dtype": "float32", "format": "npy", "batch_size_per_gpu": 3}

    def model(pixels):
        sizes.append(len(pixels))
        return pixels.mean(dim=(2, 3))

    with Store(tmp_path, (20, 3), identity) as store:
        store.begin()
        assert store.block > 20
        rows = extract_features.Rows(found, load_backbone("pixels", image_size=16), False)
        extract_features.fill(store, rows, model, 0, torch.device("cpu"))
    assert sizes == [3] * 6 + [2]


def test_two_runs_do_not_share_a_folder(images, tmp_path):
    identity = {"dtype": "float32", "format": "npy", "batch_size_per_gpu": 4}
    held = Store(tmp_path, (20, 768), identity)
    taken_by(held.lock)
    with pytest.raises(UserError, match="another run writes to this folder"):
        extract(tmp_path, "--data_path", images)


@settings(deadline=None)
@given(width=st.integers(1, 3000), batch=st.integers(1, 300), dtype=st.sampled_from(["float32", "float16"]))
def test_processes_never_share_a_page(width, batch, dtype):
    identity = {"dtype": dtype, "format": "npy", "batch_size_per_gpu": batch}
    store = Store(Path(), (10_000, width), identity)
    assert store.block * width * np.dtype(dtype).itemsize % PAGE == 0 and store.block % batch == 0
    covered = [row for block in range(store.blocks + 2) for row in store.rows(block)]
    assert covered == list(range(10_000))


@pytest.mark.parametrize("system", ["Linux", "a Mac"])
def test_rows_begin_at_a_page_and_room_is_reserved(tmp_path, monkeypatch, system):
    if system == "a Mac":
        monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "x.npy.partial"
    extract_features._create(path, (3, 5, 7), np.dtype(np.float16))
    array = np.lib.format.open_memmap(path, mode="r+")
    assert (array.shape, array.dtype, array.offset) == ((3, 5, 7), np.float16, PAGE)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == PAGE + 3 * 5 * 7 * 2
    np.load(path)  # without a larger limit for the header
    with pytest.raises(UserError, match=r"cannot reserve 4\.5e\+06 GB: .*give another --output_dir"):
        extract_features._create(path, (2**50,), np.dtype(np.float32))
    assert not path.exists()


@pytest.mark.slow
def test_a_killed_run_gives_the_file_of_one_that_was_not(tmp_path):
    flags = [*PIXELS, *DEMO, "--num_workers", "0"]
    run("extract_features.py", *flags, "--output_dir", tmp_path / "whole")
    command = [sys.executable, "-c", "import extract_features as e; e.RECORD = 1; e.cli.run_script(e.main, "
               "e.parse_args())", *flags, "--output_dir", str(tmp_path / "killed")]  # fmt: skip
    record, port = tmp_path / "killed" / "features.json", str(free_port())
    processes = []
    for rank in "01":
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    wait_for(lambda: record.exists() and json.loads(record.read_text())["blocks"] >= 20, "progress")
    for process in processes:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed" / "features.npy").exists()
    # Any number of processes may continue what others have begun.
    ended = torchrun(3, "extract_features.py", *flags, "--output_dir", tmp_path / "killed")
    assert "resuming" in ended.stdout and "of 1,000" in ended.stdout
    for name in ("features.npy", "labels.npy", "names.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_processes_write_what_one_writes(labelled, tmp_path):
    flags = [*VIT, "--data_path", labelled / "train", "--num_workers", "2", "--batch_size_per_gpu", "4"]
    flags += ["--kind", "last4"]  # rows of half a page
    for count in (1, 3):  # of four blocks, so in the last round only one process has work
        command = "extract_features.py", *flags, "--output_dir", tmp_path / f"{count}"
        ended = torchrun(count, *command) if count > 1 else run(*command)
        assert ended.stdout.count("written: ") == 1
        assert (f"note: {2 * count} workers on" in ended.stdout) == (2 * count > num_cores())
    for name in ("features.npy", "labels.npy", "names.txt", "features.json"):
        assert len({(tmp_path / f"{count}" / name).read_bytes() for count in (1, 3)}) == 1


# ---------------------------------------------------------------------------------------------
# k-NN on saved features
# ---------------------------------------------------------------------------------------------


def knn(*flags) -> dict:
    return call(eval_knn, *flags, "--num_workers", 0, "--nb_knn", 1, 3, 7)


def extract_both(data: Path, folder: Path, *flags, weights: tuple = PIXELS) -> Path:
    for split in ("train", "val"):
        extract(folder / split, "--data_path", data, "--split", split, *flags, weights=weights)
    return folder


@pytest.mark.parametrize("weights", [PIXELS, VIT], ids=["pixels", "vit"])
@pytest.mark.parametrize("format", ["npy", "pt"])
def test_knn_of_saved_features_is_that_of_the_images(labelled, tmp_path, weights, format, capsys):
    extract_both(labelled, tmp_path, "--format", format, weights=weights)
    direct = knn(*weights, "--data_path", labelled)
    said = capsys.readouterr().out
    assert knn("--load_features", tmp_path) == direct
    loaded = capsys.readouterr().out
    assert "normalised" not in loaded  # they are saved as they are
    read = next(line for line in said.splitlines() if line.startswith("weights: "))
    assert f"{read}; kind of features: cls\n" in loaded


def test_classes_are_matched_by_name(tmp_path, capsys):
    for seed, (split, name) in enumerate([("train", "a"), ("train", "b"), ("train", "c"), ("val", "c")]):
        save_images(tmp_path / "data" / split / name, 4, seed=seed % 3)
    folder = extract_both(tmp_path / "data", tmp_path / "features")
    capsys.readouterr()
    assert knn("--load_features", folder) == knn(*PIXELS, "--data_path", tmp_path / "data")
    assert "note: val lacks 2 of 3 classes: a, b" in capsys.readouterr().out
    shutil.rmtree(folder / "val")
    (tmp_path / "data" / "val" / "c").rename(tmp_path / "data" / "val" / "d")
    extract(folder / "val", "--data_path", tmp_path / "data" / "val")
    with pytest.raises(UserError, match="val has classes that train lacks: d "):
        knn("--load_features", folder)
    record = json.loads((folder / "val" / "features.json").read_text())
    (folder / "val" / "features.json").write_text(json.dumps(record | {"classes": []}))
    with pytest.raises(UserError, match="only one of train/ and val/ has names of classes"):
        knn("--load_features", folder)


def test_features_that_do_not_belong_together_are_refused(labelled, images, tmp_path):
    extract_both(labelled, tmp_path)
    load = "--load_features", tmp_path

    def again(split: str, *flags, **kwargs) -> None:
        shutil.rmtree(tmp_path / split)
        extract(tmp_path / split, *flags, **kwargs)

    again("val", "--data_path", labelled / "val", "--image_size", "24")
    with pytest.raises(UserError, match=r"train/ and val/ differ in pixels \(--load_features"):
        knn(*load)
    again("val", "--data_path", images)
    with pytest.raises(UserError, match="features without labels .*val/"):
        knn(*load)
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    for content in (b"\x93NUMPY no", b"", (tmp_path / "words.npy").read_bytes()):
        (tmp_path / "val" / "features.npy").write_bytes(content)
        with pytest.raises(UserError, match="cannot read: .*val/features.npy"):
            knn(*load)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(UserError, match="no features .*/val.*: run extract_features.py with"):
        knn(*load)
    extract_both(labelled, tmp_path / "patches", "--kind", "patches", weights=VIT)
    with pytest.raises(UserError, match="do not fit together"):
        knn("--load_features", tmp_path / "patches")


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"000.png\n\nabsent.png\n", r"no such file: absent.png \(.*list.txt, line 3\): give one image file"),
        (b"000.png\n\0\1\n", r"is not a text file \(.*list.txt\)"),
        (b"\n", r"no images found \(--data_path .*list.txt\)"),
    ],
)
def test_a_bad_list_is_one_clear_line(tmp_path, content, message):
    save_images(tmp_path, 1)
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        extract(tmp_path / "out", "--data_path", tmp_path / "list.txt")


def test_bad_data_is_one_clear_line(labelled, images, tmp_path):
    with pytest.raises(UserError, match=r"folder has train/ and val/ .*: give --data_path .*/train"):
        extract(tmp_path, "--data_path", labelled)
    with pytest.raises(UserError, match="no such file or folder"):
        extract(tmp_path, "--data_path", tmp_path / "absent")
    with pytest.raises(UserError, match="has no effect on a file .--split train"):
        extract(tmp_path, "--data_path", images / "000.png", "--split", "train")
    for number, sign in enumerate(["\n", "\r", "\u2028"]):  # where Python's readers end a line
        odd = tmp_path / f"odd{number}"
        save_images(odd, 1)
        (odd / "000.png").rename(odd / f"0{sign}0.png")
        with pytest.raises(UserError, match=r"file name has a line break \('0\\.*0.png'\): rename it"):
            extract(tmp_path, "--data_path", odd)


def test_values_that_are_not_finite_are_refused(images, tmp_path):
    network = vit()
    network.norm.weight.data.fill_(1e6)  # beyond float16
    torch.save(network.state_dict(), tmp_path / "large.pth")
    weights = "--pretrained_weights", str(tmp_path / "large.pth")
    with pytest.raises(UserError, match="features are not finite .000.png to nested/011.png"):
        extract(tmp_path, "--data_path", images, "--dtype", "float16", weights=weights)


@pytest.mark.parametrize(
    ("label", "number"),
    [(3, 3), (np.int64(2), 2), (torch.tensor(1), 1), (-5, -1), ("cat", -1), (1.5, -1), (torch.ones(4), -1)],
)
def test_labels_that_are_class_numbers(label, number):
    assert class_number(label) == number


@pytest.mark.parametrize("fact", ["kind", "network", "pixels", "mean", "std", "value_range"])
def test_features_of_another_network_do_not_belong_together(labelled, tmp_path, fact):
    extract_both(labelled, tmp_path)
    path = tmp_path / "val" / "features.json"
    record = json.loads(path.read_text())
    record["identity"][fact] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"train/ and val/ differ in {fact} \("):
        knn("--load_features", tmp_path)
    with pytest.raises(UserError, match=f"differs from the features in it: {fact} other -> "):
        extract(tmp_path / "val", "--data_path", labelled / "val")


def test_cls_tokens_stand_before_registers():
    network = TimmViT(img_size=32, embed_dim=32, depth=2, num_heads=2, reg_tokens=3, num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(last_cls_tokens(network, x, 1)[0], network.forward_features(x)[:, 0])
