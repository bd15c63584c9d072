"""Importing Feast: late, quietly, and without what this service does not use.

Importing Feast 0.67 takes ten seconds: six go to typeguard instrumenting its classes, and where torch is installed it is imported
too. Only `compiler.py` and `feast_files.py` need Feast, and only while definitions are applied.
"""

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

_lock = threading.Lock()


@functools.cache
def _import_feast() -> None:
    import typeguard

    def unchecked(target: Any = None, **_options: object) -> Any:
        return target if target is not None else (lambda decorated: decorated)

    os.environ.setdefault("FEAST_USAGE", "False")
    checked: Callable[..., Any] = typeguard.typechecked
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    typeguard.typechecked = unchecked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import feast  # noqa: F401
    finally:
        typeguard.typechecked = checked
        if hide_torch:
            del sys.modules["torch"]


def import_feast() -> None:
    """Make `feast` importable without its usual cost; safe from any thread, free the second time."""
    with _lock:
        _import_feast()
