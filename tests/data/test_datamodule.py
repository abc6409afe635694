"""Batches count what they should, text holds nothing held out, and a Lightning run resumes on the very next batch."""

import re
from functools import partial
from itertools import chain

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from lit_reason.data import CursorLoader, PromptData, ReasoningGym, SFTData, TextData, priming, prompt_id, solve
from lit_reason.data.corpus import FACT_QUESTIONS, documents, pack
from lit_reason.data.loader import pair_batch, text_batch
from lit_reason.data.questions import held_out
from lit_reason.data.solvers import fact
from lit_reason.errors import ConfigError, DataError
from lit_reason.types import Prompt

FEW = {"chain_sum": {"max_terms": 2, "max_digits": 1}}  # 200 questions


def few(**kwargs):
    return PromptData(ReasoningGym(FEW, 200), held_out_fraction=0.25, **kwargs)


# --- batches


def test_pairs_count_their_completion_only():
    batch = pair_batch([([7, 8], [5, 6]), ([9], [1, 2, 3, 4])], pad_id=0)
    assert batch.input_ids_BT.tolist() == [[7, 8, 5, 0], [9, 1, 2, 3]]
    assert batch.target_ids_BT.tolist() == [[8, 5, 6, 0], [1, 2, 3, 4]]
    assert batch.mask_BT.tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.mask_BT.dtype == torch.float32 and batch.input_ids_BT.dtype == torch.int64


def test_text_rows_are_shifted_by_one():
    batch = text_batch(torch.arange(12).reshape(3, 4), [2, 0])
    assert batch.input_ids_BT.tolist() == [[8, 9, 10], [0, 1, 2]]
    assert batch.target_ids_BT.tolist() == [[9, 10, 11], [1, 2, 3]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_documents_are_packed_end_to_end():
    data = few()
    rows_NT = pack(["ab", "cde"], data.tokenizer, seq_len=3)
    bos, stop = data.tokenizer.bos_id, data.tokenizer.stop_ids[0]
    # 9 tokens: two rows of 4, the ninth dropped
    assert rows_NT.tolist() == [[bos, 97, 98, stop], [bos, 99, 100, 101]]
    with pytest.raises(DataError, match="4 tokens of text do not fill one row of seq_len=4"):
        pack(["ab"], data.tokenizer, seq_len=4)
    with pytest.raises(ConfigError, match="seq_len=1"):
        pack(["ab"], data.tokenizer, seq_len=1)


# --- pretraining text


def test_text_holds_no_held_out_question_and_every_training_one():
    data = few()
    # all prompts, the held-out ones too: the generator itself must leave them out
    texts = list(documents(data.prompts("all"), 0.25, bare_fraction=0.5, facts_fraction=0.5, max_digits=1))
    heads = {text.split("\n")[0] for text in texts}
    bare = {str(p.meta["reasoning_gym"]["entry"]["metadata"]["expression"]): p for p in data.prompts("all")}
    test = {p.question for p in data.test_prompts()}
    trained = {p.question for p in data.train_prompts()}
    seen = {head if head in trained | test else bare[head].question for head in heads if head in bare or " " in head}
    assert seen == trained and len(test) > 30
    # facts are the lines of documents without a question; none of them spells a held-out question of any wording
    facts = [line for text in texts if " " not in text.split("\n")[0] for line in text.split("\n")]
    assert len(facts) > 300
    for line in facts:
        a, op, b = _split(line.split("=")[0])
        assert not any(held_out(prompt_id(q.format(f"{a} {op} {b}")), 0.25) for q in FACT_QUESTIONS), line


def _split(expression):
    op = next(c for c in "+-*" if c in expression)
    a, b = expression.split(op)
    return a, op, b


def test_fact_wordings_are_those_of_the_tasks():
    tasks = {"chain_sum": {"max_terms": 2}, "basic_arithmetic": {"max_terms": 2}, "products": {}}
    for prompt in ReasoningGym(tasks, size=30):
        expression = prompt.meta["reasoning_gym"]["entry"]["metadata"]["expression"]
        assert prompt.question in {question.format(expression) for question in FACT_QUESTIONS}


def test_text_is_a_function_of_its_seed():
    prompts = few().prompts("all")
    one, same, other = (list(documents(prompts, 0.25, seed=s)) for s in (1, 1, 2))
    assert one == same and one != other
    assert all("<" not in text for text in one)


def test_text_of_unsolvable_prompts_is_refused():
    with pytest.raises(DataError, match="no worked solution for a prompt of jsonl/x"):
        list(documents([Prompt("f" * 16, "why?", "", "jsonl/x")], 0.0))


# --- datamodules


def test_sft_batches_spell_worked_solutions_of_training_problems():
    data = few()
    loader = SFTData(data, n_examples=40, batch_size=8, seed=1).train_dataloader()
    wanted = {}
    for prompt in data.train_prompts(40):
        wanted[data.chat.render_prompt(prompt.question)] = data.chat.render_solution(*solve(prompt))
    got = {}
    for batch in loader:
        for inputs_T, targets_T, mask_T in zip(batch.input_ids_BT, batch.target_ids_BT, batch.mask_BT, strict=True):
            first = int(mask_T.argmax())
            completion = data.tokenizer.decode(targets_T[mask_T.bool()].tolist())
            got[data.tokenizer.decode(inputs_T[: first + 1].tolist())] = completion
    assert len(loader) == 5 and got == wanted


def test_sft_validation_is_held_out():
    data = few()
    module = SFTData(data, batch_size=8, val_examples=20)
    batches = module.val_dataloader()
    assert [len(batch) for batch in batches] == [8, 8, 4]
    rows = [(ids_T, mask_T) for b in batches for ids_T, mask_T in zip(b.input_ids_BT, b.mask_BT, strict=True)]
    heads = [data.tokenizer.decode(ids_T[: int(mask_T.argmax()) + 1].tolist()) for ids_T, mask_T in rows]
    assert heads == [data.chat.render_prompt(p.question) for p in data.test_prompts(20)]
    assert SFTData(data).val_dataloader() == []


def test_sft_refusals():
    with pytest.raises(DataError, match=r"tokens in all, more than seq_len=80; set seq_len=\d+"):
        SFTData(few(), seq_len=80).train_dataloader()
    unsolved = PromptData(ReasoningGym({"leg_counting": {}, "chain_sum": {}}, 20), max_prompt_tokens=2000)
    with pytest.raises(DataError, match=r"no worked solution for \d+ of reasoning_gym/leg_counting\. Solvers exist"):
        SFTData(unsolved, seq_len=4000).train_dataloader()


# --- the loader


def numbers(size=20, batch_size=4, **kwargs):
    rows_NT = torch.arange(size).repeat_interleave(3).reshape(size, 3)
    return CursorLoader(size, partial(text_batch, rows_NT), batch_size, **kwargs)


def items(batches):
    return [batch.input_ids_BT[:, 0].tolist() for batch in batches]


def test_an_epoch_visits_every_item_once():
    loader = numbers(seed=3)
    first, second = items(loader), items(loader)
    assert len(loader) == len(first) == 5
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20)) and first != second
    assert items(numbers(seed=4)) != first
    assert items(numbers(shuffle=False))[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_batches_are_full_and_a_small_set_is_one_batch():
    assert [len(b) for b in items(numbers(size=11))] == [4, 4]
    assert [len(b) for b in items(numbers(size=3))] == [3]


def test_ranks_share_the_batches_of_one_order():
    alone = items(numbers(batch_size=2, seed=3))
    ranks = [items(numbers(batch_size=2, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    assert ranks[0] == alone[0::2] and ranks[1] == alone[1::2]


@pytest.mark.parametrize("key", ["epoch", "index", "seed", "size"])
def test_every_key_of_the_state_is_needed(key):
    state = numbers().state_dict()
    assert all(type(value) is int for value in state.values())
    del state[key]
    with pytest.raises(KeyError):
        numbers().load_state_dict(state)


def test_loader_refusals():
    with pytest.raises(ConfigError, match="batch_size=0"):
        numbers(batch_size=0)
    with pytest.raises(DataError, match="0 training examples"):
        numbers(size=0)
    with pytest.raises(DataError, match="belongs to 20 examples, but there are 24 now"):
        numbers(size=24).load_state_dict(numbers(size=20).state_dict())


class Seen(LightningModule):
    """Notes which items it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.items = []

    def training_step(self, batch, batch_idx):
        self.items.append(batch.input_ids_BT[:, 0].tolist())
        return (self.weight - batch.input_ids_BT.float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class SaveAt(Callback):
    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(loader, epochs, ckpt_path=None, callbacks=(), limit=None):
    module = Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        limit_train_batches=limit,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return module.items


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("limit", "total"), [(None, 15), (3, 9)])
def test_lightning_resumes_on_the_very_next_batch(tmp_path, limit, total):
    """5 batches an epoch, 3 epochs: after the first step, mid-epoch, on both sides of an epoch's end, at the end."""
    steps = (1, 3, 5, 6, 8, total)
    whole = fit(numbers(seed=3), 3, callbacks=[SaveAt(tmp_path, steps)], limit=limit)
    assert whole == stream(total)
    for step in steps:
        assert fit(numbers(seed=99), 3, str(tmp_path / f"{step}.ckpt"), limit=limit) == whole[step:], step


def stream(n):
    loader = numbers(seed=3)
    return (items(loader) + items(loader) + items(loader))[:n]


def test_text_data_serves_full_rows():
    module = TextData(few(), seq_len=64, batch_size=4, seed=2)
    batch = next(iter(module.train_dataloader()))
    assert batch.input_ids_BT.shape == (4, 64) and torch.equal(batch.input_ids_BT[:, 1:], batch.target_ids_BT[:, :-1])
    again = next(iter(TextData(few(), seq_len=64, batch_size=4, seed=2).train_dataloader()))
    assert torch.equal(batch.input_ids_BT, again.input_ids_BT)


def test_terse_fraction_empties_that_share_of_thoughts_and_no_answer():
    source = ReasoningGym({"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}, size=400)
    data = PromptData(source)
    prompts = data.train_prompts()
    full = priming(prompts, data.tokenizer, data.chat)
    mixed = priming(prompts, data.tokenizer, data.chat, terse_fraction=0.5)
    terse = [data.tokenizer.decode(ids).startswith("<think></think><answer>") for _, ids in mixed]
    assert 0.4 < sum(terse) / len(terse) < 0.6  # 360 draws of 0.5: sd 0.026
    for is_terse, (_, want), (_, got) in zip(terse, full, mixed, strict=True):
        assert is_terse or got == want
        answer = data.tokenizer.decode(got).split("<answer>")[1]
        assert answer == data.tokenizer.decode(want).split("<answer>")[1]
    source = ReasoningGym({"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}, size=200)
    data = PromptData(source)
    prompts = data.train_prompts()
    texts = [data.tokenizer.decode(ids) for _, ids in priming(prompts, data.tokenizer, data.chat, "steps", 1.0, 2)]
    steps = [len(re.findall("[+-]", fact(prompt, "expression"))) for prompt in prompts]
    assert {1, 2} == set(steps) and [text.startswith("<think></think>") for text in texts] == [n == 2 for n in steps]
    with pytest.raises(ConfigError, match="terse_fraction=2"):
        priming(prompts, data.tokenizer, data.chat, terse_fraction=2)
