"""The transfer study: pre-train once, search and confirm every cell, write the tables.

    python studies/transfer_sweep.py --spec demo
    python studies/transfer_sweep.py --spec real_small --data DIR
    python studies/transfer_sweep.py --spec SPEC --data DIR --on SHOP      # the spec's arms on a domain of your own

Run again, it goes on where it was interrupted; a finished study prints its table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the repository's root, not studies/, belongs on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmm4rec.errors import BadInput
from studies.spec import add_arguments, load_spec, on_domains
from studies.study import describe, run_study


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed or was interrupted, 2 bad input."""
    parser = argparse.ArgumentParser(
        description="Run a transfer study: pre-training, a search in every cell (domain × arm), confirmation, tables.",
        epilog="Example: python studies/transfer_sweep.py --spec demo --out results",
    )
    add_arguments(parser)
    parser.add_argument(
        "--on", nargs="+", metavar="NAME", help="run the spec's arms on these folders under --data instead: raw ones, or prepared domains"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
    told = parser.parse_args(arguments)
    try:
        spec = load_spec(told.spec)
        if told.on:
            spec = on_domains(spec, told.on)
        if told.dry_run:
            print(describe(spec))
            return 0
        return run_study(spec, told.out, data=told.data)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
