import gzip
import itertools
import multiprocessing
import os
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from support import data
from support.data import (
    EpochBatches,
    EvalImages,
    ImageFiles,
    Source,
    TrainingViews,
    load_image,
    make_loader,
    open_labelled_images,
    open_training_images,
)
from support.errors import UserError
from support.pixels import eval_transform, normalized_views, to_pixels
from tests.conftest import save_images
from utils import DataAugmentationDINO


def test_images_are_found_in_any_folder_and_other_files_are_not(images, tmp_path):
    found = open_training_images(Source(str(images)))
    assert len(found) == 20 and found.paths == sorted(found.paths, key=lambda p: (os.path.dirname(p), p))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no images found"):
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
    evaluation = EvalImages(ImageFiles(tmp_path), eval_transform(16))
    with pytest.raises(UserError, match="002.png"):
        evaluation[2]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image can be read"):
        dataset[0, 0]


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
