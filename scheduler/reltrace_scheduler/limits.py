"""Bounds on what one request may contain."""

MAX_SUBMISSION_BYTES = 16 << 20
MAX_REQUEST_BYTES = 1 << 20
"""Of all other requests of clients and operators."""
# Above our own limit, so that an over-long message gets an error that names it; what is
# longer still is refused by gRPC itself with RESOURCE_EXHAUSTED.
MAX_TRANSPORT_BYTES = 64 << 20

MAX_CONCURRENT_STREAMS = 2048
"""Calls at a time over one connection; further ones wait at the caller."""
MAX_CONCURRENT_CALLS = 16384
"""Of all callers of one scheduler: 0.6 GiB where all are streams of results."""
MAX_STREAMS_OF_CALLER = 8192
"""Of one token."""
MAX_SUBMISSIONS_AT_A_TIME = 16
"""Submissions that are read, parsed and checked, each with up to 16 MiB and what is made of them;
others wait."""
MAX_READ_AT_A_TIME, MAX_SUBMISSIONS_OF_TENANT = 64, 8
"""Where there are tokens: submissions that are in memory, most of which wait or are on their way
there, so that slow senders of one tenant keep nobody else waiting."""
MAX_PUBLIC_STREAMS = 64
"""Of health and reflection, which need no token, of all callers."""

MAX_KEY = 128
MAX_JOBS_PER_REQUEST = 1000
MAX_DRAFTED_JOBS = 16
MAX_PROMPT_BYTES = 1 << 20
MAX_MESSAGES = 1024
MAX_ROLE = 64
MAX_TARGETS_PER_JOB = 1024
MAX_NEW_TOKENS = 1024
MAX_TEMPERATURE = 100
MAX_CORPUS_PROMPTS = 1 << 16
MAX_ATLAS_TOP_K = 64
MAX_EDITS_PER_JOB = 256
MAX_EDITED_FEATURES = 65536
# A norm squares its input, and the square has to stay within float32.
MAX_EDIT = 1e9
# Redis counts milliseconds; a month is longer than any job takes.
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 31 * 24 * 3600

MAX_WORKER_MODELS = 32
