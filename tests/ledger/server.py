"""The real binary as a child process, and what a test does to it.

Owns starting, killing and asking it, and the run of the checker as a program of its own.
"""

import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).parent
# Longest that anything is waited for.
PATIENCE = 120.0
# What this machine's environment says is not for the server under test.
FOREIGN = ("PORT", "HTTP_PORT", "MODEL_DIR", "MODEL_NAME", "MIRAI_API_KEY", "MIRAI_API_KEY_FILE")


class Server:
    """A `mirai serve` on a free port."""

    def __init__(self, binary, folder, args, env=None, covered=False):
        environment = {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith("MIRAI__")}
        # A machine's own GPU is for tests that are made for one.
        environment |= {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
        if not covered:
            # Of a build that measures coverage: hundreds of processes would leave megabytes each.
            environment["LLVM_PROFILE_FILE"] = "/dev/null"
        self.log = open(pathlib.Path(folder) / "server.log", "ab")
        line = [binary, "serve", "--port", "0", "--log-level", "warn", *map(str, args)]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=self.log, env=environment)
        self.address = None

    def listening(self):
        """Waits until it listens. False if it ends before."""
        line = self.process.stdout.readline().decode()
        self.address = line.strip().removeprefix("listening on http://") or None
        return self.address is not None

    def ready(self):
        """Waits until it serves. False if it ends before."""
        return self.listening() and self.process.stdout.readline().startswith(b"ready in ")

    def kill(self):
        """As `kill -9`."""
        self.process.send_signal(signal.SIGKILL)
        return self.end()

    def stop(self):
        """As an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def end(self):
        """Waits for its end. Returns how it ended."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.process.stdout.close()
            self.log.close()

    def get(self, path):
        """Status and text."""
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self):
        """Samples by name with labels."""
        lines = (line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return {words[0]: float(words[1]) for words in lines if len(words) == 2}


def until(what, true):
    """Waits for something that has no event of its own."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {PATIENCE} s: {what}")
        time.sleep(0.01)


def counters(child, folder, query):
    """A file with the server's metrics, taken once nothing runs and all rows are closed."""
    # Those that left may still be on their way out.
    until("no stream", lambda: child.metrics()["mirai_streams"] == 0)
    until("all rows closed", lambda: query("SELECT COUNT(*) FROM mirai_request WHERE state <> 'closed'") == 0)
    path = pathlib.Path(folder) / "metrics"
    path.write_text(child.get("/metrics")[1])
    return path


def ask(path, query):
    """One number from a SQLite file that a server may be writing."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)
    try:
        return connection.execute(query).fetchone()[0]
    finally:
        connection.close()


def check(*args):
    """Runs the checker. Returns its summary, and fails with what it found."""
    command = [sys.executable, HERE / "check.py", *args]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE)
    if not done.stdout:
        raise RuntimeError(f"the checker ended with {done.returncode}")
    summary = json.loads(done.stdout)
    if summary["problems"] or done.returncode:
        raise AssertionError("\n".join(summary["problems"][:3]))
    return summary


def store_args(path):
    """Flags for a ledger in a SQLite file."""
    return ["--ledger", f"sqlite:///{str(path).lstrip('/')}"]


def model_args(args):
    """Flags and facts of the model under test: the simulator where the binary has it, or the demo model."""
    if args.simulate_step_us is None:
        return [], "mirai-demo"
    return ["--simulate", "--simulate-step-us", args.simulate_step_us], "simulated"


def add_args(parser):
    """What every driver is told."""
    parser.add_argument("--binary", required=True)
    parser.add_argument("--folder", required=True, help="an empty folder on the disk to test")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--simulate-step-us", type=int, help="needs a binary with `test-hooks`")
