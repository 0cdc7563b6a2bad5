# SPDX-License-Identifier: Apache-2.0
"""Programs that run a checkpoint's model get its flags from the stored arguments."""

import sys
from argparse import Namespace

import pytest

from megatron_smar import runtime
from megatron_smar.checkpoint import stored_flags as module
from megatron_smar.checkpoint.metadata import run_arguments
from megatron_smar.checkpoint.model_identity import FUNCTION, check_function
from megatron_smar.checkpoint.stored_flags import stored_flags


def parsed(monkeypatch, defaults, *flags: str) -> Namespace:
    """Returns the arguments that Megatron's parser and checks make of defaults and flags."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_smar.config.flags import add_arguments

    def add_flags(parser):
        parser = add_arguments(parser)
        parser.set_defaults(**defaults)
        return parser

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    args = parse_args(add_flags)
    args.vocab_size = args.padded_vocab_size = 128
    validate_args(args)
    return args


@pytest.fixture(params=["run", "import"])
def checkpoint(request, trained, imported):
    """Returns a folder for --load and its stored arguments."""
    folder = trained["plain"] if request.param == "run" else imported
    return str(folder), run_arguments(folder)


def test_every_argument_that_changes_what_the_model_computes_is_the_stored_one(checkpoint, monkeypatch, single_rank):
    folder, saved = checkpoint
    given = ["--load", folder, "--tokenizer-type", "NullTokenizer", "--conversation-template", "mistral"]
    given += ["--vision-model", saved.vision_model, "--skip-train", "--micro-batch-size", "1", "--vocab-size", "128"]
    args = parsed(monkeypatch, stored_flags(given), *given)
    for name in (*FUNCTION, "seq_length", "max_position_embeddings", "bf16", "modality_router_bias"):
        assert getattr(args, name) == getattr(saved, name), name
    check_function(args, saved)


def test_given_flags_win_over_the_stored_ones(trained, monkeypatch, single_rank):
    given = ["--load", str(trained["plain"]), "--tokenizer-type", "NullTokenizer", "--vision-model", "another"]
    given += ["--conversation-template", "vita", "--seq-length", "8", "--micro-batch-size", "1", "--skip-train"]
    args = parsed(monkeypatch, stored_flags(given), *given)
    assert (args.vision_model, args.conversation_template, args.seq_length) == ("another", "vita", 8)


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Returns a function that sets what a checkpoint stores, in addition to the arguments of an ordinary run."""
    (tmp_path / "hf").mkdir()
    monkeypatch.setattr(module, "locate", lambda *_: Namespace(checkpoint=tmp_path))

    def store(**values: object) -> None:
        run = {"num_layers": 2, "vision_model": str(tmp_path / "hf"), "tokenizer_type": "HuggingFaceTokenizer"}
        run |= {"tokenizer_model": str(tmp_path / "hf"), "conversation_template": "vita", "bf16": True}
        monkeypatch.setattr(module, "run_arguments", lambda *_: Namespace(**run | values))

    return store


LOAD = ["--load", "checkpoints/some"]


def test_fusions_that_a_run_switched_off_stay_off_and_the_others_depend_on_the_device(stored):
    stored(bias_gelu_fusion=False, apply_rope_fusion=True, moe_grouped_gemm=True)
    flags = stored_flags(LOAD)
    assert flags["bias_gelu_fusion"] is False and "apply_rope_fusion" not in flags
    assert ("moe_grouped_gemm" in flags) == (runtime.device() == "cuda")


@pytest.mark.parametrize("dest", ["vision_model", "tokenizer_model"])
def test_a_stored_path_that_no_longer_exists_is_named_with_its_flag(stored, tmp_path, dest):
    stored(**{dest: str(tmp_path / "moved.model")})
    flag = f"--{dest.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"was saved with {flag} .*moved.model, which is not there; give {flag}\."):
        stored_flags(LOAD)
    stored_flags([*LOAD, flag, str(tmp_path)])


CHAT_TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
    "mistral": "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "vicuna_v1": "{% for m in messages %}USER: {{ m.content }} ASSISTANT:{% endfor %}",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("values", [{"tokenizer_type": "NullTokenizer"}, {"conversation_template": "plain"}])
def test_an_import_and_a_stage_1_model_get_the_tokenizers_chat_template(stored, tmp_path, name, values):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    tokenizer.save_pretrained(tmp_path / "hf")
    stored(**values)
    flags = stored_flags(LOAD)
    assert flags["conversation_template"] == name
    assert (flags["tokenizer_type"], flags["tokenizer_model"]) == ("HuggingFaceTokenizer", str(tmp_path / "hf"))


def test_a_model_without_a_usable_conversation_template_or_tokenizer_is_refused(stored, tmp_path):
    stored(conversation_template="plain")
    with pytest.raises(ValueError, match="trained with --conversation-template plain, which leaves questions out"):
        stored_flags(LOAD)
    assert stored_flags(LOAD, asks=False)["conversation_template"] == "plain"
    assert stored_flags([*LOAD, "--conversation-template", "vita"])  # given
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"")
    stored(tokenizer_type="NullTokenizer", tokenizer_model=None)
    with pytest.raises(ValueError, match="is an import, and its tokenizer does not say how a question is put"):
        stored_flags(LOAD)
    flags = stored_flags(LOAD, asks=False)
    assert flags["tokenizer_type"] == "SentencePieceTokenizer"
    (tmp_path / "hf" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="hf has no tokenizer; give --tokenizer-type and --tokenizer-model"):
        stored_flags(LOAD)
