"""The packages that this project asks for, and which of them are missing."""

import importlib.metadata

from packaging.requirements import Requirement

from apc.utils.errors import UserError

DISTRIBUTION = "apc-llm"


def requirements(extra: str = "") -> list[Requirement]:
    """The packages of an extra, e.g. `train`; without an extra, the core dependencies.

    Packages for other platforms are left out. The list is empty if `apc` runs from a checkout without being installed,
    because its requirements are then unknown.
    """
    if installed_version(DISTRIBUTION) is None:
        return []
    listed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    return [needed for needed in listed if _applies(needed, extra) and not (extra and _applies(needed, ""))]


def _applies(needed: Requirement, extra: str) -> bool:
    return needed.marker is None or needed.marker.evaluate({"extra": extra})


def installed_version(name: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_extra(extra: str) -> None:
    """Raises UserError if a package of an extra is missing."""
    missing = [requirement.name for requirement in requirements(extra) if installed_version(requirement.name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; run pip install '{DISTRIBUTION}[{extra}]'")
