"""Programs of the planner as plain lists, to be compared with lists that are written out."""

from hp_plugin.planner.counts.program import FusedAttention, Gemm, Program


def listed(program: Program) -> list[tuple[object, ...]]:
    """Kernels, then messages, of every block: sizes of products (m, n, k and how many), bytes of all else."""
    found: list[tuple[object, ...]] = []
    for block in program:
        for kernel in block.kernels:
            if isinstance(kernel, Gemm):
                sizes = (kernel.m, kernel.n, kernel.k, kernel.batch)
                found.append((kernel.name, *sizes, "+=") if kernel.accumulate else (kernel.name, *sizes))
            elif isinstance(kernel, FusedAttention):
                found.append((kernel.name, kernel.heads, kernel.queries, kernel.keys, kernel.width))
            else:
                found.append((kernel.name, kernel.bytes))
        found += [(message.kind, message.axis, message.bytes) for message in block.collectives]
    return found
