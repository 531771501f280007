#!/usr/bin/env python3
"""Holds clients' tapes, the ledger's rows and the server's metrics against one another.

    check.py (--sqlite FILE | --postgres CONNINFO) --tapes FILE... [--metrics FILE --epoch N] [--below N]

A program of its own: it shares nothing with the ledger's code, and reads its tables by itself. Invariants:

I1  every 200 that a client saw has exactly one row
I2  completed: the usage told = row = tokens counted on the tape
I3  the client left, or was cut off: tape <= row <= what the request could cost at most
I4  the process died: tape - row <= 16; 0 where the client saw the end
I5  refused: no row. Told that it failed: a row, if there is one, that says so too
I6  sums over rows = the counters of the process that wrote them
I8  is for who calls this: the digests of runs that are over must never change

Also: no row is left open by a run that is over; no row is there that no client asked for; links have no gaps, each row
has one that opened it and one that attests its end.
"""

import argparse
import collections
import hashlib
import json
import sqlite3
import subprocess
import sys

WINDOW = 16
COUNTERS = {
    "mirai_prompt_tokens_total": "prompt_tokens",
    "mirai_cached_tokens_total": "cached_tokens",
    "mirai_generation_tokens_total": "completion_tokens",
    "mirai_wasted_tokens_total": "wasted_tokens",
}
USAGE = {
    "prompt_tokens": ("prompt_tokens",),
    "completion_tokens": ("completion_tokens",),
    "cached_tokens": ("prompt_tokens_details", "cached_tokens"),
    "reasoning_tokens": ("completion_tokens_details", "reasoning_tokens"),
}


def check(tapes, rows, links, writers, running=None):
    """What is wrong, one text each. `running` is the epoch of a process that still lives, and may have open rows."""
    out = []
    by_id = collections.defaultdict(list)
    for row in rows:
        by_id[row["id"]].append(row)
    for id, found in by_id.items():
        if len(found) > 1:
            out.append(f"I1: {id} has {len(found)} rows")
    for tape in tapes:
        if tape["id"] is not None:
            found = by_id.get(tape["id"], [])
            out += [f"{problem}: {tape} {found}" for problem in _judge(tape, found[0] if found else None)]
    known = {tape["id"] for tape in tapes}
    # A client that never saw a head cannot say which row is its own.
    nameless = sum(tape["id"] is None for tape in tapes)
    strange = [row for row in rows if row["id"] not in known]
    if len(strange) > nameless:
        out.append(f"{len(strange)} rows are of no tape, but only {nameless} clients saw no head: {strange[:3]}")
    for row in rows:
        if row["state"] != "closed" and row["epoch"] != running:
            out.append(f"left open by a run that is over: {row}")
    return out + _links(rows, links, writers)


def _judge(tape, row):
    """One request."""
    status, tokens = tape["status"], tape["tokens"]
    if 400 <= status < 500:
        return [] if row is None else [f"I5: refused with {status}, and has a row"]
    if status >= 500:
        bad = row is not None and row["finish"] in ("stop", "length")
        return ["I5: told that it failed, and its row says that it went well"] if bad else []
    if row is None:
        return ["I1: no row"]
    out = []
    most = tape["prompts"] * tape["n"] * tape["max_tokens"]
    if not 0 <= row["completion_tokens"] <= most:
        out.append(f"I3: the row counts {row['completion_tokens']} of at most {most}")
    crashed = row["finish"] == "crashed"
    if tape["ended"]:
        if row["completion_tokens"] != tokens:
            out.append(f"I2: {tokens} tokens on the tape, {row['completion_tokens']} in the row")
        if row["finish"] != ("length" if "length" in tape["finish"] else "stop") or row["status"] != 200:
            out.append("I2: the row ends otherwise than the answer")
    elif crashed and tokens > row["completion_tokens"] + WINDOW:
        out.append(f"I4: {tokens} tokens had left, {row['completion_tokens']} are in the row")
    elif not crashed and tokens > row["completion_tokens"]:
        out.append(f"I3: {tokens} tokens had left, {row['completion_tokens']} are in the row")
    elif tape["error"] is not None and row["finish"] in ("stop", "length"):
        out.append("I5: told that it failed, and its row says that it went well")
    if tape["usage"] is not None and (tape["ended"] or not crashed):
        for name, path in USAGE.items():
            told = tape["usage"]
            for key in path:
                told = told[key]
            if told != row[name]:
                out.append(f"I2: {name} told {told}, in the row {row[name]}")
    return out


def _links(rows, links, writers):
    out = []
    chains = collections.defaultdict(list)
    kinds = collections.defaultdict(list)
    for link in sorted(links, key=lambda link: (link["writer"], link["epoch"], link["seq"])):
        chains[link["writer"], link["epoch"]].append(link["seq"])
        kinds[link["id"]].append(link)
    for writer in writers:
        seqs = chains.pop((writer["writer"], writer["epoch"]), [])
        if seqs != list(range(1, writer["seq"] + 1)):
            out.append(f"links of {writer['writer']}/{writer['epoch']}: {len(seqs)}, said to be {writer['seq']}")
    out += [f"links of no writer: {chain}" for chain in chains]
    for row in rows:
        mine = kinds.pop(row["id"], [])
        if sum(link["kind"] == "open" for link in mine) != 1:
            out.append(f"not opened by one link: {row['id']} {[link['kind'] for link in mine]}")
        ends = [link for link in mine if link["kind"] in ("close", "recover")]
        if row["state"] == "closed" and row["digest"] not in [link["digest"] for link in ends]:
            out.append(f"no link attests the end of {row['id']}: {[link['kind'] for link in mine]}")
        # A good end is taken back where the client was told of a failure meanwhile.
        if sum(link["kind"] == "close" for link in ends) > (2 if row["finish"] == "error" else 1):
            out.append(f"closed twice by its owner: {row['id']}")
    out += [f"a link without a row: {id}" for id in kinds]
    return out


def margins(tapes, rows):
    """How near the limits are: the most tokens that a row lacks of a tape, and that it counts beyond one."""
    by_id = {row["id"]: row for row in rows}
    lacks = beyond = 0
    for tape in tapes:
        row = by_id.get(tape["id"])
        if row is not None and tape["status"] == 200:
            lacks = max(lacks, tape["tokens"] - row["completion_tokens"])
            beyond = max(beyond, row["completion_tokens"] - tape["tokens"])
    return {"lacks": lacks, "beyond": beyond}


def check_metrics(metrics, rows):
    """I6: rows of one run against the counters of its process at its end."""
    out = []
    for counter, column in COUNTERS.items():
        told, sum_ = metrics.get(counter), sum(row[column] for row in rows)
        if told != sum_:
            out.append(f"I6: {counter} is {told}, the rows' sum {sum_}")
    return out


def read_metrics(text):
    """Samples without labels."""
    lines = (line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    return {words[0]: float(words[1]) for words in lines if len(words) == 2}


def digests(rows):
    """A digest for each epoch of each writer."""
    out = collections.defaultdict(hashlib.sha256)
    for row in sorted(rows, key=lambda row: row["id"]):
        out[f"{row['writer']}/{row['epoch']}"].update(json.dumps(row, sort_keys=True).encode())
    return {name: digest.hexdigest()[:24] for name, digest in out.items()}


class Sqlite:
    """Tables of a file."""

    def __init__(self, path):
        self.connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)
        # One state of all tables.
        self.connection.execute("BEGIN")

    def table(self, name, where):
        cursor = self.connection.execute(f"SELECT * FROM {name} WHERE {where}")
        names = [column[0] for column in cursor.description]
        plain = (lambda value: value.hex() if isinstance(value, bytes) else value)
        return [dict(zip(names, map(plain, row))) for row in cursor]


class Postgres:
    """Tables of a database, by `psql`."""

    def __init__(self, conninfo, psql="psql"):
        self.command = [psql, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", conninfo, "-c"]

    def table(self, name, where):
        query = f"SELECT row_to_json(t) FROM (SELECT * FROM {name} WHERE {where}) t"
        done = subprocess.run(self.command + [query], stdout=subprocess.PIPE, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--sqlite")
    place.add_argument("--postgres")
    parser.add_argument("--psql", default="psql")
    parser.add_argument("--tapes", nargs="+", required=True)
    parser.add_argument("--metrics", help="a page of metrics, taken when the process had nothing more to do")
    parser.add_argument("--epoch", type=int, help="the run whose counters those are")
    parser.add_argument("--below", type=int, default=1 << 60, help="only rows of runs before this one")
    parser.add_argument("--running", type=int, help="a run that is not over")
    args = parser.parse_args()
    store = Sqlite(args.sqlite) if args.sqlite else Postgres(args.postgres, args.psql)
    where = f"epoch < {args.below}"
    writers, links, rows = (store.table(f"mirai_{name}", where) for name in ("writer", "link", "request"))
    tapes = []
    for path in args.tapes:
        with open(path, encoding="utf-8") as file:
            tapes += [json.loads(line) for line in file]
    problems = check(tapes, rows, links, writers, args.running)
    if args.metrics:
        with open(args.metrics, encoding="utf-8") as file:
            mine = [row for row in rows if args.epoch is None or row["epoch"] == args.epoch]
            problems += check_metrics(read_metrics(file.read()), mine)
    summary = {
        "tapes": len(tapes), "rows": len(rows), "tokens": sum(row["completion_tokens"] for row in rows),
        "finish": collections.Counter(row["finish"] for row in rows), **margins(tapes, rows), "digests": digests(rows),
        "problems": problems[:20],
    }
    print(json.dumps(summary))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
