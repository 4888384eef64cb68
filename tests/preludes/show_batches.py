"""Print the batches of each epoch (TRAIN) and of evaluation (EVAL), of each text its tokens, their types, its label."""

import json

from transformers import TrainerCallback, trainer


def show(name, batches):
    texts = []
    for batch in batches:
        types = batch.get("token_type_ids", batch["attention_mask"])  # many models know no types
        columns = (batch["attention_mask"], batch["input_ids"], types, batch["labels"])
        for mask, ids, kinds, label in zip(*(column.tolist() for column in columns), strict=True):
            texts.append([ids[: sum(mask)], kinds[: sum(mask)], label])
    print(name, json.dumps(texts))


class ShowBatches(TrainerCallback):
    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        show("TRAIN", train_dataloader)

    def on_train_end(self, args, state, control, eval_dataloader, **kwargs):
        if eval_dataloader is not None:
            show("EVAL", eval_dataloader)


trainer.DEFAULT_CALLBACKS.append(ShowBatches)
