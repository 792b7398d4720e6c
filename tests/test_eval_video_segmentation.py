import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.ExifTags import Base

import eval_video_segmentation as video
from support.backbones import build_backbone
from support.errors import ImageError, UserError
from tests.conftest import ROOT, call, picture, run_on_full_disk

RANDOM = ("--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "32")
VIDEO3 = ("--n_last_frames", "3", "--size_mask_neighborhood", "0", "--topk", "7")
PALETTE = [0, 0, 0, 10, 200, 30, 250, 60, 90]


def square(left: int, number: int = 1, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A mask with one square object, with colours of its own."""
    mask = Image.new("P", size)
    mask.putpalette(PALETTE)
    mask.paste(number, (left, 16, left + 16, 32))
    return mask


def make_clip(root: Path, name: str = "clip", masks: int = 4, size: tuple[int, int] = (64, 48)) -> Path:
    """Four frames in which a square moves to the right, with the masks of the first few; the data set."""
    for folder in (video.FRAMES, video.MASKS):
        (root / folder / name).mkdir(parents=True)
    for t in range(4):
        mask, frame = square(8 + 4 * t, size=size), picture(0, size)
        frame.paste((250, 20, 20), mask=mask.point(lambda number: 255 * number, "L"))
        frame.save(root / video.FRAMES / name / f"{t:05}.jpg", quality=95)
        if t < masks:
            mask.save(root / video.MASKS / name / f"{t:05}.png")
    listed = root / video.CLIPS
    listed.parent.mkdir(parents=True, exist_ok=True)
    with open(listed, "a") as file:
        file.write(f"{name}\n")
    return root


def segment(data: Path, output: Path, *flags) -> dict:
    weights = () if "--pretrained_weights" in flags else RANDOM
    return call(video, "--data_path", data, "--output_dir", output, *weights, *flags)


# ---------------------------------------------------------------------------------------------
# The published numbers
# ---------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, np.ndarray]:
    """All masks below a folder, by clip and frame."""
    paths = sorted(folder.glob("*/*.png"))
    return {f"{path.parent.name}/{path.stem}": video.read_mask(path) for path in paths}


@pytest.mark.parametrize(("name", "flags"), [("video", ()), ("video3", VIDEO3)])
def test_masks_and_scores_are_the_published_ones(paper_inputs, published, tmp_path, name, flags):
    data = paper_inputs / "davis"
    weights = "--pretrained_weights", paper_inputs / "weights.pth", "--arch", "vit_tiny"
    result = segment(data, tmp_path, *weights, *flags)
    own, theirs = read(tmp_path), read(ROOT / "tests" / "data" / "masks" / name)
    assert own.keys() == theirs.keys() == published[name].keys()
    for frame, mask in own.items():
        assert (mask == theirs[frame]).mean() >= 0.998, frame
        counts = np.bincount(mask.ravel(), minlength=3)
        np.testing.assert_allclose(counts, published[name][frame], atol=0.002 * mask.size)
    for label, values in published[f"{name} J and F"].items():
        assert result[label] == pytest.approx(values, abs=0.002), label


@pytest.mark.parametrize("name", ["video", "video3"])
def test_scores_of_the_published_masks_are_the_benchmarks(paper_inputs, published, name):
    scores = {}
    for clip in video.open_clips(str(paper_inputs / "davis")):
        folder = ROOT / "tests" / "data" / "masks" / name / clip.name
        masks = [(video.read_mask(folder / m.name), video.read_mask(m)) for m in clip.scored]
        means = torch.stack([video.score(*both, [1, 2]) for both in masks]).mean(dim=0)
        scores |= {f"{clip.name}_{number}": mean for number, mean in enumerate(means, 1)}
    result = video.report(scores, None)
    assert result.keys() == published[f"{name} J and F"].keys()
    for label, values in published[f"{name} J and F"].items():
        assert result[label] == pytest.approx(values, abs=6e-5), label  # four digits were kept


# ---------------------------------------------------------------------------------------------
# Frames and masks in
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "patch_size", "seen"),
    [
        ((480, 854), 16, (480, 832)),
        ((854, 480), 16, (832, 480)),
        ((480, 1152), 8, (480, 1152)),
        ((480, 480), 16, (480, 448)),
        ((120, 200), 16, (480, 768)),
        ((168, 120), 16, (640, 480)),
        ((480, 854), 14, (476, 826)),  # whole patches
    ],
)
def test_the_size_that_the_network_sees(frame, patch_size, seen):
    assert video.input_size(*frame, patch_size) == seen


def test_resizing_is_opencvs():
    """cv2.resize(image, (5, 3)) of this image, with its default interpolation."""
    image = (np.arange(7)[:, None] * 31 + np.arange(11) * 17 + np.arange(11) ** 2) % 256
    expected = [[31, 76, 130, 195, 64], [104, 149, 203, 11, 85], [176, 221, 19, 84, 157]]
    pixels = torch.from_numpy(np.stack([image] * 3).astype(np.uint8))
    assert video.resize(pixels, (3, 5))[1].tolist() == expected


def test_the_deviation_is_the_published_one_for_imagenets_and_a_models_own_otherwise(tmp_path):
    network = build_backbone("vit_nano", 32, 64)[0]
    teacher = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    record = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    torch.save({"teacher": teacher, "normalization": record}, tmp_path / "own.pth")
    torch.save({"teacher": teacher}, tmp_path / "imagenet.pth")
    for name, std in (("own", (0.25, 0.25, 0.25)), ("imagenet", (0.228, 0.224, 0.225))):
        args = video.parse_args(["--pretrained_weights", str(tmp_path / f"{name}.pth")])
        assert video.load_network(args).std == std


def test_the_first_map_takes_the_pixel_nearest_to_the_centre_of_each_patch(capsys):
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, 6:], mask[6, 10] = (
        1,
        2,
    )  # of the 2 x 3 patches of 4 x 4 pixels, a corner and a half, and a centre
    maps = video.first_map(mask, 2, 3)
    assert maps.shape == (2, 3, 3) and (maps.sum(dim=-1) == 1).all()
    assert maps.argmax(dim=-1).tolist() == [[0, 1, 1], [0, 0, 2]]
    assert not capsys.readouterr().out
    mask[6, 10], mask[7, 11] = 0, 2
    assert video.first_map(mask, 2, 3)[..., 2].sum() == 0
    assert capsys.readouterr().out == "warning: objects too small for the grid of patches: 2\n"


# ---------------------------------------------------------------------------------------------
# Propagation
# ---------------------------------------------------------------------------------------------


def brute_force(target, context, reach, topk):
    """One patch at a time, with the affinities written out."""
    R, C, _ = target.shape
    result = torch.zeros(R, C, context[0][1].shape[-1])
    for row in range(R):
        for col in range(C):
            found = []
            for features, maps in context:
                for r in range(max(0, row - reach), min(R, row + reach + 1)):
                    for c in range(max(0, col - reach), min(C, col + reach + 1)):
                        affinity = (target[row, col] @ features[r, c] / 0.1).exp().item()
                        found.append((affinity, maps[r, c]))
            best = sorted(found, key=lambda pair: -pair[0])[:topk]
            result[row, col] = sum(a * m for a, m in best) / sum(a for a, _ in best)
    return result


@pytest.mark.parametrize("chunk", [1, 500, 2**25])
@pytest.mark.parametrize(("reach", "topk"), [(2, 5), (1, 40), (100_000, 3)])
def test_propagation_equals_the_formula(monkeypatch, chunk, reach, topk):
    monkeypatch.setattr(video, "CHUNK", chunk)  # the targets in several parts or in one
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(4, 5, 7, 6, generator=generator), dim=-1)
    maps = torch.rand(3, 5, 7, 3, generator=generator).softmax(dim=-1)
    context = list(zip(features[1:], maps, strict=True))
    own = video.propagate(features[0], context, reach, topk)
    torch.testing.assert_close(own, brute_force(features[0], context, reach, topk))


def test_propagation_and_resizing_stay_on_the_device():
    """torch's meta device refuses tensors that were left on the CPU."""
    features, maps = torch.empty(5, 7, 6, device="meta"), torch.empty(5, 7, 3, device="meta")
    assert video.propagate(features, [(features, maps)] * 3, 2, 5).device.type == "meta"
    pixels = torch.empty(3, 8, 9, dtype=torch.uint8, device="meta")
    assert video.resize(pixels, (4, 5)).device.type == "meta"


def test_each_class_is_scaled_before_the_largest_wins():
    """A weak object wins where it is near its own largest value; a constant class keeps its value."""
    maps = torch.tensor([[[0.9, 0.1, 0.0], [0.7, 0.3, 0.0]]])  # (1, 2, 3)
    assert video.to_labels(maps, (2, 4), (2, 4)).tolist() == [[0, 0, 1, 1]] * 2
    everywhere = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    assert video.to_labels(everywhere, (2, 4), (1, 2)).tolist() == [[1, 1]]


def test_labels_are_enlarged_as_soft_maps_and_return_to_the_frames_size_by_the_nearest():
    maps = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    labels = video.to_labels(maps, (8, 8), (8, 8))
    # Bilinear between four patches: the boundary is round, not the patch's corner.
    assert labels[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and labels[3].sum() < labels[0].sum()
    assert np.array_equal(video.to_labels(maps, (8, 8), (4, 4)), labels[1::2, 1::2])


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


def drawn(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (60, 80)) -> torch.Tensor:
    """A mask for each box (top, bottom, left, right)."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_region_similarity_by_hand():
    masks, truth = (
        drawn((0, 10, 0, 10), (0, 0, 0, 0), (0, 0, 0, 0)),
        drawn((0, 10, 5, 15), (0, 0, 0, 0), (0, 1, 0, 1)),
    )
    assert video.jaccard(masks, truth).tolist() == pytest.approx([50 / 150, 1, 0])


def test_boundary_pixels_differ_from_a_neighbour_to_the_right_or_below():
    edge = video.boundary(drawn((1, 3, 1, 3), size=(4, 4)))[0].int()
    assert edge.tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    cut = video.boundary(drawn((0, 4, 2, 4), size=(4, 4)))[0].int()  # no boundary at the image's edge
    assert cut.tolist() == [[0, 1, 0, 0]] * 4


def test_dilation_is_by_a_disc():
    point = drawn((5, 6, 5, 6), size=(11, 11))
    rows, cols = (torch.arange(11) - 5).square(), (torch.arange(11) - 5).square()
    for radius in (1, 2, 3):
        assert torch.equal(video.dilate(point, radius)[0], rows[:, None] + cols <= radius**2)
    assert video.dilate(drawn((0, 1, 0, 1), size=(4, 4)), 1).sum() == 3


def test_boundaries_may_be_off_by_the_tolerance():
    """Of 60 x 80 pixels, 0.008 of the diagonal is 0.8, so one pixel is near enough and two are not."""
    truth = drawn((10, 30, 10, 30))
    assert video.boundary_accuracy(drawn((10, 30, 11, 31)), truth).item() == 1
    two_off = video.boundary_accuracy(drawn((10, 30, 12, 32)), truth).item()
    assert 0 < two_off < 1
    large = 90, 120  # 1.2 pixels, rounded up
    right, moved = drawn((10, 30, 10, 30), size=large), drawn((10, 30, 12, 32), size=large)
    assert video.boundary_accuracy(moved, right).item() == 1
    empty = drawn((0, 0, 0, 0))
    assert video.boundary_accuracy(empty, truth).item() == video.boundary_accuracy(truth, empty).item() == 0
    assert video.boundary_accuracy(empty, empty).item() == 1


def test_precision_and_recall_of_the_boundary_differ():
    """A second square of the same size halves the precision: F = 2 (1/2) 1 / (1/2 + 1)."""
    truth, both = drawn((10, 20, 10, 20)), drawn((10, 20, 10, 20)) | drawn((40, 50, 40, 50))
    assert video.boundary_accuracy(both, truth).item() == pytest.approx(2 / 3)
    assert video.boundary_accuracy(truth, both).item() == pytest.approx(2 / 3)


def test_objects_that_both_lack_are_right_and_void_pixels_do_not_count():
    labels, truth = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    labels[10:20, 10:20] = truth[10:20, 10:20] = 1
    assert video.score(labels, truth, [1, 2, 3]).tolist() == [[1, 1]] * 3
    labels[40:50, 40:50] = 3
    assert video.score(labels, truth, [1, 2, 3]).tolist() == [[1, 1], [1, 1], [0, 0]]
    truth[40:50, 40:50] = video.VOID
    assert video.score(labels, truth, [1, 2, 3]).tolist() == [[1, 1]] * 3


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def test_masks_are_indexed_images_in_the_colours_of_the_first_one(tmp_path, capsys):
    data, output = make_clip(tmp_path / "data"), tmp_path / "output"
    (output / "clip").mkdir(parents=True)
    (output / "clip" / "notes.txt").write_text("kept")
    result = segment(data, output)
    said = capsys.readouterr().out.splitlines()
    assert set(result) == {"clip_1", "mean"}
    J, F_ = result["clip_1"]["J"], result["clip_1"]["F"]
    assert said[-2:] == [
        f"clip_1: J {J:.4f}, F {F_:.4f}",
        f"mean of 1 object: J&F {(J + F_) / 2:.4f}, J {J:.4f}, F {F_:.4f}",
    ]
    assert (output / "clip" / "notes.txt").read_text() == "kept"
    assert len(list((output / "clip").glob("*.png"))) == 4
    for path in (output / "clip").glob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "P" and image.size == (64, 48) and image.getpalette()[:9] == PALETTE
    first = video.read_mask(output / "clip" / "00000.png")
    assert np.array_equal(first, video.read_mask(data / video.MASKS / "clip" / "00000.png"))


def test_the_first_and_the_last_frame_are_not_scored(tmp_path):
    data = make_clip(tmp_path / "data")
    result = segment(data, tmp_path / "output")
    square(40).save(data / video.MASKS / "clip" / "00003.png")
    assert segment(data, tmp_path / "output") == result
    (data / video.MASKS / "clip" / "00003.png").unlink()
    assert segment(data, tmp_path / "output") == result
    square(40).save(data / video.MASKS / "clip" / "00002.png")
    assert segment(data, tmp_path / "output") != result
    found = video.read_mask(tmp_path / "output" / "clip" / "00001.png")
    for t in (1, 2):
        Image.fromarray(video.read_mask(tmp_path / "output" / "clip" / f"0000{t}.png")).save(
            data / video.MASKS / "clip" / f"0000{t}.png"
        )
    assert found.any() and segment(data, tmp_path / "output")["mean"] == {"J&F": 1, "J": 1, "F": 1}


def test_a_clip_with_its_first_mask_only_is_segmented_but_not_scored(tmp_path, capsys):
    data = make_clip(tmp_path / "data", masks=1)
    assert segment(data, tmp_path / "output") == {}
    assert "J and F were not computed for 1 of 1 clips" in capsys.readouterr().out
    assert len(list((tmp_path / "output" / "clip").glob("*.png"))) == 4
    make_clip(data, "other")
    assert set(segment(data, tmp_path / "output")) == {"other_1", "mean"}
    assert "J and F were not computed for 1 of 2 clips" in capsys.readouterr().out


def test_only_numbers_in_the_first_mask_are_objects(tmp_path, capsys):
    """A missing number, whose mask is always right, would raise the mean."""
    result = segment(make_clip(tmp_path / "data"), tmp_path / "output")
    for path in (tmp_path / "data" / video.MASKS / "clip").iterdir():
        Image.fromarray(200 * video.read_mask(path)).save(path)
    renumbered = segment(tmp_path / "data", tmp_path / "output")
    assert list(renumbered) == ["clip_200", "mean"] and renumbered["mean"] == result["mean"]
    assert " 1 object" in capsys.readouterr().out


def test_objects_that_come_later_are_not_scored(tmp_path, capsys):
    data = make_clip(tmp_path / "data")
    square(8, number=3).save(data / video.MASKS / "clip" / "00002.png")
    assert set(segment(data, tmp_path / "output")) == {"clip_1", "mean"}
    assert "note: clip: not in the first mask, so not scored: objects [3]\n" in capsys.readouterr().out


def test_pixels_that_are_not_scored_are_background_and_no_object(tmp_path, capsys):
    data = make_clip(tmp_path / "data")
    for path in (data / video.MASKS / "clip").iterdir():
        mask = video.read_mask(path)
        mask[:4] = video.VOID
        Image.fromarray(mask).save(path)
    assert set(segment(data, tmp_path / "output")) == {"clip_1", "mean"}
    assert "not in the first mask" not in capsys.readouterr().out
    with Image.open(tmp_path / "output" / "clip" / "00000.png") as image:
        assert image.mode == "L" and image.getextrema() == (0, 1)


def test_frames_are_read_when_they_are_needed(tmp_path):
    data = make_clip(tmp_path / "data")
    frame = data / video.FRAMES / "clip" / "00002.jpg"
    frame.write_bytes(frame.read_bytes()[:700])  # its header is whole
    with pytest.raises(ImageError, match="cannot read image: .*00002.jpg"):
        segment(data, tmp_path / "output")
    written = sorted(path.name for path in (tmp_path / "output" / "clip").iterdir())
    assert written == ["00000.png", "00001.png"]


def test_only_the_context_is_kept(tmp_path):
    args = video.parse_args([*RANDOM])
    frozen = video.load_network(args)
    clip = video.open_clips(str(make_clip(tmp_path)))[0]
    first = video.read_mask(clip.masks[0])
    masks = video.track(frozen, clip.frames, first, (96, 128), 1, 12, 5, torch.device("cpu"))
    kept = [len(masks.gi_frame.f_locals["last"]) for _ in masks]
    assert kept == [0, 1, 1, 1]


def test_timms_vits_are_evaluated_too(tmp_path):
    flags = "--pretrained_weights", "random", "--arch", "vit_tiny_patch16_224"
    result = segment(make_clip(tmp_path / "data"), tmp_path / "output", *flags)
    assert 0 < result["mean"]["J"] <= 1
    assert len(list((tmp_path / "output" / "clip").glob("*.png"))) == 4


def test_numbers_without_leading_zeros_are_in_order(tmp_path):
    for number in (1, 2, 10, 9):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "._1.jpg").touch()
    (tmp_path / "1.txt").touch(), (tmp_path / "3.jpg").mkdir()
    assert [path.name for path in video._files(tmp_path, ".jpg").values()] == [
        "1.jpg",
        "2.jpg",
        "9.jpg",
        "10.jpg",
    ]


def test_the_papers_result_stands_beside_its_own_weights_and_data_only():
    def clips(names, size=(480, 854)):
        return [video.Clip(name, [], [], size) for name in names]

    for both, J, F_ in video.PAPER.values():
        assert both == pytest.approx((J + F_) / 2, abs=6e-4)
    assert len(video.DAVIS_VAL) == 30
    assert video.paper_result("dino_vits16", clips(video.DAVIS_VAL)) == (0.618, 0.602, 0.634)
    assert video.paper_result("checkpoint.pth", clips(video.DAVIS_VAL)) is None
    assert video.paper_result("dino_vits16", clips(sorted(video.DAVIS_VAL)[:29])) is None
    assert video.paper_result("dino_vits16", clips(video.DAVIS_VAL, (1080, 1920))) is None


def test_the_papers_result_is_printed(capsys):
    video.report({"clip_1": torch.tensor([0.5, 0.7])}, (0.618, 0.602, 0.634))
    assert capsys.readouterr().out.splitlines() == [
        "mean of 1 object: J&F 0.6000, J 0.5000, F 0.7000",
        "paper, Table 5: J&F 0.618, J 0.602, F 0.634",
    ]


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def no_list(data):
    (data / video.CLIPS).unlink()


def empty_list(data):
    (data / video.CLIPS).write_text("\n\n")


def a_path_in_the_list(data):
    (data / video.CLIPS).write_text("../clip\n")


def the_folder_above_in_the_list(data):
    (data / video.CLIPS).write_text("..\n")


def no_folder(data):
    (data / video.CLIPS).write_text("clip\nnowhere\n")


def no_frames(data):
    for path in (data / video.FRAMES / "clip").iterdir():
        path.unlink()


def no_first_mask(data):
    (data / video.MASKS / "clip" / "00000.png").unlink()


def no_masks(data):
    shutil.rmtree(data / video.MASKS / "clip")


def a_mask_of_another_size(data):
    square(8, size=(48, 64)).save(data / video.MASKS / "clip" / "00002.png")


def a_frame_of_another_size(data):
    picture(0, (64, 50)).save(data / video.FRAMES / "clip" / "00003.jpg")


def a_missing_mask(data):
    (data / video.MASKS / "clip" / "00002.png").unlink()


def a_mask_without_a_frame(data):
    square(8).save(data / video.MASKS / "clip" / "00004.png")


def a_mask_in_colours(data):
    square(8).convert("RGB").save(data / video.MASKS / "clip" / "00001.png")


def a_broken_mask(data):
    (data / video.MASKS / "clip" / "00001.png").write_text("not an image")


def a_first_mask_cut_short(data):
    path = data / video.MASKS / "clip" / "00000.png"
    path.write_bytes(path.read_bytes()[:-40])


def a_later_mask_cut_short(data):
    path = data / video.MASKS / "clip" / "00002.png"
    path.write_bytes(path.read_bytes()[:-40])


def a_mask_of_jpeg_data(data):
    square(8).convert("L").save(data / video.MASKS / "clip" / "00001.png", "JPEG")


def a_frame_of_another_kind(data):
    picture(0, (64, 48)).save(data / video.FRAMES / "clip" / "00001.png")


def a_frame_twice(data):
    picture(0, (64, 48)).save(data / video.FRAMES / "clip" / "00001.JPG", "JPEG")


def no_object(data):
    square(8, number=0).save(data / video.MASKS / "clip" / "00000.png")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (no_list, r"^No such file or directory \(.*val.txt\): give the folder"),
        (empty_list, r"^no name in the list \(.*val.txt\)"),
        (a_path_in_the_list, r"^\.\./clip is not the name of a folder \(.*val.txt\)"),
        (the_folder_above_in_the_list, r"^\.\. is not the name of a folder \(.*val.txt\)"),
        (no_folder, r"^clip nowhere has no folder \(.*480p/nowhere\)"),
        (no_frames, r"^clip clip has no frames \(.*480p/clip\)"),
        (no_first_mask, r"^clip clip has no mask of its first frame \(.*clip/00000.png\)"),
        (no_masks, r"^clip clip has no mask of its first frame \(.*clip/00000.png\)"),
        (a_mask_of_another_size, r"^48 x 64 pixels, but .* 64 x 48 \(.*clip/00002.png\)"),
        (a_frame_of_another_size, r"^64 x 50 pixels, but .* 64 x 48 \(.*clip/00003.jpg\)"),
        (a_missing_mask, r"^clip clip lacks 1 of 4 masks \(.*clip/00002.png\)"),
        (a_mask_without_a_frame, r"^mask without a frame in clip clip \(.*clip/00004.png\)"),
        (a_mask_in_colours, r"^mask has Pillow's mode RGB, not 8-bit numbers \(.*clip/00001.png\)"),
        (a_broken_mask, r"^cannot read image: .*\(.*clip/00001.png\): repair it"),
        (a_first_mask_cut_short, r"^cannot read (mask|image): .*\(.*clip/00000.png\): repair"),
        (a_later_mask_cut_short, r"^cannot read (mask|image): .*\(.*clip/00002.png\): repair"),
        (a_mask_of_jpeg_data, r"^mask is a JPEG, which changes numbers at edges \(.*clip/00001.png\)"),
        (
            a_frame_of_another_kind,
            r"^extension is not .jpg \(.*clip/00001.png\): rename or convert it, or remove it",
        ),
        (a_frame_twice, r"^two files with the same number: 00001.JPG \(.*clip/00001.jpg\): remove one"),
        (no_object, r"^the mask of the first frame has no object \(.*clip/00000.png\)"),
    ],
)
def test_bad_data_is_refused_before_the_work_begins(tmp_path, harm, message):
    data = make_clip(make_clip(tmp_path / "data", "before"), "clip")
    harm(data)
    with pytest.raises(UserError, match=message) as error:
        segment(data, tmp_path / "output")
    assert error.value.exit_code == 2
    assert not list((tmp_path / "output").rglob("*.png"))


def test_the_data_set_is_not_overwritten(tmp_path):
    data = make_clip(tmp_path / "data")
    with pytest.raises(UserError, match=r"would overwrite the data set \(.*clip/00000.png\)"):
        segment(data, data / video.MASKS)
    assert video.read_mask(data / video.MASKS / "clip" / "00001.png").sum() == 256


def test_the_data_set_is_not_overwritten_through_another_name(tmp_path):
    data = make_clip(tmp_path / "data")
    (tmp_path / "output" / "clip").mkdir(parents=True)
    (tmp_path / "output" / "clip" / "00001.png").hardlink_to(data / video.MASKS / "clip" / "00001.png")
    with pytest.raises(UserError, match=r"would overwrite the data set \(.*output/clip/00001.png\)"):
        segment(data, tmp_path / "output")
    assert not (tmp_path / "output" / "clip" / "00000.png").exists()


def test_masks_are_written_whole_or_not_at_all(tmp_path):
    data, output = make_clip(tmp_path / "data"), tmp_path / "output"
    folders = "--data_path", data, "--output_dir", output
    segment(data, output)
    before = (output / "clip" / "00000.png").read_bytes()
    ended = run_on_full_disk("eval_video_segmentation", 64, *folders, *RANDOM)
    assert ended.returncode == 1 and "error: File too large" in ended.stderr
    assert (output / "clip" / "00000.png").read_bytes() == before and len(before) > 64


def test_frames_and_masks_of_capital_extensions_count_too(tmp_path):
    data = make_clip(tmp_path / "data")
    usual = segment(data, tmp_path / "usual")
    (data / video.FRAMES / "clip" / "00001.jpg").rename(data / video.FRAMES / "clip" / "00001.JPG")
    (data / video.MASKS / "clip" / "00002.png").rename(data / video.MASKS / "clip" / "00002.PNG")
    (data / video.CLIPS).write_text("\ufeffclip\n", encoding="utf-8")  # as Windows' editor saves it
    assert segment(data, tmp_path / "output") == usual


@pytest.mark.parametrize("orientation", [2, 3])
def test_frames_that_viewers_turn_are_named(tmp_path, capsys, orientation):
    data = make_clip(tmp_path / "data")
    path = data / video.FRAMES / "clip" / "00002.jpg"
    turned = Image.Exif()
    turned[Base.Orientation] = orientation
    with Image.open(path) as frame:
        frame.save(path, quality=95, exif=turned)
    segment(data, tmp_path / "output")
    said = "warning: 1 of 4 checked images are stored turned or mirrored (EXIF orientation): masks must"
    assert f"{said} fit them as stored; e.g. {path}" in capsys.readouterr().out.splitlines()


def test_masks_numbered_anew_are_named(tmp_path, capsys):
    data = make_clip(tmp_path / "data")
    other = square(16, number=2)
    other.putpalette([0, 0, 0, 250, 60, 90, 10, 200, 30])  # the same colour has another number
    other.save(data / video.MASKS / "clip" / "00002.png")
    segment(data, tmp_path / "output")
    assert "warning: masks have different palettes" not in capsys.readouterr().out  # 1 is in no other mask
    other = square(16)
    other.putpalette([*PALETTE[:5], 90])  # the blue of 1
    other.save(data / video.MASKS / "clip" / "00002.png")
    segment(data, tmp_path / "output")
    assert "warning: masks have different palettes, but only the numbers count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained_weights", "pixels"], "Pixels has no patch tokens: use one of our ViTs"),
        (
            ["--pretrained_weights", "random", "--arch", "resnet18"],
            "ResNet has no patch tokens: use one of our ViTs",
        ),
        (["--data_path", "/nowhere"], r"no such folder \(--data_path /nowhere\)"),
        (["--output_dir", __file__], "File exists .*--output_dir"),
    ],
)
def test_bad_usage_is_one_clear_line(tmp_path, flags, message):
    data = make_clip(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        segment(data, tmp_path / "output", *flags)
    assert not list((tmp_path / "output").rglob("*.png"))


def test_the_published_size_of_a_batch_of_frames_has_no_effect(tmp_path, capsys):
    segment(make_clip(tmp_path / "data"), tmp_path / "output", "--bs", "2")
    assert "warning: --bs has no effect" in capsys.readouterr().out
