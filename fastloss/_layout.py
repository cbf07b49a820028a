"""Let ``fastloss.kernels`` be found when this package is imported from a source tree.

In the repository the Triton kernels stand beside this package, in ``kernels/``; an installed wheel holds them
inside it. Python started in a clone's root finds the source folder ``fastloss/`` before the installed
package, and there is no ``kernels`` in that folder: so the repository's root joins the package's search path.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE.parent


def extend(search_path: list[str]) -> None:
    """Add the repository's root to ``search_path`` if this package lies in a source tree."""
    in_wheel = (_PACKAGE / "kernels").is_dir()
    in_source_tree = (_ROOT / "kernels" / "__init__.py").is_file() and (_ROOT / "pyproject.toml").is_file()
    if in_source_tree and not in_wheel and str(_ROOT) not in search_path:
        search_path.append(str(_ROOT))
