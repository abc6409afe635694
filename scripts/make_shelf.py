"""Puts the primed and the trained model of a finished run on the shelf, with the cards that the run wrote.

lit-reason-train experiment=arith_from_scratch
python scripts/make_shelf.py runs/arith_from_scratch-1 --name arith-1m
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_reason import zoo

STAGES = {"sft": "sft", "rl": "gdpo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True, help="shelf name without the stage, e.g. arith-1m")
    args = parser.parse_args()
    for stage, suffix in STAGES.items():
        found = zoo.load(args.run_dir / stage / "model")
        info = {key: found.info[key] for key in ("recipe", "seed", "commit", "metrics")}
        print(zoo.save(f"{args.name}.{suffix}", found.model, found.tokenizer, info, overwrite=True))


if __name__ == "__main__":
    main()
