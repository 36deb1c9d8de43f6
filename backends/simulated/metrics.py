"""``/metrics`` in Prometheus' text format, with vLLM's names."""

from __future__ import annotations

from .node import Node


def metrics_text(node: Node, model: str) -> bytes:
    """Write a node's metrics.

    Args:
        node: The node.
        model: The model's name, a label of every metric.

    Returns:
        The text.
    """
    counts = node.counts
    gauges = {
        "num_requests_running": node.running,
        "num_requests_waiting": node.waiting,
        "kv_cache_usage_perc": node.running / node.slots,
    }
    counters = {
        "prompt_tokens": counts.prompt_tokens,
        "generation_tokens": counts.completion_tokens,
        "num_preemptions": 0,
        "prefix_cache_queries": counts.prompt_tokens,
        "prefix_cache_hits": 0,
    }
    label = model.replace("\\", "\\\\").replace('"', '\\"')
    base = f'engine="0",model_name="{label}"'
    lines: list[str] = []
    for name, value in gauges.items():
        lines += [f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{base}}} {float(value)}"]
    lines.append("# TYPE vllm:num_requests_waiting_by_reason gauge")
    for reason, value in (("capacity", node.waiting), ("deferred", 0)):
        lines.append(
            f'vllm:num_requests_waiting_by_reason{{{base},reason="{reason}"}} {float(value)}'
        )
    for name, value in counters.items():
        lines += [f"# TYPE vllm:{name} counter", f"vllm:{name}_total{{{base}}} {float(value)}"]
    lines.append("# TYPE vllm:request_success counter")
    for reason in ("stop", "length", "abort", "error", "repetition"):
        lines.append(
            f'vllm:request_success_total{{{base},finished_reason="{reason}"}} '
            f"{float(counts.finished[reason])}"
        )
    rejected = float(counts.refused["503"])
    lines.append("# TYPE vllm:admission_rejections counter")
    lines.append(
        f'vllm:admission_rejections_total{{{base},reason="max_num_queued_reqs"}} {rejected}'
    )
    return ("\n".join(lines) + "\n").encode()
