"""Write the reference of all public names as web pages: ``python docs/api.py [FOLDER]`` (``make docs``)."""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from pkgutil import walk_packages

import pdoc

import engram


def public_modules() -> list[str]:
    """``engram`` and all modules in it that say what is public (``__all__``); the command line has its own help."""
    names = ["engram", *(found.name for found in walk_packages(engram.__path__, "engram."))]
    names = [name for name in names if not any(part.startswith(("_", "cli")) for part in name.split("."))]
    return [name for name in names if hasattr(pdoc.extract.load_module(name), "__all__")]


def write(modules: Iterable[str], folder: Path) -> None:
    """A page for each module. Names that load on first use are set before, since pdoc takes what is there."""
    for module in map(pdoc.extract.load_module, modules):
        for name in module.__all__:
            setattr(module, name, getattr(module, name))
    # Modules that bear the name of a function come up twice.
    warnings.filterwarnings("ignore", message="The module specification")
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*modules, output_directory=folder)
    _name_no_machine(folder)


def _name_no_machine(folder: Path) -> None:
    """Take out of all pages where the package lies here, which is in the values of constants."""
    here = str(Path(engram.__file__).parents[1])
    for page in (*folder.rglob("*.html"), *folder.rglob("*.js")):
        page.write_text(page.read_text(encoding="utf-8").replace(here, "..."), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(*sys.argv[1:] or ["build/docs"])
    write(public_modules(), folder)
    print(folder / "engram.html")
