"""Annotated numbers, for the schema and for signatures that a YAML file's `_target_` names.

`eps: NonNegative` documents a parameter, and `aerl.config` checks the value in the YAML file against it.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_QUOTIENT = re.compile(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*/\s*([\d.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)


def quotient(value: Any) -> Any:
    """'8/255' as a number, also in lists and dictionaries; anything else is returned unchanged."""
    if isinstance(value, dict):
        return {key: quotient(item) for key, item in value.items()}
    if isinstance(value, list):
        return [quotient(item) for item in value]
    if not isinstance(value, str) or not (match := _QUOTIENT.fullmatch(value)):
        return value
    numerator, denominator = map(float, match.groups())
    if denominator == 0:
        raise ValueError("divides by zero")
    return numerator / denominator


def finite(value: Any) -> Any:
    """`value`; ValueError if it, or a number in its lists and dictionaries, is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be finite")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        finite(item)
    return value


def box_width(norm: str, pixels: int) -> float:
    """The radius from which on a ball around any image of so many values in [0, 1] holds all of them."""
    return float(pixels ** (1 / ORDERS[norm]))


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts as an integer
        raise ValueError("must be a number, not true or false")
    return quotient(value)


Number = Annotated[float, BeforeValidator(_number), AfterValidator(finite)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
_LARGEST = 2**63 - 1  # of torch's integers
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=_LARGEST)]
Index = Annotated[int, BeforeValidator(_number), Field(ge=0, le=_LARGEST)]
Norm = Literal["L1", "L2", "Linf"]
ORDERS = {"L1": 1.0, "L2": 2.0, "Linf": math.inf}  # as torch and NumPy take them
