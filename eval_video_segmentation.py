"""Segment the objects in the videos of DAVIS 2017, from the mask of the first frame and frozen features.

    python eval_video_segmentation.py --pretrained_weights dino_vits16 --data_path DAVIS --output_dir masks

Nothing is trained. Frame by frame, each patch takes the labels of the most similar patches near its place in
the first frame and in the last few frames, as in Jabri et al., "Space-Time Correspondence as a Contrastive
Random Walk" (2020), https://arxiv.org/abs/2006.14613. Writes an indexed PNG for each frame and prints the
benchmark's region similarity J and boundary accuracy F of each object, and their means.

Shapes: F context frames, H x W pixels, R x C patches, D features, K classes: the background, then objects.
"""

import argparse
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from support import cli
from support.data import ImageFiles, read_image, read_names
from support.distributed import choose_device, fix_random_seeds
from support.errors import UserError, counted, reading
from support.features import confirm_network, patch_size_of, patch_tokens
from support.files import extension, file_id, readable_extensions, replacing
from support.logger import log
from support.masks import (
    VOID,
    compare_palettes,
    jaccard,
    read_mask,
    read_mask_and_palette,
    require_numbers,
    share,
    warn_of_turned,
)
from support.pixels import IMAGENET_STD, normalize, size_words, to_pixels
from support.weights import Frozen, load_backbone

CLIPS, FRAMES, MASKS = "ImageSets/2017/val.txt", "JPEGImages/480p", "Annotations/480p"
STD = (0.228, 0.224, 0.225)  # ImageNet's has 0.229; the published numbers were made with this
TEMPERATURE = 0.1  # of the weights of similar patches

# J&F, J and F in the paper's Table 5.
PAPER = {
    "dino_vits16": (0.618, 0.602, 0.634),
    "dino_vitb16": (0.623, 0.607, 0.639),
    "dino_vits8": (0.699, 0.666, 0.731),
    "dino_vitb8": (0.714, 0.679, 0.749),
}
DAVIS_VAL = set(
    "bike-packing blackswan bmx-trees breakdance camel car-roundabout car-shadow cows dance-twirl dog "
    "dogs-jump drift-chicane drift-straight goat gold-fish horsejump-high india judo kite-surf lab-coat "
    "libby loading mbike-trick motocross-jump paragliding-launch parkour pigs scooter-black shooting "
    "soapbox".split()
)


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = cli.ArgumentParser(__doc__)
    # fmt: off
    cli.add_weights_flags(parser, rgb_only=True)
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="",
        help=f"folder of DAVIS 2017, with {CLIPS}, {FRAMES}/CLIP/*.jpg and {MASKS}/CLIP/*.png")
    group.add_argument("--output_dir", default=".",
        help="folder for the masks, CLIP/00000.png and so on; overwrites files of these names")
    group = parser.add_argument_group("propagation")
    group.add_argument("--n_last_frames", default=7, type=cli.number(int, at_least=0),
        help="how many of the last frames to take labels from, besides the first frame")
    group.add_argument("--size_mask_neighborhood", default=12, type=cli.number(int, at_least=0),
        help="how many rows and columns of patches to search around a patch's place; 0 searches whole frames")
    group.add_argument("--topk", default=5, type=cli.number(int, at_least=1),
        help="how many of the most similar patches a patch takes its label from")
    group.add_argument("--bs", default=6, type=cli.number(int, at_least=1),
        help="accepted and ignored, as in the published code; frames are read one by one")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return get_args_parser().parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """A video: the files of its frames in their order, and of their masks."""

    name: str
    frames: list[Path]
    masks: list[Path]  # for each frame; those after the first may not exist
    size: tuple[int, int]  # height and width in pixels, of all frames and masks

    @property
    def scored(self) -> list[Path]:
        """The masks to compare with: not of the first and the last frame. Empty if there are none."""
        return [mask for mask in self.masks[1:-1] if mask.is_file()]


def open_clips(data_path: str) -> list[Clip]:
    """Find the clips that the list of the validation set names, and check their files.

    Raises UserError for anything that would stop the work later, except damaged pixels.
    """
    root = cli.data_folder(data_path, "give the folder of DAVIS 2017")
    names_file = root / CLIPS
    names = read_names(names_file, "give the folder of DAVIS 2017, or list the clips in it, one per line")
    for name in names:
        if name != Path(name).name or name == "..":
            raise UserError(f"{name} is not the name of a folder", str(names_file), "write names only")
    clips = [open_clip(root, name) for name in names]
    log(f"clips: {len(clips)} of {sum(len(clip.frames) for clip in clips):,} frames in {root}")
    return clips


def _files(folder: Path, kind: str) -> dict[str, Path]:
    """The images in a folder by number, except hidden ones; shorter names come first: 10 follows 9.

    Raises UserError for images of another kind, and for two of one number.
    """
    found: dict[str, Path] = {}
    paths = (path for path in folder.glob("*") if not path.name.startswith("."))
    for path in sorted(paths, key=lambda path: (len(path.stem), path.name)):
        if extension(path) not in readable_extensions() or not path.is_file():
            continue
        if extension(path) != kind:
            raise UserError(f"extension is not {kind}", str(path), "rename or convert it, or remove it")
        if path.stem in found:
            what = f"two files with the same number: {found[path.stem].name}"
            raise UserError(what, str(path), "remove one")
        found[path.stem] = path
    return found


def open_clip(root: Path, name: str) -> Clip:
    """Find and check the files of one clip. Raises UserError."""
    folder = root / FRAMES / name
    if not folder.is_dir():
        raise UserError(f"clip {name} has no folder", str(folder), f"add it, or remove it from {CLIPS}")
    frames = _files(folder, ".jpg")
    if not frames:
        raise UserError(f"clip {name} has no frames", str(folder), "add 00000.jpg, 00001.jpg, ...")
    found = _files(root / MASKS / name, ".png")
    masks = [found.get(stem) or root / MASKS / name / f"{stem}.png" for stem in frames]
    if not masks[0].is_file():
        raise UserError(f"clip {name} has no mask of its first frame", str(masks[0]), "add the mask")
    if extra := set(found.values()) - set(masks):
        raise UserError(f"mask without a frame in clip {name}", str(min(extra)), "add the frame")
    absent = [mask for mask in masks[1:-1] if not mask.is_file()]
    if 0 < len(absent) < len(masks[1:-1]):
        what = f"clip {name} lacks {len(absent)} of {len(masks)} masks"
        raise UserError(what, str(absent[0]), "add them, or leave only the first")
    paths = list(frames.values())
    width, height = _size(paths[0])
    for path in [*paths, *found.values()]:
        if (size := _size(path)) != (width, height):
            what = f"{size[0]} x {size[1]} pixels, but the clip's first frame has {width} x {height}"
            raise UserError(what, str(path), "use frames and masks of one size")
    if not without_void(read_mask(masks[0])).any():
        raise UserError("the mask of the first frame has no object", str(masks[0]), "remove the clip")
    compare_palettes(list(found.values()))
    warn_of_turned(paths)
    return Clip(name, paths, masks, (height, width))


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header. Raises UserError, also for a mask without numbers."""
    with reading("image", path, "repair it"), Image.open(path) as image:
        if extension(path) == ".png":
            require_numbers(image, path)
        return image.size


def without_void(mask: np.ndarray) -> np.ndarray:
    """Make pixels that are not scored background."""
    return np.where(mask == VOID, 0, mask)


def check_outputs(clips: list[Clip], output_dir: Path) -> None:
    """Make the clips' folders. Raises UserError if a mask would be written over a file of the data set."""
    for clip in clips:
        inputs = {file_id(path) for path in (*clip.frames, *clip.masks) if os.path.exists(path)}
        for mask in clip.masks:
            path = output_dir / clip.name / mask.name
            if os.path.exists(path) and file_id(path) in inputs:
                raise UserError("would overwrite the data set", str(path), "give another --output_dir")
        cli.make_folder(output_dir / clip.name)


# ---------------------------------------------------------------------------------------------
# Propagation
# ---------------------------------------------------------------------------------------------


def input_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Height and width that the network sees, for a frame of this size.

    The shorter side becomes 480, the longer one keeps the ratio and is cut to a multiple of 64, then both
    are cut to whole patches. The width of a square frame counts as the longer side.
    """
    longer = 480 * max(height, width) // min(height, width) // 64 * 64
    rows, cols = (longer, 480) if height > width else (480, longer)
    return rows // patch_size * patch_size, cols // patch_size * patch_size


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as OpenCV's INTER_LINEAR, without antialiasing: uint8 (3, H, W) -> int32 (3, *size).

    The arithmetic is OpenCV's too: weights are multiples of 1/2048, and partial sums are rounded down. It
    differs by one grey level from exact rounding at a tenth of the pixels, which the scores show.
    """
    (upper, lower, v), (left, right, u) = (
        _neighbours(old, new, pixels.device) for old, new in zip(pixels.shape[1:], size, strict=True)
    )
    pixels = pixels.int()
    rows = (pixels[:, :, left] * (2048 - u) + pixels[:, :, right] * u) >> 4  # (3, H, new width)
    above, below = rows[:, upper] * (2048 - v)[:, None], rows[:, lower] * v[:, None]
    return ((above >> 16) + (below >> 16) + 2) >> 2


def _neighbours(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `new` pixels, the two old ones around its centre, and 2048 times the second's weight."""
    place = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5).float()
    first = place.floor()
    weight = ((place - first) * 2048).round().int()
    pair = [(first + step).long().clamp(0, old - 1) for step in (0, 1)]
    return pair[0].to(device), pair[1].to(device), weight.to(device)


@torch.inference_mode()
def unit_features(frozen: Frozen, frame: Path, size: tuple[int, int], device: torch.device) -> Tensor:
    """The last block's patch tokens of a frame, of length 1: (R, C, D). Raises ImageError."""
    pixels = to_pixels(read_image(ImageFiles(frame), 0)[0])
    images = normalize(resize(pixels.to(device), size)[None], frozen.mean, frozen.std)
    return F.normalize(patch_tokens(frozen.network, images)[0].float(), dim=-1)


def first_map(mask: np.ndarray, rows: int, cols: int) -> Tensor:
    """A mask's classes at the patches, each 0 or 1: (H, W) -> (R, C, K). Warns of objects that vanish."""
    small = np.array(Image.fromarray(mask).resize((cols, rows), Image.Resampling.NEAREST))
    if lost := sorted(set(np.unique(mask)) - set(np.unique(small))):
        log(f"warning: objects too small for the grid of patches: {', '.join(map(str, lost))}")
    return F.one_hot(torch.from_numpy(small.astype(np.int64)), int(mask.max()) + 1).float()


CHUNK = 2**25  # similarities at a time; 128 MiB


def propagate(target: Tensor, context: Sequence[tuple[Tensor, Tensor]], reach: int, topk: int) -> Tensor:
    """Soft maps of a frame (R, C, K), from its features (R, C, D) and the context's features and soft maps.

    A patch takes the mean over the `topk` patches most similar to it, of all F context frames together,
    weighted by exp(cosine / TEMPERATURE). They are at most `reach` rows and columns away.
    """
    features, maps = (torch.stack(part) for part in zip(*context, strict=True))  # (F, R, C, D or K)
    R, C = target.shape[:2]
    reach = min(reach, max(R, C))
    # The row and column of each patch; 16 bits, because all pairs of a chunk are compared.
    numbers = (torch.arange(n, dtype=torch.int16, device=target.device) for n in (R, C))
    places = torch.cartesian_prod(*numbers).view(R, C, 2)
    height = max(1, CHUNK // (C * features[..., 0].numel()))  # rows of patches at a time
    parts = []
    for top in range(0, R, height):
        rows, near = slice(top, top + height), slice(max(0, top - reach), top + height + reach)
        cosine = target[rows].flatten(0, 1) @ features[:, near].flatten(0, 2).T  # (targets, F * sources)
        offset = places[rows].reshape(-1, 1, 2) - places[near].reshape(1, -1, 2)
        outside = offset.abs_().amax(dim=-1) > reach  # (targets, sources)
        cosine.unflatten(1, (len(context), -1)).masked_fill_(outside[:, None], -math.inf)
        best, index = cosine.topk(min(topk, cosine.shape[1]), dim=1)
        weight = (best / TEMPERATURE).softmax(dim=1)
        parts.append((weight[..., None] * maps[:, near].flatten(0, 2)[index]).sum(dim=1))
    return torch.cat(parts).unflatten(0, (R, C))


def to_labels(maps: Tensor, seen: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Soft maps (R, C, K) -> the class of each pixel, uint8 of the frame's `size`.

    Each class is scaled to [0, 1] at the size that the network has seen, before the largest one wins.
    """
    maps = F.interpolate(maps.permute(2, 0, 1)[None], seen, mode="bilinear")[0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low), maps)
    labels = Image.fromarray(maps.argmax(dim=0).to(torch.uint8).cpu().numpy())
    return np.array(labels.resize((size[1], size[0]), Image.Resampling.NEAREST))


def track(
    frozen: Frozen,
    frames: list[Path],
    first: np.ndarray,
    seen: tuple[int, int],
    n_last: int,
    reach: int,
    topk: int,
    device: torch.device,
) -> Iterator[np.ndarray]:
    """Yield the labels of each frame, uint8 (H, W); the `first` ones are given.

    The network sees frames of the size `seen`. Only the context is kept in memory. `reach` 0 stands for
    whole frames.
    """
    features = unit_features(frozen, frames[0], seen, device)
    maps = first_map(first, *features.shape[:2]).to(device)
    start, last = (features, maps), deque[tuple[Tensor, Tensor]](maxlen=n_last)
    yield first
    for frame in frames[1:]:
        features = unit_features(frozen, frame, seen, device)
        maps = propagate(features, [start, *last], reach or max(features.shape[:2]), topk)
        last.append((features, maps))
        yield to_labels(maps, seen, first.shape)


# ---------------------------------------------------------------------------------------------
# Scores, as in Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object
# Segmentation" (2016)
# ---------------------------------------------------------------------------------------------


def boundary_accuracy(masks: Tensor, truth: Tensor) -> Tensor:
    """F, harmonic mean of the precision and the recall of the boundary, bool (K, H, W) -> (K,).

    A boundary pixel is right if the other boundary is within 0.008 of the image's diagonal, rounded up to
    pixels. 1 where both boundaries are empty.
    """
    radius = math.ceil(0.008 * math.hypot(*masks.shape[1:]))
    drawn, real = boundary(masks), boundary(truth)
    precision = share((drawn & dilate(real, radius)).sum(dim=(1, 2)), drawn.sum(dim=(1, 2)))
    recall = share((real & dilate(drawn, radius)).sum(dim=(1, 2)), real.sum(dim=(1, 2)))
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def boundary(masks: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbour: bool (K, H, W) -> (K, H, W)."""
    padded = F.pad(masks.float(), (0, 1, 0, 1), mode="replicate") > 0
    right, lower, lower_right = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (masks != right) | (masks != lower) | (masks != lower_right)


def dilate(masks: Tensor, radius: int) -> Tensor:
    """Pixels at most `radius` away from a mask: bool (K, H, W) -> (K, H, W).

    The disc is a run of pixels in each row; sums along the rows tell whether a run meets the mask. A
    convolution would take a hundred times as long.
    """
    H, W = masks.shape[1:]
    sums = F.pad(masks.int(), (radius + 1, radius, radius, radius)).cumsum(dim=2, dtype=torch.int32)
    near = torch.zeros_like(masks)
    for shift in range(2 * radius + 1):
        half = math.isqrt(radius**2 - (shift - radius) ** 2)
        rows = sums[:, shift : shift + H]
        end, start = radius + half + 1, radius - half
        near |= rows[:, :, end : end + W] > rows[:, :, start : start + W]
    return near


def score(labels: np.ndarray, truth: np.ndarray, objects: Sequence[int]) -> Tensor:
    """J and F of the objects with these numbers in one frame, (objects, 2), from labels (H, W).

    J, the region similarity, is the Jaccard index; F is the boundary accuracy.
    """
    numbers = torch.tensor(objects)[:, None, None]
    counted = torch.from_numpy(truth != VOID)
    masks, real = ((torch.from_numpy(part) == numbers) & counted for part in (labels, truth))
    return torch.stack([jaccard(masks, real), boundary_accuracy(masks, real)], dim=1)


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def save_mask(labels: np.ndarray, palette: list[int] | None, path: Path) -> None:
    """Save labels (H, W) as an indexed PNG with these colours, or as grey levels without a palette.

    The file is written whole or not at all. Raises OSError.
    """
    image = Image.fromarray(labels)
    if palette:
        image.putpalette(palette)
    with replacing(path) as file:
        image.save(file, "PNG")


def segment(
    frozen: Frozen, clip: Clip, folder: Path, n_last: int, reach: int, topk: int, device: torch.device
) -> dict[str, Tensor]:
    """Write the masks of a clip; prints and returns J and F, (2,), of each object, CLIP_NUMBER.

    Without true masks, there are none. Raises UserError for a file that cannot be read.
    """
    mask, palette = read_mask_and_palette(clip.masks[0])
    first = without_void(mask)
    objects, scored, found = np.unique(first[first > 0]).tolist(), set(clip.scored), []
    seen = input_size(*clip.size, patch_size_of(frozen.network))
    unknown: set[int] = set()
    masks = track(frozen, clip.frames, first, seen, n_last, reach, topk, device)
    for path, labels in zip(clip.masks, masks, strict=True):
        if path in scored:
            truth = read_mask(path)
            found.append(score(labels, truth, objects))
            unknown |= set(np.unique(truth).tolist()) - {0, *objects, VOID}
        save_mask(labels, palette, folder / path.name)
    if unknown:
        log(f"note: {clip.name}: not in the first mask, so not scored: objects {sorted(unknown)}")
    facts = f"{counted(len(objects), 'object')} in {counted(len(clip.frames), 'frame')}"
    log(f"{clip.name}: {facts}, seen at {size_words(seen)} pixels: {folder}")
    if not found:
        return {}
    scores = zip(objects, torch.stack(found).mean(dim=0), strict=True)
    named = {f"{clip.name}_{number}": both for number, both in scores}
    for name, both in named.items():
        log("{}: J {:.4f}, F {:.4f}".format(name, *both.tolist()))
    return named


def report(scores: dict[str, Tensor], paper: tuple[float, ...] | None) -> dict[str, dict[str, float]]:
    """Print the means of J and F, (2,) of each object, and the paper's; return the own, and each object's."""
    result = {name: dict(zip("JF", both.tolist(), strict=True)) for name, both in scores.items()}
    if result:
        J, F_ = torch.stack(list(scores.values())).mean(dim=0).tolist()
        result["mean"] = {"J&F": (J + F_) / 2, "J": J, "F": F_}
        log(f"mean of {counted(len(result) - 1, 'object')}: J&F {(J + F_) / 2:.4f}, J {J:.4f}, F {F_:.4f}")
    if result and paper:
        log("paper, Table 5: J&F {:.3f}, J {:.3f}, F {:.3f}".format(*paper))
    return result


def paper_result(weights: str, clips: list[Clip]) -> tuple[float, ...] | None:
    """The paper's J&F, J and F; None for weights or clips that are not the paper's."""
    is_davis = {clip.name for clip in clips} == DAVIS_VAL and all(min(clip.size) == 480 for clip in clips)
    return PAPER.get(weights) if is_davis else None


def load_network(args: argparse.Namespace) -> Frozen:
    """Load the network by the flags. ImageNet's deviation is replaced by `STD`. Raises UserError."""
    frozen = load_backbone(args.pretrained_weights, args.checkpoint_key, args.arch, args.patch_size)
    frozen.require_rgb("the benchmark's frames")
    if frozen.std == IMAGENET_STD:
        frozen = frozen._replace(std=STD)
    confirm_network(frozen, "shorter side 480 pixels")
    return frozen


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Segment all clips; print and return J and F of each object, CLIP_NUMBER, and their mean."""
    if cli.leaves_work_to_first():
        return {}
    device = choose_device()
    fix_random_seeds(args.seed)
    cli.warn_no_effect(args, get_args_parser(), [("bs", True, "frames are read one by one")])
    output_dir = cli.make_folder(args.output_dir)
    clips = open_clips(args.data_path)
    check_outputs(clips, output_dir)
    frozen = load_network(args)
    frozen.network.to(device)
    flags = args.n_last_frames, args.size_mask_neighborhood, args.topk
    found = {clip.name: segment(frozen, clip, output_dir / clip.name, *flags, device) for clip in clips}
    if unscored := [name for name, scores in found.items() if not scores]:
        what = "without masks between the first and the last frame"
        log(f"note: J and F were not computed for {len(unscored)} of {len(clips)} clips, {what}")
    scores = {name: both for scores in found.values() for name, both in scores.items()}
    return report(scores, paper_result(args.pretrained_weights, clips))


if __name__ == "__main__":
    cli.run_script(main, parse_args())
