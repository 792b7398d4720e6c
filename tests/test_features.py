import multiprocessing

import torch
from torch import nn

from support.data import Source, open_labelled_images
from support.features import extract_features
from support.pixels import eval_transform


def test_features_are_in_the_order_of_the_images_and_as_the_network_gives_them(labelled):
    images = open_labelled_images(Source(str(labelled)), "train")
    transform = eval_transform(16)
    for workers in (0, 2):
        features, labels = extract_features(
            nn.Flatten(), images, transform, torch.device("cpu"), batch_size=4, num_workers=workers
        )
        assert labels.tolist() == [images[i][1] for i in range(15)]
        torch.testing.assert_close(features[7], transform(images[7][0]).flatten(), rtol=0, atol=0)


def test_features_do_not_move_the_global_random_stream(labelled):
    images = open_labelled_images(Source(str(labelled)), "val")
    before = torch.get_rng_state()
    extract_features(nn.Flatten(), images, eval_transform(8), torch.device("cpu"), num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_worker_outlives_an_error_of_the_network(labelled):
    """Workers ignore SIGTERM, by which Python would end them at its exit."""
    images = open_labelled_images(Source(str(labelled)), "train")
    try:
        extract_features(
            lambda _: 1 / 0, images, eval_transform(8), torch.device("cpu"), batch_size=1, num_workers=1
        )
    except ZeroDivisionError:  # its traceback keeps the frames, as until the end of a script
        assert multiprocessing.active_children() == []
