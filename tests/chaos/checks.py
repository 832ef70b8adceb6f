"""What has to be true when the dust has settled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import redis
from chaos import journal, sdk_client, standin
from reltrace_scheduler.auth.identity import DEFAULT_TENANT
from reltrace_scheduler.store.keys import Keys


@dataclass
class Tally:
    """What clients saw, counted; all faults in words."""

    accepted: int = 0
    delivered: int = 0
    chunks: int = 0
    lost: int = 0
    duplicates: int = 0
    condemned: int = 0
    differing: int = 0
    reread: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    keys_left: list[str] = field(default_factory=list)

    def balance(self, store: redis.Redis) -> None:
        """Compare with what the store has counted, and name what it still holds."""
        held = balance(store)
        calm = {"jobs": 0, "bytes": 0, "results": 0, "SUCCEEDED": self.accepted}
        if held != calm:
            self.fault("store", f"holds {held} and not {calm}")
        self.keys_left = remaining_keys(store)
        if self.keys_left:
            self.fault("store", f"{len(self.keys_left)} keys are left: {self.keys_left[:5]}")

    def fault(self, where: object, what: str) -> None:
        self.faults.append(f"{where}: {what}")


def raw(path: Path, tally: Tally) -> None:
    """Check the journal of a `raw_client`: every chunk of every job once, and the right one."""
    works: dict[int, list[standin.Work]] = {}
    seen: dict[tuple[int, int], list[tuple[int, str]]] = {}
    ended: Counter[tuple[int, int]] = Counter()
    errors: dict[tuple[int, int], str] = {}
    entries: dict[int, list[int]] = {}
    open_ = None
    for line in journal.read(path):
        n = line["n"]
        if "works" in line:
            works[n], open_ = [standin.Work(*work) for work in line["works"]], n
        elif "submission" in line:
            tally.accepted += len(line["ids"])
            if len(set(line["ids"])) != len(works[n]):
                tally.fault(n, "job ids are not one per job")
        elif "entry" in line:
            job = n, line["job"]
            tally.chunks += 1
            seen.setdefault(job, []).append((line["number"], line["digest"]))
            if line["state"] is not None:
                ended[job] += 1
                entries.setdefault(n, []).append(line["entry"])
                tally.attempts[line["attempt"]] += 1
                if line["state"] != "JOB_STATE_SUCCEEDED":
                    errors[job] = f"{line['state']}: {line['error']}"
        elif "again" in line:
            tally.reread += 1
            if line["again"]:
                tally.differing += line["again"]
                tally.fault(n, f"{line['again']} chunks differ when they are read again")
        elif "done" in line:
            open_ = None
    if open_ is not None:
        tally.fault(path.name, f"submission {open_} was not finished")
    for n, jobs in works.items():
        if entries.get(n, []) != list(range(1, len(jobs) + 1)):
            tally.fault(n, f"entries {entries.get(n)} for {len(jobs)} jobs")
        for index, work in enumerate(jobs):
            job = n, index
            chunks = seen.get(job, [])
            numbers = [number for number, _ in chunks]
            if not ended[job]:
                tally.lost += 1
                tally.fault(job, "did not end")
                continue
            tally.delivered += 1
            if ended[job] > 1 or len(numbers) != len(set(numbers)):
                tally.duplicates += 1
                tally.fault(job, f"chunks {numbers}, ended {ended[job]} times")
            elif job in errors:
                tally.condemned += 1
                tally.fault(job, errors[job])
            elif chunks != list(enumerate(standin.expected(work), 1)):
                tally.differing += 1
                tally.fault(job, f"is not what an undisturbed run gives: chunks {numbers}")


def sdk(path: Path, tally: Tally) -> None:
    """Check the journal of an `sdk_client`: a trace per item, and the right one."""
    works: dict[int, standin.Work] = {}
    results: Counter[int] = Counter()
    for line in journal.read(path):
        if "work" in line:
            work = standin.Work(*line["work"])
            works[work.number] = work
            tally.accepted += 1
        elif "error" in line:
            results[line["id"]] += 1
            tally.condemned += 1
            tally.fault(line["id"], line["error"])
        else:
            results[line["id"]] += 1
            if line["data"] != sdk_client.digest(works[line["id"]].data):
                tally.differing += 1
                tally.fault(line["id"], "is not what an undisturbed run gives")
    for number in works:
        if not results[number]:
            tally.lost += 1
            tally.fault(number, "has no result")
        elif results[number] > 1:
            tally.duplicates += 1
            tally.fault(number, f"has {results[number]} results")
    tally.delivered += sum(1 for number in works if results[number])


def remaining_keys(store: redis.Redis) -> list[str]:
    """Name the keys that should not be there when everything is acknowledged."""
    keys = Keys()
    allowed = {
        keys.clock,
        keys.load,
        keys.ended,
        keys.models,
        keys.workers,
        keys.tenants,
        keys.tenant(DEFAULT_TENANT),
    }
    # Workers that live, or died a few leases ago.
    allowed |= {keys.worker(worker.decode()) for worker in store.zrange(keys.workers, 0, -1)}
    # A queue that is empty goes when leases are looked after next.
    queues = [keys.queue(name.decode()) for name in store.smembers(keys.queues)]
    allowed |= {keys.queues, *(queue for queue in queues if store.xlen(queue) == 0)}
    found = {key.decode() for key in store.scan_iter(count=1000)}
    # A key that names a submission is remembered for a day, so that it is not accepted twice.
    remembered = keys.idempotency(DEFAULT_TENANT, "")
    return sorted(key for key in found - allowed if not key.startswith(remembered))


def balance(store: redis.Redis) -> dict[str, int]:
    """Count what the store still holds, and what has ended by state."""
    keys = Keys()
    load, ended = store.hgetall(keys.load), store.hgetall(keys.ended)
    return {name.decode(): int(count) for name, count in (load | ended).items()}
