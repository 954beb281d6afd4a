"""The security curve against a linear model's closed form."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from aerl.analyses import AnalysisContext
from aerl.analyses.curve import curve
from aerl.tracking.results import ResultLog, read_results


class Memory(nn.Module):
    """A model of which memory holds `limit` images, once `passes` with a gradient have gone well."""

    def __init__(self, inner, limit, passes=10**9):
        super().__init__()
        self.inner, self.limit, self.passes, self.failures = inner, limit, passes, 0

    def forward(self, x):
        if torch.is_grad_enabled():
            self.passes -= 1
        if len(x) > self.limit and self.passes <= 0:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x)


def test_no_sample_is_counted_twice_when_memory_runs_out_in_the_midst_of_a_batch(tmp_path, hardware):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)
    with torch.no_grad():
        labels = inner(images.float() / 255).argmax(1)

    def steps(model):
        saved = {}
        context = AnalysisContext(
            model=model, images=images, labels=labels, class_names=tuple("abcd"), outcomes={}, adversarial={},
            attacks={}, figures=tmp_path / "figures", norm="L2", eps=0.3, seed=0, trainer="sl",
            hardware=hardware, batch_size=32, save=saved.update,
            log=ResultLog(tmp_path, {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "t"}),
        )  # fmt: skip
        curve(context, samples=40, steps=12)
        with (tmp_path / "tables/curve_steps.csv").open() as file:
            return list(csv.DictReader(file))

    counting = Memory(inner, limit=100)
    expected = steps(counting)
    assert 0 < float(expected[-1]["value"]) < float(expected[0]["value"]) - 0.2
    passes = 10**9 - counting.passes
    for last in (
        3,
        16,
    ):  # passes from the end: within the second and the first batch of the curve against steps
        model = Memory(inner, 2, passes - last)
        assert steps(model) == expected
        assert model.failures > 0


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_curve_of_a_linear_model_is_its_margins_distribution_and_ends_at_zero(tmp_path, hardware, norm):
    """Two classes, w.x + b: robust at eps if |margin| / dual norm of w > eps, as long as the box is far."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 2).double()
    with torch.no_grad():
        linear.weight.mul_(0.1)
        linear.bias.zero_()
    model = nn.Sequential(nn.Flatten(), linear.float())
    images = torch.randint(110, 146, (60, 1, 4, 4), dtype=torch.uint8)
    w, b = (t[0] - t[1] for t in (linear.weight.detach(), linear.bias.detach()))
    margins = (images.float() / 255).flatten(1) @ w + b
    labels = (margins < 0).long()
    saved = {}
    context = AnalysisContext(
        model=model, images=images, labels=labels, class_names=("a", "b"), outcomes={}, adversarial={},
        attacks={}, figures=tmp_path / "figures", norm=norm, eps=0.02, seed=0, trainer="sl", hardware=hardware,
        log=ResultLog(tmp_path, {"run_id": "r", "seed": 0, "dataset": "d", "model": "m", "trainer": "t"}),
        batch_size=32, save=saved.update,
    )  # fmt: skip
    curve(context, samples=50)
    with (tmp_path / "tables/curve.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    distance = (margins.abs() / (w.norm() if norm == "L2" else w.abs().sum())).sort().values
    assert rows[0]["eps"] == 0 and rows[0]["value"] == 1
    assert rows[-1]["value"] == 0
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows[1:]:
        if row["eps"] < 0.1:  # where the box cannot interfere
            # The subset is 50 of the 60, so a count of all bounds its share.
            near = int((distance > row["eps"]).sum())
            assert near - 10 <= row["value"] * 50 <= near
    assert [result.value for result in read_results(tmp_path / "results.jsonl")] == pytest.approx(values)
    assert saved["curve"][-1]["value"] == 0 and np.isclose(saved["curve"][1]["eps"], 0.0025)
    assert (tmp_path / "figures/curve.png").stat().st_size > 5_000
