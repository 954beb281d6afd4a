"""The words every part of aerl shares: the error a user reads, and the annotated numbers of the schema.

An annotation such as `eps: NonNegative` in a signature is at once the documentation of the parameter
and its check: `aerl.config` reads the signature of whatever a YAML file's `_target_` names, so a new
attack, model or dataset is validated before anything runs, without a second list of its keys.
This module imports neither torch nor Hydra.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field


class UserError(Exception):
    """A mistake or a fault outside aerl, told in one line: the key, its value and what would be right."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, without the paragraphs that some of them go on with."""
    return next(
        (line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


_QUOTIENT = re.compile(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*/\s*([\d.]+(?:e[-+]?\d+)?)\s*", re.IGNORECASE)


def quotient(value: Any) -> Any:
    """'8/255' as the number it means; anything else as it is."""
    if not isinstance(value, str) or not (match := _QUOTIENT.fullmatch(value)):
        return value
    numerator, denominator = map(float, match.groups())
    if denominator == 0:
        raise ValueError("divides by zero")
    return numerator / denominator


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts as an integer
        raise ValueError("must be a number, not true or false")
    return quotient(value)


def _finite(value: float) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be finite")
    return value


Number = Annotated[float, BeforeValidator(_number), AfterValidator(_finite)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Probability = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Norm = Literal["L2", "Linf"]
