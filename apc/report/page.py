"""A page of results: conditions, tables that sort, charts, figures, and the command that makes them again.

It is one file without links to the network. Charts come from Bokeh, whose scripts lie in the page (1 MB).
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bokeh.embed import components
from bokeh.models import Model
from bokeh.resources import Resources
from jinja2 import Environment, select_autoescape
from markupsafe import Markup

from apc.evaluate import tables
from apc.evaluate.tables import Column
from apc.report.charts import bytes_chart, layer_charts

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Section:
    """A part of a page, under a title: conditions, a chart, a table, notes, texts and figures, each optional."""

    title: str
    conditions: Sequence[str] = ()
    chart: Model | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    texts: Sequence[str] = ()
    images: Sequence[Path] = field(default=())

    @classmethod
    def of_records(
        cls, title: str, columns: Sequence[Column], records: Sequence[dict], notes: Iterable[str] = (), **others
    ) -> "Section":
        """A section with a table of all columns, a row for each record."""
        header = ["\n".join(filter(None, (column.top, column.bottom))) for column in columns]
        rows = [tables.record_cells(columns, record) for record in records]
        return cls(title, header=header, rows=rows, notes=list(notes), **others)


def page(title: str, conditions: Sequence[str], warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The page as HTML."""
    charts = {section.title: section.chart for section in sections if section.chart is not None}
    script, parts = components(charts) if charts else ("", {})
    scripts = (
        Markup(Resources(mode="inline", components=["bokeh"], log_level="error").render() + script) if charts else ""
    )
    shown = [
        {
            **vars(section),
            "chart": Markup(parts.get(section.title, "")),
            "images": [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in section.images],
        }
        for section in sections
    ]
    template = Environment(autoescape=select_autoescape(default=True)).from_string(_TEMPLATE.read_text())
    return template.render(title=title, conditions=conditions, warnings=warnings, sections=shown, chart_scripts=scripts)


def run_page(name: str, results: dict, command: str, figures: Iterable[Path] = ()) -> str:
    """The page of a run's results, or of an evaluation's. command: makes them again."""
    policies = results.get("policies") or []
    measured = [record for record in policies if not record.get("missing")]
    drawn = [("", record) for record in measured]
    missing = [f"{tables.DASH} {record['policy']}: {record['missing']}" for record in policies if record.get("missing")]
    sections = [
        Section.of_records(
            "Policies",
            tables.POLICY_COLUMNS,
            policies,
            [tables.MEANINGS, *tables.footnotes(policies), *missing],
            chart=bytes_chart(drawn),
        ),
        Section.of_records("First tokens, and under the masks", tables.DETAIL_COLUMNS, measured, [tables.FIRST_TOKEN]),
    ]
    if (speed := tables.speed_parts(results)) is not None:
        columns, notes, continuations = speed
        sections.append(Section.of_records("Speed", columns, results["speed"]["policies"], notes, texts=continuations))
    if (layers := layer_charts(drawn)) is not None:
        sections.append(Section("Layers", chart=layers))
    if paths := sorted(figures):
        sections.append(Section("More figures", images=paths))
    sections.append(Section("Make it again", texts=[command]))
    in_sample = [tables.IN_SAMPLE] if tables.is_in_sample(results) else []
    return page(name, tables.condition_items(results), [*tables.warnings(results), *in_sample], sections)
