"""`model=hf`: priming and two rounds of RL on a tiny folder of transformers, through the console scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_reason.checkpoint import SafeCheckpointIO
from lit_reason.cli import train
from lit_reason.cli.hf import check_tokenizer, hf_folder
from lit_reason.config.compose import compose
from lit_reason.config.stage import without_hydra
from lit_reason.data import load_tokenizer
from lit_reason.data.tokenizer import save_for_transformers
from lit_reason.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
# Rewards of random text that vary within a group.
PACKAGE = """
class Share:
    def __init__(self, weight=1.0):
        self.weight = weight
    def __call__(self, prompts, completions):
        return [sum(t % 2 for t in c.token_ids) / len(c.token_ids) for c in completions]
"""
COMMAND = [
    *("stages=[sft,rl]", "data.source.size=200", "extras.threads=1", "evaluation.n=8", "reward=[]"),
    *("allow_targets=[odd]", "+reward.odd={_target_: odd.Share}", "rollout.sampling.max_tokens=8"),
    *("rollout.shape.rounds=2", "rollout.shape.prompts_per_round=4", "rollout.shape.group_size=4"),
    *("rollout.shape.minibatches=2", "rollout.shape.micro_batches=2", "optimizer.lr=0.01"),
    *("rollout.engine.dtype=float32", "trainer.precision=32-true"),
    *("sft.trainer.max_steps=2", "priming.n_examples=16", "priming.batch_size=8", "optimizer.warmup_steps=0"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A tied Llama of 12k parameters in bfloat16, and its tokenizer, trained on sums."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator(["User: What is 12 + 34?\nAssistant: <think>12+34=46</think>"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, eos_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "odd.py").write_text(PACKAGE)
    return tmp_path / "tiny"


def script(folder, name, *overrides):
    """One console script, started beside the folder: its exit code and what it says."""
    environment = {**os.environ, "PYTHONPATH": f"{folder.parent}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"lit_reason.cli.{name}", *overrides]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def weights(folder):
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}  # the file may still be mapped


def test_priming_and_rl_on_a_folder_of_transformers(folder):
    asked = [*COMMAND, "model=hf", "model.name=tiny", "data.tokenizer=tiny"]
    code, said = script(folder, "train", *asked)
    assert code == 0, said
    assert "random weights" not in said
    run = folder.parent / "runs" / "run"
    steps = [json.loads(line) for line in (run / "rl" / "metrics" / "steps.jsonl").open()]
    assert len(steps) == 4 and all(row["grad_norm"] > 0 for row in steps)
    assert all(abs(row["mismatch/kl"]) < 1e-5 for row in steps)  # engine and trainer compute the same float32 model

    start, primed, tuned = weights(folder), weights(run / "sft" / "model"), weights(run / "rl" / "model")
    assert start.keys() == primed.keys() == tuned.keys()
    for before, after in ((start, primed), (primed, tuned)):
        assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)
    held = SafeCheckpointIO().load_checkpoint(run / "rl" / "checkpoints" / "step=4.ckpt")["state_dict"]
    assert all(torch.equal(held[f"model.lm.{name}"], tuned[name]) for name in tuned)

    theirs, ours = AutoTokenizer.from_pretrained(run / "rl" / "model"), load_tokenizer(folder)
    assert load_tokenizer(run / "rl" / "model").fingerprint() == ours.fingerprint()
    chat = theirs.apply_chat_template([{"role": "user", "content": "1 + 2"}], return_dict=False)
    assert chat == ours.encode("User: 1 + 2\nAssistant: ", specials=True)
    info = json.loads((run / "rl" / "model" / "info.json").read_text())
    assert "HFConfig" in info["recipe"] and info["seed"] == 1

    (run / "rl" / "done.json").unlink()  # as if it had been stopped just before
    (run / "rl" / "model" / "model.safetensors").write_bytes(b"half")
    code, said = script(folder, "train", *asked)
    assert code == 0 and said.count("already done") == 1 and "resuming from" in said, said
    again = weights(run / "rl" / "model")
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)
    code, said = script(folder, "train", *asked, "sft.trainer.max_steps=3")
    assert (
        code == 1 and f"Type run_name=ANOTHER to begin anew, with model.name={run / 'sft' / 'model'} to go on" in said
    )

    code, said = script(folder, "eval", "checkpoint=dir:runs/run/rl/model", "data.source.size=200", "n=4", "run_name=e")
    assert code == 0 and "pass@1 (greedy)" in said, said
    code, said = script(folder, "generate", "checkpoint=dir:runs/run/rl/model", "prompt=1+2", "run_name=g")
    assert code == 0 and "1+2\n" in said, said


def check(*overrides):
    train.check(without_hydra(compose("train", list(overrides))))


def test_what_is_wrong_is_said_before_anything_is_trained(folder, tmp_path):
    check("model=hf", f"model.name={folder}")
    with pytest.raises(ConfigError, match=r"init=arith-1m.sft: with model=hf the weights .*Type init=null"):
        check("model=hf", f"model.name={folder}", "init=arith-1m.sft")
    with pytest.raises(ConfigError, match=r"no value for model.name. Type: model.name=VALUE"):
        check("model=hf")
    with pytest.raises(ConfigError, match=r"there is no such folder. Type model.name=PATH"):
        check("model=hf", f"model.name={tmp_path}/nowhere")
    with pytest.raises(ConfigError, match=r"unknown key model.width"):
        check("model=hf", f"model.name={folder}", "+model.width=3")
    code, said = script(folder, "train", *COMMAND, "model=hf", "model.name=tiny")  # data.tokenizer is "bytes"
    assert code == 1 and "data.tokenizer gives other ids" in said and "Type data.tokenizer=tiny" in said


def test_the_tokenizer_must_be_the_models_own(folder, tmp_path):
    check_tokenizer(str(folder), load_tokenizer(folder))
    other = load_tokenizer("bytes")
    with pytest.raises(DataError, match=r"gives other ids.*Type data.tokenizer="):
        check_tokenizer(str(folder), other)
    save_for_transformers(other, tmp_path / "bytes", None)
    check_tokenizer(str(tmp_path / "bytes"), other)
    (tmp_path / "none").mkdir()
    check_tokenizer(str(tmp_path / "none"), other)  # there is none to differ from


def test_which_folders_are_transformers_own(folder, tmp_path):
    assert hf_folder(f"dir:{folder}") == folder == hf_folder(folder)
    assert hf_folder(f"dir:{ROOT / 'zoo' / 'arith-1m.sft'}") is None
    assert hf_folder("arith-1m.sft") is None and hf_folder(tmp_path) is None
