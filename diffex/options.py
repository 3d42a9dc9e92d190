"""Options that all commands share: which experiment, and where its results lie."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffex.config import Experiment, idle_settings, load, recipes
from diffex.errors import UserError
from diffex.remote import is_uri
from diffex.settings import parse_settings

HOME = Path("diffex-output")


def guarded(action: Callable[[], int]) -> int:
    """Run it; a user's mistake becomes one line on standard error and status 2, Ctrl-C status 130."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def add_experiment_options(parser: argparse.ArgumentParser) -> None:
    """Options that decide the experiment: --recipe, --data, --set, --dry-run."""
    parser.add_argument(
        "--recipe", default="assay", help=f"recipe: {', '.join(recipes())}, or a YAML file (default: assay)"
    )
    parser.add_argument(
        "--data", help="ingested store, folder of classes, Parquet file, ... (default: simulated assay)"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="a.b=v", help="replace a setting; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")


def add_place_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options that decide where results lie: --output, --store, --tracking-uri."""
    parser.add_argument("--output", type=Path, help=f"folder for results (default: diffex-output/{name}-<digest>)")
    parser.add_argument(
        "--store", help="stage store: a folder, or a URI such as s3://bucket/diffex (default: beside the results)"
    )
    parser.add_argument(
        "--tracking-uri", help="MLflow: sqlite:///FILE.db or http://HOST:PORT (default: SQLite file beside the results)"
    )


def experiment_of(options: argparse.Namespace) -> Experiment:
    """The experiment that the options describe; warns about settings without effect."""
    settings = parse_settings(options.settings)
    if options.data is not None:
        settings["data.path"] = options.data
    experiment = load(options.recipe, settings)
    if experiment.data.path is not None and not Path(experiment.data.path).exists():
        raise UserError(f"there is no file or folder {experiment.data.path!r} (--data)")
    for warning in idle_settings(experiment):
        print(f"warning: {warning}", file=sys.stderr)
    return experiment


def claim_output(output: Path, identity: Mapping[str, Any]) -> None:
    """Make the output folder, or check that it belongs to this very configuration.

    Raises:
        UserError: the folder holds results of another configuration, or something else; nothing is touched then.
    """
    record = output / "identity.json"
    if record.is_file():
        try:
            other = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{str(record)!r} is damaged: remove it, or choose another --output") from None
        if other.get("digest") != identity["digest"]:
            mine, theirs = identity["settings"], other.get("settings", {})
            changed = [k for k in mine if mine.get(k) != theirs.get(k)] or ["the search space, the data or the code"]
            shown = ", ".join(
                f"{k} ({theirs.get(k)} there, {mine.get(k)} here)" if k in mine else k for k in changed[:3]
            )
            raise UserError(f"{str(output)!r} holds results of another configuration: {shown}; choose another --output")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{str(output)!r} exists and is not a diffex output folder; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(identity, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write to {str(output)!r}: {error.strerror}") from None


def command_line() -> str:
    """What was typed to start this process, for reports."""
    is_script = sys.argv[0].endswith(".py")
    return shlex.join(["python", *sys.argv] if is_script else [Path(sys.argv[0]).name, *sys.argv[1:]])


def store_address(options: argparse.Namespace, beside: Path) -> str:
    """The stage store: what --store says, as an absolute path where it is a folder."""
    asked = options.store or str(beside / "store")
    return asked if is_uri(asked) else str(Path(asked).absolute())


def places(options: argparse.Namespace, name: str) -> tuple[Path, str, str]:
    """Output folder, store (folder or URI) and tracking URI: beside each other."""
    from diffex.tracking import absolute_uri

    output = options.output or HOME / name
    shared = output if options.output else HOME
    try:
        uri = absolute_uri(options.tracking_uri or f"sqlite:///{shared / 'mlflow.db'}")
    except OSError as error:  # a file where a folder must be, or no permission
        raise UserError(f"can't make the folder {error.filename!r}: {error.strerror}; choose another place") from None
    return output, store_address(options, shared), uri
