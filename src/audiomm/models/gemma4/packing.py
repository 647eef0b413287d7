"""Tensors of a packed batch: media in reading order, and where in the rows their tokens are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...base.errors import InputError
from ...feature_extraction.placeholders import Rows


def shares(lengths: Sequence[int], budget: int) -> list[int]:
    """How many tokens of two texts are kept in `budget`: dealt out in turns, the first text first."""
    first, second = lengths
    budget = max(budget, 0)
    if first + second <= budget:
        return [first, second]
    kept = min(first, max(budget - second, (budget + 1) // 2))
    return [kept, min(second, budget - kept)]


def media_of(media: Any, is_batch: bool, prompts: int, is_one: Callable[[Any], bool]) -> Rows | None:
    """Media with the count of each prompt.

    Args:
        media: An entry (a medium or a list of them) for each prompt; of one prompt also the medium itself.
        is_batch: Whether the prompts are a list.
        prompts: How many there are.
        is_one: Whether something is a single medium.

    Raises:
        InputError: There are not as many entries as prompts.
    """
    if media is None:
        return None
    if not is_batch:
        rows = Rows.of(media, is_one)
        return None if rows is None else Rows(rows.items, [len(rows.items)])
    is_array = isinstance(media, (np.ndarray, torch.Tensor))
    if prompts == 1 and is_one(media) and not (is_array and len(media) == 1):
        media = [media]
    elif is_array or not is_one(media):
        media = list(media)
    if not isinstance(media, list) or len(media) != prompts:
        found = len(media) if isinstance(media, list) else 1
        raise InputError(f"{prompts} prompts but media for {found}; pass one entry for each prompt.")
    each = [None if row is None else Rows.of(row, is_one) for row in media]
    lists = [[] if rows is None else rows.items for rows in each]
    items = [item for row in lists for item in row]
    return Rows(items, [len(row) for row in lists]) if items else None


def indices_of(mask: Tensor, slots: int) -> Tensor:
    """Places of True in each row of `mask` (rows, length), int64 (rows, width), filled up with 0.

    Args:
        mask: bool.
        slots: Least width; rows with more places make it wider.
    """
    rows = [row.nonzero()[:, 0] for row in mask]
    width = max([slots, *(len(row) for row in rows)])
    return torch.stack([functional.pad(row, (0, width - len(row))) for row in rows])


def pictures_of(
    prompts: Sequence[str], found: tuple[str, str], features: Mapping[str, Any], room: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Patches and places of all pictures and frames of each prompt, in reading order.

    Args:
        prompts: The prompts before they were expanded.
        found: The marks of images and of videos.
        features: "image" and "video" as the converters made them, or "pixels" and "places" made before.
        room: Patches of a picture and numbers of a patch, for a batch without pictures.

    Returns:
        float32 (prompts, pictures, patches, numbers), and int64 (prompts, pictures, patches, 2), -1 for no patch.
    """
    if "pixels" in features:
        return features["pixels"], features["places"]
    blocks = _blocks(prompts, found, features)
    most = max(len(row) for row in blocks)
    every = [block for row in blocks for block in row]
    if not every:
        return torch.zeros(len(prompts), 0, *room), torch.zeros(len(prompts), 0, room[0], 2, dtype=torch.int64)
    patches, numbers = max(block[0].shape[0] for block in every), every[0][0].shape[1]
    pixels = torch.zeros(len(prompts), most, patches, numbers)
    places = torch.full((len(prompts), most, patches, 2), -1, dtype=torch.int64)
    for row, row_blocks in enumerate(blocks):
        for column, (values, where) in enumerate(row_blocks):
            pixels[row, column, : values.shape[0]] = values
            places[row, column, : where.shape[0]] = where
    return pixels, places


def _blocks(
    prompts: Sequence[str], found: tuple[str, str], features: Mapping[str, Any]
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each prompt, (patches, places) of each of its pictures and frames."""
    image, video = features.get("image"), features.get("video")
    next_image = next_video = next_frame = 0
    blocks = []
    for prompt in prompts:
        row: list[tuple[Tensor, Tensor]] = []
        for match in re.finditer("|".join(re.escape(mark) for mark in found if mark), prompt):
            if match.group() == found[0] and image is not None:
                row.append((image["pixel_values"][next_image], image["image_position_ids"][next_image]))
                next_image += 1
            elif match.group() == found[1] and video is not None:
                for _ in range(int(video["num_frames_per_video"][next_video])):
                    row.append((video["pixel_values_videos"][next_frame], video["video_position_ids"][next_frame]))
                    next_frame += 1
                next_video += 1
        blocks.append(row)
    return blocks


def clips_of(features: Mapping[str, Any], counts: Sequence[int], bands: int) -> tuple[Tensor, Tensor]:
    """Features of the clips of each prompt.

    Args:
        features: "audio" as the extractor made them, or "mel" and "mel_mask" made before, or nothing.
        counts: Clips of each prompt.
        bands: Of the empty entries of a batch without clips.

    Returns:
        float32 (prompts, clips, frames, bands), and bool (prompts, clips, frames), True where a frame is real.
    """
    if "mel" in features:
        return features["mel"], features["mel_mask"]
    if "audio" not in features:
        return torch.zeros(len(counts), 0, 1, bands), torch.zeros(len(counts), 0, 1, dtype=torch.bool)
    values, masks = features["audio"]["input_features"], features["audio"]["input_features_mask"]
    mel = torch.zeros(len(counts), max(counts), *values.shape[1:])
    mel_mask = torch.zeros(len(counts), max(counts), values.shape[1], dtype=torch.bool)
    place = 0
    for row, count in enumerate(counts):
        mel[row, :count] = values[place : place + count]
        mel_mask[row, :count] = masks[place : place + count].bool()
        place += count
    return mel, mel_mask


def pictures_made_before(x: Mapping[str, Any], is_batch: bool) -> dict[str, Tensor]:
    """{"pixels", "places"} from pixel_values and pixel_position_ids, (prompts, pictures, patches, ...).

    Raises:
        InputError: The positions are missing.
    """
    if x.get("pixel_position_ids") is None:
        raise InputError("'pixel_values' need 'pixel_position_ids', which say where each patch is.")
    pixels = torch.as_tensor(x["pixel_values"], dtype=torch.float32)
    places = torch.as_tensor(x["pixel_position_ids"], dtype=torch.int64)
    return {"pixels": pixels if is_batch else pixels[None], "places": places if is_batch else places[None]}


def clips_made_before(x: Mapping[str, Any], is_batch: bool) -> dict[str, Tensor]:
    """{"mel", "mel_mask"} from audio_mel and audio_mel_mask, (prompts, clips, frames, ...).

    Raises:
        InputError: The mask is missing, or the shapes do not fit.
    """
    if x.get("audio_mel_mask") is None:
        raise InputError("'audio_mel' needs 'audio_mel_mask', which says how long each clip is.")
    mel = torch.as_tensor(x["audio_mel"], dtype=torch.float32)
    mask = torch.as_tensor(x["audio_mel_mask"]).bool()
    mel, mask = (mel, mask) if is_batch else (mel[None], mask[None])
    if mel.dim() != 4 or mask.shape != mel.shape[:3]:
        raise InputError(
            f"audio_mel of shape {tuple(mel.shape)} with a mask of {tuple(mask.shape)}: (prompts, clips, frames, mel "
            "bands) and (prompts, clips, frames) are needed."
        )
    return {"mel": mel, "mel_mask": mask}
