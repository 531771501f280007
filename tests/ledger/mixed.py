#!/usr/bin/env python3
"""Client tape = ledger = metrics, to the token, after mixed requests: n > 1, stop strings, disconnects, whole answers.

    mixed.py --binary target/debug/mirai --folder EMPTY [--requests 1000] [--streams 64] [--seed N]
"""

import argparse
import asyncio
import json
import pathlib
import random

import client
import server


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--longest", type=int, default=60)
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    folder = pathlib.Path(args.folder)
    flags, model = server.model_args(args)
    store = folder / "ledger.db"
    child = server.Server(args.binary, folder, [*flags, *server.store_args(store), "--max-num-seqs", 256], covered=True)
    assert child.ready(), "the server did not start"
    mix = client.Mix(seed, model, chat=model != "simulated", longest=args.longest)
    tapes = asyncio.run(client.Load(client.Client(child.address), mix, args.streams, args.requests).run())
    metrics = server.counters(child, folder, lambda query: server.ask(store, query))
    client.write(tapes, folder / "tapes")
    found = server.check("--sqlite", store, "--tapes", folder / "tapes", "--metrics", metrics)
    assert child.stop() == 0
    # A restart finds nothing to do.
    child = server.Server(args.binary, folder, [*flags, *server.store_args(store)])
    assert child.ready() and child.stop() == 0
    again = server.check("--sqlite", store, "--tapes", folder / "tapes")
    assert again["digests"] == found["digests"], "I8: the restart changed rows"
    found["left"] = sum(tape.left for tape in tapes)
    found["refused"] = sum(tape.status == 400 for tape in tapes)
    found["statuses"] = {str(s): sum(t.status == s for t in tapes) for s in {t.status for t in tapes}}
    del found["digests"]
    print(json.dumps(found))
    assert found["left"] >= args.requests // 10, "too few clients have left for this to mean anything"


if __name__ == "__main__":
    main()
