"""Fine-tuning: Trainer and Seq2SeqTrainer, their arguments and callbacks, collators and LoRA."""

from .arguments import Seq2SeqTrainingArguments, TrainingArguments
from .callbacks import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from .checkpoint import ResumeError, get_last_checkpoint, set_seed
from .collators import DataCollatorForCausalLM, DataCollatorSpeechSeq2SeqWithPadding, default_data_collator
from .evaluation import EvalPrediction, PredictionOutput
from .lora import LoraConfig, add_lora, freeze, load_lora, merge_lora, remove_lora, save_lora, trainable_report
from .seq2seq import Seq2SeqTrainer
from .trainer import Trainer

__all__ = [
    "DataCollatorForCausalLM",
    "DataCollatorSpeechSeq2SeqWithPadding",
    "EarlyStoppingCallback",
    "EvalPrediction",
    "LoraConfig",
    "PredictionOutput",
    "ResumeError",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "add_lora",
    "default_data_collator",
    "freeze",
    "get_last_checkpoint",
    "load_lora",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_seed",
    "trainable_report",
]
