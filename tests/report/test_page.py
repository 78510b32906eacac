"""Reports: one file that asks for nothing outside it, with the same words in HTML and Markdown; figures twice are the same bytes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pandas as pd
import pytest

from repro import app
from repro.experiments import base
from repro.experiments.study_figures import draw_goodput
from repro.paper.claims import CLAIMS
from repro.record.directory import Record
from repro.record.metrics import value
from repro.report import claims_page, document, page, style
from repro.report.figures import redraw
from repro.report.page import Cell, Column, Line, Section, Table

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a committed record with its figures drawn anew."""
    run = tmp_path_factory.mktemp("run") / "table6" / "model"
    shutil.copytree(REFERENCE / "table6" / "model", run)
    record = Record(run)
    redraw(record, run / "figures", base.load("table6").figures_for("model"))
    return document.write(run, "table6", "A question?", [record])


def test_tiers_of_one_experiment_stand_side_by_side_with_the_papers_value(tmp_path: Path) -> None:
    records = [Record(REFERENCE / "table6" / tier) for tier in ("model", "simulate", "emulate")]
    document.write(tmp_path, "case_study", "A question?", records)
    text = (tmp_path / "report.md").read_text()
    assert "| case | metric | paper | model | simulate | emulate |" in text
    found = [value(one.metrics, "lambda_max", "prfaas_pd") for one in records]
    (row,) = [line for line in text.splitlines() if line.startswith("| prfaas_pd | lambda_max | 3.24 req/s | ")]
    printed = [float(cell.split()[0]) for cell in row.strip("| ").split(" | ")[3:]]
    assert printed == pytest.approx(found, rel=2e-3)


def test_a_report_is_one_file_that_asks_for_nothing_outside_it(report: Path) -> None:
    text = report.read_text()
    without_figures = re.sub(r"data:[^\"]+", "", text)
    assert "http" not in without_figures
    assert '<link rel="stylesheet' not in text
    assert not re.search(r"<script[^>]+src=", text)
    assert "data:image/svg+xml;base64," in text


def test_a_claim_leads_to_its_run_and_that_to_its_command(report: Path) -> None:
    text = report.read_text()
    targets = set(re.findall(r'href="#([^"]+)"', text))
    assert "table6-tier-model" in targets
    assert targets <= set(re.findall(r'id="([^"]+)"', text))
    assert re.search(r"<pre><code>python -m repro experiment=table6", text)


def test_markdown_has_the_words_of_the_page(report: Path) -> None:
    markdown = report.with_name("report.md").read_text()
    assert "PrfaaS-PD sustains 3.24 req/s." in markdown
    assert "| claim | paper | ours | verdict |" in markdown
    assert "- commit: " in markdown


def test_texts_are_escaped_and_numbers_sort_as_numbers(tmp_path: Path) -> None:
    table = Table(
        [Column("a"), Column("b", True)], [[Cell("<b>|"), Cell.of("1.5 Gbps", 1.5e9)]], "All: 1", code="x < y"
    )
    text = page.write(
        tmp_path, "t<i>", "q", [Section("S", ("<p>",), (), (table,))], [("k", "v")], [Line("f", "finding")]
    ).read_text()
    assert "&lt;b&gt;|" in text
    assert "t&lt;i&gt;" in text
    assert 'data-order="1500000000.0"' in text
    assert "\\|" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["table6", "cost"])
def test_a_figure_drawn_twice_is_the_same_file_and_says_what_it_is_of(tmp_path: Path, name: str) -> None:
    record = Record(REFERENCE / name / "model")
    drawn = base.load(name).figures_for("model")
    for target in ("first", "second"):
        redraw(record, tmp_path / target, drawn)
        redraw(record, tmp_path / target, drawn, for_print=True)
    first = sorted((tmp_path / "first").iterdir())
    assert {path.suffix for path in first} == {".png", ".svg", ".pdf"}
    for path in first:
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    assert b"tier model" in next(path for path in first if path.suffix == ".png").read_bytes()
    assert b"tier model" in next(path for path in first if path.suffix == ".svg").read_bytes()


def test_the_claims_page_has_command_time_hardware_and_tolerance_of_every_claim() -> None:
    found = [Record(REFERENCE / name / tier) for name, tier in (("table6", "model"), ("table3", "model"))]
    text = claims_page.page(found)
    assert sum(line.startswith("| ") for line in text.splitlines()) - text.count("| claim |") == len(CLAIMS)
    assert "- command: `python -m repro experiment=table6 tier=model`" in text
    assert "- hardware: " in text
    assert "- no reference record" in text, "and says where there is no record"


def test_a_figure_for_one_column_is_as_wide_as_one(tmp_path: Path) -> None:
    record = Record(REFERENCE / "table6" / "model")
    (png,) = redraw(record, tmp_path, base.load("table6").figures_for("model"), column="single")
    width = int.from_bytes(png.read_bytes()[16:20], "big")
    assert abs(width / 150 - style.SINGLE_IN) < 0.1


def test_panels_of_unequal_heights_stand_below_each_other_in_one_column() -> None:
    with style.applied("single"):
        figure, axes = style.panels(2, 2, height_ratios=(2, 1))
        figure.draw_without_rendering()
    heights = [axis.get_position().height for axis in axes]
    assert heights[0] == pytest.approx(heights[1])
    assert heights[0] > heights[2]


def test_a_figure_is_no_wider_than_the_page_and_breaks_what_is_longer_than_its_axis() -> None:
    with style.applied():
        figure, axes = style.panels(3, width_in=11.0)
        axes[0].set(title="A title with far more words than a third of a page has room for", xlabel="short")
        style._wrap(figure)
    assert figure.get_figwidth() == style.DOUBLE_IN
    assert "\n" in axes[0].get_title(loc="left")
    assert axes[0].get_xlabel() == "short"


@pytest.mark.parametrize("letters", [3, 40])
def test_bars_keep_their_room_whatever_their_names(letters: int, tmp_path: Path) -> None:
    shutil.copytree(REFERENCE / "burst" / "simulate", tmp_path / "run")
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    metrics["case"] = [f"{case[:1]}{'n' * letters}" if isinstance(case, str) else case for case in metrics["case"]]
    metrics.to_csv(tmp_path / "run" / "metrics.csv", index=False)
    with style.applied(), warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where nothing is left of an axis
        figure = draw_goodput(Record(tmp_path / "run"))
        style._wrap(figure)
        figure.draw_without_rendering()
    assert all(axis.get_window_extent().width > 0.2 * figure.bbox.width for axis in figure.axes)


#: Shows a report in frames of a phone's and a desktop's width, light and dark, and writes down what can be seen in each.
FRAMES = """<!doctype html><title>frames</title><link rel="icon" href="data:,">
<iframe width="390" height="800" data-theme="light"></iframe><iframe width="390" height="800" data-theme="dark"></iframe>
<iframe width="1280" height="800" data-theme="light"></iframe><iframe width="1280" height="800" data-theme="dark"></iframe>
<pre id="found"></pre>
<script>
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(linear);
  return .2126 * r + .7152 * g + .0722 * b; };
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  frame.addEventListener("load", () => {
    const page = frame.contentDocument, root = page.documentElement, style = e => page.defaultView.getComputedStyle(e);
    root.dataset.theme = frame.dataset.theme;
    const row = page.querySelector("section[aria-labelledby=claims] tbody").rows[0];
    const inside = box => box.left >= 0 && box.right <= frame.width;
    const seen = [...row.cells].slice(0, 4).every(cell => inside(cell.getBoundingClientRect()));
    const paper = style(page.body).backgroundColor;
    const least = Math.min(...["body", "a", ".question", ".reproduced", ".input", "figcaption", "dt"].map(
      name => contrast(style(page.querySelector(name)).color, paper)));
    const fits = root.scrollWidth <= frame.width, dark = light(paper) < .2;
    found.push({width: +frame.width, theme: frame.dataset.theme, seen, least, fits, dark});
    document.getElementById("found").textContent = JSON.stringify(found);
  });
  frame.src = "report.html";
}
</script>
"""


@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desktop_in_light_and_dark_and_says_nothing_on_the_console(
    report: Path, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    frames = report.with_name("frames.html")
    frames.write_text(FRAMES)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}",
         "--allow-file-access-from-files", "--window-size=1400,3400", "--virtual-time-budget=10000", "--dump-dom", f"file://{frames}"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    seen = json.loads(html.unescape(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0]))
    assert {(one["width"], one["theme"]) for one in seen} == {(w, t) for w in (390, 1280) for t in ("light", "dark")}
    for one in seen:
        assert one["fits"], f"wider than {one['width']} px"
        assert one["seen"], "claim, paper, ours and verdict are in sight"
        assert one["least"] >= 4.5, "text stands out from its ground"
        assert one["dark"] == (one["theme"] == "dark")
    assert "CONSOLE" not in done.stderr


def test_a_comparison_has_a_report_in_the_same_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [str(REFERENCE / "table6" / tier) for tier in ("model", "simulate")]
    assert app.main(["compare", *sides, "--results", str(tmp_path), "--to", str(tmp_path / "c.tex")]) == 0
    out = capsys.readouterr().out
    folder = Path(out.splitlines()[-1])
    assert "Against simulate" in (folder / "report.html").read_text()
    assert "\\toprule" in (tmp_path / "c.tex").read_text()
    assert (folder / "comparison.csv").is_file()
