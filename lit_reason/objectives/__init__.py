"""Policy-gradient objectives on five independent axes: advantage, ratio, clip, aggregation, KL.

| file           | axis                                                                                            |
|----------------|-------------------------------------------------------------------------------------------------|
| advantage*.py  | rewards to advantages: group_mean, group_norm, gdpo, rloo, reinforce_pp, maxrl, ...             |
| ratio.py       | importance ratio: token, sequence, sequence_product, sequence_token                             |
| clip.py, rpg.py| the surrogate: ppo (with dual clip), none, reinforce, cispo, sapo, dppo, gmpo, rpg              |
| aggregation.py | weight of each token: seven denominators                                                        |
| kl.py          | k1, k2, k3, k3_plus, k3_corrected, in the loss, the reward or each token's reward               |
| correction.py  | optional: engine against trainer, truncate or mask, by token, sequence or geometric mean        |

Pure functions beside the axes: critic.py (GAE, value loss), distillation.py (generalised JSD), sampling.py (which
groups carry a signal).

A new choice is one function and one line in its file's table.
"""

from lit_reason.objectives.advantage import ADVANTAGES
from lit_reason.objectives.aggregation import AGGREGATIONS
from lit_reason.objectives.clip import CLIPS
from lit_reason.objectives.correction import CORRECTIONS, Correction
from lit_reason.objectives.critic import gae, value_loss
from lit_reason.objectives.distillation import generalised_jsd
from lit_reason.objectives.kl import ESTIMATORS
from lit_reason.objectives.objective import Objective, ObjectiveOutput, check_group_size
from lit_reason.objectives.ratio import RATIOS
from lit_reason.objectives.sampling import informative
from lit_reason.objectives.surrogate import Surrogate

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CLIPS",
    "CORRECTIONS",
    "ESTIMATORS",
    "RATIOS",
    "Correction",
    "Objective",
    "ObjectiveOutput",
    "Surrogate",
    "check_group_size",
    "gae",
    "generalised_jsd",
    "informative",
    "value_loss",
]
