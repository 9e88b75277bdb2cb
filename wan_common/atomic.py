"""Files appear whole or not at all: write to a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_common.errors import ArtifactError

TEMP_PREFIX = ".tmp-"


def make_output_dir(path: str | os.PathLike[str], flag: str = "--output_dir") -> Path:
    """Create ``path`` (and parents) and prove that files can be made in it.

    Raises:
        ArtifactError: it exists as a file, or cannot be created or written; names ``flag``.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArtifactError(f"{path}: cannot write here ({error.strerror}); choose another folder with {flag}") from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` with its suffix; on success fsync it and rename it to ``path``.

    On any exception the temporary file is removed and ``path`` is left as it was. A killed process leaves the old file
    or the new one; at worst a ``.tmp-*`` file stays behind, which :func:`remove_temporaries` clears.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f"{TEMP_PREFIX}{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; users share run directories
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # write() does not say which file the disk was full for
        raise


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write ``data`` as indented UTF-8 JSON, atomically. NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(directory: str | os.PathLike[str]) -> None:
    """Remove what killed writers left in ``directory`` (one writer per run directory is assumed)."""
    for leftover in Path(directory).glob(f"{TEMP_PREFIX}*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
