"""Fine-tuning: Trainer and Seq2SeqTrainer, their arguments and callbacks, collators and LoRA."""

from .arguments import Seq2SeqTrainingArguments, TrainingArguments
from .callbacks import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from .checkpoint import ResumeError, get_last_checkpoint
from .collators import DataCollatorForCausalLM, DataCollatorSpeechSeq2SeqWithPadding, default_data_collator
from .evaluation import EvalPrediction, PredictionOutput
from .foundation import set_seed
from .seq2seq import Seq2SeqTrainer
from .trainer import Trainer

__all__ = [
    "DataCollatorForCausalLM",
    "DataCollatorSpeechSeq2SeqWithPadding",
    "EarlyStoppingCallback",
    "EvalPrediction",
    "PredictionOutput",
    "ResumeError",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "default_data_collator",
    "get_last_checkpoint",
    "set_seed",
]
