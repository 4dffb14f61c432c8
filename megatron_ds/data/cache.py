"""Files that many processes want and one should build: a lock, a temporary name, an atomic rename.

Every process calls ``build_once`` itself, so no rank waits for a rank of another machine and node-local disks work.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from megatron_ds.errors import DataError


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Make ``path`` (a file or a folder) by ``build(temporary_path)`` unless it exists.

    The first caller builds while the others wait; what appears under ``path`` is whole. Raises DataError where the
    folder cannot be written.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                temporary = path.with_name(f"{path.name}.tmp")
                # Left by a killed builder: nobody else can own it while we hold the lock.
                shutil.rmtree(temporary, ignore_errors=True)
                build(temporary)
                os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); set data.data_cache_path to a folder that can"
        ) from error
