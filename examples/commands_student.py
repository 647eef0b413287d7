"""The commands model with the aids that let it learn in an hour or two on a CPU core.

As for the digits: the encoder is also asked which word every frame holds, and a few cross-attention heads are told
where the next token is heard. Nothing of this is left in the saved model.
"""

from __future__ import annotations

import math
import random

import torch
from commands_batches import SILENCE
from commands_checkpoint import EOT, FIRST_TIME, GUIDED, VOCABULARY, WORD_TOKEN, model_config
from commands_words import SPANISH_NUMBERS, WORDS
from digit_batches import IGNORE, LAST_POSITION, ORDERS
from digit_student import class_loss, listen_ahead, look_back
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from audiomm import WhisperForConditionalGeneration

LOSS_WEIGHTS = {"order": 0.1, "past": 0.1, "reading": 0.3}  # the others count whole
LISTENING_SHARE = 0.25  # of the longest windows: the others teach the decoder only


class Student(nn.Module):
    """The Whisper model with a frame classifier and a view of its guided cross-attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.whisper = WhisperForConditionalGeneration(model_config())
        self.whisper.set_attn_implementation("eager")  # quicker than sdpa in bfloat16 on a CPU
        width = self.whisper.config.d_model
        self.frame_head = nn.Linear(width, len(WORDS) + 1)
        self.order_head = nn.Linear(width, ORDERS)
        self.past_heads = nn.Linear(width, 2 * (len(WORDS) + 1))
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
        model.decoder.embed_tokens.weight[FIRST_TIME : FIRST_TIME + len(table)] = table * 0.1
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

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """All losses of a batch, their weighted sum `loss`, and shares of what was right.

        A long window mostly teaches the decoder where to listen: the encoder seldom learns from it, and what it `heard`
        can be given again in the batch.
        """
        decoder, heard = self.whisper.model.decoder, batch.get("heard")
        self.heard = None
        if heard is None:
            listening = batch["positions"].shape[1] < LAST_POSITION or random.random() < LISTENING_SHARE
            with torch.set_grad_enabled(listening):
                heard = self.encode(batch["features"], batch["positions"])
            self.heard = None if listening else heard
        frame_scores = self.frame_head(heard).float()
        spoken = batch["frames"] != SILENCE
        losses = {
            "frame": F.cross_entropy(frame_scores.flatten(0, 1), batch["frames"].flatten()),
            "order": class_loss(self.order_head(heard), batch["order"]),
            "past": class_loss(self.past_heads(heard).unflatten(-1, (2, -1)), batch["past"]),
            "reading": self.reading(heard, batch),
        }
        shares = {"frames": (frame_scores.detach().argmax(-1) == batch["frames"])[spoken].float().mean()}
        if "ids" in batch:
            hidden = decoder(input_ids=batch["ids"], encoder_hidden_states=heard, use_cache=False).last_hidden_state
            keep = batch["labels"] != IGNORE
            labels = batch["labels"][keep]
            scores = F.linear(hidden[keep], decoder.embed_tokens.weight).float().log_softmax(-1)
            losses |= self.token_losses(scores, labels)
            losses["guide"] = self.guidance(heard, batch["places"])
            shares |= self.shares(scores.detach(), labels, batch["labels"])
        loss = sum(LOSS_WEIGHTS.get(name, 1.0) * value for name, value in losses.items())
        return {"loss": loss, **losses, **shares}

    @staticmethod
    def shares(scores: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """What was right: words with and without timestamps, Spanish ones, ends, languages, times."""
        best = scores.argmax(-1)
        right = (best == labels).float()
        words = (labels >= WORD_TOKEN) & (labels < EOT)
        timed = (rows >= FIRST_TIME).any(1, keepdim=True).expand_as(rows)[rows != IGNORE]
        return {
            "words": right[words & timed].mean(),
            "plain": right[words & ~timed].mean(),
            "spanish": right[words & timed & (labels >= WORD_TOKEN + SPANISH_NUMBERS[0])].mean(),
            "ends": right[labels == EOT].mean(),
            "marks": right[(labels > EOT) & (labels < FIRST_TIME)].mean(),
            "times": ((best - labels).abs() <= 2)[labels > FIRST_TIME].float().mean(),
        }

    @staticmethod
    def token_losses(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of words and marks, and of timestamps, whose neighbours are almost right."""
        exact = scores.gather(1, labels[:, None])[:, 0]
        near = [scores.gather(1, (labels + step).clamp(max=VOCABULARY - 1)[:, None])[:, 0] for step in (-1, 1)]
        is_time = labels > FIRST_TIME
        blurred = 0.7 * exact + 0.15 * (near[0] + near[1])
        return {"text": -exact[~is_time].mean(), "stamp": -blurred[is_time].sum() / is_time.sum().clamp(min=1)}

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
        scores = F.linear(hidden, decoder.embed_tokens.weight[WORD_TOKEN:]).float()
        words = batch["frames"].flatten()[chosen]
        words = words.masked_fill(words == SILENCE, IGNORE)
        words[0] = words[0].clamp(min=0)  # never nothing to learn
        word = F.cross_entropy(scores[:, : len(WORDS)], words, ignore_index=IGNORE)
        return word + F.cross_entropy(scores[:, FIRST_TIME - WORD_TOKEN :], batch["positions"].flatten()[chosen])

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
