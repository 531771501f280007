"""Every alert fires where it should and nowhere else, by promtool; and has a page that says what to do."""

import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

import yaml

import chart
from alerts import CASES

FILE = chart.CHART / "files" / "rules" / "mirai.yaml"
RULES = {r["alert"]: r for g in yaml.safe_load(FILE.read_text())["groups"] for r in g["rules"]}


def promtool(*args):
    return subprocess.run(["promtool", *args], capture_output=True, text=True, check=False)


def case(alert, series, minute, labels):
    """One test of promtool."""
    rule = RULES[alert]
    expected = [] if labels is None else [{"exp_labels": rule["labels"] | labels, "exp_annotations": rule["annotations"]}]
    return {
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in series.items()],
        "alert_rule_test": [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": expected}],
    }


def judge(rules, tests):
    """Runs promtool's tests of a rule file; (whether all hold, what it said)."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "rules.yaml").write_text(rules)
        tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
        file = pathlib.Path(folder) / "tests.yaml"
        file.write_text(yaml.safe_dump(tests))
        done = promtool("test", "rules", str(file))
    return done.returncode == 0, done.stdout + done.stderr


@unittest.skipUnless(shutil.which("promtool"), "no promtool: install Debian's prometheus")
class Alerts(unittest.TestCase):
    def test_each_has_cases_of_both_kinds(self):
        self.assertEqual(set(CASES), set(RULES))
        for alert, cases in CASES.items():
            kinds = {labels is not None for _, _, labels in cases}
            self.assertEqual(kinds, {True, False}, alert)

    def test_each_fires_and_keeps_silent(self):
        ok, said = judge(FILE.read_text(), [case(a, *c) for a, cases in CASES.items() for c in cases])
        self.assertTrue(ok, said)

    def test_the_cases_notice_another_threshold(self):
        """Turn each comparison round: every alert's cases must then fail."""
        for alert, cases in CASES.items():
            rule = dict(RULES[alert])
            turned = {" > ": " < ", " == 0": " != 0", " == 1": " != 1", " >= ": " < ", "absent(": "count("}
            for old, new in turned.items():
                if old in rule["expr"]:
                    rule["expr"] = rule["expr"].replace(old, new)
                    break
            text = yaml.safe_dump({"groups": [{"name": "turned", "rules": [rule]}]})
            ok, _ = judge(text, [case(alert, *c) for c in cases])
            self.assertFalse(ok, f"{alert}: its cases hold for {rule['expr']} too")

    def test_the_file_and_what_the_chart_makes_of_it_are_rules(self):
        done = promtool("check", "rules", str(FILE))
        self.assertEqual(done.returncode, 0, done.stderr)
        rendered = chart.of_kind(chart.render(chart.value_sets()["gpu-claim"], release="r"), "PrometheusRule")[0]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump({"groups": rendered["spec"]["groups"]}, file)
            file.flush()
            done = promtool("check", "rules", file.name)
        self.assertEqual(done.returncode, 0, done.stderr)


class Pages(unittest.TestCase):
    def test_each_alert_has_a_page_and_each_page_an_alert(self):
        pages = {p.stem for p in (chart.ROOT / "docs" / "runbooks").glob("*.md")}
        self.assertEqual(pages, set(RULES))
        for alert, rule in RULES.items():
            self.assertEqual(rule["annotations"]["runbook_url"], f"docs/runbooks/{alert}.md")
            page = (chart.ROOT / rule["annotations"]["runbook_url"]).read_text()
            for part in (f"# {alert}\n", "**Effect.**", "**Look.**", "**Do.**"):
                self.assertIn(part, page, alert)
            for link in re.findall(r"\]\((\w+\.md)\)", page):
                self.assertTrue((chart.ROOT / "docs" / "runbooks" / link).exists(), f"{alert}: {link}")

    def test_settings_that_pages_name_exist(self):
        """`config.a.b` is an option of the server, every other dotted name a value of the chart."""
        values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
        for page in (chart.ROOT / "docs" / "runbooks").glob("*.md"):
            for name in re.findall(r"`((?:[a-z]+\.)+[A-Za-z_.]+)(?:: \S+)?`", page.read_text()):
                if name.endswith((".toml", ".md")) or name.startswith("config."):
                    continue
                place = values
                for key in name.split("."):
                    self.assertIn(key, place, f"{page.name}: {name}")
                    place = place[key]

    def test_the_chart_scopes_rules_to_its_release(self):
        values = chart.value_sets()["placed"]
        rendered = chart.of_kind(chart.render(values, release="rerank"), "PrometheusRule")[0]
        rules = [r for g in rendered["spec"]["groups"] for r in g["rules"]]
        self.assertEqual({r["alert"] for r in rules}, set(RULES) - {"MiraiGpuFault"})
        for rule in rules:
            self.assertNotIn('job="mirai"', rule["expr"])
            self.assertIn('job="rerank"', rule["expr"])
            self.assertEqual(rule["annotations"]["runbook_url"], f"https://docs.example.org/runbooks/{rule['alert']}.md")


if __name__ == "__main__":
    unittest.main()
