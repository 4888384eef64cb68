"""Encoders of several kinds, what they do not take, their dropout, and the versions the script runs on."""

import json
import re

import pytest
import tiny_imdb
import torch
import transformers
from datasets import DatasetDict
from safetensors.torch import load_file, save_file
from transformers import pipeline

from train_rdrop import ModelArguments, UserError, dry_run, load_model, tokenize

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPES = {
    "BertConfig": {**BERT, "max_position_embeddings": 64},
    "DistilBertConfig": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    "MPNetConfig": {**BERT, "max_position_embeddings": 66},
    "XLNetConfig": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "ModernBertConfig": {
        **BERT, "max_position_embeddings": 64,
        "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2,
    },
}  # fmt: skip
SHORT = ("--num_train_epochs", "1", "--max_train_samples", "64", "--logging_steps", "1")


@pytest.mark.parametrize("kind", SHAPES)
def test_encoder_of_another_kind(start, tmp_path, kind):
    tokenizer = tiny_imdb.make_tokenizer(model_max_length=10**30)  # knows no limit: the recipe's counts
    config = getattr(transformers, kind)(**SHAPES[kind], vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0, run.err
    no_dropout = kind == "ModernBertConfig"  # its probabilities are 0 by default
    assert run.err.count("The model has no dropout") == no_dropout
    if no_dropout:  # said before the first step, with the mend
        assert "--config_overrides" in run.err and run.err.index("no dropout") < run.err.index("0/4 [")
    kl = [entry["kl"] for entry in run.json("trainer_state.json")["log_history"] if "kl" in entry]
    assert len(kl) == 4 and all((value < 1e-12) == no_dropout for value in kl)
    assert run.json("tokenizer_config.json")["model_max_length"] == 512
    (answer,) = pipeline("text-classification", model=str(tmp_path / "results_rdrop"), truncation=True)("film " * 40)
    assert answer["label"] in ("neg", "pos")


def test_config_overrides_give_a_model_its_dropout(start, tmp_path):
    tokenizer = tiny_imdb.make_tokenizer()
    config = transformers.ModernBertConfig(**SHAPES["ModernBertConfig"], vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    model = ("--model_name_or_path", "model")
    run = start(*model, "--config_overrides", "embedding_dropout=0.2,mlp_dropout=0.1", *SHORT).wait()
    assert run.status == 0 and "no dropout" not in run.err, run.err
    assert re.search("^alpha 5.0, .*'embedding_dropout': 0.2.*'mlp_dropout': 0.1", run.out, re.M)
    kl = [entry["kl"] for entry in run.json("trainer_state.json")["log_history"] if "kl" in entry]
    assert min(kl) > 1e-9 and run.json("config.json")["embedding_dropout"] == 0.2
    for wrong in ("embeding_dropout=0.2", "mlp_dropout=much", "mlp_dropout"):
        with pytest.raises(UserError, match=rf"--config_overrides {wrong} \("):
            load_model(ModelArguments(str(tmp_path / "model"), wrong), tokenizer, ["neg", "pos"])


def test_plain_baseline_needs_no_dropout(start):
    overrides = ("--config_overrides", "hidden_dropout_prob=0,attention_probs_dropout_prob=0.0")
    run = start("--rdrop_alpha", "0", *overrides, *SHORT).wait()
    assert run.status == 0 and "no dropout" not in run.err, run.err


def test_what_the_model_does_not_take_is_refused_before_training(start, tmp_path):
    tokenizer = tiny_imdb.make_tokenizer(model_max_length=512)
    tiny_imdb.write_model(tmp_path / "few_positions", max_position_embeddings=42)  # RoBERTa: 40 tokens
    config = transformers.XmodConfig(**BERT, languages=("en_XX",), vocab_size=len(tokenizer), pad_token_id=1)
    transformers.XmodForSequenceClassification(config).save_pretrained(tmp_path / "no_language")
    for name, words in {"few_positions": ["tokens", "--max_length"], "no_language": ["Input language unknown"]}.items():
        tokenizer.save_pretrained(tmp_path / name)
        run = start("--model_name_or_path", name, *SHORT).wait()
        run.assert_one_line(2, "into the model", *words)
        assert not list(tmp_path.rglob("arguments.json"))


@pytest.mark.parametrize("tokenizer_limit, asked, used", [(512, 40, 40), (20, 512, 20), (10**30, 30, 30)])
def test_texts_are_cut_to_the_least_of_both_limits(start, tmp_path, tokenizer_limit, asked, used):
    tiny_imdb.write_model(tmp_path / "model", max_position_embeddings=42)
    tiny_imdb.make_tokenizer(tokenizer_limit).save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", "--max_length", asked, *SHORT, prelude="show_widths.py").wait()
    assert run.status == 0, run.err
    assert max(int(width) for width in re.findall(r"^WIDTH (\d+)", run.out, re.M)) == used
    assert re.search(rf"^train: \d+ tokens; [1-9]\d* texts are cut to {used}$", run.out, re.M), run.out
    assert run.json("tokenizer_config.json")["model_max_length"] == used


def test_dry_run_keeps_the_random_state(tiny):
    args = ModelArguments(str(tiny / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    model = load_model(args, tokenizer, ["neg", "pos"])
    splits = tokenize(DatasetDict(train=tiny_imdb.make_reviews(20, seed=0)), tokenizer)
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append((module.training, output.logits)))
    before = torch.get_rng_state()
    dry_run(model, tokenizer, splits, 5.0)
    assert torch.get_rng_state().equal(before) and not model.training
    (first_training, first), (second_training, second) = passes
    assert first_training and second_training and not first.equal(second) and not first.requires_grad


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_half_precision_pads_to_a_multiple_of_8(start, precision):
    flags = ("--bf16",) if precision == "bf16" else ()
    run = start(*SHORT, *flags, "--length_buckets", "2", prelude="show_widths.py").wait()
    assert run.status == 0, run.err
    dry_run, *widths = (int(width) for width in re.findall(r"^WIDTH (\d+)", run.out, re.M))
    odd = {width for width in widths if width % 8} - {dry_run}
    assert len(set(widths)) > 3 and bool(odd) == (precision == "no"), sorted(set(widths))


def test_head_for_other_labels_is_replaced(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model", num_labels=5, problem_type="multi_label_classification")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0, run.err
    config = run.json("config.json")
    assert config["id2label"] == {"0": "neg", "1": "pos"} and config["problem_type"] == "single_label_classification"


def test_head_for_labels_of_other_names_is_kept_and_said(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model", id2label={0: "pos", 1: "neg"})
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0 and run.json("config.json")["id2label"] == {"0": "neg", "1": "pos"}, run.err
    assert "head is kept: what it calls ['pos', 'neg'] is now ['neg', 'pos']" in run.err


def test_tokenizer_with_more_tokens_than_the_model_has(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    tokenizer = tiny_imdb.make_tokenizer()
    tokenizer.add_tokens(["wonderful", "awful", "camera"])
    tokenizer.save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0 and run.json("config.json")["vocab_size"] == len(tokenizer), run.err


def test_folder_without_tokenizer_is_refused_and_new_weights_are_said(start, tmp_path):
    for name in ("no_words", "other_names"):
        tiny_imdb.write_model(tmp_path / name)
    for file in (tmp_path / "no_words").glob("tokenizer*"):
        file.unlink()
    file = tmp_path / "other_names" / "model.safetensors"
    save_file({f"module.{key}": w for key, w in load_file(file).items()}, file, {"format": "pt"})
    run = start("--model_name_or_path", "no_words", *SHORT).wait()
    run.assert_one_line(2, "the tokenizer knows no word of the longest text", "are all files there?")
    run = start("--model_name_or_path", "other_names", *SHORT).wait()
    assert run.status == 0 and re.search("^new weights, drawn with the seed: .*'roberta.emb", run.out, re.M), run.out


def test_package_that_a_flag_asks_for_is_missing(start, tmp_path):
    run = start("--optim", "schedule_free_adamw", *SHORT).wait()
    run.assert_traceback("schedulefree", "start anew")
    assert not list(tmp_path.rglob("arguments.json"))


def test_half_precision_checkpoint_trains_in_float32(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    model.half().save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0, run.err
    assert {w.dtype for w in load_file(tmp_path / "results_rdrop" / "model.safetensors").values()} == {torch.float32}


def test_model_without_its_weights_is_refused(start, tmp_path):
    for name in ("none", "cut"):
        tiny_imdb.write_model(tmp_path / name)
    (tmp_path / "none" / "model.safetensors").unlink()
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    refused = {
        "none": ["cannot load none (OSError: ", "model.safetensors"],
        "cut": ["cannot load cut (SafetensorError: ", "Is the folder of --model_name_or_path complete?"],
    }
    for name, words in refused.items():
        start("--model_name_or_path", name, *SHORT).wait().assert_one_line(2, *words)


def test_tokenizer_without_padding_token_is_refused(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    tokenizer = tiny_imdb.make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    run.assert_one_line(2, "ValueError: Asking to pad but the tokenizer does not have a padding token")


def test_model_that_wants_remote_code_is_refused_without_a_question(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {"AutoConfig": "remote.Config", "AutoModelForSequenceClassification": "remote.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "other", "auto_map": names}))
    (tmp_path / "model" / "remote.py").write_text("open('it_ran', 'w')")
    run = start("--model_name_or_path", "model", *SHORT, prelude="say_yes.py").wait()
    run.assert_one_line(2, "cannot load model (ValueError: The repository model contains custom code")
    assert "[y/N]" not in run.out + run.err and not (tmp_path / "it_ran").exists()


def test_too_old_transformers_says_so(start):
    run = start(prelude="old_transformers.py").wait()
    assert run.status != 0 and "requires a minimum version of 5.23.0, but the version found is 5.22.9." in run.err
