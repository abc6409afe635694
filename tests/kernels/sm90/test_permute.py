"""The kernels that move tokens for sm_90: no registers spilled, 16 bytes at a time."""

import pytest

permute = pytest.importorskip("lit_kernels.gpu.permute")
TYPES = {
    "x": "*bf16",
    "grad": "*bf16",
    "rows": "*bf16",
    "grad_rows": "*bf16",
    "out": "*bf16",
    "weights": "*fp32",
    "grad_weights": "*fp32",
    "place": "*i64",
    "last": "*i32",
    "values": "*fp8e4nv",
    "scales": "*fp32",
}
MOVED = {"COLUMNS": permute.COLUMNS}


@pytest.mark.parametrize("K", [2, 6, 8])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_spread", MOVED),
        ("_collect", MOVED | {"WEIGHTED": True}),
        ("_collect_backward", {"COLUMNS": permute.COLUMNS // 2}),
        ("_spread_quantised", {"BLOCKS": permute.COLUMNS // 128, "BLOCK": 128, "POWER_OF_TWO": False}),
    ],
    ids=["spread", "collect", "backward", "quantised"],
)
def test_nothing_is_spilled_and_whole_words_move(compiled, name, constants, K):
    kernel = getattr(permute, name)
    types = {argument: kind for argument, kind in TYPES.items() if argument in kernel.arg_names}
    known = {"K": K, "EACH": K, "CHOICES": 1 << (K - 1).bit_length()} | constants
    constants = {argument: value for argument, value in known.items() if argument in kernel.arg_names}
    made = compiled(kernel, types, constants)
    made.check_memory()
    assert "LDG.E.128" in made.sass and "RED." not in made.sass and "ATOM" not in made.sass
    assert "STG.E.128" in made.sass or "STG.E.64" in made.sass  # of FP8: 8 numbers, as many as were loaded
