"""Names of everything in Redis: the keys of the two tables below, for Python and the Lua scripts.

The keys of a shard share a hash tag (``reltrace:{0}:`` where there is one shard): they live
in one slot of a Redis Cluster, so that a Lua script may touch several of them. A shard is a
queue with everything that belongs to it; ids of submissions and jobs tell their shard. The
slots of the shards are spread evenly over all slots, so that nodes with equal parts of the
slots have equal parts of the shards (`partition`).

Keys of which a shard has one (`SharedKey`). Every script gets all of them in KEYS.

========================  ======  ===============================================================
key                       type    holds
========================  ======  ===============================================================
``queues``                set     ``<class>:<tenant>:<model>`` of every queue
``virtual_time``          hash    of each ``<class>:<model>``; ``both:<model>``: jobs leased while
                                  both priorities had some; ``large:<queue>``: its specifications
                                  are large; ``result:<queue>``: most bytes of one of its results
``delayed``               zset    jobs that wait for another attempt, by time
``deadlines``             zset    jobs that have a timeout, by the time it ends
``expiring``              zset    submissions that ended, or that have backpressured jobs, by when
                                  they expire
``throttled_tenants``     zset    tenants that are leased nothing, or refused a submission, because
                                  their unread results reach their bound, by when that was first
                                  found
``readers``               zset    submissions whose results somebody reads, and ``:<tenant>`` of
                                  those that were refused a submission because of unread results,
                                  by when that was last so
``load``                  hash    jobs, bytes (of specifications), results (bytes), reserved (for
                                  the results of leased jobs)
``tenants``               set     tenants that have jobs, results or limits, or lately had
``quarantined``           zset    jobs that were quarantined, by when
``watchdog``              hash    seen: last look for lost leases; grace: until when none is lost
``ended``                 hash    how many jobs ended, by state
``workers``               zset    worker ids by the time they were last seen (shard 0 only)
``models``                hash    ``ModelInfo`` by route (shard 0 only)
``served``                zset    routes of ``models`` by when a worker last served them, looked at
                                  once a minute (shard 0 only)
``recent_ok``             list    jobs that succeeded last, as JSON (shard 0 only)
``recent_failed``         list    jobs that ended otherwise, as JSON (shard 0 only)
``replicated``            string  is written before the scheduler waits for replicas
``nothing``               none    is never there: to delete it is a write that changes nothing
========================  ======  ===============================================================

Keys of one thing each (`EntityKey`). A script gets those in KEYS that its caller knows. The others
can not be declared, because only the script learns which they are: the jobs that it finds in a
queue, their submissions, tenants, workers and queues, the queues of a model. It makes them from
the same prefixes (`scripts.preamble`), and they are in the same slot.

==============================  ======  =========================================================
key                             type    holds
==============================  ======  =========================================================
``queue:<class>:<t>:<model>``   stream  an entry per queued or leased job: ``j`` = job id. Its
                                        group's pending entries are the leases
``vt_active:<class>:<model>``   zset    tenants with queued jobs, by virtual time
``vt_idle:<class>:<model>``     zset    the same of those whose queue became empty ahead of the
                                        virtual time of all
``job:<job>``                   hash    state, attempt, lost, failures, worker, queue, entry, spec,
                                        bytes, result (most bytes), reserved (of it), stored,
                                        drafted, queued_at, due, history, priority (that it
                                        had before it was isolated)
``held:<worker>``               set     jobs that are leased to a worker
``submission:<sub>``            hash    tenant, jobs, ended, stored (bytes of results), key (its
                                        idempotency key)
``backpressured:<sub>``         list    jobs that wait until results are read
``results:<sub>``               stream  an entry ``<n>-0`` per ended job, n = 1, 2, ...: ``j`` =
                                        job id and ``c`` = the only chunk, or ``l`` = key of a
                                        list with all chunks, ``b`` = their bytes and ``w`` =
                                        the worker that ended it
``chunks:<job>:<attempt>``      list    chunks of a result that is more than one
``draft:<job>``                 stream  drafts of the present attempt:
                                        ``<attempt>-<bytes so far>``, ``d`` = a ``Draft``
``idempotency:<tenant>:<key>``  string  submission, number of jobs and digest of the key's first
                                        use
``tenant:<tenant>``             hash    its load, as above; weight, max_jobs, max_bytes
``quarantined:<job>``           hash    tenant, spec, history, priority
``worker:<id>``                 hash    epoch of its session, mode of its leases, its last call
                                        that leased; in shard 0 also hello (``Hello``), routes
                                        (lines), connected_at, draining, silent (seconds)
``serving:<route>``             zset    workers of a route by when they were seen (shard 0 only)
``sample_result:<job>``         string  ``ResultChunk`` of some recent jobs (shard 0 only)
==============================  ======  =========================================================

Channels (hints only: listeners poll as well): ``wake:<model>`` when jobs were queued,
``done:<sub>`` when jobs of a submission ended or have a draft, ``revoked:<worker>`` when jobs of a
worker were ended by others, or it was told to drain.

Without a shard: ``reltrace:schema``, a string, is the version of all this, and ``reltrace:shards``
how many shards there are; ``reltrace:cluster`` names this queue among others;
``reltrace:rate:<what>:<identity>`` is a token bucket (`rate_key`).

Times are milliseconds by Redis' own clock; those of workers are seconds. ``<model>`` is a
route: the name of a model, or ``NAME@REVISION`` for jobs that ask for a revision.

The classes of queues: ``interactive`` and ``batch`` are the priorities; ``isolate_group`` and
``isolate_single`` hold jobs whose worker lost its leases (see `lease.lua`).
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

GROUP = "workers"
"""The consumer group of every queue; a consumer is a worker's id."""

REAPER = "reaper"
"""The consumer that takes over leases that were lost."""

SHARDS = "reltrace:shards"
CLUSTER = "reltrace:cluster"
SCHEMA = "reltrace:schema"

SCHEMA_VERSION = 1
"""Of the keys described here. Schedulers of different schemas do not run on one Redis, so a change
that those of the version before could not live with, while old and new run side by side, is another
schema: it comes with a step that moves what is there, taken once they have ended, 10 s after
`SCHEMA` was set. Data without a version is of the first."""

SharedKey = Literal[
    "queues", "virtual_time", "delayed", "deadlines", "expiring", "throttled_tenants", "readers",
    "load",
    "tenants", "quarantined", "watchdog", "ended", "workers", "models", "served", "recent_ok",
    "recent_failed", "replicated", "nothing",
]  # fmt: skip
EntityKey = Literal[
    "queue", "vt_active", "vt_idle", "job", "held", "submission", "backpressured", "results",
    "chunks", "draft", "idempotency", "tenant", "quarantined", "worker", "serving", "sample_result",
]  # fmt: skip
Channel = Literal["wake", "done", "revoked"]

NO_CHANNEL = "reltrace:none"
"""Nothing is published there: a connection is subscribed to it before it has listeners."""


@dataclass(frozen=True, slots=True)
class Keys:
    shard: int = 0
    tag: str = "0"

    @property
    def prefix(self) -> str:
        return f"reltrace:{{{self.tag}}}:"

    def __call__(self, kind: SharedKey | EntityKey | Channel, *entity: str) -> str:
        return self.prefix + ":".join((kind, *entity))


def partition(shards: int) -> list[Keys]:
    """Return the keys of every shard, their slots spread evenly over those of a cluster.

    The tag of shard i of n is the smallest number whose slot is in the i-th of n equal parts.
    """
    tags: dict[int, str] = {}
    for number in count():
        if len(tags) == shards:
            break
        tag = str(number)
        tags.setdefault(key_slot(tag.encode()) * shards // REDIS_CLUSTER_HASH_SLOTS, tag)
    return [Keys(shard, tags[shard]) for shard in range(shards)]


@dataclass(frozen=True, slots=True)
class QueueName:
    """The name of a queue: a class (a priority, or jobs that are isolated), a tenant, a route."""

    queue_class: str
    tenant: str
    route: str

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(name: bytes) -> "QueueName":
        """Return the parts of a name as Redis has it."""
        return QueueName(*name.decode().split(":", 2))

    def __str__(self) -> str:
        return f"{self.queue_class}:{self.tenant}:{self.route}"


def submission_of(job_id: str) -> str:
    """Return the submission that a job id belongs to: ids are ``<submission>-<index>``."""
    return job_id.rpartition("-")[0]


def job_ids(submission: str, jobs: int) -> list[str]:
    """Return the ids of a submission's jobs, in the order in which they were submitted."""
    return [f"{submission}-{index}" for index in range(jobs)]


def submission_id(random: str, shard: int) -> str:
    """Return the id of a submission: all its jobs and results are in one shard."""
    return f"{random}.{shard}" if shard else random


def shard_of(some_id: str) -> int:
    """Return the shard that the id of a submission or a job names; 0: it names none."""
    named = re.search(r"\.(\d{1,4})(-\d+)?$", some_id)
    return int(named[1]) if named else 0


def rate_key(what: str, identity: str) -> str:
    """Return the key of an identity's token bucket, which is in no shard."""
    return f"reltrace:rate:{what}:{identity}"
