"""The ``segment`` command on a Ray cluster, or on all GPUs of a machine: Ray Data hands groups of cases to workers.

Every machine must see inputs, weights and the folder of the results under the same paths. Ray schedules and restarts;
what a worker that died had finished stays, because a case that has its report is not done again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..errors import ScoatFastError
from .cases import Case
from .inference import Segmenter
from .journal import Journal, Notes
from .pipeline import Options, Run, Summary, fail, over_cases
from .results import report_path

GROUP = 64  # cases at once at most: between two groups an engine stands still for a read and a write
SHARES = 8  # groups a worker at least, so that all end at about the same time
TRIES = 3  # of a group whose worker dies
STORE = 100 << 20  # bytes; nothing but names and numbers passes through Ray


@dataclass(frozen=True)
class Workers:
    """What Ray starts: ``count`` processes (by default as many as the cluster has room for).

    A worker takes a GPU where the cluster has any or ``device`` says so, and ``cpus`` cores, which may be a fraction;
    by default a GPU's share of those of its machine, else all of this machine. Half of them read, the others write.
    """

    count: int | None = None
    cpus: float | None = None
    device: str = "auto"
    batch_size: int | str = "auto"
    dtype: str = "auto"


def segment_files_on_ray(
    inputs: Sequence[str | Path], output: Path, weights: str | Path, options: Options, workers: Workers
) -> Summary:
    """``pipeline.segment_files`` by workers of the cluster that RAY_ADDRESS names, or of one on this machine.

    A case whose worker dies each time it is tried, also alone, fails; the others go on.

    Raises:
        ScoatFastError: without Ray, or if no machine of the cluster has what a worker takes. Also what
            ``segment_files`` raises.
    """
    segmenter = Segmenter(weights, "cpu")  # what is wrong with the weights is told before any worker starts
    weights = str(Path(weights).resolve()) if Path(weights).exists() else str(weights)
    with _cluster():
        count, takes = _room(workers)
        lung = None if options.lung is None else options.lung.resolve()
        threads = options.threads or max(1, int(takes["num_cpus"] / 2) if takes["num_gpus"] else 1)
        each = replace(options, lung=lung, threads=threads)
        build = (weights, takes["num_gpus"], workers.batch_size, workers.dtype, output.resolve(), each)

        def work(cases: Sequence[Case], journal: Journal, summary: Summary) -> None:
            rows: dict[str, dict] = {}
            group = max(1, min(GROUP, len(cases) // (count * SHARES)))
            bar = tqdm(unit="case", leave=False, total=len(cases), disable=True if options.quiet else None)
            try:
                for size in (group, 1):  # whoever ends the workers of others is found out alone
                    left = [case for case in cases if case.name not in rows]
                    for done in _map(left, size, build, count, takes):
                        Notes(done["entries"]).read_out(journal)
                        for name in ("slices", "waited_for_reading", "waited_for_writing"):
                            setattr(summary, name, getattr(summary, name) + done[name])
                        rows |= {row["case"]: row for row in done["rows"]}
                        bar.update(len(done["rows"]))
                for case in cases:
                    _check(case, output, rows, journal)
            finally:
                bar.close()
                summary.rows += [rows[case.name] for case in cases if case.name in rows]

        return over_cases(inputs, output, segmenter, options, work)


class _Tally:
    """Counts how often each group was begun: Ray gives it to a worker again for as long as workers die of it."""

    def __init__(self, tries: int):
        self._left = defaultdict(lambda: tries)

    def may_begin(self, group: str) -> bool:
        self._left[group] -= 1
        return self._left[group] >= 0


class _Worker:
    """Holds a network on its device, and answers groups of cases."""

    def __init__(
        self, tally, weights: str, gpus: int, batch_size: int | str, dtype: str, output: Path, options: Options
    ):
        self._tally, self._segmenter = tally, Segmenter(weights, "cuda" if gpus else "cpu", batch_size, dtype)
        self._output, self._options = output, replace(options, quiet=True)

    def __call__(self, item: dict) -> dict:
        """Of ``item``, cases as JSON: their rows and what was told of them, as JSON; empty if it was tried enough."""
        import ray

        if not ray.get(self._tally.may_begin.remote(item["item"])):
            return {"done": ""}
        cases = [Case(**case | {"path": Path(case["path"])}) for case in json.loads(item["item"])]
        return {"done": json.dumps(self._answer(cases))}

    def _answer(self, cases: list[Case]) -> dict:
        notes, summary = Notes(), Summary()
        try:
            Run(self._output, [self._segmenter], self._options, notes, summary).run(cases)
        except Exception:  # what is missing is tried again, and fails by name
            notes.complain(traceback.format_exc())
        return asdict(summary) | {"entries": notes.entries}


def _map(cases: Sequence[Case], size: int, build: tuple, count: int, takes: dict) -> Iterator[dict]:
    """What workers make of groups of cases; nothing of those that their worker died of each time."""
    if not cases:
        return
    import ray

    plain = [asdict(case) | {"path": str(case.path.absolute())} for case in cases]
    groups = [json.dumps(plain[k : k + size]) for k in range(0, len(plain), size)]
    tally = ray.remote(num_cpus=0)(_Tally).remote(TRIES)
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(count, len(groups)))
    found = ray.data.from_items(groups, override_num_blocks=len(groups)).map(
        _Worker, fn_constructor_args=(tally, *build), compute=pool, **takes
    )
    for row in found.iter_rows():
        if row["done"]:
            yield json.loads(row["done"])


def _check(case: Case, output: Path, rows: dict[str, dict], journal: Journal) -> None:
    """Notes a failure where a case has no answer, or one that this machine does not see."""
    if case.name not in rows:
        reason = f"its worker died, also in {TRIES} tries of the case alone"
    elif rows[case.name]["status"] == "ok" and not report_path(case, output).exists():
        reason = f"its results are not in {output}: workers must see the same folders as this machine"
    else:
        return
    rows[case.name] = fail(journal, case.name, case.path, reason, ScoatFastError(reason))


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """A connection to the cluster, unless this process has one."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ScoatFastError(f"Ray is wanted: pip install 'scoat-fast[ray]' ({error})") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # of what fails, this program tells
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS", "local")
        local = {"include_dashboard": False, "object_store_memory": STORE} if address == "local" else {}
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ScoatFastError(f"no Ray cluster at {address}: {error}") from error
    context = ray.data.DataContext.get_current()
    before, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield
    finally:
        context.enable_progress_bars = before
        if ours:
            ray.shutdown()


def _room(workers: Workers) -> tuple[int, dict]:
    """How many workers there are to be, and what each takes."""
    import ray

    if workers.device not in ("auto", "cpu", "cuda"):
        raise ScoatFastError(f"workers want device auto, cpu or cuda, got {workers.device!r}")
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    share = min((has.get("CPU", 0) // has["GPU"] for has in machines if has.get("GPU")), default=0)
    has_gpu = any(machine.get("GPU") for machine in machines)
    gpus = int(has_gpu) if workers.device == "auto" else int(workers.device == "cuda")
    cpus = workers.cpus if workers.cpus is not None else max(share, 1) if gpus else os.cpu_count()
    if not cpus > 0 or (cpus > 1 and cpus % 1):
        raise ScoatFastError(f"a worker takes whole CPUs or a fraction of one, got {cpus:g}")
    room = sum(int(min(has.get("CPU", 0) / cpus, has.get("GPU", 0) if gpus else math.inf)) for has in machines)
    wanted = max(room, 1) if workers.count is None else workers.count
    if wanted > room:
        there = "; ".join(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in machines)
        needs = f"{wanted} workers of {cpus:g} CPUs and {gpus} GPUs"
        raise ScoatFastError(f"{needs} are wanted, the cluster has room for {room}: {there}")
    return wanted, {"num_cpus": cpus, "num_gpus": gpus}
