"""`fibkv pages`: what is in a store of saved prefixes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fibkv.files import write_bytes
from fibkv.sizes import format_size
from fibkv.store import Store, open_store

app = typer.Typer(help="Stored prefixes: list, check, look into, remove, copy.", no_args_is_help=True)

StorePlace = Annotated[str, typer.Argument(help="Directory of the store, or a URL: redis://..., s3://bucket/..., ...")]


def _open(place: str) -> Store:
    if "://" not in place and not Path(place).expanduser().is_dir():
        raise typer.BadParameter(f"{place}: expected the directory or the URL of a store")
    return open_store(place)


@app.command("ls")
def list_objects(
    store: StorePlace,
    folder: Annotated[str, typer.Argument(help="Such as roots, spans, ends/<name>, aside; default: all.")] = "",
) -> None:
    """Objects, least recently used first, and their bytes. Reads none of them."""
    entries = sorted(_open(store).list(folder), key=lambda entry: (entry.used, entry.key))
    for entry in entries:
        used = datetime.fromtimestamp(entry.used, UTC).strftime("%Y-%m-%d %H:%M:%S")
        print(f"{used}  {entry.nbytes:>12}  {entry.key}")
    print(f"{len(entries)} objects, {format_size(sum(entry.nbytes for entry in entries))}")


@app.command("verify")
def verify(
    store: StorePlace,
    aside: Annotated[bool, typer.Option("--aside", help="Move damaged objects to aside/.")] = False,
) -> None:
    """Read and check every object. Exit code 1 if one is damaged."""
    from fibkv import store_objects

    sound, nbytes, damaged = 0, 0, 0
    for checked in store_objects.verify(_open(store), move_aside=aside):
        if checked.problem is None:
            sound, nbytes = sound + 1, nbytes + checked.nbytes
        else:
            damaged += 1
            print(f"{checked.key}: {checked.problem}" + (f" -> {checked.moved_to}" if checked.moved_to else ""))
    print(f"{sound} objects sound, {format_size(nbytes)}; {damaged} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command("inspect")
def inspect(
    store: StorePlace,
    key: Annotated[str, typer.Argument(help="Key of an object, or enough of its beginning.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """One object, checked: what it belongs to, and its pages."""
    from fibkv import store_objects

    opened = _open(store)
    entry = store_objects.find(opened, key)
    found = store_objects.open_object(entry.key, opened.get(entry.key) or b"")
    if json:
        print(found.to_json())
        return
    print(f"{found.key}\n{found.nbytes} bytes, {found.digest}")
    print(f"pages {found.page_nbytes} bytes, raw {found.raw_nbytes} bytes")
    for name, value in found.header:
        if name not in ("pages", "layers"):
            print(f"{name}: {value.to_json() if hasattr(value, 'to_json') else value}")
    if found.pages:
        table = Table("layer", "tokens", "keys", "values", "bytes", box=None)
        for page in store_objects.summarize(found):
            table.add_row(str(page.layer), page.tokens, page.keys, page.values, str(page.nbytes))
        Console().print(table)


@app.command("rm")
def remove(
    store: StorePlace,
    keys: Annotated[list[str], typer.Argument(help="Keys, or folders such as aside.")],
) -> None:
    """Remove objects. What other prefixes need of them must be computed again."""
    opened = _open(store)
    count = nbytes = 0
    entries = list(opened.list())
    for key in keys:
        chosen = [entry for entry in entries if entry.key == key or entry.key.startswith(f"{key}/")]
        if not chosen:
            raise typer.BadParameter(f"{key}: expected a key or folder of {store}")
        for entry in chosen:
            opened.delete(entry.key)
            count, nbytes = count + 1, nbytes + entry.nbytes
    print(f"{count} objects removed, {format_size(nbytes)}")


@app.command("export")
def export(
    store: StorePlace,
    target: Annotated[str, typer.Argument(help="Another store; a directory is made if absent. With --key, a file.")],
    key: Annotated[str | None, typer.Option(help="Write this object to a file, as it is.")] = None,
) -> None:
    """Copy what is sound into another store, or one object to a file. Exit code 1 if something was damaged."""
    from fibkv import store_objects

    opened = _open(store)
    if key is not None:
        entry = store_objects.find(opened, key)
        write_bytes(Path(target), opened.get(entry.key) or b"")
        print(f"{entry.key} written to {target}, {format_size(entry.nbytes)}")
        return
    copied = store_objects.copy(opened, open_store(target))
    print(f"{copied.written} objects copied, {format_size(copied.nbytes)}; {copied.there} were there")
    for damaged in copied.damaged:
        print(f"{damaged}: damaged, not copied")
    if copied.damaged:
        raise typer.Exit(1)
