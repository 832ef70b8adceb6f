"""Every Redis key, in one place.

All keys share the hash tag ``{0}``: they live in one slot of a Redis Cluster, so that
a Lua script may touch several of them.

===========================  =======  ==================================================
key                          type     holds
===========================  =======  ==================================================
``queue:<model>``            stream   an entry per queued or leased job: ``j`` = job id.
                                      Its group's pending entries are the leases.
``job:<job>``                hash     state, attempt, lost, worker, entry (in the queue),
                                      model, spec, bytes, queued_at, history
``submission:<sub>``         hash     jobs (number), ended (number)
``results:<sub>``            stream   an entry ``<n>-0`` per ended job, n = 1, 2, ...:
                                      ``j`` = job id and ``c`` = the only chunk, or
                                      ``l`` = the key of a list with all chunks
``chunks:<job>:<attempt>``   list     chunks of a result that is more than one
``idempotency:<key>``        string   the submission that the key named first
``load``                     hash     jobs and bytes that are queued or leased
``ended``                    hash     how many jobs ended, by state
``models``                   hash     ``ModelInfo`` of every model ever served, by name
``workers``                  zset     worker ids by the time they were last seen
``worker:<id>``              hash     model, info, device, version, connected_at
===========================  =======  ==================================================

Channels (hints only: whoever misses one polls): ``wake:<model>`` when jobs were
queued, ``done:<sub>`` when jobs of a submission ended.
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

    def queue(self, model: str) -> str:
        return f"{self.prefix}queue:{model}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def submission(self, submission_id: str) -> str:
        return f"{self.prefix}submission:{submission_id}"

    def results(self, submission_id: str) -> str:
        return f"{self.prefix}results:{submission_id}"

    def idempotency(self, key: str) -> str:
        return f"{self.prefix}idempotency:{key}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{worker_id}"

    def wake(self, model: str) -> str:
        return f"{self.prefix}wake:{model}"

    def done(self, submission_id: str) -> str:
        return f"{self.prefix}done:{submission_id}"

    @property
    def channels(self) -> tuple[str, str]:
        """Patterns of both kinds of channel."""
        return f"{self.prefix}wake:*", f"{self.prefix}done:*"


def submission_of(job_id: str) -> str:
    """Return the submission that a job id belongs to: ids are ``<submission>-<index>``."""
    return job_id.rpartition("-")[0]
