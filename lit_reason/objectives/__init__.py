"""Policy-gradient objectives on five independent axes: advantage, ratio, clip, aggregation, KL.

| file           | axis                                                     |
|----------------|----------------------------------------------------------|
| advantage.py   | rewards to advantages: group_mean, group_norm, gdpo       |
| ratio.py       | importance ratio: token, sequence, sequence_token         |
| clip.py        | the surrogate: ppo (with dual clip), none                 |
| aggregation.py | weight of each token: six denominators                    |
| kl.py          | k1, k2, k3, k3_plus, k3_corrected, in the loss or reward  |

A new choice is one function and one line in its file's table.
"""

from lit_reason.objectives.advantage import ADVANTAGES
from lit_reason.objectives.aggregation import AGGREGATIONS
from lit_reason.objectives.clip import CLIPS, Surrogate
from lit_reason.objectives.kl import ESTIMATORS
from lit_reason.objectives.objective import Objective, ObjectiveOutput, check_group_size
from lit_reason.objectives.ratio import RATIOS

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CLIPS",
    "ESTIMATORS",
    "RATIOS",
    "Objective",
    "ObjectiveOutput",
    "Surrogate",
    "check_group_size",
]
