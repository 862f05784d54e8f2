"""The transfer study: pre-train once, search and confirm every cell, write the tables.

    python studies/transfer_sweep.py --spec demo
    python studies/transfer_sweep.py --spec transfer_real --data DIR
    python studies/transfer_sweep.py --spec SPEC --data DIR --on SHOP      # the spec's arms on a domain of your own

Run again, it goes on where it was interrupted; a finished study prints its table. While it runs, or after:

    python studies/transfer_sweep.py status --spec demo        # cells, trials, best so far, time left
    python studies/transfer_sweep.py stop --spec demo          # when the running epochs have ended
    python studies/transfer_sweep.py add --spec demo --arm 'no_filter={model: {filter: false}}'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, "") and (Path(__file__).resolve().parent / "study.py").is_file():  # run as a file of the repository:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # its root, not studies/, belongs on the path

from mmm4rec.errors import BadInput
from studies.spec import Spec, add_arguments, told_spec


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed or was stopped, 2 bad input."""
    told = _parser().parse_args(arguments)
    try:
        return _COMMANDS[told.command](told_spec(told), told)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a transfer study: pre-training, a search in every cell (domain × arm), confirmation, tables.",
        epilog="Example: python studies/transfer_sweep.py --spec demo --out results",
    )
    parser.add_argument("command", nargs="?", choices=tuple(_COMMANDS), default="run", help="default: run")
    add_arguments(parser)
    parser.add_argument("--storage", metavar="URI", help="a folder that every node sees, or s3://, gs://: the spec's stores.storage")
    parser.add_argument("--resume", action="store_true", help="go on with a study that exists, and begin none")
    parser.add_argument("--yes", action="store_true", help="accept that spec, code or domains differ from how the study began")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--domain", nargs="+", default=[], metavar="NAME", help="add: domains of the demo, or folders under --data")
    parser.add_argument("--arm", nargs="+", default=[], metavar="NAME=YAML", help="add: arms, as a spec defines them")
    return parser


def _run(spec: Spec, told: argparse.Namespace) -> int:
    from studies.study import run_study, with_stores

    if told.dry_run:
        from studies.describe import describe

        print(describe(spec))
        return 0
    return run_study(with_stores(spec, storage=told.storage), told.out, data=told.data, accept=_asker(yes=told.yes), resume=told.resume)


def _status(spec: Spec, told: argparse.Namespace) -> int:
    from studies.control import status

    print(status(spec, told.out))
    return 0


def _stop(spec: Spec, told: argparse.Namespace) -> int:
    from studies.control import stop

    print(stop(spec, told.out))
    return 0


def _add(spec: Spec, told: argparse.Namespace) -> int:
    from studies.control import add

    print(add(spec, told.out, data=told.data, domains=told.domain, arms=told.arm))
    return 0


_COMMANDS = {"run": _run, "status": _status, "stop": _stop, "add": _add}


def _asker(*, yes: bool) -> Callable[[str], bool]:
    """What accepts changes: --yes, or the user at a terminal."""

    def accept(text: str) -> bool:
        print(f"The study was begun with another {text}", file=sys.stderr)
        if yes or not sys.stdin.isatty():
            return yes
        return input("Go on with the changes? What rests on them begins anew, nothing is deleted. [y/N] ").strip().lower() == "y"

    return accept


if __name__ == "__main__":
    raise SystemExit(main())
