"""Multinomial logistic regression on fixed features, and the choice of its regularisation.

Shapes: N rows, F features, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.logger import log

# Strengths of the regularisation to try, strongest first: each starts from the solution of the one before.
STRENGTHS = tuple(10.0**exponent for exponent in range(3, -8, -1))
WITHOUT_CHOICE = 0.1
ONE_FOLD_FROM = 10_000  # rows
STEPS = 1_000  # of L-BFGS at most


def fit(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> nn.Linear:
    """Fit a linear classifier to features (N, F) and labels (N,): (B, F) -> scores (B, C).

    Minimises the mean cross-entropy plus l2 / 2 times the sum of the squared weights, by L-BFGS. The
    penalty is on the weights of standardised features and not on the biases; scikit-learn's C is
    1 / (N l2). The classifier takes features as they are, on the device and in the type of `features`, or in
    float32 if these are in half precision.
    """
    features = _at_least_float32(features)
    std, mean = _spread(features)
    linear = _zeros(features, num_classes)
    if not _minimise(linear, (features - mean) / std, labels, l2):
        log(f"note: logistic regression stopped after {STEPS} steps, before it converged")
    with torch.no_grad():
        linear.weight.div_(std)
        linear.bias.sub_(linear.weight @ mean)
    return linear


def choose_l2(features: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> float:
    """Choose among STRENGTHS by the accuracy on held-out fifths of the rows.

    Each fifth is held out once; of ONE_FOLD_FROM rows or more, only the first, which is then large enough.
    Of equal accuracies, the lower cross-entropy decides.
    """
    features = _at_least_float32(features)
    fifths = split_in_fifths(labels, seed)
    held_out = [fifths == fifth for fifth in range(5 if len(labels) < ONE_FOLD_FROM else 1)]
    held_out = [rows for rows in held_out if rows.any()]
    if not held_out:
        log(f"note: one image per class: regularisation fixed at {WITHOUT_CHOICE}")
        return WITHOUT_CHOICE
    scores = sum(_scores_held_out(features, labels, num_classes, rows) for rows in held_out)
    return max(zip(scores.tolist(), STRENGTHS, strict=True))[-1]  # type: ignore[union-attr]


def split_in_fifths(labels: Tensor, seed: int = 0) -> Tensor:
    """Assign the rows of each class to fifths in random order: (N,), 0 to 4.

    The only row of a class is -1, because a class has to be in the rows that are fitted.
    """
    generator = torch.Generator().manual_seed(seed)
    fifths = torch.full((len(labels),), -1)
    for number in labels.unique().tolist():
        rows = (labels == number).nonzero().flatten().cpu()
        if len(rows) > 1:
            fifths[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % 5
    return fifths.to(labels.device)


def _scores_held_out(features: Tensor, labels: Tensor, num_classes: int, held_out: Tensor) -> Tensor:
    """Correct rows among those held out, and minus their cross-entropy, for each of S strengths: (S, 2)."""
    std, mean = _spread(features[~held_out])
    x = (features - mean) / std
    linear = _zeros(x, num_classes)
    found = []
    for l2 in STRENGTHS:
        _minimise(linear, x[~held_out], labels[~held_out], l2)
        with torch.no_grad():
            scores = linear(x[held_out])
        correct = (scores.argmax(dim=1) == labels[held_out]).sum().item()
        found.append([correct, -F.cross_entropy(scores, labels[held_out], reduction="sum").item()])
    return torch.tensor(found, dtype=torch.float64)


def _at_least_float32(features: Tensor) -> Tensor:
    """Half precision is too coarse for L-BFGS."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each feature, (F,); the deviation of a constant feature counts as 1."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    constant = std <= 1e-6 * features.abs().amax(dim=0)
    return torch.where(constant, 1.0, std), mean


def _zeros(features: Tensor, num_classes: int) -> nn.Linear:
    linear = nn.Linear(features.shape[1], num_classes, device=features.device, dtype=features.dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _minimise(linear: nn.Linear, x: Tensor, labels: Tensor, l2: float) -> bool:
    """Minimise the penalised cross-entropy from where `linear` is; returns whether it converged."""
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=STEPS, max_eval=2 * STEPS, history_size=10, tolerance_grad=1e-6,
        tolerance_change=1e-10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), labels) + l2 / 2 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return optimizer.state[linear.weight]["n_iter"] < STEPS
