"""The grouped products for sm_90: tensor-core instructions, tiles by TMA where asked, no spills."""

import pytest

grouped = pytest.importorskip("lit_kernels.gpu.grouped")
quantise = pytest.importorskip("lit_kernels.gpu.grouped_quantise")
GROUPS = 256  # for 255 experts
POINTER = {"ends": "*i32", "out": "*bf16"}
SCALES = {"x_scales": "*fp32", "w_scales": "*fp32"}


def tile(dtype, *shape):
    return f"tensordesc<{dtype}[{','.join(map(str, shape))}]>"


@pytest.mark.parametrize("transposed", [False, True], ids=["w", "w^T"])
@pytest.mark.parametrize("form", grouped.PLAIN)
def test_rows(compiled, form, transposed):
    launch, tma = grouped.PLAIN[form], form == "descriptors"
    types = POINTER | {"x": "*bf16", "w": "*bf16"}
    if tma:
        w_tile = (launch.k, launch.n) if transposed else (launch.n, launch.k)
        types |= {"x": tile("bf16", launch.m, launch.k), "w": tile("bf16", *w_tile)}
    made = compiled(
        grouped._rows, types, constants(launch, tma, x_scales=None, w_scales=None, TRANSPOSED=transposed), *launch[3:]
    )
    made.check_memory()
    assert "HGMMA.64x" in made.sass and ("UTMALDG.2D" if tma else "LDGSTS.E.BYPASS.128") in made.sass


@pytest.mark.parametrize("form", grouped.FP8)
def test_rows_of_fp8(compiled, form):
    launch, tma = grouped.FP8[form], form == "descriptors"
    types = POINTER | SCALES | {"x": "*fp8e4nv", "w": "*fp8e4nv"}
    if tma:
        types |= {"x": tile("fp8e4nv", launch.m, launch.k), "w": tile("fp8e4nv", launch.n, launch.k)}
    made = compiled(grouped._rows, types, constants(launch, tma, TRANSPOSED=False, SCALED=True), *launch[3:])
    made.check_memory()
    assert "QGMMA.64x128x32" in made.sass and ("UTMALDG.2D" if tma else "LDGSTS.E.BYPASS.128") in made.sass
    assert "FADD" not in made.sass  # 128 products are summed, then scaled and added in one


def constants(launch, tma, **others):
    sizes = {"GROUPS": GROUPS, "TILE_M": launch.m, "TILE_N": launch.n, "TILE_K": launch.k}
    return sizes | {"TOGETHER": grouped.TOGETHER, "SCALED": False, "TMA": tma} | others


@pytest.mark.parametrize("form", grouped.PLAIN_WEIGHTS)
def test_weights(compiled, form):
    launch, tma = grouped.PLAIN_WEIGHTS[form], form == "descriptors"
    types = POINTER | dict.fromkeys(("grad", "x", "grad_tiles", "x_tiles"), "*bf16")
    if tma:
        types |= {"grad_tiles": tile("bf16", launch.k, launch.m), "x_tiles": tile("bf16", launch.k, launch.n)}
    sizes = {"TILE_F": launch.m, "TILE_D": launch.n, "TILE_S": launch.k, "TMA": tma}
    made = compiled(grouped._weights, types, sizes, *launch[3:])
    made.check_memory()
    assert "HGMMA.64x" in made.sass and ("UTMALDG.2D" if tma else "LDGSTS.E.BYPASS.128") in made.sass


@pytest.mark.parametrize("out", ["bf16", "fp32"])
@pytest.mark.parametrize("form", grouped.FP8)
def test_weights_of_fp8(compiled, form, out):
    launch, tma = grouped.FP8[form], form == "descriptors"
    types = POINTER | {
        "grad": "*fp8e4nv",
        "x": "*fp8e4nv",
        "grad_scales": "*fp32",
        "x_scales": "*fp32",
        "out": f"*{out}",
    }
    if tma:
        types |= {"grad": tile("fp8e4nv", launch.m, launch.k), "x": tile("fp8e4nv", launch.n, launch.k)}
    sizes = {"GROUPS": GROUPS, "TILE_F": launch.m, "TILE_D": launch.n, "TILE_S": launch.k, "TMA": tma}
    made = compiled(grouped._weights_fp8, types, sizes, *launch[3:])
    made.check_memory()
    assert "QGMMA.64x128x32" in made.sass and ("UTMALDG.2D" if tma else "LDGSTS.E.BYPASS.128") in made.sass


@pytest.mark.parametrize("power_of_two", [False, True], ids=["float", "power of two"])
def test_quantising_by_expert(compiled, power_of_two):
    outputs = {"values": "*fp8e4nv", "scales": "*fp32", "values_t": "*fp8e4nv", "scales_t": "*fp32", "ends": "*i32"}
    sizes = {"GROUPS": GROUPS, "SIDE": 128, "POWER_OF_TWO": power_of_two}
    made = compiled(quantise._by_expert, {"x": "*bf16"} | outputs, sizes, 8)
    made.check_memory()
    assert "LDG.E.128" in made.sass and "STG.E.128" in made.sass
    assert "max.NaN" not in made.ptx  # with which an FP8 store of a transpose was miscompiled (triton #11111)
