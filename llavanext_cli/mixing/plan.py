"""Which chunks are converted, and which of their records: the first step of a mix.

strategy all        a chunk is planned as soon as it is found, so that workers start at once
other strategies    the file is walked first, because they need the number of its records
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llavanext_cli.mixing.conversion import Job
from llavanext_cli.mixing.json_index import Chunk, index_chunks
from llavanext_cli.mixing.report import SourceReport
from llavanext_cli.mixing.sampling import within


class Plan:
    """Jobs in the order of the output, found while iterating. Counts `records` and `sampled` of each source.

    Iterating raises `DataError` where a data set cannot be read.
    """

    def __init__(self, sources: Sequence[SourceReport], seed: int):
        self._sources, self._seed = sources, seed
        self._current = self._walked = 0
        self._bytes = [_size(source) for source in sources]
        self._jobs = self._plan()

    def __iter__(self) -> Iterator[Job]:
        return self._jobs

    def complete(self) -> int:
        """Find all jobs now, and with them every error of a data file. Returns the number of chosen records."""
        self._jobs = iter(list(self._jobs))
        return sum(source.sampled for source in self._sources)

    @property
    def expected(self) -> int:
        """Records that will be chosen; while files are walked, an estimate from their sizes."""
        total = 0.0
        records_a_byte = 0.0
        for number, source in enumerate(self._sources):
            if number < self._current:
                total += source.sampled
                continue
            if number == self._current and self._walked:
                records_a_byte = source.records / self._walked
            estimate = source.data_set.strategy.count(round(self._bytes[number] * records_a_byte))
            total += max(source.sampled, estimate)
        return round(total)

    def _plan(self) -> Iterator[Job]:
        for number, source in enumerate(self._sources):
            self._current, self._walked = number, 0
            chunks = self._walk(source)
            if source.data_set.strategy.kind == "all":
                for chunk in chunks:
                    source.sampled += chunk.count
                    yield Job(number, chunk, range(chunk.count))
            else:
                yield from self._choose(number, source, list(chunks))
        self._current = len(self._sources)

    def _choose(self, number: int, source: SourceReport, chunks: Sequence[Chunk]) -> Iterator[Job]:
        selected = source.data_set.strategy.select(source.records, f"{self._seed}/{source.data_set.name}")
        source.sampled = len(selected)
        for chunk in chunks:
            chosen = within(selected, chunk.first, chunk.count)
            if len(chosen):
                yield Job(number, chunk, chosen)

    def _walk(self, source: SourceReport) -> Iterator[Chunk]:
        for chunk in index_chunks(source.data_set.json_path):
            source.records += chunk.count
            self._walked = chunk.offset + chunk.length
            yield chunk


def _size(source: SourceReport) -> int:
    path = source.data_set.json_path
    return path.stat().st_size if path.exists() else 0
