#!/usr/bin/env python3
"""Stores that fail under load: nothing is lost, nothing is doubled, and the server says how it is.

    faults.py --binary target/debug/mirai --folder EMPTY [--streams 64] [--seed N] [--only NAME...]

SQLite stands on the disk of `disk.c`; PostgreSQL is a server of our own, where Debian's is installed. Each fault hits
a server under streams. Then its health and answers must be as documented, and after the fault all invariants hold.
"""

import argparse
import asyncio
import atexit
import json
import os
import pathlib
import random
import shutil
import subprocess
import tempfile

import client
import server
from power import Disk, build

SCENARIOS = {}
OPEN = "SELECT COUNT(*) FROM mirai_request WHERE state <> 'closed'"


def scenario(function):
    """One fault."""
    SCENARIOS[function.__name__] = function
    return function


class Bed:
    """A server on a store that can fail, and its clients."""

    def __init__(self, args, name, shim, place=None, spool=False, settings=()):
        self.args = args
        self.flags, self.model = server.model_args(args)
        self.disk = Disk(pathlib.Path(args.folder).resolve() / name, shim)
        self.place, self.tapes, self.waits = place, [], {}
        self.flags += place.args() if place else server.store_args(self.disk.store)
        self.flags += ["--ledger-spool", self.disk.spool] if spool else []
        self.flags += ["--max-num-seqs", 256]
        # Those that end with a failed store must not wait long in a test.
        self.settings = {"MIRAI__LEDGER__STALL_SECONDS": "2", "MIRAI__LEDGER__LEASE_SECONDS": "5", **dict(settings)}
        self.child = None

    def start(self):
        self.child = server.Server(self.args.binary, self.disk.folder, self.flags, self.disk.env() | self.settings)
        assert self.child.ready(), f"it does not start: see {self.disk.folder}/server.log"

    def query(self, text):
        """One number from the store."""
        return self.place.ask(text) if self.place else server.ask(self.disk.store, text)

    async def under_load(self, *steps):
        """Runs steps, each in a thread, while streams come and go."""
        mix = client.Mix(self.args.seed, self.model, chat=self.model != "simulated")
        load = client.Load(client.Client(self.child.address), mix, self.args.streams, tapes=self.tapes)
        task = asyncio.create_task(load.run())
        for step in steps:
            await asyncio.to_thread(step)
        load.finish()
        await task

    def runs(self, more=None):
        """Waits until so many more requests have ended well."""
        more = more or self.args.requests
        ended = sum(tape.ended for tape in self.tapes)
        server.until("requests end", lambda: sum(tape.ended for tape in self.tapes) >= ended + more)

    def fails(self, how):
        """The disk fails from now on."""
        return lambda: self.disk.fails(how)

    def ready_is(self, status):
        """Waits for what `/health/ready` says."""
        return lambda: server.until(f"ready {status}", lambda: self.child.get("/health/ready")[0] == status)

    def refuses(self):
        """New work is refused in words that a client can act on; the process itself is well."""
        def refused():
            codes = {(t.status, t.error) for t in self.tapes[-50:]}
            return (503, "ledger_unavailable") in codes
        server.until("work is refused", refused)
        assert all(t.retry_after for t in self.tapes if t.status == 503), "503 without Retry-After"
        assert self.child.get("/health/live")[0] == 200

    def failures(self):
        """What clients were told of a failure that was not their own."""
        return [t for t in self.tapes if t.status not in (None, 200, 400) or (t.status == 200 and t.error)]

    def dies(self):
        """It ends by itself, and says that it failed."""
        assert self.child.end() not in (0, -9, None), "it must end with an error"

    def settles(self):
        """All rows end, and the counters are those of the rows."""
        return self.check("--metrics", server.counters(self.child, self.disk.folder, self.query))

    def recovers(self):
        """Another start closes what is open, and a second changes nothing."""
        before = None
        for _ in range(2):
            self.start()
            server.until("rows are closed", lambda: self.query(OPEN) == 0)
            server.until("nothing is spooled", lambda: not self.spooled())
            assert self.child.stop() == 0
            found = self.check()
            assert before in (None, found["digests"]), "I8: the second start changed rows"
            before = found["digests"]
        return found

    def spooled(self):
        """Bytes in the spool."""
        return self.disk.spool.stat().st_size if self.disk.spool.exists() else 0

    def check(self, *more):
        """The checker on all that clients have seen."""
        path = self.disk.folder / "tapes"
        client.write(self.tapes, path)
        place = self.place.check_args() if self.place else ["--sqlite", self.disk.store]
        return server.check(*place, "--tapes", path, *more)


class Postgres:
    """A server of our own."""

    def __init__(self):
        # Short, because a socket lies in it, and of nobody else's folder: it may belong to another user.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="mirai-postgres-"))
        atexit.register(self.end)
        programs = [pathlib.Path(p) for p in os.environ.get("PATH", "").split(":")]
        programs += sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))
        self.programs = next((p for p in programs if (p / "initdb").exists() and (p / "psql").exists()), None)
        self.user = "nobody" if os.geteuid() == 0 else None
        if self.programs is None:
            return
        if self.user:
            # It refuses to run as root.
            shutil.chown(self.folder, self.user)
        self.run("initdb", "-D", self.folder / "data", "-A", "trust", "-U", "mirai", "-E", "UTF8", "--no-sync")

    def run(self, program, *args):
        """One of its programs."""
        with open(self.folder / "log", "ab") as log:
            subprocess.run([self.programs / program, *map(str, args)], stdin=subprocess.DEVNULL, stdout=log,
                           stderr=log, cwd=self.folder, user=self.user, check=True)

    def up(self):
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder}"
        self.run("pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "server", "-o", options, "start")

    def down(self):
        """As if it had been killed."""
        self.run("pg_ctl", "-D", self.folder / "data", "-w", "-m", "immediate", "stop")

    def end(self):
        """Leaves nothing behind."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self.down()
        shutil.rmtree(self.folder)

    def conninfo(self):
        return f"host={self.folder} user=mirai dbname=postgres"

    def args(self):
        """Flags of the server under test."""
        return ["--ledger", f"postgres:///postgres?host={self.folder}&user=mirai"]

    def check_args(self):
        return ["--postgres", self.conninfo(), "--psql", self.programs / "psql"]

    def ask(self, query):
        """One number; none from a server that does not answer yet."""
        command = [self.programs / "psql", "-X", "-A", "-t", "-d", self.conninfo(), "-c", query]
        with open(self.folder / "log", "ab") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log)
        return int(done.stdout) if done.returncode == 0 else None

    def clear(self):
        """As before the first start."""
        command = [self.programs / "psql", "-X", "-q", "-d", self.conninfo(), "-c",
                   "SET client_min_messages = warning; DROP SCHEMA public CASCADE; CREATE SCHEMA public"]
        subprocess.run(command, check=True)


@scenario
def failed_sync(make):
    """EIO on fsync: what was written is not known any more. The process ends, the next one recovers."""
    bed = make()
    bed.start()
    asyncio.run(bed.under_load(bed.runs, bed.fails("sync EIO *"), bed.dies))
    bed.disk.fails(None)
    return bed.recovers()


@scenario
def read_only(make):
    """The disk is remounted read-only: as a failed sync."""
    bed = make()
    bed.start()
    asyncio.run(bed.under_load(bed.runs, bed.fails("any EROFS *"), bed.dies))
    bed.disk.fails(None)
    return bed.recovers()


@scenario
def failed_sync_of_the_spool(make):
    """The store is full and the spool's disk fails as well."""
    bed = make(spool=True)
    bed.start()
    steps = [bed.runs, bed.fails("write ENOSPC ledger"), bed.runs, bed.fails("any EIO *"), bed.dies]
    asyncio.run(bed.under_load(*steps))
    bed.disk.fails(None)
    return bed.recovers()


@scenario
def full_disk(make):
    """ENOSPC: new work is refused until there is room; the same process goes on."""
    bed = make()
    bed.start()
    steps = [bed.runs, bed.fails("write ENOSPC *"), bed.ready_is(503), bed.refuses]
    asyncio.run(bed.under_load(*steps, bed.fails(None), bed.ready_is(200), bed.runs))
    bed.settles()
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def full_disk_with_a_spool(make):
    """The same with a spool on a disk that has room: nobody notices."""
    bed = make(spool=True)
    bed.start()

    def spools():
        assert bed.spooled() > 0, "nothing was spooled"
        assert bed.child.get("/health/ready")[0] == 200

    steps = [bed.runs, bed.fails("write ENOSPC ledger"), bed.runs, spools, bed.fails(None), bed.runs]
    asyncio.run(bed.under_load(*steps))
    server.until("nothing is spooled", lambda: not bed.spooled())
    bed.settles()
    refused = bed.failures()
    assert not refused, f"{len(refused)} were refused: {refused[:2]}"
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def killed_with_a_spool(make):
    """The process dies while rows are in the spool: the next one replays them."""
    bed = make(spool=True)
    bed.start()
    asyncio.run(bed.under_load(bed.runs, bed.fails("write ENOSPC ledger"), bed.runs, bed.child.kill))
    assert bed.spooled() > 0, "nothing was spooled"
    bed.disk.fails(None)
    return bed.recovers()


@scenario
def stalled_disk(make):
    """Each call takes 5 s: streams wait, no longer than `stall_seconds`; then all is well."""
    bed = make()
    bed.start()
    steps = [bed.runs, bed.fails("stall 5000 *"), bed.ready_is(503), bed.refuses, bed.fails(None)]
    asyncio.run(bed.under_load(*steps, bed.ready_is(200), bed.runs))
    bed.settles()
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def short_stall(make):
    """A stall that is shorter than `stall_seconds` ends no stream."""
    bed = make(settings={"MIRAI__LEDGER__STALL_SECONDS": "60"})
    bed.start()
    asyncio.run(bed.under_load(bed.runs, bed.fails("stall 1000 *"), lambda: bed.runs(5), bed.fails(None), bed.runs))
    bed.settles()
    assert not bed.failures(), bed.failures()[:2]
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def postgres_killed(make):
    """PostgreSQL dies and comes back, without a spool."""
    bed = make(postgres=True)
    bed.start()
    steps = []
    for _ in range(2):
        steps += [bed.runs, bed.place.down, bed.ready_is(503), bed.refuses, bed.place.up, bed.ready_is(200)]
    asyncio.run(bed.under_load(*steps, bed.runs))
    bed.settles()
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def postgres_killed_with_a_spool(make):
    """The same with a spool: nobody notices."""
    bed = make(postgres=True, spool=True)
    bed.start()

    def spools():
        bed.runs()
        assert bed.spooled() > 0, "nothing was spooled"
        assert bed.child.get("/health/ready")[0] == 200

    asyncio.run(bed.under_load(bed.runs, bed.place.down, spools, bed.place.up, bed.runs))
    server.until("nothing is spooled", lambda: not bed.spooled())
    bed.settles()
    refused = bed.failures()
    assert not refused, f"{len(refused)} were refused: {refused[:2]}"
    assert bed.child.stop() == 0
    return bed.recovers()


@scenario
def both_killed(make):
    """PostgreSQL dies, and then the process with rows in its spool."""
    bed = make(postgres=True, spool=True)
    bed.start()
    asyncio.run(bed.under_load(bed.runs, bed.place.down, bed.runs, bed.child.kill, bed.place.up))
    return bed.recovers()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=100, help="that end well between two steps")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    args = parser.parse_args()
    args.seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {args.seed}", flush=True)
    shim = build(args.folder)
    postgres = Postgres()
    for name in args.only:
        if "postgres" in name or name == "both_killed":
            if postgres.programs is None:
                print(f"{name}: skipped: no postgresql")
                continue
            postgres.up()
            postgres.clear()

        def make(spool=False, postgres_=postgres, name=name, **more):
            place = postgres_ if more.pop("postgres", False) else None
            return Bed(args, name, shim, place, spool, **more)

        found = SCENARIOS[name](make)
        if "postgres" in name or name == "both_killed":
            postgres.down()
        del found["digests"], found["problems"]
        print(f"{name}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
