"""Charts of a report as matplotlib Figures, and conversion to PNG, or to SVG that uses the colours of the page around it."""

import io
import re

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#4477aa")  # Okabe and Ito, with darker light colours
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ((), (6, 2), (2, 1.5), (6, 2, 1.5, 2), (9, 2), (1, 1))  # lengths on and off, in line widths; () is solid
INKS = {  # colour in a Figure -> colour in the page, see page.html
    "#000000": "currentColor",
    "#ffffff": "var(--card)",
    "#b0b0b0": "var(--line)",
    "#555555": "currentColor",
    "#9db8d9": "var(--c0-faint)",
    "#1f5fa8": "var(--c0)",
    "#c8501e": "var(--c1)",
    **{ink: f"var(--c{i})" for i, ink in enumerate(PALETTE)},
}


def style(number):
    """(colour, marker, dashes) of line `number`. Lines differ in all three, so that colour alone is not needed."""
    return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]


def sweep_figure(lines, metrics, parameters, legend=True):
    """A Figure with a grid of axes: one row for each metric, one column for each parameter, one line for each model.

    lines: [(label, {parameter: [(x, {metric: Interval}), ...]}), ...]. metrics, parameters: {name: title}. The scale of a metric
    depends on all parameters of the lines, so that columns drawn as separate figures can be compared."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.4 + 2.9 * len(parameters), 0.9 + 1.75 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(parameters), squeeze=False, sharey="row", sharex="col")
    scores = [score for _, along in lines for row in along.values() for _, found in row for score in found.values()]
    # With intervals the lines are shifted, so that the bars do not overlap.
    has_intervals = any(score.low is not None for score in scores)
    for column, (parameter, title) in enumerate(parameters.items()):
        values = sorted({x for _, along in lines for x, _ in along[parameter]})
        for row, (metric, heading) in enumerate(metrics.items()):
            axes = grid[row][column]
            for number, (_, along) in enumerate(lines):
                shown = [(x, scores[metric]) for x, scores in along[parameter] if metric in scores]
                apart = 0.012 * (values[-1] - values[0]) * (number - (len(lines) - 1) / 2) if has_intervals else 0.0
                draw_line(axes, [(x + apart, score) for x, score in shown], number)
            axes.set_title(heading.replace("$", r"\$"), loc="left", fontsize=9.5, fontweight="bold")
            axes.set_ylim(*span(lines, metric))
            axes.set_xticks(values, [f"{v:g}" for v in values])
            axes.tick_params(labelsize=9, length=3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#b0b0b0", alpha=0.5, linewidth=0.6)
            axes.tick_params(labelleft=True)
        grid[-1][column].set_xlabel(title, fontsize=9.5)
    if legend:
        handles, labels = [], []
        for number, (label, _) in enumerate(lines):
            handles.append(draw_line(grid[0][0], [], number))
            labels.append(label.replace("$", r"\$"))  # matplotlib reads text between two $ as a formula
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False, handlelength=3.5
        )
    return figure


def draw_line(axes, shown, number):
    """Draw the points of one model, [(x, Interval), ...], with their intervals and a line. Returns the line."""
    colour, marker, dashes = style(number)
    x, scores = [x for x, _ in shown], [score for _, score in shown]
    for at, score in shown:
        if score.low is not None and score.high is not None:
            axes.plot([at, at], [score.low, score.high], color=colour, alpha=0.45, linewidth=1.2)
    y = [score.value for score in scores]
    [line] = axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=None)
    if dashes:
        line.set_dashes(dashes)
    return line


def span(lines, metric):
    """(low, high) limits of a metric's axis: all values and intervals, with a margin."""
    scores = [scores[metric] for _, along in lines for row in along.values() for _, scores in row if metric in scores]
    ends = [end for s in scores for end in (s.value, s.low, s.high) if end is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def table_figure(header, rows, caption):
    """A table as a Figure. header: [str]. rows: [[str]]; a cell may have several lines."""
    from matplotlib.figure import Figure

    wide = [max(len(part) for row in [header, *rows] for part in row[i].split("\n")) for i in range(len(header))]
    tall = [max(cell.count("\n") + 1 for cell in row) for row in [header, *rows]]
    line, pad, letter = 0.19, 0.16, 0.079  # inches
    width = sum(wide) * letter + 0.28 * len(header) + 0.2
    words = wrap(caption, int(width / letter / 0.92))
    height = sum(t * line + pad for t in tall) + 0.17 * (words.count("\n") + 1) + 0.35
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = 0.12
    for number, (row, lines) in enumerate(zip([header, *rows], tall, strict=True)):
        x = 0.15
        for i, (cell, letters) in enumerate(zip(row, wide, strict=True)):
            right = x + letters * letter
            for k, part in enumerate(cell.split("\n")):
                axes.text(
                    *(x if i == 0 else right, y + pad / 2 + k * line),
                    part.replace("$", r"\$"),  # matplotlib reads text between two $ as a formula
                    ha="left" if i == 0 else "right",
                    va="top",
                    fontsize=9 if k == 0 else 8,
                    color="#000000" if k == 0 else "#555555",
                    fontweight="bold" if number == 0 else "normal",
                )
            x = right + 0.28
        y += lines * line + pad
        axes.plot([0.1, width - 0.1], [y, y], color="#000000" if number in (0, len(rows)) else "#b0b0b0", linewidth=0.8)
    axes.text(0.15, y + 0.1, words.replace("$", r"\$"), va="top", fontsize=8, color="#555555")
    return figure


def wrap(text, width):
    """`text` wrapped at `width` characters, at least 30."""
    import textwrap

    return "\n".join(textwrap.wrap(text, max(30, width)))


def png(figure):
    """A Figure as the bytes of a PNG, 150 dots per inch, on white."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return image.getvalue()


def inline_svg(figure, prefix, alt):
    """A Figure as an <svg> element for a page: with text as text, the page's colours (INKS), and no URLs.

    prefix: beginning of all ids, unique on the page. alt: its description, already escaped."""
    import matplotlib

    image = io.StringIO()
    empty = {key: None for key in ("Date", "Creator", "Format", "Type")}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(image, format="svg", transparent=True, metadata=empty)
    text = image.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<style[^>]*/>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="([^"]+)"', text)[1]
    widest = round(1.6 * float(view.split()[2]))  # limits the size of a chart that has a row to itself
    start = f'<svg viewBox="{view}" role="img" aria-label="{alt}" style="max-width: {widest}px">'
    text = start + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text).replace("xlink:href", "href")
    text = re.sub(r"font-family:[^;\"]*|font: ([^'\";]*?)('DejaVu[^;\"]*)", lambda m: family(m), text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda ink: INKS.get(ink[0], ink[0]), text).strip()


def family(found):
    """The replacement for a match of a font in an SVG: the system's font."""
    return f"font: {found[1]}system-ui, sans-serif" if found[1] else "font-family: system-ui, sans-serif"
