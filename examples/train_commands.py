r"""Train audiomm's bundled model, whisper-commands, with audiomm's Trainer: a tiny Whisper on one CPU core.

    python train_commands.py --data spoken_digits --output commands-1 --minutes 90 --start whisper-digits
    python train_commands.py --data spoken_digits --output whisper-commands --minutes 89 --start commands-1 \
        --seed 4 --progress 0.2 --rate 1.2e-3
    python train_commands.py --data spoken_digits --output whisper-commands --evaluate --hold-out yweweler

The result is an ordinary Whisper folder (80 mel bins, 30 s windows) for `from_pretrained`. `commands_voices` speaks,
`commands_batches` makes the lessons, `commands_student` the losses, `commands_scores` the table. Without `--start` the
weights are random at first, and the training takes about twice as long.
"""

from __future__ import annotations

import argparse
import math
import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands_voices as cv
import digit_strings as ds
import torch
from commands_batches import Batches, Teachers
from commands_checkpoint import VOCABULARY, take_weights
from commands_scores import evaluate
from commands_student import Student
from digit_batches import Clock
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

from audiomm import Trainer, TrainerCallback, TrainingArguments, WhisperFeatureExtractor

REMEMBERED = 24  # batches whose encoder outputs are kept to practise on
AVERAGED_STEPS = 0.998  # decay of the running average of the weights, a step


class Lessons(IterableDataset[dict[str, Tensor]]):
    """Endless batches; pointing is practised again on what was heard, without the price of hearing."""

    def __init__(self, batches: Batches, student: Student, seed: int) -> None:
        self.batches, self.student, self.draw = batches, student, random.Random(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        memory: list[dict[str, Tensor]] = []
        for batch in self.batches:
            yield batch
            heard = self.student.heard  # the loader runs in the process of the training, a batch at a time
            if heard is not None:
                memory = [*memory[1 - REMEMBERED :], {**batch, "heard": heard}]
                yield from self.draw.choices(memory, k=2)


class TeachingTrainer(Trainer):
    """The Trainer with the student's losses and shares in its logs."""

    sums: dict[str, list[float]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        result = model(inputs)
        for name, value in result.items():
            self.sums.setdefault(name, []).append(float(value.detach()))
        return (result["loss"], result) if return_outputs else result["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self.sums.items():
            told = [value for value in values if not math.isnan(value)]
            logs.setdefault(name, round(sum(told) / max(len(told), 1), 4))
        self.sums = {}
        super().log(logs, start_time)


class Averaging(TrainerCallback):
    """Keeps a running average of the weights, writes it as a model folder, and ends the run when its time is up."""

    def __init__(self, clock: Clock, snapshot: Path, minutes: float) -> None:
        self.clock, self.snapshot, self.pause, self.written = clock, snapshot, minutes * 60, time.time()
        self.average: dict[str, Tensor] = {}
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        self.first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        steps = state.global_step - self.first
        decay = min(AVERAGED_STEPS, (steps + 1) / (steps + 20))
        torch._foreach_lerp_(list(self.average.values()), list(model.state_dict().values()), 1 - decay)
        if time.time() - self.written > self.pause:
            self.save(self.snapshot)
            self.written = time.time()
        if self.clock.progress() >= 1.0:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        told = " ".join(f"{name} {value:.3g}" for name, value in (logs or {}).items())
        stamp = time.strftime("%H:%M:%S")
        print(f"{stamp} step {state.global_step} progress {self.clock.progress():.3f} {told}", flush=True)

    def save(self, folder: Path) -> None:
        start = "whisper."
        part = {name.removeprefix(start): value for name, value in self.average.items() if name.startswith(start)}
        VOCABULARY.save_model(part, folder)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"progress": self.clock.progress()}

    def load_state(self, state: dict[str, float]) -> None:
        self.clock.done, self.clock.start = state["progress"], time.time()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    teachers = load_voices(args)
    student = Student()
    if args.start:
        take_weights(student.whisper, args.start)
    clock = Clock(args.minutes, args.progress)
    batches = Batches(teachers, WhisperFeatureExtractor().mel_filters, clock, args.seed, is_new=args.start is None)
    weights = [value for value in student.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def rate(step: int) -> float:
        return min((step + 1) / 200, 1.0) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * clock.progress())))

    averaging = Averaging(clock, args.work / "snapshot", args.snapshot_minutes)
    trainer = TeachingTrainer(
        model=student,
        args=TrainingArguments(
            output_dir=str(args.work / "run"),
            max_steps=args.steps,
            per_device_train_batch_size=1,  # a lesson is a batch already
            remove_unused_columns=False,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            logging_steps=args.logging_steps,
            save_steps=args.save_steps,
            save_total_limit=1,
            ignore_data_skip=True,
            restore_callback_states_from_checkpoint=True,
            disable_tqdm=True,
            seed=args.seed,
        ),
        data_collator=lambda samples: samples[0],
        train_dataset=Lessons(batches, student, args.seed),
        callbacks=[averaging],
        optimizers=(optimizer, LambdaLR(optimizer, rate)),
    )
    trainer.sums = {}
    clock.start = time.time()
    trainer.train(resume_from_checkpoint=args.resume or None)
    averaging.save(args.output)


def load_voices(args: argparse.Namespace) -> Teachers:
    """Training voices: takes 5 and later of every speaker but the one held out, and synthetic ones; kept in a file."""
    cache = args.work / f"voices-{args.seed}-{args.hold_out}.pickle"
    if not cache.exists():
        names = [path.name for path in sorted(args.data.iterdir()) if path.is_dir() and path.name != args.hold_out]
        recorded = ds.read_recordings(args.data, range(5, 50), names)
        real = cv.real_voices(ds.perturbed(recorded, args.copies, args.seed, most=(0.26, 0.4)) | recorded)
        if missing := cv.missing_programs():
            print(f"left out, as they are not installed: the voices of {', '.join(missing)}", flush=True)
        english, spanish = cv.synthetic_voices(args.voices, args.seed)
        for voices in (english, spanish):
            few = {name: voice for name, voice in voices.items() if not name.startswith("espeak")}
            voices |= cv.perturbed(few, 4, args.seed)
        fresh = cache.with_suffix(".new")
        fresh.write_bytes(pickle.dumps((real, english, spanish), pickle.HIGHEST_PROTOCOL))
        fresh.replace(cache)
    teachers = Teachers(*pickle.loads(cache.read_bytes()))
    sizes = (len(group) for group in teachers.lists)
    print("{} virtual speakers of digits, {} English and {} Spanish voices".format(*sizes), flush=True)
    return teachers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder <speaker>/<digit>_<speaker>_<take>.flac")
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write or to evaluate")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for checkpoints and cached voices")
    parser.add_argument("--hold-out", default=None, metavar="SPEAKER", help="a speaker to keep out of the training")
    parser.add_argument("--start", type=Path, default=None, help="begin with another model's weights of this size")
    parser.add_argument(
        "--minutes", type=float, default=90.0, help="wall time of the training, or of its rest with --resume"
    )
    parser.add_argument("--progress", type=float, default=0.0, help="where in the curriculum to begin, 0 to 1")
    parser.add_argument("--steps", type=int, default=1_000_000, help="end after so many steps at the latest")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --work")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--copies", type=int, default=24, help="virtual speakers made of every speaker")
    parser.add_argument("--voices", type=int, default=200, help="English voices to draw from espeak-ng")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logging-steps", type=int, default=50)
    parser.add_argument("--save-steps", type=int, default=400)
    parser.add_argument("--snapshot-minutes", type=float, default=4.0, help="minutes between snapshots of the average")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --output instead of training")
    parser.add_argument("--prompts", type=Path, nargs="*", default=(), help="with --evaluate: folders of prompts")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.evaluate:
        torch.set_num_threads(args.threads)
        evaluate(args.output, args.data, args.hold_out, args.prompts)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
