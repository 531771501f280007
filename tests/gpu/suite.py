"""Runs the parts of the GPU suite and writes their results. See run.sh and docs/gpu.md.

Owns the order within a part and what is tried again. What is measured, and by which rule it passes, is in the programs that
it runs; tables are made in tables.py.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shlex
import sys
import tempfile
import time

import machine
import tables

HERE = pathlib.Path(__file__).resolve().parent
PARTS = ("ceilings", "contract", "goldens", "steps", "server")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Programs on the GPU at once, under a sanitizer: most of the time goes to the host.
SANITIZERS = 4
NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-gencode", "arch=compute_90a,code=sm_90a")
# A case whose device died is not run again; this many may.
MAX_DEATHS = 10


class Suite:
    """Where things are, and what was asked for."""

    def __init__(self, folder, out, tiny):
        self.folder, self.out, self.tiny = folder, out, tiny
        self.deadline = machine.Deadline()

    def program(self, part, *arguments):
        override = os.environ.get("GPU_SUITE_PROGRAM")
        program = shlex.split(override) if override else [str(self.folder / "bin" / "gpu_suite")]
        return [*program, part, *map(str, arguments), *(["--tiny"] if self.tiny else [])]

    def rates(self):
        """The measured ceilings as an option, if that part has run."""
        file = self.out / "ceilings.json"
        if not file.is_file() or not json.loads(file.read_text()).get("ceilings"):
            return []
        return ["--ceilings", file]

    def rows(self, part, *arguments, most=None):
        """Rows of a part of the program; what went wrong with the program itself is a row too."""
        command = self.program(part, *arguments)
        found, code, words = machine.rows(command, self.deadline.left(most))
        if code != 0:
            found.append({"row": "program", "name": " ".join(map(str, (part, *arguments))),
                          "error": f"ended with {code}: {words}"})
        return found

    # ---- ceilings ----

    def ceilings(self):
        rows = []
        with tempfile.TemporaryDirectory() as build:
            program = f"{build}/ceilings"
            code, output = machine.run(["nvcc", *NVCC_FLAGS, str(self.folder / "ceilings.cu"), "-o", program],
                                       self.deadline.left(120))
            if code == 0:
                found, code, output = machine.rows([program], self.deadline.left(120))
                rows += [dict(row, row="device") for row in found if "read_bytes_per_s" in row]
            if code != 0 or not rows:
                rows.append({"row": "device failed", "name": "ceilings.cu", "error": f"{code}: {output[-1500:]}"})
        device = next((row for row in rows if row["row"] == "device"), None)
        first = self.out / "ceilings.part.json"
        options = []
        if device:
            # Shares of the bandwidth are wanted with the products; their own rates are not known yet.
            rates = {"bytes": device["read_bytes_per_s"], "bf16": 1.0, "e4m3": 1.0}
            first.write_text(json.dumps({"ceilings": rates}))
            options = ["--ceilings", first]
        rows += self.rows("matmuls", *options)
        first.unlink(missing_ok=True)
        matmul = next((row for row in rows if row["row"] == "matmul rates"), None)
        extra = {}
        if device and device["right"] and matmul and matmul["bf16"] and matmul["e4m3"]:
            extra["ceilings"] = {"bytes": device["read_bytes_per_s"], "bf16": matmul["bf16"], "e4m3": matmul["e4m3"]}
        return rows, extra

    # ---- contract ----

    def contract(self):
        sources = sorted([*self.folder.glob("cuda-emu/contract/*_test.cu"), *self.folder.glob("cuda-emu/kernels/*_test.cu")])
        sources = [source for source in sources if source.stem != "emulation_test"]
        if not sources:
            return [{"row": "kernel test", "name": "sources", "tool": "build", "error": "none in cuda-emu/"}], {}
        rows = []
        with tempfile.TemporaryDirectory() as build, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as builders, \
                concurrent.futures.ThreadPoolExecutor(SANITIZERS) as watchers:
            built = {builders.submit(self.build, source, build): source.stem for source in sources}
            watched = []
            for future in concurrent.futures.as_completed(built):
                row, program = future.result()
                rows.append(row)
                if program:
                    rows.append(self.kernel_test(program, "plain"))
                    watched += [watchers.submit(self.kernel_test, program, tool) for tool in TOOLS]
            rows += [future.result() for future in watched]
        return rows, {}

    def build(self, source, folder):
        program = f"{folder}/{source.stem}"
        command = ["nvcc", *NVCC_FLAGS, f"-I{self.folder / 'kernels'}", str(source), "-o", program]
        start = time.monotonic()
        code, output = machine.run(command, self.deadline.left(300))
        row = {"row": "kernel test", "name": source.stem, "tool": "build", "seconds": time.monotonic() - start,
               "pass": code == 0}
        if code != 0:
            row["error"] = f"{code}: {output[-1500:]}"
        return row, program if code == 0 else None

    def kernel_test(self, program, tool):
        """A test as it is, at full size, or under a tool of compute-sanitizer, at small shapes."""
        command, environment = [program], dict(os.environ)
        if tool != "plain":
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", program]
            environment["TEST_SMALL"] = "1"
        start = time.monotonic()
        code, output = machine.run(command, self.deadline.left(150), env=environment)
        row = {"row": "kernel test", "name": pathlib.Path(program).name, "tool": tool, "pass": code == 0,
               "seconds": time.monotonic() - start, "says": output.strip().splitlines()[-1:]}
        if code != 0:
            row["error"] = f"{code}: {output[-1500:]}"
        return row

    # ---- goldens ----

    def goldens(self):
        rows = self.cases(self.folder / "golden", "oracle")
        with tempfile.TemporaryDirectory() as made:
            script = [sys.executable, str(self.folder / "make_checkpoints.py"), "--out", made]
            if self.tiny:
                script.append("--tiny")
            code, output = machine.run(script, self.deadline.left(240))
            rows.append({"row": "checkpoints", "name": "make_checkpoints.py", "pass": code == 0, "says": output[-2000:]})
            if code != 0:
                rows[-1]["error"] = f"{code}: {output[-1500:]}"
            if any(pathlib.Path(made).glob("*/golden.json")):
                rows += self.cases(made, "file")
        return rows, {}

    def cases(self, folder, expect):
        """All cases of a folder. A device that dies takes one of them with it: the others go on in a new process."""
        arguments = ["--golden", folder, "--expect", expect]
        listed = self.rows("goldens", *arguments, "--list", most=30)
        left = [row["case"] for row in listed if row["row"] == "case"]
        rows = [row for row in listed if row.get("error")]
        for _ in range(MAX_DEATHS):
            if not left:
                break
            chosen = [word for name in left for word in ("--case", name)]
            found, code, words = machine.rows(self.program("goldens", *arguments, *chosen), self.deadline.left())
            rows += [row for row in found if row["row"] not in ("case", "facts")]
            begun = [row["case"] for row in found if row["row"] == "case"]
            done = {row["case"] for row in found if row["row"] == "golden"}
            if code != 0:
                lost = next((name for name in begun if name not in done), left[0] if not done else None)
                if lost:
                    rows.append({"row": "golden", "case": lost, "pass": False, "error": f"the program ended with {code}: {words}"})
                    done.add(lost)
            left = [name for name in left if name not in done]
            if code == 0 or self.deadline.left() < 5:
                break
        rows += [{"row": "golden", "case": name, "pass": False, "error": "was not run"} for name in left]
        return rows

    # ---- steps ----

    def steps(self):
        rows = []
        listed = self.rows("steps", "--list", most=30)
        shapes = [row["shape"] for row in listed if row["row"] == "shape"]
        rows += [row for row in listed if row.get("error")]
        for index, shape in enumerate(shapes):
            # A shape may take what those before it have left over.
            most = self.deadline.left() / (len(shapes) - index)
            rows += self.rows("steps", "--shape", shape, *self.rates(), most=most)
        return rows, {}

    # ---- server ----

    def server(self):
        import serving
        return serving.run(self), {}


def judged(part, rows, extra, suite, before, started):
    """A part's file."""
    commit = suite.folder / "commit"
    result = {
        "part": part, "commit": commit.read_text().strip() if commit.is_file() else "unknown",
        "command": " ".join(["./run.sh", *(["--tiny"] if suite.tiny else []), part]),
        "device": before, "device_after": machine.device(), "seconds": time.monotonic() - started, **extra, "rows": rows,
    }
    result["faults"] = tables.faults(result)
    result["pass"] = not result["faults"] and bool(rows)
    return result


def main():
    parser = argparse.ArgumentParser(description="Checks and measures on a GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none means all")
    parser.add_argument("--tiny", action="store_true", help="sizes that an emulated device can do")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]}")
    out = pathlib.Path(os.environ.get("OUT", HERE / "out"))
    out.mkdir(parents=True, exist_ok=True)
    shown, passed = [], True
    for part in arguments.parts or PARTS:
        suite = Suite(HERE, out, arguments.tiny)
        started, before = time.monotonic(), machine.device()
        try:
            rows, extra = getattr(suite, part)()
        except Exception as error:  # One part's fault must not take the others' results.
            rows, extra = [{"row": "suite", "name": part, "error": f"{type(error).__name__}: {error}"}], {}
        result = judged(part, rows, extra, suite, before, started)
        (out / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")
        shown.append(tables.render(result))
        # Written after each part: a later one may be killed with all of this.
        (out / "summary.md").write_text("".join(shown))
        passed = passed and result["pass"]
    print("".join(shown), end="")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
