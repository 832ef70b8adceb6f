"""Texts that are generated together, against `generate` of transformers on the same batch.

Both sides generate the same number of tokens after the same prompts, on one model, thread and in
turns: ours as the worker does, transformers' with one padded batch, of which the longest text
decides how long all rows are computed. `--join` lets every text come when the one before has
generated so many tokens. Time is that of the processor. Prints one JSON object.

    python tests/bench/texts.py                                    # eight equal texts
    python tests/bench/texts.py --tokens 8 200 --prompts 16 128    # of mixed lengths
    python tests/bench/texts.py --model smollm2
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from bench.models import SHAPES, build
from reference.real_models import gguf_file
from reltrace_worker.engine import Engine
from reltrace_worker.models import LoadedModel, load_model
from reltrace_worker.types.jobs import GenerateJob, Sampling, TokenizedPrompt


def spread(few: int, most: int, count: int) -> list[int]:
    """Return numbers from `few` to `most`, evenly spread."""
    return [few + (most - few) * index // max(1, count - 1) for index in range(count)]


def ours(engine: Engine, jobs: Sequence[GenerateJob]) -> tuple[float, list[list[int]]]:
    started = time.process_time()
    task = engine.begin(jobs)
    found = {}
    while not task.finished:
        engine.advance(task)
        found |= task.take_outcomes()
    seconds = time.process_time() - started
    return seconds, [list(found[index].generated.token_ids) for index in range(len(jobs))]


def theirs(loaded: LoadedModel, jobs: Sequence[GenerateJob]) -> tuple[float, list[list[int]]]:
    longest = max(len(job.token_ids) for job in jobs)
    pads = [longest - len(job.token_ids) for job in jobs]
    ids = torch.tensor([[0] * n + list(job.token_ids) for n, job in zip(pads, jobs, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
    tokens = max(job.sampling.max_new_tokens for job in jobs)
    started = time.process_time()
    with torch.no_grad():
        found = loaded.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    seconds = time.process_time() - started
    rows = zip(found[:, longest:].tolist(), jobs, strict=True)
    return seconds, [row[: job.sampling.max_new_tokens] for row, job in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="135m", choices=[*SHAPES, "smollm2"])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs=2, default=(32, 32), help="from, to: tokens")
    parser.add_argument("--tokens", type=int, nargs=2, default=(64, 64), help="from, to: new ones")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model == "smollm2":
        with tempfile.TemporaryDirectory() as folder:
            file = gguf_file("smollm2", Path(folder))
            loaded = load_model(str(file), dtype="float32", device="cpu")
    else:
        loaded = build(SHAPES[arguments.model], torch.float32, "cpu")
    # Both sides generate as many tokens as are asked for.
    loaded.tokenizer.eos_token = None
    loaded.model.generation_config.eos_token_id = None
    chosen = random.Random(1)
    numbers = [
        spread(*arguments.prompts, arguments.texts),
        spread(*arguments.tokens, arguments.texts),
    ]
    chosen.shuffle(numbers[1])
    jobs = []
    for prompt, tokens in zip(*numbers, strict=True):
        ids = tuple(chosen.randrange(100, loaded.shape.vocab_size) for _ in range(prompt))
        jobs.append(GenerateJob(TokenizedPrompt(ids, ("",) * prompt), Sampling(tokens)))
    engine = Engine(loaded, "off")
    few = [GenerateJob(job.prompt, Sampling(2)) for job in jobs]
    ours(engine, few), theirs(loaded, few)
    rounds, same = [], 0.0
    for _ in range(arguments.rounds):
        (mine, texts), (generate, expected) = ours(engine, jobs), theirs(loaded, jobs)
        rounds.append((mine, generate))
        same = statistics.mean(a == b for a, b in zip(texts, expected, strict=True))
    tokens = sum(job.sampling.max_new_tokens for job in jobs)
    report = {
        "texts": len(jobs),
        "prompt_tokens": sum(len(job.token_ids) for job in jobs),
        "tokens": tokens,
        "rounds": len(rounds),
        "tokens_per_second": tokens / statistics.median(mine for mine, _ in rounds),
        "generate_tokens_per_second": tokens / statistics.median(other for _, other in rounds),
        "speedup": statistics.median(other / mine for mine, other in rounds),
        "speedup_by_round": [other / mine for mine, other in rounds],
        # Logits of random weights lie close together: rounding may choose another token.
        "same_texts": same,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
