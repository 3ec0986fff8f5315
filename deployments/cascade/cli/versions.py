"""Is what is installed what the package asks for?"""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cascade.cli.findings import Finding, fail, ok

DISTRIBUTION = "speculative-cascades"


def check_versions(distribution: str = DISTRIBUTION) -> list[Finding]:
    """Hold Python and every installed library against the metadata of `distribution`."""
    try:
        told = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return [fail(f"{distribution} is not installed", "pip install . in its folder")]
    python = _python(told["Requires-Python"])
    requirements = [Requirement(line) for line in metadata.requires(distribution) or ()]
    needed = [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    findings = [finding for requirement in needed for finding in check_requirement(requirement)]
    return [python, *(findings or [ok(f"{len(needed)} libraries are as new as needed")])]


def _python(wanted: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok(f"Python {version}")
    return fail(f"Python {version}, but {wanted} is needed", "make a virtual environment with it")


def check_requirement(requirement: Requirement) -> list[Finding]:
    """Return what is wrong with one library: nothing, that it is missing, or that it is too old."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return [fail(f"{requirement.name} is not installed", f"pip install '{requirement}'")]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    return [
        fail(
            f"{requirement.name} is {version}, but {requirement.specifier} is needed",
            f"pip install '{requirement}'",
        )
    ]
