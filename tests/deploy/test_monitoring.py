"""A real Prometheus scrapes real servers under load: every panel's query and every rule's series gives something.

Two servers: one on the CPU, one on the emulated CUDA driver, so that the panels of GPUs are tested without one.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import chart
import running
from test_rules import FILE, RULES

DASHBOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((chart.CHART / "files" / "dashboards").glob("*.json"))}
DRIVER = pathlib.Path(os.environ.get("MIRAI_TEST_CUDA_DRIVER", chart.ROOT / "target" / "cuda-emu" / "driver"))
KEY = "a-key-for-the-load"
# What Grafana would put for its own variables, short enough for a short test.
GRAFANA = {"$__rate_interval": "10s", "$__range": "10s", "$job": "mirai", "$instance": ".*"}


def panels():
    """(dashboard, title, expression) of every query."""
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield name, panel["title"], target["expr"]


def filled(expression, dashboard):
    """The expression with variables replaced, text boxes by what they hold at first."""
    own = {"$" + v["name"]: v["query"] for v in DASHBOARDS[dashboard]["templating"]["list"] if v["type"] == "textbox"}
    for name, value in sorted((GRAFANA | own).items(), reverse=True):
        expression = expression.replace(name, value)
    return expression


class Files(unittest.TestCase):
    def test_dashboards_are_whole(self):
        self.assertEqual(set(DASHBOARDS), {"service", "capacity", "accounting"})
        for name, dashboard in DASHBOARDS.items():
            self.assertEqual(dashboard["uid"], f"mirai-{name}")
            ids = [p["id"] for p in dashboard["panels"]]
            self.assertEqual(len(ids), len(set(ids)))
            for panel in dashboard["panels"]:
                self.assertTrue(panel["title"] and panel["description"] and panel["targets"], name)
                grid = panel["gridPos"]
                self.assertLessEqual(grid["x"] + grid["w"], 24)

    def test_no_two_panels_lie_on_each_other(self):
        for name, dashboard in DASHBOARDS.items():
            cells = [(x, y) for p in dashboard["panels"] for g in [p["gridPos"]]
                     for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
            self.assertEqual(len(cells), len(set(cells)), name)

    def test_every_query_keeps_to_the_chosen_release(self):
        for name, title, expression in panels():
            selectors = re.findall(r"\{[^}]*\}", expression)
            self.assertTrue(selectors, title)
            for selector in selectors:
                self.assertIn('job="$job"', selector, f"{name}: {title}")

    def test_the_chart_ships_them(self):
        rendered = chart.of_kind(chart.render(chart.value_sets()["gpu-claim"]), "ConfigMap")
        shipped = {k: json.loads(v) for m in rendered for k, v in m["data"].items() if k.endswith(".json")}
        self.assertEqual(shipped, {f"{k}.json": v for k, v in DASHBOARDS.items()})


@unittest.skipUnless(shutil.which("prometheus"), "no prometheus: install Debian's")
@unittest.skipUnless(pathlib.Path(chart.MIRAI).exists(), f"no server at {chart.MIRAI}")
class Live(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ledger = lambda name: ("--ledger", f"sqlite://{folder}/{name}.sqlite")  # noqa: E731
            addresses = [stack.enter_context(running.server(folder, "cpu", *ledger("cpu"), *cls.applications(folder)))[0]]
            cls.gpu = (DRIVER / "libcuda.so.1").exists()
            if cls.gpu:
                flags = ("--device", "cuda", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", *ledger("gpu"))
                env = {"LD_LIBRARY_PATH": str(DRIVER)}
                addresses.append(stack.enter_context(running.server(folder, "gpu", *flags, env=env))[0])
            cls.addresses = addresses
            for address in addresses:
                prompt = {"model": "mirai-demo", "prompt": "Comment compter les jetons ? " * 8, "max_tokens": 8}
                call = lambda a=address, p=prompt: running.post(f"{a}/v1/completions", p, key=KEY)  # noqa: E731
                stack.enter_context(running.load([call, call]))
            targets = [a.removeprefix("http://") for a in addresses]
            cls.query = staticmethod(stack.enter_context(running.prometheus(folder, targets, rules=FILE)))
            cls.addClassCleanup(stack.pop_all().close)

    @staticmethod
    def applications(folder):
        """Flags for one application with a limit, so that quotas are counted; the load comes with a plain key."""
        file, pepper = pathlib.Path(folder) / "applications.toml", pathlib.Path(folder) / "pepper"
        file.write_text('[[application]]\nname = "notes"\n[application.quota]\nrequests_per_minute = 100\n')
        pepper.write_text("1 " + "p" * 43 + "\n")
        return "--applications", str(file), "--pepper-file", str(pepper), "--api-key", KEY

    def without_gpu(self, expression):
        """Whether an expression needs the emulated driver and there is none."""
        if "mirai_gpu" in expression and not self.gpu:
            print(f"not run, no emulated driver in {DRIVER} (cargo xtask cuda-emu --driver): {expression}")
            return True
        return False

    def test_both_servers_are_scraped(self):
        up = running.until(lambda: [r for r in self.query('up{job="mirai"}') if r["value"][1] == "1"], 30, "up")
        self.assertEqual(len(up), len(self.addresses))

    def test_every_panel_shows_something(self):
        for name, title, expression in panels():
            if not self.without_gpu(expression):
                query = filled(expression, name)
                numbers = lambda q=query: [r for r in self.query(q) if r["value"][1] != "NaN"]  # noqa: E731
                running.until(numbers, 30, f"{name}: {title}: {query}")

    def test_every_rule_reads_series_that_exist(self):
        for alert, rule in RULES.items():
            for selector in re.findall(r"[a-z_:]+\{[^}]*\}", rule["expr"]):
                if not self.without_gpu(selector):
                    running.until(lambda s=selector: self.query(f"count({s})"), 30, f"{alert}: {selector}")

    def test_a_healthy_server_alarms_no_one(self):
        """The rules run in this Prometheus; those without a delay would fire by now."""
        running.until(lambda: self.query('count_over_time(up{job="mirai"}[1m]) > 5'), 30, "a few scrapes")
        firing = {r["metric"]["alertname"] for r in self.query('ALERTS{alertstate="firing"}')}
        self.assertEqual(firing, set())

    def test_scalers_read_series_that_exist(self):
        scaled = chart.of_kind(chart.render(chart.value_sets()["scaled"], release="mirai"), "ScaledObject")[0]
        for trigger in scaled["spec"]["triggers"]:
            running.until(lambda q=trigger["metadata"]["query"]: self.query(q), 30, str(trigger))

    def test_own_names_pass_promtools_lint(self):
        """`vllm:` names are aliases whose colons it rejects."""
        for address in self.addresses:
            text = running.get(f"{address}/metrics")[1]
            own = "\n".join(l for l in text.splitlines() if "vllm:" not in l) + "\n"
            done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True, check=False)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)


if __name__ == "__main__":
    unittest.main()
