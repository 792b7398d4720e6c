import torch

from eval_segmentation import MaskedShapes, jaccard, score_attention


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
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, 32:] = True
    for i in range(10):
        truth = torch.from_numpy(shapes.mask(i))
        scores = score_attention(corner, shapes.class_mask(i), 0.9)
        share = truth.float().mean()
        expected = torch.stack([jaccard(mask, truth), share])
        torch.testing.assert_close(scores.objects[0], expected)
        torch.testing.assert_close(scores.classes, expected.max()[None])
        torch.testing.assert_close(scores.on_objects[0], torch.stack([truth[:32, 32:].float().mean(), share]))
        torch.testing.assert_close(scores.area, share[None])
