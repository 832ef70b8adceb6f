"""Every Redis key, in one place.

All keys share the hash tag ``{0}``: they live in one slot of a Redis Cluster, so that
a Lua script may touch several of them.

===============================  =======  ==============================================
key                              type     holds
===============================  =======  ==============================================
``queues``                       set      ``<class>:<tenant>:<model>`` of every queue
``queue:<c>:<tenant>:<model>``   stream   an entry per queued or leased job: ``j`` = job
                                          id. Its group's pending entries are the leases
``turns:<class>:<model>``        zset     tenants that wait, by virtual time
``clock``                        hash     virtual time of ``<class>:<model>``, and
                                          how many jobs of ``<model>`` both classes got
``job:<job>``                    hash     state, attempt, lost, failures, worker, queue,
                                          entry, spec, bytes, stored, queued_at, due,
                                          history
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
``expiring``                     zset     submissions that ended, by when they expire
``idempotency:<tenant>:<key>``   string   the submission that the key named first
``load``                         hash     jobs, bytes (of specs), results (bytes)
``tenants``                      set      every tenant that had jobs or was set
``tenant:<tenant>``              hash     its load, as above; weight, max_jobs, max_bytes
``dead``                         zset     jobs that were quarantined, by when
``dead:<job>``                   hash     tenant, spec, history
``watch``                        hash     when leases were last looked after, and until
                                          when none is taken to be lost
``ended``                        hash     how many jobs ended, by state
``models``                       hash     ``ModelInfo`` of every model ever served
``workers``                      zset     worker ids by the time they were last seen
``worker:<id>``                  hash     model, info, device, version, connected_at;
                                          epoch of its session, mode of its leases
===============================  =======  ==============================================

Times are milliseconds by Redis' own clock; those of workers are seconds.

The classes of queues: ``interactive`` and ``batch`` are the priorities; ``suspect`` and
``alone`` hold jobs that were leased to a worker when it fell silent (see `lease.lua`).

Channels (hints only: whoever misses one polls): ``wake:<model>`` when jobs were
queued, ``done:<sub>`` when jobs of a submission ended, ``revoked:<worker>`` when jobs
that a worker holds were ended by somebody else.
"""

from dataclasses import dataclass

GROUP = "workers"
"""The consumer group of every queue; a consumer is a worker's id."""

REAPER = "reaper"
"""The consumer that takes over leases that were lost."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of keys under one prefix."""

    prefix: str = "reltrace:{0}:"

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
    def watch(self) -> str:
        return f"{self.prefix}watch"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    def queue(self, name: str) -> str:
        return f"{self.prefix}queue:{name}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def dead_job(self, job_id: str) -> str:
        return f"{self.prefix}dead:{job_id}"

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

    def wake(self, model: str) -> str:
        return f"{self.prefix}wake:{model}"

    def done(self, submission_id: str) -> str:
        return f"{self.prefix}done:{submission_id}"

    def revoked(self, worker_id: str) -> str:
        return f"{self.prefix}revoked:{worker_id}"

    @property
    def channels(self) -> tuple[str, ...]:
        """Patterns of every kind of channel."""
        return tuple(f"{self.prefix}{kind}:*" for kind in ("wake", "done", "revoked"))


def submission_of(job_id: str) -> str:
    """Return the submission that a job id belongs to: ids are ``<submission>-<index>``."""
    return job_id.rpartition("-")[0]


def model_of(queue: str) -> str:
    """Return the model of a queue's name, ``<class>:<tenant>:<model>``."""
    return queue.split(":", 2)[2]
