"""Which block sizes of the attention kernel are best for a chip, by compiling candidates and counting static cycles.

The default table in ``custom_splash_attention.py`` is what this search found (docs/KERNEL.md has its rows).

    python -m wan_common.block_search --topology v6e:2x4 --heads 10 --q_len 75600
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from custom_splash_attention import SHORT_KEYS, BlockSizes, fit_block_sizes
from wan_common.kernel_cycles import KernelCompileError, KernelCycles, KernelShape, as_json, chip_of, splash_cycles

logger = logging.getLogger("block_search")

Blocks = tuple[int, int, int, int]
# Queries x keys of a step: below, the pipeline around it weighs more than 5%; above, one compilation takes minutes.
LEAST_STEP, MOST_STEP = 2**20, 2**23
CANDIDATE_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Block sizes with their cycles, or with the reason they were rejected."""

    blocks: Blocks
    cycles: KernelCycles | None
    rejected: str | None = None

    @property
    def seconds(self) -> float:
        """Predicted seconds of the whole grid on one device; infinity if rejected."""
        return self.cycles.seconds if self.cycles else float("inf")


def search_blocks(topology: str, shape: KernelShape, candidates: Iterable[Blocks] | None = None) -> list[Candidate]:
    """Candidates by predicted seconds, best first, the rejected last with the compiler's reason.

    Without ``candidates``: every pair of block_q and block_kv with 512 keys a tile, then other tiles for the best two
    pairs; about 15 compilations of 5 to 60 seconds each, kept in the cache of :mod:`wan_common.kernel_cycles`.

    Raises:
        UsageError: unknown chip.
    """
    chip = chip_of(topology)
    if candidates is not None:
        return _rank(topology, shape, dict.fromkeys(_fit(c, shape) for c in candidates))
    if shape.kv_len <= SHORT_KEYS:
        keys = -(-shape.kv_len // 128) * 128
        return _rank(topology, shape, dict.fromkeys(_fit((q, keys, keys, keys), shape) for q in (1024, 2048, 4096, 8192)))
    logger.info("searching block sizes for %s: %s", chip, shape)
    found = _rank(topology, shape, dict.fromkeys(_pairs(shape)))
    refined: dict[Blocks, None] = {}
    for best in [c for c in found if c.cycles][:2]:
        q, kv = best.blocks[:2]
        tiles = ((256, 256), (512, 256), (1024, 1024), (1024, 512))
        refined |= dict.fromkeys(_fit((q, kv, *tile), shape) for tile in tiles if kv % tile[0] == 0)
    tried = {c.blocks for c in found}
    found += _rank(topology, shape, [blocks for blocks in refined if blocks not in tried])
    return sorted(found, key=lambda c: c.seconds)


def _fit(blocks: Blocks, shape: KernelShape) -> Blocks:
    fitted = fit_block_sizes(BlockSizes(*blocks), shape.q_len, shape.kv_len)
    return dataclasses.astuple(fitted)


def _pairs(shape: KernelShape) -> Iterator[Blocks]:
    for q in (512, 1024, 2048, 4096):
        for kv in (1024, 2048, 4096, 8192):
            if LEAST_STEP <= q * kv <= MOST_STEP:
                yield _fit((q, kv, 512, 512), shape)


def _rank(topology: str, shape: KernelShape, candidates: Iterable[Blocks]) -> list[Candidate]:
    found = []
    for blocks in tqdm(list(candidates), desc=f"{chip_of(topology)} blocks", unit="kernel"):
        try:
            found.append(Candidate(blocks, splash_cycles(topology, shape, blocks, timeout=CANDIDATE_SECONDS)))
        except KernelCompileError as error:
            found.append(Candidate(blocks, None, str(error)))
    return sorted(found, key=lambda c: c.seconds)


def table(found: list[Candidate]) -> str:
    """The search's result as a Markdown table."""
    lines = [
        "| block_q | block_kv | compute | inner | bundles a step | roofline | with overhead | whole grid, Mcycles |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in found:
        sizes = " | ".join(str(x) for x in c.blocks)
        if c.cycles is None:
            lines.append(f"| {sizes} | rejected: {c.rejected} | | | |")
            continue
        r = c.cycles
        lines.append(f"| {sizes} | {r.step:,} | {r.roofline:.3f} | {r.roofline_with_overhead:.3f} | {r.grid_cycles / 1e6:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Search for one shape; prints the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x4")
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--q_len", type=int, default=75600)
    parser.add_argument("--kv_len", type=int, default=None)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--blocks", action="append", help="BQ,BKV,COMPUTE,INNER; repeat; default: the built-in search")
    args = parser.parse_args(argv)
    shape = KernelShape(args.heads, args.q_len, args.kv_len or args.q_len, args.head_dim)
    candidates: list[Blocks] | None = None
    if args.blocks:
        candidates = [(q, kv, c, i) for q, kv, c, i in ([int(x) for x in text.split(",")] for text in args.blocks)]
    found = search_blocks(args.topology, shape, candidates)
    print(table(found))
    best = found[0]
    print(json.dumps({"blocks": best.blocks, **(as_json(best.cycles) if best.cycles else {"rejected": best.rejected})}))


if __name__ == "__main__":
    main()
