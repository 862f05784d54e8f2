"""The command line: mmm4rec prepare | demo | images | encode | train | evaluate | recommend | import-published | doctor."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from tqdm import tqdm

from mmm4rec.config import from_dict, load_yaml, merge, override, to_dict
from mmm4rec.errors import BadInput

if TYPE_CHECKING:  # torch takes seconds to import
    from mmm4rec.run import Assembled, RunConfig


def prepare_command(args: argparse.Namespace) -> None:
    from mmm4rec.data.prepare import PrepareConfig, prepare
    from mmm4rec.data.reviews import Columns

    told = ("k_core", "split", "valid_share", "test_share", "malformed", "memory_gb")
    try:
        config = PrepareConfig(**{name: getattr(args, name) for name in told}, columns=Columns.parse(args.columns))
    except ValueError as error:
        raise BadInput(str(error), remedy="Correct the flag.") from error
    _print(prepare(args.src, args.out, config, name=args.name, force=args.force).info)


def demo_command(args: argparse.Namespace) -> None:
    from mmm4rec.data.demo import write_demo

    for domain in write_demo(args.out, seed=args.seed, force=args.force):
        print(f"{domain.path}: {domain.n_users:,} users, {domain.n_items:,} items, {len(domain.items):,} interactions")


def encode_command(args: argparse.Namespace) -> None:
    from mmm4rec.data.encode import encode_domains, is_own

    if not is_own(args.encoder):
        _encode_pretrained(args)
        return
    domains = encode_domains(
        args.domain, encoder=args.encoder, fit_on=args.fit_on, save=args.save, dimensions=args.dimensions, force=args.force
    )
    for domain in domains:
        print(f"{domain.path}: encoded {domain.n_items:,} items with {args.encoder}")


def _encode_pretrained(args: argparse.Namespace) -> None:
    from mmm4rec.data.parts import encode_pretrained
    from mmm4rec.data.pretrained import PretrainedConfig

    if args.fit_on or args.save is not None:
        raise BadInput(
            "is a pre-trained encoder, which is not fitted or saved.", file=args.encoder, remedy="Leave --fit-on and --save out."
        )
    try:
        config = PretrainedConfig(args.encoder, args.revision, args.pooling, args.device, args.batch_size)
    except ValueError as error:
        raise BadInput(str(error), remedy="Correct the flag.") from error
    for work in encode_pretrained(args.domain, config, args.modality, force=args.force):
        print(f"{work.domain.path}: {work.modality} features by {work.encoder}")


def images_command(args: argparse.Namespace) -> None:
    from mmm4rec.data.images import ImagesConfig, fetch_images, take_images

    try:
        config = ImagesConfig(args.connections, args.retries, args.timeout, args.deadline, args.most_mb, args.side, args.private)
    except ValueError as error:
        raise BadInput(str(error), remedy="Correct the flag.") from error
    _print(fetch_images(args.domain, config) if args.source is None else take_images(args.domain, args.source, config))


def train_command(args: argparse.Namespace) -> None:
    """One run, with a bar an epoch and a line of its validation metrics."""
    from mmm4rec.execute import execute
    from mmm4rec.training.loop import EpochReport

    config = _run_config(args)
    if args.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return
    if args.out is None:
        raise BadInput("no folder for the run's files.", remedy="Give --out DIR.")
    bar = tqdm(unit="batch", leave=False, disable=None)

    def show(assembled: Assembled) -> None:
        if assembled.transfer is not None:
            print(assembled.transfer)

        def step(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        assembled.run.on_step = step

    with closing(execute(config, args.out, resume=args.resume, on_start=show)) as reports, bar:
        metric = config.training.valid_metric
        for report in reports:
            if not isinstance(report, EpochReport):
                bar.write(
                    f"step {report.optimizer_steps}: loss {report.train_loss:.4f}, {report.examples_per_second:,.0f} examples a second"
                )
                continue
            loss = "untrained" if report.train_loss is None else f"loss {report.train_loss:.4f}"
            mark = " *" if report.best_epoch == report.epoch else ""
            bar.write(f"epoch {report.epoch}: {loss}, valid {metric} {report.valid[metric]:.4f}, {report.train_seconds:.1f} s{mark}")
    result = json.loads((args.out / "result.json").read_text(encoding="utf-8"))
    for split in ("valid", "test"):
        if split in result:
            print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in result[split].items()))
    print(f"best epoch {result['best_epoch']}; files in {args.out}")


def _run_config(args: argparse.Namespace) -> RunConfig:
    """The file's keys, then the flags, then --set."""
    from mmm4rec.run import RunConfig

    data = load_yaml(args.config) if args.config else {}
    flags = {"seed": args.seed, "init": args.init and str(args.init), "device": args.device}
    data = merge(data, {key: value for key, value in flags.items() if value is not None})
    data = merge(data, {"data": {"domains": [str(path) for path in args.domain]}} if args.domain else {})
    data = merge(data, {"training": {"epochs": args.epochs}} if args.epochs is not None else {})
    return from_dict(RunConfig, override(data, args.set), source=str(args.config or "the command line"))


def evaluate_command(args: argparse.Namespace) -> None:
    from mmm4rec.inference import open_model
    from mmm4rec.training.evaluate import evaluate
    from mmm4rec.training.metrics import metrics

    model, data, device = open_model(args.model, args.domain, device=args.device, unseen=True, mask_seen=args.mask_seen)
    users, ends = data.domain.examples(args.split)
    values = metrics(evaluate(model, data, users, ends, device))
    _print({"domain": data.domain.name, "fingerprint": data.fingerprint, "split": args.split, "users": len(users), **values})


def recommend_command(args: argparse.Namespace) -> None:
    from mmm4rec.inference import open_model, recommend

    model, data, device = open_model(args.model, args.domain, device=args.device, mask_seen=args.mask_seen)
    for line in recommend(model, data, device, users=args.user, top=args.top):
        print(json.dumps(line, ensure_ascii=False))


def import_published_command(args: argparse.Namespace) -> None:
    from mmm4rec.exchange import import_published

    features = dict(zip(("text", "image"), args.features, strict=True)) if args.features else None
    _print(
        import_published(
            args.checkpoint,
            args.out,
            features=features,
            domain=args.domain,
            force=args.force,
            n_groups=args.n_groups,
            activation=args.activation,
            max_len=args.max_len,
            temperature=args.temperature,
            strict=not args.allow_differences,
        )
    )


def doctor_command(args: argparse.Namespace) -> int:
    """This machine, or the leak check; 1 where a model reads what it must not."""
    from mmm4rec import doctor, leak
    from mmm4rec.inference import open_model

    if (args.model is None) != (args.domain is None):
        raise BadInput("only one of --model and --domain is given.", remedy="Give both, or neither to check models with random weights.")
    if args.model is not None and not args.leak:
        raise BadInput("--model and --domain belong to the leak check.", remedy="Add --leak.")
    if not args.leak:
        facts = doctor.machine()
        print(json.dumps(facts, indent=2) if args.json else "\n".join(doctor.machine_lines(facts)))
        return 0
    if args.model is None:
        reports, passed = leak.check_generated()
    else:
        model, data, _ = open_model(args.model, args.domain, device="cpu")
        models = {args.model.name: model, "+ random weights": leak.with_noise(model)}
        reports = [leak.check_leaks(part, data, variant=name) for name, part in models.items()]
        passed = not any(report.leaks for report in reports)
    if args.json:
        _print({"passed": passed, "tolerance": leak.TOLERANCE, "models": [report.to_dict() for report in reports]})
        return 0 if passed else 1
    print("\n".join(leak.leak_lines(reports)))
    if args.model is None:
        expected = f"the default is clean, and the published one leaks {' and '.join(leak.PUBLISHED_LEAKS)}, as its authors' code does."
        print(f"As expected: {expected}" if passed else f"NOT as expected, which was: {expected}")
    return 0 if passed else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed, 2 bad input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    args = _parser().parse_args(argv)
    try:
        return args.command(args) or 0
    except BadInput as error:
        print(f"mmm4rec: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FloatingPointError, OSError) as error:
        print(f"mmm4rec: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmm4rec", description="Move a multi-modal Mamba-2 recommender into new domains.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "prepare", prepare_command, "raw files -> a domain", "mmm4rec prepare raw/Gift_Cards domains/Gift_Cards")
    formats = "Amazon 2014, 2018 or 2023 (one category), RecBole, UniSRec/MISSRec, or a table with the columns user, item, time"
    command.add_argument("src", type=Path, help=f"a folder or file, compressed or not: {formats}")
    command.add_argument("out", type=Path, help="folder of the new domain")
    command.add_argument("--name", help="name of the domain (default: the source's)")
    command.add_argument("--k-core", type=int, default=5, help="users and items with fewer interactions go (not UniSRec; default 5)")
    kinds = ("leave-one-out", "global-time")
    command.add_argument("--split", choices=kinds, default=kinds[0], help="global-time: test is what happened last in the whole domain")
    command.add_argument("--valid-share", type=float, default=0.1, help="of the interactions, with global-time (default 0.1)")
    command.add_argument("--test-share", type=float, default=0.1, help="of the interactions, with global-time (default 0.1)")
    command.add_argument("--malformed", type=float, default=0.001, metavar="SHARE", help="of rows that may be left out (default 0.001)")
    command.add_argument("--memory-gb", type=float, default=4.0, help="for rows; what does not fit is sorted on disk (default 4)")
    naming = "a plain table's columns, as user=uid item=sku time=ts time_unit=ms title=name image_url=photo"
    command.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help=naming)
    command.add_argument("--force", action="store_true", help="replace an existing domain")

    command = _command(commands, "demo", demo_command, "generated source and target domains with text and pictures", "mmm4rec demo domains")
    command.add_argument("out", type=Path, help="folder of the new domains")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--force", action="store_true", help="replace what is there")

    example = "mmm4rec encode domains/industrial --encoder lexical --fit-on domains/office"
    command = _command(commands, "encode", encode_command, "item texts or pictures -> features", example)
    command.add_argument("domain", type=Path, nargs="+")
    command.add_argument(
        "--encoder",
        default="lexical",
        help="lexical (text), pixel (pictures), a folder made by --save, or a transformers model: folder or hub name",
    )
    command.add_argument("--fit-on", type=Path, nargs="+", default=[], metavar="DOMAIN", help="source domains to fit the encoder on")
    command.add_argument("--save", type=Path, metavar="DIR", help="keep the fitted encoder")
    command.add_argument("--dimensions", type=int, default=256, help="of lexical or pixel vectors (default 256)")
    command.add_argument("--revision", help="commit, branch or tag of a hub's encoder; without one, today's is told and used")
    command.add_argument(
        "--modality", nargs="+", choices=("text", "image"), default=[], help="of a pre-trained encoder (default: all it can)"
    )
    command.add_argument("--pooling", default="auto", help="of a text encoder: mean, cls, pooler, or auto: as its own files say, else mean")
    command.add_argument("--device", default="auto", help="of a pre-trained encoder: auto, cpu, cuda")
    command.add_argument("--batch-size", type=_positive, default=64, help="texts or pictures at once, pre-trained (default 64)")
    command.add_argument("--force", action="store_true", help="replace the domain's features")

    command = _command(commands, "images", images_command, "the items' pictures, fetched or taken", "mmm4rec images domains/Toys")
    command.description = (
        "Fetch the items' pictures from the addresses in the metadata, or take them from a folder; what was fetched already is not "
        "fetched again, and images/missing.csv says what is missing and why. Addresses inside private networks are refused."
    )
    command.add_argument("domain", type=Path)
    command.add_argument("--from", type=Path, dest="source", metavar="DIR", help="take DIR/ITEM_ID.jpg (.png, .webp, ...) instead")
    command.add_argument("--connections", type=_positive, default=16, help="pictures at once (default 16)")
    command.add_argument("--retries", type=int, default=3, help="of a failed request (default 3)")
    command.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="without a byte (default 10)")
    command.add_argument("--deadline", type=float, default=60.0, metavar="SECONDS", help="for one picture (default 60)")
    command.add_argument("--most-mb", type=float, default=10.0, help="size limit of a picture (default 10)")
    command.add_argument("--side", type=_positive, default=512, metavar="PIXELS", help="larger pictures are made smaller (default 512)")
    command.add_argument("--private", action="store_true", help="allow addresses of private networks and of this machine")

    example = "mmm4rec train --domain domains/Scientific --out runs/a --seed 1 --set model.width=128 training.learning_rate=3e-4"
    command = _command(commands, "train", train_command, "train a model on a domain, or pre-train on several", example)
    command.add_argument("--domain", type=Path, nargs="+", help="fine-tuning: one; pre-training: several")
    command.add_argument("--out", type=Path, help="folder of the run's files")
    command.add_argument("--config", type=Path, help="YAML with the keys of RunConfig (data, model, training, ...)")
    command.add_argument("--init", type=Path, help="best.safetensors of a run to transfer from")
    command.add_argument("--seed", type=int)
    command.add_argument("--epochs", type=int)
    command.add_argument("--device", help="auto, cpu or cuda")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override single keys of the config; recommender=sasrec trains another model",
    )
    command.add_argument("--print-config", action="store_true", help="print every key with its value, and train nothing")
    command.add_argument("--resume", action="store_true", help="continue from OUT/last.ckpt where there is one")

    example = "mmm4rec evaluate --model runs/a/best.safetensors --domain domains/Scientific"
    command = _command(commands, "evaluate", evaluate_command, "full-ranking metrics of a trained model", example)
    command.add_argument("--split", choices=("valid", "test"), default="test")
    _add_model(command)

    example = "mmm4rec recommend --model runs/a/best.safetensors --domain domains/Scientific --user A1AXCV2WYDA4PD"
    command = _command(commands, "recommend", recommend_command, "the next items of users, as JSON lines", example)
    command.add_argument("--user", nargs="+", help="users by the source's id (default: all)")
    command.add_argument("--top", type=_positive, default=10, help="items a user; default 10")
    _add_model(command)

    example = "mmm4rec import-published fhckm_40.pth runs/released.safetensors --features text_feat.pth image_feat.pth"
    command = _command(commands, "import-published", import_published_command, "a checkpoint of the authors' release -> ours", example)
    command.add_argument(
        "checkpoint", type=Path, help="what the release saved (.pth, or .safetensors under its names); opened as plain tensors"
    )
    command.add_argument("out", type=Path, help="the new best.safetensors, for train --init, evaluate and recommend")
    command.add_argument("--features", type=Path, nargs=2, metavar=("TEXT", "IMAGE"), help="the release's feature tables, to check against")
    command.add_argument("--domain", type=Path, help="the domain that its item tables belong to, items in the release's order")
    command.add_argument("--n-groups", type=_positive, help="groups of the scan, which no tensor shows (default: one a head)")
    command.add_argument("--activation", choices=("silu", "hardswish"), default="silu", help="hardswish: it ran without causal_conv1d")
    command.add_argument("--max-len", type=_positive, default=20, help="of a model without time; default 20")
    command.add_argument("--temperature", type=float, default=0.8, help="of its scores; default 0.8")
    command.add_argument("--allow-differences", action="store_true", help="name missing and left-over tensors in a warning, and go on")
    command.add_argument("--force", action="store_true", help="replace OUT")

    example = "mmm4rec doctor --leak --model runs/a/best.safetensors --domain domains/Scientific"
    command = _command(commands, "doctor", doctor_command, "this machine, or what a model reads and must not", example)
    command.description = (
        "Without flags: what this machine offers a run. With --leak: alter the target item, its time, what follows it, the padding and "
        "the rest of the batch, and measure whether any score changes. It checks the default and the published model with random weights "
        "(the published one must be found leaking), or the model of --model, as it is and with noise on its weights, which shows what "
        "they could learn to read. Exit status 1: a leak where none may be."
    )
    command.add_argument("--leak", action="store_true", help="the leak check: some seconds, on the CPU")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.add_argument("--model", type=Path, help="with --leak: best.safetensors of a run")
    command.add_argument("--domain", type=Path, help="with --model: the domain to check it on")
    return parser


def _command(commands: Any, name: str, function: Any, text: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text}.", epilog=f"example: {example}")
    parser.set_defaults(command=function)
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, help="best.safetensors of a run")
    command.add_argument("--domain", type=Path, required=True)
    command.add_argument("--device", default="auto")
    seen = "leave the items of a user's history out of the ranking (default: as in the model's own run)"
    command.add_argument("--mask-seen", action=argparse.BooleanOptionalAction, help=seen)


def _print(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))


if __name__ == "__main__":
    sys.exit(main())
