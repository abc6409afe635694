"""lit-reason-zoo: exit codes and messages."""

import json

import pytest

from lit_reason.cli.zoo import main


def run(capsys, *argv):
    code = main(argv)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_list(capsys, shelf):
    code, out, _ = run(capsys, "--shelf", str(shelf), "list")
    assert code == 0
    assert "tiny.sft" in out and "0.500 (0.250..0.750)" in out


def test_info(capsys, shelf):
    code, out, _ = run(capsys, "--shelf", str(shelf), "info", "tiny.sft")
    assert code == 0
    assert json.loads(out)["recipe"] == "lit-reason-train experiment=tiny"


def test_verify_goes_on_after_a_damaged_model(capsys, shelf, model, info):
    from lit_reason import zoo
    from lit_reason.data.tokenizer import ByteTokenizer

    zoo.save("a-damaged", model, ByteTokenizer(), info, shelf=shelf)
    assert run(capsys, "--shelf", str(shelf), "verify")[0] == 0
    (shelf / "a-damaged" / "README.md").write_text("x")
    code, out, err = run(capsys, "--shelf", str(shelf), "verify")
    assert code == 1
    assert "ok tiny.sft: 6 files" in out
    assert "error: " in err and "README.md is damaged" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("info", "tiny.stf"), "did you mean 'tiny.sft'"),
        (("verify", "../x"), "dir:../x"),
        (("--shelf", "/nowhere", "list"), "holds no models"),
    ],
)
def test_problems_are_one_line_and_exit_code_1(capsys, shelf, argv, words):
    argv = argv if argv[0] == "--shelf" else ("--shelf", str(shelf), *argv)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert words in err and err.count("\n") == 1
