"""lit-reason-zoo count: what CONFIG may be, options, and one line for each mistake."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import lit_reason
from lit_reason.cli.zoo import main
from lit_reason.config import instantiate
from lit_reason.models import ModelConfig
from lit_reason.models.count import Layout, count
from lit_reason.models.hf_config import from_hf_config
from lit_reason.zoo import default_shelf

CONFIG = ModelConfig(width=24, depth=3, max_seq_len=64)


@pytest.fixture
def call(capsys):
    """call(*argv) -> (exit code, stdout, stderr)"""

    def run(*argv):
        code = main(["count", *map(str, argv)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    document = {"model": CONFIG.to_dict(), "tokenizer": {"fingerprint": "0"}}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(document))
    return tmp_path / "mine"


def test_a_name_of_conf_model(call):
    code, out, err = call("deepseek_v3")
    assert (code, err) == (0, "")
    assert "671,026,404,352" in out and "37,552,282,624" in out and "70,272" in out


def test_a_name_of_the_shelf(call):
    params = json.loads((default_shelf() / "index.json").read_text())["models"]["arith-1m.sft"]["summary"]["params"]
    code, out, _ = call("arith-1m.sft")
    assert code == 0
    assert f" {params:,} " in out


def test_a_folder_and_its_config(call, folder):
    wanted = (0, count(CONFIG).table() + "\n", "")
    assert call(folder) == wanted
    assert call(f"dir:{folder}") == wanted
    assert call(folder / "config.json") == wanted


HF_V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 10944,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "hidden_act": "silu",
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}  # fmt: skip


def test_a_hugging_face_folder_counts_like_the_shape_of_that_name(call, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_V2_LITE))
    found = call(tmp_path)
    assert found == call("deepseek_v2_lite")
    assert found[0] == 0 and "15,706,484,224" in found[1]
    named = instantiate(OmegaConf.load(Path(lit_reason.__file__).parent / "conf" / "model" / "deepseek_v2_lite.yaml"))
    assert from_hf_config(HF_V2_LITE) == named


def test_every_option_arrives(call, folder):
    wanted = count(
        CONFIG, seq_len=32, mtp_layers=1, dtype="fp16", kv_dtype="fp8", optimizer="muon", master_weights=True,
        layout=Layout(data=4, tensor=2, pipeline=3, expert=8, zero=2),
    )  # fmt: skip
    options = ["--seq-len=32", "--mtp-layers=1", "--dtype=fp16", "--kv-dtype=fp8", "--optimizer=muon"]
    layout = "--layout=data=4,tensor=2,pipeline=3,expert=8,zero=2"
    assert call(folder, *options, "--master-weights", layout) == (0, wanted.table() + "\n", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["deepsek_v3"], "did you mean 'deepseek_v3'"),
        (["arith-1m.stf"], "did you mean 'arith-1m.sft'"),
        (["tiny", "--optimizer=muno"], "did you mean 'muon'"),
        (["tiny", "--dtype=bf61"], "did you mean 'bf16'"),
        (["tiny", "--layout=dta=2"], "unknown key 'dta' in --layout dta=2: did you mean 'data'"),
        (["tiny", "--layout=data=two"], "--layout data=two; valid: a whole number, e.g. data=2"),
        (["tiny", "--layout=data"], "--layout data; valid: a whole number, e.g. data=2"),
        (["tiny", "--layout=pipeline=3"], "pipeline=3; valid 1..2"),
        (["tiny", "--seq-len=257"], "seq_len=257: valid 1..256"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(call, argv, said):
    code, out, err = call(*argv)
    assert (code, out) == (1, "")
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "config.json of lit_reason ('model') or of Hugging Face ('model_type')"),
        ('{"model": 3}', "config.json of lit_reason ('model') or of Hugging Face ('model_type')"),
        ('{"model": {"widht": 64}}', "unknown key model.widht: did you mean 'width'"),
        ('{"model_type": "deepseek_v4"}', "did you mean 'deepseek_v3'"),
        ('{"model": {"width": "64"}}', "does not describe a model"),
    ],
)
def test_a_file_that_describes_no_model(call, tmp_path: Path, content, said):
    (tmp_path / "config.json").write_text(content)
    code, out, err = call(tmp_path)
    assert (code, out) == (1, "")
    assert said in err and err.count("\n") == 1


def test_a_folder_without_a_config(call, tmp_path):
    code, _, err = call(tmp_path)
    assert code == 1 and f"no file {tmp_path / 'config.json'}" in err
