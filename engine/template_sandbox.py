"""TemplateSandbox: Jinja's immutable sandbox, made to stop templates that would run for ever or fill the memory.

Owns the limits of one rendering: steps (turns of a loop, calls) and the size of what is put together from texts and
lists. Jinja's own sandbox keeps a template from reaching Python; it bounds no more than `range`. Knows no chats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000
STEPS_PER_CALL = 10
MAX_SIZE = 16 * 2**20  # characters, or items of a list
MAX_BITS = 2**16  # of a whole number
BUDGET = "budget!"  # of the rendering, in its context: a name that no template can spell


class Budget:
    """Steps that one rendering has left."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def spend(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise TemplateError(f"the chat template takes more than {MAX_STEPS} steps")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Every rendering needs a `Budget` in its context, named `BUDGET`."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_counted.__name__] = _counted
        self.filters[_joined.__name__] = _joined

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        context[BUDGET].spend(STEPS_PER_CALL)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) for value in (left, right) if isinstance(value, Sized)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "*" and sizes:
            _require(sizes[0] * max(0, *numbers, 0))
        elif operator == "**" and len(numbers) == 2:
            _require(numbers[0].bit_length() * max(0, numbers[1]), MAX_BITS)
        elif operator == "*" and len(numbers) == 2:
            _require(sum(number.bit_length() for number in numbers), MAX_BITS)
        elif operator == "+":
            _require(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _counted.__name__, [], [], None, None, lineno=loop.lineno)
        for parent in [source, *source.find_all(nodes.Node)]:
            for name, value in list(parent.iter_fields()):
                if isinstance(value, list):
                    value[:] = map(_checked_join, value)
                else:
                    setattr(parent, name, _checked_join(value))
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)


def _checked_join(node: Any) -> Any:
    """`a ~ b` becomes a filter over `[a, b]`; anything else stays."""
    if not isinstance(node, nodes.Concat):
        return node
    parts = nodes.List(node.nodes, lineno=node.lineno)
    return nodes.Filter(parts, _joined.__name__, [], [], None, None, lineno=node.lineno)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = context[BUDGET]
    for item in items:
        budget.spend()
        yield item


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _require(sum(map(len, texts)))
    return "".join(texts)


def _require(size: int, most: int = MAX_SIZE) -> None:
    if size > most:
        raise TemplateError(f"the chat template makes a value of size {size}; allowed: {most}")
