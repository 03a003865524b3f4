"""Checks the files that chunks name, each once, while later chunks are read: the levels "header" and "full".

    job ─▶ inspect ─▶ files that no earlier check knows ─▶ check_files ─▶ job with the results of its files

Chunks leave in the order they came. A file that several chunks under way name is checked by one task.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from llavanext_cli.mixing.cache import CheckCache
from llavanext_cli.mixing.check_result import CheckResult, FileState, MediaFile
from llavanext_cli.mixing.conversion import Context, Job, check_files, inspect
from llavanext_cli.mixing.workers import TaskLostError, WorkerPool, wait

FILES_A_TASK = {"header": 32, "full": 1}
"""A header takes less time than handing it to a worker."""

MOST_UNDER_WAY = 4000
"""Files that are waiting for their check, beyond which no further chunk is read."""


@dataclass
class _Batch:
    """Files that one task checks. Their state is from before the check."""

    files: list[MediaFile]
    states: list[FileState]
    future: Future[list[CheckResult]]
    results: dict[MediaFile, CheckResult] = field(default_factory=dict)


@dataclass
class _Chunk:
    job: Job
    results: dict[MediaFile, CheckResult]
    batches: dict[MediaFile, _Batch]
    """Of the files whose results are not known yet, by absolute path."""


class MediaChecker:
    """Checks the media of jobs.

    Attributes:
        known: files whose result was found in the cache.
        checked: files that were checked now.
    """

    def __init__(
        self,
        pool: WorkerPool,
        context: Context,
        cache: CheckCache,
        time_limit: float,
        progress: Callable[[float], None] = lambda _: None,
    ):
        """`progress` is called with the records of the oldest chunk whose files are checked."""
        self._pool, self._context, self._cache = pool, context, cache
        self._time_limit, self._progress = time_limit, progress
        self._under_way: dict[MediaFile, _Batch] = {}
        self.known = self.checked = 0

    def check(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Yield the jobs with the results of their files."""
        waiting: deque[_Chunk] = deque()
        for job, found in self._pool.map(inspect, jobs):
            waiting.append(self._start(job, found))
            while len(waiting) > 2 and (len(waiting) > self._pool.lookahead or len(self._under_way) > MOST_UNDER_WAY):
                yield self._finish(waiting.popleft())
        while waiting:
            yield self._finish(waiting.popleft())

    def _start(self, job: Job, found: dict[MediaFile, FileState | CheckResult]) -> _Chunk:
        root = self._context.sources[job.source].root
        results = {file: state for file, state in found.items() if isinstance(state, CheckResult)}
        states = {(kind, root + path): state for (kind, path), state in found.items() if isinstance(state, FileState)}
        chunk = _Chunk(job, results, {})
        unknown = {file: state for file, state in states.items() if file not in self._under_way}
        known = self._cache.find(unknown, self._context.check, self._context.frames)
        results.update({(kind, path[len(root) :]): result for (kind, path), result in known.items()})
        new = [file for file in unknown if file not in known]
        size = FILES_A_TASK[self._context.check]
        for start in range(0, len(new), size):
            files = new[start : start + size]
            future = self._pool.submit(check_files, files, self._time_limit)
            self._under_way.update(dict.fromkeys(files, _Batch(files, [states[file] for file in files], future)))
        chunk.batches = {file: self._under_way[file] for file in states if file not in known}
        self.known += len(known)
        self.checked += len(new)
        return chunk

    def _finish(self, chunk: _Chunk) -> Job:
        root = self._context.sources[chunk.job.source].root
        for number, ((kind, path), batch) in enumerate(chunk.batches.items()):
            if not batch.results:
                self._wait(batch)
                self._progress(len(chunk.job.chosen) * number / len(chunk.batches))
            chunk.results[kind, path[len(root) :]] = batch.results[kind, path]
        return chunk.job._replace(results=chunk.results)

    def _wait(self, batch: _Batch) -> None:
        try:
            results = wait(batch.future)
        except TaskLostError as error:
            results = [self._lost(batch.files[0], error)] if len(batch.files) == 1 else self._check_alone(batch.files)
        batch.results = dict(zip(batch.files, results, strict=True))
        self._cache.add(zip(batch.files, batch.states, results, strict=True), self._context.check, self._context.frames)
        for file in batch.files:
            del self._under_way[file]

    def _check_alone(self, files: list[MediaFile]) -> list[CheckResult]:
        """Check each file by a task of its own, to find the one that hangs or crashes its decoder."""
        futures = [self._pool.submit(check_files, [file], self._time_limit) for file in files]
        results = []
        for file, future in zip(files, futures, strict=True):
            try:
                results += wait(future)
            except TaskLostError as error:
                results.append(self._lost(file, error))
        return results

    def _lost(self, file: MediaFile, error: TaskLostError) -> CheckResult:
        what = f"took more than {self._time_limit:g} s" if error.reason == "timeout" else "crashed its decoder"
        return CheckResult(error.reason, f"{file[1]}: the check {what}")
