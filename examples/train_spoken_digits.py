"""Train a tiny Whisper from random weights to write down spoken digit strings, with timestamps, on two CPU cores.

    python train_spoken_digits.py --data spoken_digits --output whisper-digits --minutes 60 --hold-out george
    python train_spoken_digits.py --data spoken_digits --output whisper-digits --evaluate --hold-out george

The result is an ordinary Whisper folder (80 mel bins, 30 s windows) for `from_pretrained`. Three things make it quick:
windows start short and sit anywhere in the table of positions, the encoder is also asked which digit every frame
holds, and a few cross-attention heads are told where the next word is. Both aids are dropped in the saved model; the
guided heads of the last layer are its `alignment_heads`.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import digit_strings as ds
from digit_checkpoint import (
    EN,
    EOT,
    FIRST_TIME,
    GUIDED,
    NO_SPEECH,
    NO_TIMES,
    PREV,
    SOT,
    TRANSCRIBE,
    TRANSLATE,
    VOCABULARY,
    WORD_TOKEN,
    model_config,
    save_model,
)
from audiomm import WhisperFeatureExtractor, WhisperForConditionalGeneration

IGNORE = -100
ORDERS = 64  # classes of "the how manieth digit is this"


# ------------------------------------------------------------------------------------------------------------- batches
def target_rows(window: ds.Window, offset: int, times: bool, task: int, prompt: list[int]) -> dict[str, Any]:
    """Decoder inputs and labels of a window, and where in the window each label is heard (encoder positions)."""

    def position(seconds: float) -> int:
        return round(seconds * ds.FRAMES_PER_SECOND)

    prefix = [*prompt, SOT, EN, task] + ([] if times else [NO_TIMES])
    body: list[tuple[int, tuple[int, int] | None]] = []
    segments = window.segments()
    for number, segment in enumerate(segments):
        start, end = position(segment[0][1]), position(segment[-1][2])
        if times:
            body.append((FIRST_TIME + min(offset + start, 1500), (start - 1, start + 2)))
        body += [(WORD_TOKEN + digit, (position(begin), position(stop))) for digit, begin, stop in segment]
        if times and not (window.open_end and number == len(segments) - 1):
            body.append((FIRST_TIME + min(offset + end, 1500), (end - 2, end + 1)))
    if not segments:
        body = [(FIRST_TIME, None)] if times else []
    last = position(segments[-1][-1][2]) if segments else 0
    body.append((EOT, (last, last + 12) if segments else None))
    ids = prefix + [token for token, _ in body]
    labels = [IGNORE] * (len(prefix) - 1) + ids[len(prefix) :]
    labels[len(prompt)] = EN if segments else NO_SPEECH
    return {"ids": ids[:-1], "labels": labels, "first": len(prefix) - 1, "places": [place for _, place in body]}


class Batches:
    """Endless batches whose windows grow with the progress of the training (0 to 1)."""

    def __init__(self, voices: dict[str, ds.Voices], mel_filters: np.ndarray, clock: Clock, rank: int) -> None:
        self.voices, self.mel_filters, self.clock, self.rank = voices, mel_filters, clock, rank

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        seed = self.rank + int(time.time())
        maker = ds.WindowMaker(**self.voices, seed=seed)
        features, rng = ds.LogMel(self.mel_filters, seed + 1), np.random.default_rng(seed + 2)
        while True:
            yield self.batch(maker, features, rng)

    def shape(self, rng: np.random.Generator) -> tuple[float, int]:
        """Seconds and number of windows of the next batch."""
        progress, dice = self.clock.progress(), rng.random()
        if progress < 0.12:
            return float(rng.choice([2.0, 3.0])), 12
        whole = 0.0 if progress < 0.65 else 0.1 if progress < 0.8 else 0.4
        if dice < whole:
            return ds.WINDOW_SECONDS, 8
        if dice < whole + 0.2:
            return float(rng.choice([8.0, 12.0])), 12
        return float(rng.choice([3.0, 4.0, 5.0, 6.0])), 16

    def batch(self, maker: ds.WindowMaker, features: ds.LogMel, rng: np.random.Generator) -> dict[str, Tensor]:
        seconds, size = self.shape(rng)
        maker.difficulty = features.difficulty = min(0.1 + self.clock.progress(), 1.0)
        length = int(seconds * ds.FRAMES_PER_SECOND)
        prompted, windows, rows, offsets = rng.random() < 0.15, [], [], []
        for _ in range(size):
            offset = int(rng.integers(0, 1500 - length + 1)) if rng.random() < 0.5 else 0
            full = seconds == ds.WINDOW_SECONDS and rng.random() < 0.25
            if not full and seconds < ds.WINDOW_SECONDS and rng.random() < 0.1:
                offset, full = 1500 - length, True
            speech = seconds
            if seconds == ds.WINDOW_SECONDS and not full and rng.random() < 0.8:
                speech = float(rng.uniform(1, 12))
            window = maker.draw(speech, dense=full, cut=full and rng.random() < 0.7)
            window.wave = np.pad(window.wave, (0, int(seconds * ds.RATE) - len(window.wave)))
            times, task = rng.random() < 0.5, TRANSLATE if rng.random() < 0.1 else TRANSCRIBE
            prompt = self.prompt(rng, times) if prompted and rng.random() < 0.7 else []
            windows.append(window)
            rows.append(target_rows(window, offset, times, task, prompt))
            offsets.append(offset)
        return self.collate(features(windows), windows, rows, offsets, length)

    @staticmethod
    def prompt(rng: np.random.Generator, times: bool) -> list[int]:
        count = int(rng.integers(1, 12)) if rng.random() < 0.7 else int(rng.integers(12, 200))
        words = [WORD_TOKEN + int(digit) for digit in rng.integers(0, 10, count)]
        if times:  # earlier segments keep their times in the prompt
            words = [FIRST_TIME + 20, *words, FIRST_TIME + int(rng.integers(30, 1500))]
        return [PREV, *words[-220:]]

    @staticmethod
    def collate(
        features: Tensor, windows: list[ds.Window], rows: list[dict[str, Any]], offsets: list[int], length: int
    ) -> dict[str, Tensor]:
        width = max(len(row["ids"]) for row in rows)
        ids = torch.full((len(rows), width), EOT)
        labels = torch.full((len(rows), width), IGNORE)
        places = torch.zeros(len(rows), width, 2, dtype=torch.long)
        frames = torch.full((len(rows), length), ds.SILENCE)
        order = torch.full((len(rows), length), IGNORE)
        past = torch.full((len(rows), length, 2), IGNORE)
        for index, (row, window) in enumerate(zip(rows, windows, strict=True)):
            ids[index, : len(row["ids"])] = torch.tensor(row["ids"])
            labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
            for step, place in enumerate(row["places"]):
                if place is not None and max(place[0], 0) < length:
                    begin = max(place[0], 0)
                    places[index, row["first"] + step] = torch.tensor([begin, min(max(place[1], begin + 1), length)])
            for number, (digit, begin, end) in enumerate(window.digits):
                span = slice(round(begin * 50), max(round(end * 50), round(begin * 50) + 1))
                frames[index, span] = digit
                order[index, span] = min(number, ORDERS - 1)
                before = [ds.SILENCE, ds.SILENCE, *(item[0] for item in window.digits[:number])]
                past[index, span] = torch.tensor(before[-2:])
        past[0, 0] = past[0, 0].clamp(min=0)
        order[0, 0] = order[0, 0].clamp(min=0)  # never nothing to learn
        positions = torch.tensor(offsets)[:, None] + torch.arange(length)
        batch = {"features": features, "positions": positions, "ids": ids, "labels": labels}
        return batch | {"places": places, "frames": frames, "order": order, "past": past}


# ------------------------------------------------------------------------------------------------------------ training
class Clock:
    """Progress from 0 to 1 in wall time; a resumed run goes on where it stopped."""

    def __init__(self, minutes: float, done: float) -> None:
        self.minutes, self.done, self.start = minutes, done, time.time()

    def progress(self) -> float:
        return self.done + (1 - self.done) * min((time.time() - self.start) / (self.minutes * 60), 1.0)


def look_back(query: nn.Linear, key: nn.Linear, frames: int, gain: float = 1.8) -> None:
    """Let the first 64 dimensions of an encoder layer's attention look softly at what was heard `frames` earlier.

    The key of a position is its own sines and cosines, the query those of the earlier position (a rotation of them).
    """
    half = query.in_features // 2
    pairs = torch.arange(9, 41)
    angle = torch.exp(-math.log(10000) * pairs / (half - 1)) * -frames
    rows = torch.arange(32)
    query.weight[:64], key.weight[:64], query.bias[:64] = 0.0, 0.0, 0.0
    key.weight[rows, pairs] = key.weight[rows + 32, half + pairs] = gain
    query.weight[rows, pairs] = query.weight[rows + 32, half + pairs] = gain * angle.cos()
    query.weight[rows, half + pairs] = gain * angle.sin()
    query.weight[rows + 32, pairs] = -gain * angle.sin()


class Student(nn.Module):
    """The Whisper model with a frame classifier and a view of its guided cross-attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.whisper = WhisperForConditionalGeneration(model_config())
        self.whisper.set_attn_implementation("eager")  # quicker than sdpa in bfloat16 on a CPU
        self.frame_head = nn.Linear(self.whisper.config.d_model, len(ds.WORDS) + 1)
        self.order_head = nn.Linear(self.whisper.config.d_model, ORDERS)
        self.past_heads = nn.Linear(self.whisper.config.d_model, 2 * (len(ds.WORDS) + 1))
        self.queries: dict[int, Tensor] = {}
        for layer in {layer for layer, _ in GUIDED}:
            norm = self.whisper.model.decoder.layers[layer].encoder_attn_layer_norm
            norm.register_forward_hook(lambda _module, _inputs, out, layer=layer: self.queries.__setitem__(layer, out))
        self.start_values()

    @torch.no_grad()
    def start_values(self) -> None:
        """First weights that let a small model learn in minutes: positions stay readable, some heads look back."""
        model = self.whisper.model
        for stack, quiet in ((model.encoder, 0.3), (model.decoder, 1.0)):
            for name, module in stack.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv1d)):
                    scale = (2.0 if isinstance(module, nn.Conv1d) else 1.0) / module.weight[0].numel()
                    last = name.endswith(("out_proj", "fc2"))
                    module.weight.normal_(std=math.sqrt(scale / (2 * len(stack.layers) if last else 1)))
                    if last or name == "conv2":
                        module.weight.mul_(quiet)
        model.decoder.embed_tokens.weight.normal_(std=0.05)
        table = model.encoder.embed_positions.weight  # timestamps start with the geometry of the encoder's positions
        model.decoder.embed_tokens.weight[FIRST_TIME : FIRST_TIME + 1500] = table * 0.08
        model.decoder.embed_positions.weight.normal_(std=0.02)
        for layer in model.encoder.layers[1:]:
            look_back(layer.self_attn.q_proj, layer.self_attn.k_proj, frames=26)

    def encode(self, features: Tensor, positions: Tensor) -> Tensor:
        """The encoder on a window of any length, at any place of the table of positions."""
        encoder = self.whisper.model.encoder
        hidden = F.gelu(encoder.conv1(features))
        hidden = F.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[positions].to(hidden.dtype)
        for layer in encoder.layers:
            out = layer(hidden, None)
            hidden = out[0] if isinstance(out, tuple) else out
        return encoder.layer_norm(hidden)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = self.whisper.model.decoder
        heard = self.encode(batch["features"], batch["positions"])
        hidden = decoder(input_ids=batch["ids"], encoder_hidden_states=heard, use_cache=False).last_hidden_state
        keep = batch["labels"] != IGNORE
        labels = batch["labels"][keep]
        scores = F.linear(hidden[keep], decoder.embed_tokens.weight).float().log_softmax(-1)
        exact = scores.gather(1, labels[:, None])[:, 0]
        near = [scores.gather(1, (labels + step).clamp(max=VOCABULARY - 1)[:, None])[:, 0] for step in (-1, 1)]
        is_time = labels > FIRST_TIME
        text = -exact[~is_time].mean()
        blurred = 0.7 * exact + 0.15 * (near[0] + near[1])  # a neighbouring timestamp is almost right
        stamp = -blurred[is_time].sum() / is_time.sum().clamp(min=1)
        frame_scores = self.frame_head(heard).float()
        frame = F.cross_entropy(frame_scores.flatten(0, 1), batch["frames"].flatten())
        guide = self.guidance(heard, batch["places"])
        order_scores = self.order_head(heard).float()
        order = F.cross_entropy(order_scores.flatten(0, 1), batch["order"].flatten(), ignore_index=IGNORE)
        with torch.no_grad():
            best = scores.argmax(-1)
            words = (labels >= WORD_TOKEN) & (labels < EOT)
            stats = {
                "words": (best == labels)[words].float().mean(),
                "ends": (best == labels)[labels == EOT].float().mean(),
                "times": ((best - labels).abs() <= 2)[is_time].float().mean(),
                "frames": (frame_scores.argmax(-1) == batch["frames"]).float().mean(),
            }
        past_scores = self.past_heads(heard).float().view(-1, len(ds.WORDS) + 1)
        past = F.cross_entropy(past_scores, batch["past"].flatten(), ignore_index=IGNORE)
        reading = self.reading(heard, batch)
        losses = {"text": text, "stamp": stamp, "frame": frame, "order": order, "past": past, "guide": guide}
        weights = {"stamp": 0.5, "order": 0.3}
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items()) + 0.5 * reading
        return {"loss": loss, **losses, "reading": reading, **stats}

    def reading(self, heard: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the guided heads of the last layer would write if they looked at one frame only: its time, its word."""
        decoder = self.whisper.model.decoder
        attention, chosen = decoder.layers[-1].encoder_attn, torch.randint(batch["frames"].numel(), (512,))
        values = attention.v_proj(heard.flatten(0, 1)[chosen])
        size = self.whisper.config.d_model // self.whisper.config.decoder_attention_heads
        seen = torch.zeros_like(values)
        for head in (head for layer, head in GUIDED if layer == len(decoder.layers) - 1):
            seen[:, head * size : (head + 1) * size] = values[:, head * size : (head + 1) * size]
        hidden = decoder.layer_norm(attention.out_proj(seen))
        scores = F.linear(hidden, decoder.embed_tokens.weight[WORD_TOKEN:]).float()
        digits = batch["frames"].flatten()[chosen]
        digits = digits.masked_fill(digits == ds.SILENCE, IGNORE)
        digits[0] = digits[0].clamp(min=0)  # never nothing to learn
        word = F.cross_entropy(scores[:, : len(ds.WORDS)], digits, ignore_index=IGNORE)
        return word + F.cross_entropy(scores[:, FIRST_TIME - WORD_TOKEN :], batch["positions"].flatten()[chosen])

    def guidance(self, heard: Tensor, places: Tensor) -> Tensor:
        """Cross entropy between the guided heads and the places where the next token is heard."""
        where = torch.arange(heard.shape[1])
        begin, end = places[..., :1], places[..., 1:]
        wanted = ((where >= begin) & (where < end)).float()
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1)
        rows = places[..., 1] > 0
        total = heard.new_zeros((), dtype=torch.float32)
        for layer, head in GUIDED:
            attention = self.whisper.model.decoder.layers[layer].encoder_attn
            size = self.whisper.config.d_model // self.whisper.config.decoder_attention_heads
            part = slice(head * size, (head + 1) * size)
            query = attention.q_proj(self.queries[layer])[..., part] * size**-0.5
            scores = torch.einsum("bld,bsd->bls", query, attention.k_proj(heard)[..., part]).float()
            total = total - (scores.log_softmax(-1) * wanted).sum(-1)[rows].mean()
        return total / len(GUIDED)


def train(args: argparse.Namespace) -> None:
    """Train until the time is up: `--processes` processes with one thread each change the same shared weights."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    checkpoint = args.work / "checkpoint.pt"
    student, saved, done = Student(), None, 0.0
    if args.start or (args.resume and checkpoint.exists()):
        saved = torch.load(args.start or checkpoint, weights_only=True)
        student.load_state_dict(saved["average" if args.start else "student"], strict=not args.start)
        done = args.progress if args.start else saved["progress"]
        saved = None if args.start else saved
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
    save_model(whisper, args.output)


def work(
    student: Student, batches: Batches, clock: Clock, args: argparse.Namespace, saved: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Optimise the shared weights; the process that gets `saved` also averages them, reports and writes checkpoints."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    average = {name: value.clone() for name, value in student.state_dict().items()}
    if saved:
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
    shown, sums, parent = time.time(), {}, os.getppid()
    for step, batch in enumerate(batches):
        progress = clock.progress()
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            group["lr"] = args.rate * min((step + 1) / 150, 1.0) * (0.02 + 0.98 * cosine)
        with torch.autocast("cpu", torch.bfloat16):
            result = student(batch)
        optimizer.zero_grad(set_to_none=True)
        result["loss"].backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
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


# ---------------------------------------------------------------------------------------------------------- evaluation
def edits(said: list[int], written: list[int]) -> int:
    """Substitutions, deletions and insertions between two digit strings."""
    row = list(range(len(written) + 1))
    for i, left in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(written, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def test_strings(
    voices: ds.Voices, count: int, seed: int, full: bool = False, noise_db: float | None = None
) -> list[ds.Window]:
    """Strings of one voice each: 3 to 10 digits with gaps up to 0.4 s and some pauses, or a full window of them."""
    rng, names, windows = np.random.default_rng(seed), list(voices), []
    for index in range(count):
        voice, pieces, digits, now = voices[names[index % len(names)]], [], [], float(rng.uniform(0, 0.6))
        for _ in range(99 if full else int(rng.integers(3, 11))):
            digit = int(rng.integers(10))
            take = voice[digit][int(rng.integers(len(voice[digit])))]
            if now + len(take) / ds.RATE > ds.WINDOW_SECONDS - 0.7:
                break
            pieces.append((now, take))
            digits.append((digit, now, now + len(take) / ds.RATE))
            now = digits[-1][2] + float(rng.uniform(0.7, 2.0) if rng.random() < 0.12 else rng.uniform(0.04, 0.4))
        wave = np.zeros(int((digits[-1][2] + float(rng.uniform(0, 0.6))) * ds.RATE) + 1, np.float32)
        for start, take in pieces:
            wave[int(start * ds.RATE) :][: len(take)] += take[: len(wave) - int(start * ds.RATE)]
        if noise_db is not None:
            wave += rng.standard_normal(len(wave)).astype(np.float32) * wave.std() * 10 ** (-noise_db / 20)
        windows.append(ds.Window(wave, digits, content=len(wave) / ds.RATE))
    return windows


def written(
    model: WhisperForConditionalGeneration, windows: list[ds.Window], times: bool, zeros: bool
) -> list[list[int]]:
    """Greedy transcripts as token ids. `zeros` pads the features with 0.0 instead of padding the waveform."""
    extractor, tokens = WhisperFeatureExtractor(), []
    for start in range(0, len(windows), 16):
        part = windows[start : start + 16]
        waves = [window.wave for window in part]
        features = torch.as_tensor(extractor(waves, sampling_rate=ds.RATE, return_tensors="pt").input_features)
        for row, wave in zip(features, waves, strict=True):
            if zeros:
                row[:, len(wave) // ds.HOP :] = 0.0
        with torch.no_grad():
            ids = model.generate(features, language="en", task="transcribe", return_timestamps=times)
        tokens += [[token for token in row if token != EOT and token >= WORD_TOKEN] for row in ids.tolist()]
    return tokens


def score(model: WhisperForConditionalGeneration, windows: list[ds.Window]) -> str:
    """Word error rates (plain, with 0.0 padding, with timestamps) and the median error of the segment times."""
    rates, errors, same = [], [], 0
    total = sum(len(window.digits) for window in windows)
    for times, zeros in ((False, False), (False, True), (True, True)):
        wrong = 0
        for window, ids in zip(windows, written(model, windows, times, zeros), strict=True):
            said = [digit for digit, _, _ in window.digits]
            wrong += edits(said, [token - WORD_TOKEN for token in ids if token < EOT])
            if times:
                found = [(token - FIRST_TIME) / 50 for token in ids if token >= FIRST_TIME]
                true = [time for part in window.segments() for time in (part[0][1], part[-1][2])]
                same += len(found) == len(true)
                if len(found) == len(true):
                    errors += [abs(left - right) for left, right in zip(found, true, strict=True)]
        rates.append(f"{wrong / total:6.2%}")
    middle = f"{np.median(errors) * 1000:.0f} ms" if errors else "-"
    return f"{total:5d} digits | " + " | ".join(rates) + f" | {middle} ({same / len(windows):.0%} same segments)"


def evaluate(args: argparse.Namespace) -> None:
    """Print a table of word error rates, and how often silence and noise come back empty."""
    torch.set_num_threads(args.processes)
    model = WhisperForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).eval()
    everyone = ds.read_recordings(args.data, range(5))
    known = {name: digits for name, digits in everyone.items() if name != args.hold_out}
    sets = {f"{name}, test takes": test_strings({name: digits}, 30, 11) for name, digits in known.items()}
    sets["all of these, 10 dB white noise"] = test_strings(known, 60, 12, noise_db=10.0)
    sets["all of these, full 30 s"] = test_strings(known, 16, 13, full=True)
    if args.hold_out:
        unknown = ds.read_recordings(args.data, range(50), [args.hold_out])
        sets[f"{args.hold_out}, never trained on"] = test_strings(unknown, 100, 14)
        sets[f"{args.hold_out}, full 30 s"] = test_strings(unknown, 8, 15, full=True)
    for name, digits in ds.synthetic_voices(8, 5, held_out=True).items():
        sets[f"{name}, never trained on"] = test_strings({name: digits}, 12, 16)
    for name, windows in sets.items():
        print(f"{name:40s} | {score(model, windows)}", flush=True)
    maker, empty = ds.WindowMaker({}, {}, {}, 3), {}
    for _ in range(48):
        length = int(maker.rng.uniform(1, 30) * ds.RATE)
        level = 10 ** maker.rng.uniform(-4, -0.7)
        noise = ds.Window(maker.noise_like(length) * np.float32(level))
        empty.setdefault("noise, hum, tones, clicks", []).append(noise)
    empty["digital silence"] = [ds.Window(np.zeros(ds.RATE * 5, np.float32))]
    for name, windows in empty.items():
        for times in (False, True):
            clean = [not any(token < EOT for token in ids) for ids in written(model, windows, times, times)]
            print(f"{name:40s} | timestamps {times} | empty {sum(clean)} of {len(clean)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder <speaker>/<digit>_<speaker>_<take>.flac")
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write or to evaluate")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for checkpoints and cached voices")
    parser.add_argument("--hold-out", default=None, metavar="SPEAKER", help="a speaker to keep out of the training")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time of the training")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--start", type=Path, default=None, help="take the weights of another checkpoint")
    parser.add_argument("--progress", type=float, default=0.0, help="with --start: where in the curriculum to begin")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--copies", type=int, default=6, help="virtual speakers made of every speaker")
    parser.add_argument("--voices", type=int, default=300, help="synthetic voices to draw")
    parser.add_argument("--processes", type=int, default=2, help="training processes, one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=float, default=30.0, help="seconds between log lines and checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="measure the model in --output instead of training")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    evaluate(args) if args.evaluate else train(args)


if __name__ == "__main__":
    main()
