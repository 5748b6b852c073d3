"""What is fuzzed: every parser of bytes that come from outside, with seeds made of real objects."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from fibkv import codebook, codebook_file
from fibkv.artifact import Artifact, ArtifactHeader
from fibkv.artifact_decode import decode_slice
from fibkv.artifact_encode import encode_tensor
from fibkv.calibration import LayerStatistics
from fibkv.calibration_file import (
    Calibration,
    CalibrationInfo,
    LayerChoice,
    Recommendation,
    named_tensors,
    tensors_digest,
)
from fibkv.chunks import ChunkCodec, ChunkHeader
from fibkv.container import Container, Kind, pack
from fibkv.contract import Contract
from fibkv.errors import FibkvError, PageError
from fibkv.manifest import EndHeader, Place, Root, SpanHeader, end_from_bytes, root_from_bytes, spans_from_bytes
from fibkv.page_draft import page_to_bytes
from fibkv.policy import Policy
from fibkv.prefix_save import save_prefix
from fibkv.prefix_spans import packing
from fibkv.sealing import LayerSettings
from fibkv.slabs import Lanes, Slabs
from fibkv.states import LayerState
from fibkv.store import MemoryStore
from fibkv.store_objects import open_object, summarize
from fibkv.trials import SpaceTrial
from fibkv.wire import PageContents, PageReader, load_pages
from tests.contracts.examples import DIGEST, EXAMPLES
from tests.fuzz.forms import Archive, Form, Sections, Tensors, Text, of_calibration, of_codebook
from tests.pages.helpers import DIM, HEADS, gaussian, layer_settings, protecting
from tests.pages.test_artifact import make
from tests.store.prefixes import binding, empty_layers, fed, layers_settings

Read = Callable[[bytes], object]
RAW_EDGES = protecting(first_tokens_raw=4, raw_heads=(1,))
PAGES = {
    "fib": layer_settings("fib4", "fib2", RAW_EDGES, implementation="auto"),
    "recipe": layer_settings("key3", "value3", RAW_EDGES, implementation="auto"),
    "scaled": layer_settings("int8", "fp8", implementation="auto"),
    "affine": layer_settings("affine4", "affine3", implementation="auto"),
    "trellis": layer_settings("trelliskey2", "trellis3", implementation="auto"),
    "channel": layer_settings("int8", "fib2", Policy.role_aware_baseline(), implementation="auto"),
}
TOKENS = 20
SCRATCH = Path(tempfile.mkdtemp(prefix="fibkv-fuzz-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
NO_TAIL = (torch.zeros(1, HEADS, 0, DIM),) * 2


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        form: of what it reads.
        seed: something that it reads.
        read: must raise nothing but fibkv's errors.
    """

    form: Form
    seed: bytes
    read: Read


@cache
def target(name: str) -> Target:
    """The target of a name in `NAMES`."""
    return _MAKERS[name]()


def _page(settings: LayerSettings) -> Target:
    reader = PageReader(settings)
    (layer,) = fed(range(TOKENS), [settings])
    seed = page_to_bytes(layer.rows[0][0])

    def read(data: bytes) -> None:
        stored = None
        with suppress(FibkvError):
            stored = reader.open(data)
        if stored is None:
            # Nor is it recognized as a page like the one before.
            reader.open(seed)
            reader.open(data, start=0)
            raise AssertionError("what no parser reads was recognized")
        for role in ("key", "value"):
            # Without a look at the digest.
            with suppress(PageError):
                stored.vector(role, HEADS - 1, stored.form.tokens - 1)
        pages = load_pages([stored])
        packed = load_pages([stored], packing([settings], Lanes(Slabs(), 1, 1)))
        if stored.start == 0:
            (cache,), (other,) = empty_layers([settings]), empty_layers([settings])
            cache.adopt(pages, *NO_TAIL)
            other.adopt(packed, *NO_TAIL)
            ours, theirs = cache.view().decode(torch.float32), other.view().decode(torch.float32)
            assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
        check_same(data, "page")

    return Target(Sections("page"), seed, read)


@cache
def _prefix() -> tuple[MemoryStore, list[PageReader]]:
    """A store with the root, the span and the end of a prefix, and readers of its layers."""
    ids, settings, store = list(range(54)), layers_settings(), MemoryStore()
    layers = fed(ids, settings)
    for layer in layers:  # a span, then a shortened page, one behind it, and a raw tail
        layer.crop(24)
        layer.append(*(gaussian(1, HEADS, 30, DIM, seed=seed) for seed in range(2)))
    window = {"keys": gaussian(1, HEADS, 7, DIM), "values": gaussian(1, HEADS, 7, DIM).to(torch.bfloat16)}
    save_prefix(store, binding(), layers, ids, [LayerState(5, "DynamicSlidingWindowLayer", {"n": 54}, window)])
    return store, [PageReader(one) for one in settings]


def _stored(folder: str) -> tuple[str, bytes]:
    """Key and bytes of the one object in a folder of the prefix's store."""
    store, _ = _prefix()
    (entry,) = store.list(folder)
    return entry.key, store.get(entry.key) or b""


def _root() -> Target:
    key, seed = _stored("roots")
    return Target(
        Sections("root"), seed, partial(_read_object, key, "root", partial(root_from_bytes, binding=binding()))
    )


def _behind(kind: Kind, header: type[SpanHeader | EndHeader], parse: Callable[..., object]) -> Target:
    """The span or the end."""
    key, seed = _stored(f"{kind}s")
    fields = header.from_json(Container.parse(seed).header)
    place = (fields.name, fields.previous, fields.start, fields.length if kind == "end" else fields.tokens)
    read = partial(_read_object, key, kind, partial(parse, place=place, readers=_prefix()[1]))
    return Target(Sections(kind, Sections("page")), seed, read)


def _span_from_bytes(data: bytes, place: Place, readers: Sequence[PageReader]) -> object:
    return spans_from_bytes([data], [place], readers)


def _read_object(key: str, kind: Kind, parse: Read, data: bytes) -> None:
    """As `fibkv pages` and then as `fibkv.restore` do."""
    with suppress(FibkvError):
        summarize(open_object(key, data))
    parse(data)
    check_same(data, kind)


def _chunk() -> Target:
    codec, chunk = ChunkCodec(DIM, "fib4", "trellis2"), gaussian(2, 2, TOKENS, HEADS * DIM)

    def read(data: bytes) -> None:
        codec.decode(data, torch.empty_like(chunk))
        check_same(data, "chunk")

    return Target(Sections("chunk"), codec.encode(chunk), read)


def _artifact() -> Target:
    def read(data: bytes) -> None:
        artifact = Artifact.from_bytes(data)
        decode_slice(artifact)
        assert artifact.to_bytes() == data

    return Target(Archive(), encode_tensor(*make(name="fib2", policy=protecting(first_tokens_raw=1))).to_bytes(), read)


def _calibration() -> Target:
    shapes = [(HEADS, 4), (HEADS, 4, 4), (HEADS, 4, 4), (HEADS, 4), (HEADS, 4, 4)]
    statistics = {layer: LayerStatistics(9, *(gaussian(*shape).double() for shape in shapes)) for layer in range(2)}
    info = CalibrationInfo(
        model_digest=DIGEST,
        source_digest=DIGEST,
        tokens=9,
        spaces=(SpaceTrial(profile="fib4", space="mean", kl=0.5),),
        sensitivities=(),
        recommendation=Recommendation(
            target_bits=4.0,
            bits=4.0,
            kl=0.5,
            uniform_kl=0.5,
            layers=(LayerChoice(layer=0, keys="fib4", values="raw"),),
        ),
        tensors_digest=tensors_digest(named_tensors(statistics)),
    )
    path = SCRATCH / "calibration"
    Calibration(info, statistics).save(path)
    return Target(Tensors("fibkv", of_calibration), path.read_bytes(), _from_file(path, Calibration.load))


def _codebook() -> Target:
    codewords = gaussian(16, 2)
    report = codebook.load(2, 64).report.model_copy(
        update={"size": 16, "codebook_digest": codebook_file.codebook_digest(codewords)}
    )
    path = SCRATCH / "codebook"
    codebook_file.write(path, codebook_file.Codebook(2, 16, codewords, report.codebook_digest, report))
    read = _from_file(path, partial(codebook_file.read, block_dim=2, size=16))
    return Target(Tensors("report", of_codebook), path.read_bytes(), read)


def _from_file(path: Path, load: Callable[[Path], object]) -> Read:
    """A reader of files, given bytes."""

    def read(data: bytes) -> None:
        # A new file: the one before may be mapped still.
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        load(path)

    return read


def _header(name: str, kind: type[Contract]) -> Target:
    """The header of another target's seed."""
    seed = target(name).seed
    text = Artifact.from_bytes(seed).header.to_json().encode() if name == "artifact" else Container.parse(seed).header
    return _contract(kind.from_json(text))


def _contract(example: Contract) -> Target:
    def read(data: bytes) -> None:
        contract = type(example).from_json(data)
        assert type(example).from_json(contract.to_json()) == contract

    return Target(Text(), example.to_json().encode(), read)


def check_same(data: bytes, kind: Kind) -> None:
    """What was read has one form in bytes."""
    container = Container.parse(data)
    assert pack(kind, container.header, container.sections) == data


_HEADERS: dict[str, type[Contract]] = {
    "page-fib": PageContents,
    "root": Root,
    "span": SpanHeader,
    "end": EndHeader,
    "chunk": ChunkHeader,
    "artifact": ArtifactHeader,
}
_MAKERS: dict[str, Callable[[], Target]] = {
    **{f"page-{name}": partial(_page, settings) for name, settings in PAGES.items()},
    "root": _root,
    "span": partial(_behind, "span", SpanHeader, _span_from_bytes),
    "end": partial(_behind, "end", EndHeader, end_from_bytes),
    "chunk": _chunk,
    "artifact": _artifact,
    "calibration": _calibration,
    "codebook": _codebook,
    **{f"json-{type(example).__name__}": partial(_contract, example) for example in EXAMPLES},
    **{f"json-{kind.__name__}": partial(_header, name, kind) for name, kind in _HEADERS.items()},
}
NAMES = tuple(_MAKERS)
"""Of all targets."""
