"""ModelConfig <-> JSON: the form of experiment.json and of an Orbax folder's config.json."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

T = TypeVar("T")


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_json(values: Any, source: str) -> ModelConfig:
    """A field that is absent takes its default, since it did not exist when the file was written. Raises UserError."""
    try:
        return _read(ModelConfig, values, source)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None


def config_from_settings(settings: Mapping[str, Any], source: str) -> ModelConfig:
    """Of an experiment's settings by their dotted names."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *groups, field = name.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise UserError(f"{source}: {name} lies in something that is no group")
        target[field] = value
    if not isinstance(nested.get("model"), dict):
        raise UserError(f"{source}: has no settings of a model")
    return config_from_json(nested["model"], source)


def _read(kind: type[T], values: Any, source: str) -> T:
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict) or (unknown := values.keys() - hints.keys()):
        raise UserError(
            f"{source}: {kind.__name__} " + (f"has no {min(unknown)}" if isinstance(values, dict) else "is no group")
        )
    fields = {}
    for name, value in values.items():
        groups = [hint for hint in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(hint)]
        if groups and value is not None:
            value = _read(groups[0], value, source)
        fields[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fields)
