"""A `_target_`: its keys are checked against its signature, and bound."""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from aerl.config.errors import pydantic_line, suggest
from aerl.errors import UserError, first_line, short
from aerl.types import finite


def bind(
    spec: Mapping[str, Any], key: str, *, given: Mapping[str, Any] | None = None, later: Collection[str] = (),
    positional: int = 0,
) -> functools.partial[Any]:  # fmt: skip
    """The function or class `spec["_target_"]`, with the other keys bound to its parameters.

    `given`: values that aerl sets where the signature takes them (`num_classes` also where it takes any keyword).
    `later`: parameters that the caller passes; and the first `positional` ones of a function, whatever their names.
    Raises UserError for a target that cannot be imported, an unknown key, a wrong value and a missing parameter.
    """
    given, target = given or {}, locate(spec.get("_target_"), key)
    parameters = inspect.signature(target).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not inspect.isclass(target):
        later = [*later, *names[:positional]]
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # a library whose annotations exist for type checkers only
        hints = {}
    settings = {name: value for name, value in spec.items() if name != "_target_"}
    for name, value in settings.items():
        if name in given or name in later or not (name in names or any_keyword):
            known = [n for n in names if n not in (*given, *later)]
            line = f"{key}.{name}={short(value)}: no such key; {suggest(name, known)}"
            given_here = any(re.match(rf"\+*{re.escape(f'{key}.{name}')}=", word) for word in sys.argv)
            # Of a YAML file, for another _target_.
            raise UserError(line if given_here else f"{line}; '~{key}.{name}' leaves it out")
        settings[name] = _checked(value, hints.get(name, Any), f"{key}.{name}")
    settings |= {n: v for n, v in given.items() if n in names or (any_keyword and n == "num_classes")}
    for p in parameters:
        if p.name in names and p.default is p.empty and p.name not in (*settings, *later):
            raise UserError(f"{key}.{p.name}: missing; {spec['_target_']} needs it")
    return functools.partial(target, **settings)


def locate(name: Any, key: str) -> Callable[..., Any]:
    try:
        module, _, attribute = name.rpartition(".")
        target = getattr(importlib.import_module(module), attribute)
        inspect.signature(target)
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"{key}._target_={name}: cannot be imported: {first_line(error)}") from error
    return target  # type: ignore[no-any-return]


def _checked(value: Any, hint: Any, key: str) -> Any:
    try:
        checks = Annotated[hint, AfterValidator(finite)]
        return TypeAdapter(checks, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except PydanticUserError:  # an annotation that pydantic does not know
        return value
    except ValidationError as error:
        if any(part["type"] in ("is_instance_of", "enum") for part in error.errors()):
            return value  # YAML has no such objects: the target takes a name for one, or refuses it
        raise UserError(pydantic_line(error, key)) from error
