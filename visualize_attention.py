"""Look at what the CLS token of a ViT attends to in the last block.

    python visualize_attention.py --pretrained_weights runs/vit_small/checkpoint.pth \\
        --image_path cat.jpg photos/ --threshold 0.6 --output_dir attention
    python visualize_attention.py --demo        # after main_dino.py --demo

Per image: heat maps of the heads and of their mean, the same laid over the image, and with
`--threshold` the masks that keep that share of each head's attention (paper, Section 4.2.2).
`sheet.png` shows them side by side.

Shapes: B images, h heads, H x W pixels, R x C patches.
"""

import argparse
import functools
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.utils import make_grid

from support import cli
from support.backbones import check_divides
from support.data import ImageFiles, read_labelled
from support.distributed import fix_random_seeds, init_distributed_mode, is_main_process
from support.errors import UserError
from support.logger import log
from support.pixels import normalize, to_pixels
from support.shapes import Shapes
from support.weights import load_backbone, read_weights, settle_architecture
from utils import DataAugmentationDINO
from vision_transformer import VisionTransformer

DEMO = {"pretrained_weights": "demo_run/checkpoint.pth", "image_size": [64], "threshold": 0.9}
ON_SHEET = 16  # images at most


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; a parent for other parsers, hence without `--help` of its own."""
    parser = cli.ArgumentParser("Visualize Self-Attention maps", add_help=False)
    # fmt: off
    cli.add_weights_flags(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--image_path", nargs="+", default=None, metavar="PATH",
        help="image files, and folders of them")
    group.add_argument("--image_size", default=(480, 480), type=int, nargs="+", metavar="PIXELS",
        help="height and width to resize to, or the length of the shorter side; cut to whole patches")
    group.add_argument("--demo", action="store_true",
        help="look at the network of main_dino.py --demo, and measure how well its attention segments "
             "the drawn shapes")
    group.add_argument("--output_dir", default=".", help="folder for the pictures")
    group.add_argument("--threshold", default=None, type=float,
        help="also make masks that keep this share of the attention, e.g. 0.6")
    group.add_argument("--seed", default=0, type=int,
        help="decides the weights of --pretrained_weights random")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; under `--demo`, flags not given take the demo's values."""
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0], parents=[get_args_parser()])
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    cli.check_least(args, 0, "seed")
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        size = " ".join(map(str, args.image_size))
        raise UserError("must be one or two lengths", f"--image_size {size}", "try 480 or 480 640")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise UserError("must be above 0 and at most 1", f"--threshold {args.threshold}", "try 0.6")
    if args.demo and args.image_path:
        raise UserError("the demo draws its own images", "--image_path", "leave out one of the two")


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Attention of the last block's CLS token over the patches: (B, 3, H, W) -> (B, h, R, C).

    For our ViTs and those of timm, XCiT among them. Raises UserError for networks that do not give it.
    """
    if isinstance(backbone, VisionTransformer):
        attention = backbone.get_last_selfattention(images)  # (B, h, N, N), CLS first
    else:
        attention = _last_timm_attention(backbone, images)
    patch_size = patch_size_of(backbone)
    rows, cols = (side // patch_size for side in images.shape[-2:])
    first = attention.shape[-1] - rows * cols  # before the patches come CLS, registers and the like
    if attention.ndim != 4 or first < 1:
        raise UserError(f"{type(backbone).__name__} has no CLS attention over patches", "--arch", "use a ViT")
    return attention[:, :, 0, first:].unflatten(-1, (rows, cols))


def _last_timm_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """The softmax of the last attention, (B, h, N, N) in a ViT; (B, 0) for a network without.

    Raises UserError for a size of images that the network cannot take.
    """
    from timm.utils import AttentionExtract

    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # a fused kernel never holds the map
    none = images.new_zeros(len(images), 0)
    try:
        extract = AttentionExtract(backbone, method="hook")
    except RuntimeError:  # nothing in it has the name of an attention
        return none
    try:
        maps = list(extract(images).values())
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = backbone.default_cfg["input_size"][1:]
        what, reason = type(backbone).__name__, str(error).splitlines()[0]
        raise UserError(f"{what}: {reason}", "--image_size", f"try {height} {width}") from None
    return maps[-1] if maps else none


def patch_size_of(backbone: nn.Module) -> int:
    """Pixels per patch side, 1 for networks without patches."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return size if isinstance(size, int) else size[0]


def keep_mass(attention: Tensor, share: float) -> Tensor:
    """The fewest patches that hold this share of each map's sum: (..., R, C) -> bool (..., R, C)."""
    if share >= 1:  # a rounded sum of thousands of patches can reach 1 before the last of them
        return torch.ones_like(attention, dtype=torch.bool)
    values, order = attention.flatten(-2).sort(dim=-1, descending=True)
    values = values / values.sum(dim=-1, keepdim=True)
    before = values.cumsum(dim=-1) - values
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < share)
    return kept.unflatten(-1, attention.shape[-2:])


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks (..., H, W); 1 where both are empty."""
    both, either = (masks & truth).sum(dim=(-2, -1)), (masks | truth).sum(dim=(-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Each patch becomes a block of pixels: (..., R, C) -> (..., H, W)."""
    single = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(single, size=size, mode="nearest").reshape(*maps.shape[:-2], *size).to(maps.dtype)


def segmentation(attention: Tensor, truth: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Attention (B, h, R, C) against true masks (B, H, W), for each head: two times (B, h).

    The Jaccard index of the mask that keeps the `threshold` share, and the share of the attention
    that lies on the object.
    """
    truth = truth[:, None]
    pixels = enlarge(attention, truth.shape[-2:])
    masks = enlarge(keep_mass(attention, threshold), truth.shape[-2:])
    return jaccard(masks, truth), (pixels * truth).sum(dim=(-2, -1)) / pixels.sum(dim=(-2, -1))


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


@functools.cache
def _palette() -> np.ndarray:
    """Colours of 256 levels, (256, 3) uint8."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("colours need matplotlib", "not installed", "pip install matplotlib") from None
    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def heat_map(attention: Tensor) -> Image.Image:
    """One map (H, W) in colours; its largest value takes the brightest."""
    levels = (attention / attention.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return Image.fromarray(_palette()[levels.cpu().numpy()])


def draw(image: Image.Image, attention: Tensor, threshold: float | None) -> dict[str, Image.Image]:
    """File names and pictures of an image's heads (h, R, C), an image of R x C patches."""
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
    """What the sheet shows of one image: overlays and, below, the parts of the image that masks keep.

    `first` stands below the image, e.g. the true mask.
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
    """Pictures of any size in rows of equal length, each on a square of `side` pixels."""
    tiles = [transforms.functional.pil_to_tensor(ImageOps.pad(p.convert("RGB"), (side, side), color="white"))
             for row in rows for p in row]  # fmt: skip
    return transforms.functional.to_pil_image(make_grid(tiles, len(rows[0]), padding=4, pad_value=255))


def draw_views(image: Image.Image, augmentation: DataAugmentationDINO, teacher: nn.Module) -> Image.Image:
    """The image and one draw of its views; below each, what the teacher attends to in it."""
    views = augmentation.uint8_views(to_pixels(image), random.Random(0))
    rows: list[list[Image.Image]] = [[], []]
    for pixels in (to_pixels(image), *views):
        with torch.no_grad():
            attention = cls_attention(teacher, normalize(pixels[None].to(next(teacher.parameters()).device)))
        pictures = draw(transforms.functional.to_pil_image(pixels), attention[0].cpu(), None)
        for row, name in zip(rows, ("img", "overlay-mean"), strict=True):
            row.append(ImageOps.scale(pictures[name], 2, Image.Resampling.NEAREST))
    return stack([stack(row, across=True) for row in rows])


def stack(pictures: list[Image.Image], across: bool = False, gap: int = 8) -> Image.Image:
    """Pictures below or beside each other, centred, on white."""
    sizes = np.array([picture.size for picture in pictures])
    along = 0 if across else 1
    size = sizes.max(axis=0)
    size[along] = (sizes[:, along] + gap).sum() - gap
    sheet, start = Image.new("RGB", tuple(map(int, size)), "white"), 0
    for picture in pictures:
        place = [(int(a) - b) // 2 for a, b in zip(size, picture.size, strict=True)]
        place[along] = start
        sheet.paste(picture, tuple(place))
        start += picture.size[along] + gap
    return sheet


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def prepare(image: Image.Image, image_size: list[int], patch_size: int) -> Image.Image:
    """Resize, then cut at the right and the bottom to whole patches. Raises UserError."""
    image = transforms.functional.resize(image, image_size)
    width, height = (side - side % patch_size for side in image.size)
    if not width or not height:
        size = " ".join(map(str, image_size))
        raise UserError(f"smaller than a patch of {patch_size}", f"--image_size {size}", "raise it")
    return image.crop((0, 0, width, height))


def to_batch(images: list[Image.Image], device: torch.device) -> Tensor:
    """Images of one size -> normalised (B, 3, H, W)."""
    pixels = torch.stack([transforms.functional.pil_to_tensor(image) for image in images])
    return normalize(pixels.to(device))


def folder_names(paths: list[str]) -> list[str]:
    """A name for each image's folder: the file's, with a number where that is taken."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = len(names)
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def visualize(
    backbone: nn.Module,
    images: ImageFiles,
    image_size: list[int],
    threshold: float | None,
    output_dir: Path,
    device: torch.device,
) -> None:
    """Write each image's pictures, into a folder of its own if there are several, and the sheet."""
    rows = []
    for i, name in enumerate(folder_names(images.paths)):
        image = prepare(read_labelled(images, i)[0], image_size, patch_size_of(backbone))
        attention = cls_attention(backbone, to_batch([image], device))[0]
        pictures = draw(image, attention, threshold)
        folder = cli.make_folder(output_dir / name if len(images) > 1 else output_dir)
        for file, picture in pictures.items():
            picture.save(folder / f"{file}.png")
        if i < ON_SHEET:
            rows += sheet_rows(pictures)
        log(f"{images.paths[i]}: {attention.shape[0]} heads, {len(pictures)} pictures in {folder}")
    contact_sheet(rows).save(output_dir / "sheet.png")
    log(f"side by side: {output_dir / 'sheet.png'}")


def segment_shapes(
    backbone: nn.Module, shapes: Shapes, image_size: list[int], threshold: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How well each head finds the drawn objects, as in `segmentation`: means over the images, (h,)."""
    results = []
    for chunk in torch.arange(len(shapes)).split(100):
        images = [prepare(shapes[i][0], image_size, patch_size_of(backbone)) for i in chunk.tolist()]
        truth = torch.stack([torch.from_numpy(shapes.mask(i)) for i in chunk.tolist()]).to(device)
        results.append(segmentation(cls_attention(backbone, to_batch(images, device)), truth, threshold))
    scores, shares = (torch.cat(result).mean(dim=0) for result in zip(*results, strict=True))
    return scores, shares


def report_demo(
    weights: str,
    checkpoint_key: str,
    arch: str,
    patch_size: int,
    image_size: list[int],
    threshold: float,
    output_dir: Path,
    device: torch.device,
    seed: int,
    num_images: int = 1_000,
) -> dict[str, float]:
    """Jaccard index in percent, best head, of random and trained weights; a sheet of the trained ones'.

    Raises UserError, also where flags contradict the weights.
    """
    shapes = Shapes("val", num_images)
    known = settle_architecture(read_weights(weights, checkpoint_key), arch, patch_size)
    fix_random_seeds(seed)  # the weights that the training started from
    networks = {
        name: load_backbone(source, key, *known).network.to(device)
        for name, source, key in (
            ("random initialisation", "random", None),
            ("trained", weights, checkpoint_key),
        )
    }
    for size in image_size:  # what would be cut off is in the true masks
        check_divides("image_size", size, patch_size_of(networks["trained"]))
    log(f"{threshold:.0%} of the best head's attention against the true mask, {num_images} images")
    result = {}
    for name, network in networks.items():
        scores, shares = segment_shapes(network, shapes, image_size, threshold, device)
        best = int(scores.argmax())
        result[name] = 100 * scores[best].item()
        log(f"  {name:22} Jaccard {result[name]:.1f} %, on the object {100 * shares[best].item():.1f} %")

    rows = []
    for i in range(4):
        image = prepare(shapes[i][0], image_size, patch_size_of(networks["trained"]))
        attention = cls_attention(networks["trained"], to_batch([image], device))[0]
        rows += sheet_rows(draw(image, attention, threshold), Image.fromarray(shapes.mask(i)))
    contact_sheet(rows, side=96).save(output_dir / "sheet.png")
    log(f"image and true mask, mean and heads: {output_dir / 'sheet.png'}")
    return result


def main(args: argparse.Namespace) -> None:
    """Write the pictures; under `--demo`, measure the segmentation too."""
    check_args(args)
    device = init_distributed_mode()
    fix_random_seeds(args.seed)
    if not is_main_process():  # there is no work to share
        return
    if args.demo:
        if not Path(args.pretrained_weights).is_file():
            raise UserError("no such file", args.pretrained_weights, "run main_dino.py --demo first")
        report_demo(
            args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size, args.image_size,
            args.threshold, cli.make_folder(args.output_dir), device, args.seed,
        )  # fmt: skip
        return
    if not args.image_path:
        raise UserError("no images given", "--image_path", "name images or folders, or try --demo")
    for path in args.image_path:
        if not Path(path).exists():
            raise UserError("no such file", f"--image_path {path}", "check the path")
    images = ImageFiles(*args.image_path)
    if not len(images):
        raise UserError("no images found", f"--image_path {' '.join(args.image_path)}", "give image files")
    patch_size = args.patch_size or (8 if args.pretrained_weights == "random" else None)
    frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, patch_size)
    log(frozen.description)
    backbone = frozen.network
    output_dir = cli.make_folder(args.output_dir)
    visualize(backbone.to(device), images, args.image_size, args.threshold, output_dir, device)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
