import pytest
import torch
import torch.nn.functional as F

from support import logistic


def blobs(rows: int, features: int = 6, classes: int = 3, spread: float = 1.0, seed: int = 0):
    """Rows around a centre for each class; float64."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return centers[labels] + spread * noise, labels


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_solution_is_a_minimum(l2):
    x, y = blobs(60)
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    linear = logistic.fit(x, y, 3, l2)
    loss = F.cross_entropy(linear(x), y) + l2 / 2 * linear.weight.square().sum()
    loss.backward()  # the objective is convex: where its gradient is zero, it is smallest
    assert max(p.grad.abs().max().item() for p in linear.parameters()) < 1e-5


def test_the_solution_equals_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(60)
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    theirs = linear_model.LogisticRegression(C=1 / (60 * 1e-2), tol=1e-10, max_iter=10_000).fit(x, y)
    ours = logistic.fit(x, y, 3, 1e-2)
    expected = torch.from_numpy(theirs.predict_proba(x))
    torch.testing.assert_close(ours(x).softmax(dim=1), expected, rtol=1e-4, atol=1e-5)


def test_strong_regularisation_gives_the_frequencies_of_the_classes():
    x, _ = blobs(60)
    y = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    shares = logistic.fit(x, y, 3, 1e3)(x).softmax(dim=1)
    torch.testing.assert_close(
        shares, torch.tensor([[3, 2, 1]]).expand(60, 3).double() / 6, atol=5e-3, rtol=0
    )


def test_the_scale_of_the_features_does_not_matter_and_a_constant_one_does_no_harm():
    x, y = blobs(60)
    moved = x * torch.tensor([1e-8, 1, 50, 1e3, 2, 7]) + torch.tensor([0, 0.3, 30, 30, 30, 30])
    rounding = torch.arange(60)[:, None] % 7 * 1e-9
    moved = torch.cat([moved, torch.full((60, 1), 0.1), 0.1 + rounding], dim=1)
    plain, other = logistic.fit(x, y, 3, 1e-2), logistic.fit(moved, y, 3, 1e-2)
    torch.testing.assert_close(plain(x), other(moved), atol=1e-3, rtol=1e-3)
    assert logistic.choose_l2(moved, y, 3) == logistic.choose_l2(x, y, 3)


def test_separable_classes_are_separated():
    x, y = blobs(90, spread=0.05)
    assert torch.equal(logistic.fit(x.float(), y, 3, 1e-5)(x.float()).argmax(dim=1), y)


def test_noise_needs_more_regularisation():
    generator = torch.Generator().manual_seed(1)
    x, y = blobs(120, spread=0.05)
    wide = torch.cat([x, 5 * torch.randn(120, 300, generator=generator).double()], dim=1)
    noisy = wide.clone()
    noisy[:, :6] += torch.randn(120, 6, generator=generator).double()
    assert logistic.STRENGTHS[0] == 1e3 and logistic.STRENGTHS[-1] == 1e-7  # as docs/evaluations.md says
    clean = logistic.choose_l2(x, y, 3)
    assert clean <= 1e-4 and logistic.choose_l2(noisy, y, 3) >= 100 * clean


def test_a_strength_is_scored_on_the_rows_that_were_held_out():
    x, y = blobs(60, spread=2.0)
    held_out = torch.arange(60) % 5 == 2
    scores = logistic._scores_held_out(x, y, 3, held_out)
    for l2, (correct, fit) in list(zip(logistic.STRENGTHS, scores.tolist(), strict=True))[::3]:
        found = logistic.fit(x[~held_out], y[~held_out], 3, l2)(x[held_out])
        assert correct == (found.argmax(dim=1) == y[held_out]).sum() < 12
        assert -fit == pytest.approx(F.cross_entropy(found, y[held_out], reduction="sum").item(), rel=1e-2)


def test_each_class_is_split_in_fifths_and_its_only_row_is_never_held_out():
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] + [3] * 7)
    fifths = logistic.split_in_fifths(labels, seed=3)
    assert fifths[:20].bincount().tolist() == [4] * 5 and fifths[23] == -1
    assert sorted(fifths[20:23].tolist()) == [0, 1, 2] and fifths[24:].bincount().tolist() == [2, 2, 1, 1, 1]
    assert torch.equal(fifths, logistic.split_in_fifths(labels, seed=3))
    assert not torch.equal(fifths, logistic.split_in_fifths(labels, seed=4))


def test_of_many_rows_one_fifth_is_enough(monkeypatch):
    monkeypatch.setattr(logistic, "STRENGTHS", (1.0, 0.01))
    x, y = blobs(60)
    all_fifths = logistic.choose_l2(x, y, 3)
    seen = []
    scores = logistic._scores_held_out
    monkeypatch.setattr(logistic, "_scores_held_out", lambda *args: (seen.append(args[-1]), scores(*args))[1])
    assert logistic.choose_l2(x, y, 3) == all_fifths and len(seen) == 5
    assert torch.equal(torch.stack(seen).sum(dim=0), torch.ones(60, dtype=torch.long))
    monkeypatch.setattr(logistic, "ONE_FOLD_FROM", 60)
    logistic.choose_l2(x, y, 3, seed=4)
    assert len(seen) == 6 and torch.equal(seen[5], logistic.split_in_fifths(y, 4) == 0)


def test_with_one_row_of_each_class_nothing_is_chosen(capsys):
    x, y = blobs(3)
    assert logistic.choose_l2(x, y, 3) == 0.1
    assert "note: one image per class: regularisation fixed at 0.1" in capsys.readouterr().out


def test_a_fit_that_does_not_converge_says_so(monkeypatch, capsys):
    monkeypatch.setattr(logistic, "STEPS", 2)
    logistic.fit(*blobs(60), 3, 1e-6)
    assert "stopped after 2 steps, before it converged" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_in_half_precision_are_fitted_in_float32(dtype):
    x, y = blobs(60)
    x = x.to(dtype)
    l2 = logistic.choose_l2(x, y, 3)
    assert l2 == logistic.choose_l2(x.float(), y, 3)
    assert torch.equal(logistic.fit(x, y, 3, l2).weight, logistic.fit(x.float(), y, 3, l2).weight)
