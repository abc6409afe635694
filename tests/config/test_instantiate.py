"""Default-deny: what must be refused is refused before anything runs; what a config needs is built."""

import functools
import sys

import pytest
import torch
from omegaconf import OmegaConf

import lit_reason.models.transformer as reexporting
from lit_reason.config.instantiate import instantiate
from lit_reason.config.resolve import resolver_names
from lit_reason.errors import ConfigError, UnsafeTargetError

MARK = "touch {mark}"
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}

# Each runs a shell command, evaluates text, opens a file, unpickles, or hands out something that does.
TARGETS = [
    "os.system",
    "os.popen",
    "os.execv",
    "posix.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "builtins.__import__",
    "importlib.import_module",
    "runpy.run_path",
    "code.interact",
    "pty.spawn",
    "pickle.loads",
    "pickle.load",
    "marshal.loads",
    "shutil.rmtree",
    "ctypes.CDLL",
    "webbrowser.open",
    "timeit.timeit",
    "cProfile.run",
    "functools.partial",
    "operator.methodcaller",
    "socket.create_connection",
    "sympy.sympify",
    "sympy.parsing.sympy_parser.parse_expr",
    "numpy.load",
    "numpy.testing.rundocs",
    "pandas.read_pickle",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "hydra.utils.call",
    "omegaconf.OmegaConf.register_new_resolver",
    "torch.load",
    "torch.hub.load",
    "torch.utils.collect_env.run",
    "torch.utils.cpp_extension.load_inline",
    "torch.fx.GraphModule",
    "torch.jit.load",
    "torch.jit.ScriptModule",
    "torch.package.PackageImporter",
    "torch.distributed.run.main",
    "torch.utils.data.DataLoader",
    "torch.nn.Module.__init__",
    "torch.nn.Linear.forward",
    "torch.serialization.load",
    "torch.os.system",
    "torch.sys.modules",
    "torch.utils.collect_env.subprocess.Popen",
    "lightning.pytorch.utilities.rank_zero.os.system",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "lightning.pytorch.trainer.trainer.os.system",
    "transformers.AutoModel.from_pretrained",
    "transformers.utils.hub.cached_file",
    "lit_reason.modules.PolicyModule.load_from_checkpoint",
    "lit_reason.config.instantiate.instantiate",
    "lit_reason.config.targets.locate",
    "lit_reason.config.targets.importlib.import_module",
    "lit_reason.cli.launch.launch",
    "lit_reason.cli.train.Done",
    "lit_reason.data.SFTData.from_datasets",
    "lit_reason.cli.stages.subprocess.run",
    "lit_reason.checkpoint.atomic.os.system",
    "lit_reason.zoo.save",
    "lit_reason.types.replace",
    "lit_reason.types.Tensor",
    "lit_reason.errors.difflib.get_close_matches",
    "lit_reason.models.Transformer.forward",
    "lit_reason.models.mup._role_of",
    "lit_reason..os.system",
    "lit_reason",
    "os",
    "",
    "eval('1')",
    "__main__.x",
    "antigravity.webbrowser.open",
]


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_targets_are_refused_without_running(target, tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises((UnsafeTargetError, ConfigError)):
        instantiate({"_target_": target, "_args_": [MARK.format(mark=mark)]})
    assert not mark.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bad: [bad],
        lambda bad: {"a": {"b": [1, [bad]]}},
        lambda bad: LINEAR | {"bias": bad},
        lambda bad: LINEAR | {"_args_": [bad]},
        lambda bad: LINEAR | {"bias": bad, "_recursive_": False},
        lambda bad: LINEAR | {"bias": bad, "_partial_": True},
        lambda bad: bad | {"_partial_": True},
        lambda bad: bad | {"_convert_": "all"},
    ],
)
def test_hostile_targets_are_found_wherever_they_stand(wrap, tmp_path):
    mark = tmp_path / "mark"
    bad = {"_target_": "os.system", "_args_": [MARK.format(mark=mark)]}
    for config in (wrap(bad), OmegaConf.create(wrap(bad))):
        with pytest.raises(UnsafeTargetError, match=r"os\.system"):
            instantiate(config)
    assert not mark.exists()


@pytest.mark.parametrize(
    "config",
    [
        {"name": "os.system", "x": {"_target_": "${name}", "_args_": [MARK]}},
        {"x": "${oc.create:'{_target_: os.system, _args_: [true]}'}"},
        {"x": {"_target_": "${oc.decode:os.system}"}},
        {"part": "system", "x": {"_target_": "os.${part}"}},
    ],
)
def test_interpolations_cannot_smuggle_a_target(config):
    with pytest.raises(UnsafeTargetError, match=r"os\.system"):
        instantiate(OmegaConf.create(config))


def test_resolvers_that_run_code_are_refused_even_when_registered(tmp_path):
    ran = []
    OmegaConf.register_new_resolver("test_eval", lambda text: ran.append(text) or 1)
    try:
        for text in ("${test_eval:1}", "a ${oc.env:HOME,${test_eval:2}}", "${${name}:3}"):
            config = OmegaConf.create({"name": "test_eval", "x": {"y": text}})
            with pytest.raises(UnsafeTargetError, match="resolver"):
                instantiate(config.x)
        assert ran == []
    finally:
        OmegaConf.clear_resolver("test_eval")


def test_resolver_names_are_read_from_the_grammar():
    assert resolver_names("${a}/${oc.env:HOME}") == ["oc.env"]
    assert sorted(resolver_names("${oc.select:x,${now:%Y}}")) == ["now", "oc.select"]
    assert resolver_names("plain: text") == []
    assert resolver_names(r"\${eval:1}") == []


def test_reexported_module_and_class_of_others_are_refused(monkeypatch):
    import subprocess

    monkeypatch.setattr(reexporting, "os_module", sys.modules["os"], raising=False)
    monkeypatch.setattr(reexporting, "runner", subprocess.run, raising=False)
    monkeypatch.setattr(reexporting, "Popen", subprocess.Popen, raising=False)
    monkeypatch.setattr(reexporting, "run_later", functools.partial(subprocess.run), raising=False)
    base = "lit_reason.models.transformer"
    with pytest.raises(UnsafeTargetError, match="passes through the module os"):
        instantiate({"_target_": f"{base}.os_module.system"})
    for name in ("runner", "Popen", "run_later"):
        with pytest.raises(UnsafeTargetError):
            instantiate({"_target_": f"{base}.{name}"})


def test_nothing_is_called_before_everything_is_checked(tmp_path):
    built = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            built.append(self)

    Spy.__module__, Spy.__qualname__ = "lit_reason.models.transformer", "Spy"
    reexporting.Spy = Spy
    try:
        good = {"_target_": "lit_reason.models.transformer.Spy"}
        instantiate([good])
        assert len(built) == 1
        with pytest.raises(UnsafeTargetError):
            instantiate([good, {"_target_": "os.getcwd"}])
        assert len(built) == 1
    finally:
        del reexporting.Spy


def test_pytorch_lightning_names_the_right_package():
    with pytest.raises(UnsafeTargetError, match=r"lightning\.pytorch\.callbacks\.ModelCheckpoint") as caught:
        instantiate({"_target_": "pytorch_lightning.callbacks.ModelCheckpoint"})
    assert "fail in a `lightning` Trainer" in str(caught.value)


def test_own_package_needs_the_flag_that_the_refusal_prints(tmp_path, monkeypatch):
    package = tmp_path / "users_pkg"
    package.mkdir()
    lines = ["import os, subprocess", "from os import system", "def make(x): return x + 1", "class Box:", "    pass"]
    (package / "__init__.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "users_pkg.make", "x": 1}
    with pytest.raises(UnsafeTargetError, match=r"type 'allow_targets=\[users_pkg\]'"):
        instantiate(node)
    assert "users_pkg" not in sys.modules  # not even imported
    assert instantiate(node, allow_targets=["users_pkg"]) == 2
    tree = OmegaConf.create({"allow_targets": ["users_pkg"], "inner": node})
    assert instantiate(tree.inner) == 2
    for name in ("system", "os.system", "subprocess.run", "Box.__init__"):
        with pytest.raises(UnsafeTargetError):
            instantiate({"_target_": f"users_pkg.{name}"}, allow_targets=["users_pkg"])
    with pytest.raises(UnsafeTargetError):
        instantiate({"_target_": "users_pkg_two.make"}, allow_targets=["users_pkg"])


CLOSED = ["os", "builtins", "subprocess", "importlib", "pickle", "sys", "hydra", "torch", "a-b"]


@pytest.mark.parametrize("prefix", CLOSED)
def test_prefixes_that_cannot_be_opened(prefix):
    with pytest.raises(UnsafeTargetError, match="allow_targets"):
        instantiate({"_target_": f"{prefix}.x"}, allow_targets=[prefix])


def test_a_text_instead_of_a_list_of_prefixes_is_explained():
    with pytest.raises(ConfigError, match=r"allow_targets=\[my_pkg\]"):
        instantiate(LINEAR, allow_targets="my_pkg")


def test_builds_nested_objects_lists_and_arguments():
    layers = [LINEAR, {"_target_": "torch.nn.ReLU"}, {"_target_": "torch.nn.Linear", "_args_": [3, 1]}]
    model = instantiate({"_target_": "torch.nn.Sequential", "_args_": layers})
    assert [tuple(p.shape) for p in model.parameters()] == [(3, 2), (3,), (1, 3), (1,)]
    assert isinstance(instantiate({"a": {"b": LINEAR}})["a"]["b"], torch.nn.Linear)


def test_directives():
    later = instantiate(LINEAR | {"_partial_": True})
    assert isinstance(later, functools.partial) and later().weight.shape == (3, 2)
    raw = {"_target_": "lit_reason.models.Base", "width": {"_target_": "torch.nn.ReLU"}, "_recursive_": False}
    assert instantiate(raw).width == {"_target_": "torch.nn.ReLU"}
    assert instantiate(LINEAR, out_features=5).weight.shape == (5, 2)
    with pytest.raises(ConfigError, match="_partial_"):
        instantiate(LINEAR | {"_partal_": True})
    with pytest.raises(ConfigError, match="_convert_"):
        instantiate(LINEAR | {"_convert_": "al"})


def test_containers_arrive_plain():
    config = OmegaConf.create({"_target_": "lit_reason.models.Base", "width": [1, {"a": 2}]})
    width = instantiate(config).width
    assert type(width) is list and type(width[1]) is dict


def test_an_error_in_a_constructor_names_the_key():
    bad = {"model": {"_target_": "lit_reason.models.ModelConfig", "width": 0}}
    with pytest.raises(ConfigError) as caught:
        instantiate(bad)
    assert "config key 'model'" in caught.value.__notes__[0]


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'GSM8K'"):
        instantiate({"_target_": "lit_reason.data.GSM8k"})
    with pytest.raises(ConfigError, match="does not exist"):
        instantiate({"_target_": "lit_reason.dta.GSM8K"})
