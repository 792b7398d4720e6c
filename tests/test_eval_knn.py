import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import eval_knn
from support.distributed import fix_random_seeds
from support.errors import ImageError, UserError, WrongFormat
from support.lock import FolderLock
from support.pixels import as_tensor
from support.weights import load_backbone
from tests.conftest import call, run_on_full_disk, same_of_one_and_of_two, save_images, taken_by, torchrun
from utils import MultiCropWrapper


def brute_force(train, train_labels, test, test_labels, k, T, num_classes):
    """The classifier as Wu et al. write it, one test image at a time."""
    top1 = top5 = 0
    for x, y in zip(test, test_labels.tolist(), strict=True):
        similarity = train @ x
        votes = np.zeros(num_classes)
        for i in similarity.argsort(descending=True)[:k].tolist():
            votes[train_labels[i]] += np.exp(similarity[i].item() / T)
        ranking = list(np.argsort(-votes, kind="stable"))
        top1 += ranking[0] == y
        top5 += y in ranking[: min(5, k)]
    return 100 * top1 / len(test), 100 * top5 / len(test)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 12),
    classes=st.integers(1, 9),
    k=st.integers(1, 40),
    chunk=st.integers(1, 400),
    seed=st.integers(0, 2**31),
)
def test_classifier_equals_brute_force(n, m, classes, k, chunk, seed):
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    train, test = (F.normalize(torch.randn(size, 6, generator=generator), dim=1) for size in (n, m))
    labels = [torch.randint(classes, (size,), generator=generator) for size in (n, m)]
    args = train, labels[0], test, labels[1], k, 0.07, classes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_knn, "CHUNK", chunk)  # the test images in one part or in several
        patch.setattr(eval_knn, "ROWS", 1)
        assert eval_knn.knn_classifier(*args) == pytest.approx(brute_force(*args))


def test_few_passes_over_many_training_images(monkeypatch):
    train, test = torch.rand(50, 6), torch.rand(100, 6)
    monkeypatch.setattr(eval_knn, "CHUNK", 100)  # would be two test images at a time
    parts = list(eval_knn.neighbours(train, test, 3))
    assert [first for first, _, _ in parts] == [0, 64]
    assert torch.equal(torch.cat([found for _, _, found in parts]), (test @ train.T).topk(3).indices)


def test_short_rows_are_normalised_too(capsys):
    rows = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    torch.testing.assert_close(eval_knn._unit_rows(rows / 4, "file", expected=False), rows)
    assert "rows of length 0.25 to 0.25 normalised" in capsys.readouterr().out


def test_all_k_at_once_equal_one_k_at_a_time():
    train, test = (F.normalize(torch.randn(size, 6), dim=1) for size in (50, 20))
    data = train, torch.randint(4, (50,)), test, torch.randint(4, (20,))
    together = eval_knn.knn_accuracies(*data, [5, 50, 1], 0.07, 4)
    assert together == {k: eval_knn.knn_classifier(*data, k, 0.07, 4) for k in (1, 5, 50)}
    columns = [each if each.ndim > 1 else each[:, None] for each in data]  # as published code may have labels
    assert eval_knn.knn_classifier(*columns, 5, 0.07, 4) == together[5]
    for features in (train, test):
        features[3], before = torch.nan, features[3].clone()
        with pytest.raises(ValueError, match="features are not finite"):
            eval_knn.knn_classifier(*data, 5, 0.07, 4)
        features[3] = before
    for place in (1, 3):  # else the accuracy would be another one, up to several hundred per cent
        labels = list(data)
        labels[place] = torch.cat([data[place], data[place]])
        with pytest.raises(
            ValueError, match=f"{len(data[place])} features have {2 * len(data[place])} labels"
        ):
            eval_knn.knn_classifier(*labels, 5, 0.07, 4)


def test_what_would_be_another_accuracy_is_refused_or_said(capsys):
    rows = F.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(20) % 4
    for k, T in (0, 0.07), (-1, 0.07), (5, 0.0), (5, -0.07), (5, math.nan):
        with pytest.raises(ValueError, match=f"k and T have to be above 0, not {k} and {T}"):
            eval_knn.knn_classifier(rows, labels, rows, labels, k, T, 4)
    levels = (255 * rows.abs()).byte()  # products would overflow
    for features, words in (levels, r"uint8 \(20, 6\)"), (rows[..., None, None], r"float32 \(20, 6, 1, 1\)"):
        with pytest.raises(ValueError, match=rf"takes floating-point features \(N, D\), not torch.{words}"):
            eval_knn.knn_classifier(features, labels, features, labels, 5, 0.07, 4)
    assert eval_knn.knn_classifier(rows, labels, rows, labels, 1, 0.07, 4)[0] == 100
    assert capsys.readouterr().out == ""
    eval_knn.knn_classifier(rows, labels, 2 * rows, labels, 1, 0.07, 4)
    assert "warning: features are not of length 1" in capsys.readouterr().out


def test_votes_of_half_precision_features_are_counted_in_float32():
    counts = 2_100, 2_300  # float16 counts to 2,048 only
    labels, features = torch.arange(2).repeat_interleave(torch.tensor(counts)), torch.ones(sum(counts), 1)
    data = features.half(), labels, torch.ones(1, 1).half(), torch.ones(1)
    assert eval_knn.knn_classifier(*data, sum(counts), 0.07, 2)[0] == 100


def test_votes_of_double_precision_features_are_counted_in_float64():
    features = torch.tensor([[1.0], [1 + 1e-9]], dtype=torch.float64)  # equal in float32
    data = features, torch.arange(2), features[:1], torch.ones(1)
    assert eval_knn.knn_classifier(*data, 2, 0.07, 2)[0] == 100


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float32, torch.bool])
def test_class_numbers_of_any_type(dtype):
    assert eval_knn._class_numbers(torch.tensor([0, 1]).to(dtype), "").tolist() == [0, 1]


def test_images_that_arrive_dark_are_named(tmp_path, capsys):
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        values = np.random.default_rng(0).integers(0, 4096, (20, 20), np.uint16)
        Image.fromarray(values).save(tmp_path / split / name / "0.png")
    pixels(tmp_path, "--nb_knn", "1")
    assert "warning: 2 of 2 checked images have 16 bits but use 12 of them" in capsys.readouterr().out


def evaluate(*flags) -> dict:
    return call(eval_knn, *flags, "--num_workers", 0)


def pixels(labelled, *flags) -> dict:
    return evaluate("--pretrained_weights", "pixels", "--image_size", 16, "--data_path", labelled, *flags)


def test_prints_the_published_line_and_limits_k(labelled, capsys):
    result = pixels(labelled, "--nb_knn", "3", "200", "100")
    assert list(result) == [3, 15]
    out = capsys.readouterr().out
    assert "note: --nb_knn limited to the 15 training images" in out
    assert result[15] == pixels(labelled, "--nb_knn", "15")[15]  # counted once
    top1, top5 = result[3]
    assert f"3-NN classifier result: Top1: {top1}, Top5: {top5}" in out


def test_features_are_the_cls_token_or_all_patch_tokens(labelled, tmp_path, capsys):
    flags = "--pretrained_weights", "random", "--arch", "vit_nano", "--patch_size", "8", "--image_size", "32"
    for value, width in (("false", 128), ("true", 16 * 128)):
        folder = tmp_path / value
        evaluate(*flags, "--data_path", labelled, "--concat_patchtokens", value, "--dump_features", folder)
        assert torch.load(folder / "trainfeat.pth").shape == (15, width)
    assert "features: patch tokens, 2048 wide" in capsys.readouterr().out
    fix_random_seeds(0)
    frozen = load_backbone("random", None, "vit_nano", 8, 32)
    image = frozen.transform(Image.open(labelled / "val" / "a" / "000.png"))[None]
    with torch.no_grad():
        tokens = frozen.network.get_intermediate_layers(image, 1)[0][:, 1:].flatten(1)
    found = torch.load(folder / "testfeat.pth")[:1]
    torch.testing.assert_close(found, F.normalize(tokens, dim=1))


def test_features_of_zeros_are_named(capsys):
    found = eval_knn.normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "test")
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert "warning: the features of 1 of 2 test images are zero" in capsys.readouterr().out
    with pytest.raises(UserError, match="the training images' features are all zero"):
        eval_knn.normalized(torch.zeros(2, 3), "training")


def test_copies_in_another_format_are_named(tmp_path, capsys):
    for name in "ab":
        save_images(tmp_path / "train" / name, 3)
        save_images(tmp_path / "val" / name, 2, seed=1)
    with Image.open(tmp_path / "train" / "b" / "001.png") as image:
        image.save(tmp_path / "val" / "b" / "copy.bmp")
    pixels(tmp_path, "--nb_knn", "1")
    assert "warning: 1 of 5 compared test images have the features" in capsys.readouterr().out


def test_one_validation_image_will_do(tmp_path):
    for name in "ab":
        save_images(tmp_path / "train" / name, 3)
        save_images(tmp_path / "val" / name, 1)
    (tmp_path / "val" / "b" / "000.png").write_bytes((tmp_path / "train" / "b" / "001.png").read_bytes())
    assert set(pixels(tmp_path, "--nb_knn", "1")) == {1}


def test_features_can_be_dumped_and_loaded(labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves ~ after = to us
    first = pixels(labelled, "--nb_knn", "3", "--dump_features=~/features")
    names = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert names == ["testfeat.pth", "testlabels.pth", "trainfeat.pth", "trainlabels.pth"]
    assert evaluate("--load_features=~/features", "--nb_knn", "3") == first
    assert "compared test images" not in capsys.readouterr().out
    for part in ("feat", "labels"):
        train = (tmp_path / "features" / f"train{part}.pth").read_bytes()
        for split in ("train", "test"):
            (tmp_path / f"{split}{part}.pth").write_bytes(train)
    evaluate("--load_features", tmp_path, "--nb_knn", "3")
    (tmp_path / "train").mkdir()
    (tmp_path / "testfeat.pth").unlink()
    with pytest.raises(UserError, match="has both train/ of extract_features.py and trainfeat.pth"):
        evaluate("--load_features", tmp_path)
    copies = "15 of 15 compared test images have the features of a training image: the accuracy may"
    assert f"warning: {copies}" in capsys.readouterr().out
    for name in ("trainfeat", "testfeat"):
        lengths = torch.load(tmp_path / "features" / f"{name}.pth").norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    with pytest.raises(UserError, match="no such file"):
        evaluate("--load_features", tmp_path / "nowhere")
    same = str(tmp_path / "features" / ".." / "features")
    with pytest.raises(UserError, match="would overwrite --load_features"):
        evaluate("--load_features=~/features/../features", "--dump_features", same)


def test_a_full_disk_loses_neither_accuracies_nor_features_of_before(tmp_path):
    folder, old = tmp_path / "dumped", tmp_path / "old"
    for each in (folder, old):
        each.mkdir()
        saved_features(each)
    saved_features(tmp_path, testfeat=lambda rows: rows.repeat(400, 1), testlabels=lambda y: y.repeat(400))
    flags = "--load_features", tmp_path, "--dump_features", folder, "--nb_knn", "5"
    result = run_on_full_disk("eval_knn", 50_000, *flags)  # the training features have room
    assert result.returncode == 1 and "5-NN classifier result: Top1: " in result.stdout
    where = folder / "testfeat.pth"
    assert result.stderr == f"error: File too large ({where}): correct this, then run the same command\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted(eval_knn.FEATURE_FILES)
    for name in eval_knn.FEATURE_FILES:
        assert (folder / name).read_bytes() == (old / name).read_bytes()


def test_two_evaluations_do_not_dump_into_one_folder(labelled, tmp_path):
    """Each would replace some of the four files, which then do not belong together."""
    lock = FolderLock(tmp_path / ".features.lock")
    taken_by(lock)
    flags = "--nb_knn", "3", "--dump_features", str(tmp_path)
    with pytest.raises(UserError, match=rf"another run writes .* \(--dump_features {tmp_path}\)"):
        pixels(labelled, *flags)
    lock.path.unlink()
    for _ in range(2):
        pixels(labelled, *flags)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(eval_knn.FEATURE_FILES)


@pytest.mark.parametrize("in_place", [False, True])  # as another program may
def test_features_that_are_replaced_while_they_are_read_are_refused(
    labelled, tmp_path, monkeypatch, in_place
):
    """Old training features with new test features would give an accuracy of neither."""
    flags = "--nb_knn", "3", "--dump_features", str(tmp_path)
    pixels(labelled, *flags)
    os.utime(tmp_path / "trainfeat.pth", (0, 0))
    load_file, read = eval_knn.load_file, []

    def dumped_after_the_first(path):
        tensor = load_file(path)
        if not read and in_place:
            path.write_bytes(path.read_bytes())
        elif not read:
            pixels(labelled, *flags)
        read.append(path.name)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(eval_knn, "load_file", dumped_after_the_first)
        with pytest.raises(UserError, match=r"features were replaced while they were read"):
            evaluate("--load_features", str(tmp_path))
    assert read == list(eval_knn.FEATURE_FILES)
    evaluate("--load_features", str(tmp_path), "--nb_knn", "3")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("testfeat", torch.rand(9, 5), r"do not fit together: \(15, 768\), \(15,\), \(9, 5\), \(9,\)"),
        ("testlabels", torch.arange(8), r"do not fit together: .* \(8,\)"),
        ("trainfeat", {}, r"do not fit together: \(\)"),
        ("trainlabels", [0, 1], r"do not fit together: \(15, 768\), \(\), \(9, 768\), \(9,\)"),
        ("testlabels", torch.tensor(1), r"do not fit together: .* \(\)"),
        ("trainfeat", torch.full((15, 768), torch.nan), r"features are not finite numbers \(.*trainfeat"),
        ("trainfeat", torch.ones(15, 768).to_sparse(), r"tensor is sparse, .*\(.*/trainfeat.pth\)"),
        ("testlabels", torch.ones(9, device="meta"), r"or without values \(.*/testlabels.pth\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(labelled, tmp_path, name, tensor, message):
    pixels(labelled, "--nb_knn", "3", "--dump_features", str(tmp_path))
    torch.save(tensor, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=message):
        evaluate("--load_features", tmp_path)


def saved_features(folder, **changes) -> dict:
    """Features of three classes, with a train and a test row that others differ from by their length."""
    generator = torch.Generator().manual_seed(0)
    centre = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    tensors = {"trainlabels": torch.arange(30) % 3, "testlabels": torch.arange(9) % 3}
    for name, noise in (("train", 0.5), ("test", 0.4)):
        labels = tensors[f"{name}labels"]
        rows = centre[labels] + noise * torch.randn(len(labels), 8, generator=generator)
        tensors[f"{name}feat"] = F.normalize(rows, dim=1)
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pth")
    return evaluate("--load_features", folder, "--nb_knn", "5")


def test_rows_of_any_length_give_the_same_accuracy(tmp_path, capsys):
    unit = saved_features(tmp_path)
    assert "normalised" not in capsys.readouterr().out
    lengths = torch.linspace(0.1, 30, 30)[:, None]
    longer = saved_features(tmp_path, trainfeat=lambda rows: lengths * rows, testfeat=lambda rows: 1.5 * rows)
    said = capsys.readouterr().out
    assert longer == unit and 0 < unit[5][0]
    assert "rows of length 0.1 to 30 normalised to 1" in said and "rows of length 1.5 to 1.5" in said
    other_types = dict(trainfeat=lambda rows: rows.half(), testfeat=lambda rows: rows.double())
    assert saved_features(tmp_path, **other_types) == unit
    assert saved_features(tmp_path, trainlabels=lambda labels: labels.float()) == unit


def test_class_numbers_may_have_gaps(tmp_path):
    """Votes for each number up to the largest would need more memory than any machine has."""
    first = saved_features(tmp_path)
    apart = {name: lambda labels: labels * 10**11 for name in ("trainlabels", "testlabels")}
    assert saved_features(tmp_path, **apart) == first
    evaluate("--load_features", tmp_path, "--dump_features", tmp_path / "copy")
    assert torch.load(tmp_path / "copy" / "trainlabels.pth").max() == 2 * 10**11


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trainlabels", lambda labels: labels + 0.5, r"labels are not whole numbers from 0 \(.*trainlabels"),
        ("testlabels", lambda labels: labels - 1, r"labels are not whole numbers from 0 \(.*testlabels"),
        ("testlabels", lambda labels: torch.full((9,), torch.nan), "labels are not whole numbers from 0"),
        ("trainfeat", torch.zeros_like, r"rows of length 0 to 0 cannot be normalised \(.*trainfeat"),
        ("trainfeat", lambda rows: rows.double() * 1e39, "rows of length inf to inf cannot be normalised"),
        ("testfeat", lambda rows: rows * 1j, "features are not finite numbers"),
    ],
)
def test_values_that_are_no_features_or_labels_are_refused(tmp_path, name, change, message):
    with pytest.raises(UserError, match=message):
        saved_features(tmp_path, **{name: change})


def test_features_of_no_images_are_refused(tmp_path):
    none = {name: lambda tensor: tensor[:0] for name in ("testfeat", "testlabels")}
    with pytest.raises(UserError, match=r"do not fit together: .* \(0, 8\), \(0,\)"):
        saved_features(tmp_path, **none)


def test_test_labels_that_training_lacks_are_named(tmp_path, capsys):
    saved_features(tmp_path, testlabels=lambda labels: labels + 2)
    assert "warning: 6 of 9 test labels are not among the training labels" in capsys.readouterr().out


def test_one_class_is_named_since_all_answers_are_right(tmp_path, capsys):
    saved_features(tmp_path, trainlabels=torch.zeros_like, testlabels=torch.zeros_like)
    assert "warning: only one class: every prediction is right" in capsys.readouterr().out
    y, test_y, num_classes = eval_knn.number_classes(torch.tensor([7, 3, 3]), torch.tensor([3, 5, 7, 9]))
    assert (y.tolist(), test_y.tolist(), num_classes) == ([1, 0, 0], [0, -1, 1, -1], 2)
    x = F.normalize(torch.randn(7, 4), dim=1)
    _, top5 = eval_knn.knn_accuracies(x[:3], y, x[3:], test_y, [3], 0.07, num_classes)[3]
    assert top5 == 50  # with two classes, all known labels are among the five best, and no other is


def test_flags_without_effect_beside_loaded_features_are_named(tmp_path, capsys):
    saved_features(tmp_path)
    assert "no effect" not in capsys.readouterr().out.replace("--num_workers has no effect", "")
    evaluate("--load_features", tmp_path, "--pretrained_weights", "x.pth", "--image_size", "64")
    said = capsys.readouterr().out
    assert "warning: --pretrained_weights has no effect: --load_features gives the features" in said
    assert "warning: --image_size has no effect" in said and "--arch" not in said
    others = {"nb_knn", "temperature", "use_cuda", "dump_features", "load_features", "dist_url", "local_rank"}
    assert set(vars(eval_knn.parse_args([]))) - set(eval_knn.FEATURE_FLAGS) == others


def test_the_temperature_is_the_flags(tmp_path):
    saved_features(tmp_path)
    flags = "--load_features", tmp_path, "--nb_knn", "30", "--temperature"
    assert evaluate(*flags, "0.001") != evaluate(*flags, "100")


def test_the_seed_of_random_weights_is_the_flags(labelled, tmp_path):
    random = "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 16".split()
    rows = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        flags = "--data_path", labelled, "--seed", seed, "--dump_features", tmp_path / name
        evaluate(*random, *flags)
        rows.append(torch.load(tmp_path / name / "testfeat.pth"))
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_a_small_temperature_leaves_the_nearest_alone():
    train, test = (F.normalize(torch.randn(size, 6), dim=1) for size in (50, 20))
    data = train, torch.randint(4, (50,)), test, torch.randint(4, (20,))
    assert eval_knn.knn_classifier(*data, 20, 1e-6, 4)[0] == eval_knn.knn_classifier(*data, 1, 0.07, 4)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no weights given"),
        (["--pretrained_weights", "/nowhere.pth"], "no such file"),
        (["--pretrained_weights", "pixels", "--dump_features", __file__], "File exists .*--dump_features"),
    ],
)
def test_bad_usage_is_one_clear_line(labelled, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate("--data_path", labelled, *flags)


def test_weights_preprocessing_and_images_are_said(labelled, capsys):
    pixels(labelled, "--nb_knn", "3")
    weights, preprocessing, train, val = capsys.readouterr().out.splitlines()[:4]
    assert "/train: 15 images, 3 classes" in train and "/val: 9 images, 3 classes" in val
    assert weights.startswith("weights: pixels")
    normalization = "mean (0.485, 0.456, 0.406), deviation (0.229, 0.224, 0.225)"
    assert preprocessing == f"preprocessing: 16 pixels, {normalization}"


@pytest.mark.parametrize("weights", ["pixels", "random"])
def test_the_demos_images_are_evaluated_as_a_user_would(monkeypatch, weights):
    monkeypatch.setattr("support.data.Shapes.__len__", lambda shapes: 40)
    flags = "--demo", "--pretrained_weights", weights, "--image_size", "64"
    arch = ("--arch", "vit_nano") if weights == "random" else ()
    result = evaluate(*flags, *arch, "--nb_knn", "20")
    assert list(result) == [20] and 0 <= result[20][0] <= result[20][1] <= 100


@pytest.mark.parametrize("flag", ["--data_path", "--dataset"])
def test_other_data_beside_the_demo_is_refused(flag):
    with pytest.raises(UserError, match=f"--demo draws its own images .{flag}.*: leave out one of the two"):
        evaluate("--demo", "--pretrained_weights", "pixels", flag, "other")


def test_a_class_that_val_lacks_changes_no_label(tmp_path):
    """Images that are white on one side: pixels tell which."""
    white = {"a": (0, 0, 8, 16), "b": (0, 0, 16, 8), "c": (8, 0, 16, 16)}
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                image = Image.new("RGB", (16, 16))
                image.paste((255, 255, 255), white[name])
                image.save(folder / f"{i}.png")
    assert pixels(tmp_path, "--nb_knn", "2")[2] == (100, 100)


@pytest.mark.slow
def test_a_broken_image_is_named_by_the_process_that_reads_it(tmp_path):
    for name in "ab":
        save_images(tmp_path / "train" / name, 2)
        save_images(tmp_path / "val" / name, 2)
    broken = tmp_path / "train" / "a" / "001.png"  # the second image, so it is the second process's
    broken.write_bytes(b"not an image")
    flags = "--pretrained_weights pixels --image_size 16 --num_workers 0".split()
    ended = torchrun(2, "eval_knn.py", *flags, "--data_path", tmp_path, check=False)
    named = [line for line in ended.stderr.splitlines() if line.startswith("error: cannot read image: ")]
    assert ended.returncode and len(named) == 1 and named[0].endswith(f"({broken}): repair or remove it")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(labelled):
    flags = (
        "eval_knn.py", "--pretrained_weights", "random", "--arch", "resnet18", "--image_size", "32",
        "--data_path", labelled, "--num_workers", "0", "--nb_knn", "3", "--batch_size_per_gpu", "4",
        "--seed", "1",
    )  # fmt: skip
    assert len(same_of_one_and_of_two("3-NN", *flags)) == 1


@pytest.mark.parametrize(("step", "found"), [(0.001, 1), (0.025, 0)])  # radians between neighbours
def test_the_knn_of_a_training_asks_twenty_neighbours_and_counts_the_near_more(step, found):
    """By increasing distance, 9 images of class 0, 11 of class 1 and 10 of class 0."""
    train = [(Image.new("RGB", (4, 4), (i, i, i)), int(9 <= i < 20)) for i in range(30)]
    val = [(Image.new("RGB", (4, 4)), label) for label in (found, found, 1 - found)]

    def model(images):
        angle = step * images.float().mean(dim=(1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], dim=1) * (0.1 + angle[:, None])  # of any length

    top1 = eval_knn.knn_top1(model, train, val, as_tensor, torch.device("cpu"))
    assert top1 == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("kind", [ImageError, WrongFormat])
def test_images_that_broke_or_changed_do_not_end_a_training(kind, capsys):
    def evaluate(model) -> float:
        raise kind("archive was changed", "val.tar", "run it again")

    network = MultiCropWrapper(nn.Linear(3, 3), nn.Identity())
    assert eval_knn.PeriodicKNN(evaluate, 1, 1.0, None, lambda: False)(2, {"teacher": network}) == {}
    said = capsys.readouterr().out
    assert said == "warning: epoch 2: no k-NN: archive was changed (val.tar): run it again\n"


def test_knn_takes_its_share_of_the_time_since_the_start(monkeypatch):
    now, seen, stopped = [5000.0], [], [False]
    monkeypatch.setattr(eval_knn.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(eval_knn, "broadcast_buffers", seen.append)
    network = MultiCropWrapper(nn.Linear(3, 3), nn.Identity())

    def evaluate(model) -> float:
        now[0] += 10
        features = model(torch.randn(4, 3))
        seen.append((network.training, torch.equal(features, features.bfloat16().float())))
        return 50.0

    knn, taken = eval_knn.PeriodicKNN(evaluate, 1, 0.1, torch.bfloat16, lambda: stopped[0]), []
    for epoch in range(9):
        now[0] += 50
        taken.append(bool(knn(epoch, {"teacher": network})))
        assert network.training
    # 50, 110, 170, 220, 280, 330, 390, 440 and 500 seconds on, after 0, 10, 20, 20, 30, 30, 40, 40 and 50.
    assert taken == [True, True, False, True, False, True, False, True, True]
    assert seen == [network, (False, True)] * 6  # one rank's buffers, in evaluation mode, in bf16
    now[0], stopped[0] = 15_000.0, True
    assert knn(9, {"teacher": network}) == {} and network.training
