"""Fill the templates of the pages; the contents of a journal are untrusted and escaped."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def fill_template(name: str, context: Mapping[str, Any]) -> str:
    """Fill a template of the package; undefined names are an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        nonce=secrets.token_urlsafe(16),
        datatables=datatables_bundle,
    )
    return environment.get_template(name).render(**context)


def datatables_bundle() -> tuple[str, str]:
    """Return itables' offline DataTables: the module as a data URL, and its style."""
    import itables

    folder = Path(itables.__file__).parent / "html"
    script = base64.b64encode((folder / "dt_bundle.js").read_bytes()).decode()
    style = (folder / "dt_bundle.css").read_text(encoding="utf-8")
    return f"data:text/javascript;base64,{script}", style.replace("</style", "<\\/style")


def embed_json(value: object) -> str:
    """JSON that can stand in a script element: ASCII only, no `<`, `>` or `&`."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
