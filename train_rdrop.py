#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "scikit-learn==1.9.1", "numpy==2.4.6",
#                 "accelerate==1.15.0", "tensorboard==2.21.0"]
# ///
"""Fine-tune RoBERTa (or any encoder) for text classification with R-Drop and label smoothing.

    python train_rdrop.py                           # the published run: roberta-base on IMDB
    python train_rdrop.py --train_file reviews.csv --validation_fraction 0.1 --output_dir results_mine
    torchrun --nproc_per_node 2 train_rdrop.py      # two GPUs
    tensorboard --logdir logs_rdrop                 # the curves

R-Drop (Liang et al., NeurIPS 2021, arXiv 2106.14448) runs each batch through the model twice. Dropout draws other
masks each time; the loss asks both outputs for the label and both to agree:

    loss = 1/2 (CE_ls(z1, y) + CE_ls(z2, y)) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)),  p = softmax(z)
"""

import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch.nn import Embedding, Module, functional as F
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EarlyStoppingCallback, HfArgumentParser
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import check_min_version

HUB = f"Give a local folder or a Hub id, owner/name (HF_ENDPOINT, now {os.environ.get('HF_ENDPOINT')}, names a mirror)"
logger = logging.getLogger("train_rdrop")
logger.disabled = os.environ.get("LOCAL_RANK", "0") != "0"  # of several processes, one a machine speaks


class UserError(Exception):
    """What the user can mend: `main` ends the process with its message, on one line."""


# ------------ arguments
def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class RDropArguments(TrainingArguments):
    """The published recipe as defaults, beside every flag of `TrainingArguments`; bad values raise `ValueError`."""

    model_name_or_path: str = flag("FacebookAI/roberta-base", "Hub id or folder of the encoder")
    dataset_name: str = flag("stanfordnlp/imdb", "Hub id or folder of the data set")
    dataset_config_name: str | None = flag(None, "Its configuration, if it has several")
    train_file: str | None = flag(None, "In place of a data set: csv, tsv, json, jsonl or parquet")
    validation_file: str | None = flag(None, "Like it; chooses the checkpoint")
    test_file: str | None = flag(None, "Like it; evaluated at the end")
    validation_split: str = flag("validation", "Split that chooses the checkpoint. Or: none")
    test_split: str = flag("test", "Split evaluated at the end. Or: none")
    validation_fraction: float = flag(0.0, "Share of train held out for validation")
    text_column: str = flag("text", "Column of the text")
    text_pair_column: str | None = flag(None, "Column of a second text, for pairs as in NLI")
    label_column: str = flag("label", "Column of the label: integers or strings")
    positive_label: str | None = flag(None, "Class of F1 and AUC, of two. Default: the second")
    max_length: int | None = flag(None, "Tokens kept of a text. Default: all that the model takes")
    max_train_samples: int | None = flag(None, "Train on so many examples")
    max_eval_samples: int | None = flag(None, "Evaluate on so many examples")
    rdrop_alpha: float = flag(5.0, "Weight of the KL term. 0: one pass, the plain baseline")
    label_smoothing_factor: float = flag(0.1, "Share of the label spread over all classes")
    learning_rate: float = flag(2e-5, "Peak learning rate of AdamW")
    weight_decay: float = flag(0.01, "Weight decay of AdamW")
    lr_scheduler_type: str = flag("cosine", "Course of the learning rate after warmup")
    warmup_steps: float = flag(0.1, "Steps of warmup or, below 1, their share")
    per_device_train_batch_size: int = flag(16, "Examples per device in training")
    per_device_eval_batch_size: int = flag(16, "Examples per device in evaluation")
    num_train_epochs: float = flag(5.0, "Epochs to train, unless stopped early")
    fp16: bool = flag(True, "Train in fp16: on CUDA, unless --bf16 is given")
    seed: int = flag(42, "Seed of the new head, dropout and all draws")
    dataloader_num_workers: int | None = flag(None, "Processes that make batches. Default: 2 on CUDA")
    output_dir: str = flag("./results_rdrop", "Folder of checkpoints, best model and figures")
    resume_from_checkpoint: str | None = flag(None, "last, or the folder of a checkpoint")
    eval_strategy: str = flag("epoch", "When to evaluate")
    save_strategy: str = flag("epoch", "When to save a checkpoint")
    save_total_limit: int | None = flag(2, "Checkpoints kept, with the best")
    load_best_model_at_end: bool = flag(True, "End with the best checkpoint, not the last")
    metric_for_best_model: Literal["f1", "accuracy", "auc", "loss"] = flag("f1", "What best means")
    early_stopping_patience: int = flag(3, "Evaluations without gain to stop after; 0: never")
    early_stopping_threshold: float = flag(0.01, "Gain that counts")
    restore_callback_states_from_checkpoint: bool = flag(True, "Resume with the patience left")
    logging_steps: float = flag(50, "Steps between two logs")
    hub_strategy: str = flag("end", "When to push")
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"help": "Where curves go, or none"})
    logging_dir: str = flag("./logs_rdrop", "TensorBoard's folder, with one for each run")
    logging_nan_inf_filter: bool = flag(False, "Hide losses that are not finite")
    # several processes: all parameters are used, and buffers broadcast between the two passes break the backward
    ddp_find_unused_parameters: bool = flag(False, "Look for parameters without gradient")
    ddp_broadcast_buffers: bool = flag(False, "Broadcast buffers before each pass")

    def __post_init__(self):
        on_cuda = torch.cuda.is_available() and not self.use_cpu
        self.bf16 |= os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"  # as `accelerate launch` was told
        self.fp16 &= on_cuda and not self.bf16
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_cuda else 0
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # torch would warn in every epoch
        super().__post_init__()
        RDropLoss(self.rdrop_alpha, self.label_smoothing_factor)  # refuses what it cannot take
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*sizes, "max_length", "max_train_samples", "max_eval_samples", "num_train_epochs"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name} must be more than 0, not {value}")
        if len({self.text_column, self.label_column, self.text_pair_column}) < 3:
            raise ValueError("--text_column, --label_column and --text_pair_column must differ")
        if self.validation_split == self.test_split != "none":
            raise ValueError("--validation_split and --test_split must differ")
        if (self.validation_file or self.test_file) and not self.train_file:
            raise ValueError("--validation_file and --test_file need a --train_file")
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            raise ValueError("--save_steps must equal --eval_steps, or the best model would not be saved")


def parse_args(argv=None) -> RDropArguments:
    """Read `argv` (strings) or the command line; raises for unknown flags and values that cannot be had."""
    title = __doc__.partition("\n")[0]
    parser = HfArgumentParser(RDropArguments, description=title, allow_abbrev=False, exit_on_error=False)
    args, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if unknown:  # without their values, which may be tokens
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        raise UserError(f"unknown arguments: {', '.join(flags) or 'a stray word'}. --help lists all.")
    if args.hub_token:  # Trainer would save it in every training_args.bin
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None
    return args


# ------------ output and resume
# Beginnings of the flags that may change on resuming; for those of the batch, `effective_batch` may not.
FREE_FLAGS = re.compile(
    "output_dir|resume_|per_device_|gradient_|activation_|eval_accum|save_|log|report_to|run_name|project|trackio"
    "|include_|disable_tqdm|hub_|push_|dataloader_[mnp]|ddp_|local_rank|use_cpu|enable_jit"
)


def newest_complete(checkpoints) -> Path | None:
    """The newest of `checkpoints` (folders) that holds all that a run needs: Trainer would do without some."""
    for checkpoint in sorted(checkpoints, key=lambda path: int(re.findall(r"\d+", f"{path.name} 0")[0]), reverse=True):
        files = ("*model*", "optimizer*", "scheduler.pt", "rng_state*.pth", "trainer_state.json")  # as written
        missing = [file for file in files if not any(checkpoint.glob(file))]
        if not missing:
            return checkpoint
        logger.warning(f"{checkpoint} is incomplete: it holds no {missing[0]}.")
    return None


def arguments_of(args: RDropArguments) -> dict:
    """What `arguments.json` holds: every argument, tokens masked, and the effective batch."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**json.loads(args.to_json_string()), "effective_batch": batch}


def find_checkpoint(args: RDropArguments) -> Path | None:
    """The checkpoint to resume from, if any; `UserError` if flags that decide the result have changed."""
    output_dir, asked = Path(args.output_dir), args.resume_from_checkpoint
    if asked is None:
        return None
    checkpoint = newest_complete(output_dir.glob("checkpoint-*") if asked == "last" else [Path(asked)])
    if checkpoint is None:
        raise UserError(f"nothing to resume from: no complete checkpoint in {output_dir if asked == 'last' else asked}")
    was, now = json.loads((checkpoint.resolve().parent / "arguments.json").read_text()), arguments_of(args)
    if now["num_train_epochs"] > was["num_train_epochs"]:
        logger.warning("More epochs than the run began with: the learning rate now follows the longer schedule.")
        was["num_train_epochs"] = now["num_train_epochs"]
    names = [name for name in now if now[name] != was.get(name) and not FREE_FLAGS.match(name)]
    if names:
        changed = "; ".join(f"{name} was {was.get(name)}, is {now[name]}" for name in names)
        raise UserError(f"a resumed run needs the flags that it began with: {changed}")
    return checkpoint


def claim_output_dir(args: RDropArguments, checkpoint: Path | None) -> Path | None:
    """Keep other runs out of the output folder by `arguments.json`; returns its path where this process made it."""
    file = Path(args.output_dir, "arguments.json")
    if checkpoint and checkpoint.resolve().parent == file.resolve().parent:
        return None  # the file keeps what the run began with
    with args.main_process_first(local=False):
        if args.process_index > 0 and not file.exists():
            raise UserError(f"--output_dir {args.output_dir} must be a folder that all machines share")
        if args.process_index == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoint-*", "*.safetensors", "*.bin", "*.json"):
                if any(file.parent.glob(name)):
                    ways = "choose another --output_dir, resume by --resume_from_checkpoint last, or remove the folder"
                    raise UserError(f"{args.output_dir} holds an earlier run or a model ({name}): {ways}")
            with open(file, "x") as output:
                json.dump(arguments_of(args), output, indent=2)
    return file if args.process_index == 0 else None


# ------------ data
def read(name: str, builder: str, *config, **options):
    """`load_dataset` of `builder`; its many kinds of errors become a `UserError` about `name`."""
    try:
        return load_dataset(builder, *config, **options)
    except Exception as error:  # of pandas, pyarrow, fsspec, the Hub's client
        cause = error.__cause__ or error
        form = "files in UTF-8, separated by commas in .csv, by tabs in .tsv, with the same columns"
        raise UserError(f"cannot read {name} ({type(cause).__name__}: {cause}). {HUB}, or {form}") from error


def read_file(path: str) -> Dataset:
    """A csv, tsv, json, jsonl or parquet file, also .gz; in csv and tsv only empty fields are missing."""
    kind = path.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("csv", "tsv"):
        warnings.filterwarnings("error", "Length of header")  # more fields than names: an unquoted separator in a text
        options = {"sep": "," if kind == "csv" else "\t", "keep_default_na": False, "na_values": [""]}
        return read(path, "csv", data_files=path, split="train", index_col=False, **options)
    if kind in ("json", "jsonl", "parquet"):
        return read(path, kind.removesuffix("l"), data_files=path, split="train")
    raise UserError(f"{path} does not end in .csv, .tsv, .json, .jsonl or .parquet")


def read_splits(args: RDropArguments) -> dict[str, Dataset]:
    """The data as they are: `train` and, where they are there, `validation` and `test`."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # `read` reports an unreachable Hub, once
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        return {split: read_file(file) for split, file in files.items() if file}
    names = {"train": "train", "validation": args.validation_split, "test": args.test_split}
    found = read(args.dataset_name, args.dataset_name, args.dataset_config_name)
    for split, name in names.items():
        if name not in found and (split == "train" or name not in (split, "none")):
            raise UserError(f"{args.dataset_name} has no split {name!r}, only: {', '.join(found)}")
    return {split: found[name] for split, name in names.items() if name in found}


def class_name(value, feature) -> str | None:
    """The name of the class that `value`, in a column of type `feature`, stands for; None: it is missing."""
    if isinstance(feature, ClassLabel):
        return feature.int2str(value) if value is not None and value >= 0 else None
    if isinstance(value, float):  # pandas makes floats of integers where a field is empty
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if not isinstance(value, (str, int, type(None))):
        raise UserError(f"labels must be integers or strings, not {value}. Use --label_column")
    return None if value is None else str(value).strip() or None


def clean(rows: Dataset, split: str, classes: list[str] | None, args: RDropArguments) -> Dataset:
    """The rows with text and label, as `text`, perhaps `text_pair`, and `labels`; `classes` are the names in train."""
    columns = [column for column in (args.text_column, args.text_pair_column) if column]
    for column in (*columns, args.label_column):
        if column not in rows.column_names:
            hints = "Use --text_column and --label_column. Is there no header line, or another separator?"
            raise UserError(f"split {split!r} has no column {column!r}, only {str(rows.column_names)[:200]}. {hints}")
    feature, texts = rows.features[args.label_column], [rows[column][:] for column in columns]
    labels = [class_name(value, feature) for value in rows[args.label_column][:]]
    if not all(isinstance(text, (str, type(None))) for column in texts for text in column):
        raise UserError(f"split {split!r}: not all of {columns} hold strings. Use --text_column")
    complete = [all(value and value.strip() for value in row) for row in zip(labels, *texts, strict=True)]
    if not all(complete):
        what = f"{complete.count(False)} of {len(rows)} rows without text or label are left out"
        logger.warning(f"Split {split!r}: {what}, the first is row {complete.index(False)} (counted from 0).")
    usable = np.flatnonzero(complete).tolist()
    rows, labels = rows.select(usable), [labels[row] for row in usable]
    if classes is None:
        if len(set(labels)) < 2:
            raise UserError(f"split {split!r} has one label only, {set(labels) or 'none'}: there is nothing to learn")
        integers = all(label.lstrip("-").isdecimal() for label in labels)
        classes = getattr(feature, "names", None) or sorted(set(labels), key=int if integers else None)
    ids = {name: i for i, name in enumerate(classes)}
    for row, label in zip(usable, labels, strict=True):
        if label not in ids:
            raise UserError(f"split {split!r}: row {row} has label {label!r}, train only {', '.join(classes)[:200]}")
    rows = rows.select_columns(columns).rename_columns(dict(zip(columns, ("text", "text_pair"), strict=False)))
    return rows.add_column("labels", [ids[label] for label in labels], feature=ClassLabel(names=classes))


def load_splits(args: RDropArguments) -> DatasetDict:
    """Load, check and sub-sample `train` and, where there are, `validation` and `test`, with columns as of `clean`."""
    found, splits, classes = read_splits(args), DatasetDict(), None
    for split, rows in found.items():
        cleaned = clean(rows, split, classes, args)
        classes = cleaned.features["labels"].names
        if len(cleaned) > 0:
            splits[split] = cleaned
    fraction = args.validation_fraction
    if fraction and "validation" in splits:
        raise UserError("a validation split is there: leave out --validation_fraction (or: --validation_split none)")
    if fraction:
        parts = splits["train"].train_test_split(fraction, stratify_by_column="labels", seed=args.seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    if len(splits) == 1:
        ways = "--validation_fraction 0.1, --validation_file or --validation_split"
        raise UserError(f"there is no validation or test split to choose the checkpoint: give {ways}")
    for split, rows in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(rows):
            splits[split] = rows.shuffle(seed=args.seed).select(range(limit))
        counts = np.bincount(splits[split]["labels"], minlength=len(classes)).tolist()
        counts = dict(zip(classes, counts, strict=True))
        source = found["train" if fraction and split == "validation" else split]
        args.distributed_state.print(f"{split}: {len(splits[split])} of {len(source)} rows, {str(counts)[:200]}")
    chooser = splits.get("validation", splits.get("test"))
    if args.metric_for_best_model == "auc" and len(set(chooser["labels"])) < len(classes):
        raise UserError("--metric_for_best_model auc is undefined: the evaluated split has no example of some class")
    if args.positive_label and (args.positive_label not in classes or len(classes) != 2):
        raise UserError(f"--positive_label {args.positive_label} is not one of two classes. There are: {classes}")
    return splits


def tokenize(splits: DatasetDict, tokenizer, args: RDropArguments) -> DatasetDict:
    """Replace the texts by `input_ids` (at most `tokenizer.model_max_length`), ..., and `length` (tokens)."""
    texts = [column for column in ("text", "text_pair") if column in splits["train"].column_names]
    options = {"batched": True, "fn_kwargs": {"truncation": True, "return_length": True}, "desc": "Tokenizing"}
    with args.main_process_first():
        splits = splits.map(tokenizer, input_columns=texts, remove_columns=texts, **options)
    if not any(set(tokens) - set(tokenizer.all_special_ids) for tokens in splits["train"][:100]["input_ids"]):
        raise UserError("the tokenizer knows no word of the first 100 texts: are its files in the model's folder?")
    for split in splits.keys() - {"train"}:  # longest first: little padding, out of memory at once
        splits[split] = splits[split].select(np.argsort(splits[split]["length"][:], kind="stable")[::-1])
    return splits


# ------------ model
def load_model(args: RDropArguments, names: list[str]):
    """Load the tokenizer, with the number of tokens to keep, and the model, with a new head for labels `names`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
        tokenizer(["two", "texts"], padding=True)  # raises where there is no padding token
        if args.max_length and args.max_length <= tokenizer.num_special_tokens_to_add(pair=bool(args.text_pair_column)):
            raise ValueError("--max_length leaves no room beside the special tokens")
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",  # pipelines read it
            dtype=torch.float32,  # not the checkpoint's: fp16 needs float32 weights to update
            ignore_mismatched_sizes=True,  # a head for other labels gives way to a new one
            output_loading_info=True,
            trust_remote_code=False,  # the default asks on the terminal
        )
    except Exception as error:  # of safetensors, tokenizers, the Hub's client
        raise UserError(f"cannot load {args.model_name_or_path} ({type(error).__name__}: {error}). {HUB}") from error
    new = loading["missing_keys"] | {key for key, *_ in loading["mismatched_keys"]}
    new = sorted(key for key in new if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key)
    if new:  # only the head, and a pooler, may be new
        raise UserError(f"the weights of {args.model_name_or_path} do not fit its config: {new[0]}, ... are missing")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    limits = [args.max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, Embedding):
            # A table with a padding index counts from there: RoBERTa's 514 positions take 512 tokens.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    # -1 and 10**30 stand for no limit, 512 is the recipe's; saved, so that a pipeline truncates alike
    tokenizer.model_max_length = min([limit for limit in limits if limit and 0 < limit < 1_000_000], default=512)
    tokenizer("", truncation=True)  # sets its truncation, which is part of the key of `datasets`' cache
    return tokenizer, model


# ------------ loss
class RDropLoss(Module):
    """R-Drop with label smoothing: 1/2 (CE1 + CE2) + alpha * 1/2 (KL(p2 || p1) + KL(p1 || p2)).

    Liang et al. (2021), section 2.1, add the CEs of the two passes: their loss with weight 2 alpha is twice this one.
    Logits are (batch, classes), labels integers (batch); every result is a float32 scalar, in nats, averaged over the
    batch. `label_smoothing` is the share of the label spread over all classes. Values out of range: `ValueError`.
    """

    def __init__(self, alpha: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha (--rdrop_alpha) must be finite and at least 0, not {alpha}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing (--label_smoothing_factor) must be in [0, 1), not {label_smoothing}")
        self.alpha, self.label_smoothing = alpha, label_smoothing

    def forward(self, logits1, logits2, labels):
        """The loss of two passes, and its terms, not weighted: mean CE, and half the sum of both KL divergences."""
        logits1, logits2 = logits1.float(), logits2.float()
        log_p1, log_p2 = logits1.log_softmax(dim=-1), logits2.log_softmax(dim=-1)
        ce1 = F.cross_entropy(logits1, labels, label_smoothing=self.label_smoothing)
        ce2 = F.cross_entropy(logits2, labels, label_smoothing=self.label_smoothing)
        kl_21 = F.kl_div(log_p1, log_p2, reduction="batchmean", log_target=True)  # KL(p2 || p1)
        kl_12 = F.kl_div(log_p2, log_p1, reduction="batchmean", log_target=True)  # KL(p1 || p2)
        ce, kl = 0.5 * (ce1 + ce2), 0.5 * (kl_21 + kl_12)
        return ce + self.alpha * kl, ce, kl


# ------------ trainer
class RDropTrainer(Trainer):
    """A `Trainer` whose training steps run the model twice (once if `alpha` is 0) and take `RDropLoss`.

    Evaluation runs it once: without dropout both passes are equal, and CE is the whole loss. `ce` and `kl`, means over
    all processes since the last log, stand in the log beside `loss`. Label smoothing is `args.label_smoothing_factor`;
    all arguments but `alpha` are `Trainer`'s. After a loss that is not finite, the next log or save raises
    `FloatingPointError`; as it looks at all processes, all must call `save_model`.
    """

    loss_is_scaled_for_ga = False  # a mean over each micro-batch: Trainer divides by the accumulation steps

    def __init__(self, *args, alpha: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.rdrop_loss = RDropLoss(alpha, self.args.label_smoothing_factor)
        self.sums = torch.zeros(3, device=self.args.device)  # CE, KL, steps; read at a log or save, so no step waits

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch with `labels`; with `return_outputs` also the logits of the first pass."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        # the same logits twice give the CE of one pass, and KL 0
        other = model(**inputs).logits if model.training and self.rdrop_loss.alpha > 0 else logits
        loss, ce, kl = self.rdrop_loss(logits, other, labels)
        if model.training:
            parts = torch.stack([ce.detach(), kl.detach(), torch.ones_like(ce)])
            self.sums += parts / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, {"logits": logits}) if return_outputs else loss

    def read_sums(self) -> list[float]:
        """CE, KL and steps since the last log, summed over all processes."""
        sums = self.accelerator.reduce(self.sums).tolist()
        if not all(map(math.isfinite, sums)):
            raise FloatingPointError(f"the loss is not finite (seen at step {self.state.global_step})")
        return sums

    def log(self, logs, *args, **kwargs):
        """Log CE and KL, too, beside the training loss."""
        if "loss" in logs:
            ce, kl, steps = self.read_sums()
            self.sums.zero_()
            logs["ce"] = ce / steps
            if self.rdrop_loss.alpha > 0:
                logs["kl"] = kl / steps
                if kl == 0 and not self.state.log_history:
                    logger.warning("KL is 0: the model has no dropout, both passes are equal: R-Drop does nothing.")
        super().log(logs, *args, **kwargs)

    def save_model(self, *args, **kwargs):
        """Save, unless the training has diverged."""
        self.read_sums()
        super().save_model(*args, **kwargs)


class RunCallback(TrainerCallback):
    """Keeps a resumed run to the course of an uninterrupted one, and knows how far it has come."""

    claim, checkpoint, started = None, None, False  # its arguments.json, what it resumes from, whether steps have begun

    def on_train_begin(self, args, state, control, **kwargs):
        folders = [self.checkpoint.parent] if self.checkpoint else []
        for folder in (*folders, args.output_dir):  # where they are now: a run may have been moved
            best = Path(folder, f"checkpoint-{state.best_global_step}")
            if best.is_dir():
                state.best_model_checkpoint = str(best)
        self.started = state.global_step >= state.max_steps  # a run that was resumed after its end begins no step
        batch = arguments_of(args)["effective_batch"]
        args.distributed_state.print(f"effective batch {batch}, steps {state.global_step} to {state.max_steps}")

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if args.train_sampling_strategy == "group_by_length":
            # Trainer restores the global random state only after a resumed epoch has drawn its order from it.
            batches = train_dataloader.batch_sampler
            sampler = getattr(batches, "batch_sampler", batches).sampler  # several processes share one
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = True

    def on_train_end(self, args, state, control, **kwargs):
        best = Path(state.best_model_checkpoint or f"checkpoint-{state.best_global_step}")
        if args.load_best_model_at_end and state.best_global_step and not any(best.glob("*model*")):
            raise UserError(f"the best checkpoint, {best}, holds no model: all machines must share --output_dir")


# ------------ metrics
def compute_metrics(eval_pred, loss: RDropLoss, positive: int = 1) -> dict[str, float]:
    """Loss, accuracy, F1 and ROC AUC of `eval_pred` (logits (n, classes), labels (n)).

    Two classes: F1 of class `positive`, AUC from its softmax probability. More: macro F1, one-vs-rest macro AUC. AUC is
    left out, with a warning, where a class has no label. `FloatingPointError` where logits are not finite.
    """
    logits, labels = torch.from_numpy(eval_pred[0]), eval_pred[1]
    if not logits.isfinite().all():
        raise FloatingPointError("the logits of the evaluation are not finite")
    # Trainer's own mean counts the examples twice that fill up the last batch of several processes
    metrics = {"loss": loss(logits, logits, torch.from_numpy(labels))[0].item()}
    binary = logits.shape[-1] == 2
    predictions = logits.argmax(dim=-1).numpy()
    metrics["accuracy"] = accuracy_score(labels, predictions)
    metrics["f1"] = f1_score(labels, predictions, pos_label=positive, average="binary" if binary else "macro")
    if len(np.unique(labels)) < logits.shape[-1]:
        logger.warning("AUC is undefined and left out: some class has no example.")
        return metrics
    probabilities = logits.double().softmax(dim=-1).numpy()
    scores = probabilities[:, positive] if binary else probabilities
    metrics["auc"] = roc_auc_score(labels == positive if binary else labels, scores, multi_class="ovr")
    return metrics


# ------------ main
def run(args: RDropArguments, callback: RunCallback) -> dict[str, float]:
    """Load data and model, train, evaluate and save; returns the metrics."""
    checkpoint = find_checkpoint(args)
    callback.claim = claim_output_dir(args, checkpoint)
    Path(args.logging_dir).mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)  # before the new head is drawn
    splits = load_splits(args)
    names = splits["train"].features["labels"].names
    tokenizer, model = load_model(args, names)
    splits = tokenize(splits, tokenizer, args)
    positive = names.index(args.positive_label or names[1])
    about = f"F1 and AUC of {names[positive]}" if len(names) == 2 else "macro F1 and AUC"
    tokens = f"{sum(splits['train']['length'])} tokens to train on, at most {tokenizer.model_max_length} a text"
    args.distributed_state.print(f"{about}; {tokens}")
    curves = f"{datetime.now():%Y-%m-%d_%H-%M-%S.%f}_{Path(args.output_dir).resolve().name}"
    os.environ["TENSORBOARD_LOGGING_DIR"] = curves = os.path.join(args.logging_dir, curves)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # all is tokenized; else it warns where data loaders fork
    early_stopping = EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold)
    stops_early = args.early_stopping_patience > 0 and args.eval_strategy != "no"
    trainer = RDropTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation", splits.get("test")),
        processing_class=tokenizer,
        compute_metrics=lambda output: compute_metrics(output, trainer.rdrop_loss, positive),
        callbacks=[callback, early_stopping] if stops_early else [callback],
        alpha=args.rdrop_alpha,
    )
    signal.signal(signal.SIGTERM, stop)  # again, for --enable_jit_checkpoint sets a handler of its own
    callback.checkpoint = checkpoint
    results = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
    if checkpoint:
        results.pop("train_loss")  # it lacks the steps before the interruption
    trainer.save_metrics("train", results, combined=False)
    evaluated = {"eval": trainer.eval_dataset}
    if splits.keys() >= {"validation", "test"}:
        evaluated["test"] = splits["test"]
    for prefix, split in evaluated.items():
        # `predict` adds no point to the curves, which show the models in training
        metrics = {**trainer.predict(split, metric_key_prefix=prefix).metrics, "epoch": trainer.state.epoch}
        trainer.state.log_history.append({**metrics, "step": trainer.state.global_step})  # for the model card
        trainer.save_metrics(prefix, metrics, combined=False)
        results |= metrics
        figures = {name: metrics[key] for name in ("accuracy", "f1", "auc") if (key := f"{prefix}_{name}") in metrics}
    trainer.save_metrics("all", results, combined=False)
    trainer.save_state()
    summary = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    args.distributed_state.print(f"\n{'Test' if 'test' in splits else 'Validation'} split: {summary} ({about})")
    if trainer.is_world_process_zero() and "tensorboard" in args.report_to:
        settings = {"alpha": args.rdrop_alpha, "smoothing": args.label_smoothing_factor, "seed": args.seed}
        settings |= {"model": args.model_name_or_path, "data": args.train_file or args.dataset_name}
        settings |= {"learning_rate": args.learning_rate, "epochs": args.num_train_epochs}
        settings["batch"] = arguments_of(args)["effective_batch"]
        with SummaryWriter(curves) as writer:
            writer.add_hparams(settings, {f"final/{name}": value for name, value in figures.items()}, run_name=".")
        print(f"Curves:     tensorboard --logdir {args.logging_dir}")
    if args.push_to_hub:  # which saves the model first
        on_hub = None if args.train_file or os.path.isdir(args.dataset_name) else args.dataset_name
        trainer.push_to_hub(dataset=on_hub, dataset_tags=on_hub, tags=["r-drop", "label-smoothing"])
    else:
        trainer.save_model()
    classify = f'pipeline("text-classification", {json.dumps(args.output_dir)}, truncation=True)'
    code = shlex.quote(f'from transformers import pipeline; print({classify}("A film to remember."))')
    args.distributed_state.print(f"Try it:     python -c {code}")
    trainer.end()
    return results


def stop(*_):
    signal.signal(signal.SIGCHLD, lambda *_: None)  # torch would raise for data loaders that have got a SIGTERM too
    raise KeyboardInterrupt("SIGTERM")


def main(argv=None) -> dict[str, float]:
    """Train as `argv` (strings) or the command line says; returns what `all_results.json` holds."""
    signal.signal(signal.SIGTERM, stop)
    args, callback = None, RunCallback()
    try:
        check_min_version("5.23.0")
        args = parse_args(argv)
        return run(args, callback)
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers may send a second one
        if callback.claim and not any(re.match("checkpoint-|.*_results", file) for file in os.listdir(args.output_dir)):
            callback.claim.unlink(missing_ok=True)  # nothing is lost: the folder is free again
        if args and args.log_level == "debug":
            raise
        line, status = str(error), 1 if callback.started else 2
        if isinstance(error, KeyboardInterrupt):
            line, status = ("stopped by SIGTERM", 143) if line else ("interrupted", 130)
        elif isinstance(error, FloatingPointError):
            line += ": the training has diverged. Start anew with a lower --learning_rate: a resumed run keeps it"
        elif isinstance(error, torch.OutOfMemoryError):
            logger.disabled = False  # it may be another process's GPU
            line, status = "out of GPU memory: halve --per_device_train_batch_size and double ", 1
            line += "--gradient_accumulation_steps (same effective batch), or add --activation_checkpointing"
        elif "No space left" in line or (callback.started and "inline_container" in line):  # so says torch's writer
            line, status = f"the disk is full ({line}): make room", 1
        elif line.startswith("DataLoader worker"):  # out of memory, or a signal to all processes ended it first
            status = 1
        elif not isinstance(error, UserError):
            if callback.started:
                raise
            line = f"{type(error).__name__}: {line} (--log_level debug shows where)"
            if callback.checkpoint:
                line = f"cannot resume from {callback.checkpoint}: {line}. "
                line += "If it is damaged, remove it and resume from the one before"
        if status != 2 and args and not isinstance(error, (FloatingPointError, UserError)):
            checkpoint = newest_complete(Path(args.output_dir).glob("checkpoint-*"))
            resume = f"To go on from {checkpoint}, add --resume_from_checkpoint last to the same command"
            line += f". {resume if checkpoint else 'No checkpoint has been saved'}."
        # below the progress bar, if there is one
        logger.error("\n" * bool(callback.started or callback.checkpoint) + f"train_rdrop.py: {' '.join(line.split())}")
        sys.exit(status)


if __name__ == "__main__":
    main()
