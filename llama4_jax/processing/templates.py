"""Chat templates in Jinja, as they come with a checkpoint: programs of strangers, run in a sandbox that bounds them.

A template sees plain data and the functions that transformers gives templates. Beyond Jinja's own immutable sandbox (no access to
Python's internals, no files, no change of what it is given) it is bounded in time, in steps of its loops, and in the size of
every value that it makes.
"""

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama4_jax.errors import UserError

_MAX_SOURCE = 1 << 20  # characters
_MAX_SECONDS = 10.0
_MAX_STEPS = 500_000  # of loops and macros
_MAX_SIZE = 1 << 20  # characters and elements of any value, beside 4 times what the template is given
_MAX_WORK = 1 << 8  # how many times that size the arguments of one call may multiply to


class ChatTemplate:
    """A compiled template. `marks` are the two characters that it puts around what `{% generation %}` blocks write."""

    def __init__(self, source: str, name: str):
        """`name` is what messages call it. Raises UserError when it is not a template."""
        self.source, self.name = source, name
        if len(source) > _MAX_SOURCE:
            raise UserError(f"the chat template {name} has {len(source):,} characters, more than {_MAX_SOURCE:,}")
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError, SyntaxError, MemoryError) as error:
            raise UserError(f"the chat template {name} is not a template: {_one_line(error)}") from None
        self.marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def render(self, variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")) -> str:
        """The text for these variables, which are plain data. Raises UserError: the template's own complaint, or its fault."""
        self._environment.begin(_size(variables, math.inf), marks)
        try:
            return self._environment.concat(self._template.generate(variables))
        except jinja2.TemplateError as error:  # raise_exception's too
            raise UserError(f"the chat template {self.name} refuses this conversation: {_one_line(error)}") from None
        except Exception as error:  # a template can do anything to its values
            raise UserError(f"the chat template {self.name} fails: {type(error).__name__}: {_one_line(error)}") from None


class _OutOfBounds(jinja2.TemplateError):
    pass


class _Spending(threading.local):
    """What a render may still spend; each thread has its own."""

    steps, deadline, size, marks = 0, math.inf, _MAX_SIZE, ("", "")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Every value that an operator, a function, a filter or a block makes passes `bounded`."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self):
        self._spending = _Spending()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=lambda value: self.bounded(value),
        )
        self.globals = {
            "range": self._range,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Variables,
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        self.filters = {name: self._bounded_filter(f) for name, f in {**self.filters, "tojson": _tojson}.items()}
        self.code_generator_class = _CodeGenerator

    def begin(self, input_size: int, marks: tuple[str, str]) -> None:
        """Allots a render in this thread."""
        spending = self._spending
        spending.steps, spending.deadline = 0, time.monotonic() + _MAX_SECONDS
        spending.size, spending.marks = _MAX_SIZE + 4 * input_size, marks

    def step(self) -> str:
        """Called once in each round of a loop, and by every other function here."""
        self._spending.steps += 1
        if self._spending.steps > _MAX_STEPS:
            raise _OutOfBounds(f"more than {_MAX_STEPS:,} steps")
        if time.monotonic() > self._spending.deadline:
            raise _OutOfBounds(f"more than {_MAX_SECONDS:g} seconds")
        return ""

    def bounded(self, value: Any) -> Any:
        """The value, a list of it where it comes bit by bit."""
        self.step()
        if isinstance(value, Iterator):
            items, total = [], 0
            for item in value:
                total += _size(item, self._spending.size)
                self._require(total)
                items.append(item)
            return items
        self._require(_size(value, self._spending.size))
        return value

    def _require(self, size: int) -> None:
        if size > self._spending.size:
            raise _OutOfBounds(f"a value of more than {self._spending.size:,} characters")

    def _require_work(self, *arguments: Any) -> None:
        """What a call makes is at most the product of its arguments' sizes, a number counting as that many."""
        work = 1
        for argument in arguments:
            number = abs(argument) if isinstance(argument, int | float) else _size(argument, self._spending.size)
            work *= 1 + number
        if not work <= _MAX_WORK * self._spending.size:
            raise _OutOfBounds("a call that may make a huge value")

    def concat(self, parts) -> str:
        """What output, macros and blocks that set a variable are joined by."""
        texts, total = [], 0
        for part in parts:
            total += len(part)
            self._require(total)
            texts.append(part)
        return "".join(texts)

    def join(self, parts: tuple) -> str:
        """The operator ~."""
        return self.concat(str(self.bounded(part)) for part in parts)

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self._require(_size(left, self._spending.size) + _size(right, self._spending.size))
        elif operator == "**":
            self._require_work(*[abs(left) + 1] * min(math.ceil(abs(right)), 99))
        elif operator == "*":
            self._require_work(left, right)
        elif isinstance(left, str):  # %
            self._require_narrow(left)
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(self, context, obj, *args, **kwargs):
        self.step()
        if obj != self._range:
            self._require_work(getattr(obj, "__self__", ""), *args, *kwargs.values())
        return self.bounded(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value):
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(getattr(value, "__self__", None), str):
            self._require_narrow(value.__self__)
        return super().wrap_str_format(value)

    def _require_narrow(self, form: str) -> None:
        """A format may not ask for a wide field, or have its width among the values."""
        if re.search(r"%[^a-zA-Z%]*(\d{4}|\*)|:[^}]*(\d{4}|\{)", form):
            raise _OutOfBounds("a format with a large width")

    def _bounded_filter(self, function):
        is_format = function.__name__ == "do_format"

        @functools.wraps(function)  # with the mark of those that want the context
        def call(*args, **kwargs):
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            given = [self.bounded(argument) for argument in given]
            self._require_work(*given, *kwargs.values())
            if is_format:
                self._require_narrow(str(given[0]))
            return self.bounded(function(*args[: len(args) - len(given)], *given, **kwargs))

        return call

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        self._require(len(numbers))
        return numbers


class _CodeGenerator(CodeGenerator):
    """Jinja's, with a step in each round of a loop and each call of a macro, and a bounded operator ~."""

    def visit_For(self, node: nodes.For, frame) -> None:
        node.body.insert(0, _step())
        super().visit_For(node, frame)

    def visit_Macro(self, node: nodes.Macro, frame) -> None:
        node.body.insert(0, _step())
        super().visit_Macro(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _step() -> nodes.ExprStmt:
    return nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None))


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` stands around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        first, last = self.environment._spending.marks
        return first + caller() + last


class _Variables(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args, **kwargs):  # `self` may be a variable's name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _require_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name, value):
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a variable named {name}")


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    # Characters for private use stay: template_format gives them a meaning, which an escape would hide.
    return re.sub(r"[^\x00-\x7f\U000F0000-\U000FFFFD]", lambda c: json.dumps(c.group())[1:-1], text) if ensure_ascii else text


def _size(value: Any, limit: float) -> float:
    """Characters and elements of plain data, whatever it is nested in; counting ends beyond `limit`."""
    total, rest = 0, [value]
    while rest and total <= limit:
        item = rest.pop()
        total += 1
        if isinstance(item, str | bytes | range):
            total += len(item)
        elif isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            rest += item
        elif isinstance(item, int):
            total += item.bit_length() >> 6
    return total


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
