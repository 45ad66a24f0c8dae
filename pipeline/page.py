"""HTML pages from the templates beside this package's code. Knows nothing of what they show."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE_FOLDER = Path(__file__).parent / "templates"


def page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The text of a page, in which every value is escaped but Markup, and none may be missing.

    Args:
        template: file name of the template.
        filters: functions that it calls by these names.
        values: what it shows, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)
