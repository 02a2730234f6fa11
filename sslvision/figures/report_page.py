"""The HTML page of a report: one file without links to others, light and dark, on a phone and printed.

All texts are escaped here: what a person typed, names of files and classes, and messages.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
GENERATOR = "sslvision report"  # in the head of every report: a file without it is not overwritten


class Section(NamedTuple):
    """A section of a report: its heading, and its content as HTML. Without content it is left out."""

    heading: str
    content: str


def page(title: str, *, about: str, facts: Sequence[str], sections: Sequence[Section], refresh: int = 0) -> str:
    """Return a whole page.

    Args:
        title: Its title.
        about: What it is about, in a line.
        facts: What is told below the title: kind of run, whether it has ended, ...
        sections: Its sections.
        refresh: Seconds after which a browser loads it again; 0: never.
    """
    kept = [section for section in sections if section.content]
    names = [f"s-{''.join(c if c.isalnum() else '-' for c in section.heading.lower())}" for section in kept]
    links = "".join(f'<a href="#{name}">{escape(one.heading)}</a>' for name, one in zip(names, kept, strict=True))
    body = "".join(
        f'<section id="{name}"><h2>{escape(one.heading)}</h2>{one.content}</section>'
        for name, one in zip(names, kept, strict=True)
    )
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    told = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{GENERATOR}"><meta name="color-scheme" content="light dark">'
        # Nothing is loaded from anywhere, whatever a name in the page may contain.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'unsafe-inline'\">{again}"
        f"<style>{(HERE / 'report.css').read_text(encoding='utf-8')}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="about">{escape(about)}</p><ul class="facts">{told}</ul>'
        f"<nav>{links}</nav></header><main>{body}</main>"
        f"<script>{(HERE / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph."""
    return f'<p class="{kind}">{_prose(text)}</p>' if kind else f"<p>{_prose(text)}</p>"


def _prose(text: str) -> str:
    """Return a text escaped, with numbers and their percent signs on one line."""
    return escape(text.replace(" %", "\u00a0%"))


def listed(texts: Sequence[str], kind: str = "") -> str:
    """Return a list of sentences; nothing if there are none."""
    if not texts:
        return ""
    return f'<ul class="{kind}">' + "".join(f"<li>{_prose(text)}</li>" for text in texts) + "</ul>"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "", numbers: bool = True, first: bool = False
) -> str:
    """Return a table; nothing without rows.

    Args:
        columns: Headings.
        rows: Their cells.
        kind: Its CSS class.
        numbers: Whether the cells after the first column are numbers.
        first: Whether the first row is the one that matters.
    """
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        ('<tr class="first">' if first and number == 0 else "<tr>")
        + "".join(
            f'<th scope="row">{escape(cell)}</th>' if place == 0 else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for number, row in enumerate(rows)
    )
    kinds = " ".join(["numbers"] * numbers + [kind] * bool(kind))
    return (
        f'<div class="scroll"><table class="{kinds}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts_table(rows: Mapping[str, str]) -> str:
    """Return names and values in two columns."""
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    return f'<dl class="pairs">{cells}</dl>' if cells else ""


def command(text: str, told: str) -> str:
    """Return a line to type, with what it does."""
    return (
        f'<div class="command"><p>{escape(told)}</p><pre><code>{escape(text)}</code></pre>'
        '<button type="button" class="copy">copy</button></div>'
    )


def code(text: str) -> str:
    """Return text as it is written in a file."""
    return f"<pre><code>{escape(text)}</code></pre>"


def verdict_block(
    heading: str,
    *,
    passed: bool,
    marks: tuple[str, str] = ("passed", "failed"),
    asked: str = "",
    words: str = "",
    advice: str = "",
    more: str = "",
) -> str:
    """Return what a test asks, whether it was passed, what was found, and what to do.

    Args:
        heading: Name of the test.
        passed: Whether it was passed.
        marks: What is written for that, and for the opposite.
        asked: The question.
        words: What was found.
        advice: What to do; empty if there is nothing to do.
        more: Figures and tables below it, as HTML.
    """
    mark = f'<span class="mark {"passed" if passed else "failed"}">{escape(marks[0] if passed else marks[1])}</span>'
    told = (paragraph(asked, "about") if asked else "") + (paragraph(words) if words else "")
    title = f"{heading[:1].upper()}{heading[1:]}"
    return f"<h3>{escape(title)} {mark}</h3>{told}{listed([advice] * bool(advice), 'findings')}{more}"


def folded(summary: str, content: str) -> str:
    """Return content that is shown on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""
