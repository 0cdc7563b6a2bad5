# SPDX-License-Identifier: Apache-2.0
"""No program runs code in an untrusted model folder, whatever files it holds."""

import ast
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import ROOT

CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
CODE += ("AutoImageProcessor", "AutoProcessor")
PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin", "optimizer.pt", "scheduler.pkl")
SIZES = {"vocab_size": 397, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return open, (str(self.ran), "w")


def with_code(path: Path) -> None:
    """Makes a JSON file name code for every class that transformers looks up."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    for part in (content, *(content[name] for name in ("text_config", "vision_config") if name in content)):
        part["auto_map"] = {name: ["evil.Evil", None] if "Tokenizer" in name else "evil.Evil" for name in CODE}
    path.write_text(json.dumps(content))


def poison(folder: Path, ran: Path, *kinds: str) -> Path:
    """Adds code and pickles to a folder that write `ran` when run; `kinds` are the files that name the code."""
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n\nclass Evil:\n    pass\n")
    for name in ("__init__.py", "setup.py", "conftest.py", "configuration_evil.py", "tokenization_evil.py"):
        shutil.copyfile(folder / "evil.py", folder / name)
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "evil.py", folder / "custom_generate" / "generate.py")
    for name in PICKLES:
        torch.save(Payload(ran), folder / name)
    if "pickles only" in kinds:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    if "config" in kinds:
        with_code(folder / "config.json")
        for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
            with_code(folder / name)
    if "type" in kinds:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"model_type": "evil"}))
    if "tokenizer" in kinds:
        with_code(folder / "tokenizer_config.json")
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(content | {"tokenizer_class": "Evil"}))
    return folder


@pytest.fixture(scope="module")
def clean(world, tmp_path_factory) -> dict[str, Path]:
    """Returns harmless folders: a language model with a tokenizer, a vision encoder, a composite model."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from tests.models import build_hf_model

    root = tmp_path_factory.mktemp("clean")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(root / "language")
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    for place in ("language", "tokenizer"):
        tokenizer.save_pretrained(root / place)
    shutil.copytree(world.root / "vision", root / "vision")
    build_hf_model(image_token_id=127).save_pretrained(root / "hf")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def untrusted(clean, tmp_path, monkeypatch):
    """Returns a function that makes poisoned copies of these folders; questions on the terminal are answered yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"

    def make(name: str, *kinds: str) -> Path:
        return poison(Path(shutil.copytree(clean[name], tmp_path / f"{name}_{len(kinds)}")), ran, *kinds)

    yield make
    assert not ran.exists(), "code of a model's folder was run"


def test_the_payloads_run_if_they_are_trusted(clean, tmp_path, monkeypatch):
    """Without this, the other tests could not fail."""
    from transformers import AutoConfig, AutoTokenizer

    # The runtime, which another test may have installed in this process, makes torch read tensors only.
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    ran = tmp_path / "ran"

    def poisoned(name: str, *kinds: str) -> Path:
        return poison(Path(shutil.copytree(clean[name], tmp_path / f"live_{name}")), ran, *kinds)

    language, tokenizer = poisoned("language", "config", "type"), poisoned("tokenizer", "tokenizer")
    loads = (
        lambda: torch.load(language / "pytorch_model.bin", weights_only=False),
        lambda: AutoConfig.from_pretrained(language, trust_remote_code=True),
        lambda: AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=True),
    )
    for load in loads:
        with contextlib.suppress(
            AttributeError, TypeError, ValueError
        ):  # raised after the file has run: its class is empty
            load()
        assert ran.exists()
        ran.unlink()


KINDS = [("config",), ("config", "tokenizer"), ("config", "type"), ("config", "pickles only")]


@pytest.mark.parametrize("kinds", KINDS, ids=" and ".join)
def test_no_command_of_the_converter_runs_a_models_code(world, clean, untrusted, convert, tmp_path, kinds):
    hf, language, vision = (untrusted(name, *kinds) for name in ("hf", "language", "vision"))
    sentencepiece = world.root / "tokenizer.model"
    assert convert("import", "--hf", clean["hf"], "--output", tmp_path / "good")[0] == 0
    commands = {
        "import": ("import", "--hf", hf),
        "import of a language model": ("import", "--language", language, "--vision", clean["vision"]),
        "import of a tower": ("import", "--language", clean["language"], "--vision", vision),
        "import of both": ("import", "--language", language, "--vision", vision, "--tokenizer-model", sentencepiece),
        "upcycle": ("upcycle", "--language", language, "--vision", vision, "--tokenizer-model", sentencepiece),
        "export": ("export", "--load", tmp_path / "good", "--hf", hf),
    }
    for number, (name, command) in enumerate(commands.items()):
        output = tmp_path / f"output_{number}"
        status, said = convert(*command, "--output", output)
        needs_code = "tokenizer" in kinds and name == "import of a language model"
        without_tokenizer = "tokenizer" in kinds and name in (
            "import",
            "export",
        )  # its class is not one of transformers'
        is_refused = (
            "type" in kinds or needs_code or without_tokenizer or ("pickles only" in kinds and name != "export")
        )
        assert status == (2 if is_refused else 0), f"{name}: {said}"
        assert not is_refused or said.splitlines()[-1].startswith("convert.py: error: "), said
        assert not needs_code or "names code of its own, which is never run here" in said
        assert "Traceback" not in said
        for path in output.rglob("*.json"):
            assert "evil.Evil" not in path.read_text(), f"{path} names code that a later program would be asked to run"
        assert not [path for path in output.rglob("*") if path.name in PICKLES], "a pickle was copied"
        assert not [path for path in output.rglob("*.py") if path.name != "modeling_modality_aware.py"]
    if "type" in kinds or "pickles only" in kinds:
        status, said = convert("verify", "--hf", hf, "--load", tmp_path / "good")
        assert status == 2 and "error: " in said.splitlines()[-1]


def test_adding_tokens_runs_no_code_of_a_tokenizer(untrusted, tmp_path, monkeypatch, capsys):
    from tools.data.add_tokens import main

    monkeypatch.setattr(sys, "argv", ["add_tokens.py", str(untrusted("tokenizer", "tokenizer")), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "names code of its own, which is never run here" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["tokenizer", "pickles only"])
def test_the_conversion_of_the_llava_example_runs_no_code_of_the_model(clean, untrusted, tmp_path, kind):
    from examples.moe_llava_phi.from_llava import convert as from_llava

    llava = untrusted("language", kind)
    content = json.loads((llava / "config.json").read_text())
    llava_phi = {"model_type": "llava_phi", "image_projector_type": "mlp2x_gelu"}
    (llava / "config.json").write_text(json.dumps(content | llava_phi))
    with pytest.raises(ValueError, match=r"must hold the model's weights as|names code of its own, which is never run"):
        from_llava(llava, clean["vision"], tmp_path / "output")


def test_the_trainer_runs_no_code_of_a_vision_towers_folder(untrusted, single_rank):
    from megatron_smar.model.vision import VisionConfig, VisionEncoder, load_vision_config

    with pytest.raises(ValueError, match=r"names code of its own .auto_map in config.json., which is never run here"):
        load_vision_config(VisionConfig(str(untrusted("vision", "config", "type")), image_size=32))
    VisionEncoder(VisionConfig(str(untrusted("vision", "config")), image_size=32), torch.float32)
    with pytest.raises(ValueError, match=r"has a config but no weights \(\*.safetensors\)"):
        VisionEncoder(
            VisionConfig(str(untrusted("vision", "pickles only", "config", "x")), image_size=32), torch.float32
        )


def test_the_trainer_runs_no_code_of_a_tokenizers_folder_and_does_not_ask(world, untrusted):
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", untrusted("tokenizer", "tokenizer")]
    sizes = ["--micro-batch-size", 4, "--global-batch-size", 4, "--train-iters", 1]
    (said,) = world.errors(*sizes, *flags, ranks=1, answers="y\n" * 9)
    assert "a folder's code is only run with --trust-remote-code" in said


@pytest.mark.parametrize("library", ["sft", "huggingface"])
def test_no_tokenizer_of_megatron_asks_whether_to_run_code(untrusted, single_rank, library):
    from megatron.core.tokenizers import MegatronTokenizer

    more = {"prompt_format": "default"} if library == "sft" else {}
    with pytest.raises(ValueError, match=r"execute|executed"):
        MegatronTokenizer.from_pretrained(str(untrusted("tokenizer", "tokenizer")), {"library": library}, **more)


def test_every_folder_is_loaded_with_trust_remote_code_false():
    """Without trust_remote_code=False, transformers asks on the terminal."""
    found = 0
    for path in [*ROOT.glob("megatron_smar/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if node.func.attr == "from_pretrained" and isinstance(owner, ast.Name) and owner.id.startswith("Auto"):
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                found += 1
    assert found > 5
