"""Tests of the suite's scripts: with a program that answers, one that dies in the middle, and one that never ends."""

import json
import pathlib
import sys
import tempfile
import textwrap
import unittest

import machine
import suite
import tables

STEP = dict(row="step", shape="s", case="decode 1", rows=1, steps=3, median_ms=2.0, p10_ms=1.9, p90_ms=2.2, device_ms=1.8,
            floor_ms=1.5, bound="memory", bytes=1e9, fraction=0.75, times_floor=1.333, bar=1.45, tokens_per_s=500.0,
            joules_per_token=0.4, watts=300.0, sm_mhz=1980, memory_mhz=3201, xid=None, impossible=False)
STEP["pass"] = True
GOLDEN = {"row": "golden", "case": "a", "pass": True, "alone": {"mean": 0.01, "p99": 0.1}, "mixed": {"mean": 0.01, "p99": 0.1},
          "regret": None, "rerun_same_bits": True, "expected": "oracle"}
DEVICE = {"row": "device", "read_bytes_per_s": 4.5e12, "copy_bytes_per_s": 4.3e12, "right": True,
          "launches": [{"blocks": 1, "graph": True, "dependent_launch": True, "us": 1.25}]}
PRODUCT = {"row": "matmul", "layer": "qkv", "storage": "Bf16", "rows": 1, "us": 12.0, "fraction_of_bandwidth": 0.9,
           "flops": 1e12, "impossible": False}
ROWS = {
    "ceilings": [DEVICE, PRODUCT, {"row": "matmul rates", "bf16": 7e14, "e4m3": 1.4e15}],
    "contract": [{"row": "kernel test", "name": "norm_test", "tool": "memcheck", "pass": True}],
    "goldens": [GOLDEN],
    "steps": [STEP, {"row": "loaded", "shape": "s", "load_s": 3.0, "weight_bytes": 16e9, "graphs": 12}],
    "server": [{"row": "ready", "seconds": 4.0},
               {"row": "server", "case": "1 at once", "pass": True, "output_throughput": 200.0, "bound": 500.0,
                "fraction": 0.4, "median_ttft_ms": 20.0, "p99_ttft_ms": 30.0, "median_tpot_ms": 5.0, "p99_tpot_ms": 6.0}],
}


def part(name, rows):
    result = {"part": name, "commit": "c0ffee", "command": "./run.sh " + name, "seconds": 1.0, "rows": rows,
              "device": {"driver_version": "580", "name": "GPU", "clocks.sm": "1980 MHz"}, "device_after": {}}
    return dict(result, faults=tables.faults(result))


class Fake(unittest.TestCase):
    """With a program of our own in place of the real one."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = pathlib.Path(self.folder.name)
        self.addCleanup(self.folder.cleanup)

    def suite(self, program):
        script = self.path / "program.py"
        script.write_text("import json, os, sys, time\n" + textwrap.dedent(program))
        found = suite.Suite(self.path, self.path, False)
        found.program = lambda *words: [sys.executable, str(script), *map(str, words)]
        return found

    def test_a_case_that_kills_the_device_takes_no_other_with_it(self):
        found = self.suite("""
            names = ["a", "b", "c", "d"]
            chosen = [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "--case"] or names
            for name in chosen:
                print(json.dumps({"row": "case", "case": name}), flush=True)
                if "--list" in sys.argv:
                    continue
                if name == "b":
                    sys.stderr.write("an illegal address")
                    os._exit(70)
                print(json.dumps({"row": "golden", "case": name, "pass": True}), flush=True)
            """)
        rows = found.cases("golden", "oracle")
        self.assertEqual([(row["case"], row["pass"]) for row in rows], [("a", True), ("b", False), ("c", True), ("d", True)])
        self.assertIn("ended with 70: an illegal address", rows[1]["error"])

    def test_a_program_that_never_ends_is_ended_and_its_rows_count(self):
        found = self.suite("""
            print(json.dumps({"row": "step", "case": "x"}), flush=True)
            print("no JSON", flush=True)
            time.sleep(1000)
            """)
        found.deadline = machine.Deadline(3)
        rows = found.rows("steps")
        self.assertEqual([row["row"] for row in rows], ["step", "noise", "program"])
        self.assertIn("ended with timeout", rows[2]["error"])
        self.assertLess(found.deadline.left(), 1.5)
        self.assertEqual(machine.rows(["true"], 0)[1], "timeout")

    def test_steps_are_run_shape_by_shape(self):
        found = self.suite("""
            if "--list" in sys.argv:
                print(json.dumps({"row": "shape", "shape": "one"}))
                print(json.dumps({"row": "shape", "shape": "two"}))
            else:
                at = sys.argv.index("--shape") + 1
                print(json.dumps({"row": "step", "shape": sys.argv[at], "rates": "--ceilings" in sys.argv}))
                sys.exit(sys.argv[at] == "two")
            """)
        rows, _ = found.steps()
        self.assertEqual([row.get("shape") for row in rows if row["row"] == "step"], ["one", "two"])
        self.assertFalse(rows[0]["rates"])
        self.assertIn("--shape two", rows[-1]["name"])
        (self.path / "ceilings.json").write_text(json.dumps({"ceilings": {"bytes": 1}}))
        self.assertTrue(found.steps()[0][0]["rates"])
        (self.path / "ceilings.json").write_text("{}")
        self.assertEqual(found.rates(), [])

    def test_programs_that_are_not_there_are_told(self):
        self.assertEqual(machine.run(["/no/such/program"], 5)[0], 127)
        self.assertEqual(machine.rows(["/no/such/program"], 5)[1], 127)
        code, output = machine.run([sys.executable, "-c", "print('said', flush=True); import time; time.sleep(99)"], 2)
        self.assertEqual((code, output.strip()), ("timeout", "said"))


class Tables(unittest.TestCase):
    def test_every_part_has_a_table(self):
        for name, rows in ROWS.items():
            text = tables.render(part(name, rows))
            self.assertIn("commit c0ffee", text)
            self.assertIn("driver 580", text)
            self.assertNotIn("Faults", text)
            widths = {line.count(" | ") for line in text.split("\n\n")[2].splitlines() if line.startswith("| ")}
            self.assertEqual(len(widths), 1, text)
        self.assertIn("| decode 1 | 2 | 1.8 | 1.5 | memory | 75 % | 1.33 (bar 1.45) |", tables.render(part("steps", ROWS["steps"])))
        for measured in (True, False):
            text = tables.render(part("steps", [STEP, {"row": "rates", "measured": measured}]))
            self.assertEqual("not measured here" in text, not measured)
        self.assertIn("4.500 TB/s", tables.render(part("ceilings", ROWS["ceilings"])))

    def test_what_cannot_be_is_a_fault_and_a_missed_bar_is_a_result(self):
        slow = dict(STEP, **{"pass": False})
        self.assertEqual(tables.faults({"rows": [slow]}), [])
        self.assertIn("MISSED", tables.render(part("steps", [slow])))
        fast = dict(STEP, impossible=True)
        self.assertIn("physical limit", tables.faults({"rows": [fast]})[0])
        self.assertIn("IMPOSSIBLE", tables.render(part("steps", [fast])))
        wrong = dict(GOLDEN, **{"pass": False})
        self.assertEqual(tables.faults({"rows": [wrong]}), ["a: failed"])
        lost = {"row": "golden", "case": "b", "pass": False, "error": "died\nof | it"}
        self.assertIn("FAILED: died of / it", tables.render(part("goldens", [lost])))

    def test_numbers_are_short(self):
        self.assertEqual([tables.number(v) for v in (None, "x", 0.01234, 17744.4, 3)], ["-", "x", "0.0123", "17,744", "3"])


if __name__ == "__main__":
    unittest.main()
