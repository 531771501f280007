"""For each alert: series on which it fires, and series on which it keeps silent, in promtool's notation.

A case is (series -> values at one-minute steps, minute at which it is looked at, labels of the alert beside its severity).
Where it keeps silent there are no labels. `JOB` and `POD` stand for the labels that a scrape adds.
"""

JOB = 'job="mirai"'
POD = 'job="mirai",instance="a"'
ONE = {"job": "mirai", "instance": "a"}
ALL = {"job": "mirai"}


def requests(bad, good):
    """Posted requests: so many more 5xx and 2xx each minute, for seven hours."""
    name = f'mirai_http_requests_total{{{POD},method="POST",route="/v1/completions",status='
    return {f'{name}"5xx"}}': f"0+{bad}x420", f'{name}"2xx"}}': f"0+{good}x420"}


def refusals(reason, refused, taken):
    return {
        f'mirai_requests_refused_total{{{POD},reason="{reason}"}}': f"0+{refused}x60",
        f'mirai_http_requests_total{{{POD},method="POST",status="2xx"}}': f"0+{taken}x60",
    }


def histogram(name, edges):
    """Cumulative counts a minute by upper edge."""
    return {f'{name}_bucket{{{POD},le="{le}"}}': f"0+{n}x60" for le, n in edges.items()}


def counter(name, values, labels=""):
    return {f"{name}{{{POD}{labels}}}": values}


def energy(before, after):
    """Joules a minute on the day before and now, at a steady 100 tokens a minute."""
    joules = f"0+{before}x1440 {before * 1440}+{after}x240"
    return {f"mirai_energy_joules_total{{{POD},state=\"attributed\"}}": joules, f"mirai_generation_tokens_total{{{POD}}}": "0+100x1700"}


CASES = {
    "MiraiAbsent": [({}, 10, ALL), ({f"up{{{POD}}}": "1x20"}, 10, None), ({f'up{{job="other"}}': "1x20"}, 10, ALL)],
    "MiraiDown": [(counter("up", "1x5 0x10"), 10, ONE), (counter("up", "1x5 0 1x10"), 10, None)],
    "MiraiNotReady": [
        (counter("mirai_ready", "0x40") | counter("mirai_draining", "0x40"), 30, ONE),
        (counter("mirai_ready", "0x10 1x40") | counter("mirai_draining", "0x40"), 30, None),
        (counter("mirai_ready", "0x40") | counter("mirai_draining", "1x40"), 30, None),
    ],
    "MiraiErrorBudgetFast": [(requests(2, 98), 70, ALL), (requests(1, 99), 70, None), (requests(0, 0), 70, None)],
    "MiraiErrorBudgetSlow": [(requests(1, 99), 400, ALL), (requests(1, 999), 400, None)],
    "MiraiRefusing": [
        (refusals("max_num_queued_reqs", 10, 90), 30, ALL),
        (refusals("max_num_queued_reqs", 1, 99), 30, None),
        (refusals("draining", 50, 50), 30, None),
    ],
    "MiraiAcceptErrors": [
        (counter("mirai_http_accept_errors_total", "0x5 3x20"), 8, ONE),
        (counter("mirai_http_accept_errors_total", "3x30"), 20, None),
    ],
    "MiraiFileRefused": [
        (counter("mirai_file_reloads_total", "0x5 1x20", ',files="api_keys",result="refused"'), 10,
         ONE | {"files": "api_keys", "result": "refused"}),
        (counter("mirai_file_reloads_total", "0x5 1x20", ',files="api_keys",result="taken"'), 10, None),
    ],
    "MiraiQueueGrowing": [
        (counter("mirai_oldest_queued_seconds", "0x5 31+60x20"), 15, ALL),
        (counter("mirai_oldest_queued_seconds", "0x5 45 0 45 0 45 0 45 0 45 0 45 0"), 15, None),
    ],
    "MiraiFirstTokenSlow": [
        (histogram("mirai_time_to_first_token_seconds", {"5.0": 90, "10.0": 100, "+Inf": 100}), 30, ALL),
        (histogram("mirai_time_to_first_token_seconds", {"5.0": 96, "10.0": 100, "+Inf": 100}), 30, None),
    ],
    "MiraiTokensSlow": [
        (histogram("mirai_inter_token_latency_seconds", {"0.2": 90, "0.3": 100, "+Inf": 100}), 30, ALL),
        (histogram("mirai_inter_token_latency_seconds", {"0.2": 99, "0.3": 100, "+Inf": 100}), 30, None),
    ],
    "MiraiMemoryFull": [
        (counter("mirai_kv_usage_ratio", "0.97x40") | counter("mirai_preemptions_total", "0+3x40"), 30, ONE),
        (counter("mirai_kv_usage_ratio", "0.97x40") | counter("mirai_preemptions_total", "7x40"), 30, None),
        (counter("mirai_kv_usage_ratio", "0.9x40") | counter("mirai_preemptions_total", "0+3x40"), 30, None),
    ],
    "MiraiEngineStalled": [
        (counter("mirai_sequences_running", "4x20") | counter("mirai_engine_steps_total", "0+90x5 450x20"), 12, ONE),
        (counter("mirai_sequences_running", "4x20") | counter("mirai_engine_steps_total", "0+90x20"), 12, None),
        (counter("mirai_sequences_running", "0x20") | counter("mirai_engine_steps_total", "450x20"), 12, None),
    ],
    "MiraiIntegrityFailure": [
        (counter("mirai_integrity_failures_total", "0x5 1x60"), 10, ONE),
        (counter("mirai_integrity_failures_total", "0x60"), 10, None),
    ],
    "MiraiPanic": [(counter("mirai_panics_total", "0x5 1x60"), 10, ONE), (counter("mirai_panics_total", "1x90"), 80, None)],
    "MiraiCorrupted": [
        (counter("mirai_corrupted_choices_total", "0x5 2x60"), 10, ONE),
        (counter("mirai_corrupted_choices_total", "2x90"), 80, None),
    ],
    "MiraiWasting": [
        (counter("mirai_wasted_tokens_total", "0+30x90") | counter("mirai_engine_step_tokens_total", "0+100x90"), 70, ALL),
        (counter("mirai_wasted_tokens_total", "0+10x90") | counter("mirai_engine_step_tokens_total", "0+100x90"), 70, None),
    ],
    "MiraiLedgerSpooling": [
        (counter("mirai_ledger_health", "0x5 1x20"), 15, ONE),
        (counter("mirai_ledger_health", "0x5 1x3 0x20"), 15, None),
    ],
    "MiraiLedgerStopped": [
        (counter("mirai_ledger_health", "0x5 2x20"), 10, ONE),
        (counter("mirai_ledger_health", "0x5 4x20"), 10, ONE),
        (counter("mirai_ledger_health", "0x5 1x20"), 10, None),
    ],
    "MiraiLedgerSpoolLarge": [
        (counter("mirai_ledger_spool_bytes", "0+4000000x30"), 20, ONE),
        (counter("mirai_ledger_spool_bytes", "33000000x30"), 20, None),
    ],
    "MiraiLedgerFenced": [
        (counter("mirai_ledger_fenced_total", "0x5 1x60"), 10, ONE),
        (counter("mirai_ledger_fenced_total", "1x90"), 80, None),
    ],
    "MiraiLedgerSlow": [
        (histogram("mirai_ledger_commit_seconds", {"0.25": 90, "1.0": 100, "+Inf": 100}), 30, ALL),
        (histogram("mirai_ledger_commit_seconds", {"0.25": 100, "1.0": 100, "+Inf": 100}), 30, None),
    ],
    "MiraiIdentityUnavailable": [
        (counter("mirai_identity_decisions_total", "0+2x30", ',credential="jwt",decision="unavailable"'), 20, ALL),
        (counter("mirai_identity_decisions_total", "0+2x30", ',credential="jwt",decision="refused"'), 20, None),
    ],
    "MiraiQuotaAway": [
        (counter("mirai_quota_health", "0x5 1x20"), 15, ONE),
        (counter("mirai_quota_health", "0x5 1x3 0x20"), 15, None),
    ],
    "MiraiGpuFault": [(counter("mirai_gpu_last_xid", "0x5 79x5"), 8, ONE), (counter("mirai_gpu_last_xid", "0x10"), 8, None)],
    "MiraiGpuIdle": [
        (counter("mirai_engine_steps_total", "5x120") | counter("mirai_gpu_power_watts", "70x120"), 110, ONE),
        (counter("mirai_engine_steps_total", "0+1x120") | counter("mirai_gpu_power_watts", "70x120"), 110, None),
        (counter("mirai_engine_steps_total", "5x120"), 110, None),
    ],
    "MiraiEnergyPerToken": [(energy(500, 800), 1600, ALL), (energy(500, 600), 1600, None)],
}
