# SPDX-License-Identifier: Apache-2.0
"""The demo's steps and variants: what is run again and what is kept, and which routing is refused."""

import json
import sys
import time
from pathlib import Path

import pytest

from megatron_smar import runtime

runtime.install("cpu")

from megatron_smar.routing.strategies import STRATEGIES

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "emoji_tiny"))  # the demo is programs, not a package

from comparison import MARKS, markdown_table, notes, terminal_table, write_comparison
from documents import replace_between_marks
from steps import Step
from variants import find_variant, settings, variants, words


class Work:
    """Writes a file into the step's folder, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times = folder, 0

    def __call__(self) -> None:
        self.times += 1
        (self.folder / "result").write_text(str(self.times))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "step")


# ---- steps


def test_a_step_is_run_again_for_other_settings_other_code_or_another_input(work: Work) -> None:
    first = Step("a", work.folder.with_name("input"), code="old")
    first.run(lambda: None)

    def step(*key: object, code: str = "old", inputs: tuple[Step, ...] = (first,)) -> Step:
        return Step("b", work.folder, *key, inputs=inputs, code=code)

    step(1).run(work)
    step(1).run(work)
    assert work.times == 1
    step(2).run(work)
    assert work.times == 2
    step(2, code="new").run(work)
    assert work.times == 3
    other = Step("a", work.folder.with_name("input"), code="new")
    other.run(lambda: None)
    step(2, code="new", inputs=(other,)).run(work)
    assert work.times == 4


def test_any_code_keeps_a_result_of_other_code_and_says_so(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    Step("a", work.folder, 1, code="old").run(work)
    kept = Step("a", work.folder, 1, code="new", any_code=True)
    after = Step("b", work.folder.with_name("next"), inputs=[kept], code="new", any_code=True)
    kept.run(work)
    after.run(lambda: None)
    assert work.times == 1 and "done before with other code" in capsys.readouterr().out
    assert not kept.is_current and after.made_by == after.code and not after.is_current
    Step("a", work.folder, 2, code="new", any_code=True).run(work)
    assert work.times == 2, "other settings are run again, whatever the code"


def test_an_interrupted_step_goes_on_in_its_folder_and_its_time_is_added(work: Work) -> None:
    def interrupted() -> None:
        work()
        time.sleep(0.3)
        raise KeyboardInterrupt

    step = Step("a", work.folder, 1, code="c")
    with pytest.raises(KeyboardInterrupt):
        step.run(interrupted)
    assert not step.is_done()

    def rest() -> None:
        assert (work.folder / "result").exists(), "the first part is lost"
        time.sleep(0.3)

    step.run(rest)
    assert step.is_done() and 0.6 <= step.seconds < 5
    step = Step("a", work.folder, 2, code="c")
    with pytest.raises(KeyboardInterrupt):
        step.run(interrupted)
    Step("a", work.folder, 3, code="c").run(lambda: None)
    assert not (work.folder / "result").exists(), "what another step left is not part of this one"


def test_cpu_time_is_that_of_the_programs_which_the_step_ran(work: Work) -> None:
    import subprocess

    busy = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    step = Step("a", work.folder, 1)
    step.run(lambda: subprocess.run([sys.executable, "-c", busy], check=True) and None)
    assert 0.4 <= step.cpu_seconds < 3


# ---- variants


@pytest.mark.parametrize("name", variants())
def test_every_variant_is_accepted_by_the_parser_and_by_its_strategy(name: str) -> None:
    variant = find_variant(name)
    assert variant.routing in STRATEGIES
    assert variant.label == name


def test_every_strategy_can_be_the_routing_of_the_demo() -> None:
    assert {find_variant(name).routing for name in variants()} == set(STRATEGIES)
    assert STRATEGIES.keys() <= variants().keys()


def test_the_default_is_the_papers_stage_2_as_its_file_has_it() -> None:
    default = find_variant("smar")
    assert default.flags == {} and default.routing == settings("stage2")["modality-routing"] == "smar"
    assert default.folder(Path("runs/demo")) == Path("runs/demo")


def test_no_two_variants_have_one_folder() -> None:
    some = [find_variant(name) for name in variants()]
    some += [find_variant("smar", [change]) for change in ("smar-coeff=0.1", "smar-coeff=0.2", "smar-d-min=0.1")]
    folders = [variant.folder(Path("runs/demo")) for variant in some]
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == Path("runs") and folder.name.startswith("demo") for folder in folders)


def test_changes_are_flags_of_stage_2_with_yaml_values() -> None:
    variant = find_variant("hard", ["hard-experts=[text=0-5, vision=6-7]", "lr=1e-3"])
    assert words(variant.flags) == [
        *("--modality-routing", "hard", "--hard-experts", "text=0-5", "vision=6-7", "--lr", "1e-3")
    ]
    assert variant.label == "hard hard-experts=text=0-5,vision=6-7 lr=1e-3"


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("smaer", [], r"^there is no routing smaer; give one of smar, none"),
        ("smar", ["smar-coef=1"], r"^smar: smar-coef is not a flag \(close to it: smar-coeff.*--help lists them\.$"),
        ("smar", ["smar-coeff"], r"^--set smar-coeff has no value: give it as flag=value"),
        ("smar", ["smar-coeff=[1"], r"^--set smar-coeff=\[1 has no YAML value"),
        ("smar", ["smar-coeff=much"], r"^smar: .*smar-coeff.*much"),
        ("smar", ["smar-d-min=3"], r"^--smar-d-min 3.0 and --smar-d-max 2.0 are not a band"),
        ("none", ["hard-experts=[text=0-3]"], r"^--hard-experts text=0-3 has no effect with --modality-routing none"),
    ],
)
def test_a_wrong_routing_is_refused_in_one_sentence(name: str, changes: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_variant(name, changes)


# ---- the comparison


def row(name: str, **changes: object) -> dict[str, object]:
    numbers = {"retention": 0.9713, "text_perplexity": 24.17, "vqa_accuracy": 0.8326, "msi": 0.61, "mrd_distance": 1.62}
    spent = {"seconds": 201.4, "cpu_seconds": 377.7}
    return (
        {"routing": name, "flags": {}, "crossing": None, "crossing_placed": None, "is_current": True}
        | numbers
        | spent
        | changes
    )


START = row("before stage 2", retention=1.0, seconds=None, cpu_seconds=None)


def test_the_table_shows_every_number_and_no_column_that_nobody_measured() -> None:
    text = markdown_table([START, row("none"), row("hard", crossing=0.25)], 1234, "python compare.py")
    assert text.startswith("`python compare.py`. One run of each, seed 1234: ")
    assert "| stage 2 | retention | text perplexity | picture questions | MSI | MRD distance | crossing |" in text
    assert "| none | 97.1% | 24.17 | 83.3% | 0.61 | 1.62 | - | 201 | 378 |" in text
    assert "| hard | 97.1% | 24.17 | 83.3% | 0.61 | 1.62 | 25.0% | 201 | 378 |" in text
    lines = text.splitlines()[2:]
    assert len({line.count("|") for line in lines}) == 1
    assert "crossing" not in terminal_table([START, row("none")], 1234)


def test_results_of_other_code_are_marked_in_the_table() -> None:
    rows = [START, row("none"), row("hard", is_current=False)]
    assert "| hard * |" in markdown_table(rows, 1, "c") and "| none |" in markdown_table(rows, 1, "c")
    assert "Rows with * were made by another version of the code" in " ".join(notes(rows, 1))
    assert "*" not in " ".join(notes(rows[:2], 1))


def test_the_table_replaces_what_is_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"a\n{MARKS[0]}\nold\n{MARKS[1]}\nb\n")
    replace_between_marks(document, "new", MARKS)
    replace_between_marks(document, "newer", MARKS)
    assert document.read_text() == f"a\n{MARKS[0]}\nnewer\n{MARKS[1]}\nb\n"
    for content in ("no marks", f"{MARKS[1]}\n{MARKS[0]}"):
        document.write_text(content)
        with pytest.raises(ValueError, match="does not have the lines"):
            replace_between_marks(document, "new", MARKS)
        assert document.read_text() == content
    with pytest.raises(ValueError, match="cannot be read"):
        replace_between_marks(tmp_path / "absent.md", "new", MARKS)


def test_values_that_are_no_numbers_are_null_in_json_and_leave_a_gap_in_the_figure(tmp_path: Path) -> None:
    write_comparison([START, row("none", mrd_distance=float("nan")), row("hard")], 7, "command", tmp_path)
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["rows"][1]["mrd_distance"] is None and content["seed"] == 7
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_documents_that_are_written_into_have_the_marks() -> None:
    text = (Path(__file__).parents[3] / "docs" / "strategies.md").read_text()
    assert 0 < text.index(MARKS[0]) < text.index(MARKS[1])
