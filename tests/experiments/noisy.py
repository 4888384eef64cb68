"""Write reviews of IMDB for the experiment on noisy labels: for each seed a training, a validation and a test file.

    python tests/experiments/noisy.py noisy --imdb stanfordnlp/imdb --seeds 42 43 44
    python tests/experiments/noisy.py few --train 100 --noisy 0

`noisy/train_42.csv` contains 300 reviews, of which 60, drawn with the seed, carry the wrong label. `validation_42.csv`
(400 different reviews of train) and `test_42.csv` (2,000 of test) are clean.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import load_dataset


def write(folder, imdb, seed, train=300, noisy=60, validation=400, test=2000):
    """Write the three files of `seed`."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(imdb["train"]))
    drawn = {"train": order[:train], "validation": order[train : train + validation]}
    drawn["test"] = rng.permutation(len(imdb["test"]))[:test]
    flipped = rng.permutation(train)[:noisy]
    for split, rows in drawn.items():
        reviews = imdb["test" if split == "test" else "train"].select(rows).to_pandas()
        if split == "train":
            reviews.loc[flipped, "label"] = 1 - reviews.loc[flipped, "label"]
        reviews["label"] = reviews["label"].map({0: "neg", 1: "pos"})
        reviews.to_csv(folder / f"{split}_{seed}.csv", index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--imdb", default="stanfordnlp/imdb", help="Hub id or folder of the data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(42, 54)))
    parser.add_argument("--train", type=int, default=300, help="training reviews (default: 300)")
    parser.add_argument("--noisy", type=int, default=60, help="training reviews with a wrong label (default: 60)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    imdb = load_dataset(options.imdb)
    for seed in options.seeds:
        write(options.folder, imdb, seed, options.train, options.noisy)
