"""Codebooks: the place that hands them out. Shipped with the package, else cached on disk, else built and cached."""

from __future__ import annotations

import logging
import os
import threading
from importlib.resources import files
from pathlib import Path

from platformdirs import user_cache_dir

from fibkv.codebook_file import Codebook, CodebookReport, file_name, read, write
from fibkv.errors import CodebookError, ContractError
from fibkv.progress import Progress, terminal_progress
from fibkv.training_settings import SHIPPED, default_settings

__all__ = ["SHIPPED", "Codebook", "CodebookReport", "cache_dir", "load", "shipped_dir"]

logger = logging.getLogger(__name__)

_MAX_ELEMENTS = 67_108_864
_loaded: dict[tuple[int, int], Codebook] = {}
# One build at a time: it uses all cores anyway, and a second thread usually wants the same book.
_building = threading.Lock()


def load(block_dim: int, size: int, *, progress: Progress | None = None) -> Codebook:
    """The codebook of a block dim and size; read or built once per process.

    Args:
        block_dim: k, 1..256.
        size: N, 2..2^20, with N * k at most 67,108,864.
        progress: told about a build, if one is needed; by default a bar is shown where stderr is a terminal.

    Raises:
        ContractError: ``block_dim`` or ``size`` is out of range.
        CodebookError: a shipped file cannot be read or is damaged, or a build failed.
    """
    key = (block_dim, size)
    if key not in _loaded:
        _check_range(block_dim, size)
        if key in SHIPPED:
            _loaded.setdefault(key, read(shipped_dir() / file_name(*key), *key))
        else:
            with _building:
                if key not in _loaded:
                    _loaded[key] = _cached(block_dim, size) or _build(block_dim, size, progress)
    return _loaded[key]


def is_available(block_dim: int, size: int) -> bool:
    """Whether `load` would find the codebook without building it."""
    key = (block_dim, size)
    return key in SHIPPED or key in _loaded or (cache_dir() / file_name(*key)).exists()


def shipped_dir() -> Path:
    """Directory of the codebooks that come with the package."""
    return Path(str(files("fibkv") / "data" / "codebooks"))


def cache_dir() -> Path:
    """Directory of the codebooks built on this machine: below FIBKV_CACHE_DIR, or below the user's cache directory."""
    return Path(os.environ.get("FIBKV_CACHE_DIR") or user_cache_dir("fibkv")) / "codebooks"


def _check_range(block_dim: int, size: int) -> None:
    if not 1 <= block_dim <= 256:
        raise ContractError("codebook.block_dim", "between 1 and 256", block_dim)
    if not 2 <= size <= min(2**20, _MAX_ELEMENTS // block_dim):
        raise ContractError("codebook.size", f"between 2 and {min(2**20, _MAX_ELEMENTS // block_dim)}", size)


def _cached(block_dim: int, size: int) -> Codebook | None:
    """The codebook in the cache directory, if there is a sound one. A damaged file is set aside, for inspection."""
    path = cache_dir() / file_name(block_dim, size)
    if not path.exists():
        return None
    try:
        return read(path, block_dim, size)
    except CodebookError as error:
        aside = path.with_suffix(".damaged")
        logger.warning("%s; set aside as %s, building it anew", error, aside)
        path.replace(aside)
        return None


def _build(block_dim: int, size: int, progress: Progress | None) -> Codebook:
    # Here, because training imports scipy, which nobody needs to load a codebook that exists.
    from fibkv.training import build  # noqa: PLC0415

    logger.info("building codebook k=%d, N=%d", block_dim, size)
    settings = default_settings(block_dim, size)
    if progress is None:
        with terminal_progress(f"building codebook k={block_dim}, N={size}") as bar:
            book = build(block_dim, size, settings, progress=bar)
    else:
        book = build(block_dim, size, settings, progress=progress)
    path = cache_dir() / file_name(block_dim, size)
    try:
        write(path, book)
    except OSError as error:
        logger.warning("codebook k=%d, N=%d cannot be kept at %s: %s", block_dim, size, path, error)
    return book
