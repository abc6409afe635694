"""Puts the models of a finished run on the shelf, with the cards that the run wrote.

lit-reason-train experiment=arith_from_scratch
python scripts/make_shelf.py runs/arith_from_scratch-1 --name arith-1m --made-by experiment=arith_from_scratch

lit-reason-train experiment=arith_22m
python scripts/make_shelf.py runs/arith_22m-1 --name arith-22m --made-by experiment=arith_22m --dtype bfloat16

The primed model becomes NAME.sft, the one after RL, where there is one, NAME.gdpo. Weights rounded to bfloat16 are
evaluated again, so that the card tells what lies on the shelf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from lit_reason import zoo
from lit_reason.cli.build import build
from lit_reason.cli.engines import open_engine
from lit_reason.cli.stages import card_metrics, evaluate_model
from lit_reason.models import Transformer

STAGES = {"sft": "sft", "rl": "gdpo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True, help="shelf name without the stage, e.g. arith-1m")
    parser.add_argument("--made-by", required=True, metavar="OVERRIDES", help="of lit-reason-train, for the card")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights (float32)")
    args = parser.parse_args()
    found = [stage for stage in STAGES if (args.run_dir / stage / "model").is_dir()]
    if not found:
        parser.error(f"{args.run_dir} has no finished stage {' or '.join(STAGES)}; run the whole recipe first")
    for stage in found:
        loaded = zoo.load(args.run_dir / stage / "model")
        info = {key: loaded.info[key] for key in ("recipe", "seed", "commit", "metrics")}
        info["description"] = f"Made by `lit-reason-train {args.made_by}`; the recipe below is its last stage's."
        if args.dtype == "bfloat16":
            loaded.model.to(torch.bfloat16)
            info["metrics"] = metrics(args.run_dir / stage / "config.yaml", loaded.model)
        print(zoo.save(f"{args.name}.{STAGES[stage]}", loaded.model, loaded.tokenizer, info, overwrite=True))


def metrics(config: Path, model: Transformer) -> dict[str, object]:
    """The card's figures of this model, under the stage's own evaluation."""
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    torch.set_num_threads(cfg.extras.threads or torch.get_num_threads())  # as the run was evaluated
    data = build(cfg, "data")
    with open_engine(cfg, data.tokenizer, data.chat, data.prompts("all")) as engine:
        report = evaluate_model(cfg, model, data, torch.device("cpu"), engine)
    return card_metrics(report.summary())


if __name__ == "__main__":
    main()
