"""Writes the report on the results of runs, or of the study's files: an HTML file, a Markdown file and PNG files."""

import datetime
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

from minitune import screen
from minitune.config import arg, check_types, not_empty
from minitune.files import prove_writable, write_whole
from minitune.reports import figures, page
from minitune.reports.page import Section
from minitune.reports.results import read_results
from minitune.reports.runs import (
    answers_section,
    curves_section,
    differences_section,
    environment_section,
    sweep_section,
)
from minitune.reports.scores import comparisons_section, correlation_section, grades_section, scores_section
from minitune.reports.words import count
from minitune.screen import short, some


@dataclass(frozen=True)
class ReportConfig:
    """The options of report.py."""

    folders: tuple[str, ...] = arg(
        (),
        "run folders, or folders that contain run folders or files of the study (MODEL_topk50_nb5_t1_score.json, ...)",
        positional=True,
        metavar="DIR",
    )
    out: str | None = arg(
        None,
        "HTML file to write; NAME.md, NAME_table.png, NAME_figure.png, ... are written to the same folder; not set: report.html "
        "in the run folder, or in the working folder for several",
    )
    answers: int = arg(3, "number of best and of worst answers to show of each model; 0: none")
    resamples: int = arg(5000, "draws of the bootstrap intervals and tests that the report computes")
    seed: int = arg(0, "random seed of these draws")

    def __post_init__(self):
        check_types(self)
        not_empty(self)
        if not 10 <= self.resamples <= 1_000_000:
            raise ValueError(f"resamples is {short(self.resamples)}, expected 10 to 1,000,000 for an interval")
        if not self.folders:
            raise ValueError("no folder is given; name at least one run folder, or a folder with results")
        if self.answers < 0 or self.seed < 0:
            raise ValueError(f"answers is {short(self.answers)} and seed {short(self.seed)}, expected 0 or more")
        if self.out is not None and Path(self.out).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"out is {short(self.out)}, expected a name that ends with .html")


def default_out(folders):
    """Path of the report if --out is not set: in the run folder if there is only one, else in the working folder."""
    run = Path(folders[0])
    is_run = len(folders) == 1 and any((run / name).is_file() for name in ("config.json", "evaluation.json"))
    return (run if is_run else Path()) / "report.html"


def report(config, say=screen.say):
    """Write the report. Returns the Path of the HTML file.

    Raises ValueError, with the file and the place, if results cannot be read or there are none."""
    results = read_results(config.folders)
    out = Path(config.out or default_out(config.folders))
    prove_writable(out)
    prove_writable(out.with_suffix(".md"))
    sections, missing = write_sections(results, config)
    found = (
        (len(results.systems), "evaluated model"),
        (len(results.points), "sweep point"),
        (len(results.runs), "run folder"),
    )
    title = "Evaluation of fine-tuned models"
    summary = [
        f"{', '.join(count(n, noun) for n, noun in found if n)}. Read from "
        f"{', '.join(f'`{name}`' for name in config.folders)} on {datetime.date.today()}.",
        *results.notes,
    ]
    pictures = {out.with_name(f"{out.stem}_{name}.png"): figure for name, figure in page.pictures(sections).items()}
    for path in pictures:
        prove_writable(path)
    write_whole(out, page.as_html(title, summary, sections))
    write_whole(out.with_suffix(".md"), page.as_markdown(title, summary, sections, out.stem))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path, figure in pictures.items():
            write_whole(path, figures.png(figure))
    for warning in {str(w.message) for w in caught if "missing from font" not in str(w.message)}:
        say(f"while drawing: {warning}")
    if any("missing from font" in str(w.message) for w in caught):
        say(
            "the PNG files show boxes for characters that matplotlib's font does not have; the HTML page shows the characters"
        )
    for note in results.notes:
        say(page.one_line(note).replace("`", ""))
    if results.not_understood:
        say(f"files of an unknown kind, left out: {some(results.not_understood)}")
    say(f"written: {', '.join(map(str, [out, out.with_suffix('.md'), *pictures]))}")
    say(next_command(out, results, missing))
    return out


def next_command(out, results, missing):
    """The last line of the output: what to do next."""
    whole = [
        found for line in missing for found in re.findall(r"`(python [^`]*)`", line) if not re.search("DIR|FILE", found)
    ]
    commands = [*results.commands, *whole]
    more = f", or compute what is missing: {commands[0]}" if commands else ""
    return page.one_line(f"next: open {shlex.quote(str(out))} in a browser{more}")


def write_sections(results, config):
    """(list of Sections for some Results, list of sentences on what is missing, which are also the last section)."""
    missing = []
    found = [
        scores_section(results, config, missing),
        differences_section(results),
        grades_section(results, config, missing),
        comparisons_section(results, missing),
        sweep_section(results, missing),
        curves_section(results, missing),
        answers_section(results, config, missing),
        correlation_section(results, config, missing),
        environment_section(results, missing),
    ]
    if missing:
        found.append(Section("Not in this report", missing))
    return [section for section in found if section], missing
