"""Let accelerate train in fp16 on a CPU, and print the types of logits and loss, and the scale after each step."""

import accelerate
import torch
from transformers import TrainerCallback, trainer


def init(self, *args, real=accelerate.Accelerator.__init__, **kwargs):
    real(self, *args, **kwargs)  # refuses fp16 on a CPU, though torch has it
    self.native_amp = True
    self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)


def backward(self, loss, real=accelerate.Accelerator.backward, **kwargs):
    print("LOSS", loss.dtype)
    real(self, loss, **kwargs)


class ShowScale(TrainerCallback):
    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        model.classifier.register_forward_hook(lambda module, inputs, logits: print("LOGITS", logits.dtype))
        print("SCALE", optimizer.scaler.get_scale())

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        print("SCALE", optimizer.scaler.get_scale())


accelerate.Accelerator.__init__ = init
accelerate.Accelerator.backward = backward
trainer.DEFAULT_CALLBACKS.append(ShowScale)
