"""A client as people write one: the SDK, and not a word about what may go wrong.

    python -m chaos.sdk_client --server ADDRESS --journal FILE --seed N --first N --until FILE

Feeds `trace_many` until there is a file of the name given, then takes what is still on its way.
Lines of the journal:

    {"work"}               before it is given to the SDK
    {"id", "data"}         a trace: its id and a digest of its relevance
    {"id", "error"}        a failure
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reltrace
from chaos import standin
from chaos.journal import Journal

PATIENCE = 60.0


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def items(journal: Journal, seed: int, first: int, until: Path) -> Iterator[dict[str, Any]]:
    source, number = random.Random(seed), first
    while not until.exists():
        (work,) = standin.drawn(range(number, number + 1), source)
        number += 1
        journal.write(work=work.ids[:3])
        yield {"input_ids": work.ids, "id": work.number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--token")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first job")
    parser.add_argument("--until", type=Path, required=True)
    parser.add_argument("--in-flight", type=int, default=120)
    given = parser.parse_args()
    # What it says of jobs that it submits again is counted.
    logging.basicConfig()
    journal = Journal(given.journal)
    with reltrace.Client(given.server, token=given.token, retry_timeout=PATIENCE) as client:
        source = items(journal, given.seed, given.first, given.until)
        for result in client.trace_many(source, max_in_flight=given.in_flight):
            if isinstance(result, reltrace.Failure):
                journal.write(id=result.id, error=str(result.error))
            else:
                assert isinstance(result, reltrace.Trace)
                journal.write(id=result.id, data=digest(result.relevance.tobytes()))


if __name__ == "__main__":
    main()
