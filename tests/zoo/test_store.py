"""The round trip is bit-identical, damage is refused, names cannot leave the shelf."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from lit_reason import zoo
from lit_reason.checkpoint.atomic import temporary_name
from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.errors import ZooError
from lit_reason.zoo.manifest import describe

NAME = "tiny.sft"
FILES = ["README.md", "config.json", "golden.json", "info.json", "model.safetensors", "tokenizer/byte_tokenizer.json"]


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(raw(a[key]), raw(b[key])) and a[key].dtype == b[key].dtype for key in a)


def raw(value):
    return value.contiguous().view(-1).view(torch.uint8)


def reindex(shelf, name=NAME):
    """What an attacker who writes the index as well would do."""
    path = shelf / "index.json"
    document = json.loads(path.read_text())
    document["models"][name]["files"] = describe(shelf / name)
    path.write_text(json.dumps(document))


def edit(shelf, file, change):
    path = shelf / NAME / file
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    reindex(shelf)


def test_large_weights_are_split_and_come_back(tmp_path, model, info, monkeypatch):
    monkeypatch.setattr("lit_reason.zoo.store.MAX_FILE_BYTES", 20_000)
    folder = zoo.save("tiny", model, ByteTokenizer(), info, shelf=tmp_path)
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 3 and parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert all(part.stat().st_size < max(20_000, largest) + 5_000 for part in parts)  # 5 kB for names
    assert same_bits(zoo.load("tiny", shelf=tmp_path).model, model)
    parts[1].unlink()
    with pytest.raises(ZooError, match=f"{parts[1].name} is missing"):
        zoo.load("tiny", shelf=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "mixed"], ids=str)
def test_round_trip_is_bit_identical(tmp_path, model, info, dtype):
    if dtype == "mixed":
        model.embed.to(torch.bfloat16)
    else:
        model.to(dtype)
    # -0.0 equals 0.0 and a subnormal may be flushed: only a bitwise copy keeps both.
    with torch.no_grad():
        model.head.weight.view(-1)[:2] = torch.tensor([-0.0, 1e-40])
    folder = zoo.save("tiny", model, ByteTokenizer(), info, shelf=tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded = zoo.load("tiny", tmp_path)
    assert torch.equal(torch.rand(3), expected), "loading drew from the caller's generator"
    assert {k: v.dtype for k, v in loaded.model.state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    assert same_bits(loaded.model, model)
    assert loaded.model.config == model.config
    assert loaded.tokenizer.fingerprint() == ByteTokenizer().fingerprint()
    assert loaded.info["params"] == sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == FILES
    assert zoo.verify("tiny", tmp_path).max_error <= 1e-5


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_byte_in_any_file_is_refused(shelf, file, where):
    path = shelf / NAME / file
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    for call in (zoo.load, zoo.verify, zoo.info):
        with pytest.raises(ZooError, match=f"{Path(file).name} is damaged: got sha256"):
            call(NAME, shelf)


@pytest.mark.parametrize("file", FILES)
def test_truncated_and_missing_files_are_refused(shelf, file):
    path = shelf / NAME / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ZooError, match=r"is damaged: got \d+ bytes"):
        zoo.load(NAME, shelf)
    path.unlink()
    with pytest.raises(ZooError, match="is missing"):
        zoo.load(NAME, shelf)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "models": {"tiny.sft": {}}}', '{"format": 2}'])
def test_a_damaged_index_is_refused(shelf, text):
    (shelf / "index.json").write_text(text)
    with pytest.raises(ZooError, match=r"index\.json"):
        zoo.load(NAME, shelf)


def test_unknown_names_get_the_nearest(shelf):
    with pytest.raises(ZooError, match=r"no model 'tiny\.stf'.*did you mean 'tiny\.sft'"):
        zoo.load("tiny.stf", shelf)
    with pytest.raises(ZooError, match=r"nowhere: it has no index\.json"):
        zoo.load("tiny.sft", shelf / "nowhere")


@pytest.mark.parametrize("prefix", ["", "dir:"])
def test_a_checkpoint_of_training_is_no_model_and_the_model_is_named(prefix):
    with pytest.raises(ZooError, match=r"weights are a folder: dir:/runs/demo/rl/model$"):
        zoo.load(f"{prefix}/runs/demo/rl/checkpoints/step=2.ckpt")


def test_weights_that_are_not_finite_are_not_saved(shelf, model, info):
    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(
        ZooError, match=r"1 parameters hold NaN or infinity \(head\.weight, \.\.\.\); nothing was saved"
    ):
        zoo.save(NAME, model, ByteTokenizer(), info, shelf=shelf, overwrite=True)
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before


OUTSIDE = [
    "../shelf/tiny.sft",
    "..",
    ".",
    "",
    "/etc",
    "a/b",
    "tiny.sft/",
    "./tiny.sft",
    "~",
    "-x",
    "a\\b",
    "a\0b",
    "a\n",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_are_paths_are_refused(shelf, model, info, name):
    for call in (zoo.load, zoo.info, zoo.verify):
        with pytest.raises(ZooError, match="is not the name of a zoo model"):
            call(name, shelf)
    with pytest.raises(ZooError, match="is not the name of a zoo model"):
        zoo.save(name, model, ByteTokenizer(), info, shelf=shelf, overwrite=True)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "a/b/c", "tokenizer/../../secret", ".x"]
)
def test_an_index_that_lists_files_elsewhere_is_refused(shelf, name):
    (shelf / "secret").write_text("x")
    path = shelf / "index.json"
    document = json.loads(path.read_text())
    files = document["models"][NAME]["files"]
    files[name] = describe(shelf)["secret"]
    path.write_text(json.dumps(document))
    with pytest.raises(ZooError, match="not a plain file name"):
        zoo.load(NAME, shelf)


@pytest.mark.parametrize("what", ["file", "tokenizer", "model"])
def test_links_out_of_the_shelf_are_refused(shelf, tmp_path, what):
    """The bytes behind the link are the right ones; the place is not."""
    path = {"file": shelf / NAME / "info.json", "tokenizer": shelf / NAME / "tokenizer", "model": shelf / NAME}[what]
    outside = tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    with pytest.raises(ZooError, match="is a link to"):
        zoo.load(NAME, shelf)


def test_a_linked_shelf_is_fine(shelf, tmp_path):
    (tmp_path / "link").symlink_to(shelf)
    assert zoo.verify(NAME, tmp_path / "link").name == NAME


def test_config_takes_registry_keys_only(shelf):
    edit(shelf, "config.json", lambda d: d["model"].update(_target_="os.system"))
    with pytest.raises(ZooError, match="_target_"):
        zoo.load(NAME, shelf)
    edit(shelf, "config.json", lambda d: (d["model"].pop("_target_"), d.update(auto_map={"a": "b"})))
    with pytest.raises(ZooError, match="auto_map"):
        zoo.load(NAME, shelf)


def test_tokenizer_folder_holds_listed_files_and_no_code(shelf):
    planted = shelf / NAME / "tokenizer" / "tokenizer_config.json"
    planted.write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}}')
    with pytest.raises(ZooError, match=r"tokenizer_config\.json.*does not list"):
        zoo.load(NAME, shelf)
    reindex(shelf)
    with pytest.raises(ZooError, match="asks for code"):
        zoo.load(NAME, shelf)


def test_weights_that_do_not_fit_the_config_are_refused(shelf):
    edit(shelf, "config.json", lambda d: d["model"].update(width=48))
    with pytest.raises(ZooError, match="does not describe a model"):
        zoo.load(NAME, shelf)


def test_another_tokenizer_is_refused(shelf):
    edit(shelf, "config.json", lambda d: d["tokenizer"].update(fingerprint="0" * 16))
    with pytest.raises(ZooError, match="tokenizer does not match"):
        zoo.load(NAME, shelf)


def test_verify_recomputes_the_log_probs(shelf):
    """Whole files whose golden values another model made."""

    def change(golden):
        golden["cases"][1]["logprobs"][7] += 0.01

    edit(shelf, "golden.json", change)
    with pytest.raises(ZooError, match=r"differ from golden\.json by 0\.01 nats \(tolerance 0\.0001\)"):
        zoo.verify(NAME, shelf)


def test_golden_values_are_the_models_own(shelf, model):
    """Against a plain log-softmax in float64, token by token."""
    golden = json.loads((shelf / NAME / "golden.json").read_text())
    model = model.double().eval()
    for case in golden["cases"]:
        ids = case["token_ids"]
        logits = model(torch.tensor([ids]))[0]
        expected = [(logits[t] - logits[t].logsumexp(0))[ids[t + 1]].item() for t in range(len(ids) - 1)]
        assert case["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_save_refuses_to_replace_and_replaces_when_asked(shelf, model, info):
    with pytest.raises(ZooError, match="overwrite=True"):
        zoo.save(NAME, model, ByteTokenizer(), info, shelf=shelf)
    with torch.no_grad():
        model.head.weight.add_(1)
    zoo.save(NAME, model, ByteTokenizer(), info, shelf=shelf, overwrite=True)
    zoo.save("second", model, ByteTokenizer(), info, shelf=shelf)
    assert zoo.list_models(shelf) == ["second", NAME]
    assert same_bits(zoo.load(NAME, shelf).model, model)
    assert sorted(os.listdir(shelf)) == ["index.json", "second", NAME]


def test_a_failed_save_leaves_the_shelf_as_it_was(shelf, model, info, monkeypatch):
    class Broken(ByteTokenizer):
        def save(self, path):
            raise OSError(28, "No space left on device")

    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
    with pytest.raises(ZooError, match=r"tiny\.sft could not be saved: No space left on device, .* free"):
        zoo.save(NAME, model, Broken(), info, shelf=shelf, overwrite=True)
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before


def test_an_index_that_cannot_be_written_brings_the_old_model_back(shelf, model, info):
    """The index's temporary file leads to /dev/full: the folder was already exchanged when the write fails."""
    before = {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()}
    temporary_name(shelf / "index.json").symlink_to("/dev/full")
    with pytest.raises(ZooError, match="No space left"):
        zoo.save(NAME, model.to(torch.bfloat16), ByteTokenizer(), info, shelf=shelf, overwrite=True)
    assert {p: p.read_bytes() for p in shelf.rglob("*") if p.is_file()} == before
    zoo.verify(NAME, shelf)


def test_what_a_killed_save_left_is_removed_by_the_next(shelf, model, info):
    for name in (f".{NAME}.123.tmp", f".{NAME}.123.old", f".{NAME}.notes"):
        (shelf / name).mkdir()
    zoo.save(NAME, model, ByteTokenizer(), info, shelf=shelf, overwrite=True)
    assert sorted(os.listdir(shelf)) == [f".{NAME}.notes", "index.json", NAME]


def test_a_folder_of_ones_own(tmp_path, model, info):
    folder = zoo.save(tmp_path / "runs" / "best", model, ByteTokenizer(), info, golden=[[1, 2, 3]])
    assert folder == tmp_path / "runs" / "best"
    assert same_bits(zoo.load(f"dir:{folder}").model, model)
    assert zoo.load(folder).info["name"] == "best"
    assert len(json.loads((folder / "golden.json").read_text())["cases"][0]["logprobs"]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.pop("commit"), "lacks commit"),
        (lambda i: i["metrics"].update(acc=0.5), r"info\['metrics'\]\['acc'\] is 0\.5"),
        (lambda i: i["metrics"]["pass_at_1"].update(value=0.9), "value 0.9 is outside 0.25 .. 0.75"),
    ],
)
def test_an_info_without_origin_or_interval_is_refused(tmp_path, model, info, change, words):
    change(info)
    with pytest.raises(ZooError, match=words):
        zoo.save("tiny", model, ByteTokenizer(), info, shelf=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_info_says(shelf):
    card = (shelf / NAME / "README.md").read_text()
    assert "| pass_at_1 | 0.5 | 0.25 .. 0.75 | 16 |" in card
    assert "`lit-reason-train experiment=tiny`" in card and "0123abc" in card


def test_processes_that_save_at_once_all_reach_the_index(tmp_path, model, info):
    """Without the lock, each would write an index that lacks the other's model."""
    context = multiprocessing.get_context("fork")
    names = [f"m{i}" for i in range(4)]
    started = [
        context.Process(target=zoo.save, args=(name, model, ByteTokenizer(), info, [[1, 2]], tmp_path))
        for name in names
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert zoo.list_models(tmp_path) == names
    for name in names:
        zoo.verify(name, tmp_path)
