"""Show what the CLS token of a ViT attends to in the last block.

    python visualize_attention.py --pretrained_weights runs/vit_small/checkpoint.pth \\
        --image_path cat.jpg photos/ --threshold 0.6 --output_dir attention
    python visualize_attention.py --demo        # after main_dino.py --demo

For each image, it writes heat maps of the heads and of their mean, the same maps laid over the image,
and with `--threshold` the masks that keep that share of each head's attention (paper, Section 4.2.2).
`sheet.png` shows them side by side. It overwrites only pictures that it wrote itself.

Shapes: B images, h heads, H x W pixels, R x C patches.
"""

import argparse
import contextlib
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import make_grid

from support import cli
from support.backbones import check_divides
from support.data import ImageFiles, describe, read_labelled, sample_name
from support.distributed import choose_device, fix_random_seeds, launched_as
from support.errors import ImageError, TrainingError, UserError
from support.features import patch_size_of
from support.logger import log
from support.pixels import normalize, to_pixels
from support.shapes import Shapes
from support.weights import Frozen, load_backbone
from utils import DataAugmentationDINO
from vision_transformer import VisionTransformer

DEMO = {"pretrained_weights": "demo_run/checkpoint.pth", "image_size": [64], "threshold": 0.9}
ON_SHEET = 16  # images at most


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. A parent for other parsers, so it has no `--help`."""
    parser = cli.ArgumentParser("Visualize Self-Attention maps", add_help=False)
    # fmt: off
    cli.add_weights_flags(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--image_path", nargs="+", default=None, metavar="PATH",
        help="image files, and folders to search for images")
    group.add_argument("--image_size", default=(480, 480), type=cli.number(int, at_least=1), nargs="+",
        metavar="PIXELS",
        help="resize to this height and width, or to this length of the shorter side; then crop to whole "
             "patches")
    group.add_argument("--demo", action="store_true",
        help="show the network of main_dino.py --demo on the drawn shapes; eval_segmentation.py --demo "
             "measures its attention")
    group.add_argument("--output_dir", default="attention",
        help="folder for the pictures; files of other programs in it are not overwritten")
    group.add_argument("--threshold", default=None, type=cli.number(float, above=0, at_most=1),
        help="also write masks that keep this share of the attention, e.g. 0.6")
    group.add_argument("--seed", default=0, type=cli.number(int, at_least=0),
        help="seed of the weights of --pretrained_weights random")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `--demo` changes the defaults of other flags."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()])
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if len(args.image_size) > 2:
        size = " ".join(map(str, args.image_size))
        raise UserError("takes one or two lengths", f"--image_size {size}", "try 480 or 480 640")
    if args.demo and args.image_path:
        raise UserError("the demo draws its own images", "--image_path", "leave out one of the two")
    if not args.demo and not args.image_path:
        raise UserError("no images given", "--image_path", "name images or folders, or try --demo")


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the last block's CLS token over the patches: (B, 3, H, W) -> (B, h, R, C).

    Works for our ViTs and for timm's, including XCiT. Raises UserError for networks without such
    attention, and for image sizes that the network cannot take.
    """
    if isinstance(backbone, VisionTransformer):
        attention = backbone.get_last_cls_attention(images)  # (B, h, N), CLS first
    else:
        attention = _last_timm_attention(backbone, images)
    patch_size = patch_size_of(backbone)
    rows, cols = (side // patch_size for side in images.shape[-2:])
    first = attention.shape[-1] - rows * cols  # CLS, registers and other tokens precede the patches
    if attention.ndim != 3 or first < 1:
        raise UserError(f"{type(backbone).__name__} has no CLS attention over patches", "--arch", "use a ViT")
    return attention[..., first:].unflatten(-1, (rows, cols))


def _last_timm_attention(backbone: Any, images: Tensor) -> Tensor:
    """First row of the last attention map, (B, h, N) for a ViT; (B, 0) for networks without one.

    timm's attention layers pass their softmax through a module `attn_drop`, unless they use a fused
    kernel, which is turned off in the last layer.
    """
    names = [name for name, _ in backbone.named_modules() if name.endswith("attn_drop")]
    found = [images.new_zeros(len(images), 0)]
    if not names:
        return found[0]
    layer: Any = backbone.get_submodule(names[-1].rpartition(".")[0])
    handle = backbone.get_submodule(names[-1]).register_forward_hook(
        lambda module, inputs, softmax: found.append(softmax[..., 0, :])
    )
    fused = getattr(layer, "fused_attn", False)
    layer.fused_attn = False
    try:
        backbone(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = backbone.default_cfg["input_size"][1:]
        what, reason = type(backbone).__name__, str(error).splitlines()[0]
        raise UserError(f"{what}: {reason}", "--image_size", f"try {height} {width}") from None
    finally:
        handle.remove()
        layer.fused_attn = fused
    return found[-1]


def keep_mass(attention: Tensor, share: float) -> Tensor:
    """Mark the fewest patches that hold this share of each map's sum: (..., R, C) -> bool (..., R, C)."""
    if share >= 1:  # rounding could make the sum reach 1 before the last patch
        return torch.ones_like(attention, dtype=torch.bool)
    values, order = attention.flatten(-2).sort(dim=-1, descending=True)
    values = values / values.sum(dim=-1, keepdim=True)
    before = values.cumsum(dim=-1) - values
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < share)
    return kept.unflatten(-1, attention.shape[-2:])


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat each patch as a block of pixels: (..., R, C) -> (..., H, W)."""
    single = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(single, size=size, mode="nearest").reshape(*maps.shape[:-2], *size).to(maps.dtype)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@functools.cache
def _palette() -> np.ndarray:
    """Colour map of 256 levels, (256, 3) uint8. Raises UserError."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("colours need matplotlib", "not installed", "pip install matplotlib") from None
    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat_map(attention: Tensor) -> Image.Image:
    """Draw one map (H, W) in colours, scaled to its largest value."""
    levels = (attention / attention.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return Image.fromarray(_palette()[levels.cpu().numpy()])


def draw(image: Image.Image, attention: Tensor, threshold: float | None) -> dict[str, Image.Image]:
    """Draw pictures of one image's attention (h, R, C), by file name; the image has R x C patches."""
    size = (image.height, image.width)
    pictures = {"img": image}
    maps = {"mean": attention.mean(dim=0)} | {f"head{i}": head for i, head in enumerate(attention)}
    for name, head in maps.items():
        heat = heat_map(enlarge(head, size))
        pictures[f"attn-{name}"] = heat
        pictures[f"overlay-{name}"] = Image.blend(image, heat, 0.6)
        if threshold is not None:
            mask = enlarge(keep_mass(head, threshold), size)
            pictures[f"mask_th{threshold}_{name}"] = Image.fromarray(mask.cpu().numpy())
    return pictures


def sheet_rows(pictures: dict[str, Image.Image], first: Image.Image | None = None) -> list[list[Image.Image]]:
    """Make the sheet's rows for one image: the overlays and, below them, the image behind each mask.

    `first`, e.g. the true mask, is shown below the image.
    """
    image = pictures["img"]
    white = Image.new("RGB", image.size, "white")
    rows = [[image], [first or white]]
    for name, picture in pictures.items():
        if name.startswith("overlay"):
            rows[0].append(picture)
        elif name.startswith("mask"):
            rows[1].append(Image.composite(image, white, picture))
    return rows if len(rows[1]) > 1 else rows[:1]


def contact_sheet(rows: list[list[Image.Image]], side: int = 160) -> Image.Image:
    """Arrange rows of pictures on white, each centred in a square of `side` pixels.

    One factor scales all pictures, so that the largest fills its square.
    """
    factor = side / max(max(picture.size) for row in rows for picture in row)
    resample = Image.Resampling.BICUBIC if factor < 1 else Image.Resampling.NEAREST
    tiles = []
    for picture in (picture.convert("RGB") for row in rows for picture in row):
        small = picture.resize([max(1, round(factor * length)) for length in picture.size], resample)
        tile = Image.new("RGB", (side, side), "white")
        tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
        tiles.append(pil_to_tensor(tile))
    return to_pil_image(make_grid(tiles, len(rows[0]), padding=4, pad_value=255))


def draw_views(image: Image.Image, augmentation: DataAugmentationDINO, teacher: nn.Module) -> Image.Image:
    """Draw an image and its views and, below each, the teacher's attention in it."""
    views = [view for part in augmentation.views(to_pixels(image), random.Random(0))[0] for view in part]
    rows: list[list[Image.Image]] = [[], []]
    for pixels in (to_pixels(image), *views):
        device = next(teacher.parameters()).device
        attention = cls_attention(teacher, normalize(pixels[None].to(device)))
        pictures = draw(to_pil_image(pixels), attention[0].cpu(), None)
        for row, name in zip(rows, ("img", "overlay-mean"), strict=True):
            row.append(pictures[name])
    return contact_sheet(rows, side=128)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

MARK = {"Software": "DINO visualize_attention.py"}  # text in each PNG, which identifies our pictures


def is_own(path: str | Path) -> bool:
    """Whether this script wrote the file."""
    with contextlib.suppress(Exception), Image.open(path) as image:  # a broken file can raise nearly anything
        return MARK.items() <= image.info.items()
    return False


def open_images(paths: list[str]) -> ImageFiles:
    """Open the images to show: the named files, and those in the named folders that are not our pictures.

    Raises UserError.
    """
    where = f"--image_path {' '.join(paths)}"
    for path in paths:
        if not Path(path).exists():
            raise UserError("no such file", f"--image_path {path}", "check the path")
    images = ImageFiles(*paths)
    log(f"images: {describe(images)}")
    found = [sample_name(images, i) for i in range(len(images))]
    kept = [path for path in found if path in paths or not is_own(path)]
    if len(kept) < len(found):
        log(f"left out {len(found) - len(kept)} pictures of an earlier run")
    if not kept:
        raise UserError("no images found", where, "give image files")
    return ImageFiles(*kept)


def folder_names(paths: list[str]) -> list[str]:
    """Name each image's folder after its file, with a number if another image has that name."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = len(names)
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def check_free(path: Path, inputs: set[Path]) -> None:
    """Raise UserError if an input, or a file that this script did not write, is at this path."""
    if path.resolve() in inputs or (path.exists() and not is_own(path)):
        raise UserError(
            "would overwrite a file that this script did not write", str(path), "give another --output_dir"
        )


def save_picture(picture: Image.Image, path: Path, inputs: set[Path]) -> None:
    """Save a PNG with our mark. Raises UserError as `check_free` does."""
    check_free(path, inputs)
    text = PngInfo()
    for name, value in MARK.items():
        text.add_text(name, value)
    picture.save(path, pnginfo=text)


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def prepare(image: Image.Image, image_size: list[int], patch_size: int) -> Image.Image:
    """Rotate as EXIF says, resize, then crop right and bottom to whole patches. Raises UserError."""
    image = resize(ImageOps.exif_transpose(image), image_size)
    width, height = (side - side % patch_size for side in image.size)
    if not width or not height:
        size = " ".join(map(str, image_size))
        raise UserError(f"smaller than a patch of {patch_size}", f"--image_size {size}", "raise it")
    return image.crop((0, 0, width, height))


def attention_of(frozen: Frozen, images: list[Image.Image], device: torch.device) -> Tensor:
    """Compute the attention (B, h, R, C) in B images of one size, on the device."""
    pixels = torch.stack([pil_to_tensor(image) for image in images]).to(device)
    return cls_attention(frozen.network, normalize(pixels, frozen.mean, frozen.std))


def visualize(
    frozen: Frozen,
    images: ImageFiles,
    image_size: list[int],
    threshold: float | None,
    output_dir: Path,
    device: torch.device,
) -> None:
    """Write the pictures of each image, in separate folders if there are several, and the sheet.

    Logs and skips an image that cannot be read. Raises TrainingError at the end if there was any,
    ImageError if no image could be read, UserError if it would overwrite a file of another program.
    """
    paths = [sample_name(images, i) for i in range(len(images))]
    inputs = {Path(path).resolve() for path in paths}
    check_free(output_dir / "sheet.png", inputs)  # at the start, not after all the work
    rows, broken = [], []
    for i, name in enumerate(folder_names(paths)):
        try:
            image = read_labelled(images, i)[0]
        except ImageError as error:
            broken.append(error)
            if len(broken) == len(images):
                raise
            log(f"warning: {error}")
            continue
        image = prepare(image, image_size, patch_size_of(frozen.network))
        attention = attention_of(frozen, [image], device)[0].cpu()
        pictures = draw(image, attention, threshold)
        folder = cli.make_folder(output_dir / name if len(images) > 1 else output_dir)
        for file, picture in pictures.items():
            save_picture(picture, folder / f"{file}.png", inputs)
        if i - len(broken) < ON_SHEET:
            rows += sheet_rows(pictures)
        log(f"{paths[i]}: {len(attention)} heads, {len(pictures)} pictures in {folder}")
    save_picture(contact_sheet(rows), output_dir / "sheet.png", inputs)
    shown = len(images) - len(broken)
    only = f", the first {ON_SHEET} of {shown} images" if shown > ON_SHEET else ""
    log(f"side by side: {output_dir / 'sheet.png'}{only}")
    if broken:
        what = f"{len(broken)} of {len(images)} images could not be read"
        raise TrainingError(what, "named above", "repair or remove them")


def draw_demo(args: argparse.Namespace, device: torch.device) -> None:
    """Draw the attention of the demo's network on some of its images, beside the true masks.

    Raises UserError.
    """
    if not Path(args.pretrained_weights).is_file():
        raise UserError("no such file", args.pretrained_weights, "run main_dino.py --demo first")
    frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
    for size in args.image_size:  # cropped images would not match the true masks
        check_divides("image_size", size, patch_size_of(frozen.network))
    output_dir = cli.make_folder(args.output_dir)
    log(f"weights: {frozen.description}")
    frozen.network.to(device)
    shapes, rows = Shapes("val", 4), []
    for i in range(len(shapes)):
        image = prepare(shapes[i][0], args.image_size, patch_size_of(frozen.network))
        attention = attention_of(frozen, [image], device)[0].cpu()
        rows += sheet_rows(draw(image, attention, args.threshold), Image.fromarray(shapes.mask(i)))
    save_picture(contact_sheet(rows, side=128), output_dir / "sheet.png", set())
    log(f"image and true mask, mean and heads: {output_dir / 'sheet.png'}")
    log("eval_segmentation.py --demo measures how well the attention segments the shapes")


def main(args: argparse.Namespace) -> None:
    """Write the pictures."""
    check_args(args)
    if launched_as()[0]:  # one process does all the work
        return
    device = choose_device()
    fix_random_seeds(args.seed)
    if args.demo:
        draw_demo(args, device)
        return
    images = open_images(args.image_path)
    patch_size = args.patch_size or (8 if args.pretrained_weights == "random" else None)
    frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, patch_size)
    log(f"weights: {frozen.description}")
    log(f"preprocessing: mean {frozen.mean}, deviation {frozen.std}")
    output_dir = cli.make_folder(args.output_dir)
    frozen.network.to(device)
    visualize(frozen, images, args.image_size, args.threshold, output_dir, device)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
