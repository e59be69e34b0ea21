"""The sections of a report about the runs: how they differ, decoding options, curves, answers, environment."""

from minitune.reports import figures
from minitune.reports.commands import evaluate_command, example_run
from minitune.reports.page import Card, Cards, Cell, Chart, Folded, Part, Section, Table, one_line
from minitune.reports.results import fixed_terms, prompts_words, short_places, sweep_lines, table_lines
from minitune.reports.words import (
    FIGURE,
    GRADE_NAMES,
    ORDER,
    apart,
    count,
    flat,
    interval_words,
    metric,
    options_words,
    shown,
    with_arrow,
)
from minitune.runs.curves import Curve, curves
from minitune.study.files import GRADES

ON_A_CARD = (*FIGURE, "exact_match", "length_ratio")  # scores that are shown with an answer
MOST_AXES = 12  # most columns of the figure
# Answers without grades are sorted by the first of these metrics that is available.
RANKING = ("bertscore", "rouge_l", "token_f1", "chrf", "bleu")


def differences_section(results):
    """The options of training that are not the same in all runs. results: a Results. Returns a Section, or None."""
    runs = [run for run in results.runs if run.options is not None]
    if len(runs) < 2:
        return None
    facts = [training_facts(run) for run in runs]
    names = dict.fromkeys(name for found in facts for name in found)
    names = [name for name in names if len({flat(found.get(name)) for found in facts}) > 1]
    title = "How the runs differ"
    if not names:
        return Section(title, [f"The {len(runs)} runs were trained with the same options on the same rows."])
    places = short_places([run.folder for run in runs])
    rows = [
        [places[run.folder], *[fact_words(found.get(name)) for name in names]]
        for run, found in zip(runs, facts, strict=True)
    ]
    note = "Options of training and facts about the machine that are the same in all runs are not shown here."
    return Section(title, [Table("What each run was trained with", ["Run", *names], rows, note)])


def training_facts(run):
    """{name: value} of the options and the environment of a run's training."""
    environment = run.environment or {}
    found = {name: value for name, value in run.options.items() if name not in ("run", "resume")}
    packages = environment.get("packages")
    return found | {
        "training rows (sha256)": str(environment.get("data_fingerprint", ""))[:12] or None,
        "machine": environment.get("device"),
        "torch": packages.get("torch") if isinstance(packages, dict) else None,
        "commit": str(environment.get("git_commit") or "")[:12] or None,
    }


def fact_words(value):
    if value in (None, [], {}):
        return "–"
    text = flat(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"


def sweep_section(results, missing):
    """The study's figure: each metric against each option of decoding, with one line for each model.

    Returns a Section, or None and a sentence in `missing`."""
    lines = sweep_lines(results.points)
    if not lines:
        missing.append(
            f"Scores against top_k, num_beams and temperature: `python scripts/sweep.py --run {example_run(results)} --study`"
        )
        return None
    names = [one_line(line.name) + (" (base)" if line.role == "base" else "") for line in lines]
    places = short_places([line.group for line in lines])
    labels = [f"{n} ({places[line.group]})" if names.count(n) > 1 else n for n, line in zip(names, lines, strict=True)]
    one_each = [line.all_points[0] for line in lines]
    asked = len({point.asked for point in one_each})
    if asked > 1:
        labels = [f"{label}, {prompts_words([point])}" for label, point in zip(labels, one_each, strict=True)]
    twice = {label for label in labels if labels.count(label) > 1}
    labels = [f"{label}, line {n}" if label in twice else label for n, label in enumerate(labels, 1)]
    axes = list(dict.fromkeys(name for line in lines for name in line.centre))
    columns = {p: p for p in axes if any(len(line.points.get(p, ())) > 1 for line in lines)}
    left_out = list(columns)[MOST_AXES:]
    columns = {p: p for p in list(columns)[:MOST_AXES]}
    data = [
        (label, {p: [(s.options[p], s.scores) for s in row] for p in columns for row in [line.points.get(p, [])]})
        for label, line in zip(labels, lines, strict=True)
    ]
    scored = {name for line in lines for row in line.points.values() for s in row for name in s.scores}
    chosen = [n for n in FIGURE if n in scored] or [n for n in ORDER if n in scored][:4]
    rows = {n: with_arrow(n) for n in chosen}
    drawings = [figures.sweep_figure(data, rows, {p: p}, legend=False) for p in columns]
    centres = list(dict.fromkeys(options_words(line.centre) for line in lines))
    has_intervals = any(
        s.low is not None for _, along in data for row in along.values() for _, ss in row for s in ss.values()
    )
    caption = f"Each column varies one option; the others are {' or '.join(centres)}. " + (
        "Vertical bars: 95 % intervals over the examples."
        if has_intervals
        else "The scores are means without intervals."
    )
    caption += f" {', '.join(left_out)}: in the table only." if left_out else ""
    alt = f"Lines of {', '.join(metric(n).label for n in chosen)} against {', '.join(columns)} for {', '.join(labels)}."
    titles = tuple(f"Against `{p}`" for p in columns)
    whole = figures.sweep_figure(data, rows, columns)
    blocks = [Chart(caption, alt, drawings, titles, tuple(labels), picture="figure", whole=whole)]
    if asked > 1:
        blocks.append("Not all lines have the same prompts: compare only those that do.")
    terms = apart([fixed_terms(point) for point in one_each])
    if any(terms):
        words = "; ".join(f"{label}: {', '.join(found)}" for label, found in zip(labels, terms, strict=True) if found)
        blocks.append(f"The lines differ in more than the model and the options on the axes. {words}.")
    blocks += repeated_words(results)
    points = []
    for label, line in zip(labels, lines, strict=True):
        own = line.all_points
        values = {id(p): [p.options[name] if name in line.centre else None for name in axes] for p in own}
        for point in sorted(own, key=lambda p: [-1 if v is None else v for v in values[id(p)]]):
            found = [(n, point.scores.get(n)) for n in chosen]
            cells = [
                Cell(shown(n, score.value), score.value, interval_words(n, score)) if score else "–"
                for n, score in found
            ]
            points.append([label, *["–" if v is None else f"{v:g}" for v in values[id(point)]], *cells])
    header = ["Model", *axes, *rows.values()]
    blocks.append(Folded(f"All {len(points)} points as a table", [Table("Points of the sweeps", header, points)]))
    return Section("Decoding options", blocks)


def repeated_words(results):
    """The difference between the scores of a setting that was decoded twice, once for the table and once in the sweep: a list
    with one paragraph, or []."""
    found = {}
    for system in results.systems:
        for point in results.points:
            if point is not system and point.is_repeated(system):
                for name in FIGURE:
                    if name in system.scores and name in point.scores:
                        apart = abs(system.scores[name].value - point.scores[name].value)
                        found[name] = max(found.get(name, 0.0), apart)
    if not any(found.values()):
        return []
    parts = ", ".join(f"{metric(name).label} {shown(name, apart)}" for name, apart in found.items())
    return [
        "The setting of the table is also a point of the sweep, decoded a second time. The largest differences between the two: "
        f"{parts}. Differences along a line that are not larger may be chance."
    ]


def curves_section(results, missing):
    """Training and held-out loss of every run. Returns a Section, or None and a sentence in `missing`."""
    charts, places = [], short_places([run.folder for run in results.runs])
    for run in results.runs:
        losses = [line["loss"] for line in run.lines if "loss" in line]
        held_out = [(line["eval_loss"], line["step"]) for line in run.lines if "eval_loss" in line]
        if losses or held_out:
            parts = [f"training loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end"] if losses else []
            parts += [f"lowest held-out loss {min(held_out)[0]:.3f} at step {min(held_out)[1]:,}"] if held_out else []
            caption = f"{places[run.folder]}: {'; '.join(parts)}."
            alt = f"Loss and learning rate over the steps of {caption}"
            charts.append(
                Chart(
                    caption,
                    alt,
                    [curves(Curve(run.lines).records(), figsize=(5, 4))],
                    picture=f"curves_{len(charts) + 1}",
                )
            )
    if not charts:
        missing.append(
            "Training curves: `python scripts/train.py --run DIR` writes `metrics.jsonl` into its run folder"
        )
        return None
    return Section("Training", charts)


def answers_section(results, config, missing):
    """The best and the worst answers of each model, side by side. Returns a Section, or None and a sentence in `missing`."""
    lines = [(label, s, base) for label, s, base in table_lines(results.systems) if ranking(s)[1]]
    if not lines or not config.answers:
        if config.answers:
            missing.append(f"Best and worst answers: `{evaluate_command(results)}` keeps each answer with its scores")
        return None
    blocks = []
    for label, system, base in lines:
        what, values = ranking(system)
        order = sorted(range(len(values)), key=lambda row: (-values[row], row))
        most = max(1, min(config.answers, len(order) // 2))
        best, worst = order[:most], order[::-1][:most]
        words = f"Ordered by {what}."
        if (ties := sum(v == values[order[0]] for v in values)) > most:
            words += f" {ties} of {len(values)} answers have the best value, {values[order[0]]:.3g}; the first of them are shown."
        columns = [("Best", best)] + ([("Worst", worst)] if len(order) > 1 else [])
        cards = [(heading, [answer_card(row, system, base) for row in rows]) for heading, rows in columns]
        blocks.append(Folded(label, [words, Cards(cards)], is_open=not blocks))
    return Section("Best and worst answers", blocks)


def ranking(system):
    """(name of the score by which the answers of a System are sorted, the score of each answer); ("", []) without one."""
    if not system.examples:
        return "", []
    if system.grades:
        return "the human grade", system.grades.of_examples()
    for name in RANKING:
        if all(name in e["scores"] for e in system.examples):
            return metric(name).label, [e["scores"][name] for e in system.examples]
    return "", []


def answer_card(row, system, base):
    """The Card of answer `row` of a System, with the answer of its base, a System or None."""
    example = system.examples[row]
    parts = [Part("Prompt", example["prompt"])] if example.get("prompt") else []
    parts += [Part("Input", example["input"])] if example.get("input") else []
    parts += [Part("Reference", example["reference"])] if example.get("reference") else []
    parts.append(Part(system.name, example["answer"], scores_words(system, row)))
    if system.grades and system.grades.comments[row]:
        parts.append(Part("Comment of the grader", system.grades.comments[row]))
    if base and row < len(base.examples):
        parts.append(
            Part(
                base.name if base.name != system.name else "base", base.examples[row]["answer"], scores_words(base, row)
            )
        )
    return Card(f"row {row}", parts)


def scores_words(system, row):
    """The scores of one answer, as one line."""
    scores = system.examples[row]["scores"]
    # A perplexity of 0 means that the answer has no token to predict.
    named = [n for n in ON_A_CARD if n in scores and (n, scores[n]) != ("perplexity", 0)]
    words = [f"{metric(n).label} {shown(n, scores[n])}" for n in named]
    if system.grades:
        grades = system.grades.rows[row]
        words = [f"{GRADE_NAMES[name]} {grades[name]:g}" for name in GRADES] + words
    if system.examples[row].get("ended_by") == "length":
        words.append("ended at the length limit")
    return " · ".join(words)


def environment_section(results, missing):
    """The sources of the numbers: files, settings, versions, machine."""
    blocks = []
    for group in dict.fromkeys(s.group for s in results.systems + results.points):
        own = [s for s in results.systems + results.points if s.group == group]
        if own[0].role == "published":
            size = f"{count(len({s.name for s in own}), 'model')}, {count(len(own), 'setting')} of decoding"
            blocks.append(f"`{group}`: the study's files, {size}. Options from the files' names, scores as published.")
    tables = []
    for run in results.runs:
        facts = [(f"training: {key}", value) for key, value in (run.options or {}).items()]
        facts += [(f"evaluation: {key}", value) for key, value in (run.settings or {}).items()]
        facts += list((run.environment or {}).items())
        if rows := [[key, flat(value)] for key, value in facts if value not in (None, [], {})]:
            tables.append(Table(f"Settings and environment of {run.folder}", ["Fact", "Value"], rows, has_words=True))
    blocks += [Folded(table.caption, [table]) for table in tables]
    if not tables:
        missing.append(
            "The environment: these files do not name the machine and the versions that they were made with; a run folder does, "
            "in `environment.json`"
        )
    if unread := results.not_understood:
        shown_paths = ", ".join(f"`{path}`" for path in unread[:10]) + (
            f" and {len(unread) - 10} more" if len(unread) > 10 else ""
        )
        blocks.append(f"Files of an unknown kind, left out: {shown_paths}.")
    return Section("Environment and sources", blocks) if blocks else None
