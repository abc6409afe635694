"""The RMSNorm kernels for sm_90: no registers spilled, 16 bytes at a time."""

import pytest

norm = pytest.importorskip("lit_kernels.gpu.rms_norm")
TYPES = {
    "x": "*bf16",
    "grad": "*bf16",
    "gain": "*fp32",
    "out": "*bf16",
    "sums": "*fp32",
    "values": "*fp8e4nv",
    "scales": "*fp32",
    "eps": "fp32",
}


@pytest.mark.parametrize("D", [128, 2048, 4096, 7168])
@pytest.mark.parametrize("name", ["_forward", "_backward", "_quantised"])
def test_nothing_is_spilled_and_whole_words_move(compiled, name, D):
    kernel = getattr(norm, name)
    types = {argument: kind for argument, kind in TYPES.items() if argument in kernel.arg_names}
    rows, columns, num_warps = norm._tile(D, norm.TILE_BACKWARD if name == "_backward" else norm.TILE)
    constants = {"ROWS": rows, "COLUMNS": columns}
    if name == "_quantised":
        constants |= {"BLOCK": 128, "POWER_OF_TWO": False}
    made = compiled(kernel, types, constants, num_warps)
    made.check_memory()
    loads = "LDGSTS.E.BYPASS.128" if name == "_backward" else "LDG.E.128"
    assert loads in made.sass and "STG.E.128" in made.sass
    assert ("cvt.rn.satfinite.e4m3x2.f32" in made.ptx) == (name == "_quantised")
