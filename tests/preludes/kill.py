"""Send this process a signal: `SIGTERM loading`, `SIGKILL step 13`, `SIGINT evaluation 10`, `SIGTERM evaluation final`.

`SIGKILL step 13 1` is the same in process 1, of several.
"""

import os
import signal
import sys
from pathlib import Path

import datasets
from transformers import TrainerCallback, trainer

_, name, *moment = sys.argv
if len(moment) == 3 and moment.pop() != os.environ.get("RANK"):
    moment = []


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
    datasets.load_dataset_builder = lambda *args, **kwargs: reached("loading")
