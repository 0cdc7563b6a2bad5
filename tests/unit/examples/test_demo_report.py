# SPDX-License-Identifier: Apache-2.0
"""The demo's report: what a page and a JSON file must hold, and what is said where a report is incomplete."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from megatron_smar.report import style
from megatron_smar.report.html import tag

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "emoji_tiny"))  # the demo is programs, not a package

from demo_report import REQUIRED, print_table, write_report


def picture(seed: int, side: int = 64, kind: str = "PNG") -> bytes:
    """Four coloured shapes on a coloured ground, or noise where the picture is large."""
    random = np.random.default_rng(seed)
    if side > 64:
        image = Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8))
    else:
        image = Image.new("RGB", (side, side), ["#f2d98c", "#9ccbe8", "#b9dfa8"][seed % 3])
        draw = ImageDraw.Draw(image)
        for corner in range(4):
            x, y = 4 + 32 * (corner % 2), 4 + 32 * (corner // 2)
            shape = [draw.ellipse, draw.rectangle][int(random.integers(2))]
            shape((x, y, x + 22, y + 22), fill=["#c0392b", "#2c5aa0", "#e67e22", "#6c3483"][int(random.integers(4))])
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


def curve(steps: int, start: float, end: float, noise: float, seed: int) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    x = np.arange(1, steps + 1)
    values = end + (start - end) * np.exp(-4 * x / steps) + noise * random.standard_normal(steps)
    return {"steps": x.tolist(), "values": values.tolist()}


def shares(layers: int, experts: int, sharpness: float, seed: int) -> list[list[float]]:
    logits = sharpness * np.random.default_rng(seed).standard_normal((layers, experts))
    rows = np.exp(logits)
    return (rows / rows.sum(axis=1, keepdims=True)).tolist()


def make_report(layers: int = 4, experts: int = 8) -> dict[str, Any]:
    """A report such as a small run gives; the numbers are invented, the rendering is what is tested."""
    targets = np.linspace(1.35, 1.85, layers)
    stage2 = {
        "lm loss": curve(400, 3.4, 1.21, 0.05, 1),
        "lm loss validation": {"steps": [100, 200, 300, 400], "values": [2.1, 1.55, 1.34, 1.28]},
        "smar loss": curve(400, 1.3, 0.02, 0.03, 2),
        "mrd distance": curve(400, 0.15, 1.62, 0.03, 3),
    }
    for layer, target in enumerate(targets, start=1):
        stage2[f"moe/mrd_distance_layer_{layer}"] = curve(400, 0.1 + 0.03 * layer, float(target), 0.05, 10 + layer)
    questions = ["What is in the top left corner?", "How many cats are there?", "Is there a dog?", "Which colour?"]
    answers = [("cat", "cat"), ("2", "3"), ("yes", "yes"), ("blue", "blue"), ("apple", "pear"), ("bus", "bus")]
    return {
        "title": "A small vision-language mixture of experts, trained with SMAR",
        "routing": "smar",
        "retention": 0.9713,
        "text_perplexity_before": 22.84,
        "text_perplexity_after": 24.17,
        "unigram_perplexity": 512.36,
        "word_accuracy_before": 0.3124,
        "word_accuracy_after": 0.3034,
        "vqa_accuracy": 0.8326,
        "vqa_accuracy_before": 0.3091,
        "vqa_chance": 0.3157,
        "vqa_by_kind": {
            "corner": {"accuracy": 0.742, "chance": 0.031, "count": 250},
            "count": {"accuracy": 0.689, "chance": 0.447, "count": 244},
            "colour": {"accuracy": 0.968, "chance": 0.128, "count": 251},
            "presence": {"accuracy": 0.912, "chance": 0.503, "count": 255},
        },
        "mrd_distance_by_layer": (targets + 0.02).tolist(),
        "mrd_distance_by_layer_before": np.linspace(0.12, 0.31, layers).tolist(),
        "band": [1.5, 2.0],
        "steps": {"stage0": 900, "stage1": 150, "stage2": 400},
        "seconds": {
            "data": 31.2,
            "vision": 84.9,
            "stage0": 181.5,
            "stage1": 33.8,
            "stage2": 141.1,
            "evaluation": 41.3,
            "total": 513.8,
        },
        "config": {
            "model": {
                "layers": layers,
                "hidden": 192,
                "experts": experts,
                "top_k": 2,
                "vision": {"size": 64, "patch": 8},
            },
            "routing": {"strategy": "smar", "band": [1.5, 2.0], "coefficient": 0.01, "eps": 1e-6, "bias": True},
            "training": {"batch": 16, "learning_rate": 0.0005, "schedule": "cosine", "precision": "fp32"},
            "seed": 1234,
        },
        "commands": [
            "make demo",
            "torchrun --nproc-per-node 2 pretrain_vlm.py --modality-routing smar --smar-coeff 0.01 --smar-d-min 1.5 "
            "--smar-d-max 2.0 --freeze vision --load runs/demo/stage1 --save runs/demo/stage2",
        ],
        "history": {
            "stage0": {"lm loss": curve(900, 7.6, 3.13, 0.08, 4)},
            "stage1": {"lm loss": curve(150, 4.9, 2.6, 0.08, 5)},
            "stage2": stage2,
        },
        "expert_share": {
            "before": {"text": shares(layers, experts, 0.3, 1), "vision": shares(layers, experts, 0.3, 2)},
            "after": {"text": shares(layers, experts, 1.2, 3), "vision": shares(layers, experts, 1.2, 4)},
        },
        "examples": [
            {
                "image": picture(i),
                "question": questions[i % 4],
                "answer": expected,
                "prediction": given_answer,
                "correct": expected == given_answer,
            }
            for i, (expected, given_answer) in enumerate(answers)
        ],
        "comparison": [
            {
                "routing": routing,
                "retention": retention,
                "vqa_accuracy": accuracy,
                "text_perplexity_after": perplexity,
                "mrd_distance": distance,
            }
            for routing, retention, accuracy, perplexity, distance in (
                ("none", 0.9321, 0.8291, 25.62, 0.74),
                ("smar", 0.9713, 0.8326, 24.17, 1.62),
            )
        ],
    }


def page_of(report: dict[str, Any], directory: Path) -> str:
    return write_report(report, directory)[1].read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Start tags with their attributes, ids, text, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_report(), tmp_path_factory.mktemp("report"))


def test_page_needs_nothing_from_outside(page: str) -> None:
    elements = Elements(page)
    assert not elements.open
    for element, attributes in elements.tags:
        assert element not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:", "#")), (element, name, value)
    assert "@import" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    assert all(url.startswith("#") for url in re.findall(r"url\(\"?([^)]*)", page))
    assert len(page.encode()) < 3_000_000


def test_ids_of_the_figures_are_unique_and_every_reference_is_met(page: str) -> None:
    ids = [attributes["id"] for _, attributes in Elements(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", page)) <= set(ids)


def test_page_shows_every_headline_number(page: str) -> None:
    text = Elements(page).text
    for shown in ("97.1%", "22.84", "24.17", "512.36", "31.2%", "30.3%", "83.3%", "30.9%", "31.6%", "0.21", "1.62"):
        assert shown in text, shown
    for shown in (
        "1.5 to 2",
        "74.2%",
        "3.1%",
        "250",
        "8 min 34 s",
        "900",
        "make demo",
        "learning_rate",
        "vision.patch",
    ):
        assert shown in text, shown
    assert "none" in text and "93.2%" in text


def test_figures_follow_the_colours_of_a_dark_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    for name, (light, dark) in style.PALETTE.items():
        assert light not in drawings
        assert f"--{name}:{light}" in page and f"--{name}:{dark}" in page
    assert "var(--band)" in drawings and "var(--ink)" in drawings
    assert "prefers-color-scheme: dark" in page


def test_page_and_table_without_a_band_do_not_speak_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report() | {"band": None}
    text = Elements(page_of(report, tmp_path)).text
    print_table(report)
    table = capsys.readouterr().out
    assert "0.21" in text and "1.62" in text and "MRD distance, mean of layers" in table
    for shown in (text, table):
        assert "inside the band" not in shown and "1.5 to 2" not in shown and "shaded band" not in shown
    assert "[d_min, d_max] of the SMAR loss" not in text


def test_right_and_wrong_answers_are_told_apart_in_words(page: str) -> None:
    text = Elements(page).text
    assert text.count("✓ right") == 4
    assert text.count("✗ wrong") == 2


def test_html_in_texts_is_shown_and_not_run(tmp_path: Path) -> None:
    report = make_report()
    bad = "<script>alert('&')</script>"
    report["title"] = bad
    report["examples"][0] |= {"question": bad, "answer": bad, "prediction": bad}
    report["commands"] = [bad]
    report["config"] = {bad: {bad: bad}}
    report["vqa_by_kind"] = {bad: {"accuracy": 0.5, "chance": 0.1, "count": 3}}
    report["history"][bad] = {f"{bad} loss": {"steps": [1], "values": [1.0]}}
    page = page_of(report, tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_any_text_comes_back_from_the_page_as_it_was(text: str) -> None:
    elements = Elements(tag("p", f"[{text}]", title=text))
    assert elements.text == f"[{text}] "
    assert elements.tags == [("p", {"title": text})]


def test_json_holds_the_numbers_exactly(tmp_path: Path) -> None:
    report = make_report()
    read = json.loads(write_report(report, tmp_path / "new" / "folder")[0].read_text())
    wanted = ["retention", "text_perplexity_before", "text_perplexity_after", "unigram_perplexity", "vqa_accuracy"]
    wanted += [
        "vqa_chance",
        "mrd_distance_by_layer",
        "steps",
        "seconds",
        "config",
        "history",
        "expert_share",
        "comparison",
    ]
    for key in wanted:
        assert read[key] == report[key]
    assert read["examples"][1] == {
        key: report["examples"][1][key] for key in ("question", "answer", "prediction", "correct")
    }


def test_what_is_no_number_is_null_in_json_and_a_dash_on_the_page(tmp_path: Path) -> None:
    report = make_report()
    report["vqa_accuracy_before"] = math.nan
    report["unigram_perplexity"] = None
    report["text_perplexity_after"] = math.inf
    report["mrd_distance_by_layer"][1] = math.nan
    report["history"]["stage2"]["moe/mrd_distance_layer_1"]["values"][:50] = [math.nan] * 50
    report["history"]["stage2"]["lm loss"]["values"][7] = None
    report["vqa_by_kind"]["count"]["accuracy"] = math.nan
    report["expert_share"]["before"]["vision"][0] = [math.nan] * 8
    json_path, html_path = write_report(report, tmp_path)
    read = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["vqa_accuracy_before"] is None and read["text_perplexity_after"] is None
    assert read["mrd_distance_by_layer"][1] is None
    assert "nan" not in Elements(html_path.read_text()).text.lower().split()


def test_numbers_and_objects_of_other_libraries_are_written(tmp_path: Path) -> None:
    report = make_report()
    report["retention"] = np.float32(0.5)
    report["mrd_distance_by_layer"] = np.full(4, 1.5)
    report["config"] = {"path": Path("a/b"), "seed": np.int64(7), "list": (1, None, True)}
    read = json.loads(write_report(report, tmp_path)[0].read_text())
    assert read["retention"] == 0.5
    assert read["mrd_distance_by_layer"] == [1.5] * 4
    assert read["config"] == {"path": "a/b", "seed": 7, "list": [1, None, True]}


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named_in_one_sentence_and_nothing_is_written(key: str, tmp_path: Path) -> None:
    report = make_report(layers=1, experts=2)
    del report[key]
    with pytest.raises(ValueError, match=rf"^The report lacks the key '{key}': add [^\n]*\.$"):
        write_report(report, tmp_path / "out")
    with pytest.raises(ValueError, match=f"'{key}'"):
        print_table(report)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["vqa_by_kind", "count"], {"accuracy": 0.5, "count": 2}, "lacks the key 'chance' in 'vqa_by_kind.count'"),
        (["seconds"], {"data": 1.0}, "lacks the key 'total' in 'seconds'"),
        (["examples", 0], {"question": "?"}, "lacks the key 'image' in 'examples.0'"),
        (["expert_share", "after"], {"text": [[1.0]]}, "lacks the key 'vision' in 'expert_share.after'"),
        (["comparison", 1], {"routing": "smar"}, "lacks the key 'retention' in 'comparison.1'"),
        (["expert_share", "after", "text"], [[0.5, 0.5]], "'expert_share' in the report is uneven"),
        (["history", "stage0", "lm loss"], {"steps": [1, 2], "values": [3.0]}, "2 steps and 1 values"),
        (["mrd_distance_by_layer"], [1.0], "4 layers before and 1 after"),
        (["band"], [2.0, 1.5], "d_min <= d_max"),
        (["vqa_by_kind", "count", "accuracy"], "half", "'vqa_by_kind.count.accuracy' in the report is 'half'"),
        (["mrd_distance_by_layer", 2], "far", "'mrd_distance_by_layer.3' in the report is 'far'"),
        (["steps", "stage1"], "150", "'steps.stage1' in the report is '150'"),
        (["retention"], "97%", "'retention' in the report is '97%': give a number"),
    ],
)
def test_wrong_form_is_named_in_one_sentence(path: list[Any], value: Any, sentence: str, tmp_path: Path) -> None:
    report = make_report()
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_report(report, tmp_path)


def test_unreadable_picture_is_named(tmp_path: Path) -> None:
    report = make_report()
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for path in (tmp_path / "broken.png", tmp_path / "absent.png"):
        report["examples"][0]["image"] = path
        with pytest.raises(ValueError, match=f"holds {re.escape(str(path))}, which cannot be read"):
            write_report(report, tmp_path)


def test_large_pictures_and_long_runs_keep_the_page_small(tmp_path: Path) -> None:
    report = make_report(layers=32, experts=128)
    noise = picture(1, side=600, kind="PNG")
    (tmp_path / "noise.png").write_bytes(noise)
    report["examples"] = [report["examples"][0] | {"image": tmp_path / "noise.png"} for _ in range(60)]
    report["history"]["stage2"] |= {
        f"moe/mrd_distance_layer_{layer}": curve(20_000, 0.1, 1.7, 0.1, layer) for layer in range(1, 33)
    }
    page = page_of(report, tmp_path)
    assert len(page.encode()) < 3_000_000
    assert "24 of 60 held-out questions" in page
    assert "mean of 167 logged values" in page


def test_run_without_mrd_by_layer_says_so(tmp_path: Path) -> None:
    report = make_report()
    report["history"]["stage2"] = {"lm loss": report["history"]["stage2"]["lm loss"]}
    del report["comparison"]
    report["examples"] = []
    assert "logged no MRD distance by layer" in page_of(report, tmp_path)


def test_terminal_table_is_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(make_report())
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "before" in line)
    column = header.index("after") + len("after")
    for start, value in (
        ("Retention", "97.1%"),
        ("Text perplexity", "24.17"),
        ("Picture", "83.3%"),
        ("  colour", "96.8%"),
    ):
        line = next(line for line in lines if line.startswith(start))
        assert line[:column].endswith(value)
    assert lines.index(next(line for line in lines if line.startswith("  corner"))) == 1 + lines.index(
        next(line for line in lines if line.startswith("Picture"))
    )
    assert any("3 of 4" in line for line in lines)
    assert all(len(line) <= 100 and line == line.rstrip() for line in lines)


def test_the_comparison_is_missing_from_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    print_table(report)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = lines.index(["Routing", "Retention", "Text", "perplexity", "Picture", "questions", "MRD", "distance"])
    assert lines[first + 2] == ["none", "93.2%", "25.62", "82.9%", "0.74"]
    assert lines[first + 3][0] == "smar"
    del report["comparison"]
    print_table(report)
    assert "Routing" not in capsys.readouterr().out


PAIRED = {
    "seeds": 5,
    "differences": {
        "retention": {"mean": 0.012, "low": -0.004, "high": 0.028, "p": 0.0625},
        "text_perplexity_after": {"mean": -1.5, "low": -3.0, "high": 0.0, "p": 0.125},
        "vqa_accuracy": {"mean": 0.0, "low": -0.01, "high": 0.01, "p": 1.0},
        "mrd_distance": {"mean": 0.8, "low": 0.7, "high": 0.9, "p": 0.0625},
    },
}


def test_differences_over_seeds_are_missing_from_terminal_or_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = make_report() | {"paired": PAIRED}
    print_table(report)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    first = lines.index("Difference, 5 seeds mean 95% interval p")
    assert lines[first + 2] == "Retention 1.2% -0.4% to 2.8% 0.062"
    assert "paired over seeds" in page_of(report, tmp_path) and "-0.4% to 2.8%" in page_of(report, tmp_path)
    del report["paired"]["differences"]["retention"]
    with pytest.raises(ValueError, match=r"lacks the key 'retention' in 'paired\.differences'"):
        print_table(report)
