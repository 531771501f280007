"""Starts what the tests of a running system need, and ends it: servers, Prometheus, a proxy. Waits by looking, never by sleeping blindly."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import chart


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds, what):
    """Waits until a condition is true and returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"{what}: not within {seconds} s")


def get(url, timeout=10):
    """(status, body); (0, reason) where there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def post(url, body, timeout=60, key=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read())


class Process:
    """A child with its output in a file; ended when the block ends."""

    def __init__(self, command, log, env=None):
        self.log = pathlib.Path(log)
        with self.log.open("w") as out:
            self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)

    def output(self):
        return self.log.read_text()

    def says(self, pattern):
        if self.child.poll() is not None:
            raise RuntimeError(f"ended with {self.child.returncode}: {self.output()[-2000:]}")
        return re.search(pattern, self.output())

    def end(self, seconds=60):
        """Asks it to end and returns its exit code."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        return self.child.returncode


@contextlib.contextmanager
def process(command, log, env=None):
    child = Process(command, log, env)
    try:
        yield child
    finally:
        child.end()


@contextlib.contextmanager
def server(folder, name, *flags, env=None, binary=None):
    """A server that is ready; yields (its address, the process)."""
    # The caller's own settings have no business here.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MIRAI_")}
    command = [binary or chart.MIRAI, "serve", "--port", "0", *flags]
    with process(command, pathlib.Path(folder) / f"{name}.log", clean | (env or {})) as child:
        ready = until(lambda: child.says(r"listening on (\S+)[\s\S]*ready in"), 60, f"{name} is ready")
        yield ready.group(1), child


@contextlib.contextmanager
def prometheus(folder, targets, job="mirai", rules=None, every="1s"):
    """A Prometheus that scrapes the targets; yields a function from a query to its result."""
    folder, port = pathlib.Path(folder), free_port()
    config = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": [str(rules)] if rules else [],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    base = f"http://127.0.0.1:{port}"

    def query(expression):
        status, body = get(f"{base}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        answer = json.loads(body)
        if status != 200:
            raise ValueError(f"{expression}: {answer.get('error')}")
        return answer["data"]["result"]

    with process(command, folder / "prometheus.log") as child:
        until(lambda: child.says("") and get(f"{base}/-/ready")[0] == 200, 60, "Prometheus is ready")
        yield query


@contextlib.contextmanager
def load(calls):
    """Calls each function again and again in a thread of its own until the block ends; yields what they returned or raised."""
    results, stop = [], threading.Event()

    def work(call):
        while not stop.is_set():
            try:
                results.append(call())
            except Exception as error:  # noqa: BLE001 - a failed request is a result
                results.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        stop.set()
        for thread in threads:
            thread.join()
