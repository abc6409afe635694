"""Decoding in cohorts is the same function as the full forward, whoever enters and leaves."""

import pytest
import torch

from lit_reason.models import Transformer
from lit_reason.models import cohorts as module
from lit_reason.models.cohorts import Cohort, Cohorts


class Batch:
    """A model's rows in cohorts; `ids` holds what every row has read."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.rows, self.ids = model, Cohorts(), []

    def admit(self, prompts: list[list[int]], prompt_of: list[int]) -> None:
        length_P = torch.tensor([len(p) for p in prompts])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
        cache = self.model.new_cache(len(prompts), padded.shape[1])
        self.model.prefill(padded, length_P, cache)
        self.rows.admit(Cohort(cache.layers, length_P, torch.tensor(prompt_of)))
        self.ids += [list(prompts[p]) for p in prompt_of]

    def step(self) -> None:
        """Every row reads a random token; its logits must be those of all its tokens at once."""
        token_B = torch.randint(0, 40, (len(self.ids),))
        self.rows.begin(torch.tensor([len(ids) for ids in self.ids]))
        logits_BV = self.model.head(self.model.decode_states(token_B[:, None], self.rows)[:, 0])
        self.rows.end()
        for ids, token in zip(self.ids, token_B.tolist(), strict=True):
            ids.append(token)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in self.ids], batch_first=True)
        last = torch.tensor([len(ids) - 1 for ids in self.ids])
        expected_BV = self.model(padded)[torch.arange(len(last)), last]
        torch.testing.assert_close(logits_BV, expected_BV, atol=1e-4, rtol=0)

    def drop(self, dead: set[int]) -> list[int]:
        alive = torch.tensor([b not in dead for b in range(len(self.ids))])
        kept = self.rows.drop(alive)
        index = list(range(len(self.ids))) if kept is None else kept.tolist()
        self.ids = [self.ids[b] for b in index]
        return index


@pytest.fixture
def batch(tiny) -> Batch:
    torch.manual_seed(0)
    return Batch(Transformer(tiny(max_seq_len=128)).eval())


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, 40, (n,)).tolist() for n in lengths]


@torch.inference_mode()
def test_rows_over_shared_prompts_beyond_the_first_slots(batch):
    batch.admit(prompts(3, 20, 9), [0, 0, 1, 1, 2, 2])
    assert batch.rows.cohorts[0].in_order and batch.rows.cohorts[0].prompts[0].shape[0] == 3
    for _ in range(36):  # own latents grow twice
        batch.step()
    assert batch.rows.cohorts[0].own[0].shape[1] == 48


@torch.inference_mode()
def test_prompts_with_unequal_numbers_of_rows_in_any_order(batch):
    batch.admit(prompts(3, 20, 9), [2, 0, 2, 1, 2])
    assert not batch.rows.cohorts[0].in_order
    for _ in range(3):
        batch.step()


@torch.inference_mode()
def test_dead_rows_leave_and_take_their_prompts_along(batch):
    batch.admit(prompts(3, 20, 9, 5), [p for p in range(4) for _ in range(12)])
    for _ in range(5):
        batch.step()
    index = batch.drop(set(range(12, 24)) | {0, 30, 47})  # all rows of the second prompt
    assert len(index) == 48 and len(batch.rows.cohorts[0].prompts[0]) == 4, "33 rows are decoded as 48: nobody leaves"
    index = batch.drop(set(range(12, 26)) | {0, 30, 47})
    assert len(index) == 32 and set(index) >= {b for b in range(48) if not 12 <= b < 26} - {0, 30, 47}
    assert len(batch.rows.cohorts[0].prompts[0]) == 3
    for _ in range(3):
        batch.step()


@pytest.mark.parametrize("lengths", [(3, 20), (40, 20)])  # the younger cohort's prompts are shorter, or longer
@torch.inference_mode()
def test_cohorts_of_different_ages_apart_and_joined(batch, monkeypatch, lengths):
    monkeypatch.setattr(module, "SMALL", 0)
    batch.admit(prompts(lengths[0], 30), [0, 0, 1, 1])
    for _ in range(20):
        batch.step()
    batch.admit(prompts(lengths[1], 4), [0, 0, 0, 1])
    for _ in range(3):
        batch.step()
    assert batch.drop(set()) == list(range(8)) and len(batch.rows.cohorts) == 2
    monkeypatch.setattr(module, "SMALL", 32)
    batch.admit(prompts(lengths[1] + 1, 4), [0, 1])
    batch.step()
    batch.drop(set())
    assert [len(cohort) for cohort in batch.rows.cohorts] == [10]
    for _ in range(20):
        batch.step()


@torch.inference_mode()
def test_a_cohort_without_live_rows_is_gone(batch):
    batch.admit(prompts(3), [0] * 2)
    batch.step()
    batch.admit(prompts(5), [0] * 3)
    batch.step()
    assert batch.drop({0, 1}) == [2, 3, 4] and len(batch.rows.cohorts) == 1
    batch.step()
    assert batch.drop({0, 1, 2}) == [] and batch.rows.cohorts == []
