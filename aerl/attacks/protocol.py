"""What an attack is to the rest of aerl: a callable, and what it states about itself."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from aerl.errors import UserError
from aerl.types import Count, NonNegative, Norm

# attack(model, x, y, *, generator) -> images like x (B, C, H, W), or a dict of them: one for each part
Attack = Callable[..., Tensor | dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class AttackSpec:
    """An attack and what it states about itself: a function by its keywords, an object by its attributes.

    call: `call(model, x, y, *, generator)`, see `aerl.attacks`.
    norm, eps: its threat model; None: the run's. Outside the run's it is reported, but not part of the worst case.
    counts: whether it may be part of the worst case at all.
    batch_size: samples at a time, for an attack whose outcome depends on it; None: the run's.
    drop_fooled: whether it stops at the first misclassified image, which is wrong for a sampled policy.
    stages: `stages(model, x) -> attacks` of which it consists, each for the samples that withstood the ones before: a
        list, or a dict of those that are reported one by one. x (B, C, H, W) are the first images of the split.
    """

    call: Attack
    norm: Norm | None = None
    eps: NonNegative | None = None
    counts: bool = True
    batch_size: Count | None = None
    drop_fooled: bool = True
    stages: Callable[[nn.Module, Tensor], Sequence[Attack] | Mapping[str, Attack]] | None = None

    @classmethod
    def of(cls, attack: "Attack | AttackSpec", key: str = "attack") -> "AttackSpec":
        """Read what `attack` states. Raises UserError, which begins with `key`, for a wrong type or range."""
        if isinstance(attack, AttackSpec):
            return attack
        if inspect.isroutine(attack) or isinstance(attack, partial):
            stated = {name: parameter.default for name, parameter in inspect.signature(attack).parameters.items()}
        else:
            stated = {field.name: getattr(attack, field.name, None) for field in fields(cls)}
        names = {field.name for field in fields(cls)} - {"call"}
        unset = (None, inspect.Parameter.empty)
        settings = {name: value for name, value in stated.items() if name in names and value not in unset}
        try:
            return cls(call=attack, **settings)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise UserError(f"{key}.{name}={settings.get(name, attack)}: {first['msg']}") from error
