"""Values that would fail only when their stage begins are refused before the first stage does."""

import subprocess
import sys

import pytest
import torch

from lit_reason import zoo
from lit_reason.cli import train
from lit_reason.cli.stages import load_model
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra
from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.errors import ConfigError
from lit_reason.models import ModelConfig, Transformer

ROAD = "experiment=arith_from_scratch"


def check(*overrides):
    train.check(without_hydra(compose("train", list(overrides))))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.shape.group_size=1", "rollout.shape.group_size: got 1; valid: 2 or more.*Type rollout.shape"),
        # 64 prompts of 8 completions are 512 sequences
        ("rollout.shape.micro_batches=3", "512 sequences.*micro_batches=3; valid: a divisor of 512"),
        ("rollout.shape.minibatches=3", "prompts_per_round=64 is not divisible by rollout.shape.minibatches=3"),
        ("rollout.shape.rounds=0", "rollout.shape.rounds=0: must be at least 1"),
        ("algorithm.clip.name=ppp", "got 'ppp'; did you mean 'ppo'.*Type algorithm.clip.name=NAME"),
        ("algorithm.advantage.eps=-1", "advantage.eps: got -1.*valid: a finite number >= 0. Type algorithm.advantage"),
        ("algorithm.aggregation=mean", "got 'mean'; .*valid: .*token_mean.*Type algorithm.aggregation=NAME"),
        ("algorithm.kl.name=k3_los", "'k3_los'.*'k3_loss'"),
        ("rollout.sampling.temperature=0", "temperature=0: RL needs.*Type rollout.sampling.temperature=1.0"),
        ("rollout.sampling.temperature=-1", "rollout.sampling.temperature=-1: must be 0 .greedy. or above"),
        ("rollout.sampling.top_p=1.5", r"rollout.sampling.top_p=1.5: must be in \(0, 1\]"),
        ("trainer.devices=3", "512 sequences per optimizer step.*micro_batches=4 times 3 processes; valid: a divisor"),
        ("trainer.devices=[0,1,2]", "micro_batches=4 times 3 processes"),
        ("trainer.accelerator=cuda", "trainer.accelerator=cuda: torch finds no such device here. Type trainer=cpu"),
        ("trainer.num_nodes=3", "micro_batches=4 times 3 processes"),
        ("sft.trainer.max_steps=0", "trainer.max_steps=0: a supervised stage needs a length.*Type trainer.max_steps="),
        ("sft.trainer.max_steps=null", "trainer.max_steps=None: a supervised stage needs a length"),
        # linear and 250 steps long
        ("sft.optimizer.warmup_steps=250", "warmup_steps=250 leaves no step of the run's 250: type .*warmup_steps=25"),
        ("optimizer.schedule=lineer", "optimizer.schedule='lineer': did you mean 'linear'"),
        ("model.heads=0", "model.heads=0: must be at least 1"),
        ("reward.length.buffer=41", "got max_tokens=40, buffer=41; valid: 0 <= buffer <= max_tokens"),
        ("reward=[]", "got no reward; valid: at least one, type e.g. 'reward="),
        ("rollout.shape=null", "rollout.shape=None; valid: a node with a _target_"),
        ("text.seed=3", "text.seed is set by the run itself; leave it out. Type seed=VALUE"),
        ("trainer.accumulate_grad_batches=2", "leave it out. Type rollout.shape.micro_batches=VALUE"),
        ("sft.model.rope_theta=5e5", "sft takes the model that the stage before it leaves.*type model.KEY=VALUE"),
        ("rl.model.width=64", "rl.model is set, but rl takes the model"),
        ("rl.init=foo", "rl.init is set, but.*type init=NAME"),
        ("evaluation.n=abc", "evaluation.n='abc'; valid: a whole number of 0 or more"),
        ("evaluation.n=-5", "evaluation.n=-5; valid: a whole number of 0 or more"),
        ("evaluation.k=-1", "evaluation.k=-1; valid: a whole number of 0 or more"),
        ("rollout.engine.dtype=float16", "rollout.engine.dtype='float16': valid bfloat16, float32"),
        ("rollout.engine.max_rows=0", "rollout.engine.max_rows=0: must be at least 1"),
        ("rollout.engine.speculative=true", "Type model.mtp_depth=1, or leave"),
        ("reward.format=null", "reward.format=None is no reward. To leave it out type '~reward.format'"),
        ("rubric.max_fault_fraction=abc", "rubric.max_fault_fraction='abc' is not valid: expected float"),
        ("rubric.max_fault_fraction=1.5", "rubric.max_fault_fraction=1.5; valid: a number from 0 to 1"),
        ("rollout.max_fault_fraction=0.1", "rollout.max_.* has moved. Type rubric.max_fault_fraction=VALUE"),
        ("+rollout.max_fault_fraction=0.1", "rollout.max_.* has moved. Type rubric.max_fault_fraction=VALUE"),
        ("rl.rollout.max_fault_fraction=0.1", "rl.rollout.max_.* has moved. Type rl.rubric.max_fault_fraction=VALUE"),
        ("rubric.rewards={a: 1}", "rubric.rewards is set by the run itself; leave it out. Type 'reward="),
        ("rubric.condition={length: {on: answer, at_least: 1}}", "unknown key rubric.condition.*'rubric.conditions'"),
        ("rubric.conditions={lenght: {on: answer, at_least: 1}}", "no reward 'lenght': did you mean 'length'"),
        ("rubric.conditions.length={on: anwser, at_least: 1}", "no reward 'anwser': did you mean 'answer'"),
        ("rubric.conditions.length.on=format", "rubric.conditions.length lacks 'at_least'. Type"),
        ("rubric.clip={length: [1, 0]}", r"rubric.clip.length=\[1, 0\]; valid: low <= high. Type"),
        ("rubric.scale.anwser=2", "rubric.scale.anwser: there is no reward 'anwser': did you mean 'answer'"),
        ("data.curriculum={_target_: lit_reason.data.Curriculum, start: 0}", "data.curriculum.start=0; valid: above 0"),
        ("data.curriculum={_target_: lit_reason.data.Curriculum, round: 9}", "curriculum.round .*mean .rounds."),
        ("data.curriculum={start: 0.5}", "data.curriculum=.*; valid: a node with a _target_"),
        ("rubric=null", "rubric=None; valid: a node with a _target_"),
        ("priming=null", "priming=None; valid: a node with a _target_"),
        ("priming.seq_len=0", "priming.seq_len=0; valid: a whole number of 1 or more"),
        ("priming.n_examples=0", "priming.n_examples=0; valid: a whole number of 1 or more"),
        ("priming.style=foo", "priming.style='foo': valid: columns, steps. Type priming.style=NAME"),
        ("priming.terse_fraction=1.5", "priming.terse_fraction=1.5; valid: a number from 0 to 1"),
        ("text.seq_len=1", "text.seq_len=1; valid: a whole number of 2 or more"),
        ("router_bias_rate=abc", "router_bias_rate='abc'; valid: a number 0 or more"),
        ("rl={trainer: {max_steps: 10}, optimizer: {warmup_steps: 20}}", "warmup_steps=20 leaves no step of .* 10"),
        ("algorithm={entropy: 0.1}", "unknown key algorithm.entropy: did you mean .*'algorithm.entropy_coef'"),
    ],
)  # fmt: skip
def test_refused_before_any_training(override, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=said):
        check(ROAD, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("algorithm=opd", "reference=frozen: the objective distils from a teacher. Type reference=teacher"),
        ("reference=teacher reference.name=dir:/nowhere algorithm=gkd", "there is no folder /nowhere"),
        ("reference=teacher reference.name=arith-9m algorithm=gkd", "no model 'arith-9m' in the shelf"),
        ("adapter=lora adapter.dropout=0.1", "adapter.dropout: RL compares.*Type adapter.dropout=0"),
        ("adapter=lora algorithm=ppo", "a copy of a frozen policy could not learn. Type algorithm.critic.trunk=shared"),
        ("adapter=lora reference=ema", "reference=ema with an adapter.*Type reference=frozen, or adapter=none"),
        ("adapter=lora rl.router_bias_rate=0.1", "would move its reference. Type rl.router_bias_rate=0"),
        ("rollout=builtin_process rollout.replicas=0", "rollout.replicas=0: a whole number, at least 1"),
        (
            "rollout=builtin +rollout.replicas=2",
            "a BuiltinEngine is not started in a process by us. Type rollout=builtin_process",
        ),
        (
            "rollout=builtin_process rollout.replicas=3 rollout.engine.cores=[0,1]",
            "replicas=3 on 2 cores .*at least one",
        ),
        ("algorithm=ppo rollout.shape.refills=1", "'gae' does not compare.*Type rollout.shape.refills=0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_training(overrides, said):
    with pytest.raises(ConfigError, match=said):
        check(ROAD, *overrides.split())


def test_several_updates_of_a_round_need_a_ratio():
    with pytest.raises(ConfigError, match=r"reinforce has no ratio.*makes 4 of it.*algorithm.clip=none"):
        check(ROAD, "algorithm=rloo", "rollout.shape.minibatches=4")
    check(ROAD, "algorithm=rloo", "rollout.shape.minibatches=4", "algorithm.clip=none")
    check(ROAD, "algorithm=rloo")


def test_the_message_names_the_stage_and_how_to_set_it_there_alone():
    with pytest.raises(ConfigError) as caught:
        check(ROAD, "sft.trainer.max_steps=0")
    assert any("in the stage sft; sft.KEY=VALUE" in note for note in caught.value.__notes__)
    check(ROAD, "trainer=ddp_cpu", "rl.trainer.devices=1")


@pytest.mark.parametrize(
    "line",
    [
        [ROAD],
        [ROAD, "debug=fdr"],
        [ROAD, "debug=limit"],
        [ROAD, "pretrain.model.rope_theta=5e5", "priming.n_examples=null", "evaluation.n=0"],
        [ROAD, "trainer.devices=auto"],  # one on most machines: known when the trainer starts
        ["experiment=arith_gdpo", "algorithm=dr_grpo", "rollout.shape.minibatches=2"],
        ["experiment=arith_gdpo", "+algorithm.correction={name: truncate, level: token, high: 2.0}"],
        ["stages=[sft]", "trainer.max_steps=5", "rollout.shape.group_size=1", "rollout.sampling.temperature=0"],
        ["experiment=arith_gdpo", "rubric.conditions.length={on: answer, at_least: 1.0}"],
        ["experiment=arith_gdpo", "+rubric.conditions={length: {on: answer, at_least: 1}}"],
        ["experiment=arith_gdpo", "rubric.conditions={length: {on: answer, at_least: 1}}", "rubric.scale.length=2"],
        ["experiment=arith_gdpo", "data.curriculum={_target_: lit_reason.data.Curriculum, rounds: 9}"],
        ["stages=[pretrain]", "trainer.max_steps=5", "trainer.devices=2", "reward=[]"],
    ],
)
def test_what_is_right_or_of_no_concern_to_a_stage_passes(line):
    check(*line)


def test_a_users_own_reward_is_not_built_to_be_checked(tmp_path, monkeypatch):
    (tmp_path / "costly_pkg").mkdir()
    (tmp_path / "costly_pkg" / "__init__.py").write_text("class Judge:\n    def __init__(self): raise MemoryError\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = ["reward=[answer]", "allow_targets=[costly_pkg]", "+reward.judge._target_=costly_pkg.Judge"]
    check(*line)
    check(*line, "rubric.conditions.judge={on: answer, at_least: 1.0}")
    with pytest.raises(ConfigError, match="no reward 'juge': did you mean 'judge'"):
        check(*line, "rubric.conditions.answer={on: juge, at_least: 1.0}")


def test_most_refusals_do_not_wait_for_lightning():
    """Its import takes seconds; the algorithm and the shape of a round need torch alone."""
    code = (
        "import sys; from lit_reason.cli.train import check; from lit_reason.config.compose import compose\n"
        "from lit_reason.config.stage import without_hydra\n"
        "try: check(without_hydra(compose('train', ['rollout.shape.group_size=1'])))\n"
        "except ValueError as error: print('lightning' in sys.modules, error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("False rollout.shape.group_size")


def test_rl_from_random_weights_is_warned_of(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(train, "run_stage", lambda *_: tmp_path)
    for line, warned in (([], True), (["init=arith-1m.sft"], False), (["stages=[sft,rl]"], False)):
        caplog.clear()
        train.run(without_hydra(compose("train", line)))
        messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(messages) == warned
        assert all(text.startswith("init=null") and "Type init=arith-1m.sft" in text for text in messages)
        assert all("\n" not in text for text in messages)


def test_a_model_saved_in_bfloat16_is_trained_in_float32(tmp_path):
    model = Transformer(ModelConfig(width=32, depth=2, heads=2, max_seq_len=64)).to(torch.bfloat16)
    info = {"recipe": "none", "seed": 1, "commit": "0123abc", "metrics": {}}
    tokenizer = ByteTokenizer()
    loaded = load_model(zoo.save(tmp_path / "half", model, tokenizer, info), tokenizer)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embed.weight, model.embed.weight.float())
