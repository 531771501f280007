"""The server under load: the real binary with random weights, measured over HTTP by its own client.

Owns the server's start and end, and the loads. Rows have what the client reports, and the fraction of the bound that follows
from the floors of prompts and of decode steps.
"""

import json
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import machine

SHAPE = "llama-3.1-8b-fp8"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16",
}
TINY = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 256}
# Sequences at once, requests, tokens of each prompt and of each answer. Eight times as many requests as sequences: less
# would measure how the load starts and ends.
LOADS = ((1, 6, 1000, 256), (32, 128, 1000, 256), (256, 768, 1000, 1000))
TINY_LOADS = ((2, 4, 20, 8),)
KEPT = ("duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "output_throughput",
        "request_throughput", "output_len_mismatches")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_until_ready(process, url, seconds):
    """Seconds until the server answers; none if it ends or takes too long."""
    start = time.monotonic()
    while time.monotonic() - start < seconds and process.poll() is None:
        if answers(url + "/health/ready"):
            return time.monotonic() - start
        time.sleep(0.1)
    return None


def run(suite):
    """Rows of the part."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "config.json").write_text(json.dumps(dict(CONFIG, **(TINY if suite.tiny else {}))))
        # Any tokenizer: prompts are ids, and what answers say is of no interest.
        for file in (suite.folder / "tokenizer").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return serve(suite, folder)


def serve(suite, model):
    binary, port = str(suite.folder / "bin" / "mirai"), free_port()
    rows_at_once = max(load[0] for load in (TINY_LOADS if suite.tiny else LOADS))
    command = [binary, "serve", "--model", str(model), "--load-format", "dummy", "--device", "cuda", "--quantization", "fp8",
               "--kv-cache-dtype", "fp8", "--port", str(port), "--max-num-seqs", str(rows_at_once),
               "--max-num-batched-tokens", "64" if suite.tiny else "4096", "--max-model-len", "256" if suite.tiny else "4096",
               "--no-enable-prefix-caching"]
    log = model / "server.log"
    with log.open("w") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return [{"row": "server", "case": "start", "error": f"{binary}: {error.strerror}"}]
    try:
        url = f"http://127.0.0.1:{port}"
        seconds = wait_until_ready(process, url, suite.deadline.left(240))
        if seconds is None:
            return [{"row": "server", "case": "start", "error": "not ready: " + log.read_text()[-2000:]}]
        rows = [{"row": "ready", "seconds": seconds, "command": " ".join(command)}]
        for index, load in enumerate(TINY_LOADS if suite.tiny else LOADS):
            rows.append(measure(suite, binary, url, load, model / f"bench-{index}.json"))
            if process.poll() is not None:
                rows.append({"row": "server", "case": "server", "error": "ended: " + log.read_text()[-2000:]})
                break
        return rows
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            machine.kill(process)


def measure(suite, binary, url, load, file):
    """One load."""
    at_once, requests, prompt, answer = load
    case = f"{at_once} at once, {prompt} in, {answer} out, {requests} requests"
    vocab = TINY["vocab_size"] if suite.tiny else CONFIG["vocab_size"]
    command = [binary, "bench", "--url", url, "--input-len", prompt, "--output-len", answer, "--num-prompts", requests,
               "--concurrency", at_once, "--ignore-eos", "--warmup", min(4, requests), "--token-ids", f"3:{vocab - 1}",
               "--json", file]
    before = machine.joules()
    code, output = machine.run([str(word) for word in command], suite.deadline.left())
    after = machine.joules()
    row = {"row": "server", "case": case, "command": " ".join(str(word) for word in command[1:])}
    if code != 0 or not file.is_file():
        return dict(row, error=f"the client ended with {code}: {output[-1500:]}")
    report = json.loads(file.read_text())
    row.update({key: value for key, value in report.items() if key in KEPT or key.endswith("_ms")})
    row["pass"] = report["failed"] == 0 and report["completed"] == requests
    if before is not None and after is not None and report["total_output_tokens"]:
        row["joules_per_token"] = (after - before) / report["total_output_tokens"]
    bounds = suite.rows("bound", "--shape", SHAPE, "--batch", at_once, "--prompt", prompt, "--answer", answer,
                        *suite.rates(), most=30)
    bound = next((found["tokens_per_s"] for found in bounds if found["row"] == "bound"), None)
    if bound:
        fraction = report["output_throughput"] / bound
        row.update(bound=bound, fraction=fraction, impossible=fraction > 1.03)
    return row
