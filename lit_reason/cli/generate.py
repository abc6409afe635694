"""`lit-reason-generate checkpoint=arith-1m.gdpo 'prompt="What is 12 + 30?"'`: completions for questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from lit_reason.cli.launch import check_count, check_device, launch, pick_device
from lit_reason.config import check_config, check_run
from lit_reason.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from lit_reason.types import Completion


def main() -> None:
    """The console script."""
    launch("generate", run, check)


def check(cfg: DictConfig) -> None:
    """What can be known to be wrong before the model is loaded."""
    check_run(cfg)
    check_count(cfg, "n", least=1)
    check_device(cfg)
    if cfg.n > 1 and cfg.rollout.sampling.temperature == 0:
        raise ConfigError(f"n={cfg.n} greedy completions are all the same. Type rollout.sampling.temperature=1")
    if not questions(cfg):
        raise ConfigError("prompt is empty. Type 'prompt=\"What is 12 + 30?\"'")
    check_config(OmegaConf.masked_copy(cfg, ["rollout", "environment"]), cfg.allow_targets)


def run(cfg: DictConfig) -> list[Completion]:
    """Generate and print, question by question."""
    from lit_reason.cli.build import build
    from lit_reason.cli.engines import open_engine
    from lit_reason.cli.stages import load_checkpoint
    from lit_reason.data import default_chat, prompt_id
    from lit_reason.rollout import request_seed
    from lit_reason.types import Prompt

    model, tokenizer = load_checkpoint(cfg.checkpoint)
    chat = default_chat(tokenizer)
    prompts = [
        Prompt(prompt_id(text), text, "", "cli", tuple(chat.prompt_ids(tokenizer, text)))
        for text in questions(cfg)
        for _ in range(cfg.n)
    ]
    samples = [i for _ in questions(cfg) for i in range(cfg.n)]
    seeds = [request_seed(cfg.seed, 0, prompt.id, i) for prompt, i in zip(prompts, samples, strict=True)]
    with open_engine(cfg, tokenizer, chat, prompts) as engine:
        engine.push(model.to(pick_device(cfg.device)), version=0)
        completions = engine.generate(prompts, build(cfg, "rollout.sampling"), seeds, samples)
    for prompt, completion in zip(prompts, completions, strict=True):
        if completion.sample_idx == 0:
            print(f"\n{prompt.question}")
        if completion.fault:
            raise RolloutError(f"the environment failed: {completion.fault}")
        cut = "" if completion.finish_reason == "stop" else f"  [cut at {len(completion.token_ids)} tokens]"
        print(f"  {completion.text}{cut}")
    return completions


def questions(cfg: DictConfig) -> list[str]:
    """`prompt` as a list; numbers that the command line parsed become text again."""
    given = list(cfg.prompt) if OmegaConf.is_list(cfg.prompt) else [cfg.prompt]
    return [text for item in given if (text := str(item).strip())]


if __name__ == "__main__":
    main()
