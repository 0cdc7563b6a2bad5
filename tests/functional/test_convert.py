# SPDX-License-Identifier: Apache-2.0
"""tools/checkpoint/convert.py as a user runs it: from Hugging Face through training and back."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import ROOT, run, users_environment

PROGRAM = "tools/checkpoint/convert.py"
COMMANDS = ("import", "export", "upcycle", "inspect", "verify")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TOKENS = 400  # size of the `world` fixture's tokenizer
TRAINING = """
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --save-interval 2 --lr 1e-2 --lr-decay-style constant
    --eval-iters 0 --num-workers 0 --log-interval 1 --seq-length 128 --tokenizer-type SentencePieceTokenizer --seed 7
    --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
    --modality-routing smar --smar-d-min 3 --smar-d-max 4 --smar-coeff 1 --bf16 --use-distributed-optimizer
""".split()


def language(kind: str, folder: Path, vocab_size: int = TOKENS - 3, **more: object) -> Path:
    """Writes a language model's folder; its vocabulary lacks the image tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **SHAPE, **more)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(float(parameter.dim() == 1), 0.2)
    model.save_pretrained(folder)
    return folder


def parts(world, folder: Path) -> list[object]:
    """Returns the flags that name a language model, the vision encoder and the tokenizer."""
    tokenizer = world.root / "tokenizer.model"
    return ["--language", folder, "--vision", world.root / "vision", "--tokenizer-model", tokenizer]


@pytest.fixture(scope="module")
def start(world, tmp_path_factory) -> Path:
    """Imports Mixtral and a vision encoder by the program; returns the checkpoint."""
    root = tmp_path_factory.mktemp("start")
    mixtral = language("mixtral", root / "mixtral", num_local_experts=4, num_experts_per_tok=2)
    run(PROGRAM, "import", *parts(world, mixtral), "--output", root / "checkpoint")
    return root / "checkpoint"


@pytest.fixture(scope="module")
def trained(world, start) -> Path:
    """Trains `start` for two steps on two ranks, with SMAR; returns the --save folder."""
    model = ["--vision-model", start / "hf", *(start / "flags.txt").read_text().split()]
    data = ["--tokenizer-model", start / "hf" / "tokenizer.model", "--data-path", world.root / "shards" / "train"]
    place = ["--load", start, "--finetune", "--save", start.parent / "trained"]
    output = run("pretrain_vlm.py", *TRAINING, *model, *data, *place, ranks=2).stdout
    assert "successfully loaded checkpoint" in output and "iteration        2/       2" in output
    return start.parent / "trained"


def closing(said: str) -> str:
    """Returns a command's closing line; the progress bar is on the other stream."""
    return next(line for line in said.splitlines() if " is written: " in line)


def test_each_conversion_ends_with_what_was_written_and_the_next_commands(world, start, convert, tmp_path):
    """The commands that the closing line names are run by the other tests of this file."""
    llama = language("llama", tmp_path / "llama")
    made = tmp_path / "made"
    status, said = convert("import", *parts(world, llama), "--output", made)
    size = sum(math.prod(shape) for shape in load_shapes(made))
    assert status == 0
    assert closing(said).startswith(f"{made} is written: ") and f"{4 * size / 1000:.3g} kB of float32;" in closing(said)
    assert f"verify --load {made} --language {llama} --vision {world.root / 'vision'}" in closing(said)
    training = f"--load {made} --finetune $(cat {made}/flags.txt) --vision-model {made}/hf --tokenizer-type Sentence"
    assert training in closing(said)
    status, said = convert("export", "--load", start, "--hf", start / "hf", "--output", tmp_path / "out")
    assert status == 0 and closing(said).startswith(
        f"{tmp_path / 'out'} is written: {len(read(tmp_path / 'out'))} weights"
    )
    assert "trust_remote_code=True" in closing(said), "the plain class does not support mlp2x_gelu"
    dense = ["--hf", tmp_path / "out"]
    status, said = convert("import", *dense, "--dtype", "bfloat16", "--output", tmp_path / "half")
    assert status == 0 and "of bfloat16 and" in closing(said) and "verify" not in closing(said), "they differ"
    status, said = convert("upcycle", *parts(world, llama), "--output", tmp_path / "mixture")
    assert status == 0 and closing(said).startswith(f"{tmp_path / 'mixture'} is written: ")


def load_shapes(checkpoint: Path) -> list[tuple[int, ...]]:
    """Returns the shapes of a checkpoint's weights."""
    from megatron_smar.checkpoint.torch_dist import CheckpointReader

    tensors = CheckpointReader(checkpoint).tensors
    return [tuple(data.size) for name, data in tensors.items() if "_extra_state" not in name]


def test_an_import_is_compared_with_the_parts_it_was_made_of(world, start, convert, tmp_path):
    sources = ["--language", start.parent / "mixtral", "--vision", world.root / "vision"]
    layout = TRAINING[TRAINING.index("--tensor-model-parallel-size") : TRAINING.index("--modality-routing")]
    said = run(PROGRAM, "verify", "--load", start, *sources, *layout, ranks=2).stdout
    assert "greedy tokens that agree" in said


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a Hugging Face folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    """Asserts that two folders hold bitwise identical tensors."""
    found, expected = read(one), read(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_imported_and_trained_model_is_exported_as_trained(start, trained, convert, tmp_path):
    output = tmp_path / "exported"
    assert convert("export", "--load", trained, "--hf", start / "hf", "--output", output)[0] == 0
    weights = read(output)
    assert weights["language_model.lm_head.weight"].shape == (TOKENS, 32), (
        "padding for tensor parallelism must be left out"
    )
    assert any(tensor.any() for name, tensor in weights.items() if name.endswith("modality_bias")), (
        "SMAR did not train the biases"
    )
    assert (output / "tokenizer.model").is_file()
    same = run(PROGRAM, "verify", "--hf", output, "--load", trained)
    assert "greedy tokens that agree" in same.stdout
    other = run(PROGRAM, "verify", "--hf", output, "--load", start, check=False)
    assert other.returncode == 1 and "largest absolute logit difference" in other.stdout, other.stdout[-2000:]
    # The export is imported and exported again, unchanged.
    assert convert("import", "--hf", output, "--output", tmp_path / "again")[0] == 0
    again = ["export", "--load", tmp_path / "again", "--hf", tmp_path / "again" / "hf"]
    assert convert(*again, "--output", tmp_path / "same")[0] == 0
    assert_same(tmp_path / "same", output)


@pytest.mark.matrix
def test_a_model_with_hard_routing_is_evaluated_and_exported_with_its_experts(world, start, convert, tmp_path):
    model = ["--vision-model", start / "hf", *(start / "flags.txt").read_text().split()]
    data = ["--tokenizer-model", start / "hf" / "tokenizer.model", "--data-path", world.root / "shards" / "train"]
    hard = ["--modality-routing", "hard", "--hard-experts", "text=1,3", "vision=0,2"]
    given = [*TRAINING, *hard, *model, *data, "--load", start, "--finetune", "--save", tmp_path / "hard"]
    run("pretrain_vlm.py", *given, ranks=2)
    assert convert("export", "--load", tmp_path / "hard", "--hf", start / "hf", "--output", tmp_path / "out")[0] == 0
    same = run(PROGRAM, "verify", "--hf", tmp_path / "out", "--load", tmp_path / "hard")
    assert "greedy tokens that agree" in same.stdout
    free = ["--load", tmp_path / "hard", "--modality-routing", "none"]
    assert run(PROGRAM, "verify", "--hf", tmp_path / "out", *free, check=False).returncode == 1, (
        "no expert was forbidden"
    )
    # An import of the export needs no strategy: the biases say which experts may not be chosen.
    assert convert("import", "--hf", tmp_path / "out", "--output", tmp_path / "again")[0] == 0
    run(PROGRAM, "verify", "--hf", tmp_path / "out", "--load", tmp_path / "again")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "You may reproduce and distribute copies of the Work."}))
    routing = {}
    for name in ("hard", "again"):
        results = tmp_path / f"{name}.json"
        measured = ["--text", tmp_path / "text.jsonl", "--output", results]
        run("tools/evaluate.py", "--load", tmp_path / name, *measured, ranks=1)
        routing[name] = json.loads(results.read_text())["text_perplexity"]
    assert routing["hard"] == pytest.approx(routing["again"], rel=1e-3)


@pytest.mark.matrix
def test_a_gate_per_modality_starts_as_the_imported_gate_is_trained_and_exported(world, start, convert, tmp_path):
    parts = ["--language", start.parent / "mixtral", "--vision", world.root / "vision"]
    unchanged = run(PROGRAM, "verify", "--load", start, *parts, "--modality-routing", "modality_gates").stdout
    assert "greedy tokens that agree" in unchanged
    model = ["--vision-model", start / "hf", *(start / "flags.txt").read_text().split()]
    data = ["--tokenizer-model", start / "hf" / "tokenizer.model", "--data-path", world.root / "shards" / "train"]
    moiie = ["--modality-routing", "moiie", "--moiie-experts", "text=2", "shared=0,3", "vision=1"]
    given = [*TRAINING, *moiie, *model, *data, "--load", start, "--finetune", "--save", tmp_path / "run"]
    said = run("pretrain_vlm.py", *given, ranks=2).stdout
    assert "has no weights of --modality-routing moiie: they start as in a new model" in said
    assert convert("export", "--load", tmp_path / "run", "--hf", start / "hf", "--output", tmp_path / "out")[0] == 0
    weights, imported = read(tmp_path / "out"), read(start.parent / "mixtral")
    gates = [name for name in weights if name.endswith("gate.modality_weight_1")]
    assert len(gates) == SHAPE["num_hidden_layers"]
    for name in gates:
        gate = name.removesuffix("modality_weight_1") + "weight"
        pretrained = imported[gate.removeprefix("language_model.")]
        for part in (weights[name], weights[gate]):  # two steps of Adam from gates of size 0.2
            assert 0 < (part.float() - pretrained).abs().max() < 0.05, f"{name} did not start as the imported gate"
        assert not torch.equal(weights[name], weights[gate]), "each gate learns from its own tokens"
    assert (
        "greedy tokens that agree"
        in run(PROGRAM, "verify", "--hf", tmp_path / "out", "--load", tmp_path / "run").stdout
    )
    free = ["--load", tmp_path / "run", "--modality-routing", "modality_gates"]
    assert run(PROGRAM, "verify", "--hf", tmp_path / "out", *free, check=False).returncode == 1, (
        "no expert is forbidden"
    )
    # An import of the export has its gates and, in the biases, its groups.
    assert convert("import", "--hf", tmp_path / "out", "--output", tmp_path / "again")[0] == 0
    run(PROGRAM, "verify", "--hf", tmp_path / "out", "--load", tmp_path / "again")
    again = ["export", "--load", tmp_path / "again", "--hf", tmp_path / "again" / "hf"]
    assert convert(*again, "--output", tmp_path / "same")[0] == 0
    assert_same(tmp_path / "same", tmp_path / "out")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    """Returns a folder with the image that the documented snippet opens."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photograph")
    Image.radial_gradient("L").resize((70, 40)).convert("RGB").save(folder / "photograph.png")
    return folder


def snippet() -> str:
    """Returns the code in docs/checkpoints.md that asks an export a question."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "AutoProcessor" in block)


def test_the_documented_snippet_gives_the_trainers_answer(
    start, trained, convert, photograph, tmp_path, monkeypatch, capsys
):
    exported = ["--load", trained, "--hf", start / "hf", "--output", photograph / "exported", "--dtype", "float32"]
    assert convert("export", *exported)[0] == 0
    asked = re.search(r'"text": "(.*?)"', snippet())[1]  # both must read the same question
    question = {"image": ["photograph.png"], "question": f"<image>\n{asked}", "answer": "red"}
    (tmp_path / "vqa.json").write_text(json.dumps([question]))
    given = ["--vqa", tmp_path / "vqa.json", "--image-root", photograph, "--output", tmp_path / "results.json"]
    run("tools/evaluate.py", "--load", trained, "--float32", *given, ranks=1)
    trainers = json.loads((tmp_path / "results.json").read_text())["examples"][0]["prediction"]
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(photograph)
    capsys.readouterr()
    exec(snippet(), {})
    assert capsys.readouterr().out.strip() == trainers and trainers
    content = json.loads((photograph / "exported" / "config.json").read_text())
    assert content["architectures"] == ["ModalityAwareInternVLForConditionalGeneration"]
    assert content["text_config"]["architectures"] == ["MixtralForCausalLM"]
    assert content["vision_config"]["architectures"] == ["InternVLVisionModel"]


def test_an_import_is_evaluated_without_its_models_flags(start, photograph, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "You may reproduce and distribute copies of the Work."}))
    question = {"image": ["photograph.png"], "question": "<image>\nWhich colors are these?", "answer": "red"}
    (tmp_path / "vqa.json").write_text(json.dumps([question]))
    given = ["--text", tmp_path / "text.jsonl", "--vqa", tmp_path / "vqa.json", "--image-root", photograph]
    command = ["tools/evaluate.py", "--load", start, *given, "--output", tmp_path / "results.json"]
    run(*command, "--conversation-template", "mistral", ranks=1)  # a SentencePiece model has no chat template
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["text_perplexity"] > 1 and results["vqa_by_kind"]["all"]["count"] == 1


def test_a_checkpoint_and_its_export_give_the_same_answer_to_a_question(
    start, trained, convert, photograph, tmp_path, capsys
):
    from megatron_smar.commands.chat import main as chat

    assert convert("export", "--load", trained, "--hf", start / "hf", "--output", tmp_path / "exported")[0] == 0
    answers: dict[str, set[str]] = {}
    for picture in ([], ["--image", str(photograph / "photograph.png")]):
        for source in (trained, tmp_path / "exported"):
            capsys.readouterr()
            chat([str(source), "Which colors are these?", *picture, "--max-new-tokens", "6"])
            answers.setdefault(str(picture), set()).add(capsys.readouterr().out)
    assert all(len(found) == 1 for found in answers.values()), answers
    assert all(answer.strip() for found in answers.values() for answer in found)


CHAT_MISTAKES = {
    "no folder": (["{new}", "?"], "is not a folder"),
    "neither": (["{empty}", "?"], "holds no checkpoint"),
    "no processor": (["{hf}", "?"], "has no processor"),
    "no picture": (["{hf}", "?", "--image", "{new}"], "is not there: give the file of a picture"),
    "no tokens": (["{hf}", "?", "--max-new-tokens", "0"], "--max-new-tokens 0 leaves no answer"),
    "negative temperature": (["{hf}", "?", "--temperature", "-1"], "--temperature -1.0 is below 0"),
}


@pytest.mark.parametrize("case", CHAT_MISTAKES)
def test_mistakes_of_the_chat_program_are_refused_in_one_sentence(case, tmp_path, monkeypatch, capsys):
    from megatron_smar.commands.chat import main as chat

    words, message = CHAT_MISTAKES[case]
    for name in ("hf", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "internvl"}')
    monkeypatch.setattr(sys, "argv", ["tools/chat.py"])
    places = {name: tmp_path / name for name in ("new", "hf", "empty")}
    with pytest.raises(SystemExit) as end:
        chat([word.format(**places) for word in words])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and message in said and said.startswith("chat.py: error: ")


def test_the_chat_program_prints_an_answer(start, trained, photograph):
    done = run(
        "tools/chat.py", trained, "Name a colour.", "--image", photograph / "photograph.png", "--max-new-tokens", 3
    )
    assert done.stdout.strip()


def test_a_separate_language_model_is_imported_with_rows_for_the_image_tokens(start, convert, tmp_path):
    assert convert("export", "--load", start, "--hf", start / "hf", "--output", tmp_path / "out")[0] == 0
    weights, given = read(tmp_path / "out"), read(start.parent / "mixtral")
    for name, tensor in given.items():
        found = weights["language_model." + name]
        assert torch.equal(found[: len(tensor)], tensor), name
        new = found[len(tensor) :]
        assert len(new) == (3 if name in ("lm_head.weight", "model.embed_tokens.weight") else 0)
        if len(new):
            torch.testing.assert_close(new, tensor.mean(dim=0).expand_as(new))
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["text_config"]["vocab_size"] == TOKENS
    # No file of the model that the tower may have been part of.
    assert {path.name for path in (start / "hf").iterdir()} == {
        "config.json",
        "generation_config.json",
        "modeling_modality_aware.py",
        "tokenizer.model",
    }


def test_inspect_shows_what_was_trained(trained, convert):
    status, said = convert("inspect", trained)
    assert status == 0 and "expert_model_parallel_size 2" in said and "modality_routing smar" in said
    status, said = convert("inspect", trained, "--json")
    assert status == 0 and json.loads(said.splitlines()[-1])["step"] == 2
    assert convert("inspect", trained, "--iteration", 7)[0] == 2


def test_an_upcycled_model_at_first_computes_what_the_dense_one_computes(world, convert, tmp_path):
    llama = language("llama", tmp_path / "llama")
    assert convert("import", *parts(world, llama), "--output", tmp_path / "dense")[0] == 0
    dense = ["--load", tmp_path / "dense", "--hf", tmp_path / "dense" / "hf"]
    assert convert("export", *dense, "--output", tmp_path / "exported")[0] == 0
    more = ["--num-experts", 4, "--moe-router-topk", 2, "--every", 1, "--router-init-std", 1]
    assert convert("upcycle", *dense, *more, "--output", tmp_path / "mixture")[0] == 0
    assert "--num-experts 4\n" in (tmp_path / "mixture" / "flags.txt").read_text()
    run(PROGRAM, "verify", "--hf", tmp_path / "exported", "--load", tmp_path / "mixture")
    # The mixture is a Mixtral, so it can be exported too.
    mixture = ["--load", tmp_path / "mixture", "--hf", tmp_path / "mixture" / "hf"]
    assert convert("export", *mixture, "--output", tmp_path / "out")[0] == 0
    assert any("block_sparse_moe.experts.3" in name for name in read(tmp_path / "out"))


def test_a_killed_conversion_leaves_nothing_that_looks_complete_and_can_be_repeated(world, convert, tmp_path):
    output, partial = tmp_path / "checkpoint", tmp_path / "checkpoint.partial"
    llama = language("llama", tmp_path / "llama", vocab_size=400_000)  # 100 MB, written long enough to be interrupted
    command = [PROGRAM, "import", *parts(world, llama), "--output", output]
    environment = users_environment() | {"MEGATRON_SMAR_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not any(partial.glob("release/*.distcp")):
        assert time.monotonic() < end and process.poll() is None, (
            "it never began to write, or ended before it was killed"
        )
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.is_dir() and not output.exists()
    for folder in (output, partial):
        status, said = convert("export", "--load", folder, "--hf", tmp_path, "--output", tmp_path / "out")
        assert status == 2
        assert convert("inspect", folder)[0] == 2
    assert convert(*command[1:])[0] == 0
    assert not partial.exists()
    status, said = convert("inspect", output)
    assert status == 0 and "complete     yes" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_text(convert, command):
    status, said = convert(command, "--help")
    assert status == 0 and said.startswith(f"usage: convert.py {command}")
    assert len(said.splitlines()) > 5


MISTAKES = {
    "nothing to convert": (["import", "--output", "{new}"], "give either --hf, or both --language and --vision"),
    "both forms": (["import", "--hf", "{hf}", "--language", "{hf}", "--output", "{new}"], "give either --hf, or both"),
    "half a form": (["import", "--language", "{hf}", "--output", "{new}"], "give either --hf, or both"),
    "a checkpoint with parts": (
        ["upcycle", "--load", "{load}", "--language", "{hf}", "--vision", "{hf}", "--output", "{new}"],
        "--load goes with --hf",
    ),
    "an unknown flag": (["import", "--hf", "{hf}", "--output", "{new}", "--x"], "unrecognized arguments: --x"),
    "no such folder": (["import", "--hf", "{new}", "--output", "{new}"], "has no config.json"),
    "config without weights": (["import", "--hf", "{hf}", "--output", "{new}"], "must hold the model's weights"),
    "a file as output": (["export", "--load", "{load}", "--hf", "{hf}", "--output", "{file}"], "exists already"),
    "a full folder": (["export", "--load", "{load}", "--hf", "{hf}", "--output", "{hf}"], "exists already"),
    "no checkpoint": (["export", "--load", "{hf}", "--hf", "{hf}", "--output", "{new}"], "holds no checkpoint"),
    "another step": (
        ["export", "--load", "{load}", "--iteration", "3", "--hf", "{hf}", "--output", "{new}"],
        "has no iter_0000003; there are: none",
    ),
    "experts already": (
        ["upcycle", "--load", "{load}", "--hf", "{hf}", "--output", "{new}"],
        "has experts already; upcycling takes a dense model",
    ),
    "more choices than experts": (
        ["upcycle", "--load", "{load}", "--hf", "{hf}", "--output", "{new}", "--moe-router-topk", "5"],
        "--moe-router-topk is 5; give 2 to --num-experts 4",
    ),
    "nothing to compare with": (["verify", "--load", "{load}", "--hf", "{hf}"], "must hold the model's weights"),
    "nothing named": (["verify", "--load", "{load}"], "give either --hf, or both --language and --vision"),
    "half of the parts": (["verify", "--load", "{load}", "--vision", "{hf}"], "give either --hf, or both --language"),
    "a composite model and parts": (
        ["verify", "--load", "{load}", "--hf", "{hf}", "--language", "{hf}", "--vision", "{hf}"],
        "give either --hf, or both --language",
    ),
    "parts without their import": (
        ["verify", "--load", "{load}/release", "--language", "{hf}", "--vision", "{hf}"],
        "has no hf/, as an import of --language and --vision leaves it",
    ),
    "nothing to compare": (["verify", "--load", "{hf}", "--hf", "{exported}"], "holds no checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_one_sentence_and_nothing_is_written(start, convert, tmp_path, mistake):
    argv, message = MISTAKES[mistake]
    (tmp_path / "file").write_text("kept")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text((start / "hf" / "config.json").read_text())
    save_file({"w": torch.zeros(1)}, tmp_path / "exported" / "model.safetensors")
    names = {"hf": start / "hf", "load": start, "exported": tmp_path / "exported"}
    names |= {name: tmp_path / name for name in ("new", "file")}
    before = sorted(start.rglob("*"))
    status, said = convert(*(word.format(**names) for word in argv))
    assert status == 2
    last = said.splitlines()[-1]
    assert last.startswith("convert.py: error: ") and message in last, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "file"]
    assert (tmp_path / "file").read_text() == "kept" and sorted(start.rglob("*")) == before
