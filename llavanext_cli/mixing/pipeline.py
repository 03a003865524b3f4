"""Keeps workers busy and chunks in order: the middle of `mix`, between the plan and the output.

    chunk ─▶ inspect ─▶ check its files ─▶ convert ─▶ in the order of the plan
    chunk ──────────────────────────────▶ convert ─▶                              with the checks "none" and "exists"

A few chunks are under way at a time. A file is checked once however many records name it: chunks that meet a file which
is being checked wait for the same answer, and later ones find it in the cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

from llavanext_cli.mixing.cache import VerdictCache
from llavanext_cli.mixing.media import FileState, Verdict
from llavanext_cli.mixing.plan import Plan
from llavanext_cli.mixing.pool import Lost, Pool
from llavanext_cli.mixing.report import MixReport
from llavanext_cli.mixing.spool import Spool
from llavanext_cli.mixing.worker import ChunkJob, ChunkResult, Context

FILES_A_TASK = {"header": 32, "full": 4}
"""Files a worker is handed at once, by level; it answers each on its own. Few where each takes long, so that the last
ones are shared out evenly."""

CHUNKS_A_TASK = 4
"""Chunks a worker is handed at once where no files are read, so that it need not wait for a busy main process."""

FEW_WORKERS = 16
"""Up to so many are started before there is work for each, and handed several chunks at once: of many more, the chunks
under way would fill the memory."""

Progress = Callable[[int, int], None]


@dataclass
class _Underway:
    """A chunk between being read and being written."""

    job: ChunkJob
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    waiting: set[tuple[str, str]] = field(default_factory=set)
    files: int = 0
    result: ChunkResult | None = None


class Pipeline:
    """The chunks of one mix on their way through the pool."""

    def __init__(
        self,
        context: Context,
        plan: Plan,
        pool: Pool,
        spool: Spool,
        cache: VerdictCache,
        time_limit: float,
        report: MixReport,
        progress: Progress | None,
    ):
        self.context, self.plan, self.pool, self.spool, self.cache = context, plan, pool, spool, cache
        self.jobs = iter(plan)
        self.time_limit, self.report, self.progress = time_limit, report, progress
        self.reads_files = context.check in ("header", "full")
        self.line: deque[_Underway] = deque()
        self.finished = 0
        self.together = CHUNKS_A_TASK if not self.reads_files and pool.count <= FEW_WORKERS else 1
        self.window = (2 * pool.count + 2) * self.together
        self.slots = cycle(range(self.window))  # chunks leave in order, so the oldest slot is the free one
        # Files being checked: (kind, absolute path) → state, and the chunks that wait for it.
        self.states: dict[tuple[str, str], FileState] = {}
        self.waiters: dict[tuple[str, str], list[tuple[_Underway, tuple[str, str]]]] = {}

    def results(self) -> Iterator[tuple[ChunkJob, ChunkResult]]:
        """Yield converted chunks in the order of the plan."""
        if self.reads_files:
            self.pool.start(FEW_WORKERS)
        self._advance()
        for key, index, value in self.pool.results():
            stage, subject = key
            if stage == "inspect":
                self._inspected(subject[index], value)
            elif stage == "check":
                self._checked(subject[index], value)
            else:
                subject[index].result = value
            while self.line and self.line[0].result is not None:
                done = self.line.popleft()
                self.finished += len(done.job.chosen)
                if done.result.spooled:
                    done.result.body = self.spool.take(done.job.slot, done.result.spooled)
                yield done.job, done.result
            self._advance()
            self._tell()

    def _advance(self) -> None:
        stage = "inspect" if self.reads_files else "convert"
        while len(self.line) + self.together <= self.window:
            chunks = [_Underway(job._replace(slot=next(self.slots))) for job in islice(self.jobs, self.together)]
            if not chunks:
                return
            self.line += chunks
            self.pool.submit((stage, chunks), stage, [chunk.job for chunk in chunks])

    def _inspected(self, chunk: _Underway, found: dict[tuple[str, str], FileState | Verdict]) -> None:
        root = self.context.sources[chunk.job.source].root
        unknown: dict[tuple[str, str], FileState] = {}
        for (kind, path), state in found.items():
            if isinstance(state, Verdict):
                chunk.verdicts[kind, path] = state
            else:
                unknown[kind, root + path] = state
        chunk.files = len(unknown)
        known: dict[tuple[str, str], Verdict] = {}
        for kind in {kind for kind, _ in unknown}:
            states = {
                path: state for (of, path), state in unknown.items() if of == kind and (of, path) not in self.waiters
            }
            for path, verdict in self.cache.find(kind, states, self.context.check, self.context.frames).items():
                known[kind, path] = verdict
        new = []
        for file, state in unknown.items():
            key = (file[0], file[1][len(root) :])
            if file in known:
                chunk.verdicts[key] = known[file]
                continue
            chunk.waiting.add(key)
            if file not in self.waiters:
                self.states[file] = state
                new.append(file)
            self.waiters.setdefault(file, []).append((chunk, key))
        self.report.files_known += len(known)
        self.report.files += len(known) + len(new)
        size = FILES_A_TASK[self.context.check]
        for start in range(0, len(new), size):
            part = new[start : start + size]
            self.pool.submit(("check", part), "check", part, time_limit=self.time_limit)
        self._convert_if_ready(chunk)

    def _checked(self, file: tuple[str, str], verdict: Verdict | Lost) -> None:
        if isinstance(verdict, Lost):
            what = f"took more than {self.time_limit:g} s" if verdict.reason == "timeout" else "crashed its decoder"
            verdict = Verdict(verdict.reason, f"{file[1]}: the check {what}")
        state = self.states.pop(file)
        self.cache.add([(*file, state, verdict)], self.context.check, self.context.frames)
        for chunk, key in self.waiters.pop(file):
            chunk.verdicts[key] = verdict
            chunk.waiting.discard(key)
            self._convert_if_ready(chunk)

    def _convert_if_ready(self, chunk: _Underway) -> None:
        if not chunk.waiting:
            job = chunk.job._replace(verdicts=chunk.verdicts)
            self.pool.submit(("convert", [chunk]), "convert", [job], urgent=True)

    def _tell(self) -> None:
        if self.progress:
            partly = sum(
                len(c.job.chosen) * (1 - len(c.waiting) / c.files) for c in self.line if c.files and not c.result
            )
            done = self.finished + int(partly)
            self.progress(done, max(done, self.plan.expected))
