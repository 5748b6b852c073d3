"""Names of prefixes: a chain of digests over token ids, so that equal beginnings have equal names.

The name of a prefix depends on everything before it, not on how it was cut: a name ends at a boundary, and two
prompts share names as far as they share tokens up to a boundary. What else must agree for their pages to be shared,
such as the model and its codecs, is put into the chain's first link.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fibkv.digest import JsonValue, digest, digest_bytes
from fibkv.errors import ContractError

ROOT_DOMAIN = "fibkv_prefix_root_v1"
LINK_DOMAIN = "fibkv_prefix_link_v1"
TokenIds = Sequence[int] | npt.NDArray[np.integer]


def root(bound_to: JsonValue = None) -> str:
    """The name of the empty prefix, of a chain that is bound to a JSON value: who may share what it names."""
    return digest(ROOT_DOMAIN, bound_to)


def chain(previous: str | None, token_ids: TokenIds) -> str:
    """The name of the prefix that goes on with ``token_ids [t]`` after the one named ``previous``.

    Args:
        previous: a name that `root` or `chain` gave; None = the empty prefix of a chain that is bound to nothing.
        token_ids: at least one, each from 0 to 2**32 - 1.

    Raises:
        ContractError: no ids, or something else than ids.
    """
    return digest_bytes(LINK_DOMAIN, (previous or root()).encode(), _bytes(token_ids))


def chain_names(start: str | None, token_ids: TokenIds, boundaries: Iterable[int]) -> list[str]:
    """The names of ``token_ids[:b]`` for every boundary b, each linked to the one before it.

    Args:
        start: name of the prefix before the ids; see `chain`.
        token_ids: ``[t]``.
        boundaries: ascending, each from 1 to t.

    Raises:
        ContractError: boundaries that do not ascend within the ids.
    """
    names: list[str] = []
    name, done = start, 0
    for boundary in boundaries:
        if not done < boundary <= len(token_ids):
            raise ContractError("chain_names.boundaries", f"more than {done}, at most {len(token_ids)}", boundary)
        name, done = chain(name, token_ids[done:boundary]), boundary
        names.append(name)
    return names


def _bytes(token_ids: TokenIds) -> npt.NDArray[np.generic]:
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ContractError("chain.token_ids", "whole numbers [t], not empty", f"{ids.dtype} {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= 1 << 32:
        raise ContractError("chain.token_ids", "numbers from 0 to 2**32 - 1", f"{ids.min()} to {ids.max()}")
    return ids.astype("<u4")
