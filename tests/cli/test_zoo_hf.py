"""`lit-reason-zoo import` and `export`: the way there and back, tokenizers, messages."""

import json
import shutil

import pytest
import torch
import yaml
from tokenizers import Tokenizer as Rust
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lit_reason import zoo
from lit_reason.cli.zoo import main
from lit_reason.data.chat import ChatTemplate
from lit_reason.data.tokenizer import ByteTokenizer, HFTokenizer
from lit_reason.models import Base, ModelConfig, Transformer

INFO = {"recipe": "lit-reason-train experiment=tiny", "seed": 1, "commit": "0123abc", "metrics": {}}


@pytest.fixture
def shelf(tmp_path):
    """A shelf with one model, `tiny.sft`, whose residual multiplier is 2/3."""
    torch.manual_seed(0)
    config = ModelConfig(
        width=32, depth=3, heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        ffn_width=64, experts=4, experts_per_token=2, expert_width=16, max_seq_len=64, base=Base(width=16, depth=2),
    )  # fmt: skip
    zoo.save("tiny.sft", Transformer(config), ByteTokenizer(), INFO, shelf=tmp_path / "shelf")
    return tmp_path / "shelf"


@pytest.fixture
def call(capsys, shelf):
    def run(*argv):
        code = main(["--shelf", str(shelf), *map(str, argv)])
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def test_a_zoo_model_goes_out_and_comes_back_bit_for_bit(call, shelf, tmp_path):
    assert call("export", "tiny.sft", "--to", tmp_path / "hf") == (0, f"exported tiny.sft to {tmp_path / 'hf'}\n")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    byte = ByteTokenizer()
    ids = [values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]]
    assert ids == [byte.bos_id, byte.stop_ids[0], byte.pad_id]
    code, said = call("import", tmp_path / "hf", "--to", tmp_path / "back")
    assert code == 0 and f"dir:{tmp_path / 'back'}" in said
    before, after = zoo.load("tiny.sft", shelf), zoo.load(tmp_path / "back")
    assert after.model.config == before.model.config and after.info["recipe"] == "lit-reason-zoo import hf"
    old, new = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert after.tokenizer.fingerprint() == before.tokenizer.fingerprint()
    assert zoo.verify(tmp_path / "back").max_error == 0


def test_transformers_reads_what_was_exported(call, shelf, tmp_path):
    assert call("export", "tiny.sft", "--to", tmp_path / "hf", "--shard-gb", "0.00005")[0] == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    ids = torch.randint(0, 272, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = zoo.load("tiny.sft", shelf).model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_the_exported_tokenizer_gives_the_same_ids(call, tmp_path):
    call("export", "tiny.sft", "--to", tmp_path / "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), ByteTokenizer()
    every_byte = "".join(
        chr(i) for i in (*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x1000))
    )
    for text in (every_byte, "12 + 7 =\n", "  two  spaces ", "<|user|>1<think>2</think><answer>3</answer><|end|>", ""):
        ids = ours.encode(text, specials=True)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text == ours.decode(ids)
    assert len(theirs) == ours.vocab_size
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (256, 257, 260)
    for question in ('What is "1 + 2"?', "{{ 7 }} \\ {%- x -%}\n\U0001f600"):
        chat = theirs.apply_chat_template([{"role": "user", "content": question}], return_dict=False)
        assert chat == ChatTemplate().prompt_ids(ours, question)
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2"}]
    for wrong in (two, [{"role": "assistant", "content": "3"}], [{"role": "user", "content": ["1"]}]):
        with pytest.raises(Exception, match="one message of the role user"):
            theirs.apply_chat_template(wrong)
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows, too


def test_a_model_of_ours_takes_its_own_template_along_whatever_its_tokenizer(call, shelf, tmp_path):
    words = Rust(WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", chat_template="theirs")
    fast.save_pretrained(tmp_path / "words")
    model, tokenizer = zoo.load("tiny.sft", shelf).model, HFTokenizer(tmp_path / "words")
    chat = {"_target_": "lit_reason.data.ChatTemplate", "before_question": "Q: ", "after_question": " A: "}
    for name, data, rendered in (
        ("default", {"chat": None}, "User: 1+2\nAssistant: "),
        ("custom", {"chat": chat}, "Q: 1+2 A: "),
        ("imported", None, "theirs"),
    ):
        recipe = yaml.safe_dump({"data": data}) if data else "lit-reason-zoo import somewhere"
        zoo.save(name, model, tokenizer, INFO | {"recipe": recipe}, shelf=shelf)
        assert call("export", name, "--to", tmp_path / name)[0] == 0
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.apply_chat_template([{"role": "user", "content": "1+2"}], tokenize=False) == rendered


def test_a_failed_export_leaves_no_folder(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lit_reason.cli.zoo.save_for_transformers", full)
        assert call("export", "tiny.sft", "--to", tmp_path / "hf")[0] == 1
    assert not (tmp_path / "hf").exists()
    assert call("export", "tiny.sft", "--to", tmp_path / "hf")[0] == 0


def test_transformers_answers_with_a_model_of_the_shelf(capsys, tmp_path):
    assert main(["export", "arith-1m.gdpo", "--to", str(tmp_path / "hf")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    question = "State the final answer to the following arithmetic problem: 12 + 30 ="
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert text == "<think>12+30=42</think><answer>42</answer><|end|>"


def test_a_hugging_face_tokenizer_comes_along(call, tmp_path):
    call("export", "tiny.sft", "--to", tmp_path / "hf")
    (tmp_path / "hf" / "byte_tokenizer.json").unlink()
    words = Rust(WordLevel({"one": 0, "plus": 1, "<eos>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "hf")
    code, said = call("import", tmp_path / "hf", "--to", tmp_path / "back", "--dtype", "bfloat16")
    assert code == 0, said
    found = zoo.load(tmp_path / "back")
    assert found.tokenizer.encode("one plus one") == [0, 1, 0] and found.tokenizer.stop_ids == (2,)
    assert found.model.embed.weight.dtype == torch.bfloat16


def test_a_missing_tokenizer_is_said_before_weights_are_read(call, tmp_path):
    call("export", "tiny.sft", "--to", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*token*"):
        file.unlink()
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "weights")
    code, said = call("import", tmp_path / "hf", "--to", tmp_path / "back")
    assert code == 1 and "holds no tokenizer (tokenizer.json" in said and "--tokenizer NAME" in said
    (tmp_path / "weights").rename(tmp_path / "hf" / "model.safetensors")
    assert call("import", tmp_path / "hf", "--to", tmp_path / "back", "--tokenizer", "bytes")[0] == 0


def test_a_tokenizer_that_wants_code_is_refused(call, tmp_path):
    call("export", "tiny.sft", "--to", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    code, said = call("import", tmp_path / "hf", "--to", tmp_path / "back")
    assert code == 1 and "['auto_map']" in said and not (tmp_path / "back").exists()


def test_errors_are_one_line_and_nothing_is_written(call, tmp_path):
    code, said = call("import", tmp_path / "nowhere", "--to", tmp_path / "back")
    assert code == 1 and said.startswith("error: ") and "Traceback" not in said
    code, said = call("export", "tiny.stf", "--to", tmp_path / "hf")
    assert code == 1 and "did you mean 'tiny.sft'" in said
    call("export", "tiny.sft", "--to", tmp_path / "hf")
    code, said = call("export", "tiny.sft", "--to", tmp_path / "hf")
    assert code == 1 and "exists and is not empty" in said
    shutil.rmtree(tmp_path / "hf")
    code, said = call("export", "tiny.sft", "--to", tmp_path / "hf", "--shard-gb", "0")
    assert code == 1 and "max_shard_bytes=0" in said and not (tmp_path / "hf").exists()
