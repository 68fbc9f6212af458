"""The command: help, verbs, exit codes, and how errors are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

import pytest

from nvlm_train import __version__, cli
from nvlm_train.errors import DataError

RECIPE = "recipes/nvlm_d_72b/2_sft.yaml"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_help_ends_with_an_example_that_parses(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    head, example = text.rsplit("example:\n", 1)
    assert head.startswith(f"usage: nvlm-train {verb}")
    line = re.split(r" [<>] ", example.splitlines()[0].strip())[0]
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    assert words[: 1 + len(verb.split())] == ["nvlm-train", *verb.split()]
    cli.parse(verb, words[1 + len(verb.split()) :])


def test_the_overview_names_every_verb_and_ends_with_an_example(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        assert all(f"  {verb} " in text for verb in cli.VERBS) and text.split("example:\n")[1].startswith(
            "  nvlm-train "
        )
    assert cli.main(["recipe"]) == 0
    assert "recipe check" in capsys.readouterr().out
    assert cli.main(["data", "--help"]) == 0
    assert "data preview" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nvlm-train {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: nvlm-train trian: is not a verb; did you mean `nvlm-train train`?"),
        (["check", RECIPE], "error: nvlm-train check: is not a verb; did you mean `nvlm-train recipe check`?"),
        (["lint", RECIPE], "error: nvlm-train lint: is not a verb; did you mean `nvlm-train data lint`?"),
        (["data", "stat"], "error: nvlm-train data stat: is not a verb; did you mean `nvlm-train data stats`?"),
        (["recipe", "shwo"], "error: nvlm-train recipe shwo: is not a verb; did you mean `nvlm-train recipe show`?"),
        ([RECIPE], f"error: nvlm-train {RECIPE}: is not a verb; did you mean `nvlm-train train {RECIPE}`?"),
        (
            ["qqq"],
            "error: nvlm-train qqq: is not a verb; use one of recipe, plan, fetch, data, train, export, verify, "
            "generate, evaluate, preflight, report, env",
        ),
        (
            ["train"],
            "error: nvlm-train train: the following arguments are required: R.yaml; `nvlm-train train --help` "
            "shows what it takes",
        ),
        (
            ["recipe", "show", RECIPE, "--world-size", "0"],
            "error: nvlm-train recipe show: argument --world-size: 0 is not 1 or more; `nvlm-train recipe show "
            "--help` shows what it takes",
        ),
        (
            ["export", "RUN", "OUT", "--adapter", "BASE", "--layout", "unpadded", "--max-shard-size", "1GB"],
            "error: --max-shard-size, --layout: no effect with --adapter, whose weights are one file for BASE; "
            "leave it out",
        ),
        (
            ["recipe", "check", "nowhere.yaml"],
            "error: nowhere.yaml: there is no such file; give the path of a recipe (YAML)",
        ),
    ],
)
def test_mistakes_are_told_in_a_line_with_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", message + "\n")


def test_train_takes_flags_anywhere_and_passes_them_on(monkeypatch):
    calls = []
    loop = types.ModuleType("nvlm_train.train.loop")
    loop.train = lambda loaded, resume, accept, branch: calls.append((loaded, resume, accept, branch)) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvlm_train.train.loop", loop)
    argv = ["train", RECIPE, "max_steps=5", "--resume", "never", "seed=2", "--accept", "max_steps", "--accept", "data"]
    assert cli.main(argv) == 0
    ((loaded, resume, accept, branch),) = calls
    assert branch is None
    assert (loaded.recipe.max_steps, loaded.recipe.seed, resume, accept) == (5, 2, "never", ["max_steps", "data"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--skip-steps", "5:6"], "--skip-steps: needs --from RUN/step_N"),
        (["--from", "nowhere/step_4", "--skip-steps", "6:5"], "'6:5' is no stretch of steps A:B with 1 <= A <= B"),
        (["--from", "nowhere/step_4", "--skip-steps", "0:5"], "'0:5' is no stretch"),
        (["--from", "nowhere/step_4"], "checkpoint nowhere/step_4 does not exist"),
        (["--replay", "x.json", "--from", "nowhere/step_4"], "takes neither --from nor --resume"),
        (["--replay", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_flags_of_train_that_do_not_fit(argv, message, capsys):
    assert cli.main(["train", RECIPE, *argv]) == 2
    assert message in capsys.readouterr().err


def run_with(monkeypatch, action) -> int:
    monkeypatch.setitem(cli.VERBS, "env", cli.VERBS["env"]._replace(run=action))
    return cli.main(["env"])


def test_user_errors_are_2_interrupts_130_and_bugs_keep_their_traceback(monkeypatch, capsys):
    def user_error(args):
        raise DataError("x.jsonl:3: is not JSON\nsecond line")

    assert run_with(monkeypatch, user_error) == 2
    assert capsys.readouterr().err == "error: x.jsonl:3: is not JSON\nsecond line\n"
    monkeypatch.setenv("RANK", "3")
    assert run_with(monkeypatch, user_error) == 2
    assert capsys.readouterr().err == "[rank 3] error: x.jsonl:3: is not JSON\n"

    def interrupted(args):
        raise KeyboardInterrupt

    assert run_with(monkeypatch, interrupted) == 130

    def bug(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, bug)


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)  # nobody reads: the first flush breaks
    done = subprocess.run(
        [sys.executable, "-m", "nvlm_train", "recipe", "keys"], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_env_names_versions(capsys):
    assert cli.main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    assert '"nvlm_train"' in text and '"pydantic"' in text and '"gpus"' in text
