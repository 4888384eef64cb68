"""Write a tiny RoBERTa, its tokenizer and a small sentiment data set, to try train_rdrop.py without a Hub.

    python tests/tiny_imdb.py tiny
    python train_rdrop.py --model_name_or_path tiny/model --dataset_name tiny/data --learning_rate 1e-3

The model (2 layers x 32) has random weights. The reviews are made up: neutral words around a few that praise or damn.
Like IMDB, the data set is sorted by label, its lengths vary widely, and labels are called neg and pos.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

NEUTRAL = ["the", "film", "this", "movie", "a", "story", "plot", "actor", "scene", "it", "was", "and", "of", "with"]
NEUTRAL += ["in", "an", "old", "new", "long", "short", "music", "camera"]
OPINION = (
    ["awful", "dull", "terrible", "boring", "wretched", "tedious"],
    ["wonderful", "great", "superb", "moving", "brilliant", "delightful"],
)


def make_reviews(count, seed, names=("neg", "pos")):
    """Make `count` reviews, sorted by label, half of them negative: a `Dataset` with `text` and `label`."""
    rng = random.Random(seed)
    labels = [int(i >= count // 2) for i in range(count)]
    texts = []
    for label in labels:
        words = rng.choices(NEUTRAL, k=rng.randint(3, 50)) + rng.choices(OPINION[label], k=rng.randint(1, 4))
        rng.shuffle(words)
        texts.append(" ".join(words).capitalize() + ".")
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"text": texts, "label": labels}, features=features)


def write_data(folder, train=400, test=100, **options):
    """Write `train.parquet` and `test.parquet` into `folder`, with that many reviews each."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    make_reviews(train, seed=1, **options).to_parquet(Path(folder, "train.parquet"))
    make_reviews(test, seed=2, **options).to_parquet(Path(folder, "test.parquet"))


def make_tokenizer(model_max_length=64):
    """Train a small byte-level BPE tokenizer, like that of RoBERTa."""
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in the order of RoBERTa, where padding is token 1
    bpe.train_from_iterator(make_reviews(500, seed=0)["text"], 400, special_tokens=special, show_progress=False)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return RobertaTokenizer(learned["vocab"], merges, model_max_length=model_max_length)


def write_model(folder, **settings):
    """Write the tokenizer and the model into `folder`; `settings` override those of the config."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"vocab_size": len(tokenizer), "type_vocab_size": 1, "max_position_embeddings": 66}
    config = RobertaConfig(**shape, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    config.update(settings)
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the folders model and data")
    folder = parser.parse_args().folder
    write_model(folder / "model")
    write_data(folder / "data")
    print(f"wrote {folder / 'model'} and {folder / 'data'}")
