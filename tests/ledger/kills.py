#!/usr/bin/env python3
"""`kill -9` at random moments of a real server under many streams: nothing is lost, nothing is doubled.

    kills.py --binary target/debug/mirai --folder EMPTY [--kills 50] [--streams 200] [--seed N]

Each round starts the server on the ledger that the round before left, some of them only to be killed while it
recovers; checks what all clients have seen since the database was new; puts streams on it; and kills it.
"""

import argparse
import asyncio
import json
import pathlib
import random
import sys
import time

import client
import server

# Rounds on one database.
ROUNDS = 25


class Ledger:
    """One database, and what clients have seen of it."""

    def __init__(self, folder, number):
        self.folder = folder / f"ledger-{number}"
        self.folder.mkdir()
        self.store = self.folder / "ledger.db"
        self.tapes, self.digests = [], {}

    def epoch(self):
        """The run that lives now."""
        return server.ask(self.store, "SELECT MAX(epoch) FROM mirai_writer")

    def check_counters(self, child):
        """Holds everything against the tapes, and what this run has done against its counters."""
        metrics = server.counters(child, self.folder, lambda query: server.ask(self.store, query))
        more = ["--metrics", metrics, "--epoch", self.epoch()]
        return server.check("--sqlite", self.store, "--tapes", *self.tapes, *more)

    def check(self):
        """Holds everything before the run that lives now against the tapes."""
        epoch = self.epoch()
        dead = f"SELECT COUNT(*) FROM mirai_request WHERE state <> 'closed' AND epoch < {epoch}"
        server.until("rows of the dead are closed", lambda: server.ask(self.store, dead) == 0)
        if not self.tapes:
            return None
        found = server.check("--sqlite", self.store, "--below", epoch, "--tapes", *self.tapes)
        for run, digest in self.digests.items():
            assert found["digests"][run] == digest, f"I8: rows of {run} changed after its recovery"
        self.digests = found["digests"]
        return found


class Rounds:
    """What all rounds share."""

    def __init__(self, args, seed):
        self.args, self.random = args, random.Random(seed)
        self.flags, self.model = server.model_args(args)
        self.killed_starting, self.cut, self.unseen = 0, 0, 0

    def start(self, ledger):
        flags = [*self.flags, *server.store_args(ledger.store), "--max-num-seqs", 256]
        return server.Server(self.args.binary, ledger.folder, flags)

    def start_to_be_killed(self, ledger):
        """Dies while it starts, and with it whatever it recovers."""
        child = self.start(ledger)
        child.listening()
        time.sleep(self.random.uniform(0, 0.1))
        child.kill()
        self.killed_starting += 1

    def clients(self, child, streams, requests=None):
        """A load that is not the one before."""
        mix = client.Mix(self.random.randrange(1 << 32), self.model, chat=self.model != "simulated")
        return client.Load(client.Client(child.address), mix, streams, requests)

    def keep(self, ledger, tapes):
        """For all later checks."""
        path = ledger.folder / f"tapes-{len(ledger.tapes)}"
        client.write(tapes, path)
        ledger.tapes.append(path)

    async def load(self, ledger, child):
        """Streams until the server is killed under them."""
        load = self.clients(child, self.args.streams)
        tapes = load.tapes
        # A moment of the work, not of a clock: the same on a slow machine.
        at = self.random.randrange(self.args.tokens)
        task = asyncio.create_task(load.run())
        while sum(tape.tokens for tape in tapes) < at:
            await asyncio.sleep(0.001)
        child.kill()
        await task
        self.keep(ledger, tapes)
        self.cut += sum(t.status == 200 and not t.ended and not t.left and t.error is None for t in tapes)
        self.unseen += sum(t.status is None and not t.left for t in tapes)

    def life(self, ledger, kills):
        """One database from its first start to its last. Returns what the last check saw."""
        for _ in range(kills):
            if ledger.tapes and self.random.random() < 0.15:
                self.start_to_be_killed(ledger)
                continue
            child = self.start(ledger)
            assert child.ready(), f"it did not start again: see {ledger.folder}/server.log"
            ledger.check()
            asyncio.run(asyncio.wait_for(self.load(ledger, child), server.PATIENCE))
        child = self.start(ledger)
        assert child.ready(), f"it did not start again: see {ledger.folder}/server.log"
        ledger.check()
        # After all that, one life that is not cut: its counters are its rows' sums.
        self.keep(ledger, asyncio.run(self.clients(child, 16, 64).run()))
        found = ledger.check_counters(child)
        assert child.stop() == 0
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens received until the kill, at most")
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    rounds = Rounds(args, seed)
    total = {"rows": 0, "tokens": 0, "closed by recovery": 0, "most a row lacks": 0}
    for number, first in enumerate(range(0, args.kills, ROUNDS)):
        found = rounds.life(Ledger(pathlib.Path(args.folder), number), min(ROUNDS, args.kills - first))
        total["rows"] += found["rows"]
        total["tokens"] += found["tokens"]
        total["most a row lacks"] = max(total["most a row lacks"], found["lacks"])
        total["closed by recovery"] += found["finish"].get("crashed", 0)
        print(f"{first + min(ROUNDS, args.kills - first)} kills: {json.dumps(total)}", file=sys.stderr, flush=True)
    print(json.dumps({
        "kills": args.kills, "of them while starting": rounds.killed_starting, **total,
        "streams cut": rounds.cut, "cut before the head": rounds.unseen,
    }))


if __name__ == "__main__":
    main()
