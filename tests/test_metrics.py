"""Per-sample metrics: the built-in ones, one's own from the command line, and what is refused."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F

from aerl.config.schema import MetricName
from aerl.errors import UserError
from aerl.evaluation.metrics import BUILT_IN, margin, measure
from aerl.tracking.results import read_results

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 0.5], [torch.nan, 0.0, 1.0]])
LABELS = torch.tensor([0, 2, 1])


def test_metrics_are_those_of_the_softmax_and_zero_where_a_logit_is_not_finite():
    found = measure({**BUILT_IN, "margin": margin}, LOGITS, LABELS)
    softmax = F.softmax(LOGITS[:2], 1)
    expected = {
        "p": softmax[[0, 1], LABELS[:2]],
        "confidence": softmax.max(1).values,
        "entropy": -(softmax * softmax.log2()).sum(1),
        "margin": torch.tensor([1.0, -2.5]),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.cat([values, torch.zeros(1)]))


@pytest.mark.parametrize(
    ("metric", "named"),
    [
        (lambda logits, labels: logits, "(3, 3)"),
        (lambda logits, labels: 0.5, "float"),
        (lambda logits, labels: logits.sum(1) / 0, "infinity"),
        (lambda logits, labels: {}["x"], "KeyError"),
    ],
)
def test_a_metric_that_gives_no_number_for_each_sample_is_refused(metric, named):
    with pytest.raises(UserError) as error:
        measure({"mine": metric}, LOGITS, LABELS)
    assert str(error.value).startswith("metric.mine: ") and named in str(error.value)


def test_a_metric_cannot_change_what_the_others_see():
    def changes(logits, labels):
        labels.zero_()
        return logits.zero_().sum(1)

    found = measure({"changes": changes, "margin": margin}, LOGITS, LABELS)
    assert found["margin"].tolist() == [1.0, -2.5, 0.0]


def test_a_metric_of_ones_own_is_a_file_and_a_yaml(launch, tmp_path):
    (tmp_path / "my_metrics.py").write_text(
        "def rank(logits, labels):\n    return (logits > logits.gather(1, labels[:, None])).sum(1)\n"
    )
    (tmp_path / "conf/metric").mkdir(parents=True)
    (tmp_path / "conf/metric/rank.yaml").write_text("# @package metric.rank\n_target_: my_metrics.rank\n")
    done = launch(
        f"hydra.searchpath=[file://{tmp_path}/conf]", "trainer.epochs=1", "attack=fgsm", "analysis=none", "logger=none",
        "evaluation.samples=40", "name=r", "metric=[margin,rank]", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = dict(np.load(tmp_path / "runs/r/outcomes.npz"))
    means = {(r.attack, r.metric): r.value for r in read_results(tmp_path / "runs/r/results.jsonl")}
    for images, attack in (("clean", "none"), ("fgsm", "fgsm")):
        rank, gap = outcomes[f"{images}_rank"], outcomes[f"{images}_margin"]
        correct = outcomes[f"{images}_pred"] == outcomes["label"]
        assert np.array_equal(rank == 0, correct) and np.array_equal(gap > 0, correct)
        assert means[attack, "mean_rank"] == pytest.approx(rank.mean())
        assert means[attack, "mean_margin"] == pytest.approx(gap.mean())


@pytest.mark.parametrize("name", ["p", "pred", "a_b"])
def test_a_metric_name_is_no_column_of_another(name):
    with pytest.raises(ValidationError, match=name):
        TypeAdapter(MetricName).validate_python(name)
