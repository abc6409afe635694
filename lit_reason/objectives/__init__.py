"""Policy-gradient objectives on five independent axes: advantage, ratio, clip, aggregation, KL.

| file           | axis                                                                                            |
|----------------|-------------------------------------------------------------------------------------------------|
| advantage*.py  | rewards to advantages: group_mean, group_norm, gdpo, rloo, reinforce_pp, maxrl, ...             |
| ratio.py       | importance ratio: token, sequence, sequence_product, sequence_token                             |
| clip.py, rpg.py| the surrogate: ppo (with dual clip), none, reinforce, cispo, sapo, dppo, gmpo, rpg              |
| aggregation.py | weight of each token: seven denominators                                                        |
| kl.py          | nine terms named by place and gradient: k3_loss, k1_reward, k3_is_corrected, ...                |
| correction.py  | optional: engine against trainer, truncate or mask, by token, sequence or geometric mean        |
| critic.py      | optional: generalised advantages and the value loss of a critic (PPO)                           |
| distillation.py| optional: the generalised JSD to a teacher over the whole vocabulary (GKD)                      |
| sampling.py    | which groups carry a signal (dynamic sampling)                                                  |

A new choice is one function and one line in its file's table.
"""

from lit_reason.objectives.advantage import ADVANTAGES
from lit_reason.objectives.aggregation import AGGREGATIONS
from lit_reason.objectives.checks import check_group_size
from lit_reason.objectives.clip import CLIPS
from lit_reason.objectives.correction import CORRECTIONS, Correction
from lit_reason.objectives.critic import gae, value_loss
from lit_reason.objectives.distillation import generalised_jsd
from lit_reason.objectives.kl import KL_TERMS
from lit_reason.objectives.objective import Objective, ObjectiveOutput
from lit_reason.objectives.ratio import RATIOS
from lit_reason.objectives.sampling import informative
from lit_reason.objectives.surrogate import Surrogate

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CLIPS",
    "CORRECTIONS",
    "KL_TERMS",
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
