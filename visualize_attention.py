"""Show what a ViT attends to, or the principal components of its patches, in images and videos.

    python visualize_attention.py --pretrained_weights runs/vits16/checkpoint.pth \\
        --image_path cat.jpg photos/ --threshold 0.6 --output_dir attention
    python visualize_attention.py --pretrained_weights ... --image_path cat.jpg --query 310 95 --layer 2
    python visualize_attention.py --pretrained_weights ... --image_path photos/ --pca
    python visualize_attention.py --pretrained_weights ... --video clip.mp4
    python visualize_attention.py --demo        # after main_dino.py --demo

For each image, it writes heat maps of the heads' attention and of their mean, the same maps laid over the
image, and with `--threshold` the masks that keep that share of each head's attention (paper, Section 4.2.2).
The attention is the CLS token's in the last block, or that of another block (`--layer`) or of the patch at a
place (`--query`). `--pca` instead colours the patches by their principal components (`support/pca.py`).
`sheet.png` shows the pictures side by side. `--video` writes a video of the image and its mean attention, or
its components. It overwrites only files that it wrote itself.

Shapes: B images, h heads, D features, H x W pixels, R x C patches.
"""

import argparse
import functools
import itertools
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import crop, get_dimensions, resize

from support import cli
from support.attention import attention_map, keep_mass
from support.backbones import canonical, check_divides
from support.checks import check_images
from support.data import ImageFiles, describe, read_image
from support.distributed import choose_device, fix_random_seeds
from support.errors import ImageError, TrainingError, UserError, counted
from support.features import confirm_network, patch_size_of, patch_tokens
from support.files import lies_below, without_links
from support.formats import ImageFormat
from support.logger import MetricLogger, log
from support.pca import SIDES, PatchColours
from support.pictures import (
    as_picture,
    bands,
    check_free,
    contact_sheet,
    enlarge,
    has_mark,
    heat_map,
    mark_patch,
    save_picture,
    side_by_side,
)
from support.pixels import AnyImage, as_tensor, in_channels, normalize
from support.shapes import Shapes
from support.video import ENCODERS, Frames, write_video
from support.weights import Frozen, load_backbone
from vision_transformer import VITS

DEMO = {"pretrained_weights": "demo_run/checkpoint.pth", "image_size": [192], "threshold": 0.6}
VIDEO = {"image_size": [480]}  # keeps the frames' shape
PATCH_SIZE = 8  # of a random ViT
ON_SHEET = 16  # images at most
FIT_ON = 100  # frames of a video, at most, that fix the scale of its colours


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser, patch_size=PATCH_SIZE)
    group = parser.add_argument_group("images")
    group.add_argument("--image_path", nargs="+", default=None, type=os.path.expanduser, metavar="PATH",
        help="image files, and folders to search for images")
    group.add_argument("--video", default=None, type=os.path.expanduser, metavar="PATH",
        help="a video file, or a folder of frames as image files, to make a video of; needs PyAV")
    group.add_argument("--image_size", default=(480, 480), type=cli.number(int, at_least=1), nargs="+",
        metavar="PIXELS",
        help="resize to this height and width, or the shorter side to this length (for a video by default "
             "480); then crop to whole patches")
    group.add_argument("--demo", action="store_true",
        help="show the network of main_dino.py --demo on the drawn shapes; eval_segmentation.py --demo "
             "measures its attention")
    group.add_argument("--output_dir", default="attention",
        help="folder for the pictures; files of other programs in it are not overwritten")
    group.add_argument("--fps", default=None, type=cli.number(float, at_least=1e-3, at_most=1_000),
        help="frames per second of the video (default: as in the file; for a folder 30)")
    group.add_argument("--video_format", default="mp4", choices=tuple(ENCODERS),
        help="format of the video")
    group = parser.add_argument_group("what to show")
    group.add_argument("--layer", default=1, type=cli.number(int, at_least=1),
        help="block, counted from the end; 1 is the last")
    group.add_argument("--query", default=None, type=cli.number(int, at_least=0), nargs=2, metavar=("X", "Y"),
        help="show what the patch at this pixel attends to, instead of the CLS token; in pixels of the "
             "original image, from its left and its top")
    group.add_argument("--pca", action="store_true",
        help="colour the patches by their principal components, fitted over all images, instead of the "
             "attention")
    group.add_argument("--foreground", default="positive", choices=SIDES,
        help="patches that --pca colours: those on the positive side of the first component, away from the "
             "images' borders; try negative if that is the background; all draws no background")
    group.add_argument("--threshold", default=None, type=cli.number(float, above=0, at_most=1),
        help="also write masks that keep this share of the attention, e.g. 0.6")
    # fmt: on
    return parser


def parser_for(args: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser with its defaults, of which `--demo` and `--video` change some."""
    parser = get_args_parser()
    parser.set_defaults(**(DEMO if args.demo else VIDEO if args.video else {}))
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return parser_for(get_args_parser().parse_known_args(argv)[0]).parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other; warn of those without effect."""
    if len(args.image_size) > 2:
        size = " ".join(map(str, args.image_size))
        raise UserError("takes one or two lengths", f"--image_size {size}", "try 480 or 480 640")
    if args.demo and (args.image_path or args.video):
        where = "--image_path" if args.image_path else "--video"
        raise UserError("the demo draws its own images", where, "leave out one of the two")
    if args.image_path and args.video:
        raise UserError("images and a video at once", "--image_path, --video", "leave out one of the two")
    if not (args.demo or args.image_path or args.video):
        raise UserError("no images given", "--image_path", "give images or folders, or try --demo")
    if args.pca and args.query:
        what = "components are the same for every query"
        raise UserError(what, "--pca, --query", "leave out one of the two")
    rules = [
        ("threshold", args.pca, "--pca draws no masks"),
        ("foreground", not args.pca, "add --pca"),
        ("fps", not args.video, "it is for --video"),
        ("video_format", not args.video, "it is for --video"),
    ]
    cli.warn_no_effect(args, parser_for(args), rules)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw(
    image: Image.Image,
    maps: dict[str, Tensor],
    threshold: float | None = None,
    patch: tuple[int, int] | None = None,
    top: float | None = None,
) -> dict[str, Image.Image]:
    """Draw pictures of one image's attention maps (R, C), by file name; the image has R x C patches.

    `patch` (row, column), whose attention it is, gets a frame. Each map's colours reach from 0 to `top`, by
    default its largest value.
    """
    size = (image.height, image.width)

    def marked(picture: Image.Image) -> Image.Image:
        return mark_patch(picture, *patch, size[0] // len(maps["mean"])) if patch else picture

    pictures = {"img": marked(image)}
    for name, values in maps.items():
        heat = heat_map(enlarge(values, size), top)
        pictures[f"attn-{name}"] = heat
        pictures[f"overlay-{name}"] = marked(Image.blend(image, heat, 0.6))
        if threshold is not None:
            mask = enlarge(keep_mass(values, threshold), size)
            pictures[f"mask_th{threshold}_{name}"] = Image.fromarray(mask.cpu().numpy())
    return pictures


def by_head(attention: Tensor) -> dict[str, Tensor]:
    """The mean map (R, C) and those of the heads, by name, of attention (h, R, C)."""
    return {"mean": attention.mean(dim=0)} | {f"head{i}": head for i, head in enumerate(attention)}


def sheet_rows(pictures: dict[str, Image.Image], first: Image.Image | None = None) -> list[list[Image.Image]]:
    """Make the sheet's rows for one image: the overlays or components and, if there are masks, below them
    the image behind each mask.

    `first`, e.g. the true mask, is shown below the image.
    """
    image = pictures["img"]
    white = Image.new("RGB", image.size, "white")
    shown = [picture for name, picture in pictures.items() if name.startswith(("overlay", "pca"))]
    masks = [picture for name, picture in pictures.items() if name.startswith("mask")]
    rows = [[image, *shown]]
    if masks:
        rows.append([first or white, *(Image.composite(image, white, mask) for mask in masks)])
    return rows


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

MARK = "DINO visualize_attention.py"  # text in each PNG and video, which identifies our files


def open_images(paths: list[str], form: ImageFormat) -> ImageFiles:
    """Open the images to show: the named files, and those in the named folders that are not our pictures.

    Raises UserError.
    """
    for path in paths:
        if not Path(path).exists():
            raise UserError("no such file", f"--image_path {path}", "check the path")
    images = ImageFiles(*paths, form=form)
    log(f"images: {describe(images)}")
    found = list(images.paths)
    kept = [path for path in found if path in paths or not has_mark(path, MARK)]
    if len(kept) < len(found):
        log(f"left out {counted(len(found) - len(kept), 'picture')} of an earlier run")
    if not kept:
        raise UserError("no images found", f"--image_path {' '.join(paths)}", "give image files")
    return ImageFiles(*kept, form=form)


def folder_names(paths: list[str], given: Sequence[str]) -> list[str]:
    """Name each image's folder after its file, for a file in a given folder with the path from there.

    Adds a number if another image has that name. Names that differ only in upper and lower case, or in the
    form of Unicode, count as one, as they do in folders on a Mac.
    """
    names: dict[str, str] = {}  # by what has to differ
    roots = {Path(place) for root in given for place in (root, without_links(root))}
    for path in map(Path, paths):
        root = next((folder for folder in path.parents if folder in roots), path.parent)
        stem = name = str(path.relative_to(root).with_suffix(""))
        number = 2
        while (key := unicodedata.normalize("NFC", name).casefold()) in names:
            name, number = f"{stem}-{number}", number + 1
        names[key] = name
    return list(names.values())


# ---------------------------------------------------------------------------------------------
# What to show
# ---------------------------------------------------------------------------------------------


def upright(image: AnyImage) -> AnyImage:
    """Rotate as EXIF says."""
    return image if isinstance(image, Tensor) else ImageOps.exif_transpose(image)


def prepare(image: AnyImage, image_size: Sequence[int], patch_size: int) -> AnyImage:
    """Rotate as EXIF says, resize, then crop right and bottom to whole patches. Raises UserError."""
    image = resize(upright(image), image_size)
    height, width = (side - side % patch_size for side in get_dimensions(image)[1:])
    if not width or not height:
        size = " ".join(map(str, image_size))
        raise UserError(f"smaller than a patch of {patch_size}", f"--image_size {size}", "raise it")
    return crop(image, 0, 0, height, width)


def patch_at(
    query: Sequence[int], image: AnyImage, image_size: Sequence[int], patch_size: int
) -> tuple[int, int]:
    """Row and column of the patch that has the pixel (x, y) of an image, once `prepare` has prepared it.

    The pixels that `prepare` crops belong to the nearest patch. Raises UserError outside of the image.
    """
    image = upright(image)
    (x, y), (_, height, width) = query, get_dimensions(image)
    if x >= width or y >= height:
        fix = f"give X below {width} and Y below {height}"
        raise UserError(f"outside of the {width} x {height} image", f"--query {x} {y}", fix)
    _, new_height, new_width = get_dimensions(resize(image, image_size))
    column, row = (
        min(int((place + 0.5) * after / before), after - after % patch_size - 1) // patch_size
        for place, before, after in zip(query, (width, height), (new_width, new_height), strict=True)
    )
    return row, column


class Viewer(NamedTuple):
    """A network and the attention to show."""

    frozen: Frozen  # on the device
    device: torch.device
    image_size: Sequence[int]  # as `prepare` takes it
    layer: int = 1  # counted from the end
    query: Sequence[int] | None = None  # (x, y) in an original image; without it, the CLS token

    def prepare(self, image: AnyImage) -> tuple[Image.Image, Tensor]:
        """The image in whole patches as a picture, and as the network takes it: (1, C, H, W)."""
        image = in_channels(image, self.frozen.form.channels)
        pixels = as_tensor(prepare(image, self.image_size, patch_size_of(self.frozen.network)))
        batch = normalize(pixels[None].to(self.device), self.frozen.mean, self.frozen.std)
        return as_picture(pixels).convert("RGB"), batch

    def attention(self, image: AnyImage) -> tuple[Image.Image, Tensor, tuple[int, int] | None]:
        """One image in whole patches, the attention over them, on the CPU (h, R, C), and the query's patch.

        Raises UserError.
        """
        network, (prepared, pixels) = self.frozen.network, self.prepare(image)
        size = patch_size_of(network)
        patch = patch_at(self.query, image, self.image_size, size) if self.query else None
        return prepared, attention_map(network, pixels, self.layer, patch)[0].cpu(), patch

    @torch.inference_mode()
    def tokens(self, image: AnyImage) -> tuple[Image.Image, Tensor]:
        """One image in whole patches, and their tokens (R, C, D). Raises UserError."""
        prepared, pixels = self.prepare(image)
        return prepared, patch_tokens(self.frozen.network, pixels, self.layer)[0]


# Draws one image: {file name: picture}.
Show = Callable[[AnyImage], dict[str, Image.Image]]


def show_attention(viewer: Viewer, threshold: float | None, image: AnyImage) -> dict[str, Image.Image]:
    """Draw the attention of the heads, and their mean."""
    prepared, attention, patch = viewer.attention(image)
    return draw(prepared, by_head(attention), threshold, patch)


def show_mean_attention(
    viewer: Viewer, threshold: float | None, top: float, image: AnyImage
) -> dict[str, Image.Image]:
    """Draw the mean attention of the heads, in colours from 0 to `top`."""
    prepared, attention, patch = viewer.attention(image)
    return draw(prepared, {"mean": attention.mean(dim=0)}, threshold, patch, top)


def show_components(viewer: Viewer, colours: PatchColours, image: AnyImage) -> dict[str, Image.Image]:
    """Draw each patch in the colours of its principal components."""
    prepared, tokens = viewer.tokens(image)
    picture = Image.fromarray(colours(tokens).numpy())
    return {"img": prepared, "pca": picture.resize(prepared.size, Image.Resampling.NEAREST)}


def fit_components(viewer: Viewer, images: Callable[[], Iterable[AnyImage]], side: str) -> PatchColours:
    """Fit the components over all images; `images()` yields them. Raises UserError."""
    colours = PatchColours(lambda: (viewer.tokens(image)[1] for image in images()), side)
    wrong = "" if side == "all" else "; if it is the background, give the other side with --foreground"
    log(f"principal components: foreground {colours.share:.0%} of the patches{wrong}")
    return colours


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def readable(images: ImageFiles) -> Iterator[AnyImage]:
    """Yield the images that can be read. Raises ImageError if none can."""
    broken = 0
    for i in range(len(images)):
        try:
            yield read_image(images, i)[0]
        except ImageError:
            broken += 1
            if broken == len(images):
                raise


def visualize(images: ImageFiles, given: Sequence[str], show: Show, output_dir: Path) -> None:
    """Write the pictures of each image, in separate folders (`folder_names`) if there are several; the sheet.

    Logs and skips an image that cannot be read. Raises TrainingError at the end if there was any,
    ImageError if no image could be read, UserError if it would overwrite a file of another program.
    """
    paths = list(images.paths)
    inputs = {Path(path).resolve() for path in paths}
    check_free(output_dir / "sheet.png", MARK, inputs)  # at the start, not after all the work
    shown, broken = [], []
    for i, name in enumerate(folder_names(paths, given)):
        try:
            image = read_image(images, i)[0]
        except ImageError as error:
            broken.append(error)
            if len(broken) == len(images):
                raise
            log(f"warning: {error}")
            continue
        pictures = show(image)
        folder = cli.make_folder(output_dir / name if len(images) > 1 else output_dir)
        for file, picture in pictures.items():
            save_picture(picture, folder / f"{file}.png", MARK, inputs)
        if i - len(broken) < ON_SHEET:
            shown.append(sheet_rows(pictures))
        others = (path for path in folder.glob("*.png") if path.stem not in {*pictures, "sheet"})
        earlier = [path for path in others if has_mark(path, MARK)]
        stay = f"; {len(earlier)} of an earlier run stay, e.g. {min(earlier).name}" if earlier else ""
        log(f"{paths[i]}: {len(pictures)} pictures in {folder}{stay}")
    save_picture(contact_sheet(arrange(shown)), output_dir / "sheet.png", MARK, inputs)
    drawn = len(images) - len(broken)
    only = f", the first {ON_SHEET} of {drawn} images" if drawn > ON_SHEET else ""
    log(f"side by side: {output_dir / 'sheet.png'}{only}")
    if broken:
        what = f"{len(broken)} of {len(images)} images could not be read"
        raise TrainingError(what, "named above", "repair or remove them")


def arrange(shown: list[list[list[Image.Image]]]) -> list[list[Image.Image]]:
    """Arrange the images' `sheet_rows` on one sheet: below each other, or, if they have two or three
    pictures each, as columns beside each other.
    """
    if len(shown[0]) == 1 and len(shown[0][0]) <= 3:
        return bands([rows[0] for rows in shown])
    return [row for rows in shown for row in rows]


def visualize_video(viewer: Viewer, frames: Frames, args: argparse.Namespace, path: Path) -> None:
    """Write a video of the frames beside their mean attention, or their components.

    At most `FIT_ON` of the frames, evenly spread, fix one scale of colours for all. Raises UserError.
    """
    every = math.ceil(len(frames) / FIT_ON)

    def sample() -> Iterator[Image.Image]:
        return itertools.islice(frames, 0, None, every)

    used = len(range(0, len(frames), every))
    log(f"scale: one for all {counted(len(frames), 'frame')}, from {used} of them, evenly spread")
    show: Show
    if args.pca:
        show = functools.partial(show_components, viewer, fit_components(viewer, sample, args.foreground))
    else:
        top = max(viewer.attention(frame)[1].mean(dim=0).max().item() for frame in sample())
        show = functools.partial(show_mean_attention, viewer, args.threshold, top)
    rate = args.fps or frames.rate or 30
    with write_video(path, rate, MARK) as append:
        for frame in MetricLogger().log_every(frames, 50, "frame"):
            first, *masked = sheet_rows(show(frame))
            append(side_by_side([*first, *(picture for row in masked for picture in row[1:])]))
    log(f"video: {path}, {counted(len(frames), 'frame')}, {float(rate):.4g} a second")


def draw_demo(viewer: Viewer, args: argparse.Namespace, output_dir: Path) -> None:
    """Draw the demo's network on some of its images, with the true masks. Raises UserError."""
    shapes = Shapes("val", ON_SHEET if args.pca else 4)
    images = [shapes[i][0] for i in range(len(shapes))]
    size = viewer.prepare(images[0])[0].size
    masks = [Image.fromarray(shapes.mask(i)).resize(size) for i in range(len(shapes))]
    if args.pca:
        colours = fit_components(viewer, lambda: images, args.foreground)
        shown = [show_components(viewer, colours, image) for image in images]
        rows = bands([[*sheet_rows(each)[0], mask] for each, mask in zip(shown, masks, strict=True)])
    else:
        shown = [show_attention(viewer, args.threshold, image) for image in images]
        rows = [row for each, mask in zip(shown, masks, strict=True) for row in sheet_rows(each, mask)]
    save_picture(contact_sheet(rows, side=128), output_dir / "sheet.png", MARK)
    what = "image, components and true mask" if args.pca else "image and true mask, mean and heads"
    log(f"{what}: {output_dir / 'sheet.png'}")
    log("eval_segmentation.py --demo measures how well the attention segments the shapes")


def load_viewer(args: argparse.Namespace, device: torch.device) -> Viewer:
    """Load the network that the flags name, to the device. Raises UserError."""
    weights = args.pretrained_weights
    if args.demo and weights == DEMO["pretrained_weights"] and not Path(weights).is_file():
        raise UserError("no such file", weights, "run main_dino.py --demo first")
    is_ours = args.arch is None or canonical(args.arch) in VITS
    by_default = PATCH_SIZE if weights == "random" and is_ours else None
    network = weights, args.checkpoint_key, args.arch, args.patch_size or by_default
    frozen = load_backbone(*network, in_chans=args.in_chans, value_range=args.value_range)
    if (args.demo or args.video) and frozen.form.channels not in (1, 3):
        what = f"the network takes {counted(frozen.form.channels, 'channel')}"
        raise UserError(what, "--demo" if args.demo else "--video", "give --image_path")
    for size in args.image_size if args.demo else ():  # cropped images would not match the true masks
        check_divides("image_size", size, patch_size_of(frozen.network))
    confirm_network(frozen)
    frozen.network.to(device)
    return Viewer(frozen, device, args.image_size, args.layer, args.query)


def main(args: argparse.Namespace) -> None:
    """Write the pictures, or the video."""
    check_args(args)
    if cli.leaves_work_to_first():
        return
    device = choose_device()
    fix_random_seeds(args.seed)
    output_dir = cli.make_folder(args.output_dir)
    if args.demo:
        draw_demo(load_viewer(args, device), args, output_dir)
    elif args.video:
        frames, path = Frames(args.video), output_dir / f"video.{args.video_format}"
        check_free(path, MARK, {Path(args.video).resolve()})
        visualize_video(load_viewer(args, device), frames, args, path)
    else:
        viewer = load_viewer(args, device)
        images = open_images(args.image_path, viewer.frozen.form)
        if args.query and len(images) > 1:
            what = f"there are {len(images)} images"
            raise UserError(what, "--query", "give one image, or --video for frames of one size")
        check_images(images, alike=False)
        if lies_below(output_dir / "sheet.png", args.image_path):
            log(f"warning: {output_dir}/ lies in --image_path: other scripts would read its pictures")
        show: Show = functools.partial(show_attention, viewer, args.threshold)
        if args.pca:
            colours = fit_components(viewer, lambda: readable(images), args.foreground)
            show = functools.partial(show_components, viewer, colours)
        visualize(images, args.image_path, show, output_dir)


if __name__ == "__main__":
    cli.run_script(main, parse_args())
