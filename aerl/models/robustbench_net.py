"""Models of RobustBench, with their weights. Importing this module needs the extra robustbench."""

import sys
from importlib import import_module
from typing import Literal

from torch import nn

from aerl.errors import UserError, first_line

# robustbench 1.1 depends on pyautoattack, and imports it by its old name.
sys.modules.setdefault("autoattack", import_module("pyautoattack"))
try:
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.utils import load_model
except ImportError as error:
    raise ImportError("model=robustbench needs the extra robustbench: pip install -e '.[robustbench]'") from error


def robustbench_net(
    *, model_name: str, dataset: Literal["cifar10", "cifar100"] = "cifar10",
    threat_model: Literal["Linf", "L2", "corruptions"] = "Linf", model_dir: str = "models",
) -> nn.Module:  # fmt: skip
    """A model of the leaderboard, which takes images in [0, 1]; its weights are downloaded into `model_dir` once.

    Raises UserError for an unknown name and for weights that cannot be downloaded.
    """
    known = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]
    if model_name not in known:
        raise UserError(
            f"model.net.model_name={model_name}: RobustBench has no such {threat_model} model of {dataset}; for "
            f"example {', '.join(list(known)[:5])}"
        )
    try:
        net: nn.Module = load_model(model_name, model_dir=model_dir, dataset=dataset, threat_model=threat_model)
    except Exception as error:  # of gdown, requests, and torch for a page in place of the file
        raise UserError(f"model.net.model_name={model_name}: cannot be downloaded: {first_line(error)}") from error
    return net
