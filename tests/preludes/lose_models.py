"""Remove the weights of all checkpoints once that of a step has been saved, as `lose_models.py 16` names it."""

import sys
from pathlib import Path

from transformers import TrainerCallback, trainer

step = int(sys.argv[1])


class LoseModels(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == step and args.process_index == 0:
            for file in Path(args.output_dir).glob("*/*.safetensors"):
                file.unlink()


trainer.DEFAULT_CALLBACKS.append(LoseModels)
