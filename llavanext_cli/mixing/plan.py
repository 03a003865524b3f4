"""Which chunks are converted, and which of their records: the first half of `mix`, before a worker does anything.

strategy all        a chunk is planned as soon as it is found, so that workers start at once
other strategies    how many records there are must be known first: the file is walked, then planned
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llavanext_cli.mixing.json_index import Chunk, index_chunks
from llavanext_cli.mixing.mixfile import DataSet
from llavanext_cli.mixing.report import SourceReport
from llavanext_cli.mixing.sampling import within
from llavanext_cli.mixing.worker import ChunkJob


class Plan:
    """Jobs in the order of the output, made while they are asked for. Counts `records` and `sampled` of each source.

    Iterating raises `DataError` where a data set cannot be read.
    """

    def __init__(self, data_sets: Sequence[DataSet], sources: Sequence[SourceReport], seed: int):
        self._data_sets, self._sources, self._seed = data_sets, sources, seed
        self._current, self._walked = 0, 0
        paths = [data_set.json_path for data_set in data_sets]
        self._sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        self._jobs = self._plan()

    def __iter__(self) -> Iterator[ChunkJob]:
        return self._jobs

    def walk_now(self) -> int:
        """Plan everything at once: what is wrong with a file is found now. Returns the number of chosen records."""
        self._jobs = iter(list(self._jobs))
        return sum(source.sampled for source in self._sources)

    @property
    def expected(self) -> int:
        """Records that will be chosen; an estimate from the sizes of files, as long as not all have been walked."""
        total = 0.0
        records_a_byte = 0.0
        for number, (data_set, source) in enumerate(zip(self._data_sets, self._sources, strict=True)):
            if number < self._current:
                total += source.sampled
                continue
            if number == self._current and self._walked:
                records_a_byte = source.records / self._walked
            total += max(source.sampled, data_set.strategy.count(round(self._sizes[number] * records_a_byte)))
        return round(total)

    def _plan(self) -> Iterator[ChunkJob]:
        for number, data_set in enumerate(self._data_sets):
            self._current, self._walked = number, 0
            walk = self._walk(data_set, self._sources[number])
            if data_set.strategy.kind == "all":
                for chunk in walk:
                    self._sources[number].sampled += chunk.count
                    yield ChunkJob(number, chunk, range(chunk.count))
            else:
                yield from self._choose(number, data_set, list(walk))
        self._current = len(self._data_sets)

    def _choose(self, number: int, data_set: DataSet, chunks: Sequence[Chunk]) -> Iterator[ChunkJob]:
        source = self._sources[number]
        selected = data_set.strategy.select(source.records, f"{self._seed}/{data_set.name}")
        source.sampled = len(selected)
        for chunk in chunks:
            chosen = within(selected, chunk.first, chunk.count)
            if len(chosen):
                yield ChunkJob(number, chunk, chosen)

    def _walk(self, data_set: DataSet, source: SourceReport) -> Iterator[Chunk]:
        for chunk in index_chunks(data_set.json_path):
            source.records += chunk.count
            self._walked = chunk.offset + chunk.length
            yield chunk
