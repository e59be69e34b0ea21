"""A page of sections with text, tables, charts and answers, as one HTML file that works offline, and as Markdown.

This module knows nothing of the content. It escapes every text, because answers of models may contain HTML or Markdown."""

import html
import re
import string
from pathlib import Path
from typing import NamedTuple

from minitune.reports import figures
from minitune.screen import printable

LONG = 700  # characters of an answer that are shown without unfolding
MOST = 100  # most rows of a table in a PNG
SHORT = 20  # most rows of a table that a phone shows as a list


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | None = None  # the number with all its digits
    below: tuple = ()  # smaller lines under the text


class Table(NamedTuple):
    """A table; the first column has the names of the rows."""

    caption: str
    header: list  # [str, ...]
    rows: list  # [[Cell or str, ...], ...]
    note: str = ""  # text under the table
    picture: str = ""  # end of the name of its PNG; "" for no PNG
    has_words: bool = False  # whether the cells have words rather than numbers


class Chart(NamedTuple):
    """One or several drawings with a caption."""

    caption: str
    alt: str  # description for people who do not see it
    drawings: list  # [Figure, ...], side by side, or one below the other on a phone
    titles: tuple = ()  # of the drawings
    legend: tuple = ()  # labels, in the order of figures.style()
    picture: str = ""  # end of the name of its PNG
    whole: object = None  # Figure of the PNG, if the drawings are parts of it


class Part(NamedTuple):
    """A labelled text on a Card, such as a prompt or an answer."""

    label: str
    text: str
    faint: str = ""  # less important text, such as scores


class Card(NamedTuple):
    """One answer with its prompt."""

    title: str
    parts: list  # [Part, ...]


class Cards(NamedTuple):
    """Columns of cards, side by side."""

    columns: list  # [(heading, [Card, ...]), ...]


class Folded(NamedTuple):
    """Blocks that can be folded away under a title."""

    title: str
    blocks: list  # as in Section
    is_open: bool = False


class Section(NamedTuple):
    """A part of the page with a heading."""

    title: str
    blocks: list  # [str, Table, Chart, Cards or Folded, ...]; a str is a paragraph, with `code` in backticks


def as_html(title, summary, sections):
    """The page as HTML, a str. summary: list of paragraphs for the top. sections: list of Sections."""
    frame = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    counter = iter(range(10**6))
    shown = []
    for section in sections:
        blocks = "\n".join(block_html(block, counter) for block in section.blocks)
        anchor = slug(section.title)
        shown.append(
            f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{inline(section.title)}</h2>\n{blocks}\n</section>'
        )
    links = "".join(f'<li><a href="#{slug(s.title)}">{inline(s.title)}</a></li>' for s in sections)
    return frame.substitute(
        title=escape(title),
        summary="\n".join(f"<p>{inline(line)}</p>" for line in summary),
        links=links,
        sections="\n".join(shown),
    )


def block_html(block, counter):
    """HTML of a block of a Section. counter: iterator of numbers for unique ids."""
    if isinstance(block, str):
        return f"<p>{inline(block)}</p>"
    if isinstance(block, Folded):
        inside = "\n".join(block_html(b, counter) for b in block.blocks)
        return (
            f"<details{' open' if block.is_open else ''}><summary>{inline(block.title)}</summary>\n{inside}\n</details>"
        )
    if isinstance(block, Table):
        return table_html(block)
    if isinstance(block, Chart):
        return chart_html(block, counter)
    columns = []
    for heading, cards in block.columns:
        columns.append(f'<div class="column"><h3>{inline(heading)}</h3>{"".join(map(card_html, cards))}</div>')
    return f'<div class="columns">{"".join(columns)}</div>'


def table_html(table):
    """HTML of a Table that scrolls sideways if it is wide. On a phone a short table is shown as a list of its rows; the ARIA
    roles keep it a table for screen readers."""
    head = "".join(f'<th scope="col" role="columnheader">{inline(name)}</th>' for name in table.header)
    body = []
    for first, *rest in table.rows:
        cells = "".join(
            f'<td role="cell" data-label="{escape(name)}">{cell_html(cell)}</td>'
            for name, cell in zip(table.header[1:], rest, strict=True)
        )
        body.append(f'<tr role="row"><th scope="row" role="rowheader">{cell_html(first)}</th>{cells}</tr>')
    kinds = [kind for kind, is_so in (("words", table.has_words), ("short", len(table.rows) <= SHORT)) if is_so]
    note = f'<p class="faint">{inline(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f'<table role="table" class="{" ".join(kinds)}"><caption>{inline(table.caption)}</caption>\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n<tbody role="rowgroup">\n'
        + "\n".join(body)
        + f"\n</tbody></table></div>{note}"
    )


def cell_html(cell):
    if isinstance(cell, str):
        return inline(cell)
    text = inline(cell.text)
    if cell.value is not None:
        text = f'<data value="{cell.value!r}" title="{cell.value!r}">{text}</data>'
    return text + "".join(f"<small>{inline(line)}</small>" for line in cell.below)


def chart_html(chart, counter):
    """HTML of a Chart."""
    drawings = []
    for number, drawing in enumerate(chart.drawings):
        alt = chart.alt if len(chart.drawings) == 1 else f"{chart.alt} Part {number + 1} of {len(chart.drawings)}."
        title = f"<h3>{inline(chart.titles[number])}</h3>" if chart.titles else ""
        drawings.append(
            f'<div class="drawing">{title}{figures.inline_svg(drawing, f"f{next(counter)}-", escape(alt))}</div>'
        )
    keys = "".join(f"<li>{sample(number)} {inline(label)}</li>" for number, label in enumerate(chart.legend))
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    caption = f"<figcaption>{inline(chart.caption)}</figcaption>"
    return f'<figure>{legend}<div class="drawings">{"".join(drawings)}</div>{caption}</figure>'


def sample(number):
    """HTML of a sample of line `number`, for a legend."""
    _, marker, dashes = figures.style(number)
    shapes = {
        "o": '<circle cx="20" cy="7" r="4"/>',
        "s": '<path d="M16 3h8v8h-8z"/>',
        "^": '<path d="M20 2l5 9h-10z"/>',
        "D": '<path d="M20 2l5 5-5 5-5-5z"/>',
        "v": '<path d="M20 12l5-9h-10z"/>',
        "P": '<path d="M18 2h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
    }
    dashed = " ".join(f"{1.5 * d:g}" for d in dashes)
    return (
        f'<svg class="key" viewBox="0 0 40 14" aria-hidden="true" style="color: var(--c{number % len(figures.PALETTE)})">'
        f'<path d="M0 7h40" fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="{dashed}"/>'
        f'<g fill="currentColor">{shapes[marker]}</g></svg>'
    )


def card_html(card):
    parts = []
    for part in card.parts:
        pieces = "".join(f"<span>{escape(piece)}</span> " for piece in part.faint.split(" · ") if piece)
        faint = f' <span class="faint pieces">{pieces}</span>' if part.faint else ""
        parts.append(f"<dt>{escape(part.label)}{faint}</dt><dd>{long_html(part.text)}</dd>")
    return f"<article><h4>{escape(card.title)}</h4><dl>{''.join(parts)}</dl></article>"


def long_html(text):
    """HTML of an answer; a long one can be unfolded."""
    if not text.strip():
        return '<span class="faint">(empty)</span>'
    if len(text) <= LONG + 100:
        return f'<div class="text" dir="auto">{escape(text)}</div>'
    return (
        f'<div class="text" dir="auto">{escape(text[:LONG])} …</div>'
        f'<details><summary>all {len(text):,} characters</summary><div class="text" dir="auto">{escape(text)}</div></details>'
    )


def visible(text):
    """`text` with escapes in place of control characters, as on a terminal."""
    return printable(text.replace("\r", ""))


def one_line(text):
    return " ".join(visible(str(text)).split())


def escape(text):
    return html.escape(visible(str(text)))


def inline(text):
    """HTML of a line of text, with <code> for text in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def slug(title):
    """A title as the id of an HTML element."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def pictures(sections):
    """{end of the file name: Figure} of the tables and charts that are also written as PNG."""
    found = {}
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Table) and block.picture:
            header, *rows = [
                [
                    "\n".join(map(one_line, [cell] if isinstance(cell, str) else [cell.text, *cell.below]))
                    for cell in row
                ]
                for row in [block.header, *block.rows[:MOST]]
            ]
            more = f" The page has {len(block.rows) - MOST} more rows." if len(block.rows) > MOST else ""
            words = one_line(f"{block.caption}. {block.note}{more}")
            found[block.picture] = figures.table_figure(header, rows, words)
        if isinstance(block, Chart) and block.picture:
            found[block.picture] = block.whole or block.drawings[0]
    return found


def as_markdown(title, summary, sections, stem):
    """The page as Markdown, a str. stem: beginning of the names of the PNG files, as in STEM_table.png."""
    parts = [f"# {mark(title)}", *[mark_code(line) for line in summary]]
    for section in sections:
        parts.append(f"## {mark_code(section.title)}")
        parts += [block_markdown(block, stem) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def block_markdown(block, stem):
    """Markdown of a block of a Section."""
    if isinstance(block, str):
        return mark_code(block)
    if isinstance(block, Folded):
        return "\n\n".join([f"### {mark_code(block.title)}", *[block_markdown(b, stem) for b in block.blocks]])
    if isinstance(block, Table):
        lines = [block.header, ["---"] + ["---:"] * (len(block.header) - 1), *block.rows]
        rows = ["| " + " | ".join(cell_markdown(cell) for cell in line) + " |" for line in lines]
        return "\n\n".join(filter(None, [mark_code(block.caption), "\n".join(rows), mark_code(block.note)]))
    if isinstance(block, Chart):
        return f"![{mark(block.alt)}](<{stem}_{block.picture}.png>)\n\n{mark_code(block.caption)}"
    parts = []
    for heading, cards in block.columns:
        parts.append(f"#### {mark(heading)}")
        for card in cards:
            parts.append(f"**{mark(card.title)}**")
            parts += [f"{mark(p.label)} {mark(p.faint)}\n\n{fenced(p.text)}" for p in card.parts]
    return "\n\n".join(parts)


def cell_markdown(cell):
    if isinstance(cell, str):
        return cell if set(cell) <= set("-:") else in_cell(cell)
    return "<br>".join(in_cell(line) for line in (cell.text, *cell.below))


def in_cell(text):
    return re.sub(r"(?<!\\)\|", r"\|", mark_code(text))  # a | in `code` would end the cell too


def mark(text):
    """One line of text as Markdown, with all markup escaped."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(one_line(text), quote=False))


def mark_code(text):
    """As mark(), but text in backticks stays code."""
    parts = re.split(r"`([^`]+)`", str(text))
    return "".join(f"`{one_line(part)}`" if i % 2 else mark_spaced(part) for i, part in enumerate(parts))


def mark_spaced(text):
    lead, tail = (" " if text[:1] == " " else ""), (" " if text[-1:] == " " else "")
    return f"{lead}{mark(text)}{tail}" if mark(text) else lead


def fenced(text):
    """`text` as a code block, in a fence that is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{visible(text)}\n{fence}"
