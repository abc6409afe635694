"""The FP8 products for sm_90: FP8 tensor-core instructions, tiles by TMA, no spills, warps specialised where asked."""

import pytest

gemm = pytest.importorskip("lit_kernels.gpu.gemm")
TILE, VECTOR = "tensordesc<fp8e4nv[128,128]>", "*fp32"


@pytest.mark.parametrize("out", ["bf16", "fp32"])
@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
@pytest.mark.parametrize("form", gemm.LAUNCHES)
def test_persistent_form(compiled, form, in_blocks, out):
    launch = gemm.LAUNCHES[form]
    types = {"a": TILE, "b": TILE, "out": f"tensordesc<{out}[128,128]>", "a_scales": VECTOR, "b_scales": VECTOR}
    if launch.specialised:
        types |= {"a": "*fp8e4nv", "out": f"*{out}"}
    constants = {
        "SIDE": gemm.SIDE,
        "TILE_K": 128,
        "TOGETHER": gemm.TOGETHER,
        "B_IN_BLOCKS": in_blocks,
        "SPECIALISED": launch.specialised,
    }
    made = compiled(gemm._gemm_persistent, types, constants, launch.warps, launch.stages)
    made.check_memory()
    assert "QGMMA.64x128x32" in made.sass and "UTMALDG.2D" in made.sass and "UTMASTG.2D" in made.sass
    assert ("setmaxnreg" in made.ptx) == launch.specialised
    assert "FADD" not in made.sass  # 128 products are summed, then scaled and added in one


@pytest.mark.parametrize("in_blocks", [True, False], ids=["blocks", "rows"])
def test_portable_form(compiled, in_blocks):
    types = {"a": "*fp8e4nv", "b": "*fp8e4nv", "out": "*bf16", "a_scales": VECTOR, "b_scales": VECTOR}
    constants = {"TILE_M": gemm.TILE_M, "TILE_N": gemm.TILE_N, "TILE_K": 128, "B_IN_BLOCKS": in_blocks}
    made = compiled(gemm._gemm, types, constants, 4, 3)
    made.check_memory()
    assert "QGMMA.64x" in made.sass and "LDGSTS.E.BYPASS.128" in made.sass
