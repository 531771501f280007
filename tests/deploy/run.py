"""Runs parts of these tests and says what was seen.

usage: run.py [--strict] [--report FILE] [PART ...]     parts: the names of test_PART.py; none means all
With --strict a test that was skipped counts as failed: on CI everything has to be there.
"""

import argparse
import json
import os
import pathlib
import sys
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
PARTS = sorted(p.stem.removeprefix("test_") for p in HERE.glob("test_*.py"))


class Result(unittest.TextTestResult):
    """Keeps each test's outcome and time."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.rows = []

    def startTest(self, test):
        self.began = time.monotonic()
        super().startTest(test)

    def note(self, test, outcome, why=""):
        # A skipped class never starts.
        seconds = round(time.monotonic() - getattr(self, "began", time.monotonic()), 2)
        self.rows.append({"test": test.id(), "outcome": outcome, "seconds": seconds, "why": why})

    def addSuccess(self, test):
        super().addSuccess(test)
        self.note(test, "passed")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.note(test, "failed", str(err[1]))

    def addError(self, test, err):
        super().addError(test, err)
        self.note(test, "failed", str(err[1]))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.note(test, "skipped", reason)


def main():
    arguments = argparse.ArgumentParser(usage=__doc__)
    arguments.add_argument("--strict", action="store_true")
    arguments.add_argument("--report", type=pathlib.Path)
    arguments.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    chosen = arguments.parse_args()
    sys.path.insert(0, str(HERE))
    # A server that counts its lines would leave files wherever it runs.
    os.environ.setdefault("LLVM_PROFILE_FILE", os.devnull)
    suite = unittest.defaultTestLoader.loadTestsFromNames([f"test_{p}" for p in chosen.parts or PARTS])
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
    if chosen.report:
        chosen.report.parent.mkdir(parents=True, exist_ok=True)
        chosen.report.write_text(json.dumps(result.rows, indent=1) + "\n")
    return 0 if result.wasSuccessful() and not (chosen.strict and result.skipped) else 1


if __name__ == "__main__":
    sys.exit(main())
