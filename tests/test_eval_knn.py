import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import eval_knn
from support.data import open_labelled_images
from support.errors import UserError
from support.pixels import eval_transform
from tests.conftest import run, save_images, torchrun


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
        assert eval_knn.knn_classifier(*args) == pytest.approx(brute_force(*args))


def test_all_k_at_once_equal_one_k_at_a_time():
    train, test = (F.normalize(torch.randn(size, 6), dim=1) for size in (50, 20))
    data = train, torch.randint(4, (50,)), test, torch.randint(4, (20,))
    together = eval_knn.knn_accuracies(*data, [1, 5, 50], 0.07, 4)
    assert together == {k: eval_knn.knn_classifier(*data, k, 0.07, 4) for k in (1, 5, 50)}


def test_features_are_unit_length_and_in_the_order_of_the_images(labelled):
    images = open_labelled_images("train", str(labelled))
    features, labels = eval_knn.extract_features(nn.Flatten(), images, 16, torch.device("cpu"), batch_size=4)
    assert labels.tolist() == [label for _, label in images.samples]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(15))
    transform = eval_transform(16)
    alone = F.normalize(transform(images[7][0]).flatten(), dim=0)
    torch.testing.assert_close(features[7], alone)


def evaluate(*flags: str) -> dict:
    return eval_knn.main(eval_knn.parse_args([*flags, "--num_workers", "0"]))


def pixels(labelled, *flags: str) -> dict:
    data = "--pretrained_weights", "pixels", "--image_size", "16", "--data_path", str(labelled)
    return evaluate(*data, *flags)


def test_prints_the_published_line_and_limits_k(labelled, capsys):
    result = pixels(labelled, "--nb_knn", "3", "200", "100")
    assert list(result) == [3, 15]
    out = capsys.readouterr().out
    assert "note: --nb_knn limited to the 15 training images" in out
    top1, top5 = result[3]
    assert f"3-NN classifier result: Top1: {top1}, Top5: {top5}" in out


def test_one_validation_image_will_do(tmp_path):
    for name in "ab":
        save_images(tmp_path / "train" / name, 3)
        save_images(tmp_path / "val" / name, 1)
    (tmp_path / "val" / "b" / "000.png").write_bytes((tmp_path / "train" / "b" / "001.png").read_bytes())
    assert set(pixels(tmp_path, "--nb_knn", "1")) == {1}


def test_classes_of_train_and_val_must_agree(tmp_path):
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            save_images(tmp_path / split / name, 1)
    with pytest.raises(UserError, match="differ in classes: b, c"):
        pixels(tmp_path)


def test_features_can_be_dumped_and_loaded(labelled, tmp_path):
    first = pixels(labelled, "--nb_knn", "3", "--dump_features", str(tmp_path / "features"))
    names = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert names == ["testfeat.pth", "testlabels.pth", "trainfeat.pth", "trainlabels.pth"]
    assert evaluate("--load_features", str(tmp_path / "features"), "--nb_knn", "3") == first
    with pytest.raises(UserError, match="no such file"):
        evaluate("--load_features", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("testfeat", torch.rand(9, 5), r"do not fit together: \(15, 768\), \(15,\), \(9, 5\), \(9,\)"),
        ("testlabels", torch.arange(8), r"do not fit together: .* \(8,\)"),
        ("trainfeat", {}, r"do not fit together: \(\)"),
        ("trainfeat", torch.full((15, 768), torch.nan), "not finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(labelled, tmp_path, name, tensor, message):
    pixels(labelled, "--nb_knn", "3", "--dump_features", str(tmp_path))
    torch.save(tensor, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match=message):
        evaluate("--load_features", str(tmp_path))


def test_a_small_temperature_leaves_the_nearest_alone():
    train, test = (F.normalize(torch.randn(size, 6), dim=1) for size in (50, 20))
    data = train, torch.randint(4, (50,)), test, torch.randint(4, (20,))
    assert eval_knn.knn_classifier(*data, 20, 1e-6, 4)[0] == eval_knn.knn_classifier(*data, 1, 0.07, 4)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no weights given"),
        (["--pretrained_weights", "/nowhere.pth"], "no such file"),
        (["--pretrained_weights", "pixels", "--nb_knn", "0"], "--nb_knn"),
        (["--temperature", "0"], "--temperature 0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0"),
        (["--num_workers=-1"], "--num_workers -1"),
        (["--seed=-1"], "--seed -1"),
        (["--image_size", "0"], "--image_size 0"),
        (["--patch_size", "0"], "--patch_size 0"),
        (["--pretrained_weights", "pixels", "--dump_features", __file__], "File exists .*--dump_features"),
    ],
)
def test_bad_usage_is_one_clear_line(labelled, flags, message):
    with pytest.raises(UserError, match=message):
        eval_knn.main(eval_knn.parse_args(["--num_workers", "0", "--data_path", str(labelled), *flags]))


def test_a_broken_image_is_named_by_the_process_that_reads_it(tmp_path):
    for name in "ab":
        save_images(tmp_path / "train" / name, 2)
        save_images(tmp_path / "val" / name, 2)
    broken = tmp_path / "train" / "a" / "001.png"  # the second image, so it is the second process's
    broken.write_bytes(b"not an image")
    flags = "--pretrained_weights pixels --image_size 16 --num_workers 0".split()
    ended = torchrun(2, "eval_knn.py", *flags, "--data_path", str(tmp_path), check=False)
    named = [line for line in ended.stderr.splitlines() if line.startswith("error: cannot read image: ")]
    assert ended.returncode and len(named) == 1 and named[0].endswith(f"({broken}): repair or remove it")


def test_published_flags_and_defaults():
    args = vars(eval_knn.parse_args([]))
    published = {
        "batch_size_per_gpu": 128, "nb_knn": [10, 20, 100, 200], "temperature": 0.07,
        "pretrained_weights": "", "use_cuda": True, "arch": None, "patch_size": None,
        "checkpoint_key": None, "dump_features": None, "load_features": None, "num_workers": 10,
        "dist_url": "env://", "local_rank": 0,
    }  # fmt: skip
    assert {name: args[name] for name in published} == published


def test_two_processes_give_what_one_gives(labelled):
    flags = (
        "eval_knn.py", "--pretrained_weights", "random", "--arch", "resnet18", "--image_size", "32",
        "--data_path", str(labelled), "--num_workers", "0", "--nb_knn", "3", "--batch_size_per_gpu", "4",
        "--seed", "1",
    )  # fmt: skip
    lines = [
        [line for line in process.stdout.splitlines() if "3-NN" in line]
        for process in (run(*flags), torchrun(2, *flags))
    ]
    assert len(lines[0]) == 1 and lines[0] == lines[1]
