"""The command `nvlm-train`: one table of verbs. Each verb imports what it needs when it runs, then calls one function.

Exit codes: 0 done, 1 a bug (with its traceback), a lost rank or a verification that found a difference, 2 something the
user can put right, 130 interrupted. What is asked for goes to stdout, progress and errors to stderr. Nothing heavy is
imported here, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from nvlm_train import __version__
from nvlm_train.errors import NvlmError, PeerError, SetupError, is_users
from nvlm_train.log import rank_from_environment, set_up_logging

PROG = "nvlm-train"


class Verb(NamedTuple):
    """One verb: what it is for, the arguments it takes, an example, and what it runs."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    example: str
    run: Callable[[argparse.Namespace], int]


# ------------------------------------------------------------------------------------------------------ what verbs run


def _recipe(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from nvlm_train.recipe.show import COMMANDS

        return COMMANDS[name](args)

    return run


def _plan(args: argparse.Namespace) -> int:
    from nvlm_train.plan.show import plan_command

    return plan_command(args)


def _fetch(args: argparse.Namespace) -> int:
    from nvlm_train.train.weights import fetch_command

    return fetch_command(args)


def _data(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from importlib import import_module

        module = import_module({"index": "nvlm_train.data.lint"}.get(name, f"nvlm_train.data.{name}"))
        code: int = getattr(module, f"{name}_command")(args)
        return code

    return run


def _train(args: argparse.Namespace) -> int:
    from nvlm_train.recipe.load import load_recipe
    from nvlm_train.recipe.resolve import refuse_unsupported

    loaded = load_recipe(args.recipe, args.overrides)  # before torch: a typing mistake shows at once
    refuse_unsupported(loaded)

    if args.skip_steps and args.from_ is None:
        raise SetupError(
            "--skip-steps: needs --from RUN/step_N, a checkpoint from before these steps; a run that has begun keeps "
            "its own data"
        )
    if args.replay is not None:
        if args.from_ is not None or args.resume != "auto":
            raise SetupError("--replay: changes nothing and starts nothing, so it takes neither --from nor --resume")
        from nvlm_train.train.replay import replay

        return replay(loaded, args.replay, args.accept)

    from nvlm_train.train.branch import open_branch
    from nvlm_train.train.loop import train

    branch = None if args.from_ is None else open_branch(args.from_, args.skip_steps)
    return train(loaded, args.resume, args.accept, branch)


def _export(args: argparse.Namespace) -> int:
    of_a_model = {"--tokenizer": args.tokenizer, "--max-shard-size": args.max_shard_size, "--layout": args.layout}
    given = [option for option, value in of_a_model.items() if value is not None]
    if args.adapter is not None and given:
        raise SetupError(
            f"{', '.join(given)}: no effect with --adapter, whose weights are one file for {args.adapter}; leave it out"
        )
    from nvlm_train.export.hf import export_command

    return export_command(args)


def _verify(args: argparse.Namespace) -> int:
    from nvlm_train.export.verify import verify_command

    return verify_command(args)


def _generate(args: argparse.Namespace) -> int:
    from nvlm_train.infer.generate import generate_command

    return generate_command(args)


def _evaluate(args: argparse.Namespace) -> int:
    from nvlm_train.infer.evaluate import evaluate_command

    return evaluate_command(args)


def _preflight(args: argparse.Namespace) -> int:
    from nvlm_train.train.preflight import preflight_command

    return preflight_command(args)


def _report(args: argparse.Namespace) -> int:
    from nvlm_train.report import report_command

    return report_command(args)


def _env(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:<24}{value}")
    return 0


def environment() -> dict[str, str]:
    """Versions, devices and launcher variables, as a bug report needs them. Imports torch, nothing else heavy."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"nvlm_train": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in (
        "torch",
        "deepspeed",
        "transformers",
        "tokenizers",
        "safetensors",
        "pydantic",
        "pyyaml",
        "pillow",
        "triton",
        "wandb",
        "tensorboard",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpus"] = str(os.cpu_count())
    if found["torch"] != "not installed":
        import torch

        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = ", ".join(names) or "none"
        found["cuda of torch"] = str(torch.version.cuda)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        if name in os.environ:
            found[name] = os.environ[name]
    return found


# ------------------------------------------------------------------------------------------------- what verbs are given


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def _preflight_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--limit-s", type=float, default=60.0, metavar="S", help="all checks together (default 60)")
    parser.add_argument("--out", metavar="FILE", help="findings and failed nodes as JSON")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run directory")
    _json_flag(parser)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="R.yaml", help="the recipe")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="values that win over the file's: optimizer.lr=1e-5",
    )


def _recipe_on_ranks(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--world-size", type=_positive, metavar="N", help="number of ranks (default: WORLD_SIZE, or 1)")
    _json_flag(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--nodes", type=_positive, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=_positive, required=True, metavar="M", help="GPUs of a node")
    parser.add_argument("--gpu-gib", type=_above_zero, required=True, metavar="G", help="memory of a GPU in GiB")
    parser.add_argument(
        "--link-gbps",
        type=_above_zero,
        metavar="B",
        help="Gbit/s into a node, all its adapters together, as reached (some 0.8 of what they are sold as); default: "
        "not known, what is needed is told",
    )
    parser.add_argument(
        "--intra-gbps",
        type=_above_zero,
        default=2880.0,
        metavar="B",
        help="Gbit/s that a GPU receives inside its node, as reached (default: 2880, NVLink of an H100)",
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        metavar="X",
        help="useful operations over the peak, nobody waiting (default: 0.4)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=_above_zero,
        default=989.0,
        metavar="T",
        help="peak of a GPU in the recipe's precision (default: 989, bf16 of an H100; A100: 312)",
    )
    parser.add_argument(
        "--reserve-gib",
        type=float,
        default=4.0,
        metavar="R",
        help="of a GPU's memory, left to CUDA, NCCL and the allocator's slack (default: 4)",
    )
    _json_flag(parser)


def _index_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="processes that build an index (default: data.index_workers)"
    )


def _data_index_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    _index_workers(parser)
    parser.add_argument(
        "--rebuild", action="store_true", help="build anew what exists: after missing images were put in their places"
    )
    _json_flag(parser)


def _data_lint_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--images", action="store_true", help="decode every image as well, as training would; takes its time"
    )
    parser.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="threads that decode images (default: 2)"
    )
    _index_workers(parser)
    parser.add_argument(
        "--examples", type=_positive, default=3, metavar="N", help="examples of each kind of problem (default: 3)"
    )
    _json_flag(parser)


def _data_stats_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_on_ranks(parser)
    parser.add_argument(
        "--steps", type=_positive, default=32, metavar="N", help="steps that are packed and dealt out (default: 32)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the distributions: FILE.svg, FILE.png, or FILE.html with the table"
    )


def _data_preview_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_on_ranks(parser)
    parser.add_argument("--step", type=_whole, default=0, metavar="S", help="step whose packs are shown (default: 0)")
    parser.add_argument("--source", metavar="NAME", help="samples of this source instead of a step's")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--row", type=_whole, metavar="N", help="with --source: usable sample number N, from 0 (default: 0)"
    )
    which.add_argument(
        "--line", metavar="[FILE:]N", help="with --source: the sample at line (element, row) N, as lint counts them"
    )
    parser.add_argument("--samples", type=_whole, metavar="N", help="samples shown in full (default: 3; with --row: 1)")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page instead of text")


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    _json_flag(parser)


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a recipe, or a run directory")
    parser.add_argument("b", metavar="B", help="another")
    _json_flag(parser)


def _keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help="only keys that begin so: optimizer")
    _json_flag(parser)


def _resume(text: str) -> str:
    if text in ("auto", "never") or (text.startswith("step_") and text.removeprefix("step_").isdigit()):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor never nor step_N (step_400, say)")


def _stretch(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no stretch of steps A:B with 1 <= A <= B (410:415, say)")
    return int(first), int(last)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument(
        "--resume",
        type=_resume,
        default="auto",
        metavar="auto|never|step_N",
        help="auto: go on from the newest checkpoint of output_dir, if there is one; never: refuse an output_dir that "
        "holds a run; step_N: go back to that checkpoint, later ones and their metrics are set aside, not deleted",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="let this `ask` key differ from the run's recipe; may be given several times",
    )

    parser.add_argument(
        "--from",
        dest="from_",
        metavar="RUN/step_N",
        help="begin a new run, in an output_dir of its own, with the whole state of this checkpoint: weights, moments, "
        "schedule, position in the data",
    )
    parser.add_argument(
        "--skip-steps",
        type=_stretch,
        action="append",
        default=[],
        metavar="A:B",
        help="with --from: never draw the data of steps A to B (data_step in the metrics); may be given several times",
    )
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="run the step that RUN/nonfinite/step_N.json tells of again, print the loss of each sample and the "
        "largest gradient of each module, and change nothing",
    )


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN[/step_N]", help="run directory (its newest checkpoint), or one checkpoint of it"
    )
    parser.add_argument(
        "out", metavar="OUT", help="folder to write; must not hold another export (an interrupted one goes on)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not reload and compare the export")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="type of the weights (default: the recipe's precision)"
    )
    parser.add_argument(
        "--adapter",
        metavar="BASE",
        help="write the LoRA adapters alone, as a peft folder for the exported folder BASE (default: merged)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder, where the recipe's has moved")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest file (default: 4GB)")
    parser.add_argument(
        "--layout",
        choices=("published", "unpadded"),
        help="published: 7 dummy heads behind the tower's real ones, as vLLM wants them (default of NVLM-D); unpadded: "
        "none (NVLM-X and NVLM-H have no other)",
    )
    parser.add_argument(
        "--license",
        action="append",
        metavar="[PART=]LICENCE",
        help="licence of the exported weights, or of a part whose licence the run's recipe does not state "
        "(data.captions=CC-BY-4.0, weights.vision=MIT); may be given several times",
    )
    parser.add_argument(
        "--push", metavar="REPO", help="upload the verified export to this repository of the Hugging Face Hub, private"
    )
    parser.add_argument("--public", action="store_true", help="with --push: the repository is public")
    parser.add_argument("--yes", action="store_true", help="with --push: do not ask before the upload")
    _json_flag(parser)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="exported folder")
    parser.add_argument("--against", required=True, metavar="RUN[/step_N]", help="the checkpoint it was made of")
    _json_flag(parser)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT|RUN[/step_N]", help="exported folder, or a run, which is exported for it")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be given several times"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)"
    )
    _json_flag(parser)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out",
        metavar="OUT|RUN[/step_N]",
        help="exported folder, a run, or a plain Qwen2 folder for data without images",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSONL whose last assistant turns are the right answers"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows")
    _json_flag(parser)


def _positive(text: str) -> int:
    number = int(text)  # argparse answers a ValueError with the argument's name and value
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1 (0.4, say, for 40 %)")
    return number


_above_zero.__name__ = _share.__name__ = "number"
_whole.__name__ = "whole number"
_positive.__name__ = "whole number"  # what argparse calls it in "invalid whole number value"

VERBS: dict[str, Verb] = {
    "recipe check": Verb(
        "say whether a recipe is good; all of its problems at once",
        _recipe_on_ranks,
        "recipe check recipes/quickstart.yaml optimizer.lr=1e-3",
        _recipe("check"),
    ),
    "recipe show": Verb(
        "every effective value with its origin, and what follows from them",
        _recipe_on_ranks,
        "recipe show recipes/nvlm_d_72b/2_sft.yaml --world-size 64",
        _recipe("show"),
    ),
    "recipe diff": Verb(
        "the keys in which two recipes or runs differ",
        _diff_arguments,
        "recipe diff recipes/nvlm_d_72b/1_pretrain.yaml recipes/nvlm_d_72b/2_sft.yaml",
        _recipe("diff"),
    ),
    "recipe keys": Verb(
        "every key: type, default, whether a resume may change it, meaning",
        _keys_arguments,
        "recipe keys optimizer",
        _recipe("keys"),
    ),
    "recipe schema": Verb(
        "the JSON schema, for editors", lambda parser: None, "recipe schema > recipe.schema.json", _recipe("schema")
    ),
    "plan": Verb(
        "whether a run fits on a cluster, how long it takes there, and what to turn",
        _plan_arguments,
        "plan recipes/nvlm_d_72b/2_sft.yaml --nodes 8 --gpus-per-node 8 --gpu-gib 80 --link-gbps 2560",
        _plan,
    ),
    "fetch": Verb(
        "download the weights that hf:// names, and compare them with the model",
        _fetch_arguments,
        "fetch recipes/finetune_nvlm_d_72b.yaml",
        _fetch,
    ),
    "data index": Verb(
        "read all data once and keep the lengths, as the start of training would",
        _data_index_arguments,
        "data index recipes/quickstart.yaml --workers 4",
        _data("index"),
    ),
    "data lint": Verb(
        "every problem of every source, grouped, with file and line",
        _data_lint_arguments,
        "data lint recipes/quickstart.yaml --images",
        _data("lint"),
    ),
    "data stats": Verb(
        "samples, tokens, tiles and shares of each source; packing and balance",
        _data_stats_arguments,
        "data stats recipes/quickstart.yaml --world-size 8 --plot lengths.html",
        _data("stats"),
    ),
    "data preview": Verb(
        "what the model will see: tiles, tags, trained tokens, packs",
        _data_preview_arguments,
        "data preview recipes/quickstart.yaml --step 3 --html preview.html",
        _data("preview"),
    ),
    "train": Verb(
        "train; again: go on where it stopped",
        _train_arguments,
        "train recipes/quickstart.yaml max_steps=20\n"
        "  torchrun --nproc-per-node 8 -m nvlm_train train recipes/nvlm_d_72b/2_sft.yaml",
        _train,
    ),
    "export": Verb(
        "write a run as a Hugging Face folder, and verify it",
        _export_arguments,
        "export runs/quickstart/2_sft exports/quickstart\n"
        "  nvlm-train export runs/quickstart/2_sft exports/quickstart --push my-name/quickstart",
        _export,
    ),
    "verify": Verb(
        "compare an export with the checkpoint it was made of",
        _verify_arguments,
        "verify runs/quickstart/export --against runs/quickstart/2_sft",
        _verify,
    ),
    "generate": Verb(
        "answer a question about images",
        _generate_arguments,
        'generate exports/quickstart --image two_digits.png --prompt "What is the sum?"',
        _generate,
    ),
    "evaluate": Verb(
        "share of right answers on held-out data",
        _evaluate_arguments,
        "evaluate runs/quickstart/export --data demo/data/heldout_pairs.jsonl --json",
        _evaluate,
    ),
    "preflight": Verb(
        "look at every node of an allocation before training; launched like train",
        _preflight_arguments,
        "preflight recipes/quickstart/2_sft.yaml\n"
        "  srun --ntasks-per-node 8 python -m nvlm_train preflight recipes/nvlm_d_72b/2_sft.yaml --out preflight.json",
        _preflight,
    ),
    "report": Verb(
        "attempts of a run, lost time, and the share of it that moved the training forward",
        _report_arguments,
        "report runs/quickstart/2_sft",
        _report,
    ),
    "env": Verb("versions, devices and launcher variables", _json_flag, "env --json", _env),
}


# ---------------------------------------------------------------------------------------------------------- the command


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in our form."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{self.prog}: {message}; `{self.prog} --help` shows what it takes")


def _parser_of(name: str) -> argparse.ArgumentParser:
    verb = VERBS[name]
    parser = _Parser(
        prog=f"{PROG} {name}",
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        allow_abbrev=False,
        epilog=f"example:\n  {PROG} {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.arguments(parser)
    return parser


def parse(name: str, rest: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb. Overrides may stand anywhere, also behind flags, where argparse does not look."""
    parser = _parser_of(name)
    args, extra = parser.parse_known_args(rest)
    if extra and (not hasattr(args, "overrides") or any(word.startswith("-") for word in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides = [*args.overrides, *extra]
    return args


def _overview(group: str = "") -> str:
    names = [name for name in VERBS if name.startswith(group)]
    width = max(map(len, names))
    lines = [f"usage: {PROG} {group}VERB ...", "", "Train, fine-tune and export NVLM-style multimodal models.", ""]
    lines += [f"  {name:<{width}}  {VERBS[name].summary}" for name in names]
    lines += [
        "",
        f"`{PROG} VERB --help` shows a verb's arguments and an example; `{PROG} --version` the version.",
        "",
        "example:",
    ]
    lines.append(f"  {PROG} {VERBS[names[0]].example}")
    return "\n".join(lines)


def _find_verb(argv: list[str]) -> tuple[str, list[str]] | None:
    """(name, remaining arguments), or None after an overview was printed. Raises SetupError for an unknown verb."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return None
    if argv[0] in ("-V", "--version"):
        print(f"{PROG} {__version__}")
        return None
    if argv[0] in VERBS:
        return argv[0], argv[1:]
    group = f"{argv[0]} "
    of_group = [name.split()[1] for name in VERBS if name.startswith(group)]
    if of_group:
        if len(argv) == 1 or argv[1] in ("-h", "--help"):
            print(_overview(group))
            return None
        if argv[1] in of_group:
            return group + argv[1], argv[2:]
        raise SetupError(_unknown(argv[1], of_group, group))
    raise SetupError(_unknown(argv[0], [*dict.fromkeys(name.split()[0] for name in VERBS)], ""))


def _unknown(word: str, words: Sequence[str], group: str) -> str:
    near = [] if group else [name for name in VERBS if name.endswith(f" {word}")][:1]
    near = near or difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if not near and not group and word.endswith((".yaml", ".yml")):
        near = [f"train {word}"]
    hint = f"did you mean `{PROG} {group}{near[0]}`?" if near else f"use one of {', '.join(words)}"
    return f"{PROG} {group}{word}: is not a verb; {hint}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. Errors that are not the user's to mend keep their traceback."""
    try:
        found = _find_verb(list(sys.argv[1:] if argv is None else argv))
        if found is None:
            return 0
        name, rest = found
        try:
            args = parse(name, rest)
        except SystemExit as leaving:  # --help
            return int(leaving.code or 0)
        set_up_logging()
        code = VERBS[name].run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader (`| head`) has seen enough; keep Python from complaining while it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NvlmError, OSError) as error:
        if not is_users(error):
            raise
        text = f"{error}" if isinstance(error, NvlmError) else f"{error}: make room and start the same command again"
        rank = rank_from_environment()
        # every rank finds the same mistake: one of them tells it whole
        print(f"error: {text}" if rank == 0 else f"[rank {rank}] error: {text.splitlines()[0]}", file=sys.stderr)
        return 2
    except PeerError as error:
        rank = rank_from_environment()
        print(f"error: {error}" if rank == 0 else f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
