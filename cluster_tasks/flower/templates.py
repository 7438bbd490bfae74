"""Flower's templates with one more entry in the menu, and ours beside them."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path

from tornado.template import Loader, Template

logger = logging.getLogger(__name__)

OURS = Path(str(files("cluster_tasks.flower").joinpath("templates")))
MENU = "navbar.html"
LAST_ENTRY = "reverse_url('broker')"
END_OF_ENTRY = "</li>"


class Templates(Loader):
    """Loads Flower's templates from ``root_directory``."""

    def _create_template(self, name: str) -> Template:
        if (OURS / name).is_file():
            source = (OURS / name).read_text(encoding="utf-8")
        else:
            source = (Path(self.root) / name).read_text(encoding="utf-8")
        if name == MENU:
            source = add_entry(source)
        return Template(source, name=name, loader=self)


def add_entry(menu: str) -> str:
    """Return the source of Flower's menu with ours after its last entry; unchanged if it has none that we know."""
    last = menu.rfind(LAST_ENTRY)
    end = menu.find(END_OF_ENTRY, last)
    if last < 0 or end < 0:
        logger.warning("the menu of this Flower is another one: the cluster page is at /cluster, and not in the menu")
        return menu
    end += len(END_OF_ENTRY)
    return menu[:end] + (OURS / "cluster_entry.html").read_text(encoding="utf-8") + menu[end:]
