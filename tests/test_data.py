import gzip
import hashlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from support import data
from support.data import (
    EpochBatches,
    EvalImages,
    ImageFiles,
    Loader,
    Source,
    TrainingViews,
    load_image,
    make_loader,
    open_labelled_images,
    open_train_and_val,
    open_training_images,
    pack,
    read_labelled,
    unpack,
    why_unreadable,
)
from support.errors import Interrupted, UserError
from support.files import Paths
from support.pixels import eval_transform, normalized_views, to_pixels
from support.shapes import Shapes
from tests.conftest import ROOT, TINY, save_images, wait_for_words
from utils import DataAugmentationDINO


def test_images_are_found_in_any_folder_and_other_files_are_not(images, tmp_path):
    found = open_training_images(Source(str(images)))
    paths = list(found.paths)
    assert len(found) == 20 and paths == sorted(paths, key=lambda p: (os.path.dirname(p), p))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no images found, only .txt 1"):
        open_training_images(Source(str(tmp_path)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"data_path": ""}, "--demo"),
        ({"data_path": "/nowhere"}, "no such folder"),
        ({"data_path": "/tmp", "dataset": "FashionMINST"}, "did you mean FashionMNIST"),
        ({"data_path": "", "dataset": "FashionMNIST"}, "--data_path"),
        ({"data_path": "/nowhere", "dataset": "FashionMNIST"}, "--download"),
        ({"data_path": "/nowhere", "dataset": "EMNIST"}, "use a folder instead"),
    ],
)
def test_data_that_is_not_there_is_one_clear_line(kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        open_training_images(Source(**kwargs))
    assert "\n" not in str(error.value)


def test_training_on_a_folder_with_train_and_val_would_mix_them(labelled):
    with pytest.raises(UserError, match="/train"):
        open_training_images(Source(str(labelled)))
    assert len(open_training_images(Source(str(labelled / "train")))) == 15
    assert open_labelled_images(Source(str(labelled)), "val").classes == ["a", "b", "c"]
    with pytest.raises(UserError, match="no folder val"):
        open_labelled_images(Source(str(labelled / "train")), "val")


def write_fashion_mnist(root, train: int, test: int) -> None:
    """Gzipped idx files with random grey images, named as torchvision's."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        with gzip.open(raw / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, n, 28, 28) + pixels)
        with gzip.open(raw / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 0x801, n) + bytes(i % 10 for i in range(n)))


def test_torchvision_dataset_by_name_from_gzipped_files(tmp_path):
    write_fashion_mnist(tmp_path, 30, 20)
    source = Source(str(tmp_path), "FashionMNIST")
    train, val = open_training_images(source), open_labelled_images(source, "val")
    assert (len(train), len(val)) == (30, 20) and train.classes == val.classes
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 1, 28, 14)
    views, _, unreadable = TrainingViews(train, augmentation.views, 0)[0, 3]
    assert views[0].shape == (2, 3, 28, 28) and unreadable == -1


def small_views(images, seed: int = 0, method: str = "views") -> TrainingViews:
    augmentation = DataAugmentationDINO((0.4, 1), (0.1, 0.4), 2, 16, 8)
    return TrainingViews(ImageFiles(images), getattr(augmentation, method), seed)


def test_views_depend_on_seed_epoch_and_index_alone(images):
    dataset = small_views(images)
    first = dataset[3, 7][0]
    random.seed(99), torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, dataset[3, 7][0], strict=True))
    for other in (dataset[4, 7], dataset[3, 8], small_views(images, seed=1)[3, 7]):
        assert not torch.equal(first[0], other[0][0])


def test_views_and_the_global_random_stream_do_not_touch_each_other(images):
    states = random.getstate(), torch.get_rng_state()
    small_views(images)[0, 0]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_batches_do_not_depend_on_the_number_of_workers(images):
    dataset = small_views(images)
    batches = []
    for workers in (0, 2):
        sampler = EpochBatches(20, 4, seed=5, first_step=8, last_step=13)
        loader = make_loader(dataset, sampler, workers, torch.device("cpu"))
        batches.append([part for views, _, _ in loader for part in views])
    assert len(batches[0]) == 5 * 2  # views of two sizes
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_views_are_the_same_wherever_their_colours_change(images):
    batches = []
    for method in ("views", "crops"):
        dataset = small_views(images, method=method)
        views, colours, _ = next(iter(DataLoader(dataset, batch_sampler=EpochBatches(20, 20, seed=5))))
        assert [tuple(part.shape) for part in views] == [(20, 2, 3, 16, 16), (20, 2, 3, 8, 8)]
        assert all(part.dtype == torch.uint8 for part in views) and bool(colours) == (method == "crops")
        batches.append(normalized_views(views, colours))
        assert [tuple(view.shape) for view in batches[-1]] == [(20, 3, 16, 16)] * 2 + [(20, 3, 8, 8)] * 2
    for worker, device in zip(*batches, strict=True):
        grey_levels = (worker - device).abs() * 255 * 0.225
        assert grey_levels.max() < 1.1 and grey_levels.mean() < 0.001  # a rounding here and there


def test_jpegs_are_decoded_to_pils_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "0.jpg", quality=80)
    image.save(tmp_path / "1.JPEG", progressive=True, subsampling=0)
    image.convert("L").save(tmp_path / "2.jpg")
    image.convert("CMYK").save(tmp_path / "3.jpg")
    image.save(tmp_path / "4.png")
    image.save(tmp_path / "5.jpg", format="PNG")
    image.quantize(7).save(tmp_path / "6.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    image.save(tmp_path / "7.jpg", exif=exif)
    files = ImageFiles(tmp_path)
    for i in range(8):
        assert torch.equal(files.pixels(i), to_pixels(files[i][0])), files.paths[i]
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        files.pixels(0)


@pytest.mark.parametrize("num_images", [20, 21, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_those_of_distributed_sampler(monkeypatch, num_images, drop_last):
    """Ranks, epochs, incomplete batches and images that come twice, from any step on."""
    world = 4
    for rank in range(world):
        monkeypatch.setattr(data, "get_world_size", lambda: world)
        monkeypatch.setattr(data, "get_rank", lambda rank=rank: rank)
        sampler = DistributedSampler(range(num_images), world, rank, seed=5)
        expected = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            expected += [[(epoch, i) for i in b] for b in BatchSampler(sampler, 2, drop_last=drop_last)]
        if not expected:
            continue
        batches = EpochBatches(num_images, 2, seed=5, last_step=len(expected), drop_last=drop_last)
        assert batches.steps_per_epoch == len(expected) / 3
        assert list(batches) == list(batches) == expected
        for first in range(len(expected)):
            part = EpochBatches(num_images, 2, 5, first, len(expected), drop_last)
            assert list(part) == expected[first:]
        endless = itertools.islice(EpochBatches(num_images, 2, seed=5, drop_last=drop_last), len(expected))
        assert list(endless) == expected


class Waiting(torch.utils.data.Dataset):
    """Items that are there at once, but for one that never comes."""

    def __init__(self, length: int, never: int = -1):
        self.length, self.never = length, never

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        while index == self.never:
            time.sleep(1)
        return index


@pytest.mark.parametrize("never", [-1, 5])
def test_workers_end_with_the_pass_over_the_loader(never):
    """At its end, when it is closed early, and when a worker hangs; workers ignore SIGTERM."""
    loader = make_loader(Waiting(8, never), [[i] for i in range(8)], 2, torch.device("cpu"))
    other = multiprocessing.Process(target=time.sleep, args=(300,), daemon=True)
    other.start()
    for taken in (3, 8) if never < 0 else (3,):
        batches = iter(loader)
        assert [int(batch) for batch in itertools.islice(batches, taken)] == list(range(taken))
        assert len(multiprocessing.active_children()) > 1 or taken == 8
        batches.close()
        assert multiprocessing.active_children() == [other]
    other.kill()
    other.join()


def test_unreadable_images_are_replaced_and_named(tmp_path):
    save_images(tmp_path, 4)
    (tmp_path / "001.png").write_bytes(b"not an image")
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    dataset = small_views(tmp_path)
    assert [dataset[0, i][2] for i in range(4)] == [-1, 1, 2, -1]
    assert sum(len(part) for part in dataset[0, 1][0]) == 4
    assert "cannot identify image file" in why_unreadable(dataset.images, 1)
    assert "truncated" in why_unreadable(dataset.images, 2)
    assert why_unreadable(dataset.images, 3) == "it can be read now"
    evaluation = EvalImages(ImageFiles(tmp_path), eval_transform(16))
    with pytest.raises(UserError, match="002.png"):
        evaluation[2]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no image can be read, in 31 tries: cannot identify .*000.png"):
        dataset[0, 0]


class MostlyBroken(ImageFiles):
    """A block of files that cannot be read; counts how many are opened."""

    def pixels(self, index):
        self.opened += 1
        if index >= 10:
            raise OSError("broken")
        return super().pixels(index)


def test_a_block_of_unreadable_images_costs_few_tries_and_draws_its_replacements(images):
    """Each broken image is replaced by a drawn one, not by its neighbours one after the other."""
    dataset = small_views(images)
    dataset.images = MostlyBroken(images)
    dataset.images.opened, replaced = 0, []
    for index in range(10, 20):
        views, _, unreadable = dataset[0, index]
        assert unreadable == index and torch.equal(views[0], dataset[0, index][0][0])  # drawn by the seed
        replaced.append(views[0])
    assert dataset.images.opened <= 2 * 10 * 11
    assert len({view.numpy().tobytes() for view in replaced}) > 3


def test_the_last_image_of_a_large_dataset_costs_what_the_first_one_does():
    class Large(torch.utils.data.Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            return Image.new("RGB", (40, 40)), 0

    dataset = TrainingViews(Large(), DataAugmentationDINO((0.4, 1), (0.05, 0.4), 2, 32, 16).views, 0)
    tracemalloc.start()
    dataset[0, 10**6 - 1]
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_sixteen_bits_keep_their_greys(tmp_path):
    values = np.linspace(0, 65_535, 64 * 64).reshape(64, 64)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    read = np.asarray(load_image(str(tmp_path / "deep.png")))
    np.testing.assert_array_equal(read, np.repeat(values.astype(np.uint16)[..., None] // 256, 3, axis=2))


def test_alpha_and_palettes_become_their_colours_without_a_warning(tmp_path, recwarn):
    red = Image.new("RGB", (8, 8), (250, 10, 20))
    red.quantize(4).save(tmp_path / "palette.png", transparency=bytes([9]))
    Image.new("RGBA", (8, 8), (250, 10, 20, 5)).save(tmp_path / "alpha.png")
    for name in ("palette", "alpha"):
        assert load_image(str(tmp_path / f"{name}.png")).getpixel((3, 3)) == (250, 10, 20)
    assert not recwarn.list


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    save_images(tmp_path / "elsewhere", 2)
    save_images(tmp_path / "data" / "inner", 1)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "inner" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "inner" / "here").symlink_to(".")
    assert len(ImageFiles(tmp_path / "data")) == 3


def test_folders_that_link_to_each_other_are_entered_once_by_their_own_path(tmp_path):
    for name in "ab":
        save_images(tmp_path / name, 5)
    for name, other in ("ab", "ba"):
        (tmp_path / name / "0_other").symlink_to(tmp_path / other)
        (tmp_path / name / "1_again").symlink_to(tmp_path / other)
    save_images(tmp_path / "elsewhere" / "inner", 2)
    files = ImageFiles(tmp_path)
    assert len(files) == 12 and not any("_" in path.removeprefix(str(tmp_path)) for path in files.paths)


def test_hidden_names_are_left_out_and_what_pillow_reads_is_taken(tmp_path, capsys):
    save_images(tmp_path / "data", 3)
    save_images(tmp_path / "data" / ".ipynb_checkpoints", 2)
    (tmp_path / "data" / "._000.png").write_bytes(b"a Mac's companion file")
    for name in ("a.jfif", "b.JPE"):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name, format="JPEG")
    for name in ("a.txt", "b.txt", "c.mp4", "README"):
        (tmp_path / "data" / name).write_text("no image")
    images = open_training_images(Source(str(tmp_path / "data")))
    assert len(images) == 5 and len([images[i] for i in range(5)]) == 5
    expected = (
        "5 images (.png 3, .jfif 1, .jpe 1); left out 4 files (.txt 2, .mp4 1, no extension 1) "
        "and 2 hidden names"
    )
    assert expected in capsys.readouterr().out


def test_paths_are_one_buffer_of_few_bytes_an_image():
    """A list of strings costs each worker about 100 bytes more, as reference counts change."""
    tracemalloc.start()
    paths = Paths((f"n{i // 1300:08}/n{i // 1300:08}_{i:05}.JPEG" for i in range(100_000)), "/data/train")
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 42 * 100_000 and len(paths) == 100_000  # 32 bytes of the name and 8 of its place
    assert paths[99_999] == "/data/train/n00000076/n00000076_99999.JPEG"
    assert all(isinstance(part, np.ndarray) for part in (paths.buffer, paths.ends))
    odd = Paths([os.fsdecode(b"\xff.png"), "\u00e4.png"])
    assert [os.fsencode(path) for path in odd] == [b"\xff.png", "\u00e4.png".encode()]


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_a_held_out_part_beside_train_is_not_trained_on(tmp_path, held_out):
    save_images(tmp_path / "train", 3)
    save_images(tmp_path / held_out, 2)
    with pytest.raises(UserError, match=f"train/ and {held_out}/ .*give --data_path .*/train"):
        open_training_images(Source(str(tmp_path)))
    assert len(open_training_images(Source(str(tmp_path), split="train"))) == 3
    with pytest.raises(UserError, match="no folder trian/"):
        open_training_images(Source(str(tmp_path), split="trian"))


def write_stl10(root, monkeypatch) -> None:
    """Files as STL-10's, with 4 training, 3 test and 5 unlabelled images, and their checksums."""
    folder = root / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 4), ("test", 3), ("unlabeled", 5)):
        (folder / f"{part}_X.bin").write_bytes(rng.integers(0, 256, n * 3 * 96 * 96, np.uint8).tobytes())
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(range(1, n + 1)))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("")
    for name in ("train_list", "test_list"):
        files = [f for f, _ in getattr(torchvision.datasets.STL10, name)]
        sums = [[f, hashlib.md5((folder / f).read_bytes()).hexdigest()] for f in files]
        monkeypatch.setattr(torchvision.datasets.STL10, name, sums)


def test_training_takes_the_unlabelled_images_where_there_are_some(tmp_path, monkeypatch, capsys):
    write_stl10(tmp_path, monkeypatch)
    stl10 = Source(str(tmp_path), "STL10")
    assert len(open_training_images(stl10)) == 5
    assert "training images: STL10, split unlabeled: 5 images" in capsys.readouterr().out
    assert len(open_training_images(stl10._replace(split="train+unlabeled"))) == 9
    assert len(open_labelled_images(stl10, "train")) == 4 and len(open_labelled_images(stl10, "val")) == 3
    with pytest.raises(UserError, match=r"Unknown value 'tset' .*--split tset"):
        open_training_images(stl10._replace(split="tset"))


def test_a_dataset_without_splits_trains_but_is_not_evaluated_on(tmp_path):
    for name in "ab":
        folder = tmp_path / "eurosat" / "2750" / name
        save_images(folder, 3)
    source = Source(str(tmp_path), "EuroSAT")
    assert len(open_training_images(source)) == 6
    with pytest.raises(UserError, match="no train/val split"):
        open_labelled_images(source, "val")
    with pytest.raises(UserError, match="no train/val split"):
        open_training_images(source._replace(split="train"))


UNPACK = """
import sys
from support.data import Source, open_training_images
print(len(open_training_images(Source(sys.argv[1], "FashionMNIST"))))
"""


def test_two_runs_that_start_together_unpack_the_same_archive(tmp_path):
    write_fashion_mnist(tmp_path, 5_000, 10)
    command = [sys.executable, "-c", UNPACK, str(tmp_path)]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = subprocess.Popen(command, **options)
    raw = tmp_path / "FashionMNIST" / "raw"
    archive = raw / "train-images-idx3-ubyte.gz"
    seen = set()
    while first.poll() is None:  # what a second run would find at any moment
        seen |= {p.stat().st_size for p in raw.glob("train-images-idx3-ubyte")}
        time.sleep(0.002)
    assert first.communicate()[0].endswith("5000\n") and seen <= {16 + 5_000 * 784}
    assert {p.suffix for p in raw.iterdir()} == {"", ".gz"} and not list(raw.glob(".*"))
    assert (raw / archive.stem).stat().st_mode == archive.stat().st_mode
    (raw / archive.stem).unlink()
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot unpack: .*download it again"):
        open_training_images(Source(str(tmp_path), "FashionMNIST"))
    assert not list(raw.glob(".*"))


def test_val_may_lack_classes_of_train_but_not_the_other_way_round(tmp_path, capsys):
    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            save_images(tmp_path / split / name, 2)
    train, val = open_train_and_val(Source(str(tmp_path)))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert [val[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert "note: val lacks 1 of 3 classes: b" in capsys.readouterr().out
    save_images(tmp_path / "val" / "d", 1)
    with pytest.raises(UserError, match="val has classes that train lacks: d "):
        open_train_and_val(Source(str(tmp_path)))
    (tmp_path / "train" / "d").mkdir()
    with pytest.raises(UserError, match="no images in class folders d "):
        open_train_and_val(Source(str(tmp_path)))


def test_the_digest_is_the_same_for_a_moved_folder_only(tmp_path):
    def of(name):
        return data.digest(open_labelled_images(Source(str(tmp_path / name)), "train"))

    for name in "ab":
        save_images(tmp_path / "one" / "train" / name, 3)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    first = of("one")
    assert re.fullmatch("[0-9a-f]{12}", first) and of("moved") == first
    train = tmp_path / "moved" / "train"
    changes = [
        lambda: (train / "a" / "000.png").rename(train / "a" / "zzz.png"),
        lambda: (train / "a" / "001.png").write_bytes(b"shorter"),
        lambda: (train / "b").rename(train / "c"),
        lambda: (train / "a" / "002.png").rename(train / "c" / "new.png"),
    ]
    seen = {first}
    for change in changes:
        change()
        seen.add(of("moved"))
    assert len(seen) == 5
    files = data.digest(ImageFiles(tmp_path / "one")), data.digest(ImageFiles(tmp_path / "moved"))
    shapes = [data.digest(Shapes(*arguments)) for arguments in (("train", 9), ("val", 9), ("train", 8))]
    assert len({*files, *shapes}) == 5
    write_fashion_mnist(tmp_path / "f", 30, 20)
    fashion = Source(str(tmp_path / "f"), "FashionMNIST")
    parts = [data.digest(open_labelled_images(fashion, split)) for split in ("train", "val")]
    assert len(set(parts)) == 2


@pytest.mark.parametrize("label", [0.73, torch.tensor([0, 1, 1]), torch.tensor(2.5), "cat", -1, None, (1, 2)])
def test_a_label_that_is_no_class_number_is_one_clear_line(label):
    with pytest.raises(UserError, match=r"label is not a class number \(image 0: ") as error:
        read_labelled([(Image.new("RGB", (4, 4)), label)], 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor([3])])
def test_a_label_may_be_any_whole_number(label):
    assert read_labelled([(Image.new("RGB", (4, 4)), label)], 0)[1] == 3


def test_a_tiff_that_says_how_many_bits_it_uses_is_scaled_by_them(tmp_path):
    values = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "said.tif", tiffinfo={281: 4095})
    Image.fromarray(values).save(tmp_path / "not.tif")
    said, silent = (np.asarray(load_image(str(tmp_path / name)))[..., 0] for name in ("said.tif", "not.tif"))
    np.testing.assert_array_equal(said, values >> 4)
    np.testing.assert_array_equal(silent, values >> 8)


def wait_patiently(monkeypatch, **seconds) -> None:
    for name, value in seconds.items():
        monkeypatch.setattr(Loader, name, value)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stop_signal_ends_a_wait_for_a_batch_that_never_comes(monkeypatch, num_workers):
    wait_patiently(monkeypatch, grace=0.3, poll=0.2)
    asked = []
    loader = make_loader(
        Waiting(8, never=3), [[i] for i in range(8)], num_workers, torch.device("cpu"), lambda: bool(asked)
    )
    taken = []
    for batch in loader:
        taken.append(int(batch))
        asked += [True] * (len(taken) == 3)
    assert taken == [0, 1, 2] and multiprocessing.active_children() == []


def test_slow_batches_are_waited_for_and_a_stop_does_not_cut_them_off(monkeypatch):
    """`stop_asked` alone ends nothing: the training ends after a step, on all ranks together."""
    wait_patiently(monkeypatch, poll=0.05)
    loader = make_loader(Slow(), [[i] for i in range(3)], 1, torch.device("cpu"), lambda: True)
    assert [int(batch) for batch in loader] == [0, 1, 2]


class Slow(Waiting):
    def __init__(self):
        super().__init__(3)

    def __getitem__(self, index):
        time.sleep(0.3)
        return index


def test_a_batch_that_never_comes_ends_the_run_with_a_line(monkeypatch, capsys):
    wait_patiently(monkeypatch, patience=1.5, warn_every=0.5, poll=0.2)
    loader = make_loader(Waiting(8, never=3), [[i] for i in range(8)], 2, torch.device("cpu"))
    with pytest.raises(Interrupted, match=r"no batch of images for 2 s: .*file system") as error:
        list(loader)
    assert error.value.exit_code == 75 and multiprocessing.active_children() == []
    assert capsys.readouterr().out.count("warning: no batch of images for ") == 2


LOAD = """
import sys
import torch
from support import cli
from support.data import EpochBatches, ImageFiles, TrainingViews, make_loader
from utils import DataAugmentationDINO

def main(_):
    views = TrainingViews(ImageFiles(sys.argv[1]), DataAugmentationDINO((0.4, 1), (0.1, 0.4), 8, 224, 96), 0)
    batches = EpochBatches(len(views), 4, 0, last_step=20)
    print(len(list(make_loader(views, batches, 2, torch.device("cpu")))), "batches")

cli.run_script(main, None)
"""


@pytest.mark.parametrize(
    ("limit", "fix"),
    [
        (["sh", "-c", 'ulimit -n 20; exec "$@"', "sh"], r"Too many open files.*ulimit -n"),
        (
            ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm; exec "$@"', "sh"],
            r"/dev/shm more room \(docker run --shm-size",
        ),
    ],
)
def test_a_batch_lost_for_lack_of_files_or_shared_memory_ends_with_the_fix(images, limit, fix):
    """Real limits. An error of the thread that sends a batch would only lose the batch."""
    if subprocess.run([*limit, "true"], capture_output=True).returncode:
        pytest.skip("not allowed here")
    command = [*limit, sys.executable, "-c", LOAD, str(images)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 75 and re.match("stopped: data loading failed: .*" + fix, last), ended.stderr


def test_views_of_one_size_travel_as_one_tensor(images):
    """Each tensor costs open files in the worker and in the training."""
    items = [small_views(images)[0, i] for i in range(3)]
    packed = pack(items)
    assert [tuple(part.shape) for part in packed[0]] == [(6, 3, 16, 16), (6, 3, 8, 8)]
    views = unpack(packed)[0]
    expected = [torch.stack(view) for view in zip(*(item[0] for item in items), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


STALLED = """
import os, time
import main_dino
from support import cli, data
load_pixels = data.load_pixels

def load(path):
    while path.endswith("007.png") and os.path.exists(os.environ["STALLED"]):
        time.sleep(0.1)
    return load_pixels(path)

data.load_pixels, data.Loader.warn_every = load, 1
cli.run_script(main_dino.main, main_dino.parse_args())
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_waits_for_a_stalled_file_stops_when_asked(tmp_path, processes):
    """It saves the steps that it has made if it is alone, and the same command resumes it."""
    save_images(tmp_path / "images", 40)
    (tmp_path / "stalled.py").write_text(STALLED)
    stalled, said = tmp_path / "stalled", tmp_path / "said.txt"
    stalled.touch()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    flags = [*TINY, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out", "--epochs", 3]
    command = [sys.executable, *launcher, tmp_path / "stalled.py", *flags, "--num_workers", 1]
    env = os.environ | {"STALLED": str(stalled), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(said, "w") as file:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=file)
    wait_for_words("warning: no batch of images", said, process)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=200)
    if processes == 2:
        assert "stopped: asked to stop while waiting for images" in said.read_text(), said.read_text()
    else:
        assert code == 75, said.read_text()
        assert re.search(r"stopped: by SIGTERM, saved step \d+ of 30", said.read_text())
        stalled.unlink()
        again = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0 and "from step 0 " not in again.stdout, again.stderr
