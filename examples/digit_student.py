"""A tiny Whisper with the aids that let it learn digit strings in about an hour on two CPU cores.

The encoder is also asked which digit every frame holds, and a few cross-attention heads are told where the next token
is heard. Nothing of this is left in the saved model; the guided heads of the last layer are its `alignment_heads`.
"""

from __future__ import annotations

import math
import random

import torch
from digit_batches import IGNORE, LAST_POSITION, ORDERS
from digit_checkpoint import EOT, FIRST_TIME, VOCABULARY, WORD_TOKEN
from tiny_whisper import GUIDED
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from audiomm import WhisperForConditionalGeneration

LOSS_WEIGHTS = {"order": 0.1, "past": 0.1, "reading": 0.3}  # the others count whole


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


def listen_ahead(attention: nn.Module, heads: list[int], size: int, frames: int, gain: float = 1.3) -> None:
    """Let heads of a cross-attention look softly `frames` after the timestamp that was read, and answer with a place.

    Queries and keys are made as in `look_back`. Values and output pass on the sines and cosines of the place looked at,
    in which the embeddings of the timestamps are written, too: the heads can name a time before they have learnt when.
    """
    half = attention.q_proj.in_features // 2
    rows = torch.arange(size // 2)
    for number, head in enumerate(heads):
        pairs = torch.arange(size // 2) * 2 + 5
        angle = torch.exp(-math.log(10000) * pairs / (half - 1)) * frames
        sines, cosines = head * size + rows, head * size + size // 2 + rows
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight[head * size : (head + 1) * size] = 0.0
        attention.q_proj.bias[head * size : (head + 1) * size] = 0.0
        attention.k_proj.weight[sines, pairs] = attention.k_proj.weight[cosines, half + pairs] = gain
        attention.q_proj.weight[sines, pairs] = attention.q_proj.weight[cosines, half + pairs] = gain * angle.cos()
        attention.q_proj.weight[sines, half + pairs] = gain * angle.sin()
        attention.q_proj.weight[cosines, pairs] = -gain * angle.sin()
        told = torch.arange(size // 2) * len(heads) + number + 3
        attention.v_proj.weight[head * size : (head + 1) * size] *= 0.1
        attention.out_proj.weight[:, head * size : (head + 1) * size] *= 0.1
        for row, dims in ((sines, told), (cosines, half + told)):
            attention.v_proj.weight[row, dims] += 1.0
            attention.out_proj.weight[dims, row] += 0.7


class Student(nn.Module):
    """The Whisper model with a frame classifier and a view of its guided cross-attention heads."""

    vocabulary = VOCABULARY
    word_token, end, first_time = WORD_TOKEN, EOT, FIRST_TIME  # ids: the words lie between the first two
    silence_weight = 1.0  # of the mark 0.00 in the loss: of windows without words, and of words at the very start

    def __init__(self) -> None:
        super().__init__()
        self.whisper = WhisperForConditionalGeneration(self.vocabulary.model_config())
        self.silence = self.end - self.word_token  # the class of a frame without a word
        self.whisper.set_attn_implementation("eager")  # quicker than sdpa in bfloat16 on a CPU
        self.frame_head = nn.Linear(self.whisper.config.d_model, self.silence + 1)
        self.order_head = nn.Linear(self.whisper.config.d_model, ORDERS)
        self.past_heads = nn.Linear(self.whisper.config.d_model, 2 * (self.silence + 1))
        self.queries: dict[int, Tensor] = {}
        self.heard: Tensor | None = None  # the encoder's last answer, if it can be given again
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
        model.decoder.embed_tokens.weight[self.first_time : self.first_time + len(table)] = table * 0.1
        model.decoder.embed_positions.weight.normal_(std=0.02)
        for layer in model.encoder.layers[1:]:
            look_back(layer.self_attn.q_proj, layer.self_attn.k_proj, frames=26)
        for number, layer in enumerate(model.decoder.layers):
            heads = [head for place, head in GUIDED if place == number]
            if heads:
                listen_ahead(layer.encoder_attn, heads, self.head_size, frames=14)

    @property
    def head_size(self) -> int:
        return self.whisper.config.d_model // self.whisper.config.decoder_attention_heads

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

    def forward(self, batch: dict[str, Tensor], heard: Tensor | None = None) -> dict[str, Tensor]:
        """All losses of a batch, their weighted sum `loss`, and shares of what was right.

        A long window mostly teaches the decoder where to listen: four times of five the encoder does not learn from it,
        and what it `heard` can be given again.
        """
        decoder = self.whisper.model.decoder
        if heard is None:
            listening = batch["positions"].shape[1] < LAST_POSITION or random.random() < 0.2
            with torch.set_grad_enabled(listening):
                heard = self.encode(batch["features"], batch["positions"])
            self.heard = None if listening else heard
        hidden = decoder(input_ids=batch["ids"], encoder_hidden_states=heard, use_cache=False).last_hidden_state
        keep = batch["labels"] != IGNORE
        labels = batch["labels"][keep]
        scores = F.linear(hidden[keep], decoder.embed_tokens.weight).float().log_softmax(-1)
        frame_scores = self.frame_head(heard).float()
        losses = self.token_losses(scores, labels) | {
            "frame": F.cross_entropy(frame_scores.flatten(0, 1), batch["frames"].flatten()),
            "order": class_loss(self.order_head(heard), batch["order"]),
            "past": class_loss(self.past_heads(heard).unflatten(-1, (2, -1)), batch["past"]),
            "guide": self.guidance(heard, batch["places"]),
            "reading": self.reading(heard, batch),
        }
        with torch.no_grad():
            best = scores.argmax(-1)
            words = (labels >= WORD_TOKEN) & (labels < EOT)
            timed = (batch["labels"] >= FIRST_TIME).any(1, keepdim=True).expand_as(keep)[keep]
            shares = {
                "words": (best == labels)[words & timed].float().mean(),
                "plain": (best == labels)[words & ~timed].float().mean(),
                "ends": (best == labels)[labels == EOT].float().mean(),
                "times": ((best - labels).abs() <= 2)[labels > FIRST_TIME].float().mean(),
                "frames": (frame_scores.argmax(-1) == batch["frames"]).float().mean(),
            }
        loss = sum(LOSS_WEIGHTS.get(name, 1.0) * value for name, value in losses.items())
        return {"loss": loss, **losses, **shares}

    def token_losses(self, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of words and marks, and of timestamps, whose neighbours are almost right."""
        exact = scores.gather(1, labels[:, None])[:, 0]
        near = [scores.gather(1, (labels + step).clamp(max=scores.shape[1] - 1)[:, None])[:, 0] for step in (-1, 1)]
        is_time = labels > self.first_time
        blurred = 0.7 * exact + 0.15 * (near[0] + near[1])
        weights = torch.where(labels == self.first_time, self.silence_weight, 1.0)[~is_time]
        text = -(exact[~is_time] * weights).sum() / weights.sum()
        return {"text": text, "stamp": -blurred[is_time].sum() / is_time.sum().clamp(min=1)}

    def reading(self, heard: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the guided heads of the last layer would write if they looked at one frame only: its time, its word."""
        decoder = self.whisper.model.decoder
        attention, chosen = decoder.layers[-1].encoder_attn, torch.randint(batch["frames"].numel(), (512,))
        values = attention.v_proj(heard.flatten(0, 1)[chosen])
        size = self.head_size
        seen = torch.zeros_like(values)
        for head in (head for layer, head in GUIDED if layer == len(decoder.layers) - 1):
            seen[:, head * size : (head + 1) * size] = values[:, head * size : (head + 1) * size]
        hidden = decoder.layer_norm(attention.out_proj(seen))
        scores = F.linear(hidden, decoder.embed_tokens.weight[self.word_token :]).float()
        words = batch["frames"].flatten()[chosen]
        words = words.masked_fill(words == self.silence, IGNORE)
        words[0] = words[0].clamp(min=0)  # never nothing to learn
        word = F.cross_entropy(scores[:, : self.silence], words, ignore_index=IGNORE)
        return word + F.cross_entropy(
            scores[:, self.first_time - self.word_token :], batch["positions"].flatten()[chosen]
        )

    def guidance(self, heard: Tensor, places: Tensor) -> Tensor:
        """Cross entropy between the guided heads and the places where the next token is heard."""
        where = torch.arange(heard.shape[1])
        begin, end = places[..., :1], places[..., 1:]
        wanted = ((where >= begin) & (where < end)).float()
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1)
        rows = places[..., 1] > 0
        total = heard.new_zeros((), dtype=torch.float32)
        if not rows.any():
            return total
        for layer, head in GUIDED:
            attention = self.whisper.model.decoder.layers[layer].encoder_attn
            part = slice(head * self.head_size, (head + 1) * self.head_size)
            query = attention.q_proj(self.queries[layer])[..., part] * self.head_size**-0.5
            scores = torch.einsum("bld,bsd->bls", query, attention.k_proj(heard)[..., part]).float()
            total = total - (scores.log_softmax(-1) * wanted).sum(-1)[rows].mean()
        return total / len(GUIDED)


def class_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy over the last dimension of `scores`, where there is a class."""
    return F.cross_entropy(scores.float().flatten(0, -2), classes.flatten(), ignore_index=IGNORE)
