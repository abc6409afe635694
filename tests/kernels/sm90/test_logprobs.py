"""The log-prob kernels for sm_90: tensor cores, no spills, tiles by TMA."""

import pytest

logprobs = pytest.importorskip("lit_kernels.gpu.logprobs")


@pytest.mark.parametrize("kernel", ["_forward", "_gradient"])
@pytest.mark.parametrize("form", logprobs.LAUNCHES)
@pytest.mark.parametrize("odd", [(), ("M", "V")], ids=["aligned", "odd"])
def test_kernels_spill_nothing(compiled, kernel, form, odd):
    launch = logprobs.LAUNCHES[form]
    dtype = "fp32" if form == "float32" else "bf16"
    types = {"states": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{dtype}", "target": "*i64", "factor": "fp32"}
    if launch.descriptors:
        tile = f"tensordesc<{dtype}[{{}},{launch.K}]>"
        types |= {"states": tile.format(launch.R), "weight": tile.format(launch.C)}
    vectors = ("tops", "sums", "tilts", "chosen", "normaliser", "entropy", "grad_logprob", "grad_entropy")
    types |= dict.fromkeys(vectors, "*fp32")
    kernel = getattr(logprobs, kernel)
    constants = dict(
        zip(("R", "C", "K", "TOGETHER", "DESCRIPTORS", "PRECISION"), logprobs._constants(launch), strict=True)
    )
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    made = compiled(kernel, types, constants, launch.warps, launch.stages, odd)
    made.check_memory()
    assert ("HGMMA.64x" in made.sass) == (dtype == "bf16")
    assert ("UTMALDG.2D" in made.sass) == launch.descriptors
