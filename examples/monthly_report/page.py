"""The report as an HTML page with a plot in SVG, by nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from html import escape
from typing import Any

_COLOURS = ("#4269d0", "#efb118", "#3ca951", "#ff725c", "#6cc5b0", "#a463f2")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 300, 60, 24

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Sales in {month}</title>
<style>
  body {{ font: 15px system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; color: #222 }}
  table {{ border-collapse: collapse }} td, th {{ padding: .25rem .8rem; text-align: right }}
  td:first-child, th:first-child {{ text-align: left }} tr:last-child {{ font-weight: bold; border-top: 1px solid }}
  text {{ font: 11px system-ui, sans-serif; fill: #555 }} .missing {{ color: #b3261e }}
</style>
<h1>Sales in {month}</h1>
{plot}
<table>
<tr><th>Category</th><th>Sales</th><th>Revenue</th></tr>
{rows}
</table>
{rates}
</html>
"""


def render_page(month: date, categories: Mapping[str, Any], rates: Mapping[str, float] | None) -> str:
    """The page; ``categories`` are the results of the jobs that summed them up, by name; ``rates`` may be unknown."""
    sums = {name: sum(day["revenue"] for day in result["days"]) for name, result in categories.items()}
    total = sum(sums.values())
    rows = [
        f'<tr><td><span style="color:{_colour(number)}">■</span> {escape(name)}</td>'
        f"<td>{categories[name]['sales']:,}</td><td>{sums[name]:,.2f} €</td></tr>"
        for number, name in enumerate(sums)
    ]
    sales = sum(result["sales"] for result in categories.values())
    rows.append(f"<tr><td>Total</td><td>{sales:,}</td><td>{total:,.2f} €</td></tr>")
    if rates is None:
        elsewhere = '<p class="missing">The exchange rates were not to be had.</p>'
    else:
        amounts = [f"{total * rate:,.2f} {escape(currency)}" for currency, rate in sorted(rates.items())]
        elsewhere = f"<p>Elsewhere that is {', '.join(amounts)}.</p>"
    return _PAGE.format(month=f"{month:%B %Y}", plot=_plot(categories), rows="\n".join(rows), rates=elsewhere)


def _plot(categories: Mapping[str, Any]) -> str:
    """A bar for each day, with a part for each category."""
    series = [[day["revenue"] for day in result["days"]] for result in categories.values()]
    days = [day["day"] for day in next(iter(categories.values()))["days"]] if categories else []
    most = max(map(sum, zip(*series, strict=True)), default=0) or 1
    step = (_WIDTH - _LEFT) / max(1, len(days))
    drawn = []
    for line in range(5):
        y = _y(most * line / 4, most)
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * line / 4:,.0f}</text>')
    for number, day in enumerate(days):
        x, below = _LEFT + number * step, 0.0
        for part, values in enumerate(series):
            top, foot = _y(below + values[number], most), _y(below, most)
            drawn.append(
                f'<rect x="{x + 1:.1f}" y="{top:.1f}" width="{step - 2:.1f}" height="{foot - top:.1f}" '
                f'fill="{_colour(part)}"><title>{escape(day)}: {values[number]:,.2f} €</title></rect>'
            )
            below += values[number]
        drawn.append(
            f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{day[-2:].lstrip("0")}</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n' + "\n".join(drawn) + "\n</svg>"


def _y(value: float, most: float) -> float:
    return (_HEIGHT - _BOTTOM) * (1 - value / most) + 6 * value / most


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
