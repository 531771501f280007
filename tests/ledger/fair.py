#!/usr/bin/env python3
"""Fair share on the real server: two applications of equal weight, both saturating; one multiplies its load.

    fair.py --binary target/release/mirai --folder EMPTY [--seconds 30] [--factor 100] [--rounds 3]

Each round measures a window with equal loads and one in which the flood's clients are `factor` times as many, on one
server, and prints by how much the other's share of tokens and its p95 time to first token have moved. Medians of the
rounds are judged: on a machine that does other things, one window may mean little.
"""

import argparse
import asyncio
import json
import pathlib
import random
import statistics
import time

import client
import server

KEYS = {"modest": "key-of-the-modest", "flood": "key-of-the-flood"}


class Steady:
    """Streams of one length: both applications ask for the same."""

    def __init__(self, rng, longest):
        self.rng, self.longest = rng, longest

    def next(self):
        """As `client.Mix` does."""
        body = {
            "model": "mirai-demo", "prompt": self.rng.choice(client.PROMPTS), "max_tokens": self.longest, "n": 1,
            "stream": True, "return_token_ids": True, "ignore_eos": True, "seed": self.rng.randrange(1 << 31),
        }
        return client.Tape("completion", 1, 1, self.longest, True), body, None


def p95(values):
    """The 95th percentile."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


async def window(address, rng, args, factor):
    """The modest application's share of tokens, and its p95 time to first token, while both load the server."""
    loads = {}
    for name, streams in (("modest", args.streams), ("flood", args.streams * factor)):
        headers = [f"Authorization: Bearer {KEYS[name]}"]
        loads[name] = client.Load(client.Client(address, headers), Steady(rng, args.longest), streams)
    async with asyncio.TaskGroup() as group:
        for load in loads.values():
            group.create_task(load.run())
        # The flood's backlog builds up first.
        await asyncio.sleep(args.seconds / 3)
        before = {name: sum(tape.tokens for tape in load.tapes) for name, load in loads.items()}
        begun = time.monotonic()
        await asyncio.sleep(args.seconds)
        got = {name: sum(tape.tokens for tape in load.tapes) - before[name] for name, load in loads.items()}
        tapes = [tape for tape in loads["modest"].tapes if tape.times[0] >= begun and len(tape.times) > 1]
        waits = [tape.times[1] - tape.times[0] for tape in tapes]
        for load in loads.values():
            load.finish()
    refused = sum(tape.status != 200 for tape in loads["modest"].tapes)
    assert refused == 0, f"{refused} requests of the modest application were refused"
    assert len(waits) >= 20, f"{len(waits)} first tokens are too few: a longer window, or shorter answers"
    return got["modest"] / sum(got.values()), p95(waits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--streams", type=int, default=8, help="of each application with equal loads")
    parser.add_argument("--factor", type=int, default=100)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    keys = pathlib.Path(args.folder) / "keys"
    keys.write_text("".join(f"{key}\n" for key in KEYS.values()))
    # As many sequences as one application brings: either alone fills the server.
    flags = ["--api-key-file", keys, "--max-num-seqs", args.streams, "--device", "cpu"]
    child = server.Server(args.binary, args.folder, flags)
    assert child.ready(), "the server did not start"
    moved = {"share": [], "p95": []}
    for _ in range(args.rounds):
        share, wait = asyncio.run(window(child.address, random.Random(seed), args, 1))
        flooded, waited = asyncio.run(window(child.address, random.Random(seed), args, args.factor))
        moved["share"].append(flooded / share - 1)
        moved["p95"].append(waited / wait - 1)
        print(json.dumps({"share": [share, flooded], "p95_seconds": [wait, waited]}), flush=True)
    assert child.stop() == 0
    found = {name: statistics.median(values) for name, values in moved.items()}
    print(json.dumps({f"{name}_moved": round(value, 4) for name, value in found.items()}))
    assert abs(found["share"]) < 0.05 and found["p95"] < 0.3, "beyond the bar: 5 % of the share, 30 % of p95"


if __name__ == "__main__":
    main()
