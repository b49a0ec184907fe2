"""Goals of the ratios, and a table of results."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["GOALS", "table"]

# (benchmark, key) -> ("<=" or ">=", goal, description). Ratios are loraseg over the other.
GOALS: Mapping[tuple[str, str], tuple[str, float, str]] = {
    ("fused_forward", "one_crop_vs_base"): ("<=", 1.10, "8 images, 8 mixes, one crop"),
    ("fused_forward", "five_crop_vs_base"): ("<=", 1.04, "five crops of one mix"),
    ("fused_forward", "decoder_vs_base"): ("<=", 1.02, "the aggregator's layers"),
    ("fused_forward", "vs_peft_loop_n20"): ("<=", 0.90, "peft's loop, 20 adapters loaded"),
    ("fused_forward", "vs_peft_loop_n100"): ("<=", 0.80, "peft's loop, 100 adapters loaded"),
    ("fused_forward", "bookkeeping_vs_peft_n20"): ("<=", 0.03, "all but products, 20 loaded"),
    ("fused_forward", "bookkeeping_vs_peft_n100"): ("<=", 0.01, "all but products, 100 loaded"),
    ("fused_forward", "rms_vs_f64_over_base"): ("<=", 2.0, "error against float64"),
    ("library_scale", "n10000_vs_n20"): ("<=", 1.05, "time of an image, 10,000 adapters"),
    ("library_scale", "add_1000th_vs_2nd"): ("<=", 1.20, "adding the 1,000th adapter"),
    ("retrieval", "batch32_vs_gemm"): ("<=", 1.30, "32 queries, 100,000 centroids"),
    ("retrieval", "batch32_vs_faiss_flat"): ("<=", 0.30, "the same against faiss"),
    ("retrieval", "single_vs_one_pass"): ("<=", 1.30, "one query against one pass"),
    ("catseg_decoder", "speedup_c19"): (">=", 6.1, "decoder, 19 classes"),
    ("catseg_decoder", "speedup_c59"): (">=", 1.6, "decoder, 59 classes"),
    ("catseg_decoder", "speedup_c150"): (">=", 1.1, "decoder, 150 classes"),
    ("text_bank", "speedup_c150"): (">=", 11.9, "adapted text of 150 classes"),
    ("sampler", "vs_stock_off"): ("<=", 1.0, "5 images against the stock pipeline"),
    ("sampler", "region_on_vs_off"): ("<=", 1.10, "region attention on against off"),
    ("vote", "speedup_vs_scipy_k5"): (">=", 30, "relative filtering, 5 images of a mask"),
    ("vote", "speedup_vs_torch_k5"): (">=", 6, "the same against torch.mode"),
    ("synth_overhead", "ray_vs_loop"): (">=", 0.95, "pairs per second against a local loop"),
    ("synth_overhead", "rss_20k_vs_2k"): ("<=", 1.20, "memory of 20,000 masks against 2,000"),
    ("endpoint", "vs_official"): ("<=", 0.50, "the API against the official procedure"),
    ("endpoint", "http_overhead_b8"): ("<=", 1.10, "8 images over HTTP against the bare engine"),
    ("endpoint", "served_n10000_vs_n20"): ("<=", 1.05, "8 images over HTTP, 10,000 adapters"),
}


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return all figures as a Markdown table, with their goals."""
    lines = ["| benchmark | figure | value | goal | |", "|---|---|---|---|---|"]
    for result in results:
        name = str(result["bench"])
        for key, value in result["ratios"].items():
            sign, goal, meaning = GOALS.get((name, key), ("", None, ""))
            verdict = ""
            if goal is not None:
                met = value <= goal if sign == "<=" else value >= goal
                verdict = "met" if met else "MISSED"
            target = "" if goal is None else f"{sign} {goal:g}"
            lines.append(f"| {name} | {key} | {value:g} | {target} | {verdict} {meaning} |")
        for key, holds in result["checks"].items():
            lines.append(f"| {name} | {key} | {holds} | True | {'met' if holds else 'MISSED'} |")
    return "\n".join(lines) + "\n"
