"""Raise an error: `bug 1` after the first step, `gpu_memory 1 1` there in process 1, `bug predict` in predict()."""

import sys

import torch
from transformers import Trainer, TrainerCallback, trainer

ERRORS = {
    "bug": RuntimeError("a bug"),
    "gpu_memory": torch.OutOfMemoryError("CUDA out of memory."),
    "worker": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),  # as torch says it
}
_, name, moment, *process = sys.argv
process_index = int(process[0]) if process else 0


class Fail(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if str(state.global_step) == moment and args.process_index == process_index:
            raise ERRORS[name]


def predict(*args, **kwargs):
    raise ERRORS[name]


trainer.DEFAULT_CALLBACKS.append(Fail)
if moment == "predict":
    Trainer.predict = predict
