"""The small language model that comes with fibkv, and model directories in general.

The embedded model is described in ``data/reference_lm/MODEL_CARD.md``; ``tools/train_reference_lm.py`` makes
such a model. Nothing is fetched: models are read from local directories only.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibkv.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Names of the dtypes that a model can be loaded in."""

CAVEATS = (
    "The embedded model is small (3.5 M parameters) and has no massive key outlier channels as 7B models have.",
    "It recalls planted values well to 1024 tokens and moderately to 2048: dense is the yardstick, not 100 %.",
)
"""What has to be said wherever a figure from the embedded model is printed."""


def model_dir() -> Path:
    """Directory of the embedded model: weights, tokenizer, configuration, held-out text, model card, licence."""
    return Path(str(files("fibkv") / "data" / "reference_lm"))


def heldout_text() -> str:
    """Python source text that the embedded model was never trained on, 213,000 characters."""
    return (model_dir() / "heldout.txt").read_text(encoding="utf-8")


def load(dtype: torch.dtype | str = "float32") -> tuple[Any, Any]:
    """Load the embedded model and its tokenizer.

    The default is float32 although the weights are bfloat16: rounding inside the model then does not blur what
    the cache does, and on CPU a decode step is faster so.

    Args:
        dtype: of the weights once loaded, as in `load_directory`.

    Raises:
        ModelError: the dtype is unknown, or transformers is not installed.
    """
    return load_directory(model_dir(), dtype)


def load_directory(directory: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local directory, in evaluation mode.

    Args:
        directory: what ``save_pretrained`` of transformers has written.
        dtype: of the weights once loaded, as a torch dtype or one of `DTYPES`; ``auto`` is the stored one.

    Returns:
        The model and the tokenizer (``AutoModelForCausalLM`` and ``AutoTokenizer`` of transformers).

    Raises:
        ModelError: the dtype is unknown, transformers is not installed, or the directory does not hold such a model.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: expected a model directory of transformers, found no config.json there")
    try:
        # Not at the top: transformers is an optional extra, and the held-out text can be read without it.
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    except ImportError as error:
        raise ModelError("language models need transformers: pip install 'fibkv[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}: transformers cannot load a causal language model from it: {error}") from error
    return model.eval(), tokenizer


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ModelError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: expected a text file in UTF-8: {error}") from error
