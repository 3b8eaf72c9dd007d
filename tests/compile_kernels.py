"""Compile every kernel as the library launches it, for GPUs that need not be here, and print the results as JSON.

    python tests/compile_kernels.py sm_90 gfx942

Run with TRITON_INTERPRET=0: kernels are decorated when they are imported, for the interpreter or for the compiler.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from reroute_kernels import triton as kernels
from reroute_kernels.memory import Memory
from reroute_kernels.triton.plan import forget_plans

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def ranking(heads, kv_heads, head_dim, rotary, dtype, *, length=640, queries=1, masked=False, past=0, **options):
    table = torch.empty(1, length, rotary, dtype=dtype) if rotary else None
    return {
        "query": torch.empty(1, queries, heads, head_dim, dtype=dtype),
        "key": torch.empty(1, length, kv_heads, head_dim, dtype=dtype),
        "cos": table,
        "sin": table,
        "key_mask": torch.ones(1, length, dtype=torch.bool) if masked else None,
        "query_index": torch.zeros(1, queries, dtype=torch.int64) if masked else None,
        "past_key": torch.empty(1, past, kv_heads, head_dim, dtype=dtype) if past else None,
        "past_mask": torch.empty(1, past, dtype=torch.bool) if past and masked else None,
        **options,
    }


def rank(*shape, **options):
    kernels.rank_tokens(**ranking(*shape, **options))


def selection(batch, length):
    flags = torch.empty(batch, length, dtype=torch.bool)
    return {"pool": flags, "pinned": flags, "keep": torch.empty(batch, dtype=torch.int64), "length": 208}


def select(length, memory=None):
    kernels.select_tokens(torch.empty(2, length), **selection(2, length), memory=memory)


def memory(length):
    """Of a decision with more tokens."""
    return Memory(0.3, torch.empty(2, length + 16), torch.empty(2, length, dtype=torch.int64))


def route(*shape, length, width, dtype=torch.bfloat16, **options):
    kernels.route_tokens(
        **ranking(*shape, dtype, length=length, **options),
        **selection(1, length),
        tensors=(torch.empty(1, length, width, dtype=dtype), *(torch.empty(1, length, 128, dtype=dtype),) * 2),
    )


def gather(width, dtype):
    table = torch.empty(2, 640, 128, dtype=dtype)
    kernels.gather_tokens(torch.empty(2, 200, dtype=torch.int64), torch.empty(2, 640, width, dtype=dtype), table, table)


def scatter(width, dtype):
    index = torch.empty(2, 200, dtype=torch.int64)
    kernels.scatter_tokens_(torch.empty(2, 640, width, dtype=dtype), index, torch.empty(2, 200, width, dtype=dtype))


def scatter_norm(width, dtype, kept=200, **options):
    index, compact = torch.empty(2, kept, dtype=torch.int64), torch.empty(2, kept, width, dtype=dtype)
    full, weight = torch.empty(2, 640, width, dtype=dtype), torch.empty(width, dtype=dtype)
    kernels.scatter_norm_tokens_(full, index if kept else None, compact if kept else None, weight, 1e-6, **options)


def align(width, dtype, kept=200):
    index, compact = torch.empty(2, kept, dtype=torch.int64), torch.empty(2, kept, width, dtype=dtype)
    full, pool = torch.empty(2, 640, width, dtype=dtype), torch.empty(2, 640, dtype=torch.bool)
    kernels.align_tokens_(full, index, compact, pool)


def saliency(heads, head_dim, dtype, *, length=576, queries=None, kv_heads=None, blocks=0):
    cu_seqlens = torch.empty(blocks + 1, dtype=torch.int32) if blocks else None
    query = torch.empty(1, queries or length, heads, head_dim, dtype=dtype)
    key = torch.empty(1, length, kv_heads or heads, head_dim, dtype=dtype)
    kernels.column_saliency(query, key, cu_seqlens)


def merge(width, dtype, length=196, groups=18):
    assignment = torch.empty(32, length, dtype=torch.int64)
    kernels.merge_tokens(torch.empty(32, length, width, dtype=dtype), assignment, groups)


def diverse(rows, total, width, dtype, keep, weighted=True):
    weights = torch.empty(rows, total) if weighted else None
    lengths = torch.empty(rows, dtype=torch.int64) if weighted else None
    kernels.select_diverse(torch.empty(rows, total, width, dtype=dtype), weights, keep=keep, lengths=lengths)


def dpp(total, width, dtype, keep):
    kernels.select_dpp(torch.empty(1, total, width, dtype=dtype), torch.empty(1, total), keep=keep)


MAXIMA = {"query_reduction": "max", "head_reduction": "max"}
CASES = {
    "llava-1.5-7b float32": lambda: rank(32, 32, 128, 128, torch.float32),
    "llava-1.5-7b bfloat16": lambda: rank(32, 32, 128, 128, torch.bfloat16),
    "qwen2.5-vl-7b bfloat16": lambda: rank(28, 4, 128, 128, torch.bfloat16, length=1504),
    "llava-1.5-7b decision": lambda: route(32, 32, 128, 128, length=640, width=4096),
    "qwen2.5-vl-7b decision": lambda: route(28, 4, 128, 128, length=1504, width=3584),
    "long video decision": lambda: route(
        28, 4, 128, 128, length=16384, width=3584, queries=3, masked=True, past=4096, **MAXIMA
    ),
    "past keys bfloat16": lambda: rank(28, 4, 128, 128, torch.bfloat16, past=640),
    "interleaved bfloat16": lambda: rank(32, 2, 128, 64, torch.bfloat16, rotary_style="interleaved"),
    "interleaved float32": lambda: rank(8, 8, 128, 128, torch.float32, rotary_style="interleaved"),
    "head_dim 80 bfloat16": lambda: rank(16, 16, 80, 80, torch.bfloat16),
    "head_dim 256 bfloat16": lambda: rank(8, 4, 256, 256, torch.bfloat16),
    "head_dim 256 rotary 64 float32": lambda: rank(16, 2, 256, 64, torch.float32),
    "no rotary bfloat16": lambda: rank(32, 8, 128, 0, torch.bfloat16),
    "200 queries bfloat16": lambda: rank(28, 4, 128, 128, torch.bfloat16, length=1504, queries=200),
    "128 heads on one bfloat16": lambda: rank(128, 1, 128, 128, torch.bfloat16, length=131072),
    "length 208": lambda: select(208),
    "length 4096": lambda: select(4096),
    "length 16384": lambda: select(16384),
    "length 65536": lambda: select(65536),
    "length 131072": lambda: select(131072),
    "length 208, first with a memory": lambda: select(208, Memory(0.3)),
    "length 208, with a memory": lambda: select(208, memory(208)),
    "length 4096, with a memory": lambda: select(4096, memory(4096)),
    "length 65536, with a memory": lambda: select(65536, memory(65536)),
    "length 131072, with a memory": lambda: select(131072, memory(131072)),
    "gather 4096 bfloat16": lambda: gather(4096, torch.bfloat16),
    "gather 4096 float32": lambda: gather(4096, torch.float32),
    "gather 4095 bfloat16": lambda: gather(4095, torch.bfloat16),
    "scatter 4096 bfloat16": lambda: scatter(4096, torch.bfloat16),
    "scatter 4096 float32": lambda: scatter(4096, torch.float32),
    "scatter 4095 bfloat16": lambda: scatter(4095, torch.bfloat16),
    "llava norm 4096 bfloat16": lambda: scatter_norm(4096, torch.bfloat16),
    "qwen norm 3584 bfloat16": lambda: scatter_norm(3584, torch.bfloat16),
    "long qwen norm 3584 bfloat16": lambda: scatter_norm(3584, torch.bfloat16, kept=4096),
    "first norm 4096 bfloat16": lambda: scatter_norm(4096, torch.bfloat16, kept=0),
    "zero-centered norm 2048 bfloat16": lambda: scatter_norm(2048, torch.bfloat16, one_plus=True),
    "norm 4096 float32": lambda: scatter_norm(4096, torch.float32),
    "norm 16384 float32": lambda: scatter_norm(16384, torch.float32),
    "norm 16384 bfloat16": lambda: scatter_norm(16384, torch.bfloat16, kept=4096, one_plus=True),
    "norm 4095 bfloat16": lambda: scatter_norm(4095, torch.bfloat16),
    "llava alignment 4096 bfloat16": lambda: align(4096, torch.bfloat16),
    "long qwen alignment 3584 bfloat16": lambda: align(3584, torch.bfloat16, kept=4096),
    "clip class token float16": lambda: saliency(16, 64, torch.float16, length=577, queries=1),
    "siglip saliency bfloat16": lambda: saliency(16, 72, torch.bfloat16, length=729),
    "qwen tower saliency bfloat16": lambda: saliency(16, 80, torch.bfloat16, length=4096, blocks=64),
    "qwen tower saliency float32": lambda: saliency(16, 80, torch.float32, length=4096, blocks=64),
    "grouped saliency 128 float32": lambda: saliency(16, 128, torch.float32, kv_heads=4),
    "merge 3584 bfloat16": lambda: merge(3584, torch.bfloat16),
    "merge 1024 float32": lambda: merge(1024, torch.float32, length=16384),
    "merge 1023 float16": lambda: merge(1023, torch.float16),
    "alignment 4096 float32": lambda: align(4096, torch.float32),
    "alignment 4095 bfloat16": lambda: align(4095, torch.bfloat16),
    "diverse 32 x 196 x 3584 bfloat16": lambda: diverse(32, 196, 3584, torch.bfloat16, 44),
    "diverse 576 x 4096 float32": lambda: diverse(1, 576, 4096, torch.float32, 64, weighted=False),
    "diverse 2880 x 4096 float16": lambda: diverse(1, 2880, 4096, torch.float16, 282, weighted=False),
    "diverse 16384 x 4096 bfloat16": lambda: diverse(1, 16384, 4096, torch.bfloat16, 64),
    "diverse 16384 x 4095 float32": lambda: diverse(1, 16384, 4095, torch.float32, 64),
    "dpp 576 x 4096 bfloat16": lambda: dpp(576, 4096, torch.bfloat16, 64),
    "dpp 2880 x 4096 float32": lambda: dpp(2880, 4096, torch.float32, 64),
    "dpp 16384 x 4096 bfloat16": lambda: dpp(16384, 4096, torch.bfloat16, 64),
    "dpp 16384 x 4096 float32": lambda: dpp(16384, 4096, torch.float32, 64),
}


class AbsentDevice:
    """Stands in for Triton's driver: a device of the given target, on which nothing can be launched."""

    def __init__(self, target):
        self.get_current_device = lambda: list(TARGETS.values()).index(target)
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: target


def resources(compiled):
    """Registers of a thread, and values that did not fit into them."""
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
        return {"registers": registers, "stack": stack + local, "spills": 0}  # a spilled register lies on the stack
    counts = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)}
    return {
        "registers": counts["vgpr_count"],
        "stack": counts["private_segment_fixed_size"],
        "spills": counts["vgpr_spill_count"],  # scalar registers spill into lanes of these, not to memory
    }


def innermost_loops(compiled):
    """Machine instructions in the body of each innermost loop, most first; none for AMD's GPUs.

    A loop is what lies between a branch to a smaller address and its target, both counted. It is an innermost one if no
    other such branch and its target lie within.
    """
    if "cubin" not in compiled.asm:
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing, re.MULTILINE)
    addresses = [int(address, 16) for address, _ in instructions]
    targets = [re.search(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)", instruction) for _, instruction in instructions]
    jumps = [(int(target[1], 16), at) for at, target in zip(addresses, targets, strict=True) if target]
    loops = {(first, last) for first, last in jumps if first < last}
    return sorted(
        (
            sum(first <= address <= last for address in addresses)
            for first, last in loops
            if not any(first <= start and end <= last for start, end in loops - {(first, last)})
        ),
        reverse=True,
    )


def first_steps(compiled):
    """Kinds of the first three instructions that access global memory or order launches."""
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    kinds = r"griddepcontrol\.\w+|\b(?:ld|st)\.(?:\w+\.)*global|\b(?:buffer|global|flat)_(?:load|store)"
    return re.findall(kinds, assembly)[:3]


def memory_accesses(compiled):
    """Instructions that load or store global memory, by whether they move 16 bytes at a time."""
    accesses = dict.fromkeys(("wide_loads", "other_loads", "wide_stores", "other_stores"), 0)
    if "ptx" in compiled.asm:
        instruction = r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
        for kind, vector, bits in re.findall(instruction, compiled.asm["ptx"]):
            width = "wide" if int(vector or 1) * int(bits) >= 128 else "other"
            accesses[f"{width}_{'loads' if kind == 'ld' else 'stores'}"] += 1
    else:
        for kind, size in re.findall(r"\b(?:buffer|global|flat)_(load|store)_(\w+)", compiled.asm["amdgcn"]):
            accesses[f"{'wide' if size == 'dwordx4' else 'other'}_{kind}s"] += 1
    return accesses


def has_wide_addresses(compiled):
    """Whether the offset from every pointer argument is computed in 64 bits, products of strides and sizes included."""
    ttir = compiled.asm["ttir"]
    signature, body = re.search(r"tt\.func public @\w+\((.*?)\) attributes(.*)", ttir, re.DOTALL).groups()
    pointers = set(re.findall(r"(%\w+): !tt\.ptr<", signature)) & set(re.findall(r"%\w+", body))
    integers = set(re.findall(r"(%\w+): i32\b", signature))
    spread = dict(re.findall(r"(%\w+) = tt\.(?:splat|broadcast|expand_dims|bitcast) (%\w+)", ttir))

    def source(value):
        while value in spread:
            value = spread[value]
        return value

    offsets = re.findall(r"tt\.addptr (%\w+), %\w+ : \S+, (?:tensor<[\dx]+)?(i\d+)", ttir)
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<[\dx]+)?i32\b", ttir)
    first_offsets = {(source(pointer), width) for pointer, width in offsets if source(pointer) in pointers}
    return (
        {pointer for pointer, _ in first_offsets} == pointers
        and all(width == "i64" for _, width in first_offsets)
        and not any(source(value) in integers for product in products for value in product)
    )


def compile_case(target_and_case):
    target, case = target_and_case
    triton.runtime.driver.set_active(AbsentDevice(TARGETS[target]))
    forget_plans()  # which are of one device
    rows = []

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            row = {"kernel": kernel.__name__, "case": case, "target": target}
            row |= resources(compiled) | memory_accesses(compiled)
            row |= {"shared": compiled.metadata.shared, "wide_addresses": has_wide_addresses(compiled)}
            given = dict(zip(kernel.arg_names, args, strict=True)) | kwargs
            sizes = {name: given[name] for name in ("TILE", "BLOCK_ROWS", "num_warps") if name in given}
            loops = innermost_loops(compiled) if kernel.__name__ == "attention_logits" else None
            rows.append(row | {"loops": loops, "first_steps": first_steps(compiled), **sizes})

        return launch

    KernelInterface.__getitem__ = compile_only
    CASES[case]()
    return rows


if __name__ == "__main__":
    with get_context("fork").Pool(2) as pool:
        rows = [row for rows in pool.imap_unordered(compile_case, product(sys.argv[1:], CASES)) for row in rows]
    print(json.dumps(sorted(rows, key=lambda row: (row["kernel"], row["case"], row["target"])), indent=1))
