"""Kill this process: `SIGTERM loading`, `SIGKILL step 13`, `SIGTERM evaluation 10`, `SIGTERM evaluation final`."""

import os
import signal
import sys
from pathlib import Path

import datasets
from transformers import TrainerCallback, trainer

_, name, *moment = sys.argv


def reached(*now):
    if moment == list(now):
        os.kill(os.getpid(), signal.Signals[name])


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        reached("step", str(state.global_step))

    def on_prediction_step(self, args, state, control, **kwargs):
        trained = Path(args.output_dir, "train_results.json").exists()
        reached("evaluation", "final" if trained else str(state.global_step))


trainer.DEFAULT_CALLBACKS.append(Kill)
if moment == ["loading"]:
    datasets.load_dataset = lambda *args, **kwargs: reached("loading")
