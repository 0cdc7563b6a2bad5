# SPDX-License-Identifier: Apache-2.0
"""examples/smollm2_moe: weights from GGUF, the comparison of models, the time left, the table, and its run files."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_smar import runtime

runtime.install("cpu")

from megatron_smar.config.run_file import flag_parser, read_flags
from megatron_smar.routing.strategies import STRATEGIES
from tests.launch import ROOT

EXAMPLE = ROOT / "examples" / "smollm2_moe"
sys.path[:0] = [str(ROOT / "examples" / "emoji_tiny"), str(EXAMPLE)]  # programs, not packages

import outcome
from agreement import Agreement, compare_weights
from documents import replace_between_marks
from progress import Progress, expected
from recipe import Recipe, read_yaml, variants
from variants import words
from weights import convert, read_tokenizer

# ---- weights


def write_gguf(path: Path, kind: str = "smollm") -> dict[str, np.ndarray]:
    """Writes a small random Llama as GGUF; returns its embedding and a norm."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "Ġc", "at"]
    merges = ["Ġ c", "a t"]
    hidden, inner, layers, heads = 32, 64, 2, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        name = f"blk.{layer}."
        shapes |= {f"{name}{part}": (hidden, hidden) for part in ("attn_q", "attn_output")}
        shapes |= {f"{name}{part}": (hidden // 2, hidden) for part in ("attn_k", "attn_v")}
        shapes |= {f"{name}{part}": (inner, hidden) for part in ("ffn_gate", "ffn_up")}
        shapes |= {f"{name}ffn_down": (hidden, inner), f"{name}attn_norm": (hidden,), f"{name}ffn_norm": (hidden,)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def test_a_gguf_file_becomes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arrays = write_gguf(tmp_path / "small.gguf")
    parameters = convert(tmp_path / "small.gguf", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    weights = dict(model.named_parameters())
    assert parameters == sum(weight.numel() for weight in weights.values())
    for name, there in {"token_embd": "model.embed_tokens", "blk.1.ffn_up": "model.layers.1.mlp.up_proj"}.items():
        assert torch.equal(weights[f"{there}.weight"], torch.from_numpy(arrays[name]))
    assert model.config.rms_norm_eps == 1e-5 and model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert tokenizer.decode(tokenizer("a cat\n12")["input_ids"]) == "a cat\n12"
    assert not list(tmp_path.glob("*.partial"))


def test_numbers_are_split_into_digits_with_the_spaces_before_them_apart(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    split = read_tokenizer(tmp_path / "small.gguf").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a  12 b")] == ["a", "ĠĠ", "1", "2", "Ġb"]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf", "llama-bpe")
    with pytest.raises(ValueError, match="has a tokenizer of the kind 'llama-bpe'; this program knows 'smollm'"):
        read_tokenizer(tmp_path / "small.gguf")


# ---- agreement


def test_weights_are_found_under_an_exports_names_and_compared_bit_for_bit() -> None:
    original = {"model.norm.weight": torch.ones(3), "model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2)}
    exported = {
        "model.language_model.norm.weight": torch.ones(3),
        "model.language_model.embed_tokens.weight": torch.arange(10.0).reshape(5, 2),  # with rows of image tokens
        "model.vision_tower.norm.weight": torch.zeros(3),
    }
    assert compare_weights(original, exported) == 2
    exported["model.language_model.norm.weight"] = torch.tensor([1.0, 1.0, 1.0000001])
    assert compare_weights(original, exported) == 1


@pytest.mark.parametrize(
    ("changes", "agrees"), [({}, True), ({"identical": 1}, False), ({"agreeing": 4}, False), ({"difference": 2}, False)]
)
def test_agreement_needs_weights_logits_and_tokens(changes: dict[str, float], agrees: bool) -> None:
    numbers = {"weights": 2, "identical": 2, "difference": 0.5, "largest": 9, "agreeing": 5, "positions": 5}
    assert Agreement(**(numbers | changes)).within(1.0) is agrees


# ---- progress


def test_the_expected_duration_is_that_of_a_steps_name_or_kind() -> None:
    seconds = {"stage1": 7, "stage": 5, "evaluation": 3, "other": 1}
    steps = {"stage1": 7, "stage3_smar": 5, "evaluation_none": 3, "shards": 1}
    assert {name: expected(name, seconds) for name in steps} == steps
    assert expected("shards", {}) == 0


def test_the_time_left_follows_what_the_steps_took(tmp_path: Path) -> None:
    progress = Progress(["a", "b", "c"], {"a": 10, "b": 10, "c": 20}, tmp_path / "logs" / "progress.log")
    progress.begin("a")
    assert progress.left("a") == 40
    progress.end("a", 24)
    # A tenth of the whole (4 s) counts as if it had taken what was expected: (4 + 24) / (4 + 10) = 2.
    assert progress.left("b") == pytest.approx(60) and progress.left("c") == pytest.approx(40)
    log = (tmp_path / "logs" / "progress.log").read_text().splitlines()
    assert log[0].endswith("step 1 of 3, a; about 40.0 s left for all") and log[1].endswith("a done in 24.0 s")


# ---- table


def results(pictures: float, distance: float) -> dict[str, object]:
    return {"vqa_accuracy": pictures, "mrd_distance_by_layer": [distance - 0.1, distance + 0.1]}


def estimate(value: float, stderr: float | None) -> dict[str, object]:
    return {"value": value, "stderr": stderr}


RESULTS = {"start": results(0.0, 0.4), "smar": results(0.5, 1.2), "none": results(0.25, 0.6)}
TABLE = {
    "average_before": estimate(0.5, 0.01),
    "after": {
        "smar": {"average": estimate(0.49, 0.01), "retention": estimate(0.98, 0.028)},
        "none": {"average": estimate(0.4, 0.01), "retention": estimate(0.8, None)},
    },
}


def test_the_table_has_the_start_and_every_variant(tmp_path: Path) -> None:
    rows = outcome.make_rows(RESULTS, "start", TABLE)
    text = outcome.markdown(rows, ["One run."], "details")
    assert text.startswith("One run.\n\n| stage 3 | language | retention | picture questions | MRD distance |")
    assert "| before stage 3 | 50.0% | 100.0% | 0.0% | 0.40 |" in text
    assert "| smar | 49.0% | 98.0% ± 2.8 | 50.0% | 1.20 |" in text
    assert "| none | 40.0% | 80.0% | 25.0% | 0.60 |" in text and text.endswith("\n\ndetails")
    outcome.write(rows, ["One run."], "details", tmp_path)
    assert (tmp_path / "results.png").stat().st_size > 5000 and (tmp_path / "results.json").is_file()


def test_without_language_benchmarks_their_cells_are_empty(tmp_path: Path) -> None:
    rows = outcome.make_rows(RESULTS, "start", None)
    assert "| smar | - | - | 50.0% | 1.20 |" in outcome.markdown(rows, [], "")
    outcome.write(rows, [], "", tmp_path)


def test_the_readme_has_the_marks_that_the_table_is_written_between(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text((EXAMPLE / "README.md").read_text())
    replace_between_marks(document, "the table", outcome.MARKS)
    assert f"{outcome.MARKS[0]}\nthe table\n{outcome.MARKS[1]}" in document.read_text()


# ---- run files


@pytest.mark.parametrize("size", read_yaml("sizes"))
def test_every_size_has_its_layouts_and_flags_that_the_trainer_knows(size: str) -> None:
    known = flag_parser()
    for stage in ("stage1", "stage3"):
        for flags in variants().values():
            merged = read_flags(EXAMPLE / "training.yaml", size) | read_flags(EXAMPLE / f"{stage}.yaml", size) | flags
            arguments = known.parse_args(words(merged))
            STRATEGIES[arguments.modality_routing].from_arguments(arguments)
            ranks = read_yaml("sizes")[size]["ranks"]
            assert arguments.global_batch_size % (arguments.micro_batch_size * ranks) == 0
            assert ranks % arguments.expert_model_parallel_size == 0


@pytest.mark.parametrize("language", [None, Path("some/model")])
@pytest.mark.parametrize("with_tasks", [True, False])
def test_the_steps_are_named_in_advance(tmp_path: Path, language: Path | None, with_tasks: bool) -> None:
    recipe = Recipe(tmp_path, tmp_path, size="quick", language=language, with_tasks=with_tasks)
    names = recipe.names()
    assert ("weights" in names) is (language is None) and ("tasks" in names) is with_tasks
    assert names[-6:] == [f"{kind}_{name}" for name in variants() for kind in ("stage3", "evaluation")]
    assert len(set(names)) == len(names) and not list(tmp_path.iterdir())


def test_the_default_takes_less_than_the_90_minutes_that_the_readme_promises(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, tmp_path, size="cpu")
    assert recipe.progress.left(recipe.names()[0]) < 90 * 60
