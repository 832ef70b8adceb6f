"""The dashboard's panels, and what a Prometheus answers to their queries.

What Grafana does between the two is done here as far as the dashboard asks for it: variables are
filled in, legends made of labels, values reduced to the last one.
"""

from __future__ import annotations

import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "deploy" / "monitoring" / "dashboard.json"


@dataclass(frozen=True)
class Query:
    """An expression, and how the series that it gives are called."""

    expression: str
    legend: str
    instant: bool


@dataclass(frozen=True)
class Panel:
    """A panel; `place` is x, y, width and height in cells of the grid, 24 of them wide."""

    title: str
    kind: str
    place: tuple[int, int, int, int]
    unit: str
    queries: tuple[Query, ...]
    bounds: tuple[float | None, float | None]
    stacked: bool
    empty: str
    thresholds: tuple[tuple[float, str], ...]

    def colour(self, value: float) -> str:
        """Return the colour of the highest threshold that a value reaches."""
        *_, name = (name for least, name in self.thresholds if value >= least)
        return {"text": "white", "red": "#F2495C"}[name]


@dataclass(frozen=True)
class Series:
    """Numbers over time; an instant query gives one."""

    name: str
    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Span:
    """What a dashboard shows: Unix times, and the seconds between two points."""

    start: float
    end: float
    step: float


def load(path: Path = DASHBOARD) -> list[Panel]:
    return [_panel(entry) for entry in json.loads(path.read_text())["panels"]]


def _panel(entry: dict[str, Any]) -> Panel:
    place = entry["gridPos"]
    defaults = entry.get("fieldConfig", {}).get("defaults", {})
    return Panel(
        title=entry["title"],
        kind=entry["type"],
        place=(place["x"], place["y"], place["w"], place["h"]),
        unit=defaults.get("unit", ""),
        queries=tuple(
            Query(target["expr"], target["legendFormat"], target.get("instant", False))
            for target in entry.get("targets", [])
        ),
        bounds=(defaults.get("min"), defaults.get("max")),
        stacked="stacking" in defaults.get("custom", {}),
        empty=defaults.get("noValue", "No data"),
        thresholds=tuple(
            (-math.inf if step["value"] is None else step["value"], step["color"])
            for step in defaults.get("thresholds", {}).get("steps", [])
        ),
    )


class Prometheus:
    """Asks a Prometheus over HTTP.

    Parameters
    ----------
    url : str
        Such as ``http://127.0.0.1:9090``.
    scrape : float
        Seconds between its scrapes; as in Grafana, rates are taken over four of them.
    """

    def __init__(self, url: str, scrape: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._scrape = scrape

    def get(self, path: str, **parameters: object) -> Any:
        """Return the data of an answer; a query that is wrong raises."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Return the number that an expression gives now; None: it gives none."""
        (*rest,) = self.get("query", query=expression)["result"]
        assert len(rest) <= 1, f"{expression} gives {len(rest)} series"
        return float(rest[0]["value"][1]) if rest else None

    def alerts(self) -> dict[str, str]:
        """Return pending and firing alerts, each with its state."""
        return {
            alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]
        }

    def series(self, panel: Panel, span: Span, model: str = ".*") -> list[Series]:
        """Ask what a panel asks.

        Parameters
        ----------
        model : str
            What the variable of that name stands for.
        """
        found: list[Series] = []
        for query in panel.queries:
            asked = fill(
                query.expression,
                {
                    "__rate_interval": f"{max(4 * self._scrape, span.step):g}s",
                    "__interval": f"{span.step:g}s",
                    "__range": f"{span.end - span.start:.0f}s",
                    "__range_s": f"{span.end - span.start:.0f}",
                    "model": model,
                },
            )
            if query.instant:
                rows = self.get("query", query=asked, time=span.end)["result"]
                points = [[row["value"]] for row in rows]
            else:
                rows = self.get(
                    "query_range", query=asked, start=span.start, end=span.end, step=span.step
                )["result"]
                points = [row["values"] for row in rows]
            for row, own in zip(rows, points, strict=True):
                numbers = [
                    (float(at), float(value)) for at, value in own if math.isfinite(float(value))
                ]
                if numbers:
                    times, values = zip(*numbers, strict=True)
                    name = legend(query.legend, row["metric"])
                    found.append(Series(name, row["metric"], times, values))
        return found


def fill(expression: str, variables: Mapping[str, str]) -> str:
    """Put values in the place of variables; one that is not known raises."""
    return re.sub(
        r"\$(?:\{(\w+)\}|([a-z_]\w*))", lambda found: variables[found[1] or found[2]], expression
    )


def legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template).strip()
