"""The dequantized dense cache: transformers' own layers, whose old tokens went through the codec and back.

It shares no bookkeeping with fibkv: crops, reorders and repeats are those of `DynamicLayer` on dense tensors.
"""

from __future__ import annotations

import transformers as tf
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

from fibkv.codecs import codec_for
from fibkv.parameters import RawParameters, named_parameters
from fibkv.view import DTYPE_NAMES

FIRST, LAST, PAGE = 4, 8, 8


class RoundTrip:
    """A layer of dense keys and values, of which some went through the codec.

    Keeps the first `FIRST` and the newest `LAST` tokens exactly, the others as the codec gives pages of them back.

    A page is coded right after the update that makes it due, or, with ``is_lazy``, by the crop after that or else
    before the next update: then a crop finds the tokens as they were.
    """

    def __init__(self, profile: str, *, is_latent: bool = False, is_lazy: bool = True, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.profile = profile
        self.is_latent = is_latent
        self.is_lazy = is_lazy
        self.coded = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.is_lazy:
            self._code_due()
        seen = super().update(key_states, value_states)
        if not self.is_lazy:
            self._code_due()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.coded = min(self.coded, self.get_seq_length())
        self._code_due()

    def _code_due(self) -> None:
        while self.coded + PAGE <= DynamicLayer.get_seq_length(self) - LAST:
            span = slice(max(self.coded, FIRST), self.coded + PAGE)
            is_latent = self.is_latent and self.keys.shape[1] == 1
            self.keys = _through(self.profile, self.keys, span)
            self.values = self.values if is_latent else _through(self.profile, self.values, span)
            self.coded += PAGE


class RoundTripLayer(RoundTrip, DynamicLayer):
    pass


class RoundTripHybridLayer(RoundTrip, LinearAttentionAndFullAttentionLayer):
    pass


def _through(profile: str, tensor: Tensor, span: slice) -> Tensor:
    parameters = named_parameters(profile, tensor.shape[-1], DTYPE_NAMES[tensor.dtype])
    codec = codec_for(parameters)
    changed = tensor.clone()
    if not isinstance(parameters, RawParameters):
        codec.decode(codec.encode(tensor[:, :, span], implementation="reference"), out=changed[:, :, span])
    return changed


def dequantized_cache(model: tf.PreTrainedModel, profile: str) -> tf.DynamicCache:
    """A stock cache in which full-attention layers, and those of latents, hold dequantized values."""
    cache = tf.DynamicCache(config=model.config)
    text = model.config.get_text_config(decoder=True)
    is_latent = getattr(text, "kv_lora_rank", None) is not None
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = RoundTripLayer(profile, is_latent=is_latent)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            cache.layers[index] = RoundTripHybridLayer(profile, number_of_states=layer.number_of_states)
    return cache
