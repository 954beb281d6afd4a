"""A `_target_`: its keys are checked against its signature, and bound."""

import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from aerl.config.errors import pydantic_line, short, suggest
from aerl.types import Number, UserError, finite, first_line


def bind(
    spec: Mapping[str, Any], key: str, *, given: Mapping[str, Any] | None = None, later: Collection[str] = ()
) -> functools.partial[Any]:
    """What `spec["_target_"]` names, with the other keys bound to its parameters.

    `given` are values that aerl knows, bound where the signature takes them (`num_classes` also where it takes any
    keyword); `later` names the parameters that the caller will pass. Raises UserError for a target that cannot be
    imported, a key it does not take, a value that its annotation does not allow, and a parameter without a value.
    """
    target = _locate(spec["_target_"], key)
    try:
        parameters = inspect.signature(target).parameters
    except ValueError as error:  # written in C
        raise UserError(f"{key}._target_={spec['_target_']}: its parameters cannot be read") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # a library whose annotations exist for type checkers only
        hints = {}
    reserved = {*(given or {}), *later}
    settings = {name: value for name, value in spec.items() if name != "_target_"}
    for name, value in settings.items():
        if name in reserved or not (name in parameters or takes_any):
            known = [p for p in parameters if p not in reserved]
            raise UserError(f"{key}.{name}={short(value)}: no such key; {suggest(name, known)}")
        if name in hints:
            settings[name] = _checked(value, hints[name], f"{key}.{name}")
    for name, value in (given or {}).items():
        if name in parameters or (takes_any and name == "num_classes"):
            settings[name] = value
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and name not in {*settings, *later}:
            raise UserError(f"{key}.{name}: missing; {spec['_target_']} needs it")
    return functools.partial(target, **settings)


def _locate(name: str, key: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a user's module can raise anything
        raise UserError(f"{key}._target_={name}: cannot be imported: {first_line(error)}") from error
    if not callable(target):
        raise UserError(f"{key}._target_={name}: is a {type(target).__name__}, not a function or class")
    return target  # type: ignore[no-any-return]


def _checked(value: Any, hint: Any, key: str) -> Any:
    try:
        checked = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        if type(checked) in (int, float):
            TypeAdapter(Number).validate_python(value)  # also where the annotation is a bare float
        return finite(checked)
    except PydanticUserError:
        return value  # an annotation that pydantic does not understand; the target judges for itself
    except ValidationError as error:
        if any(part["type"] in ("is_instance_of", "enum") for part in error.errors()):
            return value  # YAML has no such objects: the target takes a name for one, or refuses it itself
        raise UserError(pydantic_line(error, key)) from error
    except ValueError as error:
        raise UserError(f"{key}={short(value)}: {error}") from error
