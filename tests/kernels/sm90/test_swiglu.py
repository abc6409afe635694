"""The SwiGLU kernels for sm_90: no registers spilled, 16 bytes at a time."""

import pytest

swiglu = pytest.importorskip("lit_kernels.gpu.swiglu")
TYPES = {"gate_up": "*bf16", "grad": "*bf16", "out": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_forward", {}),
        ("_backward", {}),
        ("_quantised", {"POWER_OF_TWO": False}),
        ("_quantised", {"POWER_OF_TWO": True}),
    ],
    ids=str,
)
def test_nothing_is_spilled_and_whole_words_move(compiled, name, constants):
    kernel = getattr(swiglu, name)
    types = {argument: kind for argument, kind in TYPES.items() if argument in kernel.arg_names}
    made = compiled(kernel, types, constants | {"ROWS": swiglu.ROWS, "COLUMNS": 128})
    made.check_memory()
    assert "LDG.E.128" in made.sass and "STG.E.128" in made.sass
    assert ("cvt.rn.satfinite.e4m3x2.f32" in made.ptx) == (name == "_quantised")
