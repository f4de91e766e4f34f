"""Decide whose denoising step comes next. No models, no clock: a simulation uses it as the scheduler does."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from shira_diffusers.serving.jobs import Job


@dataclass(eq=False, slots=True)
class Group:
    """Jobs that are drawn together, as one batch.

    Args:
        jobs: of one kind, in the order of the batch.
        call: what draws them, once they have begun.
        mix: their adapters, by the names that these have on the model.
        leaving: what is to be done when they are over.
    """

    jobs: list[Job]
    call: Any = None
    mix: dict[str, float] = field(default_factory=dict)
    leaving: ExitStack = field(default_factory=ExitStack)

    @property
    def live(self) -> list[Job]:
        """The jobs that somebody still waits for."""
        return [job for job in self.jobs if not job.over]

    def finish(self, pictures: list[Any]) -> None:
        """Hand each job its pictures of the batch."""
        rows = iter(pictures)
        for job in self.jobs:
            job.finish(list(islice(rows, job.request.n)))


class Turns:
    """The jobs that wait, the groups that have begun, and which of them is next.

    Args:
        policy: ``turns``: jobs that have not begun get every second turn, so that each shows its first step soon; the
            other turns go to whichever job would finish first if clients shared the machine equally, and the jobs of
            each client its share. So jobs finish about when they would by equal shares, or before: a short one need
            not wait until a long one is done, and a client with many delays another's by little. (After Friedman and
            Henderson, Fairness and efficiency in web server protocols, 2003.) Nor do short jobs put off a long one for
            ever: while one client has at most ``k`` jobs at a time, whose steps cost the same and are ``m`` at most,
            its job of ``n`` steps is finished after at most ``k * (n + m + 3)`` turns. After ``k * (n + 1)`` of them no
            new job goes before it, and those that do have no more than ``k * (m + 1)`` left, beside first steps of
            others.
            ``arrival``: one job after the other, first come, first served.
            ``grouped``: as ``arrival``, but jobs of the active mix go first: few switches, and long waits for others.
        max_batch: pictures drawn together.
        max_running: groups that have begun and are not finished; each has latents, and its adapters loaded.
    """

    def __init__(self, policy: str, max_batch: int, max_running: int) -> None:
        self.waiting: list[Job] = []
        self.running: list[Group] = []
        self._max_batch, self._max_running = max_batch, max_running
        self._choose = POLICIES[policy]
        self._used: dict[object, float] = {}  # work that clients have had, on the scale of ``_virtual``
        self._virtual = 0.0  # work that a client would have had who had always waited for some
        self._shared: dict[object, float] = {}  # the same for the jobs of each client
        self._begun = False  # whether the last turn was the first of a group
        self._full = False  # there is no room for the adapters of another group
        self._last: Mapping[str, float] = {}  # the mix of the last turn

    def add(self, job: Job) -> None:
        """Take a job in."""
        self.waiting.append(job)
        self._used[job.client] = max(self._virtual, self._used.get(job.client, 0.0))
        job.due = self._shared.get(job.client, 0.0) + job.work

    def jobs(self) -> list[Job]:
        """All jobs that wait, or are in a group that has begun."""
        return [*self.waiting, *(job for group in self.running for job in group.jobs)]

    def count_waiting(self) -> int:
        """How many jobs wait."""
        return sum(not job.over for job in self.waiting)

    def sweep(self) -> list[Group]:
        """Let waiting jobs go that are over; the groups in which no job is left, which are to ``leave``."""
        self.waiting = [job for job in self.waiting if not job.over]
        return [group for group in self.running if not group.live]

    def next(self) -> Group | None:
        """The group whose turn it is, after ``sweep``; None when there is nothing to do."""
        group = self._choose(self)
        if group is not None:
            self._begun = group not in self.running
            self._last = group.jobs[0].request.mix
            if self._begun:
                self.running.append(group)
        return group

    def ran(self, group: Group) -> None:
        """Charge clients for a turn that a group had."""
        clients = Counter(job.client for job in self.jobs())
        self._shared = {who: self._shared.get(who, 0.0) for who in clients}
        for job in group.jobs:
            self._used[job.client] += job.request.cost
            self._shared[job.client] += job.request.cost / clients[job.client]
        self._virtual += sum(job.request.cost for job in group.jobs) / len(clients)
        self._used = {who: used for who, used in self._used.items() if who in clients or used > self._virtual}

    def leave(self, group: Group) -> None:
        """Let a group go."""
        self.running.remove(group)
        self._full = False

    def hold_back(self, group: Group) -> None:
        """Let a group wait again, and all others, until one leaves."""
        self.running.remove(group)
        self.waiting[:0] = group.jobs
        self._full = True

    def _fair(self) -> Group | None:
        has_room = len(self.running) < self._max_running and not self._full
        waiting = self.waiting if has_room else []
        groups = {job: group for group in self.running for job in group.live}
        jobs = waiting if waiting and not self._begun else [*groups, *waiting]
        if not jobs:  # another thread may end the last job of a group at any time
            return next(iter(self.running), None)
        first = self._first(jobs)
        return groups.get(first) or self._group(first, waiting)

    def _first(self, jobs: Iterable[Job]) -> Job:
        """Of each client's job that is due first, the one that would be finished first by equal shares of clients."""
        heads: dict[object, Job] = {}
        for job in jobs:
            heads[job.client] = min(heads.get(job.client, job), job, key=lambda each: each.due)
        return min(heads.values(), key=lambda job: self._used[job.client] + job.work)

    def _arrival(self) -> Group | None:
        if self.running or not self.waiting:
            return self.running[0] if self.running else None
        head = self.waiting[0].request.kind
        others = next((at for at, job in enumerate(self.waiting) if job.request.kind != head), len(self.waiting))
        return self._group(self.waiting[0], self.waiting[:others])

    def _grouped(self) -> Group | None:
        if self.running or not self.waiting:
            return self.running[0] if self.running else None
        same = (job for job in self.waiting if job.request.mix == self._last)
        return self._group(next(same, self.waiting[0]), self.waiting)

    def _group(self, first: Job, others: list[Job]) -> Group:
        """A new group of a job and of as many of the others as fit into its batch."""
        chosen, pictures = [first], first.request.n
        for job in others:
            fits = job.request.kind == first.request.kind and pictures + job.request.n <= self._max_batch
            if fits and job is not first:
                chosen.append(job)
                pictures += job.request.n
        self.waiting = [job for job in self.waiting if job not in chosen]
        for job in chosen:
            job.batch = pictures
        return Group(chosen)


POLICIES: dict[str, Callable[[Turns], Group | None]] = {
    "turns": Turns._fair,
    "arrival": Turns._arrival,
    "grouped": Turns._grouped,
}
