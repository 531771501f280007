"""What the suite needs of the machine: other programs with a limit, the device's own figures, results in files.

Owns limits on time. A program that does not end in time is killed with its children, and what it printed until then counts.
"""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time

# A part ends within nine minutes; what is left of the last one is for writing down.
PART_SECONDS = 525
SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


class Deadline:
    """When a part must be over."""

    def __init__(self, seconds=PART_SECONDS):
        self.end = time.monotonic() + seconds

    def left(self, most=None):
        left = max(0.0, self.end - time.monotonic())
        return left if most is None else min(left, most)


def kill(process):
    """Ends a program that was started in a session of its own, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(command, seconds, **options):
    """Runs to the end or the limit. Returns (exit code or "timeout", output of both streams)."""
    if seconds < 1:
        return "timeout", "not started: no time was left"
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", start_new_session=True, **options)
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        kill(process)
        return "timeout", process.communicate()[0] or ""


def rows(command, seconds):
    """Runs a program that prints a line of JSON for each result. Returns (rows, exit code or "timeout", last words)."""
    if seconds < 1:
        return [], "timeout", "not started: no time was left"
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
                                       start_new_session=True)
        except OSError as error:
            return [], 127, f"{command[0]}: {error.strerror}"
        late = threading.Event()

        def end():
            late.set()
            kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        found = []
        with process.stdout:
            for line in process.stdout:
                try:
                    found.append(json.loads(line))
                except ValueError:
                    found.append({"row": "noise", "text": line.strip()[:500]})
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        words = errors.read()[-2000:].strip()
    return found, "timeout" if late.is_set() else code, words


def device():
    """The device's figures now, by name; empty without a driver."""
    code, output = run(["nvidia-smi", "--query-gpu=" + ",".join(SMI_FIELDS), "--format=csv,noheader", "--id=0"], 20)
    values = output.strip().split(", ")
    return dict(zip(SMI_FIELDS, values)) if code == 0 and len(values) == len(SMI_FIELDS) else {}


def joules():
    """Energy since the driver was loaded; none without NVML."""
    try:
        import pynvml
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1e3
    except Exception:  # Absent, or of another version: there is no figure then.
        return None
