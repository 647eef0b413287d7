"""Train a tiny Whisper from random weights to write down spoken digit strings, with timestamps, on two CPU cores.

    python train_spoken_digits.py --data spoken_digits --output whisper-digits --minutes 72 --processes 1
    python train_spoken_digits.py --data spoken_digits --output whisper-digits --evaluate
    python train_spoken_digits.py --data spoken_digits --output without-one --minutes 72 --hold-out yweweler

The result is an ordinary Whisper folder (80 mel bins, 30 s windows) for `from_pretrained`. `digit_strings` makes the
audio, `digit_batches` the lessons, `digit_student` the losses, `digit_scores` the table.

The weights that ship with audiomm were trained further, by `train_commands.py`, from what this script made with
`--hold-out yweweler`; the model's card lists the commands.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import digit_strings as ds
import numpy as np
import torch
from digit_batches import Batches, Clock
from digit_checkpoint import VOCABULARY
from digit_scores import evaluate
from digit_student import Student
from torch import Tensor, nn

from audiomm import WhisperFeatureExtractor


def train(args: argparse.Namespace) -> None:
    """Train until the time is up: `--processes` processes with one thread each change the same shared weights."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    checkpoint = args.work / "checkpoint.pt"
    student, saved, done = Student(), None, 0.0
    if args.start:
        student.load_state_dict(torch.load(args.start, weights_only=True)["average"])
        done = args.progress
    elif args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(saved["student"])
        done = saved["progress"]
    student.share_memory()
    voices, filters = load_voices(args), WhisperFeatureExtractor().mel_filters
    clock = Clock(args.minutes, done)
    context = torch.multiprocessing.get_context("fork")
    batches = [Batches(voices, filters, clock, rank) for rank in range(args.processes)]
    helpers = [context.Process(target=work, args=(student, part, clock, args, None)) for part in batches[1:]]
    for helper in helpers:
        helper.start()
    average = work(student, batches[0], clock, args, saved or {})
    for helper in helpers:
        helper.join()
    torch.save({"average": average}, args.work / "final.pt")
    whisper = {name.removeprefix("whisper."): value for name, value in average.items() if name.startswith("whisper.")}
    VOCABULARY.save_model(whisper, args.output)


def work(
    student: Student, batches: Batches, clock: Clock, args: argparse.Namespace, saved: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Optimise the shared weights; the process that gets `saved` also averages them, reports and writes checkpoints."""
    encoder = list(student.whisper.model.encoder.parameters())
    others = [value for name, value in student.named_parameters() if not name.startswith("whisper.model.encoder.")]
    groups = [{"params": encoder, "share": args.encoder_share}, {"params": others, "share": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    if saved:
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
    shown, parent = time.time(), os.getppid()
    sums: dict[str, list[float]] = {}
    memory: list[tuple[dict[str, Tensor], Tensor]] = []
    for step, batch in enumerate(batches):
        progress = clock.progress()
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            group["lr"] = group["share"] * args.rate * min((step + 1) / 100, 1.0) * (0.02 + 0.98 * cosine)
        result = learn(student, optimizer, batch)
        if student.heard is not None:  # pointing is practised again on what was heard, without the price of hearing
            memory = [*memory[-23:], (batch, student.heard)]
            for _ in range(2):
                learn(student, optimizer, *random.choice(memory))
        if saved is not None:
            decay = min(0.997, (step + 1) / (step + 20))
            torch._foreach_lerp_(list(average.values()), list(student.state_dict().values()), 1 - decay)
            for name, value in result.items():
                sums.setdefault(name, []).append(value.item())
            if time.time() - shown > args.report:
                means = " ".join(f"{name} {np.nanmean(values):.3f}" for name, values in sums.items())
                print(f"{time.strftime('%H:%M:%S')} step {step} progress {progress:.3f} {means}", flush=True)
                shown, sums = time.time(), {}
                state = {"student": student.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                fresh = args.work / "checkpoint.new"
                torch.save(state | {"progress": progress}, fresh)
                fresh.replace(args.work / "checkpoint.pt")
        if progress >= 1.0 or (saved is None and os.getppid() != parent):  # a helper ends with its parent
            break
    return average


def learn(
    student: Student, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], heard: Tensor | None = None
) -> dict[str, Tensor]:
    """One step of the optimizer."""
    with torch.autocast("cpu", torch.bfloat16):
        result = student(batch, heard)
    optimizer.zero_grad(set_to_none=True)
    result["loss"].backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return result


def load_voices(args: argparse.Namespace) -> dict[str, ds.Voices]:
    """Training voices: takes 5 and later of every speaker but the one held out, and synthetic ones."""
    names = [path.name for path in sorted(args.data.iterdir()) if path.is_dir() and path.name != args.hold_out]
    real = ds.read_recordings(args.data, range(5, 50), names)
    cache = args.work / f"synthetic-{args.seed}.pt"
    if not cache.exists():
        spoken = ds.synthetic_voices(args.voices, args.seed)
        others = ds.synthetic_voices(12, args.seed + 1, words=ds.OTHER_WORDS)
        torch.save([ds.converted(part, torch.from_numpy) for part in (spoken, others)], cache)
    synthetic, others = (ds.converted(part, Tensor.numpy) for part in torch.load(cache, weights_only=True))
    real = ds.perturbed(real, args.copies, args.seed) | real
    print(f"{len(names)} speakers, {len(real)} virtual ones, {len(synthetic)} synthetic voices", flush=True)
    return {"real": real, "synthetic": synthetic, "others": others}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder <speaker>/<digit>_<speaker>_<take>.flac")
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write or to evaluate")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for checkpoints and cached voices")
    parser.add_argument("--hold-out", default=None, metavar="SPEAKER", help="a speaker to keep out of the training")
    parser.add_argument("--minutes", type=float, default=80.0, help="wall time of the training")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--start", type=Path, default=None, help="take the averaged weights of another run")
    parser.add_argument("--progress", type=float, default=0.5, help="with --start: where in the curriculum to begin")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--encoder-share", type=float, default=1.0, help="the encoder's rate as a share of --rate")
    parser.add_argument("--copies", type=int, default=16, help="virtual speakers made of every speaker")
    parser.add_argument("--voices", type=int, default=300, help="synthetic voices to draw")
    parser.add_argument("--processes", type=int, default=2, help="training processes, one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=float, default=30.0, help="seconds between log lines and checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --output instead of training")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.evaluate:
        torch.set_num_threads(args.processes)
        evaluate(args.output, args.data, args.hold_out)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
