"""Every Redis key, in one place.

The keys of a shard share a hash tag (``reltrace:{0}:`` where there is one shard): they live
in one slot of a Redis Cluster, so that a Lua script may touch several of them. A shard is a
queue with everything that belongs to it; ids of submissions and jobs tell their shard. The
slots of the shards are spread evenly over all slots, so that nodes with equal parts of the
slots have equal parts of the shards (`partition`).

===============================  =======  ==============================================
key                              type     holds
===============================  =======  ==============================================
``queues``                       set      ``<class>:<tenant>:<model>`` of every queue
``queue:<c>:<tenant>:<model>``   stream   an entry per queued or leased job: ``j`` = job
                                          id. Its group's pending entries are the leases
``turns:<class>:<model>``        zset     tenants that wait, by virtual time
``turned:<class>:<model>``       zset     the same of those whose queue became empty ahead of
                                          the clock
``clock``                        hash     virtual time of ``<class>:<model>``, how many jobs
                                          of ``<model>`` both classes got, and
                                          ``large:<queue>`` of one with large specifications
``job:<job>``                    hash     state, attempt, lost, failures, worker, queue,
                                          entry, spec, bytes, stored, drafted, queued_at,
                                          due, history
``held:<worker>``                set      jobs that a worker has leased
``delayed``                      zset     jobs that wait for another attempt, by time
``deadlines``                    zset     jobs that have a timeout, by the time it ends
``submission:<sub>``             hash     tenant, jobs, ended, stored (bytes of results),
                                          key (name of its idempotency key)
``parked:<sub>``                 list     jobs that wait until results are read
``results:<sub>``                stream   an entry ``<n>-0`` per ended job, n = 1, 2, ...:
                                          ``j`` = job id and ``c`` = the only chunk, or
                                          ``l`` = the key of a list with all chunks and
                                          ``b`` = their bytes
``chunks:<job>:<attempt>``       list     chunks of a result that is more than one
``draft:<job>``                  stream   what the present attempt has written of a text, for
                                          those who read along: ``<attempt>-<bytes so far>``,
                                          ``d`` = a ``Draft``. Goes with the lease
``expiring``                     zset     submissions that ended, or whose jobs are parked, by
                                          when they expire
``full``                         zset     tenants whose unread results take all their room, by
                                          when they were first passed over for it
``idempotency:<tenant>:<key>``   string   the submission that the key named first
``load``                         hash     jobs, bytes (of specs), results (bytes)
``tenants``                      set      every tenant that had jobs or was set
``tenant:<tenant>``              hash     its load, as above; weight, max_jobs, max_bytes
``quarantined``                  zset     jobs that were quarantined, by when
``quarantined:<job>``            hash     tenant, spec, history
``watch``                        hash     when leases were last looked after, and until
                                          when none is taken to be lost
``ended``                        hash     how many jobs ended, by state
``worker:<id>``                  hash     epoch of its session, mode of its leases, its last
                                          call that leased; in
                                          shard 0 also what it said of itself: routes
                                          (lines), models (number), of each name:<n>,
                                          revision:<n>, info:<n> (``ModelInfo``);
                                          device, version, connected_at; draining
===============================  =======  ==============================================

In shard 0 only:

===============================  =======  ==============================================
``recent``, ``mishaps``          list     jobs that ended last, well and not, as JSON, for
                                          people
``picture:<job>``                string   the ``ResultChunk`` of some of them
``models``                       hash     ``ModelInfo`` by route, of every one ever served
``workers``                      zset     worker ids by the time they were last seen
``serving:<route>``              zset     the same of those that serve it
===============================  =======  ==============================================

Without a shard: ``reltrace:shards``, a string, says how many shards there are, and
``reltrace:cluster`` names this queue among others; ``reltrace:rate:<what>:<identity>`` is a
token bucket (`rate_key`).

Times are milliseconds by Redis' own clock; those of workers are seconds. ``<model>`` is a
route: the name of a model, or ``NAME@REVISION`` for jobs that ask for a revision.

The classes of queues: ``interactive`` and ``batch`` are the priorities; ``suspect`` and
``alone`` hold jobs that were leased to a worker when it fell silent (see `lease.lua`).

Channels (hints only: whoever misses one polls): ``wake:<model>`` when jobs were
queued, ``done:<sub>`` when jobs of a submission ended or have a draft, ``revoked:<worker>``
when jobs that a worker holds were ended by somebody else, or it was told to drain.
"""

import re
from dataclasses import dataclass
from itertools import count

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

GROUP = "workers"
"""The consumer group of every queue; a consumer is a worker's id."""

REAPER = "reaper"
"""The consumer that takes over leases that were lost."""

SHARDS = "reltrace:shards"
CLUSTER = "reltrace:cluster"

CHANNELS = tuple(f"reltrace:{{*}}:{kind}:*" for kind in ("wake", "done", "revoked"))
"""Patterns of every kind of channel, of all shards."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the keys of one shard."""

    shard: int = 0
    tag: str = "0"

    @property
    def prefix(self) -> str:
        return f"reltrace:{{{self.tag}}}:"

    @property
    def queues(self) -> str:
        return f"{self.prefix}queues"

    @property
    def clock(self) -> str:
        return f"{self.prefix}clock"

    @property
    def load(self) -> str:
        return f"{self.prefix}load"

    @property
    def ended(self) -> str:
        return f"{self.prefix}ended"

    @property
    def models(self) -> str:
        return f"{self.prefix}models"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def recent(self) -> str:
        return f"{self.prefix}recent"

    @property
    def mishaps(self) -> str:
        return f"{self.prefix}mishaps"

    def picture(self, job_id: str) -> str:
        return f"{self.prefix}picture:{job_id}"

    @property
    def tenants(self) -> str:
        return f"{self.prefix}tenants"

    @property
    def delayed(self) -> str:
        return f"{self.prefix}delayed"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}deadlines"

    @property
    def expiring(self) -> str:
        return f"{self.prefix}expiring"

    @property
    def full(self) -> str:
        return f"{self.prefix}full"

    @property
    def watch(self) -> str:
        return f"{self.prefix}watch"

    @property
    def quarantined(self) -> str:
        return f"{self.prefix}quarantined"

    def queue(self, name: str) -> str:
        return f"{self.prefix}queue:{name}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def draft(self, job_id: str) -> str:
        return f"{self.prefix}draft:{job_id}"

    def quarantined_job(self, job_id: str) -> str:
        return f"{self.prefix}quarantined:{job_id}"

    def held(self, worker_id: str) -> str:
        return f"{self.prefix}held:{worker_id}"

    def parked(self, submission_id: str) -> str:
        return f"{self.prefix}parked:{submission_id}"

    def submission(self, submission_id: str) -> str:
        return f"{self.prefix}submission:{submission_id}"

    def results(self, submission_id: str) -> str:
        return f"{self.prefix}results:{submission_id}"

    def idempotency(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idempotency:{tenant}:{key}"

    def tenant(self, tenant: str) -> str:
        return f"{self.prefix}tenant:{tenant}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{worker_id}"

    def serving(self, route: str) -> str:
        return f"{self.prefix}serving:{route}"

    def wake(self, route: str) -> str:
        return f"{self.prefix}wake:{route}"

    def done(self, submission_id: str) -> str:
        return f"{self.prefix}done:{submission_id}"

    def revoked(self, worker_id: str) -> str:
        return f"{self.prefix}revoked:{worker_id}"


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


def model_of(queue: str) -> str:
    """Return the model of a queue's name, ``<class>:<tenant>:<model>``."""
    return queue.split(":", 2)[2]


def tenant_of(queue: str) -> str:
    """Return the tenant of a queue's name."""
    return queue.split(":", 2)[1]


def rate_key(what: str, identity: str) -> str:
    """A string: when the token bucket of an identity is full again; of no shard."""
    return f"reltrace:rate:{what}:{identity}"
