"""LoRA training on the default backbone: tokens per second, peak memory and loss, side by side with what else is used.

Peers: transformers' Trainer with peft, TRL's SFTTrainer with its packing, and the shape of llama-cookbook's loop. Every
system learns the same examples of the demo's data once, in the same batches and order (TRL packs them in its own), in a
process of its own; systems alternate, each repeat with other examples. Held-out loss after that is measured the same
way for all, in the type that a system trains in. bfloat16 is measured where the processor multiplies it. With --shape
the model has random weights, and learns random tokens: for speed alone.
    python benchmarks/training.py [--steps 24] [--repeats 2] [--systems ...] [--seed 0]      (TRL: the extra `oracles`)
    python benchmarks/training.py --device cuda --shape llama-2-7b
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from machine import machine_facts, say_if_busy, silence_peft
from training_files import write_results

if TYPE_CHECKING:
    from torch import nn
    from training_work import Work

GOAL = 1.3
OURS = "polyhead"
WARM_UP_STEPS = 3
KINDS = ("polyhead", "transformers Trainer", "TRL SFTTrainer packed", "llama-cookbook loop")
MULTIPLIES_BFLOAT16 = {"amx_bf16", "avx512_bf16"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    system: str
    tokens_per_s: float
    mfu: float
    """Model FLOPs utilisation, as the trainer counts it: a share of the peak in the types that the system uses."""
    peak_bytes: int
    """Of the process; with a GPU, of its memory."""
    loss_before: float
    loss_after: float


def main() -> None:
    options = _options()
    if options.worker:
        print(json.dumps(asdict(measure(options))))
        return
    facts = machine_facts()
    if not options.systems:
        fast = options.device != "cpu" or MULTIPLIES_BFLOAT16 & set(facts["isa"])
        dtypes = ("float32", "bfloat16") if fast else ("float32",)
        int8 = [f"{OURS} int8"]
        if fast and options.device == "cpu":  # elsewhere int8 has activations in bfloat16 by itself
            int8.append(f"{OURS} int8 bfloat16")
        options.systems = [*int8, *(f"{kind} {dtype}" for dtype in dtypes for kind in KINDS)]
    if any("TRL" in system for system in options.systems) and find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install -c constraints.txt 'polyhead[oracles]', or leave it out")
    say_if_busy(facts)
    found: list[Measured] = []
    for repeat in range(options.repeats):
        for system in options.systems:
            found.append(_in_own_process(options, system, repeat))
            one = found[-1]
            print(f"repeat {repeat}: {system}: {one.tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
    print_table(found, options.systems)
    write_results(options.out, facts, {"steps": options.steps, "batch_size": options.batch_size}, found)


def _in_own_process(options: argparse.Namespace, system: str, repeat: int) -> Measured:
    command = [sys.executable, __file__, "--worker", system, "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size), "--seed", str(options.seed + repeat)]
    command += ["--backbone", options.backbone, "--device", options.device, "--shape", options.shape]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{system} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(options: argparse.Namespace) -> Measured:
    import torch
    from training_systems import SYSTEMS
    from training_work import demo_work, random_work

    from polyhead_trainer.config import EvaluateSection
    from polyhead_trainer.evaluate import prepare as prepare_evaluation

    silence_peft()
    work, held_out = random_work(options) if options.shape else demo_work(options)
    model, meter = SYSTEMS[options.worker](work)
    peak = (
        torch.cuda.max_memory_allocated()
        if options.device != "cpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    rate = meter.tokens_per_s(WARM_UP_STEPS)
    mfu = utilization(options, model, work, rate)
    model.eval()
    evaluator = prepare_evaluation(EvaluateSection(generate_examples=0), held_out, work.tokenizer, work.pad_id)
    loss_after = evaluator.held_out_loss(model)
    del model
    dtype = "bfloat16" if options.device != "cpu" else "float32"
    return Measured(
        system=options.worker,
        tokens_per_s=rate,
        mfu=mfu,
        peak_bytes=peak,
        loss_before=evaluator.held_out_loss(work.model(dtype)),
        loss_after=loss_after,
    )


def utilization(options: argparse.Namespace, model: nn.Module, work: Work, tokens_per_s: float) -> float:
    import torch

    from polyhead_trainer.utilization import count_flops, multiplied_dtypes, peak_of

    words = options.worker.split()
    own = "float32" if options.device == "cpu" else "bfloat16"
    dtype = next((word for word in words if word in ("float32", "bfloat16")), own)
    quantization = "int8" if "int8" in words else "none"
    peak = peak_of(torch.device(options.device), multiplied_dtypes(getattr(torch, dtype), quantization), 1)
    flops = count_flops(model)
    assert flops is not None
    labels = sum(sum(one.is_label) for one in work.examples) / sum(map(len, work.examples))
    return tokens_per_s * (flops.per_token + labels * flops.per_label) / peak.flops_per_s


def print_table(found: list[Measured], systems: list[str]) -> None:
    rates = {name: [one.tokens_per_s for one in found if one.system == name] for name in systems}
    peers = {name: statistics.median(values) for name, values in rates.items() if not name.startswith(OURS)}
    best = max(peers.values(), default=None)
    heads = f"{'tokens/s':>9}   {'[min, max]':<16} {'MFU':>6} {'peak MiB':>8} {'loss':>14}"
    print(f"\n{'system':<32} {heads}   of the best peer")
    for name in systems:
        own = [one for one in found if one.system == name]
        median = statistics.median(rates[name])
        spread = f"[{min(rates[name]):.0f}, {max(rates[name]):.0f}]"
        peak = max(one.peak_bytes for one in own) / (1 << 20)
        losses = f"{own[0].loss_before:.3f} {statistics.median(one.loss_after for one in own):.3f}"
        mfu = statistics.median(one.mfu for one in own)
        ratio = f"{median / best:.2f} x" if best is not None else ""
        print(f"{name:<32} {median:>9.0f}   {spread:<16} {mfu:>6.1%} {peak:>8.0f} {losses:>14}   {ratio}")
    if best is not None:
        print(f"\ngoal: {GOAL} x the best peer, at equal loss after equal tokens")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="", help="random weights of this shape, such as llama-2-7b")
    parser.add_argument("--systems", nargs="+", default=[])
    parser.add_argument(
        "--steps", type=int, default=24, help=f"optimizer steps; the first {WARM_UP_STEPS} are not timed"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/training.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS + 1:
        parser.error(f"--steps {options.steps}: more than {WARM_UP_STEPS + 1} are needed")
    return options


if __name__ == "__main__":
    main()
