#!/usr/bin/env python3
"""What the ledger costs: the same load with and without it, in interleaved pairs.

    cost.py --binary target/release/mirai-hooks --folder EMPTY --simulate-step-us 10000 [--pairs 20] [--postgres]

The executor is paced, so that a step takes its time whatever the host does. `mirai bench` is the client. Beside it:
how long a sync of the same disk takes, and a round trip to PostgreSQL.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import time

import server
from faults import Postgres

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {9: 2.262, 14: 2.145, 19: 2.093, 24: 2.064, 29: 2.045, 39: 2.023}


def interval(values):
    """Mean and half the width of its 95 % interval."""
    freedom = len(values) - 1
    t = T95[max((known for known in T95 if known <= freedom), default=9)]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def load(binary, child, args, out):
    """One run of the benchmark."""
    line = [binary, "bench", "--url", f"http://{child.address}", "--endpoint", "completions", "--dataset", "random",
            "--input-len", 16, "--output-len", args.tokens, "--num-prompts", args.requests,
            "--concurrency", args.streams, "--json", out]
    subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads(pathlib.Path(out).read_text())
    assert report["failed"] == 0, f"{report['failed']} requests failed"
    return report


def sync_p99(folder, count=1000):
    """Milliseconds of a write and sync of one page, as a commit does it."""
    times = []
    fd = os.open(pathlib.Path(folder) / "sync-probe", os.O_CREAT | os.O_WRONLY)
    for number in range(count):
        os.pwrite(fd, b"x" * 4096, number * 4096)
        began = time.perf_counter()
        os.fdatasync(fd)
        times.append((time.perf_counter() - began) * 1e3)
    os.close(fd)
    return statistics.quantiles(times, n=100)[98]


def round_trip(postgres):
    """Milliseconds of an empty statement and of a durable commit, as `pgbench` finds them."""
    out = {}
    for name, script in (("statement", "SELECT 1;"),
                         ("commit", "INSERT INTO probe VALUES (1);")):
        path = postgres.folder / "script"
        path.write_text(script)
        os.chmod(path, 0o644)
        line = [postgres.programs / "pgbench", "-n", "-T", "3", "-f", path, "-h", postgres.folder, "-U", "mirai",
                "postgres"]
        if name == "commit":
            psql = [postgres.programs / "psql", "-q", "-X", "-d", postgres.conninfo(), "-c"]
            subprocess.run(list(map(str, [*psql, "CREATE TABLE probe (a int)"])), check=True)
        done = subprocess.run(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        latency = [l for l in done.stdout.decode().splitlines() if l.startswith("latency average")]
        out[name] = float(latency[0].split("=")[1].split()[0])
    return out


def pairs(args, on, off, out):
    """Relative loss of tokens a second and difference of p99 time to first token in ms, for each pair."""
    lost, later, firsts = [], [], []
    for number in range(args.pairs + 1):
        # Who begins changes with each pair.
        order = (on, off) if number % 2 else (off, on)
        seen = {child: load(args.binary, child, args, out) for child in order}
        if number == 0:
            continue  # Warms both.
        lost.append(1 - seen[on]["output_throughput"] / seen[off]["output_throughput"])
        later.append(seen[on]["p99_ttft_ms"] - seen[off]["p99_ttft_ms"])
        firsts.append(seen[off]["p99_ttft_ms"])
        print(f"pair {number}: {lost[-1] * 100:+.2f} % tokens/s, {later[-1]:+.2f} ms p99 TTFT", flush=True)
    return lost, later, firsts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--postgres", action="store_true", help="the ledger in PostgreSQL, not in a file")
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    flags, _ = server.model_args(args)
    flags += ["--max-num-seqs", args.streams]
    postgres = Postgres()
    found = {"load average before": os.getloadavg()[0], "sync p99 ms": sync_p99(folder)}
    if postgres.programs:
        postgres.up()
        found["postgres round trip ms"] = round_trip(postgres)
    place = postgres.args() if args.postgres else server.store_args(folder / "ledger.db")
    on = server.Server(args.binary, folder, [*flags, *place])
    off = server.Server(args.binary, folder, flags)
    try:
        assert on.ready() and off.ready(), "a server did not start"
        lost, later, firsts = pairs(args, on, off, folder / "bench.json")
        metrics = off.metrics()
        prefill = metrics["mirai_request_prefill_seconds_sum"] / metrics["mirai_request_prefill_seconds_count"] * 1e3
    finally:
        on.stop(), off.stop()
        if postgres.programs:
            postgres.down()
    mean, half = interval(lost)
    found |= {"pairs": args.pairs, "tokens/s lost %": mean * 100, "tokens/s lost % +-": half * 100}
    mean, half = interval(later)
    bar = max(0.0, found["sync p99 ms"] - prefill) + 1
    found |= {"p99 ttft ms later": mean, "p99 ttft ms later +-": half, "its bar ms": bar, "prefill ms": prefill,
              "p99 ttft ms without": statistics.fmean(firsts), "load average after": os.getloadavg()[0]}
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}))


if __name__ == "__main__":
    main()
