"""The sections of a report with scores: the study's table, human grades, tuned against base, metrics beside human grades.

Intervals and p-values of grades are computed here. The values of the metrics come from evaluation.json or the study's files."""

from itertools import combinations
from typing import NamedTuple

from minitune.metrics.correlation import correlate
from minitune.metrics.significance import bootstrap_interval, paired_bootstrap, paired_permutation
from minitune.reports.commands import evaluate_command, example_run
from minitune.reports.page import Cell, Folded, Section, Table
from minitune.reports.results import by_prompts, table_lines
from minitune.reports.words import (
    FIGURE,
    GRADE_NAMES,
    ORDER,
    TABLE,
    count,
    interval_words,
    metric,
    minus,
    options_words,
    p_words,
    shown,
    superscript,
    terms_apart,
    with_arrow,
)
from minitune.study.files import AVERAGES, GRADES

JUDGES = {"bertscore": "--encoder", "perplexity": "--judge"}  # metric -> option of evaluate.py that names its model
FILE_OF_GRADES = (  # see study/files.py
    "a list of `index`, `grammatical_correctness`, `coherence`, `correctness_of_answer` and `comment`, one for each answer"
)


def scores_section(results, config, missing):
    """The study's table: one row for each model, with its base. Models that answered other prompts have a separate table."""
    groups = by_prompts(table_lines(results.systems))
    tables, there, pictures = [], set(), 0
    for prompts, lines in groups:
        scored = [(label, with_grades(s, config), with_grades(base, config)) for label, s, base in lines]
        columns = [name for name in TABLE if any(name in s or name in b for _, s, b in scored)]
        there |= {*columns}
        if columns:
            pictures += 1
            picture = "table" if pictures == 1 else f"table_{pictures}"
            words = prompts if len(groups) > 1 else "the held-out prompts"
            tables.append(scores_table(f"Scores of the answers to {words}", lines, scored, columns, config, picture))
        if (other := other_metrics_table(lines, scored, prompts if len(groups) > 1 else "")) is not None:
            tables.append(other)
    if absent := [name for name in FIGURE if name not in there]:
        judges = [f" {JUDGES[name]} DIR" for name in absent if name in JUDGES]
        command = f"`{evaluate_command(results)}{''.join(judges)}`"
        missing.append(f"{', '.join(metric(name).label for name in absent)}: {command}")
    if not tables:
        return None
    apart = (
        f"Not all models answered the same prompts: {'; '.join(prompts for prompts, _ in groups)}. Each set of prompts has its "
        "own table; do not compare scores across tables."
    )
    return Section("Scores", [apart, *tables] if len(groups) > 1 else tables)


def scores_table(caption, lines, scored, columns, config, picture):
    """The Table of models that answered the same prompts.

    lines: rows of table_lines(). scored: [(label, its scores, scores of its base), ...]. columns: metrics. picture: name of the
    PNG."""
    systems = [system for _, system, _ in lines]
    notes, rows = [], []
    settings, apart = [options_words(system.options) for system in systems], terms_apart(systems)
    for (label, own, of_base), below in zip(scored, apart, strict=True):
        rows.append([Cell(label, below=below), *[score_cell(n, own.get(n), of_base.get(n), notes) for n in columns]])
    common = [f"Decoded with {settings[0]}."] if len(set(settings)) == 1 and settings[0] else []
    common += (
        ["The small lines below a name give settings of decoding and scoring that are not the same for all."]
        if any(apart)
        else []
    )
    note = " ".join([*common, how_computed(systems, config, scored), *footnotes(notes)])
    header = ["Model", *[with_arrow(name) for name in columns]]
    return Table(f"{caption} (↑ higher is better, ↓ lower is better)", header, rows, note, picture=picture)


def other_metrics_table(lines, scored, prompts):
    """A Table of the metrics that are not in the study's table, with one column for each model; None if there are none."""
    found = {name for _, s, b in scored for name in (*s, *b)} - set(TABLE)
    names = [name for name in ORDER if name in found] + sorted(found - set(ORDER))
    if not names:
        return None
    notes, rows = [], []
    for name in names:
        rows.append([with_arrow(name), *[score_cell(name, s.get(name), b.get(name), notes) for _, s, b in scored]])
    title = "Other metrics" + (f": {prompts}" if prompts else "")
    header = ["Metric", *[label for label, _, _ in lines]]
    apart = [
        f"{label}: {'; '.join(below)}."
        for (label, _, _), below in zip(lines, terms_apart([s for _, s, _ in lines]), strict=True)
        if below
    ]
    table = Table(f"{title}, one column for each model", header, rows, " ".join([*footnotes(notes), *apart]))
    return Folded(title, [table]) if len(names) > 4 else table


def with_grades(system, config):
    """{metric: Interval} of a System, including its human evaluation; {} for None."""
    if system is None:
        return {}
    if not system.grades:
        return system.scores
    drawn = bootstrap_interval(system.grades.of_examples(), resamples=config.resamples, seed=config.seed)
    return {**system.scores, "human": drawn._replace(value=system.grades.averages()[AVERAGES[-1]])}


def footnotes(notes):
    return [f"{superscript(number)} {sentence(note)}" for number, note in enumerate(notes, 1)]


def sentence(note):
    """A note of evaluation.json as a sentence."""
    return f"{note[:1].upper()}{note[1:]}."


def score_cell(name, score, of_base, notes):
    """A Cell with value and interval of a model and of its base, two Intervals or None. New notes are added to the list `notes`,
    whose numbers become the footnotes."""
    if score is None and of_base is None:
        return "–"
    lines = []
    for found in (score, of_base):
        text = shown(name, found.value) if found else "–"
        if found and found.note and found.n:  # n is 0 for published scores, which how_computed() explains
            notes += [found.note] if found.note not in notes else []
            text += superscript(notes.index(found.note) + 1)
        lines.append((text, interval_words(name, found) if found else ()))
    (text, interval), (base, base_interval) = lines
    below = [*interval, *([f"base {base}", *base_interval] if of_base else [])]
    return Cell(text, score.value if score else None, tuple(below))


def how_computed(systems, config, scored):
    """Sentences on how the values and intervals of the table were computed."""
    words = []
    made = [(s.settings.get("resamples"), s.settings.get("seed")) for s in systems if s.settings]
    if made:
        draws = "; ".join(f"{draws} draws, seed {seed}" for draws, seed in dict.fromkeys(made))
        words.append(
            f"In brackets: 95 % bootstrap intervals over the examples, as evaluation.json gives them ({draws})."
        )
    if any(s.role == "published" and s.scores for s in systems):
        published = ", ".join(metric(name).label for name in FIGURE if any(name in s for _, s, _ in scored))
        words.append(
            f"{published} are as published: means without the values of single answers, so they have no interval."
        )
    if graded := [s for s in systems if s.grades]:
        sizes = sorted({len(s.grades.rows) for s in graded})
        words.append(
            f"Human evaluation: mean of three grades over {' or '.join(map(str, sizes))} answers, recomputed from the grades; in "
            "brackets its 95 % bootstrap interval over the answers (BCa, widened to Student's distribution; "
            f"{config.resamples} draws, seed {config.seed})."
        )
    words.append("An interval covers the choice of test prompts only, not randomness in training or sampling.")
    return " ".join(words)


def grades_section(results, config, missing):
    """The mean of each human grade, a check against the published averages, and the differences between models."""
    graded = [(label, s) for label, s, _ in table_lines(results.systems) if s.grades]
    graded += [(f"{base.name} (base)", base) for _, _, base in table_lines(results.systems) if base and base.grades]
    if not graded:
        missing.append(
            "Human evaluation, and the correlation of the metrics with it: grade the answers in `generations/NAME.json`, write "
            f"the grades to `NAME_HE.json` in the same folder ({FILE_OF_GRADES}), and make the report again"
        )
        return None
    rows, checks = [], []
    for label, system in graded:
        grades, averages = system.grades, system.grades.averages()
        cells = [label]
        for name, values in [*((n, [row[n] for row in grades.rows]) for n in GRADES), ("human", grades.of_examples())]:
            drawn = bootstrap_interval(values, resamples=config.resamples, seed=config.seed)
            average = averages[AVERAGES[-1] if name == "human" else f"average_{name}"]
            cells.append(Cell(shown("human", average), average, interval_words("human", drawn)))
        rows.append([*cells, str(len(grades.rows))])
        checks.append(check_words(label, grades, averages))
    header = ["Model", *[GRADE_NAMES[name] for name in GRADES], "average", "answers"]
    note = f"In brackets: 95 % bootstrap intervals over the answers ({config.resamples} draws, seed {config.seed})."
    if len({system.asked for _, system in graded}) > 1:
        note += " Not all of these models answered the same prompts: compare only those that did."
    blocks = [Table("Means of the human grades", header, rows, note), *checks]
    pairs = []
    for (label, one), (other_label, other) in combinations(graded, 2):
        if one.asked == other.asked and len(one.grades.rows) == len(other.grades.rows):
            a, b = one.grades.of_examples(), other.grades.of_examples()
            found = paired_bootstrap(a, b, resamples=config.resamples, seed=config.seed)
            swapped = paired_permutation(a, b, resamples=2 * config.resamples, seed=config.seed)
            pairs.append(difference_row(f"{label} minus {other_label}", "human", found, found.p_value, swapped.p_value))
    if pairs:
        header = ["Pair", "difference", "p, bootstrap", "p, permutation", "answers"]
        note = (
            "Paired by prompt. p: the probability of a difference at least as large if the two models were equal (two-sided); "
            f"not corrected for {count(len(pairs), 'pair')}: with a threshold of 0.05, compare the smallest p with "
            f"{0.05 / len(pairs):.2g}."
        )
        blocks.append(
            Table(
                "Differences of the human evaluation",
                header,
                pairs,
                note if len(pairs) > 1 else note.split(";")[0] + ".",
            )
        )
    return Section("Human evaluation", blocks)


def check_words(label, grades, averages):
    """A sentence on whether the averages of the grades equal the published ones, to the last digit."""
    if grades.published is None:
        return (
            f"{label}: the average computed from `{grades.path.name}` is {averages[AVERAGES[-1]]!r}; there is no published one "
            "to compare with."
        )
    wrong = [name for name in AVERAGES if averages[name] != grades.published[name]]
    if not wrong:
        return f"{label}: the average {averages[AVERAGES[-1]]!r} and its three parts equal the published ones to the last digit."
    parts = "; ".join(f"`{name}` is {averages[name]!r}, published as {grades.published[name]!r}" for name in wrong)
    return f"{label}: the published averages differ from those of the grades in `{grades.path.name}`: {parts}."


class Difference(NamedTuple):
    """A difference between two systems in evaluation.json, with its interval and number of examples."""

    difference: float
    low: float | None
    high: float | None
    n: int | None


def comparisons_section(results, missing):
    """The difference tuned minus base for every run that has both, with p-values."""
    tables, compared = [], [run for run in results.runs if run.comparisons]
    for run in compared:
        rows = []
        for name in [*(n for n in ORDER if n in run.comparisons), *sorted(set(run.comparisons) - set(ORDER))]:
            c = run.comparisons[name]
            found = Difference(c["difference"], c.get("low"), c.get("high"), c.get("n"))
            label = with_arrow(name)
            rows.append(difference_row(label, name, found, c["p_bootstrap"], c["p_permutation"]))
        shared = {}  # note -> the metrics that share it
        for name, c in run.comparisons.items():
            if c.get("note"):
                shared.setdefault(c["note"], []).append(metric(name).label)
        notes = [f"{text[:1].upper()}{text[1:]}: {', '.join(labels)}." for text, labels in shared.items()]
        note = (
            "In brackets: 95 % paired bootstrap interval. p: the probability of a difference at least as large if the two were "
            f"equal (two-sided); not corrected for {count(len(rows), 'metric')}."
        )
        systems = {s.role: s for s in results.systems if s.group == run.folder}
        roles = "tuned minus base" if "tuned" in systems else "the predictions minus the others"
        name = systems["tuned"].name if "tuned" in systems else run.folder.name
        where = f" ({run.folder})" if len(compared) > 1 else ""
        caption = f"{name}{where}, {roles} on the same prompts"
        header = ["Metric", "difference", "p, bootstrap", "p, permutation", "examples"]
        tables.append(Table(caption, header, rows, " ".join([note, *notes])))
    if not tables:
        missing.append(
            "Tuned against base, with p-values: `python scripts/evaluate.py --run "
            f"{example_run(results)}` answers the same prompts with both"
        )
        return None
    return Section("Tuned against base", tables)


def difference_row(label, name, found, p_bootstrap, p_permutation, n=None):
    """A row of a table of differences. name: of the metric; found: has .difference, .low, .high and .n."""
    if found.difference is None:
        return [label, "–", "–", "–", str(n or found.n or "–")]
    difference = Cell(shown(name, found.difference, sign="+"), found.difference, interval_words(name, found))
    return [label, difference, p_words(p_bootstrap), p_words(p_permutation), str(n or found.n or "–")]


def correlation_section(results, config, missing):
    """The rank correlation of each metric with the human grades, over the answers of each model."""
    tables = []
    for label, system, _ in table_lines(results.systems):
        names = [n for n in ORDER if any(n in e["scores"] for e in system.examples)]
        if not system.grades or not names:
            continue
        human, rows = system.grades.of_examples(), []
        for name in names:
            both = [(e["scores"][name], h) for e, h in zip(system.examples, human, strict=True) if name in e["scores"]]
            cells = []
            for method in ("spearman", "kendall"):
                found = correlate(*zip(*both, strict=True), method, resamples=config.resamples, seed=config.seed)
                if found.value is None:
                    cells += [Cell("–", below=(found.note,)), "–"]
                    continue
                below = () if found.low is None else (minus(f"[{found.low:.2f}, {found.high:.2f}]"),)
                cells += [Cell(minus(f"{found.value:.2f}"), found.value, below), p_words(found.p_value)]
            rows.append([with_arrow(name), *cells, str(len(both))])
        note = (
            "1: the metric ranks the answers as people do; 0: no relation; for a metric marked ↓ negative values are good. In "
            f"brackets: 95 % percentile bootstrap ({config.resamples} draws, seed {config.seed}). p: two-sided test of no "
            "correlation, not corrected for the number of metrics."
        )
        header = ["Metric", "Spearman's rho", "p of rho", "Kendall's tau-b", "p of tau-b", "answers"]
        tables.append(Table(f"{label}: correlation with the mean human grade", header, rows, note))
    if not tables:
        if any(s.grades for s in results.systems):
            missing.append(
                "Correlation of each metric with the human grades: it needs the scores of single answers, which the study's "
                "files do not have. `python scripts/evaluate.py --predictions DIR/NAME.json --references FILE --out "
                "DIR/evaluation.json` computes them, if `NAME_HE.json` is in the folder of `NAME.json`"
            )
        return None
    return Section("Metrics beside human grades", tables)
