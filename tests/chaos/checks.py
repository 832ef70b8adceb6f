"""What has to be true when the dust has settled."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from chaos import journal, sdk_client, standin
from reltrace_scheduler.keys import CLUSTER, SCHEMA, SHARDS, Keys, rate_key
from waiting import wait_until


@dataclass
class Tally:
    """What clients saw, counted; all faults in words.

    Parameters
    ----------
    losses
        When Redis may have lost what it had answered: from, until. What was accepted or read then
        the service may not know any more.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)

    accepted: int = 0
    delivered: int = 0
    chunks: int = 0
    lost: int = 0
    duplicates: int = 0
    differing: int = 0
    failed: int = 0
    reread: int = 0
    submitted_again: int = 0
    """Submissions that the service had accepted and did not know any more."""
    sdk_submitted_again: int = 0
    """Jobs of the SDK's client of which the same is true: it submits them again by itself."""
    read_again: int = 0
    """Submissions of which it knew less than had been read."""
    ended_and_lost: int = 0
    """Jobs that ended, were read, and are in no counter of Redis any more."""
    ended_in_losses: int = 0
    """Jobs whose end was seen in the times of `losses`: Redis need not have counted them."""
    others: Counter[str] = field(default_factory=Counter)
    """Ends of jobs of others than the clients, by state."""
    attempts: Counter[int] = field(default_factory=Counter)
    keys_left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, where: object, what: str) -> None:
        self.faults.append(f"{where}: {what}")

    def no_success(self, where: object, error: str) -> None:
        """Note a job that did not succeed: there is no reason why one should not."""
        self.failed += 1
        self.fault(where, error)

    def may_be_lost(self, at: float) -> bool:
        return any(first <= at <= last for first, last in self.losses)

    def balance(self, store: redis.Redis) -> None:
        """Compare with what the store has counted, and name what it should not hold any more."""
        keys = Keys()
        # What a scheduler of an older version left reserved is given up within a minute.
        with suppress(AssertionError):
            wait_until(
                lambda: not int(store.hget(keys("load"), "reserved") or 0), "room is given up", 100
            )
        counted = store.hgetall(keys("load")) | store.hgetall(keys("ended"))
        held = {name.decode(): int(count) for name, count in counted.items() if int(count)}
        calm = Counter({"SUCCEEDED": self.accepted}) + self.others
        # A job that ended and was read before Redis lost it is counted nowhere any more. One that
        # the SDK submitted again, because Redis lost its result, may end under both submissions.
        missing = calm["SUCCEEDED"] - held.get("SUCCEEDED", 0)
        self.ended_and_lost = missing
        if held | {"SUCCEEDED": 0} != dict(calm) | {"SUCCEEDED": 0} or not (
            -self.sdk_submitted_again <= missing <= self.ended_in_losses
        ):
            self.fault("store", f"holds {held} and not {dict(calm)}")
        self.keys_left = remaining_keys(store)
        if self.keys_left:
            self.fault("store", f"{len(self.keys_left)} keys are left: {self.keys_left[:5]}")


class _Submission:
    """One submission as a `raw_client` noted it."""

    def __init__(self, works: list[standin.Work]) -> None:
        self.works = works
        self.done = False
        self.accepted = 0.0
        self.forget()

    def forget(self) -> None:
        """Begin anew: it is read again from the start."""
        self.seen: list[float] = []
        self.entries: list[int] = []
        self.ended: Counter[int] = Counter()
        self.errors: dict[int, str] = {}
        self.chunks: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)

    def judge(self, n: int, tally: Tally) -> None:
        if not self.done:
            tally.fault(n, "was not finished")
        if self.entries != list(range(1, len(self.works) + 1)):
            tally.fault(n, f"entries {self.entries} for {len(self.works)} jobs")
        for index, work in enumerate(self.works):
            where, chunks = (n, index), self.chunks[index]
            numbers = [number for number, _ in chunks]
            if not self.ended[index]:
                tally.lost += 1
                tally.fault(where, "did not end")
                continue
            tally.delivered += 1
            if self.ended[index] > 1 or len(numbers) != len(set(numbers)):
                tally.duplicates += 1
                tally.fault(where, f"chunks {numbers}, ended {self.ended[index]} times")
            elif index in self.errors:
                tally.no_success(where, self.errors[index])
            elif chunks != list(enumerate(standin.expected(work), 1)):
                tally.differing += 1
                tally.fault(where, f"is not what an undisturbed run gives: chunks {numbers}")


def raw(path: Path, tally: Tally) -> None:
    """Check the journal of a `raw_client`: every chunk of every job once, and the right one."""
    submissions: dict[int, _Submission] = {}
    for line in journal.read(path):
        n = line["n"]
        if "works" in line:
            submissions[n] = _Submission([standin.Work(*work) for work in line["works"]])
        elif "submission" in line:
            if not submissions[n].accepted:
                tally.accepted += len(line["ids"])
            submissions[n].accepted = line["at"]
            if len(set(line["ids"])) != len(submissions[n].works):
                tally.fault(n, "job ids are not one per job")
        elif "entry" in line:
            tally.chunks += 1
            submission, job = submissions[n], line["job"]
            submission.seen.append(line["at"])
            submission.chunks[job].append((line["number"], line["digest"]))
            if line["state"] is not None:
                submission.ended[job] += 1
                submission.entries.append(line["entry"])
                tally.attempts[line["attempt"]] += 1
                tally.ended_in_losses += tally.may_be_lost(line["at"])
                if line["state"] != "JOB_STATE_SUCCEEDED":
                    submission.errors[job] = f"{line['state']}: {line['error']}"
        elif "again" in line:
            tally.reread += 1
            if line["again"] and any(map(tally.may_be_lost, submissions[n].seen)):
                tally.read_again += 1
            elif line["again"]:
                tally.differing += line["again"]
                tally.fault(n, f"{line['again']} chunks differ when they are read again")
        elif "forgotten" in line:
            _forget(submissions[n], line, tally)
        elif "done" in line:
            submissions[n].done = True
    for n, submission in submissions.items():
        submission.judge(n, tally)


def _forget(submission: _Submission, line: dict[str, Any], tally: Tally) -> None:
    """Judge a submission of which the service knew less than it had said."""
    if line["forgotten"]:
        tally.submitted_again += 1
        # The answer to a submission may have come twice, with nothing noted between.
        known = [submission.accepted or line["at"]]
    else:
        tally.read_again += 1
        # The first of its entries may have been lost, and be noticed with the last.
        known = submission.seen
    if not any(map(tally.may_be_lost, known)):
        tally.fault(line["n"], f"was forgotten at {line['at']}, after it was known at {known[-1]}")
    submission.forget()


def sdk(path: Path, tally: Tally) -> None:
    """Check the journal of an `sdk_client`: one trace per item, and the right one."""
    works: dict[int, standin.Work] = {}
    results: Counter[int] = Counter()
    for line in journal.read(path):
        if "work" in line:
            work = standin.Work(*line["work"])
            works[work.number] = work
            continue
        results[line["id"]] += 1
        tally.ended_in_losses += tally.may_be_lost(line["at"])
        if "error" in line:
            tally.no_success(line["id"], line["error"])
        elif line["data"] != sdk_client.digest(works[line["id"]].data):
            tally.differing += 1
            tally.fault(line["id"], "is not what an undisturbed run gives")
    tally.accepted += len(works)
    for number in works:
        if not results[number]:
            tally.lost += 1
            tally.fault(number, "has no result")
        else:
            tally.delivered += 1
        if results[number] > 1:
            tally.duplicates += 1
            tally.fault(number, f"has {results[number]} results")


def remaining_keys(store: redis.Redis) -> list[str]:
    """Name the keys that should not be there when everything is acknowledged."""
    keys = Keys()
    tenants = _members(store.smembers(keys("tenants")))
    allowed = {
        keys("virtual_time"),
        keys("load"),
        keys("ended"),
        keys("models"),
        keys("served"),
        keys("workers"),
        keys("tenants"),
        keys("watchdog"),
        # Who has read in the last minutes.
        keys("readers"),
        SHARDS,
        SCHEMA,
        CLUSTER,
        *(keys("tenant", tenant) for tenant in tenants),
    }
    # Workers that live, or died a few leases ago.
    workers = _members(store.zrange(keys("workers"), 0, -1))
    allowed |= {keys("worker", worker) for worker in workers}
    for route in _members(store.hkeys(keys("models"))):
        if set(_members(store.zrange(keys("serving", route), 0, -1))) <= set(workers):
            allowed.add(keys("serving", route))
    # A queue that is empty goes when leases are looked after next.
    queues = [keys("queue", name) for name in _members(store.smembers(keys("queues")))]
    allowed |= {keys("queues"), *(queue for queue in queues if store.xlen(queue) == 0)}
    found = set(_members(store.scan_iter(count=1000)))
    # A key that names a submission is remembered for a day, so that it is not accepted twice; a
    # token's bucket until it is full.
    remembered = (keys("idempotency", ""), rate_key("", "")[:-1])
    return sorted(key for key in found - allowed if not key.startswith(remembered))


def _members(found: object) -> list[str]:
    return [name.decode() for name in found]  # type: ignore[attr-defined]
