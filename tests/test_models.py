"""Encoders of several kinds, their limits of length, and the versions the script runs on."""

import json
import re

import pytest
import tiny_imdb
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import pipeline

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
    tokenizer = tiny_imdb.make_tokenizer(model_max_length=10**30)  # knows no limit: the model's counts
    config = getattr(transformers, kind)(**SHAPES[kind], vocab_size=len(tokenizer), pad_token_id=1)
    tokenizer.save_pretrained(tmp_path / "model")
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0, run.err
    no_dropout = kind == "ModernBertConfig"  # its probabilities are 0 by default
    assert run.err.count("KL is 0: the model has no dropout") == no_dropout
    kl = [entry["kl"] for entry in run.json("trainer_state.json")["log_history"] if "kl" in entry]
    assert len(kl) == 4 and all((value < 1e-12) == no_dropout for value in kl)
    limit = 512 if kind == "XLNetConfig" else 64
    assert run.json("tokenizer_config.json")["model_max_length"] == limit
    (answer,) = pipeline("text-classification", model=str(tmp_path / "results_rdrop"), truncation=True)("film " * 600)
    assert answer["label"] in ("neg", "pos")


@pytest.mark.parametrize("tokenizer_limit", [512, 10**30, 20])
def test_texts_are_cut_to_what_the_model_takes(start, tmp_path, tokenizer_limit):
    tiny_imdb.write_model(tmp_path / "model", max_position_embeddings=42)  # RoBERTa: 40 tokens
    tiny_imdb.make_tokenizer(tokenizer_limit).save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT, prelude="show_widths.py").wait()
    assert run.status == 0, run.err
    limit = min(40, tokenizer_limit)
    assert max(int(line.split()[1]) for line in run.out.splitlines() if line.startswith("WIDTH")) == limit
    assert run.json("tokenizer_config.json")["model_max_length"] == limit


@pytest.mark.parametrize("asked, used", [(9999, 64), (30, 30)])
def test_start_line_tells_the_length_used(start, asked, used):
    run = start("--max_length", asked, *SHORT).wait()
    assert run.status == 0 and re.search(rf"^F1 .* tokens to train on, at most {used} a text$", run.out, re.M), run.out
    assert run.json("tokenizer_config.json")["model_max_length"] == used


def test_head_for_other_labels_is_replaced(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model", num_labels=5, problem_type="multi_label_classification")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0, run.err
    config = run.json("config.json")
    assert config["id2label"] == {"0": "neg", "1": "pos"} and config["problem_type"] == "single_label_classification"


def test_tokenizer_with_more_tokens_than_the_model_has(start, tmp_path):
    tiny_imdb.write_model(tmp_path / "model")
    tokenizer = tiny_imdb.make_tokenizer()
    tokenizer.add_tokens(["wonderful", "awful", "camera"])
    tokenizer.save_pretrained(tmp_path / "model")
    run = start("--model_name_or_path", "model", *SHORT).wait()
    assert run.status == 0 and run.json("config.json")["vocab_size"] == len(tokenizer), run.err


def test_folder_without_tokenizer_or_encoder_is_refused(start, tmp_path):
    for name in ("no_words", "other_names"):
        tiny_imdb.write_model(tmp_path / name)
    for file in (tmp_path / "no_words").glob("tokenizer*"):
        file.unlink()
    file = tmp_path / "other_names" / "model.safetensors"
    save_file({f"module.{key}": w for key, w in load_file(file).items()}, file, {"format": "pt"})
    refused = {
        "no_words": ["the tokenizer knows no word of the first 100 texts: are its files in the model's folder?"],
        "other_names": ["the weights of other_names do not fit its config: roberta.", ", ... are missing"],
    }
    for name, words in refused.items():
        start("--model_name_or_path", name, *SHORT).wait().assert_one_line(2, *words)


def test_package_that_a_flag_asks_for_is_missing(start):
    run = start("--optim", "schedule_free_adamw", *SHORT).wait()
    assert run.status == 2 and len(run.said) == 1 and "schedulefree" in run.said[0] and "Traceback" not in run.err


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
        "cut": ["cannot load cut (SafetensorError: ", "Give a local folder or a Hub id"],
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
    run.assert_one_line(2, "ImportError: ", "requires a minimum version of 5.23.0, but the version found is 5.22.9.")
