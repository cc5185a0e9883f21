"""What one family of models is beyond a plain Llama, as data.

Owns the form of such a description. Knows neither which families there are (`families`) nor how a `config.json` is
read by one (`config_json`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.windows import Windowed


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture is beyond a plain Llama.

    `words`: its names for fields of Llama. `defaults`: fields that its config.json may leave out, as transformers
    fills them in. `fields`: those of Llama that follow from others. `always`: fields in which its config.json has no
    say. `only`: fields that change what is computed, each with the one value that is supported. `flags`: those of
    `ModelConfig` that follow from the name. `read_flags`: those that it reads from fields of its own. `windowed`:
    which layers attend within `sliding_window`; None: no layer, whatever the fields say. `text_kinds`: of an
    architecture that sees as well, what its text model is, by `model_type` of its `text_config` (`text_part`), and
    nothing else counts; empty: config.json is that of a text model.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    always: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    read_flags: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    windowed: Windowed | None = None
    text_kinds: Mapping[str, Family] = field(default_factory=dict)
