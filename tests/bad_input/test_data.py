"""Data that cannot be used: one message that says what to type, and the same command runs once it is mended."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lit_reason import zoo
from lit_reason.data import ByteTokenizer
from lit_reason.models import ModelConfig, Transformer

GOOD = "".join(json.dumps({"question": f"What is {i} + 1?", "answer": i + 1}) + "\n" for i in range(20))
MINE = ("data=jsonl", "data.source.path=mine.jsonl")


def test_a_torn_file_is_named_and_the_mended_one_runs(train, tmp_path):
    (tmp_path / "mine.jsonl").write_text(GOOD + '{"question": "What is')
    code, said = train(*MINE)
    assert code == 1 and "mine.jsonl:21: not JSON" in said
    (tmp_path / "mine.jsonl").write_bytes(GOOD.replace("\n", "\r\n").encode("utf-8-sig"))
    assert train(*MINE)[0] == 0


def test_an_empty_side_of_the_split_is_named(train):
    code, said = train("data.held_out_fraction=0", "evaluation.n=4")
    assert code == 1 and "gave 60 questions, of which none is on the 'test' side" in said
    assert "type e.g. data.held_out_fraction=0.5" in said


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_generated(train, tmp_path):
    code, said = train("model.max_seq_len=64")  # the question's wording alone has 60 letters
    assert code == 2 and "tokens and the model's context is 64 (model.max_seq_len)" in said
    assert not list((tmp_path / "run" / "rl" / "completions").iterdir())


def test_the_tokenizer_of_another_model_is_refused(train, tmp_path):
    words = Tokenizer(WordLevel({"<end>": 0, "What": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "words")
    model = Transformer(ModelConfig(width=32, depth=1, heads=2, kv_lora_rank=16, ffn_width=64, first_dense=1))
    info = {"recipe": "none", "seed": 0, "commit": "none", "metrics": {}}
    zoo.save(tmp_path / "shelf" / "bytes", model, ByteTokenizer(), info)
    code, said = train(f"data.tokenizer={tmp_path}/words", f"init='dir:{tmp_path}/shelf/bytes'")
    assert code == 1 and "was trained with the tokenizer fe27d294891b, data.tokenizer is" in said
    assert "data.tokenizer=" in said


def test_damaged_weights_are_refused(train, tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=32, depth=1, heads=2, kv_lora_rank=16, ffn_width=64, first_dense=1))
    info = {"recipe": "none", "seed": 0, "commit": "none", "metrics": {}}
    path = zoo.save(tmp_path / "shelf" / "model", model, ByteTokenizer(), info) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, said = train(f"init='dir:{path.parent}'")
    assert code == 1 and "model.safetensors is damaged: got sha256" in said and said.count("\n") == 1
