"""Completions in several turns: the policy writes, an environment answers, the policy goes on.

EnvironmentEngine(engine, Tools({"calculator": Calculator()}), tokenizer)   # an engine like any other

1+1<think><calculator>12*7</calculator><result>84</result></think><answer>84</answer><|end|>
mask        1 1 1 1 1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
"""

from lit_reason.environments.base import Environment, Step, Turn
from lit_reason.environments.calculator import Calculator, calculate
from lit_reason.environments.engine import EnvironmentEngine
from lit_reason.environments.python import Python
from lit_reason.environments.tools import Tool, ToolFault, Tools
from lit_reason.environments.verifiers_env import Verifiers, VerifiersPrompts

__all__ = [
    "Calculator",
    "Environment",
    "EnvironmentEngine",
    "Python",
    "Step",
    "Tool",
    "ToolFault",
    "Tools",
    "Turn",
    "Verifiers",
    "VerifiersPrompts",
    "calculate",
]
