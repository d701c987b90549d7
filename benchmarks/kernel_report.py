"""Compile every tuned Triton kernel for its architecture, without a GPU, and print what it takes of one.

    python benchmarks/kernel_report.py --json benchmarks/results/kernels.json

Registers a thread and bytes of local memory (spills) are those that NVIDIA's assembler reports for the cubin, shared
memory is Triton's. Nothing is run: these figures bound how many programs fit on a multiprocessor, they are no timings.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _report import print_table, write_json

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a program may take; the row of sm_80 also serves sm_86 and sm_89, which have 99 KiB."""
WIDTHS = {2: ("bf16", "fp16"), 4: ("fp32",)}
INTEGERS = (
    "num_tokens",
    "vocabulary",
    "hidden_size",
    "hidden_stride",
    "weight_stride",
    "blocks_per_split",
    "first_column",
    "num_columns",
    "gradient_stride",
    "splits",
    "start",
    "width",
    "num_temperatures",
)
TEMPERATURES = 32
"""Temperatures at once whose kernel is compiled: the next power of 2 above those of a calibration."""
SHAPES = ((1536, 49152, 576), (8192, 128256, 4096))
"""Tokens, vocabulary and hidden size whose traffic is reckoned: SmolLM2-135M's, Llama 3.1 8B's."""
DIVISIBLE = ("hidden_size", "hidden_stride", "weight_stride", "vocabulary", "num_columns", "gradient_stride", "width")
"""Sizes that real models have as multiples of 16, which the launcher specialises on."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, moved = list(report()), list(traffic())
    print_table("compiled, never run", rows)
    print_table("bytes moved, by arithmetic", moved)
    if arguments.json:
        worst = {"most_registers": max(row["registers"] for row in rows), "spills": sum(row["local"] for row in rows)}
        write_json(arguments.json, rows, {**worst, "traffic": moved})


def report(architectures: tuple[int, ...] = (80, 90, 100)) -> Iterator[dict[str, Any]]:
    """One row per architecture, kernel and dtype: blocks, registers, shared and local memory, tensor core instructions."""
    from calibtrain.ops import triton_kernels
    from calibtrain.ops.triton_token_stats import BLOCKS, TEMPERATURE_TERMS, TEMPERATURE_WARPS, Blocks

    for (arch, size), table in BLOCKS.items():
        if arch not in architectures:
            continue
        for dtype in WIDTHS[size]:
            for name, kernel, blocks in (
                ("statistics", triton_kernels.partial_statistics, table.statistics),
                ("statistics, few tokens", triton_kernels.partial_statistics, table.statistics_few),
                ("gradients", triton_kernels.logit_gradients, table.gradients),
            ):
                compiled = compile_kernel(kernel, arch, dtype, blocks)
                yield {
                    "sm": arch,
                    "dtype": dtype,
                    "kernel": name,
                    "tokens x ids x H": f"{blocks.tokens} x {blocks.vocabulary} x {blocks.hidden}",
                    "warps": blocks.warps,
                    "stages": blocks.stages,
                    **resources(compiled),
                }
    blocks = Blocks(1, TEMPERATURE_TERMS // TEMPERATURES, 1, TEMPERATURE_WARPS, 3)
    for arch in architectures:
        yield {
            "sm": arch,
            "dtype": "fp32",
            "kernel": f"{TEMPERATURES} temperatures",
            "tokens x ids x H": f"1 x {TEMPERATURE_TERMS // TEMPERATURES} x -",
            "warps": TEMPERATURE_WARPS,
            "stages": 3,
            **resources(compile_kernel(triton_kernels.temperature_sums, arch, "fp32", blocks)),
        }


def traffic(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> Iterator[dict[str, Any]]:
    """Bytes moved in bf16 at sizes (N, V, H), in GB, by arithmetic.

    `loaded` is what the programs ask for, most of it from the L2 cache; `memory` is what memory must deliver and take if
    the cache keeps the hidden states and a wave's share of the weight; `minimum` is every input read and every result
    written once, which no implementation undercuts.
    """
    from calibtrain.ops.triton_token_stats import BLOCKS, _backward_columns

    for arch in (80, 90, 100):
        table = BLOCKS[arch, 2]
        for tokens, vocabulary, size in shapes:
            hidden, weight, logits = 2 * tokens * size, 2 * vocabulary * size, 2 * tokens * vocabulary
            turns = -(-vocabulary // _backward_columns(tokens, vocabulary, 2, table.gradients.vocabulary))
            # The kernel writes a block, two products read it. A turn reads the hidden states twice and adds a float32
            # product to a float32 sum; the weight is read twice and its gradient written.
            backward = 3 * logits + 3 * weight + turns * (2 * hidden + 8 * hidden) + 3 * hidden
            for name, blocks, written, moved, minimum in (
                ("forward", table.statistics, 0, hidden + weight, hidden + weight),
                ("backward", table.gradients, logits, backward, 2 * (hidden + weight)),
            ):
                tiles = -(-tokens // blocks.tokens) * -(-vocabulary // blocks.vocabulary)
                yield {
                    "sm": arch,
                    "N x V x H": f"{tokens} x {vocabulary} x {size}",
                    "pass": name,
                    "loaded": (tiles * (blocks.tokens + blocks.vocabulary) * size * 2 + written) / 1e9,
                    "memory": moved / 1e9,
                    "minimum": minimum / 1e9,
                    "over minimum": moved / minimum,
                }


def compile_kernel(kernel: Any, arch: int, dtype: str, blocks: Any) -> Any:
    """The kernel with bias and soft-cap, its costliest form, as Triton would compile it at the first launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "HAS_BIAS": True,
        "HAS_SOFTCAP": True,
        "NEED_BIAS": True,
        "EVEN_H": True,
        "UPCAST": False,
        "PRECISION": "ieee",
        "BLOCK_N": blocks.tokens,
        "BLOCK_V": blocks.vocabulary,
        "BLOCK_H": blocks.hidden,
        "GROUP": 8,
        "BLOCK_K": TEMPERATURES,
    }
    types = {"targets": "*i64", "tops": "*i32", "softcap": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(("partials", "coefficients", "bias_partials"), "*fp32")
    types |= dict.fromkeys(("hidden", "weight", "bias", "gradients", "products"), f"*{dtype}")
    types |= dict.fromkeys(("inverse", "state", "rest"), "*fp64")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in DIVISIBLE]
    source = ASTSource(
        kernel,
        signature,
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of shared and of local memory, tensor core instructions of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", compiled.asm["ptx"])
    return {
        "registers": found["REG"],
        "shared": int(compiled.metadata.shared),
        "local": found["STACK"] + found["LOCAL"],
        "mma": len(instructions),
    }


if __name__ == "__main__":
    main()
