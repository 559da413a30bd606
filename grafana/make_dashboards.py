#!/usr/bin/env python3
"""Write grafana/dashboards/*.json: the two dashboards as data here, as Grafana's JSON there.

    python grafana/make_dashboards.py            # writes them
    python grafana/make_dashboards.py --check    # fails when the files differ

Each panel: (title, what it says, unit, [(PromQL, legend)], kind).  $__rate_interval is Grafana's; $adapter and $instance are variables.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
I = 'instance=~"$instance"'
A = f'adapter=~"$adapter",{I}'


# Counted by adapter: what a label that was lost had counted goes to the label "(former)" all at once, which is no rate.
BY_ADAPTER = ("polylora_http_requests_total", "polylora_requests_total", "polylora_prompt_tokens_total", "polylora_cached_prompt_tokens_total",
              "polylora_output_tokens_total", "polylora_adapter_", "polylora_alias_requests_total")


def counted(metric, labels):
    is_by_adapter = metric.startswith(BY_ADAPTER) and not metric.startswith("polylora_adapter_load_seconds")
    return f'{labels},adapter!="(former)"' if is_by_adapter else labels


def rate(metric, labels=I, by=""):
    labels = counted(metric, labels)
    inner = f"sum {f'by ({by}) ' if by else ''}(rate({metric}{{{labels}}}[$__rate_interval]))"
    return inner


def quantile(q, metric, labels=I, by=""):
    by = f"le, {by}" if by else "le"
    labels = counted(metric, labels)
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{{{labels}}}[$__rate_interval])))"


def hit_rate(tier, by=""):
    hits = rate("polylora_adapter_cache_hits_total", f'tier="{tier}",{A}', by)
    misses = rate("polylora_adapter_cache_misses_total", f'tier="{tier}",{A}', by)
    return f"{hits} / ({hits} + {misses})"


OVERVIEW = [
    ("Traffic", [
        ("Sequences ended", "By outcome; errors are the server's, not the clients'.", "reqps",
         [(rate("polylora_requests_total", I, "outcome"), "{{outcome}}")], "timeseries"),
        ("HTTP answers", "By status.", "reqps", [(rate("polylora_http_requests_total", I, "status"), "{{status}}")], "timeseries"),
        ("Tokens", "Prompt tokens include those found in the prefix cache.", "short",
         [(rate("vllm:prompt_tokens_total"), "prompt"), (rate("vllm:generation_tokens_total"), "generated")], "timeseries"),
        ("Running and waiting", "Waiting for long means more work than the batch can hold.", "short",
         [(f"sum(vllm:num_requests_running{{{I}}})", "running"), (f"sum(vllm:num_requests_waiting{{{I}}})", "waiting")], "timeseries"),
    ]),
    ("Latency", [
        ("Time to first token", "From arrival, the queue included.", "s",
         [(quantile(q, "vllm:time_to_first_token_seconds"), f"p{round(q * 100)}") for q in (0.5, 0.9, 0.99)], "timeseries"),
        ("Time between tokens", "", "s", [(quantile(q, "vllm:inter_token_latency_seconds"), f"p{round(q * 100)}") for q in (0.5, 0.9, 0.99)], "timeseries"),
        ("Time to first token, distribution", "", "s", [(rate("vllm:time_to_first_token_seconds_bucket", I, "le"), "{{le}}")], "heatmap"),
        ("Time between tokens, distribution", "", "s", [(rate("vllm:inter_token_latency_seconds_bucket", I, "le"), "{{le}}")], "heatmap"),
        ("Queue and prefill", "What a first token waits for.", "s",
         [(quantile(0.99, "vllm:request_queue_time_seconds"), "queue p99"), (quantile(0.99, "vllm:request_prefill_time_seconds"), "prefill p99")],
         "timeseries"),
        ("End to end", "", "s", [(quantile(q, "vllm:e2e_request_latency_seconds"), f"p{round(q * 100)}") for q in (0.5, 0.99)], "timeseries"),
    ]),
    ("Engine", [
        ("KV blocks", "Cached blocks are given up when running requests need them.", "short",
         [(f"sum by (state) (polylora_kv_blocks{{{I}}})", "{{state}}")], "timeseries"),
        ("Prefix cache hit rate", "Share of prompt tokens that were not computed again.", "percentunit",
         [(f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "hit rate")], "timeseries"),
        ("Preemptions", "Sequences pushed back for want of KV blocks: their prompt is computed again.", "short",
         [(rate("vllm:num_preemptions_total"), "preemptions / s")], "timeseries"),
        ("Steps", "Batches a second.", "short", [(rate("polylora_steps_total"), "steps / s")], "timeseries"),
        ("Batch", "Mean sequences and rows of a step; a prompt's chunk has many rows.", "short",
         [(f"{rate('polylora_step_sequences_sum')} / {rate('polylora_step_sequences_count')}", "sequences"),
          (f"{rate('polylora_step_rows_sum')} / {rate('polylora_step_rows_count')}", "rows")], "timeseries"),
        ("Memory of the process", "", "bytes", [(f"process_resident_memory_bytes{{{I}}}", "{{instance}}")], "timeseries"),
        ("Healthy", "0: the device failed and the process must be restarted.", "short", [(f"min(polylora_engine_healthy{{{I}}})", "healthy")], "stat"),
    ]),
]
ADAPTERS = [
    ("Cache", [
        ("Hit rate by tier", "device: ready for a batch; host: a copy away. A miss in both is read from disk.", "percentunit",
         [(hit_rate("device"), "device"), (hit_rate("host"), "host")], "timeseries"),
        ("Device hit rate by adapter", "", "percentunit", [(f"bottomk(10, {hit_rate('device', 'adapter')})", "{{adapter}}")], "timeseries"),
        ("Adapters by state", "Each adapter is counted in the highest state it has.", "short",
         [(f"sum by (state) (polylora_adapters{{{I}}})", "{{state}}")], "timeseries"),
        ("Resident bytes", "By tier, with what the device may hold.", "bytes",
         [(f"sum by (tier) (polylora_adapter_resident_bytes{{{I}}})", "{{tier}}"), (f"sum(polylora_adapter_capacity_bytes{{{I}}})", "device capacity")],
         "timeseries"),
        ("Residency", "1 while an adapter is in memory, by level.", "short",
         [(f'max by (adapter_name, level) (vllm:lora_adapter_loaded{{adapter_name=~"$adapter",{I}}})', "{{adapter_name}} {{level}}")], "state-timeline"),
        ("Uploads and evictions", "Both high: more hot adapters than the device holds.", "short",
         [(rate("polylora_device_adapter_uploads_total"), "uploads / s"), (rate("polylora_device_adapter_evictions_total"), "evictions / s")], "timeseries"),
    ]),
    ("Loading", [
        ("Load time", "By stage: fetch (find or download the files), pack (read, check, pack into host memory), upload (copy to the device).", "s",
         [(quantile(q, "polylora_adapter_load_seconds", by="stage"), f"{{{{stage}}}} p{round(q * 100)}") for q in (0.5, 0.99)], "timeseries"),
        ("Loads", "An error is an adapter that was refused.", "short", [(rate("polylora_adapter_loads_total", I, "outcome"), "{{outcome}}")], "timeseries"),
        ("Loads by adapter", "An adapter that is loaded again and again shares too little host memory with too many.", "short",
         [(f"topk(10, {rate('polylora_adapter_loads_total', A, 'adapter')})", "{{adapter}}")], "timeseries"),
        ("Uploads and evictions by adapter", "", "short",
         [(f"topk(10, {rate('polylora_adapter_uploads_total', A, 'adapter')})", "{{adapter}} uploaded"),
          (f"topk(10, {rate('polylora_adapter_evictions_total', A, 'adapter, tier')})", "{{adapter}} left {{tier}}")], "timeseries"),
    ]),
    ("Use", [
        ("Top adapters by generated tokens", "", "short", [(f"topk(10, {rate('polylora_output_tokens_total', A, 'adapter')})", "{{adapter}}")], "timeseries"),
        ("Requests by adapter and status", "429 and 503 are the clients' to repeat.", "reqps",
         [(f"topk(10, {rate('polylora_http_requests_total', A + ',adapter!=' + chr(34) * 2, 'adapter, status')})", "{{adapter}} {{status}}")], "timeseries"),
        ("Alias traffic", "Requests that named an alias, by the adapter that answered.", "reqps",
         [(rate("polylora_alias_requests_total", A, "alias, adapter"), "{{alias}} → {{adapter}}")], "timeseries"),
        ("Alias shares", "Part of an alias's callers that each adapter answers.", "percentunit",
         [(f"avg by (alias, adapter) (polylora_alias_share{{{A}}})", "{{alias}} → {{adapter}}")], "timeseries"),
        ("Sequences by adapter", "", "reqps", [(f"topk(10, {rate('polylora_requests_total', A, 'adapter')})", "{{adapter}}")], "timeseries"),
        ("Time to first token by adapter, p99", "", "s", [(quantile(0.99, "polylora_adapter_time_to_first_token_seconds", A, "adapter"), "{{adapter}}")],
         "timeseries"),
        ("Prefix hit rate by adapter", "A prefix is shared only within one version of one adapter.", "percentunit",
         [(f"{rate('polylora_cached_prompt_tokens_total', A, 'adapter')} / {rate('polylora_prompt_tokens_total', A, 'adapter')}", "{{adapter}}")], "timeseries"),
        ("Requests in flight by adapter", "What unloading an adapter would wait for.", "short",
         [(f"sum by (adapter) (polylora_adapter_leases{{{A}}})", "{{adapter}}")], "timeseries"),
        ("Adapters in the running batch", "Of as many as one batch may have.", "short",
         [(f"sum(sglang:lora_pool_slots_used{{{I}}})", "running"), (f"sum(sglang:lora_pool_slots_total{{{I}}})", "limit")], "timeseries"),
    ]),
]


def variable(name, query, label):
    return {"name": name, "label": label, "type": "query", "query": {"query": query, "refId": name}, "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "refresh": 2, "sort": 1}


def dashboard(uid, title, description, rows, variables):
    panels, y, number = [], 0, 0
    for row, contents in rows:
        number += 1
        panels.append({"id": number, "type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for index, (name, text, unit, queries, kind) in enumerate(contents):
            number += 1
            panel = {
                "id": number, "type": kind, "title": name, "description": text, "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "gridPos": {"x": index % 2 * 12, "y": y + index // 2 * 8, "w": 12, "h": 8},
                "targets": [{"refId": chr(ord("A") + n), "expr": query, "legendFormat": legend, "datasource": {"type": "prometheus", "uid": "${datasource}"},
                             **({"format": "heatmap"} if kind == "heatmap" else {})} for n, (query, legend) in enumerate(queries)],
                "fieldConfig": {"defaults": {"unit": unit, **({"min": 0} if kind == "timeseries" else {}), **({"max": 1} if unit == "percentunit" else {})},
                                "overrides": []},
                "options": {},
            }
            if kind == "heatmap":
                panel["options"] = {"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Oranges"}}
            panels.append(panel)
        y += (len(contents) + 1) // 2 * 8
    return {
        "uid": uid, "title": title, "description": description, "tags": ["polylora"], "schemaVersion": 39, "version": 1, "editable": True, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "timezone": "", "graphTooltip": 1, "panels": panels,
        "templating": {"list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}, *variables]},
    }


INSTANCE = variable("instance", "label_values(polylora_engine_healthy, instance)", "Instance")
DASHBOARDS = {
    "overview.json": dashboard("polylora-overview", "polylora: overview", "Traffic, latency and the engine.", OVERVIEW, [INSTANCE]),
    "adapters.json": dashboard("polylora-adapters", "polylora: adapters", "Where adapters are, how often they are found there, and who uses them.", ADAPTERS,
                               [INSTANCE, variable("adapter", "label_values(polylora_requests_total, adapter)", "Adapter")]),
}


def main():
    for name, content in DASHBOARDS.items():
        path, text = os.path.join(HERE, "dashboards", name), json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if "--check" in sys.argv[1:]:
            with open(path, encoding="utf-8") as file:
                if file.read() != text:
                    sys.exit(f"{path} differs from what grafana/make_dashboards.py writes")
        else:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)


if __name__ == "__main__":
    main()
