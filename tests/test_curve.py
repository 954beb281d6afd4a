"""The security curve against a linear model's closed form."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from aerl.analyses import AnalysisContext
from aerl.analyses.curve import Curve
from aerl.tracking.results import ResultLog, read_results


@pytest.fixture
def curves(tmp_path, hardware):
    """`curves(model, images, norm, eps)` -> the rows of tables/curve.csv and of tables/curve_steps.csv."""

    def run(model, images, norm, eps, **settings):
        with torch.no_grad():
            labels = model(images.float() / 255).argmax(1)
        context = AnalysisContext(
            model=model, images=images, labels=labels, class_names=tuple("abcd"), outcomes={}, adversarial={},
            attacks={}, figures=tmp_path / "figures", norm=norm, eps=eps, seed=0, trainer="sl", hardware=hardware,
            log=ResultLog(tmp_path, {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "t"}),
            batch_size=32, save=lambda **news: None,
        )  # fmt: skip
        Curve(load=lambda runs, key: {}, **settings)(context)
        tables = (csv.DictReader((tmp_path / f"tables/{name}.csv").open()) for name in ("curve", "curve_steps"))
        return tuple(
            [{key: float(value) for key, value in row.items() if key != "model"} for row in table] for table in tables
        )

    return run


class Memory(nn.Module):
    """A model of which memory holds `limit` images, once `passes` with a gradient have gone well."""

    def __init__(self, inner, limit=10**9, passes=10**9):
        super().__init__()
        self.inner, self.limit, self.passes, self.failures = inner, limit, passes, 0

    def forward(self, x):
        self.passes -= torch.is_grad_enabled()
        if len(x) > self.limit and self.passes <= 0:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_no_sample_is_counted_twice_if_memory_runs_out_within_a_batch(curves):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    counting = Memory(inner)
    _, expected = curves(counting, images, "L2", 0.3, samples=40, steps=12)
    assert 0 < expected[-1]["value"] < expected[0]["value"] - 0.2
    for last in (3, 16):  # passes from the end: in the second and in the first batch of the curve against steps
        model = Memory(inner, 2, 10**9 - counting.passes - last)
        assert curves(model, images, "L2", 0.3, samples=40, steps=12)[1] == expected
        assert model.failures > 0


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_curve_of_a_linear_model_is_its_margins_distribution_and_ends_at_zero(tmp_path, curves, norm):
    """Two classes, w.x: robust at eps if |margin| / dual norm of w > eps, as long as the box is far."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 2, bias=False)
    images = torch.randint(110, 146, (60, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        w = linear.weight.mul_(0.1)[0] - linear.weight[1]
    rows, _ = curves(nn.Sequential(nn.Flatten(), linear), images, norm, 0.02, samples=50)
    distance = ((images.float() / 255).flatten(1) @ w).abs() / (w.norm() if norm == "L2" else w.abs().sum())
    assert rows[0]["eps"] == 0 and rows[0]["value"] == 1
    assert np.isclose(rows[1]["eps"], 0.0025) and rows[-1]["value"] == 0
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows[1:]:
        if row["eps"] < 0.1:  # where the box cannot interfere
            # The subset is 50 of the 60, so a count of all bounds its share.
            near = int((distance > row["eps"]).sum())
            assert near - 10 <= row["value"] * 50 <= near
    assert [result.value for result in read_results(tmp_path / "results.jsonl")] == pytest.approx(values)
    assert (tmp_path / "figures/curve.png").stat().st_size > 5_000
