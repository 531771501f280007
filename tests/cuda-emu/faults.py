#!/usr/bin/env python3
"""Fault injection: single edits in kernels, each of which the tests must notice.

Needs g++ and make, nothing else. Every fault is tried with the plain build in three orders, then with AddressSanitizer
and ThreadSanitizer, until something fails. Prints a table; exits 1 if fewer than 95 % are caught, if a survivor is not
explained in `fault_table.py`, or if an edit no longer fits.

    python3 tests/cuda-emu/faults.py [--jobs N] [--only TEXT] [--report FILE]
"""
import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from fault_table import EXPLAINED, FAULTS

HERE = pathlib.Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
EMULATION = HERE.parent.parent / "target" / "cuda-emu"
LEAST_CAUGHT = 0.95
LIMIT_S = 240

STAGES = [("plain", "fwd"), ("plain", "rev"), ("plain", "rand"), ("asan", "fwd"), ("tsan", "fwd"), ("tsan", "rand")]


def run(command, **more):
    return subprocess.run(command, capture_output=True, text=True, errors="replace", **more)


def environment(mode, order):
    env = {**os.environ, "EMU_ORDER": order, "EMU_SEED": "7", "ASAN_OPTIONS": "detect_leaks=0"}
    if mode == "tsan":
        env |= {"TEST_SMALL": "1", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return env


def reason(result):
    for mark, word in [("EMU ERROR", "stopped"), ("data race", "race"), ("AddressSanitizer", "address"),
                       ("runtime error", "undefined"), ("MISMATCH", "value")]:
        if mark in result.stderr:
            return word
    return f"exit {result.returncode}"


def prepare(place, fault):
    """A copy of the kernels with one edit; None if the text is not there."""
    file, _, _, text, replacement = fault
    kernels = place / "kernels"
    shutil.copytree(KERNELS, kernels)
    source = (kernels / file).read_text()
    if text not in source:
        return None
    (kernels / file).write_text(source.replace(text, replacement, 1))
    return kernels


def attempt(fault):
    """How a fault was caught: (mode, order, reason), or None."""
    test = fault[1]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        kernels = prepare(place, fault)
        if kernels is None:
            return ("edit", "-", "does not fit")
        built = None
        for mode, order in STAGES:
            binary = place / mode / test
            if built != mode:
                folders = [f"KERNELS={kernels}", f"OUT={place}", f"EMU_OUT={EMULATION}"]
                quick = ["WARNINGS=-w", "FLAGS_plain=-O1"]
                made = run(["make", "-s", "-C", str(HERE), *folders, *quick, str(binary)])
                if made.returncode:
                    return ("edit", "-", "does not compile: " + made.stderr.strip()[:300])
                built = mode
            try:
                result = run([str(binary)], env=environment(mode, order), timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                return (mode, order, "never ends")
            if result.returncode:
                return (mode, order, reason(result))
    return None


def report(path, results, seconds):
    """Writes what was caught, and how, as Markdown."""
    how = ["value", "stopped", "address", "race", "other"]
    rows, survivors = {}, []
    for fault, caught in results:
        row = rows.setdefault(fault[0], dict.fromkeys(how, 0) | {"faults": 0})
        row["faults"] += 1
        if caught is None:
            survivors.append(fault)
        else:
            row[caught[2] if caught[2] in how else "other"] += 1
    lines = [
        "# Faults in the CUDA kernels, and whether the emulated tests notice",
        "",
        "Made by `python3 tests/cuda-emu/faults.py --report FILE`, which edits one place of a copy of the kernels at a "
        "time (`tests/cuda-emu/fault_table.py`) and runs the kernel's test until something fails: plain in three orders, "
        "then under AddressSanitizer and UndefinedBehaviorSanitizer, then under ThreadSanitizer.",
        "",
        "Stopped: the emulation saw a missing dependency wait, threads at different barriers, a deadlock or a misaligned "
        "address. Other: the test crashed, or never ended.",
        "",
        "| file | faults | caught | value | stopped | address | race | other |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = dict.fromkeys([*how, "faults", "caught"], 0)
    for file in sorted(rows):
        row = rows[file]
        row["caught"] = sum(row[h] for h in how)
        for key, n in row.items():
            total[key] += n
        lines.append(f"| `{file}` | {row['faults']} | {row['caught']} | " + " | ".join(str(row[h]) for h in how) + " |")
    lines.append(f"| all | {total['faults']} | {total['caught']} | " + " | ".join(str(total[h]) for h in how) + " |")
    lines += ["", f"{100 * total['caught'] / total['faults']:.1f} % caught; {seconds:.0f} s on {os.cpu_count()} cores."]
    for fault in survivors:
        lines.append(f"* `{fault[0]}`, {fault[2]}: survives. {EXPLAINED.get((fault[0], fault[2]), 'Not explained.')}")
    pathlib.Path(path).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[""], help="faults whose file or name contains one of these")
    parser.add_argument("--report", help="Markdown file for the result")
    options = parser.parse_args()
    faults = [f for f in FAULTS if any(word in f[0] + " " + f[2] for word in options.only)]
    # Once, so that no two attempts build it at the same time.
    objects = [str(EMULATION / o) for o in ("scheduler.o", "blocks.o", "grids.o", "fiber.o", "warp.o",
                                              "plain/copy.o", "asan/copy.o", "tsan/copy.o")]
    subprocess.run(["make", "-s", "-C", str(HERE), f"OUT={EMULATION}", *objects], check=True)
    start = time.time()
    survivors, broken, results = [], [], []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for fault, caught in zip(faults, pool.map(attempt, faults)):
            words = "SURVIVES" if caught is None else " ".join(caught)
            print(f"{fault[0]:22} {fault[2]:52} {words}", flush=True)
            if caught is None:
                survivors.append(fault)
            elif caught[0] == "edit":
                broken.append(fault)
            results.append((fault, caught))
    tried = len(faults) - len(broken)
    caught = tried - len(survivors)
    print(f"{caught} of {tried} faults caught, {len(broken)} edits do not fit, {time.time() - start:.0f} s")
    if options.report:
        report(options.report, results, time.time() - start)
    unexplained = [f for f in survivors if (f[0], f[2]) not in EXPLAINED]
    return 1 if broken or unexplained or caught < LEAST_CAUGHT * tried else 0


if __name__ == "__main__":
    sys.exit(main())
