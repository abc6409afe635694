"""coord_check.py and lr_transfer.py: their arithmetic, and small real runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

SMALL = ["--widths", "64", "128", "--steps", "2", "--seeds", "1", "--batch", "1", "--seq-len", "16", "--depth", "2"]


@pytest.fixture
def coord(load, monkeypatch):
    return with_little_text(load("coord_check"), monkeypatch)


@pytest.fixture
def transfer(load, monkeypatch):
    return with_little_text(load("lr_transfer"), monkeypatch)


def with_little_text(module, monkeypatch):
    monkeypatch.setattr(module, "source_rows", partial(module.source_rows, max_bytes=50_000))
    return module


def read(folder: Path, name: str) -> dict:
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


# The ladder


def test_both_schemes_are_one_model_at_the_base_size(coord):
    ladder = coord.Ladder(base_width=64, base_depth=2)
    models = [ladder.model(64, 2, scheme, seed=5) for scheme in ("mup", "sp")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    rates = [[group["lr"] for group in coord.recipe("adamw").build(m, 1)[0].param_groups] for m in models]
    assert set(rates[0]) == set(rates[1]) and len(set(rates[0])) == 1


def test_the_control_keeps_the_base_width_s_spread_and_rate(coord):
    ladder = coord.Ladder(base_width=64, base_depth=2)
    mup, sp = (ladder.model(256, 4, scheme, seed=0) for scheme in ("mup", "sp"))
    name = "blocks.1.ffn.experts.gate_up"  # fan-in 256, 64 at the base
    assert mup.get_parameter(name).std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert sp.get_parameter(name).std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert sp.head.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)  # c sqrt(d0) / d at d = d0
    assert {group["lr"] for group in coord.recipe("adamw", 0.01).build(sp, 1)[0].param_groups} == {0.01}
    assert (mup.blocks[0].scale, sp.blocks[0].scale) == (0.5, 1.0)


def test_the_residual_stream_is_compared_where_it_ends(coord):
    change = {"residual/blocks.0": 1.0, "residual/blocks.2": 2.0, "q/blocks.0.attn": 3.0}
    assert coord.where_it_ends(change, 3) == {"residual/blocks.2": 2.0, "q/blocks.0.attn": 3.0}


def test_a_rate_takes_the_recipe_s_other_rates_along(coord):
    muon, slow = coord.recipe("muon"), coord.recipe("muon", lr=coord.recipe("muon").lr / 8)
    assert (slow.lr, slow.adamw_lr) == pytest.approx((muon.lr / 8, muon.adamw_lr / 8))


# The coordinate check


def row(coord, name, value, scheme="mup", measure="update"):
    limit = coord.limit_of(measure, name, 0.2) if scheme == "mup" else None
    return coord.Slope(scheme, measure, name, value, [value], limit)


def test_limits(coord):
    def wrong(*args, **kwargs):
        return bool(coord.verdict([row(coord, *args, **kwargs)]))

    assert not wrong("W_DQ", -0.15) and wrong("W_DQ", 0.151) and wrong("W_DQ", -0.151)
    assert not wrong("W_UK", -0.30) and wrong("W_UK", -0.31)
    assert not wrong("q", 0.2, measure="change") and wrong("q", 0.21, measure="change")
    assert not wrong("head_logits", -0.5, measure="change") and wrong("head", -0.5)
    assert wrong("W_DQ", math.nan) and wrong("q", math.nan, measure="change")  # a run that diverged


def test_a_control_that_stays_flat_is_a_violation(coord):
    flat, steep = (row(coord, "residual", value, "sp", "change") for value in (0.39, 0.41))
    other = row(coord, "head_logits", 0.9, "sp", "change")
    assert "control" in coord.verdict([flat, other])[0] and coord.verdict([steep, other]) == []


def test_seeds_are_averaged_geometrically_and_layers_by_rms(coord):
    def at(size, seed, *layers):
        change = {f"q/{i}": value for i, value in enumerate(layers)}
        return coord.Measurement("mup", size, seed, 1, 0.0, change, {})

    runs = [at(64, 0, 3.0, 1.0), at(64, 1, 1.0, 1.0), at(128, 0, 6.0, 2.0), at(128, 1, 4.0, 4.0)]
    (q,) = coord.fit(runs, 1, 0.2)
    # rms: sqrt 5, 1; 2 sqrt 5, 4: factors 2 and 4, slopes 1 and 2
    assert q.by_seed == pytest.approx([1.0, 2.0]) and q.value == pytest.approx(1.5)


EXPERT = {"expert_gate", "expert_up", "expert_down"}


def broken(coord, kind):
    """`recipe` whose optimizer forgets to divide one role's rate by the width."""

    def build(*args, **kwargs):
        made = coord_recipe(*args, **kwargs)
        optimizer = made.optimizer

        def forgetful(model):
            result = optimizer(model)
            for group in result.param_groups:
                group["lr"] = made.lr if group["name"].startswith(kind) else group["lr"]
            return result

        made.optimizer = forgetful
        return made

    coord_recipe = coord.recipe
    return build


def test_a_small_run_and_its_files(coord, tmp_path, capsys):
    argv = [*SMALL, "--seeds", "2", "--out", str(tmp_path), "--name", "small", "--set", "weight_decay=0"]
    assert coord.main(argv) == 0
    record = read(tmp_path, "small")
    steep = {s["name"]: s["value"] for s in record["slopes"] if s["scheme"] == "sp" and s["measure"] == "change"}
    assert steep["residual"] > 0.4
    assert {"date", "machine", "versions", "settings", "ladder", "text", "limits"} <= set(record)
    assert all(len(s["by_seed"]) == 2 for s in record["slopes"]) and set(record["slopes_by_step"]) == {"1", "2"}
    assert "W_DKV/blocks.1.attn.kv_a" in record["slopes_by_module"]["mup"]["update"]
    assert "weight_decay=0" in record["settings"]["recipe"]
    assert "W_UV" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "names"), [("router", {"router"}), ("head", {"head"}), ("embedding", set()), ("expert", EXPERT)]
)
def test_a_role_whose_rate_is_not_divided_fails_the_check(coord, tmp_path, capsys, monkeypatch, kind, names):
    """Its updates after one step of Adam are twice too large at twice the width: a slope steeper by 1."""
    argv = [*SMALL, "--schemes", "mup", "--out", str(tmp_path), "--check"]
    coord.main([*argv, "--name", "right"])
    monkeypatch.setattr(coord, "recipe", broken(coord, kind))
    capsys.readouterr()
    status = coord.main([*argv, "--name", "wrong"])
    right, wrong = (read(tmp_path, name)["slopes_by_step"]["1"]["mup"]["update"] for name in ("right", "wrong"))
    for name in right:
        # an update deeper in the network has a slightly other input then
        assert wrong[name] - right[name] == pytest.approx(float(name in names), abs=0.15), name
    out = capsys.readouterr().out
    assert all(f"VIOLATED: mup update {name}:" in out for name in names)
    assert status == 1 or not names


def test_depths(coord, tmp_path):
    argv = ["--depths", "2", "8", "--width", "64", "--steps", "2", "--seeds", "1", "--batch", "1", "--seq-len", "16"]
    coord.main([*argv, "--out", str(tmp_path)])
    record = read(tmp_path, "coord_depth_adamw")
    slopes = {(s["scheme"], s["name"]): s["value"] for s in record["slopes"] if s["measure"] == "change"}
    assert slopes["sp", "residual"] - slopes["mup", "residual"] > 0.3
    assert record["ladder"]["base_depth"] == 2 and record["ladder"]["base_width"] == 64


def test_one_size_is_refused(coord, capsys):
    with pytest.raises(SystemExit):
        coord.parse(["--widths", "64"])
    assert "two sizes" in capsys.readouterr().err


# Learning-rate transfer


def test_the_vertex_of_a_parabola(transfer):
    curve = {rate: 2.0 + 0.1 * (rate + 6.3) ** 2 for rate in range(-9, -3)}
    found = transfer.optimum(curve)
    assert (found.log2_lr, found.loss, found.resolved) == (pytest.approx(-6.3), pytest.approx(2.0), True)
    assert transfer.loss_at(curve, -7.1) == pytest.approx(2.0 + 0.1 * 0.8**2)


def test_an_optimum_on_the_edge_or_beside_a_divergence_is_not_resolved(transfer):
    assert transfer.optimum({-8: 3.0, -7: 2.0}) == transfer.Optimum(-7.0, 2.0, False)
    assert transfer.optimum({-8: 3.0, -7: 2.0, -6: math.inf}) == transfer.Optimum(-7.0, 2.0, False)
    assert transfer.loss_at({-8: 3.0, -7: 2.0, -6: math.inf}, -7.2) == math.inf


def test_the_grid_grows_on_the_side_of_its_best(transfer):
    grid = [-8, -7, -6]
    assert transfer.next_rate({-8: 1.0, -7: 2.0, -6: 3.0}, grid) == -9
    assert transfer.next_rate({-8: 3.0, -7: 2.0, -6: 1.0}, grid) == -5
    assert transfer.next_rate({-8: 3.0, -7: 1.0, -6: 2.0}, grid) is None
    assert transfer.next_rate({-12: 1.0, -8: 2.0}, grid) is None  # grew enough
    assert transfer.next_rate(dict.fromkeys(grid, math.inf), grid) == -9


def test_shift_and_gap(transfer):
    """Optima at -6 and -7.5 of parabolas 0.1 x^2: the shift is -1.5 octaves, its cost 0.1 * 1.5^2."""
    curves = {
        64: {0: {r: 2.0 + 0.1 * (r + 6) ** 2 for r in range(-10, -3)}},
        128: {0: {r: 1.9 + 0.1 * (r + 7.5) ** 2 for r in range(-10, -3)}},
    }
    found = transfer.summary(curves, base_width=64)
    assert found["widths"][128]["shift"] == pytest.approx(-1.5)
    assert found["widths"][128]["gap"] == pytest.approx(0.225)
    assert found["widths"][64]["gap"] == pytest.approx(0.0)
    assert found["wider"] is False  # at -6 the wide one has 2.125, the narrow one 2.0
    assert transfer.wider_is_better(curves, -7.0) is True


SWEEP = [*SMALL, "--log2-lrs", "-8", "-7", "--schemes", "mup", "--batch", "2"]


def test_an_interrupted_sweep_goes_on(transfer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "MOST_OCTAVES", 0)
    assert transfer.main([*SWEEP, "--out", str(tmp_path)]) == 0
    path = tmp_path / "lr_transfer.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4  # 2 widths, 2 rates, 1 seed
    path.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote

    made = []
    train = transfer.Run.losses
    monkeypatch.setattr(transfer.Run, "losses", lambda run, *args: made.append(run) or train(run, *args))
    assert transfer.main([*SWEEP, "--out", str(tmp_path)]) == 0
    assert len(made) == 2 and "damaged line" in capsys.readouterr().err
    again = [json.loads(line) for line in path.read_text().splitlines() if line not in (lines[2][:20],)]
    first = [json.loads(line) for line in lines]
    assert [(r["run"], r["losses"]) for r in again] == [(r["run"], r["losses"]) for r in first]
    assert set(read(tmp_path, "lr_transfer")["summary"]["adamw, mup"]["widths"]) == {"64", "128"}


def test_runs_of_other_settings_are_not_mixed(transfer, tmp_path):
    results = transfer.Results(tmp_path / "r.jsonl")
    run = transfer.Run("mup", "adamw", 64, -7, 0, "120 steps")
    results.add(run, {"val": 2.0, "train": math.inf}, 1.0, {})
    results.add(replace(run, settings="240 steps"), {"val": 1.0, "train": 1.0}, 1.0, {})
    again = transfer.Results(tmp_path / "r.jsonl")
    assert again.done == results.done
    assert again.curves("mup", "adamw", 64, "120 steps", "val") == {0: {-7: 2.0}}


def test_bf16_and_a_diverged_run(transfer, tmp_path):
    args = transfer.parse([*SWEEP, "--precision", "bf16", "--out", str(tmp_path)])
    rows_NT = transfer.source_rows(args.seq_len)
    losses = {rate: transfer.Run("mup", "adamw", 64, rate, 0, "").losses(args, rows_NT) for rate in (-7, 120)}
    assert 4 < losses[-7]["val"] < 7  # log 272 is 5.6
    assert losses[120] == {"train": math.inf, "val": math.inf}
