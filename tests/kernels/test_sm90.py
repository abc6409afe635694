"""What Triton's compiler makes of the kernels for an H100 or H200 (sm_90), without a GPU: no registers spilled to
memory, shared memory within what a block may have, wide loads. Not in one process with the interpreter."""

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from lit_kernels.gpu import quantise  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's process cannot compile"
)
SHARED = 227 * 1024  # bytes
POINTERS = {
    "x": "*bf16",
    "w": "*bf16",
    "values": "*fp8e4nv",
    "values_t": "*fp8e4nv",
    "scales": "*fp32",
    "scales_t": "*fp32",
}


@pytest.fixture
def compiled(tmp_path):
    """`compiled(kernel, constants, num_warps)`: its assembly, resource usage and shared memory (bytes)."""

    def compile_(kernel, constants, num_warps=4):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
        constexprs = {(names.index(n),): value for n, value in constants.items()}
        source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        return (
            made.asm["ptx"],
            tool("cuobjdump", "-res-usage", cubin),
            tool("nvdisasm", "-c", cubin),
            made.metadata.shared,
        )

    return compile_


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("name", "constants", "num_warps"),
    [
        ("_rows", {"ROWS": quantise.ROWS, "COLUMNS": 128}, 4),
        ("_blocks", {"SIDE": 128}, 8),
        ("_both", {"SIDE": 128}, 8),
    ],
)
def test_quantisers_spill_nothing_and_move_whole_words(compiled, name, constants, num_warps, power_of_two):
    kernel = getattr(quantise, name)
    ptx, usage, sass, shared = compiled(kernel, constants | {"POWER_OF_TWO": power_of_two}, num_warps)
    assert "STACK:0" in usage and "LOCAL:0" in usage and "STL" not in sass
    assert shared <= SHARED
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "LDG.E.128" in sass  # 8 numbers in bfloat16 at a time
    # Trap: the compiler has made wrong code of NaN-keeping extremes next to a transposed FP8 store (triton #11111).
    assert "min.NaN" not in ptx and "max.NaN" not in ptx
