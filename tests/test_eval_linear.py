import argparse
import copy
import functools
import multiprocessing
import random
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision import transforms

import eval_linear
from eval_linear import LinearClassifiers, validate_network
from support import backbones, data, logistic, restart, subsets
from support.checkpoints import load_checkpoint, save_checkpoint
from support.distributed import fix_random_seeds
from support.errors import TrainingError, UserError
from support.features import compute, concat_patches, frozen_features
from support.loading import EpochBatches
from support.pixels import to_pixels
from support.weights import load_backbone
from tests import golden
from tests.conftest import call, log_of, ramps, run, same_of_one_and_of_two, save_images, slopes, torchrun

PUBLISHED = {
    "n_last_blocks": 4, "avgpool_patchtokens": False, "pretrained_weights": "", "epochs": 100,
    "batch_size_per_gpu": 128, "dist_url": "env://", "local_rank": 0, "num_workers": 10, "val_freq": 1,
    "output_dir": ".", "evaluate": False,
}  # fmt: skip
# Flags whose published default gives way to what the weights and the data say.
OPEN = {"arch": "vit_small", "patch_size": 16, "checkpoint_key": "teacher", "num_labels": 1000}

# A random network on 32 pixels, which takes no time.
FLAGS = (
    "--pretrained_weights random --arch vit_nano --patch_size 8 --image_size 32 --epochs 3 "
    "--batch_size_per_gpu 4 --num_workers 0"
).split()


LOG = "log_linear.txt"


def probe(labelled, out, *flags) -> list[dict]:
    return call(eval_linear, *FLAGS, "--data_path", labelled, "--output_dir", out, *flags)


@pytest.fixture(scope="module")
def probed(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    probe(labelled, folder)
    return folder


@pytest.fixture
def finished(probed, tmp_path):
    """A copy of the folder that `probe(labelled, ...)` fills."""
    return shutil.copytree(probed, tmp_path / "finished")


def change_checkpoint(folder, **changes) -> None:
    path = folder / "checkpoint.pth.tar"
    save_checkpoint(load_checkpoint(path) | changes, path)


def test_published_flags_and_defaults():
    args = vars(eval_linear.parse_args([]))
    assert {name: args[name] for name in PUBLISHED} == PUBLISHED and args["lr"] == [0.001]
    assert all(args[name] is None for name in OPEN)
    flags = PUBLISHED | OPEN
    argv = [f"--{name}={value}" for name, value in flags.items() if value != "" and name != "evaluate"]
    replayed = vars(eval_linear.parse_args([*argv, "--lr", "0.001"]))
    assert {name: replayed[name] for name in flags} == flags


# ---- features


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return backbones.build_backbone("vit_nano", 8, 32)[0].eval()


def test_features_are_those_of_the_published_evaluation(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        layers = vit.get_intermediate_layers(images, 4)
    four = frozen_features(vit, images, 4, False)
    torch.testing.assert_close(four, torch.cat([layer[:, 0] for layer in layers], dim=1))
    # CLS and mean patch of the last block, component by component.
    both = frozen_features(vit, images, 1, True)
    torch.testing.assert_close(both[:, 0::2], layers[-1][:, 0])
    torch.testing.assert_close(both[:, 1::2], layers[-1][:, 1:].mean(dim=1))
    assert frozen_features(vit, images, 4, True).shape == (2, 5 * 128)
    assert four.dtype == torch.float32


def test_other_networks_give_their_output():
    resnet = backbones.build_backbone("resnet18")[0].eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen_features(resnet, images, 4, True), resnet(images))


def test_all_patch_tokens_one_after_another(vit):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit.get_intermediate_layers(images, 1)[0]
    exact, half = (compute(concat_patches, vit, images, dtype) for dtype in (None, torch.bfloat16))
    assert torch.equal(exact, tokens[:, 1:].reshape(2, 16 * 128))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, rtol=0.1, atol=0.1)


def test_a_probe_of_patch_tokens(labelled, tmp_path, capsys):
    flags = "--concat_patchtokens", "true"
    probe(labelled, tmp_path, *flags, "--n_last_blocks", 99)  # more blocks than the network has
    said = capsys.readouterr().out
    assert "features: patch tokens, 2048 wide" in said
    assert "--n_last_blocks has no effect: it is not for --concat_patchtokens" in said
    with pytest.raises(
        UserError, match="trained with --concat_patchtokens True .*give --concat_patchtokens True"
    ):
        probe(labelled, tmp_path, "--evaluate", "--n_last_blocks", 1)
    probe(labelled, tmp_path, *flags, "--evaluate", "--n_last_blocks", 1)
    saved = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=False)
    del saved["identity"]["concat_patchtokens"]  # as a probe of before this flag
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(UserError, match="concat_patchtokens False -> True"):
        probe(labelled, tmp_path, *flags, "--n_last_blocks", 99)
    with pytest.raises(UserError, match="Pixels has no patch tokens"):
        probe(labelled, tmp_path / "pixels", *flags, "--pretrained_weights", "pixels")


def test_precision_is_that_of_the_forward_pass(vit):
    seen = []
    handle = vit.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images = torch.randn(2, 3, 32, 32)
    features = functools.partial(frozen_features, n_last_blocks=4, avgpool_patchtokens=False)
    exact, half = (compute(features, vit, images, dtype) for dtype in (None, torch.bfloat16))
    handle.remove()
    assert seen == [torch.float32, torch.bfloat16] and half.dtype == torch.float32 and half.is_inference()
    assert not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, rtol=0.1, atol=0.1)


def test_training_images_are_cropped_and_flipped_by_torchvisions_defaults():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    dataset = eval_linear.AugmentedImages([(noise, 3)], 16, seed=7)
    published = transforms.Compose([transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip()])
    for epoch in range(20):
        image, label = dataset[epoch, 0]
        torch.manual_seed(random.Random(f"7 {epoch} 0").getrandbits(32))
        assert torch.equal(image, to_pixels(published(noise))) and label == 3


def test_crops_for_a_rectangle_are_not_squeezed():
    dataset = eval_linear.AugmentedImages([(ramps((120, 90)), 0)], (32, 16), seed=7)
    for epoch in range(30):
        pixels, _ = dataset[epoch, 0]
        assert pixels.shape == (3, 32, 16)
        (_, red), (green, _) = slopes(pixels)
        assert 0.7 < abs(red / green) < 1.45


def test_a_training_image_depends_on_seed_epoch_and_index_alone():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    dataset, other = (eval_linear.AugmentedImages([(noise, 0)] * 2, 16, seed) for seed in (0, 1))
    first = dataset[3, 1][0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(dataset[3, 1][0], first)
    assert torch.equal(torch.get_rng_state(), state)
    for change in (dataset[3, 0], dataset[4, 1], other[3, 1]):
        assert not torch.equal(change[0], first)


# ---- training


def closed_form(classifiers: LinearClassifiers) -> None:
    for classifier in classifiers:
        golden.fill_model(classifier)


def test_the_first_losses_equal_a_plain_loop():
    features, labels = golden.fill("linear/x", (20, 12)), torch.arange(20) % 5
    batches = [(features[i : i + 4], labels[i : i + 4]) for i in range(0, 20, 4)] * 4

    plain = nn.Linear(12, 5)
    with torch.no_grad():
        plain.weight.copy_(golden.fill("linear.weight", (5, 12), 0.05))
        plain.bias.copy_(golden.fill("linear.bias", (5,), 0.05))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, 4, eta_min=0)
    expected = []
    for step, (x, y) in enumerate(batches):
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
        if step % 5 == 4:
            scheduler.step()

    classifiers = LinearClassifiers(1, 12, 5)
    closed_form(classifiers)
    optimizer = eval_linear.build_optimizer(classifiers, [0.3])
    scheduler = CosineAnnealingLR(optimizer, 4, eta_min=0)
    losses = []
    for epoch in range(4):
        epoch_batches = batches[5 * epoch : 5 * epoch + 5]
        losses += [loss.item() for loss, _ in eval_linear.train(classifiers, optimizer, epoch_batches)]
        scheduler.step()
    assert len(losses) == 20 and losses == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0]


def test_classifiers_of_several_rates_do_not_touch_each_other():
    torch.manual_seed(0)
    batches = [(torch.randn(6, 12), torch.randint(5, (6,))) for _ in range(10)]
    together = LinearClassifiers(3, 12, 5)
    rates = [0.01, 1e4, 0.5]  # the second one runs away
    begin = copy.deepcopy(together[0].state_dict())
    list(eval_linear.train(together, eval_linear.build_optimizer(together, rates), batches))
    for i in (0, 2):
        alone = LinearClassifiers(1, 12, 5)
        alone[0].load_state_dict(begin)
        list(eval_linear.train(alone, eval_linear.build_optimizer(alone, [rates[i]]), batches))
        torch.testing.assert_close(together[i].state_dict(), alone[0].state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4096, 3])
def test_top1_and_top5_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(eval_linear, "CHUNK", chunk)
    scores = torch.tensor(
        [
            [9, 8, 7, 6, 5, 4, 3.0],  # label 0: first
            [9, 8, 7, 6, 5, 4, 3.0],  # label 4: fifth
            [9, 8, 7, 6, 5, 4, 3.0],  # label 5: sixth
            [0, 0, 0, 0, 0, 0, 1.0],  # label 6: first
        ]
    )
    labels = torch.tensor([0, 4, 5, 6])
    both = nn.ModuleList()
    both.forward = lambda x: torch.stack([x, -x])  # a second classifier that ranks the other way round
    first, second = validate_network(both, scores, labels)
    assert (first["acc1"], first["acc5"]) == (50.0, 75.0)
    assert first["loss"] == pytest.approx(F.cross_entropy(scores, labels).item())
    # Reversed: ranks 7, 3, 2 and 7.
    assert (second["acc1"], second["acc5"]) == (0.0, 50.0)


def test_validation_takes_the_memory_of_a_training_step():
    features, labels = torch.randn(4096, 4), torch.arange(4096)
    with torch.profiler.profile(profile_memory=True) as seen:
        validate_network(LinearClassifiers(2, 4, 5000), features, labels)
    assert max(each.cpu_memory_usage for each in seen.events()) < 4 * (2 * 4096 * 5000) / 4  # of all scores


def test_a_classifier_that_ran_away_has_nothing_right():
    classifiers = LinearClassifiers(2, 4, 3)
    classifiers[0].linear.bias.data[:] = torch.nan
    lost, sound = validate_network(classifiers, torch.randn(6, 4), torch.tensor([0, 1, 2] * 2))
    assert (lost["acc1"], lost["acc5"]) == (0, 0) and sound["acc5"] == 100  # of three classes


def test_classifiers_start_with_small_weights():
    first, other = LinearClassifiers(2, 1000, 50)
    assert first.linear.weight.std().item() == pytest.approx(0.01, rel=0.05) and not first.linear.bias.any()
    assert torch.equal(first.linear.weight, other.linear.weight)
    assert first(torch.randn(2, 10, 100)).shape == (2, 50)


# ---- real runs


def test_a_run_reports_the_best_of_several_rates(labelled, tmp_path, capsys):
    best = probe(labelled, tmp_path, "--lr", 0.01, 3, 30)
    records = log_of(tmp_path, LOG)
    assert [(r["epoch"], r["lr"]) for r in records] == [(e, lr) for e in range(3) for lr in (0.01, 3, 30)]
    for i, row in enumerate(best):
        assert row["acc1"] == max(r["test_acc1"] for r in records[i::3])
    out = capsys.readouterr().out
    top = max(row["acc1"] for row in best)
    assert f"Best accuracy: top-1 {top:.2f} %" in out and out.count("top-1") >= 4
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert checkpoint["state_dict"]["linear.weight"].shape == (3, 512)  # classes counted in the data
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == pytest.approx([0] * 3)
    # The classifier that was best is the one that --evaluate sees.
    again = probe(labelled, tmp_path, "--evaluate")
    assert again[0]["acc1"] == pytest.approx(top)
    assert f"on the 9 test images: top-1 {top:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--cache_features",)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(labelled, tmp_path, monkeypatch, flags):
    probe(labelled, tmp_path / "whole", *flags)

    def stop(state, path, previous=None):
        save_checkpoint(state, path, previous)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(restart, "save_checkpoint", stop)
        probe(labelled, tmp_path / "parts", *flags)
    probe(labelled, tmp_path / "parts", *flags)
    whole, parts = (load_checkpoint(tmp_path / n / "checkpoint.pth.tar") for n in ("whole", "parts"))
    assert whole["best"] == parts["best"] and whole["epoch"] == parts["epoch"] == 3
    torch.testing.assert_close(whole["classifiers"], parts["classifiers"], rtol=0, atol=0)


def test_of_equal_accuracies_the_classifier_that_is_reported_is_the_one_that_is_kept(capsys):
    classifiers, state = LinearClassifiers(2, 4, 3), {"best": [{"acc1": -1.0}, {"acc1": -1.0}]}
    kept, first = [], classifiers[1].linear.weight.clone()
    for epoch, accuracies in enumerate([(50.0, 60.0), (60.0, 60.0)]):
        results = [{"acc1": acc1, "acc5": 90.0 + i} for i, acc1 in enumerate(accuracies)]
        eval_linear.keep_best(state, classifiers, results, epoch)
        kept.append(state["state_dict"])
        nn.init.zeros_(classifiers[1].linear.weight)  # as a step changes it
    assert kept[0] is kept[1] and torch.equal(kept[0]["linear.weight"], first)
    capsys.readouterr()
    eval_linear.report([0.1, 0.2], state["best"])
    assert "top-5 91.00 %, with --lr 0.2" in capsys.readouterr().out


def test_the_mean_loss_is_over_the_images_not_over_the_batches(labelled, tmp_path):
    """The last batch of 15 images has one; a learning rate of 0 leaves the classifier as it is."""
    flags = "--cache_features", "--epochs", 1, "--lr", 1e-20
    for size in (15, 14):
        probe(labelled, tmp_path / str(size), *flags, "--batch_size_per_gpu", size)
    whole, parts = (log_of(tmp_path / name, LOG)[0]["train_loss"] for name in ("15", "14"))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_cached_batches_follow_the_sampler():
    sampler = EpochBatches(15, 4, seed=0, first_step=4, last_step=8, drop_last=False)
    features, labels = torch.arange(15.0)[:, None], torch.arange(15)
    batches = list(eval_linear.cached_batches(features, labels, sampler))
    order = torch.cat([y for _, y in batches])
    assert [len(y) for _, y in batches] == [4, 4, 4, 3] and order.tolist() == [
        i for batch in sampler for _, i in batch
    ]
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)


def test_cached_features_are_those_of_the_plain_images(labelled, tmp_path, monkeypatch):
    kept, cached_batches = [], eval_linear.cached_batches

    def keep(features, *args):
        kept.append(features)
        return cached_batches(features, *args)

    monkeypatch.setattr(eval_linear, "cached_batches", keep)
    probe(labelled, tmp_path, "--cache_features")
    fix_random_seeds(0)
    frozen = load_backbone("random", arch="vit_nano", patch_size=8, image_size=32)
    train_images, _ = data.open_train_and_val(data.Source(str(labelled)))
    alone = [
        frozen_features(frozen.network, frozen.transform(image)[None], 4, False) for image, _ in train_images
    ]
    torch.testing.assert_close(kept[0], torch.cat(alone))


def test_a_probe_of_pixels_tells_shades_apart(tmp_path):
    for split in ("train", "val"):
        shaded(tmp_path / "data", split, "black", "dark", "white")
    flags = *PIXELS[:4], "--lr", 1, "--epochs", 40, "--val_freq", 40
    assert probe(tmp_path / "data", tmp_path / "out", *flags)[0]["acc1"] == 100


@pytest.mark.slow
def test_two_processes_train_as_one_on_twice_the_batch(tmp_path):
    for seed, name in enumerate("ab"):
        save_images(tmp_path / "data" / "train" / name, 8, seed=seed)
        save_images(tmp_path / "data" / "val" / name, 3, seed=10 + seed)
    common = ["eval_linear.py", *FLAGS, "--data_path", tmp_path / "data", "--lr", "1", "0.1"]
    run(*common, "--output_dir", tmp_path / "one", "--batch_size_per_gpu", "8")
    torchrun(2, *common, "--output_dir", tmp_path / "two", "--batch_size_per_gpu", "4")
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("one", "two"))
    for checkpoint in (one, two):
        rates = [group["initial_lr"] for group in checkpoint["optimizer"]["param_groups"]]
        assert rates == pytest.approx([8 / 256, 0.8 / 256])
    torch.testing.assert_close(two["classifiers"], one["classifiers"], rtol=1e-4, atol=1e-6)
    for a, b in zip(log_of(tmp_path / "one", LOG), log_of(tmp_path / "two", LOG), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_a_published_classifier_evaluates(labelled, tmp_path):
    """As published: `module.linear.*` in `state_dict`, beside an optimizer and a scheduler."""
    trained = probe(labelled, tmp_path / "run", "--lr", 1)
    classifier = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["state_dict"]
    state = {f"module.{name}": value for name, value in classifier.items()}
    published = {"epoch": 100, "state_dict": state, "optimizer": {"state": {}}, "best_acc": 77.0}
    torch.save(published, tmp_path / "linearweights.pth")
    flags = "--evaluate", "--linear_weights", tmp_path / "linearweights.pth"
    result = probe(labelled, tmp_path, *flags)
    assert result[0]["acc1"] == pytest.approx(trained[0]["acc1"])
    misfit = r"of another shape \(linear.weight\) .*128 features.*check --concat_patchtokens, --n_last_blocks"
    with pytest.raises(UserError, match=misfit):
        probe(labelled, tmp_path, *flags, "--n_last_blocks", 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.1", "0.1"], "a rate is given twice"),
        (["--n_last_blocks", "7"], "network has 6 blocks"),
        (["--output_dir", __file__], "File exists"),
        (["--num_labels", "2"], "the data has 3 classes"),
        (["--linear_weights", "x.pth"], "add --evaluate"),
        (["--evaluate"], "folder has no checkpoint.pth.tar .--output_dir"),
        (["--evaluate", "--logistic"], "saves no classifier to evaluate .*--logistic"),
        (["--data_path", "/nowhere"], "no such file or folder"),
        (["--image_size", "30"], "not a multiple of --patch_size 8 .--image_size 30."),
    ],
)
def test_bad_usage_is_one_clear_line(labelled, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        probe(labelled, tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_run_is_refused(labelled, finished):
    with pytest.raises(UserError, match=r": lr \[0.001\] -> \[0.1\] .*or another --output_dir$"):
        probe(labelled, finished, "--lr", 0.1)
    with pytest.raises(UserError, match="trained with --n_last_blocks 4 .*--n_last_blocks 3"):
        probe(labelled, finished, "--evaluate", "--n_last_blocks", 3)
    pixels = "--pretrained_weights", "pixels"
    with pytest.raises(UserError, match=r": backbone \w+ -> \w+ "):
        probe(labelled, finished, *pixels)
    with pytest.raises(UserError, match="trained on the features of other weights"):
        probe(labelled, finished, *pixels, "--evaluate")


@pytest.mark.parametrize(("split", "words"), [("train", "training"), ("val", "validation")])
def test_other_images_are_another_run(labelled, tmp_path, split, words):
    shutil.copytree(labelled, tmp_path / "data")
    best = probe(labelled, tmp_path / "out")
    assert probe(tmp_path / "data", tmp_path / "out", "--num_workers", 1) == best  # a moved folder
    save_images(tmp_path / "data" / split / "a", 2, size=50, seed=77)  # as many images, other ones
    with pytest.raises(UserError, match=rf": {words} images \w+ -> \w+ .*another --output_dir"):
        probe(tmp_path / "data", tmp_path / "out", "--epochs", 3)
    assert len(log_of(tmp_path / "out", LOG)) == 3


def test_a_checkpoint_that_does_not_record_its_images_is_said_to(labelled, finished, capsys):
    path = finished / "checkpoint.pth.tar"
    old = load_checkpoint(path)
    for lacking, named in (
        (["identity"], "{path} does not record .*, training images, validation images: the run may have"),
        (["identity", "args"], "{path} does not record settings: the run may have begun with other values"),
    ):
        save_checkpoint({name: value for name, value in old.items() if name not in lacking}, path)
        probe(labelled, finished)
        assert re.search(named.format(path=path), capsys.readouterr().out)


def test_an_older_probe_was_trained_on_all_images(labelled, finished):
    identity = load_checkpoint(finished / "checkpoint.pth.tar")["identity"]
    del identity["few_shot"]
    change_checkpoint(finished, identity=identity)
    with pytest.raises(UserError, match="few_shot None -> "):
        probe(labelled, finished, "--few_shot", 1)


SHADES = {"black": 0, "dark": 80, "grey": 160, "white": 255}


def shaded(folder, split: str, *names: str) -> None:
    """Images of one shade per class, which pixels tell apart."""
    for name in names:
        (folder / split / name).mkdir(parents=True)
        for i in range(3):
            shade = (max(0, SHADES[name] - i),) * 3
            Image.new("RGB", (16, 16), shade).save(folder / split / name / f"{i}.png")


PIXELS = (
    "--pretrained_weights pixels --image_size 8 --lr 1 --epochs 40 --cache_features --val_freq 40".split()
)


def test_classes_are_matched_by_name(tmp_path):
    """Where val/ lacks the first class, positions would give other names."""
    shaded(tmp_path / "all", "train", "black", "dark", "white")
    shaded(tmp_path / "all", "val", "black", "dark", "white")
    assert probe(tmp_path / "all", tmp_path / "out", *PIXELS)[0]["acc1"] == 100
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoint.pth.tar")
    assert checkpoint["classes"] == ["black", "dark", "white"]

    flags = "--pretrained_weights", "pixels", "--image_size", 8, "--evaluate"
    shaded(tmp_path / "less", "val", "dark", "white")
    assert probe(tmp_path / "less", tmp_path / "out", *flags)[0]["acc1"] == 100
    shaded(tmp_path / "more", "val", "dark", "grey", "white")
    with pytest.raises(UserError, match="does not know 1 class: grey"):
        probe(tmp_path / "more", tmp_path / "out", *flags)
    with pytest.raises(UserError, match="the classifier has 3 classes .*--num_labels 4"):
        probe(tmp_path / "all", tmp_path / "out", *flags, "--num_labels", 4)


def test_val_may_lack_classes_of_train_in_training(tmp_path):
    shaded(tmp_path / "data", "train", "black", "dark", "white")
    shaded(tmp_path / "data", "val", "dark", "white")
    best = probe(tmp_path / "data", tmp_path / "out", *PIXELS)
    assert best[0]["acc1"] == 100
    again = probe(tmp_path / "data", tmp_path / "out", *PIXELS[:4], "--evaluate")
    assert again[0]["acc1"] == 100


def test_a_classifier_without_names_needs_data_with_all_its_classes(tmp_path):
    shaded(tmp_path / "all", "train", "black", "dark", "white")
    shaded(tmp_path / "all", "val", "black", "dark", "white")
    probe(tmp_path / "all", tmp_path / "out", *PIXELS)
    published = {"state_dict": load_checkpoint(tmp_path / "out" / "checkpoint.pth.tar")["state_dict"]}
    torch.save(published, tmp_path / "linear.pth")
    flags = *PIXELS[:4], "--evaluate", "--linear_weights", tmp_path / "linear.pth"
    assert probe(tmp_path / "all", tmp_path / "out", *flags)[0]["acc1"] == 100
    shaded(tmp_path / "less", "val", "dark", "white")
    with pytest.raises(UserError, match="3 classes without names, the data has 2"):
        probe(tmp_path / "less", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pretrained_weights", "pixels", "--n_last_blocks", 1), "--n_last_blocks has no effect"),
        (
            ("--pretrained_weights", "pixels", "--avgpool_patchtokens", "true"),
            "--avgpool_patchtokens has no effect",
        ),
        (("--evaluate", "--lr", 0.1), "--lr has no effect: --evaluate does not train"),
        (("--logistic", "--lr", 0.1), "--lr has no effect: --logistic ignores it"),
        (("--few_shot_seeds", 2), "--few_shot_seeds has no effect: it is for --logistic --few_shot"),
        ((), None),
    ],
)
def test_flags_without_effect_are_named(labelled, finished, tmp_path, capsys, flags, words):
    out = finished if "--evaluate" in flags else tmp_path / "other"
    probe(labelled, out, "--epochs", 1, *flags)
    said = capsys.readouterr().out
    assert f"warning: {words}" in said if words else "no effect" not in said


def test_a_probe_says_its_images_weights_and_preprocessing(labelled, tmp_path, capsys):
    probe(labelled, tmp_path, "--epochs", 1)
    said = capsys.readouterr().out
    assert "/train: 15 images, 3 classes" in said and "/val: 9 images, 3 classes" in said
    assert "weights: random" in said and "preprocessing: 32 pixels, mean (0.485, " in said
    probe(labelled, tmp_path, "--evaluate")
    assert "/val: 9 images, 3 classes" in capsys.readouterr().out


def test_a_rate_that_runs_away_leaves_the_others(labelled, tmp_path):
    best = probe(labelled, tmp_path, "--lr", 1e40, 0.1, "--cache_features")
    assert best[0]["acc1"] == 0 < best[1]["acc1"]
    with pytest.raises(TrainingError, match="every --lr is not finite .*: lower --lr"):
        probe(labelled, tmp_path / "all", "--lr", 1e40, 1e39, "--cache_features")


def test_no_worker_outlives_an_error(labelled, tmp_path):
    with pytest.raises(TrainingError) as error:
        probe(labelled, tmp_path, "--lr", 1e40, "--num_workers", 1)
    assert error.tb and multiprocessing.active_children() == []  # its traceback keeps the frames


def test_a_run_that_is_over_is_reported_without_decoding_the_images(labelled, tmp_path, monkeypatch):
    shutil.copytree(labelled, tmp_path / "data")
    best = probe(tmp_path / "data", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(data.ImageFiles, "image", lambda images, index: pytest.fail("decodes an image"))
        assert probe(tmp_path / "data", tmp_path / "out") == best
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(bytes(path.stat().st_size))  # as many bytes, and no image
    with pytest.raises(UserError, match="differs from the run to resume: training images"):
        probe(tmp_path / "data", tmp_path / "out")


def test_validation_every_so_many_epochs_and_at_the_end(labelled, tmp_path):
    probe(labelled, tmp_path, "--epochs", 4, "--val_freq", 2, "--cache_features")
    assert ["test_acc1" in record for record in log_of(tmp_path, LOG)] == [True, False, True, True]


def test_features_are_those_of_the_flags():
    flags = "--precision bf16 --avgpool_patchtokens true --n_last_blocks 2".split()
    args = eval_linear.parse_args([*FLAGS, *flags])
    built, images = eval_linear.build_features(args, torch.device("cpu")), torch.randn(2, 3, 32, 32)
    features = functools.partial(frozen_features, n_last_blocks=2, avgpool_patchtokens=True)
    expected = compute(features, built.frozen.network, images, torch.bfloat16)
    assert torch.equal(built.of(images), expected) and built.width == 3 * 128


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("best", 3, "lacks best"),
        ("epoch", "three", "lacks epoch"),
        ("optimizer", {}, "optimizer does not fit"),
        ("classifiers", {"0.linear.weight": 1}, "weights do not fit"),
    ],
)
def test_an_odd_checkpoint_is_named(labelled, finished, part, value, message):
    change_checkpoint(finished, **{part: value})
    with pytest.raises(UserError, match=message):
        probe(labelled, finished)


NO_WEIGHTS = {"linear.weight": 3}
ODD_BIAS = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.ones(())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": 3}, "no classifier in file"),
        ({"state_dict": NO_WEIGHTS}, "no classifier in file"),
        ({"epoch": 1}, "no classifier in file"),
        ({"state_dict": NO_WEIGHTS, "args": ["--lr", "1"]}, "no classifier in file"),
        (ODD_BIAS, "of another shape"),
    ],
)
def test_a_file_without_a_classifier_is_named(labelled, tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"{message} .*odd.pth"):
        probe(labelled, tmp_path, "--evaluate", "--linear_weights", tmp_path / "odd.pth")


def test_evaluation_needs_no_training_images(labelled, finished, tmp_path):
    (tmp_path / "val").symlink_to(labelled / "val")
    best = load_checkpoint(finished / "checkpoint.pth.tar")["best"]
    assert probe(tmp_path, finished, "--evaluate")[0]["acc1"] == best[0]["acc1"]


@pytest.mark.parametrize(
    ("name", "before", "words"),
    [
        ("pixels", (24, 24), "size"),
        ("mean", (0.1, 0.2, 0.3), "mean"),
        ("std", (0.1, 0.2, 0.3), "deviation"),
        ("values", ((0.0, 9.0),), "value range"),
    ],
)
def test_a_classifier_of_other_pixels_is_refused(labelled, finished, name, before, words):
    identity = load_checkpoint(finished / "checkpoint.pth.tar")["identity"]
    change_checkpoint(finished, identity=identity | {name: before})
    with pytest.raises(UserError, match=rf"trained on images of {words} \(.*, not "):
        probe(labelled, finished, "--evaluate")


def test_classes_of_one_name_stay_apart():
    """torchvision names two classes of ImageNet "crane"."""

    class Named(list):
        classes = ["crane", "tench", "crane"]

    labels, images = torch.tensor([0, 1, 2]), Named()
    assert eval_linear.to_classes(labels, images, Named.classes, 3).tolist() == [0, 1, 2]


def test_classes_that_the_dataset_does_not_name_have_to_be_given():
    images = [(None, 0)]
    with pytest.raises(UserError, match="--num_labels"):
        eval_linear.count_classes(images, None)
    assert eval_linear.count_classes(images, 4) == 4
    labels = torch.tensor([0, 3])
    assert eval_linear.to_classes(labels, images, None, 4).tolist() == [0, 3]
    with pytest.raises(UserError, match="3 classes without names, the data has 4"):
        eval_linear.to_classes(labels, images, None, 3)


def test_more_classes_than_the_data_has_can_be_asked_for(tmp_path):
    for split in ("train", "val"):
        save_images(tmp_path / "data" / split / "a", 4)
    probe(tmp_path / "data", tmp_path / "out", "--num_labels", 7)
    checkpoint = load_checkpoint(tmp_path / "out" / "checkpoint.pth.tar")
    assert checkpoint["state_dict"]["linear.weight"].shape == (7, 512)


# ---- few labels


def test_few_shot_trains_on_few_images(labelled, tmp_path, capsys):
    probe(labelled, tmp_path / "few", "--few_shot", 2)
    said = capsys.readouterr().out
    assert "training on 6 of 15 images: 2 of each class" in said
    for flags in (("--few_shot", 3), (), ("--few_shot", 2, "--seed", 1)):
        with pytest.raises(UserError, match="differs from the run to resume: .*training images"):
            probe(labelled, tmp_path / "few", *flags)
    probe(labelled, tmp_path / "all")
    assert log_of(tmp_path / "few", LOG)[0]["train_loss"] != log_of(tmp_path / "all", LOG)[0]["train_loss"]


def test_logistic_regression_of_several_subsets(labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logistic, "STRENGTHS", (1.0, 0.01))
    flags = "--logistic", "--few_shot", "3", "--few_shot_seeds", "3"
    results = probe(labelled, tmp_path, *flags)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said if line.startswith("seed")] == [
        f"seed {seed}: 9 images" for seed in range(3)
    ]
    mean = sum(result["acc1"] for result in results) / 3
    assert said[-1].startswith(f"mean and deviation of 3 subsets: top-1 {mean:.2f} ± ")
    assert probe(labelled, tmp_path, *flags) == results
    pixels = "--pretrained_weights", "pixels", "--image_size", 8  # which no seed changes
    one = *flags, *pixels, "--few_shot_seeds", 1, "--seed"
    alone = [probe(labelled, tmp_path, *one, seed)[0] for seed in range(3)]
    assert probe(labelled, tmp_path, *flags, *pixels) == alone
    assert not list(tmp_path.iterdir())  # it writes no files


def test_logistic_regression_tells_shades_apart(tmp_path):
    for split in ("train", "val"):
        shaded(tmp_path, split, "black", "dark", "white")
    assert probe(tmp_path, tmp_path, "--logistic")[0]["acc1"] == 100
    assert probe(tmp_path, tmp_path, "--logistic", "--few_shot", "1")[0]["acc1"] == 100


def test_logistic_regression_is_that_of_the_subsets_features(labelled):
    args = eval_linear.parse_args([*FLAGS, "--data_path", str(labelled), "--logistic", "--few_shot", "40%"])
    found = eval_linear.main(args)[0]
    fix_random_seeds(0)
    features = eval_linear.build_features(args, torch.device("cpu"))
    train, val = data.open_train_and_val(data.Source(str(labelled)))
    few = subsets.FewImages(train, subsets.draw_few(train.labels, "2", 0))
    x, y = eval_linear.extract(args, features, few, torch.device("cpu"))
    classifiers = LinearClassifiers(1, x.shape[1], 3)
    classifiers[0].linear = logistic.fit(x, y, 3, logistic.choose_l2(x, y, 3, seed=0))
    expected = validate_network(classifiers, *eval_linear.extract(args, features, val, torch.device("cpu")))
    assert expected == [found]


def test_a_class_with_too_few_images_is_named_before_the_work(labelled, tmp_path):
    for flags in ((), ("--logistic",)):
        with pytest.raises(UserError, match=r"class a has only 5 images \(--few_shot 6\): give at most 5"):
            probe(labelled, tmp_path, "--few_shot", 6, *flags)


@pytest.mark.slow
def test_two_processes_fit_what_one_does(labelled):
    flags = ("eval_linear.py", *FLAGS, "--data_path", labelled, "--logistic", "--few_shot", "3")
    assert len(same_of_one_and_of_two("seed", *flags)) == 1


def test_all_that_determines_a_probe_makes_another_run(labelled):
    args = eval_linear.parse_args([*FLAGS, "--data_path", str(labelled)])
    features = eval_linear.build_features(args, torch.device("cpu"))
    images, _ = data.open_train_and_val(data.Source(str(labelled)))

    def identity(frozen=features.frozen, **flags) -> dict:
        given = argparse.Namespace(**vars(args) | flags)
        return eval_linear.run_identity(given, features._replace(frozen=frozen), 3, images, images)

    flags = dict(seed=1, batch_size_per_gpu=5, epochs=4, lr=[0.1], cache_features=True, precision="bf16")
    flags |= dict(n_last_blocks=3, avgpool_patchtokens=True, concat_patchtokens=True, few_shot="2")
    for name, value in flags.items():
        assert identity(**{name: value}) != identity(), name
    pixels = dict(image_size=24, mean=(0.1, 0.2, 0.3), std=(0.1, 0.2, 0.3), value_range=((0.0, 9.0),))
    for name, value in pixels.items():
        assert identity(features.frozen._replace(**{name: value})) != identity(), name


def test_a_classifier_that_is_not_finite_is_refused(labelled, tmp_path):
    state = {"linear.weight": torch.full((3, 512), torch.nan), "linear.bias": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"weights are not finite: linear.weight \(.*nan.pth\)"):
        probe(labelled, tmp_path, "--evaluate", "--linear_weights", tmp_path / "nan.pth")


def test_mean_and_deviation_of_several_subsets(labelled, tmp_path, capsys, monkeypatch):
    rows, seeds = iter([(10.0, 50.0), (20.0, 70.0), (60.0, 90.0)]), []
    monkeypatch.setattr(logistic, "choose_l2", lambda *data: seeds.append(data[-1]) or 0.1)
    monkeypatch.setattr(
        eval_linear, "validate_network", lambda *_: [dict(zip(("acc1", "acc5"), next(rows), strict=True))]
    )
    probe(labelled, tmp_path, "--logistic", "--few_shot", "3", "--few_shot_seeds", "3", "--seed", "4")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "mean and deviation of 3 subsets: top-1 30.00 ± 26.46 %, top-5 70.00 ± 20.00 %"
    assert seeds == [4, 5, 6]
