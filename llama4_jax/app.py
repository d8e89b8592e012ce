"""What every app shares: absl flags, one way to override an experiment's fields, and one-line errors.

`--config=FILE` names a Python file whose `get_config()` returns an Experiment; `--config.FIELD.FIELD=VALUE` overrides one
field of it. Values are written as in Python, without quotes: 3e-4, none, true, text; tuples as a,b,c.
"""

import dataclasses
import difflib
import importlib.util
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from absl import app, flags, logging

from llama4_jax import exit_codes
from llama4_jax.config import Experiment, validated
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

T = TypeVar("T")
_PREFIX = "--config."


def run(main: Callable[[dict[str, str]], int | None]) -> None:
    """Parses flags, calls `main` with the overrides of the config (dotted field -> text) and exits with the status it returns.

    A UserError becomes one line on stderr and the exit status FAILED.
    """
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        line = "error: " + " ".join(str(error).split())
        print(line, file=sys.stderr)
        processes.end(exit_codes.FAILED, line)


def _parse_flags(argv: list[str]) -> dict[str, str]:
    try:
        unknown = flags.FLAGS(argv, known_only=True)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes forty lines a checkpoint at INFO
    overrides = {}
    for argument in unknown:
        name, equals, value = argument.partition("=")
        if name.startswith(_PREFIX) and equals:
            overrides[name.removeprefix(_PREFIX)] = value
        elif name.startswith(_PREFIX):
            raise UserError(f"{name} has no value; write {name}=VALUE")
        else:
            near = difflib.get_close_matches(name.lstrip("-"), [*flags.FLAGS, "config.model.", "config.data."], n=1)
            raise UserError(f"unknown argument {argument!r}" + (f"; did you mean --{near[0]}?" if near else ""))
    return overrides


def load_experiment(path: str, overrides: dict[str, str]) -> Experiment:
    """The Experiment of a config file, with fields overridden, checked.

    Raises:
        UserError: no such file, no get_config in it, an unknown field, or a bad value.
    """
    experiment = load_object(path, "get_config", Experiment)
    for name, text in overrides.items():
        override(experiment, name, text)
    return validated(experiment)


def load_object(path: str, function: str, kind: type[T]) -> T:
    """What `function` of the Python file returns. Raises UserError when it is not a `kind`, or there is no such function."""
    if not Path(path).is_file():
        raise UserError(f"--config={path}: no such file")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None:
        raise UserError(f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config={path}: line {error.lineno}: {error.msg}") from error
    if not hasattr(module, function):
        raise UserError(f"--config={path} has no {function}()")
    made = getattr(module, function)()
    if not isinstance(made, kind):
        raise UserError(f"--config={path}: {function}() returned {type(made).__name__}; it must be one {kind.__name__}")
    return made


def override(config: Any, name: str, text: str) -> None:
    """Sets one field, such as `optimizer.learning_rate`, from its text. A group that is None is made with its defaults.

    Raises:
        UserError: unknown field (the nearest names are offered), or text that the field's type does not read.
    """
    owner, parts = config, name.split(".")
    for i, part in enumerate(parts):
        if isinstance(owner, dict):
            hint = None
            known = part in owner
        else:
            hint = typing.get_type_hints(type(owner)).get(part) if dataclasses.is_dataclass(owner) else None
            known = hint is not None
        if not known:
            raise UserError(_unknown_field(config, name))
        if i == len(parts) - 1:
            break
        value = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        if value is None and (group := _dataclass_of(hint)):
            value = group()
            setattr(owner, part, value)
        owner = value
    if hint is None or (_dataclass_of(hint) and text.lower() != "none") or typing.get_origin(hint) is dict:
        raise UserError(f"--config.{name} is a group of fields, not a value; its fields are {', '.join(_fields(config, name))}")
    setattr(owner, part, _read(hint, text, f"--config.{name}={text}"))


def _read(hint: Any, text: str, flag: str) -> Any:
    """`text` as a value of a field's type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return _read(next(a for a in arguments if a is not type(None)), text, flag)
    if typing.get_origin(hint) is Literal:
        if text not in arguments:
            raise UserError(f"{flag}: must be one of {', '.join(arguments)}")
        return text
    if typing.get_origin(hint) is tuple:
        items = [item.strip().strip("'\"") for item in text.strip("()[] ").split(",")]
        return tuple(_read(arguments[0], item, flag) for item in items if item)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag}: must be true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError as error:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise UserError(f"{flag}: must be {kind}") from error


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in a hint such as RopeScaling | None."""
    return next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)


def _fields(config: Any, within: str = "") -> list[str]:
    """Dotted names of all fields that can be overridden, those of absent optional groups included."""

    def visit(value, prefix):
        if isinstance(value, dict):
            members = value.items()
        else:
            hints = typing.get_type_hints(type(value))
            members = (
                (f.name, getattr(value, f.name) or _absent(hints[f.name], getattr(value, f.name)))
                for f in dataclasses.fields(value)
            )
        for name, member in members:
            if dataclasses.is_dataclass(member) or isinstance(member, dict):
                yield from visit(member, f"{prefix}{name}.")
            else:
                yield prefix + name

    def _absent(hint, value):
        return group() if value is None and (group := _dataclass_of(hint)) else value

    return [name for name in visit(config, "") if name.startswith(within)]


def _unknown_field(config: Any, name: str) -> str:
    names = _fields(config)
    # A misspelt last part counts for more than a wrong group: learning_rate alone finds optimizer.learning_rate.
    by_leaf = {n: n.rsplit(".", 1)[-1] for n in names}
    leaves = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf.values(), n=3, cutoff=0.7)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.7) or [n for n, leaf in by_leaf.items() if leaf in leaves][:3]
    hint = (
        f"; did you mean {', '.join(near)}?" if near else f"; groups are {', '.join(sorted({n.split('.')[0] for n in names}))}"
    )
    return f"unknown field --config.{name}{hint}"
