"""The decorator of loops that numba compiles, and the files that keep the machine code between runs.

numba's own cache is not safe for the first run of several processes: two that compile one function for different
types at the same time may take the same file, and a third then runs the code of one type on the memory of the other
(https://github.com/numba/numba/issues/4807). Wrong counts, not errors, came of it. So each function and signature has
a file of its own here, which says what it was made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function of numbers and arrays at its first call, without the interpreter's lock, and keep the code.

    The code is made anew when the function's file has changed, or that of a function it calls, or the value of a
    constant it names. (numba itself looks at the function's own file alone.)
    """
    dispatcher = numba.njit(nogil=True)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher


class FilePerSignature(IndexDataCacheFile):
    """Machine code of one function, a file for each signature and processor, without an index to fall out of step."""

    def save(self, key: tuple[Hashable, ...], data: Any) -> None:
        self._save_data(self._name(key), (self._version, self._made_of(), key, data))

    def load(self, key: tuple[Hashable, ...]) -> Any:
        """Return what was saved for a key, None where nothing was, or of other sources."""
        try:
            *origin, data = self._load_data(self._name(key))
        except FileNotFoundError:
            return None
        return data if origin == [self._version, self._made_of(), key] else None

    def flush(self) -> None:
        for path in Path(self._cache_path).glob(self._index_name.removesuffix(".nbi") + ".*.nbc"):
            path.unlink(missing_ok=True)

    def _name(self, key: tuple[Hashable, ...]) -> str:
        signature, processor, _ = key
        digest = hashlib.sha256(repr((signature, processor)).encode()).hexdigest()[:24]
        return f"{self._index_name.removesuffix('.nbi')}.{digest}.nbc"

    def _made_of(self) -> Hashable:
        return self._source_stamp


class _Cache(FunctionCache):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _FunctionFile(function, self._cache_path, self._impl.filename_base)


class _FunctionFile(FilePerSignature):
    def __init__(self, function: Any, folder: str, name: str) -> None:
        super().__init__(folder, name, source_stamp=None)
        self._function = function

    @cache  # noqa: B019  (one for each function, which lives as long as the process)
    def _made_of(self) -> Hashable:
        return _sources(self._function)  # late, for what it calls may be defined after it


def _sources(function: FunctionType) -> tuple[Hashable, ...]:
    """Return size and time of the files of a function and of all that it calls, and the constants that these name."""
    files: set[str] = set()
    constants: set[tuple[str, str]] = set()
    left, seen = [function], {function}
    while left:
        one = left.pop()
        files.add(one.__code__.co_filename)
        for name in one.__code__.co_names:
            value = one.__globals__.get(name)
            if isinstance(value, Dispatcher):
                if value.py_func not in seen:
                    seen.add(value.py_func)
                    left.append(value.py_func)
            elif isinstance(value, bool | int | float | str | tuple):
                constants.add((name, repr(value)))
    stamps = ((file, Path(file).stat()) for file in sorted(files))
    return (*((file, stat.st_size, stat.st_mtime_ns) for file, stat in stamps), *sorted(constants))
