"""The adapter against the real library, where it is installed: pip install 'lit-reason[verifiers]'."""

import importlib.util
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_reason.config import check_config, instantiate
from lit_reason.data import ByteTokenizer, PromptData
from lit_reason.environments import EnvironmentEngine, Verifiers, VerifiersPrompts
from lit_reason.environments import hosted as module
from lit_reason.errors import ConfigError
from lit_reason.rewards import Rubric, VerifiersReward
from lit_reason.rollout import Sampling
from lit_reason.types import Completion, RewardState

there = importlib.util.find_spec("verifiers") is not None and hasattr(__import__("verifiers"), "MultiTurnEnv")
real = pytest.mark.skipif(not there, reason="verifiers 0.1.14 to 0.3 is not installed")

PACKAGE = '''
import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"guess {i}", "answer": str(i)} for i in range(40)]


class Guess(vf.MultiTurnEnv):
    """Says higher or lower until the number is found; 13 breaks it, 14 makes it hang."""

    async def setup_state(self, state):
        state["guesses"] = 0
        return state

    @vf.stop
    async def found(self, state):
        return bool(state["trajectory"]) and state["trajectory"][-1]["completion"][-1].content == state["answer"]

    async def env_response(self, messages, state, **kwargs):
        import asyncio

        state["guesses"] += 1
        said = messages[-1].content
        if said == "13":
            raise vf.Error("a bad number")
        if said == "14":
            await asyncio.sleep(99)
        return [{"role": "user", "content": "higher" if said < state["answer"] else "lower"}]


async def solved(completion, answer):
    return float(completion[-1].content == answer)


def guesses(state):
    if state["guesses"] == 3:
        raise ValueError("three is not allowed")
    return state["guesses"]


def add(a: int, b: int = 1) -> int:
    """Adds.

    Args:
        a: one number.
        b: another.
    """
    return a + b


def load_environment(kind="guess", max_turns=10):
    data = Dataset.from_list(ROWS)
    rubric = vf.Rubric(funcs=[solved, guesses], weights=[2.0, 0.25])
    if kind == "guess":
        return Guess(dataset=data, rubric=rubric, max_turns=max_turns, system_prompt="A game.")
    if kind == "single":
        return vf.SingleTurnEnv(dataset=data, rubric=vf.Rubric(funcs=[solved]))
    if kind == "group":
        return vf.SingleTurnEnv(dataset=data, rubric=vf.Rubric(funcs=[lambda completions: [0.0] * len(completions)]))
    return vf.ToolEnv(dataset=data, rubric=vf.Rubric(funcs=[solved]), tools=[add], max_turns=max_turns)
'''


@pytest.fixture
def name(tmp_path, monkeypatch):
    """An installed environment package of that name."""
    (tmp_path / "lit_guess.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lit_guess", raising=False)
    module.load.cache_clear()
    return "lit-guess"


class Player:
    """An engine that writes, for each row, the next of the texts that its seed names."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.seen = tokenizer, texts, []

    def generate(self, prompts, sampling, seeds, sample_idx=None, progress=None):
        out = []
        for prompt, idx, seed in zip(prompts, sample_idx, seeds, strict=True):
            self.seen.append(self.tokenizer.decode(prompt.token_ids))
            ids = tuple(self.tokenizer.encode(self.texts[idx].pop(0), specials=True))[: sampling.max_tokens]
            stopped = ids[-1] in self.tokenizer.stop_ids
            finish = "stop" if stopped else "length"
            out.append(Completion(prompt.id, idx, ids, (-1.0,) * len(ids), "", finish, 0, seed))
        return out

    def push(self, model, version): ...

    def version(self):
        return 0


@pytest.fixture
def play(name):
    """`play(kind, texts)`: row i of the data is guessed at by the texts i; completions, scores, what was read."""

    def make(kind, texts, max_tokens=200, rows=None, function=None, timeout_s=1.0, **args):
        args = {"kind": kind, **args}
        tokenizer = ByteTokenizer()
        prompts = PromptData(VerifiersPrompts(name, args), held_out_fraction=0.0).prompts()
        asked = [prompts[i] for i in rows or range(len(texts))]
        player = Player(tokenizer, [list(t) for t in texts])
        engine = EnvironmentEngine(player, Verifiers(name, args, timeout_s=timeout_s), tokenizer)
        done = engine.generate(asked, Sampling(max_tokens=max_tokens), range(len(asked)), range(len(asked)))
        rubric = Rubric({"verifiers": VerifiersReward(name, args, function)}, max_fault_fraction=1.0)
        return done, rubric.score(asked, done), player.seen

    return make


@real
def test_a_conversation_is_played_and_judged_as_theirs(play):
    """Row 3 is found by its third guess. 2 * solved + guesses / 4, where guesses counts the answers to wrong ones."""
    done, scores, seen = play("guess", [["0<|end|>"], ["5<|end|>", "0<|end|>", "1<|end|>"], ["2<|end|>"]])
    assert [c.text for c in done] == [
        "0",
        "5<|end|><|user|>lower<|assistant|>0<|end|><|user|>higher<|assistant|>1",
        "2",
    ]
    assert (
        seen[0] == "<|bos|><|user|>A game.\n\nguess 0<|assistant|>" and [c.finish_reason for c in done] == ["stop"] * 3
    )
    assert seen[-1] == "<|bos|><|user|>A game.\n\nguess 1<|assistant|>" + done[1].text[:-1]
    assert sum(done[1].mask) == 6 and done[0].mask is None
    assert scores.values_BR[:, 0].tolist() == [2.0, 2.0 + 2 / 4, 2.0]


@real
def test_limits_end_a_row_and_it_is_judged_as_far_as_it_came(play):
    """Ours (tokens: the answer does not fit) and theirs (max_turns)."""
    done, scores, _ = play("guess", [["7<|end|>"]], max_tokens=9)
    assert done[0].text == "7" and done[0].finish_reason == "length" and scores.values_BR[0, 0] == 0.25
    done, scores, _ = play("guess", [["7<|end|>", "8<|end|>", "0<|end|>"]], max_turns=2)
    assert done[0].text.endswith("8") and done[0].finish_reason == "stop" and scores.values_BR[0, 0] == 0.25


@real
def test_what_fails_in_their_environment_is_a_fault_of_that_row(play):
    done, scores, _ = play("guess", [["13<|end|>"], ["14<|end|>"], ["2<|end|>"]])
    assert done[0].fault == "Error: a bad number" and done[1].fault == "no answer within 1 s" and done[2].fault == ""
    assert scores.states_BR[:, 0].tolist() == [RewardState.ERROR, RewardState.ERROR, RewardState.OK]


@real
def test_a_reward_function_that_raises_is_a_fault_and_no_zero(play):
    texts = [["9<|end|>", "8<|end|>", "7<|end|>", "0<|end|>"], ["1<|end|>"]]
    _, scores, _ = play("guess", texts)
    assert scores.valid_B.tolist() == [False, True]
    assert scores.messages[0, "verifiers"] == "guesses: ValueError: three is not allowed"


@real
def test_one_function_of_their_rubric(play):
    assert play("guess", [["9<|end|>", "0<|end|>"]], function="guesses")[1].values_BR.tolist() == [[1.0]]
    _, scores, _ = play("guess", [["0<|end|>"]], function="gueses")
    assert "did you mean 'guesses'" in scores.messages[0, "verifiers"]


@real
def test_tools_of_theirs_are_called_by_tags(play):
    texts = [
        ['so <add>{"a": 2, "b": 3}</add>never', "5<|end|>"],
        ["<add>2 3</add>", "1<|end|>"],
        ['<add>{"c": 1}</add>', "2<|end|>"],
    ]
    done, scores, _ = play("tools", texts)
    assert done[0].text == 'so <add>{"a": 2, "b": 3}</add><result>5</result>5'
    assert done[1].text.startswith("<add>2 3</add><result>Extra data") and "unexpected keyword" in done[2].text
    assert scores.values_BR[:, 0].tolist() == [0.0, 1.0, 1.0]


@real
def test_single_turns_and_the_data_node(play, name):
    done, scores, _ = play("single", [["0<|end|>"], ["3<|end|>"]])
    assert [c.text for c in done] == ["0", "3"] and scores.values_BR[:, 0].tolist() == [1.0, 0.0]
    node = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "verifiers.yaml")
    node.merge_with_dotlist([f"source.name={name}", "source.size=30"])
    check_config(node)
    data = instantiate(node)
    assert len(data.prompts()) == 30 and data.prompts()[7].answer == "7"


@real
def test_a_rubric_over_groups_is_refused(name):
    with pytest.raises(ConfigError, match="judges whole groups"):
        Verifiers(name, {"kind": "group"})


def test_without_the_library_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lit-reason\[verifiers\]'"):
        Verifiers("x")


def test_a_release_without_its_interface_is_named(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "verifiers", SimpleNamespace(__version__="0.4.0"))
    with pytest.raises(ConfigError, match=r"verifiers 0\.4\.0 has no MultiTurnEnv; valid: 0\.1\.14 to 0\.3"):
        module.library()


def test_nothing_imports_the_library_before_it_is_asked_for():
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "lit_reason").rglob("*.py"))
    assert "import verifiers\n" not in source and "from verifiers" not in source
