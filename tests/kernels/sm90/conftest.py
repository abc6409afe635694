"""What Triton's compiler makes of the kernels for an H100 or H200 (sm_90), without a GPU. Not in one process with the
interpreter."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

SHARED = 227 * 1024  # bytes of shared memory that a block may have


class Compiled(NamedTuple):
    """`usage` as cuobjdump prints it, `shared` in bytes."""

    ptx: str
    usage: str
    sass: str
    shared: int

    def check_memory(self):
        """No registers spilled, no more shared memory than there is."""
        assert "STACK:0" in self.usage and "LOCAL:0" in self.usage and "STL" not in self.sass, self.usage
        assert self.shared <= SHARED


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if os.environ.get("TRITON_INTERPRET") == "1" and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the interpreter's process cannot compile"))


@pytest.fixture
def compiled(tmp_path):
    """`compiled(kernel, types, constants, num_warps, num_stages)`: a `Compiled`.

    Args:
        types: of the arguments, "*bf16", "tensordesc<fp8e4nv[128,128]>", "fp32"; "i32" where it says nothing.
        constants: the kernel's constexprs.
        unaligned: arguments that are no multiple of 16 (bytes for a pointer).
    """
    triton = pytest.importorskip("triton")

    def tool(name, *arguments):
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout

    def compile_(kernel, types, constants, num_warps=4, num_stages=3, unaligned=()):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        assert {*types, *constants, *unaligned} <= {*names}, names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        constexprs = {(names.index(n),): value for n, value in constants.items()}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n not in unaligned and signature[n].startswith(("*", "i32", "i64"))
        }
        source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, sass = tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", "-c", cubin)
        return Compiled(made.asm["ptx"], usage, sass, made.metadata.shared)

    return compile_
