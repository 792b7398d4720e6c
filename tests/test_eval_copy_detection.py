import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import eval_copy_detection
from eval_copy_detection import fit_whitening, mean_average_precision, positives_of
from support.backbones import build_backbone
from support.data import ImageFiles
from support.errors import UserError
from support.features import patch_size_of
from tests.conftest import call, picture, same_of_one_and_of_two, save_images


def evaluate(folder, *flags) -> dict:
    data = ["--data_path", folder] * bool(folder)
    return call(eval_copy_detection, *data, "--num_workers", 0, *flags)


# ---- the published numbers


@pytest.mark.parametrize(
    ("extra", "words", "tolerance"),
    [
        ([], "", 0.01),
        (["distractors"], " with distractors", 0.01),
        (["distractors", "whitening"], " with distractors and whitening", 0.02),
    ],
)
def test_the_published_numbers(paper_inputs, published, capsys, extra, words, tolerance):
    folders = [part for name in extra for part in (f"--{name}_path", str(paper_inputs / name))]
    flags = "--pretrained_weights", paper_inputs / "weights.pth", "--imsize", "96"
    result = evaluate(paper_inputs / "copydays", *flags, *folders)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval on")]
    expected = published[f"copy --imsize 96{words}"]
    assert list(result) == list(expected)
    for (block, theirs), line in zip(expected.items(), printed, strict=True):
        assert line == f"eval on {block} mAP={result[block]:.3f}"
        # The published numbers have three digits.
        assert result[block] == pytest.approx(float(theirs), abs=tolerance + 0.0005), block


# ---- measures, by hand


def test_precision_counts_the_twenty_nearest_alone():
    database = torch.eye(30)
    query = torch.linspace(1, 0.1, 30)[None]  # image i is the i-th nearest
    for positives, expected in (
        ([0], 1),
        ([1], (0 + 1 / 2) / 2),
        ([0, 2], (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ([19], (0 + 1 / 20) / 2),
        ([20], 0),
        ([0, 25], 1 / 2),
    ):
        found = mean_average_precision(query, database, [np.array(positives)])
        assert found == pytest.approx(expected), positives
    two = mean_average_precision(torch.cat([query, query]), database, [np.array([0]), np.array([1])])
    assert two == pytest.approx((1 + 1 / 4) / 2)
    assert (
        mean_average_precision(query[:, :5], torch.arange(1.0, 6).diag(), [np.array([0])]) == 1
    )  # lengths do not count


def test_originals_are_found_by_four_letters_or_by_index(tmp_path):
    for folder, names in {
        "original": ["200000", "200001", "200100"],
        "strong": ["200005", "200109"],
        "crops": ["200000", "200001"],
        "shifted": ["200001", "200100"],  # without a copy of the first
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            picture().save(tmp_path / folder / f"{name}.{'jpg' if folder == 'crops' else 'png'}")
    sets = {folder: ImageFiles(tmp_path / folder) for folder in ("original", "strong", "crops", "shifted")}

    def found(block: str) -> list:
        images = sets[block.partition("/")[0]]
        return [positives.tolist() for positives in positives_of(block, images, sets["original"])]

    assert found("strong") == [[0, 1], [2]]
    assert found("crops/10") == [[0], [1]]
    assert found("original") == [[0], [1], [2]]
    with pytest.raises(UserError, match=r"shifted/10/200001.png does not match original/200000.png"):
        found("shifted/10")


def test_the_papers_number_stands_beside_its_weights_and_its_data_only():
    line, counts = eval_copy_detection.paper_line, eval_copy_detection.PAPER_IMAGES | {"crops/10": 157}
    assert line("dino_vitb8", 320, False, counts) == "paper, Table 4: eval on strong mAP=0.855"
    assert line("dino_vitb16", 224, False, counts) == "paper, Table 4: eval on strong mAP=0.817"
    assert line("dino_vitb8", 224, False, counts) is None
    assert line("dino_vitb8", 320, True, counts) is None
    assert line("dino_vitb16", 320, False, counts) is None
    assert line("dino_vitb8", 320, False, counts | {"distractors": 9_999}) is None
    del counts["whitening"]
    assert line("dino_vitb8", 320, False, counts) is None


# ---- features


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny_patch16_224"])
def test_features_are_the_cls_token_and_the_generalised_mean(arch):
    network = build_backbone(arch, 16, 32)[0].eval()
    images = torch.randn(2, 3, 32, 48)
    if arch == "vit_nano":
        tokens = network.get_intermediate_layers(images, 1)[0]
    else:
        tokens = network.forward_features(images)
    with torch.no_grad():
        features = eval_copy_detection.copy_features(network, images)
    patches = tokens[:, 1:].double().detach()
    positive = torch.where(patches > 1e-6, patches, torch.full_like(patches, 1e-6))
    mean = ((positive**4).sum(dim=1) / 6) ** 0.25
    torch.testing.assert_close(features[:, : mean.shape[1]], network(images).detach())
    torch.testing.assert_close(features[:, mean.shape[1] :].double(), mean, rtol=1e-5, atol=1e-6)


def test_images_are_squeezed_to_a_square_by_bicubic():
    image = picture(size=(60, 45))
    pixels = eval_copy_detection.input_transform(32, (0, 0, 0), (1, 1, 1))(image)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_whitening_as_published_and_as_in_textbooks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3
    mean, matrix = fit_whitening(x, centred=True)
    white = (x - mean) @ matrix
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(4), rtol=0, atol=1e-3)
    mean, matrix = fit_whitening(x, centred=False)
    torch.testing.assert_close(mean, x.mean(dim=0))
    white = x @ matrix  # white about 0, before the mean is removed
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(4), rtol=0, atol=1e-3)


def test_no_direction_is_enlarged_without_bound():
    x = torch.zeros(3, 2)
    x[:, 0] = torch.tensor([1.0, 2, 3])
    matrix = fit_whitening(x, centred=True)[1]
    lengths = matrix.norm(dim=0).sort().values
    largest = 2 / 3  # the variance of 1, 2, 3
    expected = torch.tensor([largest**-0.5, (1e-5 * largest) ** -0.5])
    torch.testing.assert_close(lengths, expected)
    with pytest.raises(UserError, match="features of all images are equal"):
        fit_whitening(torch.ones(3, 2), centred=True)


# ---- blocks as they are found, and bad input


@pytest.fixture
def blocks(tmp_path):
    """Small blocks: 3 originals, and 2 degrees of one distortion."""
    for name in ("original", "crops/5", "crops/10"):
        save_images(tmp_path / "copydays" / name, 3)
    return tmp_path / "copydays"


RANDOM = "--pretrained_weights random --arch vit_nano --patch_size 8 --imsize 16".split()


def test_blocks_are_taken_as_found(blocks, capsys):
    assert list(evaluate(blocks, *RANDOM)) == ["original", "crops/5", "crops/10"]
    assert "images: original 3, crops/5 3, crops/10 3\n" in capsys.readouterr().out
    save_images(blocks / "strong", 5)
    for number in (3, 4):  # they begin with the same letters as originals 001 and 002
        (blocks / "strong" / f"00{number}.png").rename(blocks / "strong" / f"00{number - 2}.b.png")
    assert list(evaluate(blocks, *RANDOM)) == ["original", "strong", "crops/5", "crops/10"]


def test_whiten_centred_changes_the_features_and_needs_images(blocks, tmp_path, capsys):
    save_images(tmp_path / "others", 5, seed=1)
    others = "--whitening_path", tmp_path / "others"
    evaluate(blocks, *RANDOM, *others)
    said = capsys.readouterr().out
    assert "warning" not in said
    assert "note: --whitening_path has 5 images for 256 features" in said
    evaluate(blocks, *RANDOM, "--whiten_centred")
    said = capsys.readouterr().out
    assert "warning: --whiten_centred has no effect: --whitening_path is not given" in said
    x = {name: torch.randn(9, 4) + 2 for name in ("original", "whitening")}
    published, centred = (eval_copy_detection.whiten(x, centred)["original"] for centred in (False, True))
    assert not torch.allclose(published, centred, rtol=0.1)
    mean, matrix = fit_whitening(x["whitening"], centred=False)
    torch.testing.assert_close(published, (x["original"] - mean) @ matrix)


def test_images_that_are_there_twice_are_named(blocks, tmp_path, capsys):
    def warnings(*flags) -> list[str]:
        evaluate(blocks, *RANDOM, *flags)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    save_images(blocks / "strong", 3, seed=2)
    others = tmp_path / "others"
    save_images(others, 4, seed=1)
    assert warnings("--distractors_path", others, "--whitening_path", others) == []
    shutil.copy(blocks / "strong" / "001.png", others / "of another name.png")
    pair = f"e.g. {blocks}/strong/001.png and {others}/of another name.png"
    one = "warning: 1 of 12 images look the same to the network as one of"
    assert warnings("--distractors_path", others) == [f"{one} distractors: there they count as wrong; {pair}"]
    effect = "the whitening is fitted to what is evaluated"
    assert warnings("--whitening_path", others) == [f"{one} whitening: {effect}; {pair}"]
    shutil.copy(blocks / "original" / "001.png", blocks / "original" / "009.png")
    (found,) = warnings()
    assert found.startswith("warning: 2 of 4 images look the same to the network as one of original: most")
    for path in list((blocks / "original").glob("*.png"))[1:]:
        path.unlink()
    for name in ("crops", "strong"):
        shutil.rmtree(blocks / name)
    assert warnings() == []  # a single original is not its own copy


def refused(folder, message: str, *flags) -> None:
    """The script ends with this one line before it looks for the weights."""
    with pytest.raises(UserError, match=message) as error:
        evaluate(folder, "--pretrained_weights", "/nowhere.pth", *flags)
    assert error.value.exit_code == 2


def test_bad_blocks_are_named(blocks, tmp_path):
    refused("", "no data given")
    refused(tmp_path, "no folder original/")
    save_images(blocks / "crops" / "20", 4)
    refused(blocks, "crops/20 has 4 images, but there are 3 originals")
    for path in (blocks / "crops" / "20").iterdir():
        path.unlink()
    refused(blocks, "no images in .*crops/20")
    picture().save(blocks / "crops" / "20" / "001.png")
    refused(blocks, "crops/20/001.png does not match original/000.png")
    shutil.rmtree(blocks / "crops" / "20")
    (blocks / "jpegqual").mkdir()
    refused(blocks, "no folders in jpegqual/")
    (blocks / "jpegqual").rmdir()
    save_images(blocks / "strong", 1)
    (blocks / "strong" / "000.png").rename(blocks / "strong" / "777701.png")
    refused(blocks, "no original begins with '7777', as strong/777701.png does")
    shutil.rmtree(blocks / "strong")
    refused(blocks, "no such file")  # of weights: the blocks are fine now
    for path in (blocks / "original").iterdir():
        path.unlink()
    refused(blocks, "no images in .*original")


def test_bad_folders_of_other_images_are_named(blocks, tmp_path):
    save_images(tmp_path / "one", 1)
    (tmp_path / "empty").mkdir()
    for flag in ("--distractors_path", "--whitening_path"):
        refused(blocks, f"no such folder .{flag} /nowhere", flag, "/nowhere")
        refused(blocks, f"no images in .*empty .{flag}", flag, tmp_path / "empty")
    refused(blocks, "1 image in .*one .--whitening_path", "--whitening_path", tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no weights given"),
        (["--pretrained_weights", "pixels"], "Pixels has no patch tokens"),
        (["--pretrained_weights", "random", "--arch", "resnet18"], "ResNet has no patch tokens"),
        ([*RANDOM, "--imsize", "20"], r"not a multiple of --patch_size 8 \(--image_size 20\)"),
    ],
)
def test_a_network_that_does_not_suit_is_one_clear_line(blocks, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(blocks, "--imsize", "32", *flags)


def test_random_weights_are_of_the_published_default_network():
    def settled(*flags: str) -> tuple:
        args = eval_copy_detection.parse_args(["--pretrained_weights", "random", *flags])
        with torch.device("meta"):  # no weights
            frozen = eval_copy_detection.load_network(args)
        return frozen.arch, patch_size_of(frozen.network), frozen.image_size

    assert settled() == ("vit_base", 8, 320)
    assert settled("--patch_size", "16") == ("vit_base", 16, 320)
    assert settled("--arch", "vit_small", "--imsize", "96") == ("vit_small", 16, 96)


@pytest.mark.slow
def test_two_processes_print_what_one_prints(paper_inputs):
    flags = (
        "eval_copy_detection.py", "--data_path", paper_inputs / "copydays", "--imsize", "32",
        "--pretrained_weights", paper_inputs / "weights.pth", "--num_workers", "1",
        "--whitening_path", paper_inputs / "whitening",
    )  # fmt: skip
    assert len(same_of_one_and_of_two("eval on", *flags)) == 20


def test_the_whitening_is_the_flags(blocks, tmp_path, monkeypatch):
    save_images(tmp_path / "others", 5, seed=1)
    seen, whiten = [], eval_copy_detection.whiten
    monkeypatch.setattr(eval_copy_detection, "whiten", lambda x, c: seen.append(c) or whiten(x, c))
    for more in ((), ("--whiten_centred",)):
        evaluate(blocks, *RANDOM, "--whitening_path", tmp_path / "others", *more)
    assert seen == [False, True]
