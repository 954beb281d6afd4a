"""Networks of the library timm, by name. Importing this module needs the extra timm."""

import difflib
from typing import Any

from torch import nn

from aerl.errors import UserError, first_line

try:
    import timm
except ImportError as error:
    raise ImportError("model=timm needs the extra timm: pip install -e '.[timm]'") from error


def timm_net(
    *, num_classes: int, channels: int, model_name: str, pretrained: bool = False, **settings: Any
) -> nn.Module:
    """timm.create_model(model_name) for the dataset's classes and channels. `settings` are its other arguments.

    Raises UserError for an unknown name and for pretrained weights that cannot be loaded.
    """
    if not timm.is_model(model_name.split(".")[0]):
        known = timm.list_models()
        close = difflib.get_close_matches(model_name, known, 5) or known[:5]
        raise UserError(f"model.net.model_name={model_name}: timm has no such model; for example {', '.join(close)}")
    try:
        net: nn.Module = timm.create_model(
            model_name, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **settings
        )
    except OSError as error:
        raise UserError(f"model.net.pretrained=true: cannot download the weights: {first_line(error)}") from error
    return net
