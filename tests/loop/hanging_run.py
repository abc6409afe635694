"""A loop whose second generation never ends: python hanging_run.py error | ctrl-c"""

import sys
import threading
from types import SimpleNamespace

import torch

from lit_reason.loop import RolloutLoop, RoundShape, Stages
from lit_reason.types import Assessed, Completion, Prompt, Scores

begun, hangs = [], threading.Event()


def generate(prompts, seeds, samples):
    begun.append(True)
    if len(begun) == 2:
        print("hangs", flush=True)
        hangs.set()
        threading.Event().wait()
    return [Completion(p.id, 0, (5, 6), (-1.0, -1.0), "", "stop", 0, s) for p, s in zip(prompts, seeds, strict=True)]


stages = Stages(
    push=lambda version: None,
    generate=generate,
    score=lambda prompts, completions: Scores(("a",), torch.ones(1), torch.ones(1, 1), torch.zeros(1, 1).long()),
    assess=lambda values_BR, weights_R, group_B, mask_BT, **given: Assessed(mask_BT),
)
cursor = SimpleNamespace(next=lambda n: [Prompt("p", "q", "", "test", (1, 2))], state_dict=dict)
shape = RoundShape(rounds=3, prompts_per_round=1, group_size=1, staleness=1)
loop = RolloutLoop(cursor, stages, shape, request_seed=lambda *key: 1, seed=0, max_completion=2)
next(loop)
if sys.argv[1] == "ctrl-c":
    next(loop)
hangs.wait()
raise RuntimeError("training failed")
