"""Processes that save prefixes into one directory at once, and are killed at random moments (SIGKILL).

After every kill all that can be seen is whole, and all that `put` has returned for is there; at the end temporary files
are removed by the next start, and every prefix that was saved whole is loaded bit for bit. A test runs a short one; the
long one by hand:

    python -m tests.store.kill --kills 200
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fibkv.cache import LayerCache
from fibkv.hf_saver import Saver
from fibkv.manifest import Binding
from fibkv.prefix_load import PrefixLoader
from fibkv.prefix_save import Snapshot, save_prefix
from fibkv.store import DirectoryStore
from fibkv.store.directory import LEFTOVER_SECONDS
from fibkv.store_objects import open_object
from tests.store.prefixes import binding, empty_layers, fed, same

WRITERS = 3
# Of the moment of a kill, counted from the last one: some saves of a writer, so that it may fall anywhere into one.
MAX_WAIT_SECONDS = 0.03
# Looking takes the longer, the more there is.
KILLS_PER_DIRECTORY = 20
IDS = range(70)  # four spans and an end


class Reporting(DirectoryStore):
    """Says on a pipe what has been written, once `put` has returned."""

    def __init__(self, path: Path, pipe: int) -> None:
        super().__init__(path)
        self.pipe = pipe

    def put(self, key: str, data: bytes | memoryview) -> None:
        super().put(key, data)
        os.write(self.pipe, f"{key}\n".encode())  # shorter than PIPE_BUF: whole or not at all


def name_of(turn: int) -> Binding:
    """Of a turn: all writers go through the same ones, each from where it starts."""
    return binding(weights=f"name:turn-{turn}")


@dataclass
class Killing:
    """What is known of the directory while its writers are killed.

    Attributes:
        path: of the directory.
        layers: what every prefix holds.
        committed: keys that a `put` has returned for.
        sound: keys whose objects were read and were whole.
        leftovers: temporary files at the end.
        whole: prefixes that were loaded whole at the end.
    """

    path: Path
    layers: Sequence[LayerCache]
    committed: set[str] = field(default_factory=set)
    sound: set[str] = field(default_factory=set)
    leftovers: int = 0
    whole: int = 0
    _unread: bytes = b""

    def run(self, kills: int, dice: random.Random) -> None:
        """Kills writers, and looks at what they leave.

        Raises:
            AssertionError, PageError: something is lost, or can be seen and is not whole.
        """
        store = DirectoryStore(self.path)
        reading, self._pipe = os.pipe()
        os.set_blocking(reading, False)
        writers = [self._start(0) for _ in range(WRITERS)]
        for kill in range(1, kills + 1):
            time.sleep(dice.uniform(0, MAX_WAIT_SECONDS))
            index = dice.randrange(WRITERS)
            end(writers[index])
            self._read(reading)
            self.look(store)
            writers[index] = self._start(kill)
        for writer in writers:
            end(writer)
        self._read(reading)
        self.look(store)
        os.close(reading)
        os.close(self._pipe)
        self._start_over(kills)

    def look(self, store: DirectoryStore) -> None:
        """What is committed is there; what is there is whole."""
        seen = {entry.key for entry in store.list()}
        assert self.committed <= seen, f"lost: {sorted(self.committed - seen)}"
        for key in seen - self.sound:
            open_object(key, store.get(key) or b"")
            self.sound.add(key)

    def _start(self, turn: int) -> int:
        if writer := os.fork():
            return writer
        try:
            store = Reporting(self.path, self._pipe)
            saver = Saver(store)
            while True:
                # By turns beside this thread and on it.
                if turn % 2:
                    assert saver.write(Snapshot.take(name_of(turn), self.layers, IDS)).result().failure is None
                else:
                    assert save_prefix(store, name_of(turn), self.layers, IDS).failure is None
                turn += 1
        finally:
            os._exit(1)  # a writer that ends by itself is found by `end`

    def _read(self, pipe: int) -> None:
        while True:
            try:
                self._unread += os.read(pipe, 1 << 16)
            except BlockingIOError:
                break
        *lines, self._unread = self._unread.split(b"\n")
        self.committed.update(line.decode() for line in lines)

    def _start_over(self, kills: int) -> None:
        """Leftovers go when the directory is opened anew, objects stay; prefixes are as they were saved."""
        found = list(temporary(self.path))
        self.leftovers = len(found)
        for path in found:
            os.utime(path, (0, time.time() - LEFTOVER_SECONDS - 1))
        store = DirectoryStore(self.path)
        assert not list(temporary(self.path))
        self.look(store)
        # A writer may have begun behind all others, so that turns are missing before it.
        for turn in range(sum(key.startswith("roots/") for key in self.sound) + kills):
            self.whole += self._is_whole(PrefixLoader(store, name_of(turn), IDS))

    def _is_whole(self, loader: PrefixLoader) -> bool:
        if loader.root() is None:
            return False
        layers = empty_layers()
        prefix = loader.load([layer.settings for layer in layers])
        assert loader.failures == []
        if prefix.length < len(IDS):
            return False
        assert prefix.tails is not None
        for index, layer in enumerate(layers):
            layer.adopt(prefix.pages[index], *prefix.tails[index])
        assert same(layers, self.layers)
        return True


def end(writer: int) -> None:
    """Kills a writer, which must not have ended by itself."""
    os.kill(writer, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL, "a writer failed"


def temporary(path: Path) -> Iterator[Path]:
    """Files that are on their way, or whose writer is gone."""
    return (file for file in path.rglob(".*") if file.is_file())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    dice, layers, done = random.Random(given.seed), fed(IDS), []
    for first in range(0, given.kills, KILLS_PER_DIRECTORY):
        with tempfile.TemporaryDirectory() as folder:
            done.append(Killing(Path(folder), layers))
            done[-1].run(min(KILLS_PER_DIRECTORY, given.kills - first), dice)
    print(
        f"{given.kills} kills of {WRITERS} writers: {sum(len(one.committed) for one in done)} objects committed, "
        f"none lost; {sum(len(one.sound) for one in done)} seen, all whole; {sum(one.leftovers for one in done)} "
        f"temporary files left, all removed; {sum(one.whole for one in done)} prefixes loaded whole"
    )


if __name__ == "__main__":
    main()
