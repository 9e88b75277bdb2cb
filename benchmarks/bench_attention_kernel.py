"""The attention kernel's static cycles with its default blocks, per chip and shape, against what the matrix units allow.

No TPU is needed: the kernel is compiled ahead of time and its bundles are counted (wan_common/kernel_cycles.py). The
first run compiles for minutes; later ones read the cache.

    python -m benchmarks.bench_attention_kernel --chips v6e --shapes 14B-720p 14B-480p
"""

from __future__ import annotations

import argparse
import json

from wan_common.kernel_cycles import CHIPS, KernelCycles, KernelShape, as_json, floor_cycles, splash_cycles

# One device's share with the heads over 4 devices: 14B has 40 heads, 1.3B 12, both of 128.
SHAPES = {
    "14B-720p": KernelShape(heads=10, q_len=75600, kv_len=75600),
    "14B-480p": KernelShape(heads=10, q_len=32760, kv_len=32760),
    "1.3B-480p": KernelShape(heads=3, q_len=32760, kv_len=32760),
    "14B-720p-cross": KernelShape(heads=10, q_len=75600, kv_len=512),
}


def ceiling(chip: str) -> str:
    """One line: peak, and the share of it that attention with head_dim 128 can reach."""
    peak = CHIPS[chip].bf16_flops / CHIPS[chip].cores / 1e12
    share = 4 * 1024**2 * 128 / CHIPS[chip].flops_per_cycle / floor_cycles(chip, 1024, 1024, 128)
    return f"{chip}: {peak:.0f} TFLOP/s a core, ceiling for head_dim 128 {peak * share:.0f} ({share:.2f} of peak)"


def row(name: str, r: KernelCycles) -> str:
    """One line of the Markdown table."""
    return (
        f"| {r.chip} | {name} | {', '.join(map(str, r.blocks))} | {r.step:,} | {r.roofline:.3f} | "
        f"{r.roofline_with_overhead:.3f} | {r.units['MXU']:.2f} | {r.units['VSPILL']:.2f} | {r.grid_cycles / 1e6:.2f} | "
        f"{r.seconds * 1e3:.2f} | {r.hbm_seconds * 1e3:.2f} |"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the ceilings, the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    args = parser.parse_args(argv)
    for chip in args.chips:
        print(ceiling(chip))
    print("\n| chip | shape (a device) | blocks | bundles a step | roofline | with overhead | MXU | spills "
          "| whole grid, Mcycles | predicted ms | of HBM ms |")  # fmt: skip
    print("|" + " --- |" * 11)
    results = []
    for name in args.shapes:
        for chip in args.chips:
            result = splash_cycles(chip, SHAPES[name])
            print(row(name, result), flush=True)
            results.append({"name": name, **as_json(result)})
    print(json.dumps({"benchmark": "attention_kernel", "results": results}))


if __name__ == "__main__":
    main()
