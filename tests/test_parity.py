"""Numbers computed with the published code (data/golden.json, by golden.py) equal ours."""

import json
from pathlib import Path

import pytest
import torch

from tests import golden

REFERENCE = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())


@pytest.fixture(scope="module")
def ours():
    torch.manual_seed(0)
    return golden.run(golden.load(str(Path(__file__).parent.parent)))


@pytest.mark.parametrize("case", REFERENCE)
def test_equals_the_published_code(ours, case):
    assert list(golden.compare(REFERENCE[case], ours[case], f"/{case}")) == []


def test_the_comparison_sees_a_difference():
    changed = json.loads(json.dumps(REFERENCE))
    changed["train_adamw"]["losses"][3] *= 1.001
    assert [path for path, *_ in golden.compare(REFERENCE, changed)] == ["/train_adamw/losses[3]"]
