"""A program whose forked children use clients; run with the address of a server and a case.

Prints what each child got, and then what the parent got afterwards. A child that hangs is killed.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import reltrace

CHILDREN = 20


async def asynchronous(address: str) -> str:
    async with reltrace.AsyncClient(address) as client:
        return (await client.trace("child")).text


def child(address: str, inherited: list[reltrace.Client], number: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(30)
    # In turn: a client of its own, one of asyncio, and the parent's.
    uses: list[Callable[[], str]] = [
        lambda: reltrace.Client(address).trace("child").text,
        lambda: asyncio.run(asynchronous(address)),
        lambda: inherited[0].trace("child").text,
    ]
    try:
        told = uses[number % len(uses)]()
    except reltrace.TraceError as error:
        told = f"{type(error).__name__}: {error}"
    # In one piece: the children share standard output.
    os.write(1, f"{told}\n".encode())
    # Its connection is the parent's, and stays open there.
    inherited.clear()
    gc.collect()


def main(address: str, case: str) -> None:
    client = reltrace.Client(address)
    if case != "unused":
        client.trace("parent")
    if case == "closed":
        client.close()
    inherited = [client]
    if case == "forgotten":
        inherited = [reltrace.Client(address)]
        del client
        gc.collect()
    context = multiprocessing.get_context("fork")
    arguments = [(address, inherited, number) for number in range(CHILDREN)]
    children = [context.Process(target=child, args=given) for given in arguments]
    for one in children:
        one.start()
    for one in children:
        one.join()
    print([one.exitcode for one in children if one.exitcode != 0])
    print(reltrace.Client(address).trace("parent").text)
    if case == "open":
        print(client.trace("parent").text)


main(*sys.argv[1:])
