import pickle
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval_image_retrieval
from eval_image_retrieval import Query, average_precision, measure, measure_query
from support.backbones import build_backbone
from support.errors import UserError
from tests.conftest import call, picture, same_of_one_and_of_two


def evaluate(folder, *flags) -> dict:
    data = ["--data_path", folder] * bool(folder)
    return call(eval_image_retrieval, *data, "--num_workers", 0, *flags)


# ---- the published numbers


@pytest.mark.parametrize("flags", ["--imsize 112", "--imsize 160 --multiscale 1"])
def test_the_published_numbers(paper_inputs, published, capsys, flags):
    given = "--pretrained_weights", paper_inputs / "weights.pth"
    result = evaluate(paper_inputs / "retrieval", *given, *flags.split())
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(">>")]
    expected = published[f"retrieval {flags}"]
    for ours, theirs in zip(printed, expected, strict=True):
        numbers = [np.array(re.findall(r"\d+\.\d*", line), dtype=float) for line in (ours, theirs)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=0.01 + 1e-9)
        assert re.sub(r"[\d.]+", "", ours).split() == re.sub(r"[\d.]+", "", theirs).split()
    for protocol, value in result.items():
        assert f"{protocol}: {np.around(value, 2)}" in printed[0]


# ---- measures, by hand


@pytest.mark.parametrize(
    ("ranks", "num_positives", "expected"),
    [
        ([0], 1, 1),
        ([1], 1, (0 / 1 + 1 / 2) / 2),
        ([0, 1, 2], 3, 1),
        ([0, 2], 2, (1 + (1 / 2 + 2 / 3) / 2) / 2),
        ([3], 2, (0 / 3 + 1 / 4) / 2 / 2),  # the other positive was not found
        ([], 2, 0),
    ],
)
def test_average_precision_is_the_area_of_trapezoids(ranks, num_positives, expected):
    assert average_precision(np.array(ranks, dtype=int), num_positives) == pytest.approx(expected)


def test_ignored_images_lower_the_ranks_behind_them():
    ranking, ks = np.array([7, 4, 8, 5, 6]), (1, 5)
    # Without 7 and 8, positives 4 and 6 have ranks 0 and 2.
    ap, at_1, at_5 = measure_query(ranking, np.array([4, 6]), np.array([7, 8]), ks)
    assert ap == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert at_1 == 1 and at_5 == pytest.approx(2 / 3)  # not more images count than the last positive's rank
    ap, at_1, _ = measure_query(ranking, np.array([4, 6]), np.array([], int), ks)
    assert ap == pytest.approx(((0 + 1 / 2) / 2 + (1 / 4 + 2 / 5) / 2) / 2) and at_1 == 0


def one_by_one(ranking, positive, ignored, ks):
    """The measures from the list of images that count, one image at a time."""
    listed = [image for image in ranking if image not in ignored]
    ranks = [rank for rank, image in enumerate(listed) if image in positive]
    ap = 0.0
    for j, r in enumerate(ranks):
        before = j / r if r else 1
        ap += (before + (j + 1) / (r + 1)) / 2 / len(positive)
    at = [sum(r < min(k, ranks[-1] + 1) for r in ranks) / min(k, ranks[-1] + 1) for k in ks]
    return [ap, *at]


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.sampled_from("+-x"), min_size=1, max_size=30), seed=st.integers(0, 2**31))
def test_measures_equal_those_of_one_image_at_a_time(labels, seed):
    images = np.random.default_rng(seed).permutation(len(labels))
    positive, ignored = (images[[label == kind for label in labels]] for kind in "+x")
    measured = measure_query(images, np.sort(positive), np.sort(ignored), ks=(1, 3, 10))
    if "+" in labels:
        assert measured.tolist() == pytest.approx(one_by_one(images, positive, ignored, (1, 3, 10)))
    else:
        assert np.isnan(measured).all()


def test_protocols_and_queries_without_positives(capsys):
    lists = [([0], [1], [2]), ([3], [], [])]  # the second has no hard image
    arrays = [[np.array(x, dtype=int) for x in labels] for labels in lists]
    queries = [Query("a", None, *arrays[0]), Query("b", None, *arrays[1])]
    rankings = np.array([[2, 0, 3, 1], [0, 1, 2, 3]])
    medium = measure(rankings, queries, "M", (1,))
    # First query without junk 2: positives 0 and 1 at ranks 0 and 2. Second: positive 3 at rank 3.
    first, second = (1 + (1 / 2 + 2 / 3) / 2) / 2, (0 + 1 / 4) / 2
    assert medium.tolist() == pytest.approx([50 * (first + second), 50])
    assert "left out" not in capsys.readouterr().out
    hard = measure(rankings, queries, "H", (1,))
    assert hard.tolist() == pytest.approx([100 * (0 + 1 / 2) / 2, 0])  # without 2 and 0: 3, then 1
    assert "H: 1 of 2 queries left out, without a positive image" in capsys.readouterr().out
    assert np.isnan(measure(rankings[1:], queries[1:], "H", (1,))).all()


# ---- images and features


def test_images_are_reduced_by_lanczos_and_never_enlarged():
    image = picture(size=(60, 45))
    small = eval_image_retrieval.reduce(image, 40)
    assert small.size == (40, 30)
    assert small.tobytes() == image.resize((40, 30), Image.Resampling.LANCZOS).tobytes()
    assert eval_image_retrieval.reduce(image, 80).tobytes() == image.tobytes()
    assert image.size == (60, 45)


def test_features_are_the_mean_over_three_scales_of_whole_patches():
    network = build_backbone("vit_nano", 8, 32)[0].eval()
    images = torch.randn(1, 3, 41, 50)
    single = eval_image_retrieval.global_features(network, multiscale=False)(images)
    torch.testing.assert_close(single, F.normalize(network(images[..., :40, :48]), dim=1))
    total = network(images[..., :40, :48])
    for scale, height, width in ((0.5**0.5, 24, 32), (0.5, 16, 24)):
        smaller = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total = total + network(smaller[..., :height, :width])
    several = eval_image_retrieval.global_features(network, multiscale=True)(images)
    torch.testing.assert_close(several, F.normalize(total, dim=1))
    assert not torch.allclose(single, several, atol=1e-3)
    for shape in ((7, 40), (40, 7)):
        with pytest.raises(UserError, match="{}x{} pixels is smaller than a patch of 8".format(*shape)):
            eval_image_retrieval.cut(torch.zeros(1, 3, *shape), 8)


def test_an_image_that_is_too_narrow_for_the_network_is_one_clear_line():
    features = eval_image_retrieval.global_features(timm.create_model("convnext_atto", num_classes=0), True)
    assert features(torch.zeros(1, 3, 224, 64)).shape == (1, 320)
    with pytest.raises(UserError, match="ConvNeXt takes no images of 112x30 pixels: .*or raise --imsize"):
        features(torch.zeros(1, 3, 224, 60))


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_any_backbone_will_do(paper_inputs, arch):
    flags = "--pretrained_weights", "random", "--arch", arch, "--imsize", "32"
    result = evaluate(paper_inputs / "retrieval", *flags)
    assert 0 < result["H"] < 100 and 0 < result["M"] < 100


def test_queries_are_cropped_on_request(paper_inputs, capsys):
    benchmark = eval_image_retrieval.read_benchmark(str(paper_inputs / "retrieval"), "roxford5k")
    whole, cropped = (eval_image_retrieval.open_images(benchmark, crop)[1] for crop in (False, True))
    size, box = np.array(whole[0][0].size), np.array(benchmark.queries[0].box)
    assert cropped[0][0].size == tuple(np.round(0.7 * size))
    assert cropped[0][0].tobytes() == whole[0][0].crop(tuple(box.round().astype(int).tolist())).tobytes()
    flags = "--pretrained_weights", "random", "--arch", "vit_nano", "--imsize", "48"
    results = [evaluate(paper_inputs / "retrieval", *flags, *more) for more in ([], ["--crop_queries"])]
    said = capsys.readouterr().out
    assert results[0] != results[1] and said.count("cropped") == 1
    assert "76 images, 7 queries, cropped to their boxes\n" in said


def test_the_papers_number_stands_beside_its_weights_and_its_data_only():
    line = eval_image_retrieval.paper_line
    assert line("dino_resnet50", "roxford5k", 4993, 70) == "paper, Table 3: mAP M: 35.4, H: 11.1"
    assert line("dino_vits16_landmarks", "rparis6k", 6322, 70) == "paper, Table 3: mAP M: 75.3, H: 51.6"
    assert line("dino_resnet50", "roxford5k", 4992, 70) is None
    assert line("dino_resnet50", "roxford5k", 4993, 7) is None
    assert line("runs/checkpoint.pth", "roxford5k", 4993, 70) is None


# ---- bad input


@pytest.fixture
def ground_truth(paper_inputs, tmp_path):
    """A copy of the benchmark's files; gives its folder and a function that rewrites the ground truth."""
    folder = tmp_path / "roxford5k"
    shutil.copytree(paper_inputs / "retrieval" / "roxford5k", folder)
    path = folder / "gnd_roxford5k.pkl"

    def rewrite(change):
        content = pickle.loads(path.read_bytes())
        change(content)
        path.write_bytes(pickle.dumps(content))

    return tmp_path, rewrite


def refused(folder, message: str, *flags) -> None:
    """The script ends with this one line before it looks for the weights."""
    with pytest.raises(UserError, match=message) as error:
        evaluate(folder, "--pretrained_weights", "/nowhere.pth", *flags)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gnd: gnd.pop("imlist"), "no lists imlist, qimlist and gnd"),
        (lambda gnd: gnd["imlist"].append("elsewhere"), "1 of 77 database images are missing: elsewhere.jpg"),
        (lambda gnd: gnd["qimlist"].pop(), "6 queries, but ground truth for 7"),
        (lambda gnd: gnd["gnd"][2].pop("junk"), "query query2 has no 'junk'"),
        (lambda gnd: gnd["gnd"][1].update(easy=np.array([76])), "query1: 'easy' names image 76 of 76"),
        (lambda gnd: gnd["gnd"][1].update(hard=[-1]), "query1: 'hard' names image -1 of 76"),
        (lambda gnd: gnd["gnd"][1].update(hard=[0.5]), "query1: 'hard' is not a list of different images"),
        (lambda gnd: gnd["gnd"][1].update(easy=[[1], [2, 3]]), "'easy' is not a list of different images"),
        (lambda gnd: gnd["gnd"][1].update(junk=[3, 3]), "query1: 'junk' is not a list of different images"),
        (lambda gnd: gnd["imlist"].append(gnd["imlist"][4]), "database has an image twice: "),
        (lambda gnd: gnd.update(extra=np.zeros), "file contains numpy.zeros, which may run code"),
    ],
)
def test_wrong_ground_truth_is_refused(ground_truth, change, message):
    folder, rewrite = ground_truth
    rewrite(change)
    refused(folder, message)


def test_likely_mistakes_in_the_ground_truth_are_named(ground_truth, capsys):
    folder, rewrite = ground_truth
    rewrite(lambda gnd: gnd["gnd"][2].update(easy=[], hard=[6], junk=[]))  # an empty list is not a mistake
    refused(folder, "no such file")
    assert "warning" not in capsys.readouterr().out
    rewrite(lambda gnd: gnd["gnd"][1].update(easy=[3, 4], hard=[5], junk=[4]))
    refused(folder, "no such file")
    said = "warning: for 1 query, an image has two of the labels easy, hard and junk; e.g. query1"
    assert said in capsys.readouterr().out.splitlines()
    rewrite(lambda gnd: gnd["imlist"].extend(gnd["qimlist"][:2]))
    rewrite(lambda gnd: gnd["gnd"][0].update(junk=[len(gnd["imlist"]) - 2]))
    refused(folder, "no such file")
    said = "warning: 1 query found in the database too, and counted as wrong there; e.g. query1"
    assert said in capsys.readouterr().out.splitlines()


def test_missing_files_are_named(ground_truth):
    folder, rewrite = ground_truth
    refused(folder, "no such file .*gnd_rparis6k.pkl", "--dataset", "rparis6k")
    refused("", "no data given")
    (folder / "roxford5k" / "jpg" / "query3.jpg").unlink()
    refused(folder, "1 of 7 query images are missing: query3.jpg .*jpg")


def test_boxes_beyond_their_images_are_named(ground_truth, capsys):
    folder, rewrite = ground_truth
    rewrite(lambda gnd: gnd["gnd"][4].update(bbx=[0, 0, 5000, 30]))
    refused(folder, "no such file", "--crop_queries")  # of weights: the boxes come first
    assert "warning: the boxes of 1 of 7 queries reach beyond their images" in capsys.readouterr().out


def test_a_box_may_end_a_pixel_outside_on_either_side(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    boxes = [0, 0, 60, 40], [0, 0, 61, 41], [0, 0, 62, 40], [0, 0, 60, 42]
    found = [eval_image_retrieval._reaches_out(tmp_path / "a.jpg", box) for box in boxes]
    assert found == [False, False, True, True]


def test_a_box_that_is_none_is_refused_if_queries_are_cropped(ground_truth):
    folder, rewrite = ground_truth
    rewrite(lambda gnd: gnd["gnd"][4].update(bbx=[[1], [2, 3]]))
    refused(folder, r"query query4: bbx is not a box: \[\[1\], \[2, 3\]\]", "--crop_queries")
    rewrite(lambda gnd: gnd["gnd"][4].update(bbx=[10, 10, 10, 30]))
    refused(folder, r"query query4: bbx is not a box: \[10, 10, 10, 30\]", "--crop_queries")
    rewrite(lambda gnd: gnd["gnd"][4].update(bbx=[10, 10, np.inf, 30]))
    refused(folder, r"query query4: bbx is not a box: \[10, 10, inf, 30\]", "--crop_queries")
    refused(folder, "no such file")  # of weights: the box does not matter


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no weights given"),
        (["--pretrained_weights", "pixels"], "width of the features depends on the size"),
        (["--pretrained_weights", "random", "--arch", "mixer_s16_224"], "takes no images of 224x"),
        (
            ["--pretrained_weights", "random", "--imsize", "15"],
            "^an image of 15x15 pixels is smaller than a patch of 16 .*--imsize",
        ),
        (
            ["--pretrained_weights", "random", "--imsize", "31", "--multiscale", "1"],
            "^an image of 15x15 pixels is smaller than a patch of 16",
        ),
    ],
)
def test_a_network_that_does_not_suit_is_one_clear_line(paper_inputs, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(paper_inputs / "retrieval", *flags)


@pytest.mark.slow
def test_two_processes_print_what_one_prints(paper_inputs):
    flags = (
        "eval_image_retrieval.py", "--data_path", paper_inputs / "retrieval", "--imsize", "64",
        "--pretrained_weights", paper_inputs / "weights.pth", "--num_workers", "1",
    )  # fmt: skip
    assert len(same_of_one_and_of_two(">>", *flags)) == 2
