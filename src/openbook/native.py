"""Python functions over arrays, compiled to machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, **options: Any) -> F:
    """Machine code that runs without the interpreter's lock, kept beside the module where that can be written."""
    try:
        return cast(F, njit(nogil=True, error_model="numpy", cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache
        return cast(F, njit(nogil=True, error_model="numpy", **options)(function))
