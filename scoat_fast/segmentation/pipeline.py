"""Files in, files out: the ``segment`` command.

Cases are read, answered and written at the same time, by threads that hand them on: while a GPU works on one case, the
next ones are read and those before it are written. What waits between them is bounded: no thread that reads is more
than one case ahead of the engines, and as many cases are written at once as there are threads for that.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..errors import BadInputError, OutputError, ScoatFastError, one_line
from ..files import make_folder, write_csv
from ..imaging.dicom_seg import write_seg
from ..imaging.grid import SQUARE_PIXELS
from .cases import Case, find_cases
from .inference import Segmenter
from .journal import Journal, OpenJournal
from .ledger import finished, input_facts, made_of, network_digest, options_digest, place_of, scan_facts, unchanged
from .lungs import Lungs, find_lungs, given_lungs
from .overlay import contact_sheet
from .quality import assess
from .reading import Windowed, lung_path, read_case
from .results import (
    CSV_COLUMNS,
    check_free,
    check_lists,
    check_own,
    has_stale,
    report_path,
    row_of,
    write_results,
)
from .statistics import check_min_mm3, measure, remove_small
from .stream import Job

NOTE = "research only, not for clinical use"


@dataclass(frozen=True)
class Options:
    """What to do with every case, beside what the weights say."""

    threshold: float | None = None
    min_mm3: float = 0.0
    series: tuple[str, ...] = ()  # UIDs or numbers of the DICOM series to take; all by default
    lung: Path | None = None  # a mask, or a folder of masks named as the cases
    save_probabilities: bool = False
    save_attention: bool = False
    save_lungs: bool = False
    dicom_seg: bool = False  # where the input is a DICOM series
    threads: int | None = None  # that read, and as many that write; by default what the devices of the engines want
    redo: bool = False  # also what is done already
    quiet: bool = False
    part: int = 1  # of ``parts``: every one takes its share of the cases
    parts: int = 1


@dataclass
class Summary:
    """What became of a run: a row for every case in the order of the cases, and where its time went.

    ``slices`` counts those that were answered; ``seconds`` is the time from the first case to the last,
    ``waited_for_reading`` and ``waited_for_writing`` what an engine stood still for, summed over engines.
    """

    rows: list[dict] = field(default_factory=list)
    slices: int = 0
    seconds: float = 0.0
    waited_for_reading: float = 0.0
    waited_for_writing: float = 0.0

    @property
    def all_well(self) -> bool:
        return all(row["status"] == "ok" for row in self.rows)


def segment_files(
    inputs: Sequence[str | Path], output: Path, segmenters: Segmenter | Sequence[Segmenter], options: Options
) -> Summary:
    """Segments every case that ``inputs`` hold into the folder ``output``.

    A case that fails is named on standard error and in ``failures.jsonl`` with its reason, and the others go on.
    ``cases.csv`` lists them all. What an earlier run has done from the same input, weights and options stays.

    Args:
        segmenters: one of each device, of the same weights.

    Raises:
        OutputError: if the folder cannot be made or the table not be written.
        ScoatFastError: for an option out of range.
    """
    segmenters = [segmenters] if isinstance(segmenters, Segmenter) else list(segmenters)

    def work(cases: Sequence[Case], journal: Journal, summary: Summary) -> None:
        Run(output, segmenters, options, journal, summary).run(cases)

    return over_cases(inputs, output, segmenters[0], options, work)


def over_cases(
    inputs: Sequence[str | Path],
    output: Path,
    segmenter: Segmenter,
    options: Options,
    work: Callable[[Sequence[Case], Journal, Summary], None],
) -> Summary:
    """Has ``work`` done on every case of ``inputs``, and keeps the lists; see ``segment_files``.

    Args:
        work: fills in the summary as far as it comes.
    """
    segmenter.threshold(options.threshold)
    check_min_mm3(options.min_mm3)
    if not 1 <= options.part <= options.parts:
        raise ScoatFastError(f"a part from 1 to {options.parts} is wanted, got {options.part}")
    if options.lung is not None and not options.lung.exists():
        raise BadInputError(options.lung, "no such lung mask or folder of lung masks")
    make_folder(output)
    share = "" if options.parts == 1 else f"-{options.part}-of-{options.parts}"
    table, failures = output / f"cases{share}.csv", output / f"failures{share}.jsonl"
    check_lists(table, failures)
    cases, errors = find_cases(inputs, output, options.series)
    journal, summary = OpenJournal(failures, options.quiet), Summary()
    began = time.perf_counter()
    try:
        if options.part == 1:  # what is no case belongs to nobody's share
            summary.rows += [fail(journal, "", error.path, error.reason, error) for error in errors]
        work(cases[options.part - 1 :: options.parts], journal, summary)
    finally:
        summary.seconds = time.perf_counter() - began
        write_csv(table, CSV_COLUMNS, summary.rows)
    return summary


def fail(journal: Journal, name: str, path: Path, reason: str, error: Exception) -> dict:
    """Notes a failure; its row of the table."""
    failure = {"case": name, "input": place_of(path), "reason": reason, "kind": type(error).__name__}
    journal.fail(failure, str(getattr(error, "path", path)))
    return {"case": name, "input": place_of(path), "status": "failed", "error": reason}


class Run:
    """One run over many cases in this process. Everything but ``run`` may be called by any thread."""

    def __init__(
        self,
        output: Path,
        segmenters: Sequence[Segmenter],
        options: Options,
        journal: Journal,
        summary: Summary,
    ):
        self.output, self.segmenters, self.options = output, segmenters, options
        self.journal, self.summary = journal, summary
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._weights = network_digest(segmenters[0].stream.net)
        self._precision = str(segmenters[0].stream.engine.dtype)  # here: out of memory, a GPU may hand over to the CPU
        self._bar = tqdm(unit="slice", leave=False, total=0, disable=True if options.quiet else None)

    def run(self, cases: Sequence[Case]) -> None:
        """Does all cases, and fills in the summary."""
        rows: dict[str, dict] = {}
        threads = self.options.threads or _threads(self.segmenters)
        readers, writers = (ThreadPoolExecutor(threads, name) for name in ("reader", "writer"))
        engines = ThreadPoolExecutor(len(self.segmenters), "engine")
        slots = threading.BoundedSemaphore(threads)  # no case waits for a writer in the writers' queue
        try:
            jobs = _Shared(_ahead(readers, self._read, cases, threads))
            answering = [engines.submit(self._answer, one, jobs, writers, slots, rows) for one in self.segmenters]
            for future in wait(answering, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            self._stop.set()
            raise
        finally:
            for pool in (engines, readers, writers):
                pool.shutdown(cancel_futures=self._stop.is_set())
            self._bar.close()
            self.summary.rows += [rows[case.name] for case in cases if case.name in rows]

    def _answer(
        self,
        segmenter: Segmenter,
        read: Iterator[Job | dict],
        writers: ThreadPoolExecutor,
        slots: threading.Semaphore,
        rows: dict[str, dict],
    ) -> None:
        """The work of one engine: answers what is read, and hands it to the writers."""

        def jobs() -> Iterator[Job]:
            while True:
                with self._waiting("waited_for_reading"):
                    item = next(read, None)
                if isinstance(item, dict):
                    rows[item["case"]] = item
                    continue
                if item is None:
                    return
                self._progress(0, len(item.slices))
                yield item

        def keep(done: Future, name: str) -> None:
            slots.release()
            if not done.cancelled():
                rows[name] = done.result()

        for job in segmenter.stream.run(jobs(), self.options.save_attention, self._progress):
            with self._waiting("waited_for_writing"):
                slots.acquire()
            writers.submit(self._write, job).add_done_callback(partial(keep, name=job.about.case.name))
            del job  # the writer's

    def _read(self, case: Case) -> Job | dict:
        """The case as a job, or its row of the table where nothing is left to do."""
        return self._attempt(case, lambda: self._load(case))

    def _write(self, job: Job) -> dict:
        return self._attempt(job.about.case, lambda: self._finish(job))

    def _attempt(self, case: Case, step: Callable[[], Job | dict]) -> Job | dict:
        try:
            return step()
        except (BadInputError, OutputError) as error:
            return fail(self.journal, case.name, case.path, error.reason, error)
        except ScoatFastError as error:
            return fail(self.journal, case.name, case.path, str(error), error)
        except Exception as error:  # one case must never cost the others; its traceback is not lost
            self.journal.complain(traceback.format_exc())
            return fail(self.journal, case.name, case.path, f"unexpected {type(error).__name__}: {error}", error)

    def _load(self, case: Case) -> Job | dict:
        check_free(case, self.output)
        lung = None if self.options.lung is None else lung_path(case, self.options.lung)
        inputs = {"input": case.path} | ({} if lung is None else {"lung": lung})
        options = self._options_digest(case, "missing" if lung is None and self.options.lung else lung is not None)
        if not self.options.redo:
            done = finished(report_path(case, self.output), inputs, self._weights, options)
            if done is not None and not has_stale(case, self.output, done):
                self._tell(done, "unchanged, ")
                return row_of(done)
        facts = {"input": scan_facts(case)} | ({} if lung is None else {"lung": input_facts(lung)})
        check_own(case, self.output, facts["input"])
        read, slices = read_case(case, lung)
        for name, path in inputs.items():
            if unchanged(path, facts[name]) is None:
                raise BadInputError(path, "was changed while it was read")
        read.made_from = facts | {"weights": self._weights, "options": options}
        if self.options.lung is not None and lung is None:
            read.warnings.append("no lung mask for this case")
        if self.options.dicom_seg and case.kind != "dicom":
            read.warnings.append("no DICOM SEG: the input is no DICOM series")
        if read.turn is None and self.options.min_mm3:
            read.warnings.append("a picture has no pixel size: small regions were kept")
        return Job(
            slices,
            SQUARE_PIXELS if read.turn is None else read.turn.spacing[1:],
            self.segmenters[0].threshold(self.options.threshold),
            windowed=read.turn is None,
            keeps_probabilities=self.options.save_probabilities,
            about=read,
        )

    def _finish(self, job: Job) -> dict:
        """Writes the results of a case that was answered; its row of the table."""
        case, turn = job.about.case, job.about.turn
        if job.error is not None:
            raise job.error
        mask, voxel_mm3 = job.mask, None
        if turn is not None:
            voxel_mm3 = turn.voxel_mm3
            mask = remove_small(mask, voxel_mm3, self.options.min_mm3)
        lungs = self._lungs(job, mask)
        warnings = job.about.warnings + lungs.warnings
        statistics = measure(mask, None if turn is None else job.slices, voxel_mm3, lungs.labels)
        segmenter = self.segmenters[0]
        report = {
            "case": case.name,
            "input": place_of(case.path),
            "note": NOTE,
            "scoat_fast": __version__,
            "weights": segmenter.pretrained.name,
            "threshold": job.threshold,
            "min_mm3": self.options.min_mm3,
            "warnings": warnings,
            "qc": assess(mask, turn, warnings, lungs.labels is not None),
            "statistics": statistics | {"lung_mask": lungs.source},
            "shape": list(mask.shape[1:] if turn is None else turn.from_slices(mask).shape),
            "spacing_mm": None if turn is None else [round(mm, 6) for mm in turn.spacing],
            "made_from": job.about.made_from,
        }
        greys = job.slices if job.windowed else Windowed(job.slices, segmenter.window)
        sheet = contact_sheet(greys, mask, job.spacing, _title(report))
        found = {"mask": mask}
        if job.probabilities is not None:
            found["probability"] = job.probabilities
        if self.options.save_lungs and lungs.labels is not None:
            found["lungs"] = lungs.labels
        found |= {f"attention_{name}": maps for name, maps in job.attention.items()}
        volumes = {kind: x[0] if turn is None else turn.from_slices(x) for kind, x in found.items()}
        seg = None
        if self.options.dicom_seg and case.kind == "dicom":
            seed = made_of(job.about.made_from)
            seg = partial(
                write_seg,
                folder=case.path,
                uid=case.series,
                mask=volumes["mask"],
                weights=segmenter.pretrained.name,
                seed=seed,
            )
        report = write_results(case, self.output, report, volumes, job.about.header, sheet, seg)
        self._tell(report)
        with self._lock:
            self.summary.slices += len(mask)
        return row_of(report)

    def _lungs(self, job: Job, mask: np.ndarray) -> Lungs:
        """The given lungs, or those that are found in a volume; a picture has no HU to find any by."""
        if job.about.lung is not None:
            return given_lungs(job.about.lung, None if job.about.turn is None else job.slices)
        return Lungs() if job.about.turn is None else find_lungs(job.slices, mask, job.about.turn.spacing)

    def _options_digest(self, case: Case, lung: bool | str) -> str:
        """Of what else the results of a case depend on."""
        return options_digest(
            {
                "scoat_fast": __version__,
                "precision": self._precision,
                "series": case.series,
                "threshold": self.segmenters[0].threshold(self.options.threshold),
                "min_mm3": self.options.min_mm3,
                "lung": lung,
                "save_probabilities": self.options.save_probabilities,
                "save_attention": self.options.save_attention,
                "save_lungs": self.options.save_lungs,
                "dicom_seg": self.options.dicom_seg,
            }
        )

    def _tell(self, report: dict, how: str = "") -> None:
        name, numbers = one_line(report["case"]), report["statistics"]
        amount = f"{numbers['voxels']} pixels of opacity"
        if numbers["ml"] is not None:
            amount = f"{numbers['ml']:.1f} mL of opacity in {numbers['slices']} slices"
        status, shown = report["qc"]["status"], report["warnings"]
        if status == "fail":
            shown = report["qc"]["reasons"]
        self.journal.tell(f"{name}: {how}{amount}, qc {status}" + "".join(f"\n  {reason}" for reason in shown))

    def _progress(self, answered: int, more: int = 0) -> None:
        """Moves the bar; called between batches, and so where a run ends that is to stop."""
        if self._stop.is_set():
            raise InterruptedError("the run was stopped")
        with self._lock:
            self._bar.total += more
            self._bar.update(answered)

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Adds the time within to the summary."""
        began = time.perf_counter()
        yield
        with self._lock:
            setattr(self.summary, what, getattr(self.summary, what) + time.perf_counter() - began)


def _threads(segmenters: Sequence[Segmenter]) -> int:
    """How many read, and write: one for each engine, and half of the cores where GPUs would wait for one."""
    on_gpu = any(segmenter.stream.device.type == "cuda" for segmenter in segmenters)
    return max(len(segmenters), (os.cpu_count() or 1) // 2 if on_gpu else 0)


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, items: Iterator):
        self._items, self._lock = items, threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self):
        with self._lock:
            return next(self._items)


def _ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, most: int) -> Iterator:
    """The function's results in the order of the items, ``most`` of them made before they are asked for."""
    futures: deque[Future] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > most:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _title(report: dict) -> str:
    numbers = report["statistics"]
    amount = f"{numbers['voxels']} pixels" if numbers["ml"] is None else f"{numbers['ml']:.1f} mL"
    return f"{one_line(report['case'])}: {amount} opacity. {NOTE}"
