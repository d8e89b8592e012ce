"""Keys of a JSON configuration, each read with its kind."""

from collections.abc import Mapping
from typing import Any

from llama4_jax.errors import UserError

MAX_NUMBER, MAX_LAYERS = 2**53, 4096
_KINDS = {int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object", str: "a string"}


class Keys:
    """The keys of one JSON object, read with checks that name the file and the key."""

    def __init__(self, values: Any, where: str):
        self.where = where
        if not isinstance(values, Mapping):
            raise UserError(f"{where.rstrip(' .:')} must hold a JSON object, got {type(values).__name__}")
        self.values = values

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any, kind: type) -> Any:
        """The value of a key, which must be of a kind (a number may be an integer); null and absent give the default."""
        value = self.values.get(key)
        if value is None:
            return default
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            self.fail(key, f"must be {_KINDS[kind]}, got {value!r:.200}")
        if kind in (int, float) and not abs(value) < MAX_NUMBER:
            self.fail(key, f"is {value!r:.200}, beyond any model's")
        return value

    def layers(self, key: str, default: int | None) -> int:
        """A number of layers: what follows is done for each, so a wild one is refused first."""
        value = self.get(key, default, int)
        if not 0 <= value <= MAX_LAYERS:
            self.fail(key, f"must be between 0 and {MAX_LAYERS}, got {value}")
        return value

    def sub(self, key: str) -> "Keys":
        return Keys(self.get(key, {}, dict), f"{self.where}{key}.")

    def expect(self, fixed: Mapping[str, Any]) -> None:
        for key, value in fixed.items():
            if self.has(key) and self.values[key] != value:
                self.fail(key, f"is {self.values[key]!r}, but only {value!r} is supported")

    def fail(self, key: str, problem: str):
        raise UserError(f"{self.where}{key} {problem}")
