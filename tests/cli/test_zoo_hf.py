"""`lit-reason-zoo import` and `export`: the way there and back, tokenizers, messages."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer as Rust
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_reason import zoo
from lit_reason.cli.zoo import main
from lit_reason.data.tokenizer import ByteTokenizer
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
    (tmp_path / "hf" / "byte_tokenizer.json").unlink()
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
