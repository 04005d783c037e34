"""Runs parts one after the other; one that fails does not keep the next from running."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

from gcg.bench import Bench
from gcg.figure import Figure, Result, Skip, Verdict
from gcg.registry import Part
from gcg.service import Service


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    part: Part
    result: Result
    seconds: float


@dataclass
class Runner:
    """Keeps one service at a time, for as long as parts can share it."""

    bench: Bench
    outcomes: list[Outcome] = field(default_factory=list)
    _service: Service | None = field(default=None)

    @property
    def forced(self) -> list[str]:
        """What had to be forced, in words."""
        return self.bench.forced

    def run(self, parts: Sequence[Part], after_each: Callable[[Self], None]) -> None:
        """Runs them all; `after_each` is called with what there is so far."""
        try:
            for part in parts:
                print(f"{part.name}: {part.title}", flush=True)
                began = time.monotonic()
                result = self._attempt(part)
                outcome = Outcome(part, result, time.monotonic() - began)
                self.outcomes.append(outcome)
                _say(outcome)
                after_each(self)
        except KeyboardInterrupt:
            for part in parts[len(self.outcomes) :]:
                result = _nothing(part, "not measured: interrupted", Verdict.SKIPPED)
                self.outcomes.append(Outcome(part, result, 0.0))
            raise
        finally:
            self._end_service()
            after_each(self)

    def _attempt(self, part: Part) -> Result:
        watchdog = None
        try:
            self._serve(part)
            watchdog = self._watch(part)
            result = part.run(self.bench)
        except Skip as skip:
            result = _nothing(part, f"skipped: {skip}", Verdict.SKIPPED)
        # Whatever went wrong in one part is no reason to lose the others.
        except Exception as error:
            traceback.print_exc()
            result = _nothing(part, f"failed: {type(error).__name__}: {error}", Verdict.FAILED)
            self._end_service()
        finally:
            if watchdog is not None:
                watchdog.cancel()
        self._clear()
        return result

    def _serve(self, part: Part) -> None:
        service = self._service
        now = (None, False) if service is None else (service.sharing, service.attach)
        if now == (part.sharing, part.attach) and not part.fresh:
            return
        self._end_service()
        if part.sharing is not None:
            bench = self.bench
            service = Service(bench.gcgroupd, bench.sim, part.sharing, bench.log, attach=part.attach)
            self._service = service.__enter__()
        self.bench.serve(self._service)

    def _watch(self, part: Part) -> threading.Timer:
        """A call that hangs in a control file returns when the service is gone."""

        def kill() -> None:
            print(f"{part.name}: not done after {part.limit_s:.0f} s, its service is killed", file=sys.stderr)
            self.bench.kill_service()

        watchdog = threading.Timer(part.limit_s, kill)
        watchdog.daemon = True
        watchdog.start()
        return watchdog

    def _clear(self) -> None:
        if self._service is None:
            return
        try:
            self._service.clear()
        except (OSError, TimeoutError) as error:
            self.forced.append(f"workloads could not be ended ({error}): the service was ended instead")
            self._end_service()

    def _end_service(self) -> None:
        service, self._service = self._service, None
        self.bench.serve(None)
        if service is not None:
            self.forced.extend(service.stop())


def _nothing(part: Part, why: str, verdict: Verdict) -> Result:
    """The part's row all the same: no row is dropped."""
    return Result([Figure(part.title, part.to_reach, why, "0", verdict)])


def _say(outcome: Outcome) -> None:
    for figure in outcome.result.figures:
        print(f"  [{figure.verdict}] {figure.name}: {figure.measured}", flush=True)
    print(f"  {outcome.seconds:.1f} s", flush=True)
