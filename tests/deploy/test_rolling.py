"""Upgrades under load behind a real proxy: two versions side by side, and no request is lost.

As in a cluster: a replica of the new version becomes ready and is sent to, an old one gets SIGTERM, says that it is
not ready, serves until the proxy has seen it, finishes what runs, and ends. The proxy retries nothing.
"""

import http.client
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
import unittest
from contextlib import ExitStack

import chart
import running

UPGRADES = int(os.environ.get("MIRAI_TEST_UPGRADES", "20"))
# The version before; by default the same binary, told apart by its configuration.
OLD = os.environ.get("MIRAI_TEST_BINARY_OLD", chart.MIRAI)
DRAIN_DELAY = "1"

PROXY = """
global
    stats socket {folder}/haproxy.sock mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    retries 0
    option httpchk GET /health/ready
frontend in
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance roundrobin
    default-server check inter 100ms fall 1 rise 1
    server-template replica 4 127.0.0.1:1 disabled
"""


class Proxy:
    """HAProxy with four places for replicas, changed while it runs."""

    def __init__(self, folder, port):
        self.socket = f"{folder}/haproxy.sock"
        (pathlib.Path(folder) / "haproxy.cfg").write_text(PROXY.format(folder=folder, port=port))
        self.port = port

    def tell(self, command):
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(self.socket)
            admin.sendall(f"{command}\n".encode())
            return admin.makefile().read()

    def states(self):
        """Place -> UP, DOWN or MAINT."""
        rows = [line.split(",") for line in self.tell("show stat").splitlines() if line.startswith("replicas,replica")]
        return {row[1]: row[17] for row in rows}

    def add(self, place, address):
        host, port = address.removeprefix("http://").split(":")
        self.tell(f"set server replicas/{place} addr {host} port {port}")
        self.tell(f"set server replicas/{place} health down")
        self.tell(f"set server replicas/{place} state ready")
        running.until(lambda: self.states()[place].startswith("UP"), 20, f"{place} is sent to")

    def drop(self, place):
        """Takes an ended replica from the list, as an orchestrator does."""
        self.tell(f"set server replicas/{place} state maint")


class Caller:
    """One client: of even number, it streams; of every third, it keeps its connection."""

    BODY = {"model": "mirai-demo", "prompt": "Bonjour", "max_tokens": 24, "ignore_eos": True, "temperature": 0}

    def __init__(self, port, number):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.stream, self.keep = number % 2 == 0, number % 3 == 0

    def __call__(self):
        """Makes one request and returns its text."""
        body = json.dumps(self.BODY | {"stream": self.stream})
        self.connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read().decode()
        if not self.keep:
            # The next request opens it anew.
            self.connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:200]}")
        return self.streamed(text) if self.stream else json.loads(text)["choices"][0]["text"]

    @staticmethod
    def streamed(text):
        events = [l.removeprefix("data: ") for l in text.splitlines() if l.startswith("data: ")]
        if not events or events[-1] != "[DONE]" or any('"error"' in e for e in events):
            raise RuntimeError(f"a torn stream: {text[-200:]}")
        return "".join(c["text"] for e in events[:-1] for c in json.loads(e)["choices"])


@unittest.skipUnless(shutil.which("haproxy"), "no haproxy: install Debian's")
@unittest.skipUnless(pathlib.Path(chart.MIRAI).exists(), f"no server at {chart.MIRAI}")
class Rolling(unittest.TestCase):
    def start(self, stack, folder, number):
        """A replica of the old or the new version, by turns."""
        binary, extra = ((OLD, ()), (chart.MIRAI, ("--max-num-seqs", "64")))[number % 2]
        flags = ("--drain-delay", DRAIN_DELAY, "--shutdown-timeout", "60", "--threads", "1", "--log-level", "warn", *extra)
        return stack.enter_context(running.server(folder, f"replica-{number}", *flags, binary=binary))

    def upgrade(self, proxy, stack, folder, number, places, old):
        """One replica of the next version in, one of the former out. Returns the new (place, process)."""
        address, process = self.start(stack, folder, number)
        place = next(places)
        proxy.add(place, address)
        self.assertEqual(old[1].end(), 0, old[1].output()[-500:])
        proxy.drop(old[0])
        return place, process

    def test_no_request_is_lost_over_all_upgrades(self):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            port = running.free_port()
            proxy = Proxy(folder, port)
            child = stack.enter_context(running.process(["haproxy", "-f", f"{folder}/haproxy.cfg"], f"{folder}/haproxy.log"))
            running.until(lambda: child.says("") and pathlib.Path(proxy.socket).exists(), 20, "the proxy runs")
            places = itertools.cycle(f"replica{n}" for n in range(1, 5))
            replicas = []
            for number in range(2):
                address, process = self.start(stack, folder, number)
                replicas.append((next(places), process))
                proxy.add(replicas[-1][0], address)
            callers = [Caller(port, number) for number in range(6)]
            for each in callers:
                stack.callback(each.connection.close)
            marks = []
            with running.load(callers) as results:
                for number in range(2, 2 + UPGRADES):
                    replicas.append(self.upgrade(proxy, stack, folder, number, places, replicas.pop(0)))
                    marks.append(len(results))
                running.until(lambda: len(results) > marks[-1], 30, "load goes on")
            failed = [r for r in results if isinstance(r, Exception)]
            print(f"{UPGRADES} upgrades, {len(results)} requests, {len(failed)} failed")
            self.assertEqual(failed, [])
            self.assertEqual(len(set(results)), 1, "both versions answer alike")
            self.assertTrue(all(b > a for a, b in itertools.pairwise([0, *marks])), "load never stopped")

    def test_a_replica_that_does_not_drain_loses_requests(self):
        """The test would notice: killed without a drain, replicas tear what runs."""
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            address, process = self.start(stack, folder, 0)
            callers = [Caller(int(address.rsplit(":", 1)[1]), number) for number in range(4)]
            for each in callers:
                stack.callback(each.connection.close)
            with running.load(callers) as results:
                running.until(lambda: len(results) > 4, 30, "load")
                process.child.kill()
                running.until(lambda: any(isinstance(r, Exception) for r in results), 30, "a lost request")


if __name__ == "__main__":
    unittest.main()
