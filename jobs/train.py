"""Train one experiment on Ray, from a recipe and settings laid over it; submitted again, it goes on.

python -m jobs.train --ledger my-bucket --experiment baseline --set training.num_batches=2000
ray job submit --working-dir . -- python -m jobs.train --ledger my-bucket --experiment baseline
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ruamel.yaml.error import YAMLError

from jobs.recipes import RECIPES, make_experiment, read_yaml
from jobs.session import run_job, use_models
from jobs.sweep import add_options, options_of, report, run_experiments
from smc.errors import ConfigError

__all__ = ["main", "setting"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; -> the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ledger", required=True, help="bucket or s3://bucket/prefix")
    parser.add_argument("--experiment", required=True, help="its name in the ledger")
    parser.add_argument("--recipe", default="default", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="like training.batch_size=64; repeatable"
    )
    add_options(parser)
    options = parser.parse_args(arguments)

    async def run() -> int:
        use_models(options.models)
        settings = [setting(text) for text in options.set]
        experiment = make_experiment(options.experiment, *settings, recipe=options.recipe)
        return report(
            await run_experiments([experiment], options.ledger, options_of(options), concurrency=options.concurrency)
        )

    return run_job(run)


def setting(text: str) -> dict[str, Any]:
    """KEY=VALUE with a dotted key, as nested settings. Raises: ConfigError."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {text!r}: expected KEY=VALUE, like training.batch_size=64")
    try:
        setting: Any = read_yaml(value)
    except YAMLError:
        raise ConfigError(f"--set {text!r}: {value!r} is not a YAML value") from None
    for key in reversed(path.split(".")):
        setting = {key: setting}
    return dict(setting)


if __name__ == "__main__":
    sys.exit(main())
