"""Export a frozen backbone for other programs.

    python export.py --pretrained_weights runs/vits16/checkpoint.pth --output_dir exported \\
        --to backbone timm hf onnx torch_export

| --to | file in --output_dir | for |
|---|---|---|
| backbone | backbone.pth | this project; records architecture, mean and deviation |
| timm | timm.safetensors | `timm.create_model(..., checkpoint_path=...)`; the call is printed |
| hf | hf/ | `transformers.AutoModel` and `AutoImageProcessor`, for our ViTs |
| onnx | model.onnx | ONNX Runtime; images of one size, any number of them |
| torch_export | model.pt2 | `torch.export.load`; images of one size, any number of them |

Each is written to a temporary folder, read back and compared with the network on random images, and only
then moved to its place. ONNX needs the packages onnx, onnxscript and onnxruntime, hf needs transformers.

Shapes: B images of H x W pixels, D features.
"""

import argparse
import importlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support import cli
from support.distributed import fix_random_seeds
from support.errors import TrainingError, UserError
from support.features import load_by_flags
from support.files import replacing
from support.logger import log
from support.pixels import Size, height_and_width, size_words
from support.weights import Frozen, load_backbone, load_strictly
from vision_transformer import VisionTransformer


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser, seed_of="the random images and of --pretrained_weights random")
    group = parser.add_argument_group("export")
    group.add_argument("--to", nargs="+", default=["backbone"], choices=EXPORTS,
        help="what to write: a backbone file of this project, a state dict for timm, a Hugging Face ViTModel "
             "folder, ONNX, torch.export")
    cli.add_size_flag(group, "--image_size", None,
        "image size in pixels: one length, or height and width (default: the file's, else 224)")
    group.add_argument("--output_dir", default="exported", help="folder for the files")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# An exported network, read back: normalised images (B, C, H, W) -> features (B, D).
Exported = Callable[[Tensor], Tensor]


def need(module: str, to: str) -> Any:
    """Import an optional package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise UserError(f"needs the package {package}", f"--to {to}", f"pip install {package}") from None


# ---------------------------------------------------------------------------------------------
# The formats: each writes to `path`, and returns the network that it reads from there
# ---------------------------------------------------------------------------------------------


def records(frozen: Frozen) -> dict[str, dict]:
    """What the network and its images are, as a checkpoint records it."""
    normalization = {"mean": frozen.mean, "std": frozen.std, "value_range": frozen.value_range}
    args: dict[str, Any] = {"global_crops_size": frozen.image_size, "arch": frozen.arch}
    if isinstance(frozen.network, VisionTransformer):
        args["patch_size"] = frozen.network.patch_embed.patch_size
    return {"args": args, "normalization": normalization}


def to_backbone(frozen: Frozen, path: Path) -> Exported:
    """The state dict, with the records that `load_backbone` reads."""
    with replacing(path) as file:
        torch.save({"state_dict": frozen.network.state_dict(), **records(frozen)}, file)
    again = load_backbone(str(path))
    said, meant = ((x.image_size, x.mean, x.std, x.form) for x in (again, frozen))
    if said != meant:
        raise TrainingError(f"reads back as {said}, not {meant}", path.name)
    return again.network


def to_timm(frozen: Frozen, path: Path) -> Exported:
    """A state dict that timm's model of this architecture loads strictly."""
    timm, safetensors = need("timm", "timm"), need("safetensors.torch", "timm")
    network, name = frozen.network, frozen.arch
    kwargs: dict[str, Any] = {}
    if isinstance(network, VisionTransformer):
        name, kwargs = timm_arguments(network, frozen.image_size)
    elif getattr(network, "dynamic_img_size", False):
        kwargs = {"dynamic_img_size": True}
    if frozen.form.channels != 3:
        kwargs["in_chans"] = frozen.form.channels
    kwargs["pretrained_cfg_overlay"] = timm_preprocessing(frozen)
    if not timm.is_model(name):
        raise UserError(f"timm has no {name}", "--to timm", "export it to another format")
    metadata = {"architecture": name, "dino": json.dumps(records(frozen))}
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(safetensors.save(state, metadata=metadata))  # `save_file` makes it private to the user
    model = timm.create_model(name, num_classes=0, **kwargs)
    load_strictly(model, safetensors.load_file(path), f"--to timm: {name}", "export it to another format")
    words = "".join(f", {key}={value}" for key, value in kwargs.items())
    log(f'timm.create_model("{name}", num_classes=0{words}, checkpoint_path="{path.name}")')
    log(f"its images: {size_words(frozen.image_size)} pixels, {frozen.value_words}")
    return model.eval()


def timm_preprocessing(frozen: Frozen) -> dict[str, Any]:
    """What `timm.data.resolve_model_data_config` gives, in place of the values of timm's own weights."""
    height, _ = height_and_width(frozen.image_size)
    share = round(height / (round(height * 256 / 224) + 0.5), 4)  # timm divides by it and rounds down
    values = {"mean": frozen.mean, "std": frozen.std, "interpolation": "bicubic", "crop_pct": share}
    if getattr(frozen.network, "default_cfg", {}).get("fixed_input_size"):
        return values  # with a size, timm would also build the network for it
    return values | {"input_size": tuple(frozen.zeros(1).shape[1:])}


def timm_arguments(network: VisionTransformer, image_size: Size) -> tuple[str, dict[str, Any]]:
    """The name of timm's ViT of the same width, and the arguments by which ours differs from it."""
    names = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
    width = network.embed_dim if network.embed_dim in names else 192
    theirs = {"img_size": 224, "patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // 64}
    ours = {
        "img_size": image_size,
        "patch_size": network.patch_embed.patch_size,
        "embed_dim": network.embed_dim,
        "depth": len(network.blocks),
        "num_heads": network.num_heads,
    }
    differ = {key: value for key, value in ours.items() if theirs[key] != value}
    return f"{names[width]}_patch16_224", differ


def to_hf(frozen: Frozen, path: Path) -> Exported:
    """A folder with a Hugging Face ViTModel and an image processor that gives our transform's pixels.

    Except where half the margin around the crop ends in .5: Hugging Face always rounds down, we to even.
    """
    transformers, safetensors = need("transformers", "hf"), need("safetensors.torch", "hf")
    vit, (height, width) = frozen.network, height_and_width(frozen.image_size)
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{frozen.arch} is not one of our ViTs", "--to hf", "export it to another format")
    config = transformers.ViTConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.num_heads,
        intermediate_size=4 * vit.embed_dim,
        image_size=frozen.image_size,
        patch_size=vit.patch_embed.patch_size,
        num_channels=frozen.form.channels,
        layer_norm_eps=vit.norm.eps,
        qkv_bias=True,
        hidden_act="gelu",
        architectures=["ViTModel"],
    )
    config.save_pretrained(path)
    state = {name: value.contiguous() for name, value in hugging_face_names(vit.state_dict()).items()}
    (path / "model.safetensors").write_bytes(
        safetensors.save(state, metadata={"format": "pt", "dino": json.dumps(records(frozen))})
    )
    if height != width:
        needed = size_words([round(side * 256 / 224) for side in (height, width)])
        log(f"note: the image processor only crops the centre: resize images to cover {needed} pixels before")
    processor = transformers.BitImageProcessor(
        do_resize=height == width,  # it knows no resize that covers a rectangle
        do_convert_rgb=frozen.form.channels == 3,
        size={"shortest_edge": round(height * 256 / 224)},
        crop_size={"height": height, "width": width},
        resample=3,  # bicubic
        image_mean=list(frozen.mean),
        image_std=list(frozen.std),
    )
    processor.save_pretrained(path)
    if not frozen.form.is_default:
        log(f"note: {path.name}/: the image processor takes uint8 ({frozen.form.channels}, H, W); "
            "it neither reads files nor maps their values")  # fmt: skip
    again = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    return lambda images: again(images).last_hidden_state[:, 0]


def hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our ViT's tensors under the names that files of Hugging Face's ViTModel have."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            block, _, kind = name.replace("blocks.", "encoder.layer.").partition(".attn.qkv.")
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            renamed |= {f"{block}.attention.attention.{part}.{kind}": tensor for part, tensor in parts}
            continue
        for ours, theirs in HUGGING_FACE.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


# Parts of our names -> those of Hugging Face's ViTModel, replaced in this order.
HUGGING_FACE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "blocks.": "encoder.layer.",
    ".attn.proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    "norm.": "layernorm.",
}


# Of images; the bound is for torch 2.7, which takes none larger than 2**63 - 2.
ANY_NUMBER = ({0: torch.export.Dim("batch", max=2**31)},)


def to_onnx(frozen: Frozen, path: Path) -> Exported:
    """ONNX with the input "images" (B, C, H, W), B free, and the output "features" (B, D)."""
    need("onnxscript", "onnx")
    runtime = need("onnxruntime", "onnx")
    program: Any = torch.onnx.export(
        frozen.network,
        (random_images(frozen, 2),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=ANY_NUMBER,
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props["dino"] = json.dumps(records(frozen))
    program.save(path, external_data=False)
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torch_export(frozen: Frozen, path: Path) -> Exported:
    """A `torch.export` program of images (B, C, H, W), B free."""
    program = torch.export.export(frozen.network, (random_images(frozen, 2),), dynamic_shapes=ANY_NUMBER)
    saved = io.BytesIO()  # on a full disk, torch would abort the process
    torch.export.save(program, saved, extra_files={"dino": json.dumps(records(frozen))})
    with replacing(path) as file:
        file.write(saved.getbuffer())
    return torch.export.load(path).module()


# --to -> the name of the file, and the function that writes it.
EXPORTS: dict[str, tuple[str, Callable[[Frozen, Path], Exported]]] = {
    "backbone": ("backbone.pth", to_backbone),
    "timm": ("timm.safetensors", to_timm),
    "hf": ("hf", to_hf),
    "onnx": ("model.onnx", to_onnx),
    "torch_export": ("model.pt2", to_torch_export),
}


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def random_images(frozen: Frozen, count: int) -> Tensor:
    """Normalised images of noise: (count, C, H, W)."""
    return torch.randn_like(frozen.zeros(count))


@torch.no_grad()
def largest_difference(frozen: Frozen, exported: Exported) -> tuple[float, float]:
    """The largest difference between the exported features and the network's, and the largest feature.

    Compares 1 and 3 images; programs are traced with 2. Raises TrainingError for features of another shape.
    """
    differences, sizes = [], []
    for count in (1, 3):
        images = random_images(frozen, count)
        expected, found = frozen.network(images), exported(images)
        if found.shape != expected.shape:
            what = f"{count} images give {tuple(found.shape)}, not {tuple(expected.shape)}"
            raise TrainingError(what, "--to", "use other versions of the packages")
        differences.append((found - expected).abs().max().item())
        sizes.append(expected.abs().max().item())
    return max(differences), max(sizes)


TOLERANCE = 1e-4  # of the largest feature


def export(frozen: Frozen, to: str, folder: Path) -> float:
    """Write one format; returns the largest difference of a feature.

    Raises UserError or TrainingError, and then leaves no file.
    """
    name, write = EXPORTS[to]
    final = folder / name
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as temporary:
        path = Path(temporary, name)
        difference, size = largest_difference(frozen, write(frozen, path))
        if not difference <= TOLERANCE * size:
            what = f"features differ by {difference:.1e}; the largest is {size:.1e}"
            raise TrainingError(what, f"--to {to}", "use other versions of the packages")
        os.replace(path, final)
    log(f"{to}: {final}: largest difference {difference:.1e} of features up to {size:.3g}")
    return difference


def fit_to_size(frozen: Frozen) -> None:
    """Interpolate the position embedding of one of our ViTs to the image size, if it has another."""
    network = frozen.network
    if isinstance(network, VisionTransformer):
        sides = height_and_width(frozen.image_size)
        position, patch_size = network.interpolate_pos_encoding(None, *sides), network.patch_embed.patch_size
        if position is not network.pos_embed:
            log(f"note: position embedding interpolated to {size_words(frozen.image_size)} pixels")
            network.pos_embed = nn.Parameter(position, requires_grad=False)
            network.grid = sides[0] // patch_size, sides[1] // patch_size


def main(args: argparse.Namespace) -> dict[str, float]:
    """Write the formats; returns the largest difference of a feature for each."""
    if cli.leaves_work_to_first():
        return {}
    if args.pretrained_weights == "pixels":
        raise UserError("there is no network", "--pretrained_weights pixels", "give a file of weights")
    fix_random_seeds(args.seed)
    folder = cli.make_folder(args.output_dir)
    for path in (folder / EXPORTS[to][0] for to in args.to):
        if path.exists():
            raise UserError("file exists", str(path), "move it away, or give another --output_dir")
    frozen = load_by_flags(args)
    fit_to_size(frozen)
    return {to: export(frozen, to, folder) for to in dict.fromkeys(args.to)}


if __name__ == "__main__":
    cli.run_script(main, parse_args())
