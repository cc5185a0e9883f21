"""Triton's interpreter, spared what it does again and again: kernels that call many functions take half the time.

Before a kernel runs, the interpreter puts functions of its own into `triton.language`, and takes them out at its end.
It puts them in once more for every function that the kernel calls, thousands of times in one test, where all but the
first find them there (seen in triton 3.7). Owns leaving that away, and nothing of what a kernel computes.
"""

from __future__ import annotations

from typing import Any


def spare_repeats() -> None:
    """Once, when triton has been imported."""
    from triton.runtime import interpreter

    whole_patch, whole_run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # globals whose functions have met the interpreter's language in this launch

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # which only a launch would use, and a launch is always the first
        patched.add(id(fn.__globals__))
        return whole_patch(fn)

    def run(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        try:
            return whole_run(self, *args, **options)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, run
