import json
import re
import sys
from pathlib import Path

import pytest
import torch

import export
from support.checkpoints import load_checkpoint
from support.errors import TrainingError, UserError
from support.pixels import eval_transform
from support.weights import Frozen, load_backbone
from tests.conftest import call, picture, run_on_full_disk
from vision_transformer import vit_nano, vit_tiny

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """As `main_dino.py` writes it, with a mean and a deviation of its own."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    torch.manual_seed(0)
    entries = {f"backbone.{name}": value for name, value in vit_nano(8, img_size=32).state_dict().items()}
    args = {"arch": "vit_nano", "patch_size": 8}
    torch.save({"teacher": entries, "args": args, "normalization": {"mean": MEAN, "std": STD}}, path)
    return path


def write(folder: Path, weights: Path | str, *flags) -> dict[str, float]:
    return call(export, "--pretrained_weights", weights, "--output_dir", folder, *flags)


def features(weights: Path, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, and the network's features of them."""
    frozen = load_backbone(str(weights), image_size=size)
    images = torch.randn(5, 3, frozen.image_size, frozen.image_size)
    return images, frozen.network(images)


def test_a_backbone_file_keeps_all_that_is_known(checkpoint, tmp_path, capsys):
    assert write(tmp_path, checkpoint, "--to", "backbone") == {"backbone": 0}
    again = load_backbone(str(tmp_path / "backbone.pth"))
    assert again[1:4] == (32, MEAN, STD) and again.arch == "vit_nano"
    images, expected = features(checkpoint)
    assert torch.equal(again.network(images), expected)
    assert "largest difference 0.0e+00 of features up to" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]
    before = (tmp_path / "backbone.pth").read_bytes()
    with pytest.raises(UserError, match="file exists .*backbone.pth.: move it away, or give another"):
        write(tmp_path, tmp_path / "backbone.pth", "--to", "timm", "backbone", "--image_size", "16")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]
    assert (tmp_path / "backbone.pth").read_bytes() == before


@pytest.mark.parametrize("size", [None, 48])
def test_timm_loads_what_the_printed_call_says(checkpoint, tmp_path, capsys, monkeypatch, size):
    import timm

    flags = [] if size is None else ["--image_size", str(size)]
    difference = write(tmp_path, checkpoint, "--to", "timm", *flags)["timm"]
    said = capsys.readouterr().out
    call = next(line for line in said.splitlines() if line.startswith("timm.create_model("))
    assert said.count("note: position embedding interpolated to 48 pixels") == (size == 48)
    assert said.count("interpolated") == (size == 48)
    monkeypatch.chdir(tmp_path)
    model = eval(call, {"timm": timm}).eval()
    images, expected = features(checkpoint, size)
    assert (model(images) - expected).abs().max() < 1e-4 and difference < 1e-4
    again = load_backbone("timm.safetensors", arch="vit_nano")
    assert again[1:4] == (size or 32, MEAN, STD) and torch.equal(again.network(images), expected)
    assert f"its images: {size or 32} pixels, mean" in said
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(transform(picture()), again.transform(picture()), rtol=0, atol=1e-5)


def test_timms_own_names_are_used_where_the_sizes_are_the_same(tmp_path, capsys):
    torch.save(vit_tiny(16).state_dict(), tmp_path / "tiny.pth")
    write(tmp_path, tmp_path / "tiny.pth", "--to", "timm")
    words = 'timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained_cfg_overlay={'
    assert words in capsys.readouterr().out
    modes = {(tmp_path / name).stat().st_mode for name in ("tiny.pth", "timm.safetensors")}
    assert len(modes) == 1  # readable by those who may read other files


@pytest.mark.parametrize(("arch", "size"), [("resnet18", "64"), ("vit_tiny_patch16_224", "64")])
def test_other_networks_go_to_timm_and_back(tmp_path, capsys, arch, size):
    flags = "--arch", arch, "--image_size", size
    differences = write(tmp_path, "random", "--to", "timm", "backbone", *flags)
    assert differences["backbone"] == 0 and differences["timm"] < 1e-4
    assert load_backbone(str(tmp_path / "backbone.pth")).image_size == 64
    assert re.search(r"^timm.create_model.*'mean': \(0.485, 0.456, 0.406\)", capsys.readouterr().out, re.M)


def test_a_rectangle_goes_to_each_format_and_back(tmp_path, capsys, monkeypatch):
    import timm

    flags = "--arch", "vit_nano", "--patch_size", "8", "--image_size", "64", "32"
    differences = write(tmp_path, "random", "--to", "backbone", "timm", *flags)
    assert differences["backbone"] == 0 and differences["timm"] < 1e-4
    again = load_backbone(str(tmp_path / "backbone.pth"))
    assert again.image_size == (64, 32) and again.network.grid == (8, 4)
    call = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("timm.create_model(")
    )
    monkeypatch.chdir(tmp_path)
    images = export.random_images(again, 2)
    assert (eval(call, {"timm": timm}).eval()(images) - again.network(images)).abs().max() < 1e-4
    other = tmp_path / "other"
    write(other, tmp_path / "backbone.pth", "--to", "backbone", "--image_size", "24", "48")
    assert "position embedding interpolated to 24 x 48 (H x W) pixels" in capsys.readouterr().out
    again = load_backbone(str(other / "backbone.pth"))
    assert again.image_size == (24, 48) and again.network.pos_embed.shape == (1, 1 + 3 * 6, 128)


def test_hugging_face_reads_a_rectangle_but_does_not_resize_to_it(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    flags = "--arch", "vit_nano", "--patch_size", "8", "--image_size", "64", "32"
    assert write(tmp_path, "random", "--to", "hf", *flags)["hf"] < 1e-4
    assert "resize images to cover 73 x 37 (H x W) pixels before" in capsys.readouterr().out
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    image = picture(size=(37, 73))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, eval_transform((64, 32))(image), rtol=0, atol=1e-5)


def test_hugging_face_reads_images_of_one_channel(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    flags = "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32"
    write(tmp_path, "random", "--to", "hf", "hf", *flags, "--in_chans", "1")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False)
    pixels = processor(picture().convert("L"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 32, 32) and model(pixels).last_hidden_state.shape == (1, 17, 128)
    write(tmp_path / "wide", "random", "--to", "hf", *flags, "--value_range", "0", "4095")
    assert load_backbone(str(tmp_path / "wide" / "hf" / "model.safetensors")).value_range == ((0, 4095),)
    said = capsys.readouterr().out
    assert all(f"the image processor takes uint8 ({count}, H, W)" in said for count in (1, 3))


def test_networks_that_a_format_does_not_know_are_refused(tmp_path):
    with pytest.raises(UserError, match="timm has no alexnet"):
        write(tmp_path, "random", "--arch", "alexnet", "--to", "timm")
    with pytest.raises(UserError, match="there is no network"):
        write(tmp_path, "pixels", "--to", "backbone")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shallow() -> Frozen:
    """One block, because tracing takes seconds a block."""
    network = vit_nano(8, img_size=32).eval().requires_grad_(False)
    network.blocks = network.blocks[:1]
    return Frozen(network, 32, MEAN, STD, "", "vit_nano")


def test_torch_export_takes_any_number_of_images(shallow, tmp_path):
    difference = export.export(shallow, "torch_export", tmp_path)
    said = {"dino": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=said).module()
    assert json.loads(said["dino"])["normalization"] == {"mean": [*MEAN], "std": [*STD], "value_range": None}
    images = export.random_images(shallow, 5)
    assert (program(images) - shallow.network(images)).abs().max() < 1e-4 and difference < 1e-4


def test_onnx_takes_any_number_of_images(shallow, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    difference = export.export(shallow, "onnx", tmp_path)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    said = json.loads(session.get_modelmeta().custom_metadata_map["dino"])
    assert said["normalization"] == {"mean": [*MEAN], "std": [*STD], "value_range": None}
    assert said["args"]["global_crops_size"] == 32
    images = export.random_images(shallow, 5)
    found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
    assert (found - shallow.network(images)).abs().max() < 1e-4 and difference < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_hugging_face_reads_the_network_and_the_images(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    difference = write(tmp_path, checkpoint, "--to", "hf")["hf"]
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    assert type(model).__name__ == "ViTModel"
    modes = {(tmp_path / "hf" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # readable by those who may read other files
    images, expected = features(checkpoint)
    assert (model(images).last_hidden_state[:, 0] - expected).abs().max() < 1e-4 and difference < 1e-4
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    pixels = processor(picture(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, eval_transform(32, MEAN, STD)(picture()), rtol=0, atol=1e-5)
    again = load_backbone(str(tmp_path / "hf" / "model.safetensors"), arch="vit_nano")
    assert torch.equal(again.network(images), expected) and again[1:4] == (32, MEAN, STD)
    with pytest.raises(UserError, match="resnet18 is not one of our ViTs .--to hf"):
        write(tmp_path / "other", "random", "--arch", "resnet18", "--image_size", "64", "--to", "hf")


def test_a_folder_of_others_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="file exists"):
        write(tmp_path, checkpoint, "--to", "hf")
    assert (tmp_path / "hf" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("to", "package"),
    [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("hf", "transformers"), ("timm", "safetensors")],
)
def test_a_missing_package_is_one_clear_line(checkpoint, tmp_path, monkeypatch, to, package):
    if package == "onnxruntime":
        pytest.importorskip("onnxscript")
    for name in (package, f"{package}.torch"):  # the latter may have been imported
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs the package {package} .--to {to}.: pip install {package}"):
        write(tmp_path, checkpoint, "--to", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["backbone", "torch_export"])  # those that torch writes
def test_a_full_disk_is_one_clear_line(checkpoint, tmp_path, to):
    flags = "--pretrained_weights", checkpoint, "--output_dir", tmp_path, "--to", to
    result = run_on_full_disk("export", 20_000, *flags)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: File too large ({tmp_path}/.export")
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_leaves_no_file(checkpoint, tmp_path, monkeypatch):
    images = export.random_images

    def other_weights(frozen, count):  # the network changes between the writing and the comparison
        frozen.network.norm.weight.data += 1e-2
        return images(frozen, count)

    monkeypatch.setattr(export, "random_images", other_weights)
    with pytest.raises(TrainingError, match="features differ by"):
        write(tmp_path, checkpoint, "--to", "timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: y * (1 + 3e-4), "features differ by"),
        (lambda x, y: y * torch.nan, "features differ by"),
        (lambda x, y: y + (len(x) == 1), "features differ by"),
        (lambda x, y: y + (len(x) == 3), "features differ by"),
        (lambda x, y: y[:1], r"3 images give \(1, 128\), not \(3, 128\)"),
    ],
)
def test_features_that_differ_are_refused(shallow, tmp_path, monkeypatch, wrong, message):
    def written(frozen, path):
        path.write_text("")
        return lambda images: wrong(images, frozen.network(images))

    monkeypatch.setitem(export.EXPORTS, "timm", ("timm.safetensors", written))
    with pytest.raises(TrainingError, match=message):
        export.export(shallow, "timm", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_backbone_file_that_reads_back_as_another_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "records", lambda frozen: {"args": {"arch": "vit_nano", "patch_size": 8}})
    with pytest.raises(TrainingError, match=r"reads back as .32, .0.485, .* not .32, .0.5, 0.4, 0.3"):
        write(tmp_path, checkpoint, "--to", "backbone")
    assert not list(tmp_path.iterdir())


def test_the_seed_of_random_weights_is_the_flags(tmp_path):
    flags = "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32", "--seed"
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        write(tmp_path / name, "random", *flags, seed)
    a, b, c = (load_checkpoint(tmp_path / n / "backbone.pth")["state_dict"]["cls_token"] for n in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)
