"""Every error a caller may want to catch.

AudiommError
├── ConfigError (ValueError)             a configuration value is missing, mistyped or out of range
├── CheckpointError (OSError)            a checkpoint cannot be used
│   ├── CheckpointNotFoundError          no such folder, hub id or file
│   ├── CorruptCheckpointError           a file is cut short or its header lies
│   ├── MissingShardError                the index names files that are not there
│   ├── CheckpointMismatchError          names or shapes do not fit the model
│   └── UnsafeCheckpointError            pickled weights, or an index that points outside its folder
├── SaveError (OSError)                  a checkpoint could not be written
├── InputError (ValueError)              what was passed in cannot be used
│   ├── ShapeError                       a tensor has the wrong shape
│   ├── AudioError                       audio cannot be used
│   │   ├── AudioDecodeError             not an audio file, or a broken one
│   │   ├── AudioFileNotFoundError (FileNotFoundError)  no such audio file
│   │   ├── AudioLayoutError             channels and samples cannot be told apart
│   │   ├── AudioLimitError              longer or larger than the limit
│   │   ├── EmptyAudioError              no samples where some are needed
│   │   ├── NonFiniteAudioError          NaN, infinity or absurd amplitudes
│   │   ├── SampleRateError              a sampling rate that is missing, wrong or impossible
│   │   └── TruncatedAudioError          the file holds less than it declares
│   ├── ImageError                       a picture cannot be used
│   │   ├── ImageDecodeError             not a picture file, or a broken one
│   │   ├── ImageFileNotFoundError (FileNotFoundError)  no such picture file
│   │   └── ImageLimitError              more pixels or bytes than the limit
│   ├── VideoError                       a video cannot be used
│   │   ├── VideoDecodeError             not a video file, or a broken one
│   │   ├── VideoFileNotFoundError (FileNotFoundError)  no such video file
│   │   └── VideoLimitError              more frames, pixels or bytes than the limit
│   └── PlaceholderError                 media marks in the text and media passed do not agree
├── GenerationError (ValueError)         generate() was asked for something impossible
├── NumericalError (FloatingPointError)  NaN where a number is needed
└── MissingExtra (ImportError)           an optional package is needed for this
"""

from __future__ import annotations


class AudiommError(Exception):
    """Base of all errors raised on purpose by audiomm."""


class ConfigError(AudiommError, ValueError):
    """A configuration value is missing, mistyped or out of range."""


class CheckpointError(AudiommError, OSError):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder, hub id or file."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file is cut short or its header does not describe it."""


class MissingShardError(CheckpointError):
    """The shard index names files that are not there."""


class CheckpointMismatchError(CheckpointError):
    """Names or shapes of the weights do not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """Loading would run code from the checkpoint or read outside its folder."""


class SaveError(AudiommError, OSError):
    """A checkpoint could not be written."""


class InputError(AudiommError, ValueError):
    """What was passed in cannot be used."""


class ShapeError(InputError):
    """A tensor has the wrong shape."""


class AudioError(InputError):
    """Audio cannot be used."""


class AudioDecodeError(AudioError):
    """Not an audio file, or a broken one."""


class AudioFileNotFoundError(AudioError, FileNotFoundError):
    """There is no such audio file."""


class AudioLayoutError(AudioError):
    """Channels and samples cannot be told apart."""


class AudioLimitError(AudioError):
    """Audio is longer or larger than the limit."""


class EmptyAudioError(AudioError):
    """There are no samples where some are needed."""


class NonFiniteAudioError(AudioError):
    """Samples are NaN, infinite or absurdly large."""


class SampleRateError(AudioError):
    """A sampling rate is missing, wrong or impossible."""


class TruncatedAudioError(AudioError):
    """The file holds less audio than it declares."""


class ImageError(InputError):
    """A picture cannot be used."""


class ImageDecodeError(ImageError):
    """Not a picture file, or a broken one."""


class ImageFileNotFoundError(ImageError, FileNotFoundError):
    """There is no such picture file."""


class ImageLimitError(ImageError):
    """A picture has more pixels or bytes than the limit."""


class VideoError(InputError):
    """A video cannot be used."""


class VideoDecodeError(VideoError):
    """Not a video file, or a broken one."""


class VideoFileNotFoundError(VideoError, FileNotFoundError):
    """There is no such video file."""


class VideoLimitError(VideoError):
    """A video has more frames, pixels or bytes than the limit."""


class PlaceholderError(InputError):
    """Media marks in the text and media passed do not agree."""


class GenerationError(AudiommError, ValueError):
    """generate() was asked for something impossible."""


class NumericalError(AudiommError, FloatingPointError):
    """A computation gave NaN where a number is needed."""


class MissingExtra(AudiommError, ImportError):
    """An optional package is needed for this."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'audiomm[{extra}]'.")
