import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import nn

import eval_segmentation
from eval_segmentation import (
    VOC_CLASSES,
    AttentionScores,
    MaskedFiles,
    MaskedShapes,
    count_pixels,
    intersection_over_union,
    is_voc12,
    jaccard,
    knn_segmenter,
    patch_labels,
    report_attention,
    resized_batches,
    sample_tokens,
    score_attention,
    segment,
)
from support import logistic
from support.backbones import build_backbone
from support.errors import UserError, WrongFormat
from support.masks import read_mask
from support.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize, to_pixels
from support.weights import Frozen
from tests.conftest import call, run

RANDOM_VIT = "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 32".split()
CPU = torch.device("cpu")
COLOURS = {0: (40, 40, 40), 1: (220, 40, 40), 3: (40, 40, 220)}  # of the classes


def write_voc(root, train: int = 6, val: int = 4, size: tuple[int, int] = (48, 32)) -> None:
    """Images with a red and a blue rectangle, in VOC's layout; one row of pixels is void."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split} {i}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            mask = np.zeros(size[::-1], np.uint8)
            for number, left in ((1, 0), (3, size[0] // 2)):
                x, y = left + rng.integers(0, 8), rng.integers(0, 12)
                mask[y : y + 16, x : x + 16] = number
            colours = np.zeros((256, 3), np.uint8)
            colours[list(COLOURS)] = list(COLOURS.values())
            Image.fromarray(colours[mask]).save(root / f"JPEGImages/{name}.png")
            mask[-1] = 255
            picture = Image.fromarray(mask)
            picture.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
            picture.save(root / f"SegmentationClass/{name}.png")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    write_voc(root)
    return root


def evaluate(*flags) -> dict:
    return call(eval_segmentation, *flags, "--num_workers", 0)


class Pixels(nn.Module):
    """A network whose patches are pixels and whose tokens are their colours; it has no attention."""

    def forward_intermediates(self, images, **_):
        return [images]


def pixels(image_size: int) -> Frozen:
    return Frozen(Pixels(), image_size, IMAGENET_MEAN, IMAGENET_STD, "", arch="")


# ---- attention


def test_jaccard_by_hand():
    a = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    none = torch.zeros_like(a)
    assert jaccard(a, b).item() == 0.25 and jaccard(a, a).item() == 1
    assert jaccard(a, none).item() == 0 and jaccard(none, none).item() == 1
    assert jaccard(torch.stack([a, b]), b).tolist() == [0.25, 1]


def test_attention_on_one_corner_scores_what_the_corner_does():
    shapes = MaskedShapes("val", 10)
    corner = torch.tensor([[[0.0, 0.7], [0.0, 0.0]], [[0.1, 0.1], [0.1, 0.1]]])  # two heads
    half = shapes.size // 2
    mask = torch.zeros(2 * half, 2 * half, dtype=torch.bool)
    mask[:half, half:] = True
    for i in range(10):
        truth = torch.from_numpy(shapes.mask(i))
        scores = score_attention(corner, shapes.class_mask(i), 0.9)
        share = truth.float().mean()
        expected = torch.stack([jaccard(mask, truth), share])
        torch.testing.assert_close(scores.objects[0], expected)
        torch.testing.assert_close(scores.classes, expected.max()[None])
        torch.testing.assert_close(scores.on_objects[0], torch.stack([truth[mask].float().mean(), share]))
        torch.testing.assert_close(scores.area, share[None])


def test_each_class_takes_its_best_head_and_void_counts_nowhere():
    truth = torch.zeros(4, 8, dtype=torch.uint8)
    truth[:2, :2], truth[2:, 4:6], truth[:2, 6:] = 1, 5, 255
    attention = torch.zeros(2, 2, 4)  # patches of 2 x 2 pixels
    attention[0, 0, 0] = attention[0, 0, 3] = 0.5  # the first head: class 1, and void
    attention[1, 1, 2] = attention[1, 0, 1] = 0.5  # the second head: class 5, and background
    scores = score_attention(attention, truth, 0.99)
    assert scores.classes.item() == pytest.approx((1 + 0.5) / 2)
    assert scores.objects.tolist() == [[pytest.approx(1 / 2), pytest.approx(1 / 3)]]
    assert scores.on_objects.tolist() == [[1, 0.5]]
    assert scores.area.item() == pytest.approx(8 / 28)


def test_one_head_for_all_images_is_the_one_of_the_best_jaccard(capsys):
    objects, on_objects = torch.tensor([[0.2, 0.4], [0.5, 0.45]]), torch.tensor([[0.9, 0.5], [0.9, 0.5]])
    scores = AttentionScores(torch.ones(2), objects, on_objects, torch.tensor([0.1, 0.3]))
    expected = {"jaccard": 100, "jaccard_image": 45, "jaccard_one_head": 42.5, "area": 20}
    assert report_attention(scores, 0.6, 2) == pytest.approx(expected)
    said = capsys.readouterr().out
    assert "head 1 for all images" in said and "of head 1's attention, 50.0 % is on the objects" in said


# ---- patch tokens


def test_a_patch_has_the_class_of_most_of_its_pixels():
    mask = torch.tensor([[0, 0, 7, 7, 255, 255], [0, 7, 7, 3, 255, 3]], dtype=torch.uint8)
    assert patch_labels(mask, 1, 3).tolist() == [[0, 7, 255]]
    assert patch_labels(mask, 2, 3).tolist() == [[0, 7, 255], [0, 3, 3]]  # of two, the lower number


def test_a_sample_of_patches_is_bounded_and_follows_the_seed(voc):
    images, frozen = MaskedFiles(voc, "train"), pixels(32)  # patches of 1 x 1.5 pixels

    def sample(limit, seed=0, batch_size=4):
        batches = resized_batches(frozen, images, CPU, batch_size)
        return sample_tokens(frozen.network, images, batches, limit, seed)

    tokens, labels = sample(100)
    assert tokens.shape == (100, 3) and set(labels.tolist()) == {0, 1, 3}
    for same in (sample(100, batch_size=1), sample(100)):
        assert torch.equal(same[0], tokens) and torch.equal(same[1], labels)
    assert not torch.equal(sample(100, seed=1)[0], tokens)
    few, one_each = sample(4)[0], sample(6)[0]  # fewer than there are images, but not the first ones
    assert len(few) == 4 and not torch.equal(few, one_each[:4])
    whole = sample(10**6)[1]
    assert len(whole) == 6 * 31 * 32 and set(whole.tolist()) == {0, 1, 3}  # all but the void row


def test_each_image_has_a_sample_of_its_own(voc):
    class Places(nn.Module):
        """Its tokens are the numbers of the patches."""

        def forward_intermediates(self, images, **_):
            places = torch.arange(images[0, 0].numel()).view(images.shape[2:])
            return [places.expand(len(images), 1, -1, -1)]

    images = MaskedFiles(voc, "train")
    tokens, _ = sample_tokens(Places(), images, resized_batches(pixels(32), images, CPU), 600, 0)
    assert len(tokens.view(6, 100).unique(dim=0)) == 6


def test_shares_of_the_votes():
    tokens, labels = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 1])
    shares = knn_segmenter(tokens, labels, 2, 0.07, 3)(torch.tensor([[9.0, 0, 0, 0], [0.1, 0.1, 0, 0]]))
    assert shares[0].tolist() == [0.5, 0.5, 0] and shares.sum(dim=1).tolist() == pytest.approx([1, 1])


def test_images_are_resized_to_height_and_width(voc):
    images = MaskedFiles(voc, "train")
    (_, batch), *_ = resized_batches(pixels((24, 16)), images, CPU)
    assert batch.shape[1:] == (3, 24, 16)
    expected = normalize(to_pixels(images[0][0].resize((16, 24), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(batch[0], expected)


def test_pixels_of_known_colours_are_segmented(voc):
    train, val = (MaskedFiles(voc, split) for split in ("train", "val"))
    val_whole = [*resized_batches(pixels(48), val, CPU)]
    frozen = pixels(32)
    tokens, labels = sample_tokens(frozen.network, train, resized_batches(frozen, train, CPU), 500, 0)
    classifiers = {
        "k-NN": knn_segmenter(tokens, labels, 5, 0.07, 4),
        "linear": logistic.fit(tokens, labels, 4, 1e-4),
    }
    # 48 x 48 pixels for 48 x 32 of the mask: blurred where colours meet, and nowhere else.
    found = segment(frozen.network, val, val_whole, classifiers, 4)
    for counts in found.values():
        assert counts.sum() == 4 * 48 * 31  # without void
        scores = intersection_over_union(counts)
        assert scores[2].isnan() and (scores[[0, 1, 3]] > 90).all()


def test_scores_lie_at_the_centres_of_their_patches():
    """Between two patches of two pixels, the scores change from one centre to the other."""
    found = eval_segmentation.enlarge_scores(torch.tensor([[[0.0, 1.0]]]), (1, 4))
    assert found.tolist() == [[[0, 0.25, 0.75, 1]]]


def test_intersection_over_union_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 1], [3, 2, 1, 3]])
    counts = count_pixels(predicted, truth, 5)
    assert counts.sum() == 6 and counts[2].tolist() == [0, 0, 1, 1, 0]
    scores = intersection_over_union(counts)
    assert scores[:3].tolist() == [50, pytest.approx(200 / 3), 50]
    assert scores[3:].isnan().all()  # not in the masks: outside the mean, predicted or not


# ---- the run


def test_a_folder_in_vocs_layout(voc, capsys):
    found = evaluate(*RANDOM_VIT, "--data_path", voc, "--nb_knn", 3)
    said = capsys.readouterr().out
    assert f"train images: {voc}: 6 images, 3 classes" in said and "96 training patches of 6 images" in said
    assert "60% of a head's attention" in said and "the paper's" not in said
    rows = [line.split() for line in said.splitlines()]
    assert [row[0] for row in rows[-4:]] == ["0", "1", "3", "mean"]
    means = [sum(float(row[column]) for row in rows[-4:-1]) / 3 for column in (1, 2)]
    assert [found["k-NN"], found["linear"]] == [pytest.approx(mean, abs=0.1) for mean in means]
    assert (
        min(found["k-NN"], found["linear"]) > 33 and 0 < found["jaccard_one_head"] <= found["jaccard_image"]
    )
    assert evaluate(*RANDOM_VIT, "--data_path", voc, "--nb_knn", 3) == found


def test_images_of_one_channel_and_a_range(tmp_path):
    write_voc(tmp_path)
    for path in list((tmp_path / "JPEGImages").iterdir()):
        with Image.open(path) as image:
            np.save(path.with_suffix(".npy"), 16 * np.asarray(image.convert("L")).astype(np.uint16))
        path.unlink()
    flags = *RANDOM_VIT, "--in_chans", 1, "--value_range", 0, 4080
    assert evaluate(*flags, "--data_path", tmp_path, "--nb_knn", 3)["k-NN"] > 33
    np.save(tmp_path / "JPEGImages" / "val 1.npy", np.zeros((32, 48, 2), np.uint16))
    with pytest.raises(WrongFormat, match="^image has no axis of 1 channels .*val 1.npy"):
        evaluate(*flags, "--data_path", tmp_path)


def test_the_seed_is_that_of_random_weights_and_of_the_sample(voc, tmp_path):
    torch.save(build_backbone("vit_nano", 8, 32)[0].state_dict(), tmp_path / "x.pth")
    stored = "--pretrained_weights", tmp_path / "x.pth"
    for weights, same in ((RANDOM_VIT, False), (stored, True)):
        flags = *weights, "--data_path", voc, "--train_patches", 12, "--seed"
        first, second = evaluate(*flags, 0), evaluate(*flags, 1)
        assert (first["jaccard"] == second["jaccard"]) == same and first["k-NN"] != second["k-NN"]


def test_the_threshold_is_the_flags(voc):
    found = [evaluate(*RANDOM_VIT, "--data_path", voc, "--threshold", t)["jaccard"] for t in (0.2, 0.6)]
    assert found[0] != found[1]


def test_patches_and_temperature_are_the_flags(voc, capsys):
    flags = *RANDOM_VIT, "--data_path", voc, "--train_patches", 40, "--nb_knn", 5, "--temperature"
    found = [evaluate(*flags, t)["k-NN"] for t in (0.001, 10)]
    assert "40 training patches of 6 images, 5 neighbours" in capsys.readouterr().out and found[0] != found[1]


def test_images_without_objects_are_left_out_of_the_attention(tmp_path, capsys):
    write_voc(tmp_path)
    empty = np.zeros((32, 48), np.uint8)
    Image.fromarray(empty).save(tmp_path / "SegmentationClass" / "val 1.png")
    evaluate(*RANDOM_VIT, "--data_path", tmp_path)
    assert "3 images; left out 1 without objects" in capsys.readouterr().out


def test_masks_without_background_are_named(tmp_path, capsys):
    write_voc(tmp_path)
    MaskedFiles(tmp_path, "val")
    assert "no mask" not in capsys.readouterr().out
    for path in (tmp_path / "SegmentationClass").iterdir():
        numbers = np.array(Image.open(path))
        Image.fromarray(np.where(numbers == 0, 2, numbers)).save(path)  # the background is a class
    MaskedFiles(tmp_path, "train")  # of which no attention is measured
    assert "no mask" not in capsys.readouterr().out
    MaskedFiles(tmp_path, "val")
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "warning: no mask has the background 0: all pixels count as objects"


def test_a_mask_of_one_bit_has_the_numbers_0_and_1(tmp_path):
    numbers = np.eye(8, dtype=np.uint8)
    Image.fromarray(numbers.astype(bool)).save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png")
    assert found.dtype == np.uint8 and np.array_equal(found, numbers)


def test_the_paper_s_data_are_recognised(tmp_path):
    write_voc(tmp_path, 1, 1, (48, 32))
    names = [f"2007_{33 + i:06}" for i in range(1_449)]
    for folder in ("JPEGImages", "SegmentationClass"):
        for name in names:
            (tmp_path / folder / f"{name}.png").symlink_to(tmp_path / folder / "val 0.png")
    listed = tmp_path / "ImageSets/Segmentation/val.txt"
    listed.write_text("\n".join(names[:-1]))
    assert not is_voc12(MaskedFiles(tmp_path, "val"))
    listed.write_text("\n".join(names))
    train, val = eval_segmentation.open_masked(str(tmp_path), demo=False)
    assert is_voc12(val) and train.names == val.names == VOC_CLASSES and len(VOC_CLASSES) == 21


def test_a_name_counts_once_and_a_byte_order_mark_is_no_part_of_it(tmp_path, capsys):
    write_voc(tmp_path)
    listed = tmp_path / "ImageSets/Segmentation/val.txt"
    listed.write_text("\ufeff" + listed.read_text() + "val 1\nval 1\n", encoding="utf-8")
    (tmp_path / "JPEGImages" / "val 1.txt").write_text("not an image of this name")
    assert MaskedFiles(tmp_path, "val").stems == ["val 0", "val 1", "val 2", "val 3"]
    assert f"note: {listed}: 2 repeated lines left out" in capsys.readouterr().out.splitlines()


def test_images_that_viewers_turn_are_named(tmp_path, capsys):
    write_voc(tmp_path)
    for number, orientation in ((1, 1), (2, 3)):  # 1 is upright
        path = tmp_path / f"JPEGImages/val {number}.png"
        exif = Image.Exif()
        exif[Base.Orientation] = orientation
        with Image.open(path) as image:
            image.save(path, exif=exif)
    MaskedFiles(tmp_path, "val")
    said = "warning: 1 of 4 checked images are stored turned or mirrored (EXIF orientation): masks must"
    assert f"{said} fit them as stored; e.g. {path}" in capsys.readouterr().out.splitlines()


def test_likely_faults_of_lists_and_masks_are_named(tmp_path, capsys):
    write_voc(tmp_path)
    lists = tmp_path / "ImageSets/Segmentation"
    names = (lists / "train.txt").read_text().splitlines()
    eval_segmentation.open_masked(str(tmp_path), demo=False)
    said = capsys.readouterr().out
    assert "training images too" not in said
    # The palettes of `write_voc` are random.
    assert "warning: masks have different palettes, but only the numbers count: 0 has the colour [" in said
    assert said.count("different palettes") == 2  # for each part once
    for path in (tmp_path / "SegmentationClass").iterdir():
        mask = Image.open(path)
        mask.putpalette(range(256))
        mask.save(path)
    eval_segmentation.open_masked(str(tmp_path), demo=False)
    assert "palettes" not in capsys.readouterr().out
    (lists / "val.txt").write_text("\n".join(names[:2]) + "\n" + (lists / "val.txt").read_text())
    eval_segmentation.open_masked(str(tmp_path), demo=False)
    assert "warning: 2 of 6 validation images are training images too" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "convnext_atto"])
def test_timms_networks(voc, capsys, arch):
    found = evaluate("--pretrained_weights", "random", "--arch", arch, "--image_size", 64, "--data_path", voc)
    said = capsys.readouterr().out
    attention = arch.startswith("vit")
    assert ("jaccard" in found) == attention and {"k-NN", "linear"} <= set(found)
    assert ("note: no attention is measured: ConvNeXt has no CLS attention" in said) == (not attention)


def test_the_demo_as_a_user_would(monkeypatch, capsys):
    monkeypatch.setattr("support.shapes.Shapes.__len__", lambda shapes: 24)
    flags = "--demo --pretrained_weights random --arch vit_nano --patch_size 16 --image_size 64".split()
    found = evaluate(*flags)
    said = capsys.readouterr().out
    assert found["area"] == pytest.approx(
        100 * np.mean([MaskedShapes("val", 24).mask(i).mean() for i in range(24)])
    )
    assert "background" in said and "fine blobs" in said
    shapes = MaskedShapes("val", 24)
    assert {shapes[i][1] + 1 for i in range(24)} | {0} == {
        number for i in range(24) for number in shapes.class_mask(i).unique().tolist()
    }


def spoil_size(root):
    Image.new("L", (48, 31), 1).save(root / "SegmentationClass" / "val 2.png")


def spoil_colours(root):
    Image.new("RGB", (48, 32)).save(root / "SegmentationClass" / "train 0.png")


def spoil_classes(root, number: int = 255):
    for path in (root / "SegmentationClass").glob("train*"):
        Image.new("L", (48, 32), number).save(path)


def spoil_val_class(root):
    Image.new("L", (48, 32), 9).save(root / "SegmentationClass" / "val 0.png")


LIST = "ImageSets/Segmentation/train.txt"


def make_void(root) -> None:
    """Leave one pixel of each class in the training masks."""
    mask = np.full((32, 48), 255, np.uint8)
    mask[0, :4] = 0, 1, 2, 3
    for path in (root / "SegmentationClass").glob("train *"):
        Image.fromarray(mask).save(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_size, r"mask has 48 x 31 pixels, its image 48 x 32 \(.*val 2.png"),
        (spoil_colours, r"mask has Pillow's mode RGB.*train 0.png"),
        (
            lambda root: Image.fromarray(np.full((32, 48), 257, np.uint16)).save(
                root / "SegmentationClass/val 0.png"
            ),
            "mask has Pillow's mode I(;16)?, not 8-bit numbers",
        ),
        (spoil_classes, "no class in the masks, only 255"),
        (lambda root: spoil_classes(root, 0), "no class in the masks, only 0"),
        (spoil_val_class, "val has classes that train lacks: 9"),
        (
            lambda root: (root / "JPEGImages/val 3.png").unlink(),
            r"1 of 4 images are missing: val 3 \(.*val.txt",
        ),
        (lambda root: (root / "SegmentationClass/train 1.png").unlink(), "1 of 6 masks are missing: train 1"),
        (lambda root: (root / LIST).unlink(), r"No such file or directory \(.*train.txt\): give the folder"),
        (lambda root: (root / LIST).write_text("\n\n"), "no name in the list"),
        (lambda root: (root / "JPEGImages/val 0.png").write_bytes(b"x"), "cannot read image: .*val 0.png"),
        (
            lambda root: Image.new("RGB", (48, 32)).save(root / "JPEGImages/val 0.jpg"),
            r"two files with the same name: val 0.jpg \(.*val 0.png\): remove one",
        ),
        (
            lambda root: Image.new("L", (48, 32)).save(root / "SegmentationClass/val 0.png", format="JPEG"),
            "mask is a JPEG, which changes numbers at edges",
        ),
        (
            lambda root: (root / "SegmentationClass/val 0.png").write_bytes(b"x"),
            "cannot read mask: .*val 0.png",
        ),
        (lambda root: (root / "JPEGImages").rename(root / "images"), r"No such file .*JPEGImages\)"),
        (make_void, r"most of each patch is void \(training masks\): give masks with more of the classes"),
    ],
)
def test_bad_data_is_one_clear_line_before_the_work(tmp_path, spoil, message):
    write_voc(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate(*RANDOM_VIT, "--data_path", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no weights given"),
        (RANDOM_VIT, "no data given .*--demo"),
        ([*RANDOM_VIT, "--data_path", "/nowhere"], "no such folder .*--data_path /nowhere"),
        (["--demo"], "no weights given"),
        (["--demo", "--pretrained_weights", "pixels"], "Pixels has no patch tokens"),
        (
            ["--demo", *RANDOM_VIT, "--image_size", "60"],
            r"not a multiple of --patch_size 8 \(--image_size 60\)",
        ),
        (["--demo", *RANDOM_VIT, "--data_path", "/x"], r"own images \(--data_path /x\): leave out"),
    ],
)
def test_bad_usage_is_one_clear_line(flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(*flags)


@pytest.mark.slow
def test_an_error_of_a_user_ends_with_code_2(tmp_path):
    write_voc(tmp_path)
    spoil_size(tmp_path)
    ended = run("eval_segmentation.py", *RANDOM_VIT, "--data_path", tmp_path, check=False)
    assert ended.returncode == 2 and ended.stderr.startswith("error: mask has 48 x 31 pixels")
    assert ended.stderr.count("\n") == 1
