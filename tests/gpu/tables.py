"""Markdown tables of the suite's results, and the judgement of a whole part."""


def number(value, digits=3):
    """A figure as short as it can be read; a dash where there is none."""
    if value is None or isinstance(value, (str, bool)):
        return "-" if value is None else str(value)
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(head, lines):
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [head, rule, *lines]) + "\n"


def of(part, kind):
    return [row for row in part["rows"] if row.get("row") == kind]


def verdict(row):
    if row.get("impossible"):
        return "IMPOSSIBLE"
    if row.get("error"):
        return "FAILED: " + str(row["error"]).replace("\n", " ").replace("|", "/")[:120]
    return {True: "ok", False: "MISSED", None: ""}[row.get("pass")]


def faults(part):
    """What makes a part fail. A missed bar is a result; what is wrong, did not run or cannot be is a fault."""
    found = []
    for row in part["rows"]:
        name = row.get("name") or row.get("case") or row.get("layer") or row.get("row")
        if row.get("impossible"):
            found.append(f"{name}: faster than the physical limit, so the measurement is wrong")
        elif row.get("error"):
            found.append(f"{name}: {str(row['error'])[:300]}")
        elif row.get("pass") is False and row.get("row") != "step":
            found.append(f"{name}: failed")
    return found


def ceilings(part):
    lines = []
    for row in of(part, "device"):
        lines += [["read-only bandwidth", f"{row['read_bytes_per_s'] / 1e12:.3f} TB/s"],
                  ["copy, read and write", f"{row['copy_bytes_per_s'] / 1e12:.3f} TB/s"]]
        for launch in row["launches"]:
            how = ("graph" if launch["graph"] else "stream") + (", dependent launch" if launch["dependent_launch"] else "")
            lines.append([f"launch of {launch['blocks']} blocks, {how}", f"{launch['us']:.2f} us"])
    for row in of(part, "matmul rates"):
        lines += [[f"largest {kind} rate", f"{row[kind] / 1e12:.0f} TFLOP/s"] for kind in ("bf16", "e4m3")]
    text = table(["ceiling", "measured"], lines)
    products = of(part, "matmul")
    counts = sorted({row["rows"] for row in products if "rows" in row})
    layers = {(row["layer"], row["storage"]): {} for row in products if "rows" in row}
    for row in products:
        if "rows" in row:
            cell = f"{row['us']:.1f} us, {100 * row['fraction_of_bandwidth']:.0f} %, {row['flops'] / 1e12:.0f} TF"
            layers[row["layer"], row["storage"]][row["rows"]] = cell
    lines = [[name, storage, *(cells.get(n, "-") for n in counts)] for (name, storage), cells in layers.items()]
    return text + "\ncublasLt: time, share of the read bandwidth for the weight alone, TFLOP/s\n\n" + \
        table(["product", "storage", *(f"{n} rows" for n in counts)], lines)


def contract(part):
    tools = sorted({row["tool"] for row in of(part, "kernel test")})
    names = sorted({row["name"] for row in of(part, "kernel test")})
    cells = {(row["name"], row["tool"]): verdict(row) for row in of(part, "kernel test")}
    return table(["test", *tools], [[name, *(cells.get((name, tool), "-") for tool in tools)] for name in names])


def goldens(part):
    lines = []
    for row in of(part, "golden"):
        alone, mixed = row.get("alone", {}), row.get("mixed", {})
        lines.append([row["case"], row.get("expected", "-"), number(alone.get("mean")), number(alone.get("p99")),
                      number(mixed.get("mean")), number(mixed.get("p99")), number(row.get("regret")),
                      {True: "yes", False: "NO", None: "-"}[row.get("rerun_same_bits")], verdict(row)])
    return table(["case", "against", "alone: mean", "p99", "mixed: mean", "p99", "regret", "same bits again", ""], lines)


def steps(part):
    lines = []
    for row in of(part, "step"):
        lines.append([row["shape"], row["case"], number(row["median_ms"], 4), number(row["device_ms"], 4),
                      number(row["floor_ms"], 4), row["bound"], f"{100 * row['fraction']:.0f} %",
                      f"{row['times_floor']:.2f} (bar {row['bar']})", number(row["tokens_per_s"]),
                      number(row["joules_per_token"]), number(row["sm_mhz"]), verdict(row)])
    assumed = any(not row["measured"] for row in of(part, "rates"))
    note = "\nFloors from rates of an H200 that were not measured here: run `ceilings` first.\n" if assumed else ""
    loads = [[row["shape"], number(row["load_s"]), number(row["weight_bytes"] / 1e9), row["graphs"]]
             for row in of(part, "loaded")]
    return table(["shape", "case", "step ms", "device ms", "floor ms", "bound by", "of floor", "times floor", "tokens/s",
                  "J/token", "SM MHz", ""], lines) + note + "\n" + \
        table(["shape", "load to ready s", "weights GB", "graphs"], loads)


def server(part):
    lines = []
    for row in of(part, "server"):
        lines.append([row["case"], *(number(row.get(key), 4) for key in (
            "output_throughput", "bound", "fraction", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms",
            "joules_per_token")), verdict(row)])
    text = table(["case", "output tokens/s", "serial bound", "of bound", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99",
                  "J/token", ""], lines)
    return text + "".join(f"\nready after {row['seconds']:.1f} s\n" for row in of(part, "ready"))


RENDER = {"ceilings": ceilings, "contract": contract, "goldens": goldens, "steps": steps, "server": server}


def render(part):
    """A part as Markdown."""
    facts = [f"commit {part['commit']}", f"driver {part['device'].get('driver_version', 'unknown')}",
             part["device"].get("name", "unknown device"),
             f"SM clock {part['device'].get('clocks.sm', '?')} before, {part['device_after'].get('clocks.sm', '?')} after",
             f"{part['seconds']:.0f} s", f"`{part['command']}`"]
    text = f"## {part['part']}\n\n" + "; ".join(facts) + "\n\n" + RENDER[part["part"]](part)
    if part["faults"]:
        text += "\nFaults:\n\n" + "".join(f"* {fault}\n" for fault in part["faults"])
    return text + "\n"
