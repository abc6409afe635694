"""Verifiers, one idea per file, and the rubric that keeps one column per reward."""

from lit_reason.rewards.answer import AnswerAnywhere, AnswerExact
from lit_reason.rewards.base import ItemReward, Reward, RewardFault, Tags
from lit_reason.rewards.distance import AnswerDistance
from lit_reason.rewards.format import FormatApprox, FormatExact
from lit_reason.rewards.length import Length
from lit_reason.rewards.numbers import Number, last_number, parse_number, same_answer
from lit_reason.rewards.reasoning_gym import ReasoningGymScore
from lit_reason.rewards.rubric import Rubric
from lit_reason.rewards.shuffled import ShuffledRubric
from lit_reason.rewards.transforms import Transforms, conditioned
from lit_reason.rewards.verifiers_rubric import VerifiersReward

__all__ = [
    "AnswerAnywhere",
    "AnswerDistance",
    "AnswerExact",
    "FormatApprox",
    "FormatExact",
    "ItemReward",
    "Length",
    "Number",
    "ReasoningGymScore",
    "Reward",
    "RewardFault",
    "Rubric",
    "ShuffledRubric",
    "Tags",
    "Transforms",
    "VerifiersReward",
    "conditioned",
    "last_number",
    "parse_number",
    "same_answer",
]
