"""The report: one valid page without outside resources, whatever is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lhotse import MonoCut

from spear.errors import ArtifactError
from spear.evaluation.examples import choose_example, spans
from spear.evaluation.facts import RunFacts, cost_of, gather, read_lines
from spear.evaluation.pictures import Confusion, LayerRow, layer_map
from spear.evaluation.report import run_names, score_table, summary, thin, write_report
from spear.evaluation.report_parts import depth, of_section, token_table
from spear.evaluation.side_by_side import courses
from spear.files import write_json
from tests.evaluation.cuts import make_cut
from tests.evaluation.synthetic import synthetic_run, synthetic_scores

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, ids and text, and checks that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in {"src", "href", "xlink:href"}:
                self.links.append(value or "")
            if key == "aria-label" and tag == "svg":
                self.labels.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def page(full: Path) -> str:
    return write_report([full]).read_text()


def test_report_is_one_well_formed_page_that_loads_nothing(full: Path, page: str) -> None:
    assert (full / "evaluate" / "report.html").read_text() == page
    parsed = Page(page)
    assert "http:" not in page
    assert "https:" not in page
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    used = {link[1:] for link in parsed.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert used <= set(parsed.ids)


def test_report_shows_every_part_with_alternative_texts(page: str) -> None:
    parsed = Page(page)
    for question in (
        "Does it hear both worlds?",
        "Which layer to use?",
        "What do tokens look like?",
        "Where is it confused?",
        "How robust is it?",
        "How did training go?",
        "Are the codebooks in use?",
        "What did it cost?",
    ):
        assert question in page
    # the map, 3 tasks, layers and 2 x likeness, 2 examples, 2 confusions, 2 x robustness, loss and accuracy, 2 codebooks
    assert parsed.tags.count("svg") == len(parsed.labels) == 1 + 3 + 3 + 2 + 2 + 2 + 2 + 2
    assert all(len(label) > 20 for label in parsed.labels)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "#010203" not in page
    # (256 + 251 + 248 + 256) of 4 * 256 entries
    assert "<dt>entries in use</dt><dd>98.7%</dd>" in page
    assert "<td>1.60 M</td><td>150 ×</td>" in page
    assert "1.82 GiB" not in page
    assert "1.78 GiB" in page  # 1822 MiB of the pretrain stage


def test_report_is_the_same_each_time(full: Path, tmp_path: Path, page: str) -> None:
    assert write_report([full], tmp_path / "again.html").read_text() == page


@pytest.mark.parametrize(
    "missing",
    [
        "evaluate/scores.json",
        "evaluate/analysis.json",
        "evaluate/models.json",
        "metrics.jsonl",
        "evaluate/cards.json",
        "evaluate/costs.json",
        "evaluate/examples.json",
        "export/artifact.json",
    ],
)
def test_report_renders_without_a_part(tmp_path: Path, missing: str) -> None:
    exp = synthetic_run(tmp_path / "run", light=not missing.endswith(("analysis.json", "models.json")))
    (exp / missing).unlink()
    assert "<h1>run</h1>" in write_report([exp]).read_text()


def test_report_of_an_empty_run_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = write_report([tmp_path / "run"]).read_text()
    Page(page)
    assert "No scores yet: run <code>spear evaluate</code>." in page


def test_report_of_several_runs_compares_students(tmp_path: Path) -> None:
    full, other = (synthetic_run(tmp_path / name, light=True) for name in ("first", "second"))
    scores = {"phones": synthetic_scores()["phones"]}
    scores["phones"]["student"]["value"] = 0.9
    write_json(other / "evaluate" / "scores.json", scores)
    page = write_report([full, other], tmp_path / "both.html").read_text()
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "Students side by side" in page
    assert '<strong class="best">0.900</strong>' in page.partition("</table>")[0]
    own = len(Page(write_report([full]).read_text()).labels) + len(Page(write_report([other]).read_text()).labels)
    charts = parsed.labels[: len(parsed.labels) - own]
    questions = [label.partition(":")[0] for label in charts]
    assert questions[0] == "How good is each run at phones?"
    assert len(questions) > 1
    assert all(question.startswith("How many ") for question in questions[1:])
    assert re.search(r"first 0\.\d+, second 0\.900$", charts[0])


def test_courses_of_runs_are_metrics_that_two_of_them_have() -> None:
    def facts(name: str, **metrics: float) -> RunFacts:
        lines = [{"step": step, "split": split, "loss": 1.0, **metrics} for step in (5, 9) for split in ("train", "valid")]
        return RunFacts(name=name, metrics=lines)

    found = courses([facts("a", **{"accuracy/speech/x": 0.5}), facts("b", **{"accuracy/speech/x": 0.6, "accuracy/audio/x": 0.7})])
    assert found == {"accuracy/speech/x": {"a, valid": ([5.0, 9.0], [0.5, 0.5], "valid"), "b, valid": ([5.0, 9.0], [0.6, 0.6], "valid")}}


def test_report_escapes_names(tmp_path: Path) -> None:
    exp = synthetic_run(tmp_path / "a<b>&c", light=True)
    page = write_report([exp]).read_text()
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in page


def test_report_raises_artifact_error_when_the_run_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a run's folder"):
        write_report([tmp_path / "nowhere"])


def test_score_table_marks_the_best_of_each_column() -> None:
    table = score_table(of_section(synthetic_scores(), "probes"))
    best = {column["task"]: [row["label"] for row in table["rows"] if row["cells"][i]["best"]] for i, column in enumerate(table["columns"])}
    # the lowest error rate is the best
    assert best == {"phones": ["teacher speech"], "events": ["student"], "speakers": ["student"]}


def test_score_table_leaves_unscored_cells_open() -> None:
    scores = synthetic_scores()
    del scores["events"]["untrained"]
    rows = {row["label"]: row for row in score_table(of_section(scores, "probes"))["rows"]}
    assert [cell["value"] for cell in rows["untrained student"]["cells"]] == ["0.372", "–", "0.300"]


def test_summary_relates_the_student_to_the_best_teacher() -> None:
    assert summary(synthetic_scores())[0] == "phones: the student reaches 0.717 accuracy, 92% of teacher speech (0.777); log-mel ±3 frames 0.507."


def test_run_names_are_as_long_as_needed(tmp_path: Path) -> None:
    assert run_names([tmp_path / "a" / "exp", tmp_path / "b" / "exp"]) == ["a/exp", "b/exp"]
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_thin_averages_neighbours() -> None:
    assert thin([1, 2, 3, 4, 5], [1, 3, 5, 7, 9], most=3) == ([1.5, 3.5, 5.0], [2.0, 6.0, 9.0])


def test_spans_are_runs_of_true() -> None:
    assert spans([1, 1, 0, 0, 1, 0, 1]) == [(0, 2), (4, 5), (6, 7)]


def test_read_lines_leaves_out_a_cut_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(ArtifactError, match="line 1 is not valid JSON"):
        read_lines(path)


def test_cost_of_sums_time_and_takes_the_largest_memory(tmp_path: Path) -> None:
    for name, wall, memory in (("a", 3.0, 100.0), ("b", 4.0, 50.0)):
        write_json(tmp_path / name / "artifact.json", {"audio_s": 10.0, "measured": {"wall_s": wall, "peak_memory_mb": memory}})
    found = cost_of("tokens", sorted(tmp_path.rglob("artifact.json")))
    assert (found["folders"], found["audio_s"], found["wall_s"], found["peak_memory_mb"]) == (2, 20.0, 7.0, 100.0)


def test_gather_leaves_unfinished_stages_out_of_the_costs(full: Path) -> None:
    assert [row["stage"] for row in gather(full).costs] == ["manifests", "features", "quantizers", "tokens", "shards", "pretrain", "export"]


def test_choose_example_prefers_labelled_cuts_near_three_seconds() -> None:
    bare = MonoCut(id="bare", start=0, duration=3.0, channel=0, supervisions=[])
    assert choose_example([bare, make_cut("b", duration=2.5), make_cut("a", duration=2.5), make_cut("c", duration=9.0)]).id == "a"


def test_token_table_marks_the_best_and_writes_errors_in_percent() -> None:
    table = token_table(synthetic_scores())
    assert table is not None
    assert [column["title"] for column in table["columns"]][:2] == ["PNMI", "phone purity"]
    rows = {row["label"]: [(cell["value"], cell["best"]) for cell in row["cells"]] for row in table["rows"]}
    assert rows["student"][0] == ("0.610", True)
    assert rows["speech tokens"][4] == ("12.0%", False)
    assert rows["student"][4] == ("6.0%", True)
    assert rows["student"][2] == ("301", False)  # more or fewer bits are neither better nor worse
    assert token_table(of_section(synthetic_scores(), "probes")) is None


def test_layer_map_frames_the_lowest_of_an_error_rate() -> None:
    rows = [LayerRow("abx", [0.3, 0.1, None], False), LayerRow("phones", [0.2, 0.5, 0.6], True)]
    svg = layer_map("Layers", ["layer 1", "layer 2", "output"], rows, "x")
    assert 'aria-label="Layers: abx is best at layer 2 with 0.100; phones is best at output with 0.600"' in svg
    assert ">.100<" in svg


def test_confusion_names_the_pairs_that_are_confused_most() -> None:
    found = Confusion.of({"confusion": {"classes": ["a", "b", "c"], "rows": ["8 2 0", "5 5 0", "0 0 0"]}})
    assert found is not None
    assert found.worst() == ["b as a (50%)", "a as b (20%)"]
    assert found.shares()[2].tolist() == [0, 0, 0]
    assert Confusion.of({}) is None


def test_depth_puts_layers_before_the_output_and_the_weighted_sum_last() -> None:
    assert sorted(["weighted sum", "layer 10", "output", "layer 2"], key=depth) == ["layer 2", "layer 10", "output", "weighted sum"]
