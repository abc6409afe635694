"""Advantages, losses and gradients against reference numbers (NumPy, float64), and the script that compares them."""

import json

import pytest

REQUIRED = ("grpo", "grpo_no_kl", "dr_grpo", "dapo", "gdpo_paper", "gdpo_trl")


def test_every_covered_objective_agrees_to_1e_12(checker, golden):
    inputs, cases = golden("batch_main.json")["inputs"], golden("objectives_main.json")["objectives"]
    assert set(checker.CASES) == set(cases) >= set(REQUIRED)
    for name in checker.CASES:
        errors = checker.check_case(name, checker.complete(name, cases), inputs)
        assert errors.worst < 1e-12, (name, errors)


@pytest.mark.parametrize("file", ["gdpo_collapse", "edge_cases", "kl_entropy_gkd", "ppo_critic", "zero_one_view"])
def test_every_other_file_agrees_to_1e_12(checker, golden, file):
    found = checker.FILES[f"{file}.json"](golden(f"{file}.json"), golden("batch_main.json")["inputs"])
    assert found
    for name, errors in found.items():
        assert errors.worst < 1e-12, (name, errors)


def test_required_cases_are_the_yaml_alone(checker):
    """What ships is what is compared: no override but the KL switch and GDPO's eps variant."""
    assert checker.CASES["grpo"].overrides == {}
    assert checker.CASES["dr_grpo"].overrides == {}
    assert checker.CASES["dapo"].overrides == {}
    assert checker.CASES["gdpo_trl"].overrides == {}


@pytest.mark.parametrize("field", ["advantages", "grad_wrt_new_logprobs", "loss"])
def test_a_changed_number_is_noticed(checker, golden_copy, capsys, field):
    path = golden_copy / "objectives_main.json"
    content = json.loads(path.read_text())
    case = content["objectives"]["gdpo_trl"]
    if field == "loss":
        case[field] += 1e-9
    elif isinstance(case[field][0], list):
        case[field][0][0] += 1e-9
    else:
        case[field][0] += 1e-8
    path.write_text(json.dumps(content))
    assert checker.main([str(golden_copy), "--objective", "gdpo_trl"]) == 1
    assert "wrong: gdpo_trl" in capsys.readouterr().out


def test_a_changed_collapse_is_noticed(checker, golden_copy):
    path = golden_copy / "gdpo_collapse.json"
    content = json.loads(path.read_text())
    content["distinct_group_counts"]["G=4,n=3"]["gdpo"] += 1
    path.write_text(json.dumps(content))
    assert checker.main([str(golden_copy), "--objective", "gdpo_collapse"]) == 1


def test_the_whole_folder(checker, golden_copy):
    assert checker.main([str(golden_copy)]) == 0


def test_uncovered_name_fails_unless_subset(checker, golden_copy, capsys):
    path, content = golden_copy / "objectives_main.json", {}
    for other in golden_copy.iterdir():
        if other.name == path.name:
            content = json.loads(path.read_text())
        elif other.name != "batch_main.json":
            other.unlink()
    cases = content["objectives"]
    content["objectives"] = {"gdpo_paper": cases["gdpo_paper"], "tomorrows": cases["grpo"]}
    path.write_text(json.dumps(content))
    assert checker.main([str(golden_copy)]) == 1
    assert "NOT COVERED (type --subset to leave them out): tomorrows" in capsys.readouterr().out
    assert checker.main([str(golden_copy), "--subset"]) == 0
    assert "left out: tomorrows" in capsys.readouterr().out
    assert checker.main([str(golden_copy), "--objective", "gdpo_paper"]) == 0


def test_numbers_stated_by_a_case_win_over_the_yaml(checker):
    """Another folder may state another eps, clip or KL weight."""
    case = {"conventions": {"std": "eps=1e-3", "clip": "0.1/0.3 + dual clip c=5", "kl": "k3, beta=0.5"}}
    assert checker.stated(case) == {
        "clip": {"low": 0.1, "high": 0.3, "dual": 5.0},
        "advantage": {"eps": 1e-3},
        "kl": {"weight": 0.5},
    }
    assert checker.build("grpo", case)._clip.keywords == {"low": 0.1, "high": 0.3, "dual": 5.0}


@pytest.mark.parametrize(
    ("conventions", "algorithm", "expected"),
    [
        ({"std": "(ddof=1)+2e-4 (TRL)"}, "", {"advantage": {"eps": 2e-4}}),
        ({"norm": "rsqrt(max(var,1e-6))"}, "", {"advantage": {"eps": 1e-6}}),
        ({"norm": "rsqrt(var+1e-6)"}, "", {"advantage": {"eps": 1e-6}}),
        ({"clip": "eps1=0.1, eps2=0.3, c=5"}, "rpg", {"clip": {"low": 0.1, "high": 0.3, "dual": 5.0}}),
        ({"beta": 0.3}, "rpg", {"clip": {"beta": 0.3}}),
        ({"beta": 0.3}, "rloo", {"kl": {"weight": 0.3}}),
        ({"kl": "k2 in the LOSS, 1e-3"}, "", {"kl": {"weight": 1e-3}}),
        ({"kl_penalty_coef": 2}, "", {"kl": {"weight": 2.0}}),
        ({"clip": "1+eps_high with eps_high=0.5 (NOT in the paper)"}, "", {"clip": {"cap": 1.5}}),
        ({"clip": "ABSOLUTE cap 4.0 (ScaleRL)"}, "", {"clip": {"cap": 4.0}}),
        ({"clip": "clamp(1-0.25, 1+0.5)"}, "", {"clip": {"floor": 0.75, "cap": 1.5}}),
        ({"is_weight": "min(pi_new/pi_rollout, 3), stop-gradient"}, "", {"clip": {"cap": 3.0}}),
    ],
)
def test_every_number_that_conventions_state_is_read(checker, conventions, algorithm, expected):
    assert checker.stated({"conventions": conventions}, algorithm) == expected


def test_a_number_that_a_case_leaves_to_another(checker, golden):
    """Another L_max, stated by `dr_grpo` alone, divides both losses and both gradients."""
    cases, inputs = golden("objectives_main.json")["objectives"], golden("batch_main.json")["inputs"]
    for name in ("dr_grpo", "dr_grpo_verl_jan2026"):
        case = cases[name]
        case["loss"] *= 10 / 13
        case["grad_wrt_new_logprobs"] = [[x * 10 / 13 for x in row] for row in case["grad_wrt_new_logprobs"]]
    assert checker.check_case("dr_grpo", checker.complete("dr_grpo", cases), inputs).worst > 1e-3
    cases["dr_grpo"]["l_max"] = 13
    for name in ("dr_grpo", "dr_grpo_verl_jan2026"):
        assert checker.check_case(name, checker.complete(name, cases), inputs).worst < 1e-12
    cases["gspo_wide_clip"]["conventions"]["clip"] = "0.07 / 0.2"
    assert checker.build("gspo_token", checker.complete("gspo_token", cases))._clip.keywords["high"] == 0.2


def test_unknown_objective_and_empty_folder(checker, golden_copy, tmp_path, capsys):
    assert checker.main([str(golden_copy), "--objective", "gdpo_papr"]) == 2
    assert "did you mean 'gdpo_paper'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert checker.main([str(tmp_path / "empty"), "--subset"]) == 2
