"""The student of the digits with the words of the commands: it may also learn from a batch for the encoder alone."""

from __future__ import annotations

import random

import digit_student
import torch
from commands_checkpoint import EOT, FIRST_TIME, VOCABULARY, WORD_TOKEN
from commands_words import SPANISH_NUMBERS
from digit_batches import IGNORE, LAST_POSITION
from digit_student import LOSS_WEIGHTS, class_loss
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its usual name)

LISTENING_SHARE = 0.25  # of the longest windows: the others teach the decoder only


class Student(digit_student.Student):
    """The Whisper model of the commands with a frame classifier and a view of its guided cross-attention heads."""

    vocabulary = VOCABULARY
    word_token, end, first_time = WORD_TOKEN, EOT, FIRST_TIME
    silence_weight = 0.3  # else the one mark of silence outweighs a first word whose start is any of several times

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
        spoken = batch["frames"] != self.silence
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
