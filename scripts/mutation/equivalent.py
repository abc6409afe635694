"""Mutants that do the same as the code, and why. Keyed by `Mutant.key`, which has no line numbers."""

from __future__ import annotations

BOOLEAN = "only comparisons are made of it, and they carry no gradient"
SHAPE = "only its shape is used"
UNUSED = "the argument is not used"

FLAT = "matters only for a count that makes the group flat, where numerator and denominator are filled"
MASKED = "what differs is overwritten by the masked_fill that follows"
NO_ROW = "a group without a valid row: NaN compares false, and its numerators are 0"
MEAN = "torch.zeros_like(count_P).index_add(0, index_B, reward_B) / count_P"
MAXRL = "(numerator_B / torch.where(mean_B > 0, mean_B + eps, 1)).masked_fill(mean_B <= 0, 0)"
FILLED = "(std + eps).expand_as(reward_B).masked_fill(flat_B, 1)"
SILENT = "silent_B = ~valid_B | (n_B < k) | (sigma_B == 0)"
PASSK = "return (numerator_B / sigma_B.masked_fill(silent_B, 1)).masked_fill(silent_B, 0)"
CORRECT = "correct_B = (reward_B >= threshold - 1e-06) & valid_B"
CHOOSE = "ratio_B = ratio_B * (a_B - j).clamp(min=0) / (b_B - j).clamp(min=1)"
ENOUGH = "b >= k wherever the row counts; the others are overwritten"
SAME_SUM = "both branches compute the same sum; this one is quicker for 1"
CERTAIN = "a token that became certain is infinitely far instead of very far: beyond any threshold either way"
EPS = "new_BT, old_BT = (new_BT.clamp(eps, 1 - eps), old_BT.clamp(eps, 1 - eps))"
OLD = "old_BT = new_BT / ratio_BT.detach().clamp(min=torch.finfo(ratio_BT.dtype).tiny)"
FELL, ROSE = "far_BT & (advantages_BT < 0) & (ratio_BT < 1)", "far_BT & (advantages_BT > 0) & (ratio_BT > 1)"
UNMOVED = "at a ratio of 1 nothing has moved, so it is not far"
NEVER = "low_BT = _never(ratio_BT)[0] if floor is None else ratio_BT < floor"
TAU = "tau_BT = torch.where(advantages_BT > 0, tau_positive, tau_negative).to(ratio_BT.dtype)"
KL = "return (p_TV * (log_p_TV - log_q_TV).masked_fill(p_TV == 0, 0)).sum(-1)"
WEIGHT = "weight_BT = w_BT * advantages_BT + beta * _component(w_BT, divergence)"
RPG_KL = "kl_BT = beta * _component(w_BT.clamp(1 - low, 1 + high), divergence)"
AWAY = "torch.where(high_BT, 1 + high, torch.where(away_BT, dual, w_BT))"
DETACHED = "it is detached already, or all that is made of it is"
ANY_LOW = "a lower bound of 0 or of 1 passes the same check"
REGULARISED = "advantages_BT - beta * log_w_BT if divergence == 'reverse_unnormalised' else advantages_BT"
COUNTED = "zeros_P.index_add(0, index_B, values_B.masked_fill(~valid_B, 0)) / count_P"
ZEROS = "zeros_P = values_B.new_zeros(int(index_B.max()) + 1 if len(index_B) else 0)"
STD_P = "std_P = (square_P / (count_P - ddof).clamp(min=1)).sqrt()"
VARIANCE = "variance = (count_BT * centred_BT.square()).sum() / (tokens - ddof).clamp(min=1)"
STD = "std = (over_batch_B.square().sum() / (count_1 - ddof).clamp(min=1)).sqrt()"

K2 = "return ratio_BT.detach() * k2(logprobs_BT, ref_logprobs_BT, ratio_BT)"
K3 = "return ratio_BT.detach() * k3(logprobs_BT, ref_logprobs_BT, ratio_BT)"
PROBED = "asked only for what it refuses, which no value here is"
SQUARE = "a square"
NO_GRAD = "under no_grad nothing has a gradient"
KNOWN = "known = {'old_logprobs_BT': -one_BT, 'values_BT': one_BT, 'greedy_BR': one_BT}"
GAE = "raw_BT, returns_BT = gae(rewards_BT, values_BT, on_BT, gamma=gamma, lam=lam, holes=holes)"
GAE_IN = "(rewards_BT.masked_fill(~on_BT, 0), values_BT.masked_fill(~on_BT, 0))"
DELTA = "delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]"
STEP = "advantage_B, value_B = (delta_B + gamma * lam * next_advantage_B, values_BT[:, t])"

EQUIVALENT: dict[str, str] = {
    f"kl.py:k2_is: {K2} -> {K2.replace('(logprobs_BT, ref_logprobs_BT,', '(ref_logprobs_BT, logprobs_BT,')}": SQUARE,
    f"kl.py:k2_is: {K2} -> {K2.replace('ratio_BT)', 'ratio_BT.detach())')}": UNUSED,
    f"kl.py:k3_is: {K3} -> {K3.replace('ratio_BT)', 'ratio_BT.detach())')}": UNUSED,
    f"critic.py:gae_advantages: {GAE} -> {GAE.replace('values_BT', 'values_BT.detach()')}": NO_GRAD,
    f"critic.py:gae: {GAE_IN} -> {GAE_IN.replace('values_BT', 'values_BT.detach()')}": NO_GRAD,
    f"critic.py:gae: {DELTA} -> {DELTA.replace('values_BT', 'values_BT.detach()')}": NO_GRAD,
    f"critic.py:gae: {STEP} -> {STEP.replace('values_BT', 'values_BT.detach()')}": NO_GRAD,
    "critic.py:gae: return (advantages_BT, advantages_BT + values_BT) -> "
    "return (advantages_BT, advantages_BT + values_BT.detach())": NO_GRAD,
    f"objective.py:_check_choices: {KNOWN} -> {KNOWN.replace('-one_BT', 'one_BT')}": PROBED,
    "objective.py:_check_choices: self._clip(one_BT, one_BT, -one_BT, one_BT, **marked) -> "
    "self._clip(one_BT, one_BT, one_BT, one_BT, **marked)": PROBED,
    f"advantage.py:group_mean_batch_std: {FILLED} -> {FILLED.replace('flat_B, 1', 'flat_B, 2')}": "its numerator is 0",
    f"advantage_binary.py:_counts: {CORRECT} -> {CORRECT.replace('>=', '>')}": "1e-6 is slack for rounding; no "
    "reward is exactly there",
    f"advantage_binary.py:_choose_ratio: {CHOOSE} -> {CHOOSE.replace('.clamp(min=0)', '')}": "a is whole: the product "
    "is 0 before a factor is negative, and a = -1 only where the other branch is taken",
    f"advantage_binary.py:_choose_ratio: {CHOOSE} -> {CHOOSE.replace('.clamp(min=1)', '')}": ENOUGH,
    f"advantage_binary.py:_choose_ratio: {CHOOSE} -> {CHOOSE.replace('min=1', 'min=0')}": ENOUGH,
    "advantage_token.py:_to_go: discount == 1 -> discount == 0": SAME_SUM,
    "advantage_token.py:_to_go: discount == 1 -> discount == 2": SAME_SUM,
    f"advantage_binary.py:passk: {SILENT} -> {SILENT.replace('n_B < k', 'n_B <= k')}": "with n = k sigma is 0",
    f"advantage_binary.py:passk: {PASSK} -> {PASSK.replace('.masked_fill(silent_B, 1)', '')}": MASKED,
    f"advantage_binary.py:passk: {PASSK} -> {PASSK.replace('silent_B, 1', 'silent_B, 0')}": MASKED,
    f"advantage_binary.py:passk: {PASSK} -> {PASSK.replace('silent_B, 1', 'silent_B, 2')}": MASKED,
    f"rpg.py:rpg: {WEIGHT} -> {WEIGHT.replace('w_BT *', 'w_BT.detach() *')}": DETACHED,
    f"rpg.py:rpg: {WEIGHT} -> {WEIGHT.replace('(w_BT', '(w_BT.detach()')}": DETACHED,
    f"rpg.py:rpg_clip: {RPG_KL} -> {RPG_KL.replace('(w_BT', '(w_BT.detach()')}": DETACHED,
    f"rpg.py:rpg_clip: {AWAY} -> {AWAY.replace('w_BT', 'w_BT.detach()')}": DETACHED,
    "rpg.py:regularised_advantages: return advantages_BT - beta * (log_w_BT + 1) -> "
    "return advantages_BT - beta * (log_w_BT.detach() + 1)": DETACHED,
    f"rpg.py:regularised_advantages: {REGULARISED} -> {REGULARISED.replace('log_w_BT', 'log_w_BT.detach()')}": DETACHED,
    "rpg.py:_component: 1 - w_BT -> 1 - w_BT.detach()": DETACHED,
    "rpg.py:_component: -w_BT * (_log(w_BT) + 1) -> -w_BT.detach() * (_log(w_BT) + 1)": DETACHED,
    "rpg.py:_component: -w_BT * (_log(w_BT) + 1) -> -w_BT * (_log(w_BT.detach()) + 1)": DETACHED,
    "rpg.py:_component: -w_BT * _log(w_BT) -> -w_BT.detach() * _log(w_BT)": DETACHED,
    "rpg.py:_component: -w_BT * _log(w_BT) -> -w_BT * _log(w_BT.detach())": DETACHED,
    f"statistics.py:centre: {ZEROS} -> {ZEROS.replace('else 0', 'else 1')}": "without rows nothing is looked up",
    f"statistics.py:centre: {COUNTED}.clamp(min=1) -> {COUNTED}": FLAT,
    f"statistics.py:centre: {COUNTED}.clamp(min=1) -> {COUNTED}.clamp(min=0)": FLAT,
    f"statistics.py:centre: {COUNTED}.clamp(min=1) -> {COUNTED}.clamp(min=2)": FLAT,
    f"statistics.py:normalise: {STD_P} -> {STD_P.replace('.clamp(min=1)', '')}": FLAT,
    f"statistics.py:normalise: {STD_P} -> {STD_P.replace('min=1', 'min=0')}": FLAT,
    "statistics.py:normalise: return centred_B / (std_P[index_B] + eps).masked_fill(flat_B, 1) -> "
    "return centred_B / (std_P[index_B] + eps).masked_fill(flat_B, 2)": "its numerator is 0",
    f"statistics.py:whiten: {VARIANCE} -> {VARIANCE.replace('.clamp(min=1)', '')}": "a single token is flat",
    f"statistics.py:whiten: {VARIANCE} -> {VARIANCE.replace('min=1', 'min=0')}": "a single token is flat",
    "correction.py:truncate: _check_bounds(0.0, high) -> _check_bounds(1, high)": ANY_LOW,
    "correction.py:mask: _check_bounds(low or 0.0, high) -> _check_bounds(low or 1, high)": ANY_LOW,
    f"advantage_binary.py:maxrl: {MEAN}.clamp(min=1) -> {MEAN}": NO_ROW,
    f"advantage_binary.py:maxrl: {MEAN}.clamp(min=1) -> {MEAN}.clamp(min=0)": NO_ROW,
    f"advantage_binary.py:maxrl: {MAXRL} -> {MAXRL.replace('mean_B > 0', 'mean_B >= 0')}": MASKED,
    f"advantage_binary.py:maxrl: {MAXRL} -> {MAXRL.replace('eps, 1', 'eps, 0')}": MASKED,
    f"advantage_binary.py:maxrl: {MAXRL} -> {MAXRL.replace('eps, 1', 'eps, 2')}": MASKED,
    f"advantage.py:group_mean_batch_std: {STD} -> {STD.replace('.clamp(min=1)', '')}": FLAT,
    f"advantage.py:group_mean_batch_std: {STD} -> {STD.replace('min=1', 'min=0')}": FLAT,
    "clip.py:dppo: new_BT = logprobs_BT.detach().exp() -> new_BT = logprobs_BT.exp()": BOOLEAN,
    "clip.py:dppo: old_BT = new_BT / ratio_BT.detach().clamp(min=torch.finfo(ratio_BT.dtype).tiny) -> "
    "old_BT = new_BT.detach() / ratio_BT.detach().clamp(min=torch.finfo(ratio_BT.dtype).tiny)": BOOLEAN,
    "clip.py:dppo: old_BT = new_BT / ratio_BT.detach().clamp(min=torch.finfo(ratio_BT.dtype).tiny) -> "
    "old_BT = new_BT / ratio_BT.clamp(min=torch.finfo(ratio_BT.dtype).tiny)": BOOLEAN,
    "clip.py:dppo: distance_BT = (new_BT - old_BT).abs() -> distance_BT = (new_BT.detach() - old_BT).abs()": BOOLEAN,
    "clip.py:dppo: new_BT, old_BT = (new_BT.clamp(eps, 1 - eps), old_BT.clamp(eps, 1 - eps)) -> "
    "new_BT, old_BT = (new_BT.detach().clamp(eps, 1 - eps), old_BT.clamp(eps, 1 - eps))": BOOLEAN,
    "clip.py:dppo: old_BT * (old_BT / new_BT).log() + (1 - old_BT) * ((1 - old_BT) / (1 - new_BT)).log() -> "
    "old_BT * (old_BT / new_BT.detach()).log() + (1 - old_BT) * ((1 - old_BT) / (1 - new_BT)).log()": BOOLEAN,
    "clip.py:dppo: old_BT * (old_BT / new_BT).log() + (1 - old_BT) * ((1 - old_BT) / (1 - new_BT)).log() -> "
    "old_BT * (old_BT / new_BT).log() + (1 - old_BT) * ((1 - old_BT) / (1 - new_BT.detach())).log()": BOOLEAN,
    f"clip.py:dppo: {EPS} -> {EPS.replace('1 - eps', '1 + eps', 1)}": CERTAIN,
    f"clip.py:dppo: {EPS} -> {EPS.replace('1 - eps', '2 - eps', 1)}": CERTAIN,
    f"clip.py:dppo: {OLD} -> old_BT = new_BT / ratio_BT.detach()": "infinity is as far as its bound, and NaN compares "
    "false, as 0 does",
    f"clip.py:dppo: {FELL} -> {FELL.replace('ratio_BT <', 'ratio_BT <=')}": UNMOVED,
    f"clip.py:dppo: {ROSE} -> {ROSE.replace('ratio_BT >', 'ratio_BT >=')}": UNMOVED,
    f"clip.py:cispo: {NEVER} -> {NEVER.replace('[0]', '[1]')}": "both are the same",
    f"clip.py:sapo: {TAU} -> {TAU.replace('> 0', '>= 0')}": "times an advantage of 0",
    f"distillation.py:_kl: {KL} -> {KL.replace(', 0)', ', 1)')}": "times a probability of 0",
    "distillation.py:generalised_jsd: x.masked_fill(neither_TV, torch.finfo(x.dtype).min / 4) -> "
    "x.masked_fill(neither_TV, torch.finfo(x.dtype).min / 5)": "any number whose exponential is 0 does",
    "clip.py:rpg_dual_clip: regularised_BT = regularised_advantages(ratio_BT, advantages_BT, divergence, beta) -> "
    "regularised_BT = regularised_advantages(ratio_BT.detach(), advantages_BT, divergence, beta)": "the function "
    "detaches what it returns",
    "clip.py:rpg_dual_clip: return ppo(ratio_BT, regularised_BT, logprobs_BT, mask_BT, low=low, high=high, dual=dual) "
    "-> return ppo(ratio_BT, regularised_BT, logprobs_BT.detach(), mask_BT, low=low, high=high, dual=dual)": UNUSED,
    "distillation.py:generalised_jsd: x.masked_fill(neither_TV, torch.finfo(x.dtype).min / 4) -> "
    "x.masked_fill(neither_TV, torch.finfo(x.dtype).min)": "a fourth is a margin; both sides get the same "
    "number, whose exponential is 0 and whose difference is 0",
    "distillation.py:generalised_jsd: torch.stack([teacher_TV + weights_2[0], student_TV + weights_2[1]]) -> "
    "torch.stack([teacher_TV + weights_2[0], student_TV.detach() + weights_2[1]])": "the gradient through the mixture "
    "is -sum dM = 0, because the mixture sums to 1",
    "ratio.py:sequence: return safe_exp(mean_B1).expand_as(new_logprobs_BT) -> "
    "return safe_exp(mean_B1).expand_as(new_logprobs_BT.detach())": SHAPE,
    "ratio.py:sequence_product: return safe_exp(difference_BT.sum(dim=1, keepdim=True)).expand_as(new_logprobs_BT) -> "
    "return safe_exp(difference_BT.sum(dim=1, keepdim=True)).expand_as(new_logprobs_BT.detach())": SHAPE,
    "kl.py:k3_plus: pull_BT = k2(logprobs_BT, ref_logprobs_BT, ratio_BT) -> "
    "pull_BT = k2(ref_logprobs_BT, logprobs_BT, ratio_BT)": "k2 is symmetric",
    "kl.py:k3_plus: pull_BT = k2(logprobs_BT, ref_logprobs_BT, ratio_BT) -> "
    "pull_BT = k2(logprobs_BT, ref_logprobs_BT, ratio_BT.detach())": UNUSED,
    "kl.py:k3_corrected: return ratio_BT * k3(logprobs_BT, ref_logprobs_BT, ratio_BT) -> "
    "return ratio_BT * k3(logprobs_BT, ref_logprobs_BT, ratio_BT.detach())": UNUSED,
}
