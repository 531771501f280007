#!/usr/bin/env python3
"""Power loss under the real server: at every write and sync in turn, what was not durable is lost, reordered or torn.

    power.py --binary target/debug/mirai --folder EMPTY [--cuts N] [--policies drop,reorder,tear] [--seed N]

Three short lives, each cut at every call on its ledger's and spool's files, or at N of them: the first of a database;
one that begins with recovery, on what another power loss left; one in which the store is full for a while, and rows
go to the spool. After each: a start without the shim must succeed, close what is open, and leave what clients have seen;
another must change nothing.
"""

import argparse
import asyncio
import json
import pathlib
import random
import shutil
import subprocess

import client
import server

SHIM = server.HERE / "disk.c"
LIVES = ("first", "again", "spooled")
POLICIES = ("drop", "reorder", "tear")


def build(folder):
    """Compiles the shim."""
    library = pathlib.Path(folder) / "disk.so"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, SHIM, "-ldl", "-lpthread"], check=True)
    return library


class Disk:
    """A folder on a disk that fails when it is told to."""

    def __init__(self, folder, shim):
        self.folder = pathlib.Path(folder)
        self.disk = (self.folder / "disk").resolve()
        self.disk.mkdir(parents=True)
        self.store, self.spool = self.disk / "ledger.db", self.disk / "spool"
        self.control, self.count = self.folder / "control", self.folder / "count"
        self.shim = shim

    def env(self, crash=None, lies=False):
        """The environment that puts the shim under a program."""
        env = {
            "LD_PRELOAD": str(self.shim), "DISK_FOLDER": str(self.disk), "DISK_CONTROL": str(self.control),
            "DISK_COUNT": str(self.count),
        }
        if crash:
            env["DISK_CRASH"] = " ".join(map(str, crash))
        return env | ({"DISK_LIES": "1"} if lies else {})

    def fails(self, how):
        """From now on: `sync EIO *`, `write ENOSPC ledger`, `stall 5000 *`; None: no more."""
        if how is None:
            self.control.unlink(missing_ok=True)
            return
        new = self.folder / "control-new"
        new.write_text(how + "\n")
        new.rename(self.control)


class Trial:
    """What all trials share."""

    def __init__(self, args, seed):
        self.args, self.seed = args, seed
        self.flags, self.model = server.model_args(args)
        self.folder = pathlib.Path(args.folder).resolve()
        self.shim = build(self.folder)
        self.number = 0

    def disk(self, template=None):
        """A new disk, or one with a copy of what another holds."""
        disk = Disk(self.folder / f"trial-{self.number}", self.shim)
        self.number += 1
        if template is not None:
            shutil.copytree(template.disk, disk.disk, dirs_exist_ok=True)
        return disk

    def start(self, disk, env=None):
        flags = [*self.flags, *server.store_args(disk.store), "--ledger-spool", disk.spool]
        return server.Server(self.args.binary, disk.folder, flags, env)

    async def work(self, disk, child, life):
        """The same few requests each time."""
        tapes = []
        for part in range(3):
            if life == "spooled":
                disk.fails("write ENOSPC ledger" if part == 1 else None)
            mix = client.Mix(part, self.model, chat=self.model != "simulated", leave=0.2, longest=24)
            await client.Load(client.Client(child.address), mix, 4, 4, tapes).run()
        disk.fails(None)
        return tapes

    def live(self, life, template, tapes, crash=None, lies=False):
        """One life, cut or not. Returns its disk and all tapes until then."""
        disk = self.disk(template)
        child = self.start(disk, disk.env(crash, lies))
        tapes = list(tapes)
        if child.ready():
            tapes += asyncio.run(self.work(disk, child, life))
            if child.process.poll() is None:
                child.stop()
        code = child.end()
        assert code in (0, -9), f"ended with {code}: see {disk.folder}/server.log"
        return disk, tapes

    def recovers(self, disk, tapes):
        """Two starts without the shim."""
        path = disk.folder / "tapes"
        client.write(tapes, path)
        before = None
        for _ in range(2):
            child = self.start(disk)
            assert child.ready(), f"it does not start again: see {disk.folder}/server.log"
            open_rows = "SELECT COUNT(*) FROM mirai_request WHERE state <> 'closed'"
            server.until("rows are closed", lambda: server.ask(disk.store, open_rows) == 0)
            server.until("the spool is empty", lambda: disk.spool.stat().st_size == 0)
            assert child.stop() == 0
            found = server.check("--sqlite", disk.store, "--tapes", path)
            assert before in (None, found["digests"]), "I8: the second start changed rows"
            before = found["digests"]
        return found

    def every_call(self, life, template, tapes):
        """Cuts a life at its calls. Returns what was done."""
        disk, all_tapes = self.live(life, template, tapes)
        self.recovers(disk, all_tapes)
        calls = int(disk.count.read_text())
        done = {"life": life, "calls": calls, "cuts": 0, "rows": 0, "crashed": 0}
        every = max(1, calls // self.args.cuts) if self.args.cuts else 1
        # Not always the same calls where only some are looked at.
        first = 1 + self.seed % every
        for number, at in enumerate(range(first, calls + 1, every)):
            policies = [POLICIES[number % len(POLICIES)]] if self.args.cuts else self.args.policies
            for policy in policies:
                crash = (at, policy, self.seed + at)
                try:
                    disk, seen = self.live(life, template, tapes, crash)
                    found = self.recovers(disk, seen)
                except (AssertionError, RuntimeError) as error:
                    raise AssertionError(f"{life}, DISK_CRASH={crash}: {error}") from error
                done["cuts"] += 1
                done["rows"] += found["rows"]
                done["crashed"] += found["finish"].get("crashed", 0)
                shutil.rmtree(disk.folder)
        print(json.dumps(done), flush=True)

    def sees_a_lie(self, calls):
        """The same with a disk that forgets what was synced must be found out, or nothing here means anything."""
        disk, seen = self.live("first", None, [], (calls // 2, "drop", self.seed), lies=True)
        try:
            self.recovers(disk, seen)
        except AssertionError:
            return
        raise AssertionError("a disk that lost all rows was not noticed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    server.add_args(parser)
    parser.add_argument("--cuts", type=int, help="only at so many calls of each life, one policy each")
    parser.add_argument("--policies", type=lambda text: text.split(","), default=list(POLICIES))
    parser.add_argument("--lives", type=lambda text: text.split(","), default=list(LIVES))
    args = parser.parse_args()
    seed = random.randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    trial = Trial(args, seed)
    # A life that was cut in the middle of its streams is what another begins with.
    whole, _ = trial.live("spooled", None, [])
    calls = int(whole.count.read_text())
    trial.sees_a_lie(calls)
    left, tapes = trial.live("spooled", None, [], (calls * 2 // 3, "drop", seed))
    for life in args.lives:
        begin = (left, tapes) if life == "again" else (None, [])
        trial.every_call(life, *begin)


if __name__ == "__main__":
    main()
