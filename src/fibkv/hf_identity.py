"""Whose pages these are: a model's configuration and weights, by digest or by a name that the user vouches for."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fibkv.codecs.base import tensor_bytes
from fibkv.digest import canonical_json, digest, digest_bytes
from fibkv.errors import ModelError
from fibkv.hf_model import model_digest
from fibkv.ladder import Choice
from fibkv.manifest import Binding, ModelIdentity
from fibkv.settings import CacheSettings

WEIGHTS_DOMAIN = "fibkv_weights_v1"
TENSOR_DOMAIN = "fibkv_weight_v1"

# Digests of the weights of live models, with the state that they were taken in.
_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, tuple[object, str]] = weakref.WeakKeyDictionary()


def identify(model: PreTrainedModel, *, name: str | None = None) -> ModelIdentity:
    """The identity of a model as it is now.

    Args:
        model: of transformers.
        name: of its weights, instead of a digest. Whoever gives one vouches that equal names mean equal weights.
    """
    weights = weights_digest(model) if name is None else f"name:{name}"
    return ModelIdentity(config=model_digest(model.config), weights=weights, dtype=str(model.dtype))


def weights_digest(model: PreTrainedModel) -> str:
    """Digest of all parameters and buffers, names and dtypes included: every byte is read, once per state of the model.

    A model whose tensors are the same and unchanged since is not read again.
    """
    tensors = dict(sorted(model.state_dict(keep_vars=True).items()))
    state = tuple((name, id(tensor), tensor.data_ptr(), _version(tensor)) for name, tensor in tensors.items())
    known = _KNOWN.get(model)
    if known is None or known[0] != state:
        parts = {name: _tensor_digest(tensor) for name, tensor in tensors.items()}
        known = _KNOWN[model] = (state, digest(WEIGHTS_DOMAIN, parts))
    return known[1]


def _version(tensor: torch.Tensor) -> object:
    """What changes when the tensor is written to. Inference tensors do not say, so each look counts as a change."""
    return object() if tensor.is_inference() else tensor._version


def _tensor_digest(tensor: torch.Tensor) -> str:
    header = canonical_json({"dtype": str(tensor.dtype), "shape": list(tensor.shape)})
    return digest_bytes(TENSOR_DOMAIN, header.encode(), b"\0", tensor_bytes(tensor))


def bind(settings: CacheSettings, model: ModelIdentity) -> Binding:
    """What prefixes are bound to in caches of a model with these settings."""
    layers = range(settings.layers)
    spaces = (settings.key_spaces.get(layer) for layer in layers)
    return Binding(
        model=model,
        tokens_per_page=settings.tokens_per_page,
        read_through=settings.read_through,
        raw_dtype=settings.raw_dtype,
        policy=settings.policy,
        codecs=tuple((_name(keys), _name(values)) for keys, values in map(settings.coded, layers)),
        spaces=tuple(None if space is None else space.digest for space in spaces),
    )


def _name(choice: Choice) -> str:
    return choice if isinstance(choice, str) else choice.digest()


class Origin:
    """The model that a cache was made for. Does not keep it alive; copies of a cache share it."""

    def __init__(self, model: PreTrainedModel | PretrainedConfig | None) -> None:
        self._model = weakref.ref(model) if isinstance(model, PreTrainedModel) else lambda: None

    def identify(self, name: str | None) -> ModelIdentity:
        """See `identify`.

        Raises:
            ModelError: there is no model, or no longer.
        """
        model = self._model()
        if model is None:
            raise ModelError(
                "save: expected a cache whose model is alive, got one of a configuration or another process"
            )
        return identify(model, name=name)

    def __deepcopy__(self, memo: dict[int, object]) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (None,)  # another process has another model
