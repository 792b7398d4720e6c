"""Code written for the published `utils`."""

import random
import types

import pytest
import torch
from PIL import ImageFilter, ImageOps

import eval_knn
import eval_linear
import utils
from tests.conftest import is_close_share, picture


def test_callables_change_pil_images():
    image = picture()
    blur, solarize = utils.GaussianBlur(1.0, 1.5, 1.5), utils.Solarization(1.0)
    assert blur(image).tobytes() == image.filter(ImageFilter.GaussianBlur(1.5)).tobytes()
    assert solarize(image).tobytes() == ImageOps.solarize(image, 128).tobytes()
    blur.prob, never = 0.0, utils.Solarization(0.0)
    assert blur(image).tobytes() == never(image).tobytes() == image.tobytes()
    random.seed(0)
    assert vars(utils.GaussianBlur()) == {"prob": 0.5, "radius_min": 0.1, "radius_max": 2.0}
    assert len({utils.GaussianBlur(1.0)(image).tobytes() for _ in range(5)}) == 5  # of any radius
    for change, p in ((utils.Solarization(0.2), 0.2), (utils.GaussianBlur(0.3, 2, 2), 0.3)):
        changed = sum(change(image).tobytes() != image.tobytes() for _ in range(600))
        assert is_close_share(changed / 600, p, 600)


def test_the_log_of_a_published_evaluation(capsys):
    logger = utils.MetricLogger(delimiter="  ")
    logger.add_meter("lr", utils.SmoothedValue(window_size=1, fmt="{value:.2f}"))
    for loss in logger.log_every([1.0, 4.0, 2.0, 9.0], 2, "Test:"):
        logger.update(loss=torch.tensor(loss), lr=loss)
        logger.meters["acc1"].update(10 * loss, n=int(loss))
    assert capsys.readouterr().out.startswith("Test: [2/4] lr 4  loss 2.5  acc1 25  ")
    logger.synchronize_between_processes()
    assert str(logger) == "lr: 9.00  loss: 2.000000 (4.000000)  acc1: 20.000000 (63.750000)"
    loss = logger.loss
    assert (loss.median, loss.avg, loss.global_avg, loss.max, loss.value) == (2, 4, 4, 9, 9)
    assert list(loss.deque) == [1, 4, 2, 9] and logger.acc1.count == 16
    with pytest.raises(AttributeError, match="no 'los'"):
        logger.los  # noqa: B018
    with pytest.raises(AttributeError, match="meters"):
        utils.MetricLogger.__new__(utils.MetricLogger).meters  # as copy.copy meets it  # noqa: B018


def test_any_object_of_flags_gets_its_rank():
    args = types.SimpleNamespace(dist_url="env://", gpu=3)
    utils.init_distributed_mode(args)
    assert (args.rank, args.world_size, args.gpu) == (0, 1, 0)


def test_a_seed_may_be_named_or_left_out():
    drawn = []
    for call in (lambda: utils.fix_random_seeds(seed=31), utils.fix_random_seeds):
        call()
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_features_may_have_gradients_and_any_shape():
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    features = torch.nn.functional.normalize(features)
    assert eval_knn.knn_classifier(features, labels, features, labels, 1, 0.07, 2)[0] == 100
    classifier = eval_linear.LinearClassifier(4, 2)
    assert torch.equal(classifier(features.reshape(8, 2, 2)), classifier(features))
