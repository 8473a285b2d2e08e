"""Looks up the pinned packages of constraints.txt in PyPI's database of known vulnerabilities, by pip-audit.

    make audit

Exit code 1 where a package has an advisory, else 0, also where the database cannot be reached: that is said, and is no
reason to hold back a change. A registry that mirrors packages alone has no advisories; pip-audit then skips every
package and still reports that it found nothing, so what it has skipped is counted here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints.txt"
ENVIRONMENT = ROOT / ".venv-audit"  # of its own: what audits shall not be among what is audited
ADVISORIES = "https://pypi.org/pypi/{name}/{version}/json"
ASKED_FIRST = "torch"  # to see whether the database answers, before all pins are looked up
SECONDS = 10


def why_unreachable(pins: str) -> str:
    """Return why the advisories of pinned packages cannot be looked up here; empty where they can."""
    version = next(line.partition("==")[2] for line in pins.splitlines() if line.startswith(f"{ASKED_FIRST}=="))
    try:
        with urllib.request.urlopen(ADVISORIES.format(name=ASKED_FIRST, version=version), timeout=SECONDS) as answer:
            return "" if "vulnerabilities" in json.load(answer) else "it answers without advisories"
    except (OSError, ValueError) as error:  # no network, no such page, or no JSON
        return f"{type(error).__name__}: {error}"


def audited(options: Sequence[str]) -> str:
    """Return what pip-audit says of the pins, as JSON; install it first where it is not yet. Empty where it failed."""
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "pip-audit>=2.7"], check=False)
    command = [str(python), "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--format", "json", *options], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout.strip()


def report(found: dict[str, Any]) -> tuple[list[str], int]:
    """Return what to say of pip-audit's findings, and the exit code."""
    packages = found["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    lines = []
    for package in packages:
        for issue in package.get("vulns", []):
            mended = ", ".join(issue["fix_versions"]) or "no version"
            lines.append(f"{package['name']} {package['version']}: {issue['id']}, mended in {mended}")
    code = int(bool(lines))
    looked_up = len(packages) - len(skipped)
    lines.append(f"audit: {looked_up} of {len(packages)} pinned packages looked up, {len(lines)} advisories")
    if skipped:
        names = ", ".join(package["name"] for package in skipped[:5])
        lines.append(f"audit: NOT looked up, the database does not know them: {names}{' ...' if skipped[5:] else ''}")
    return lines, code


def main(options: Sequence[str]) -> int:
    """Audit the pins; options are pip-audit's, as `--ignore-vuln ID` for an advisory that does not concern scfm."""
    if reason := why_unreachable(PINS.read_text(encoding="utf-8")):
        print(f"audit: no package was looked up, for PyPI's advisories cannot be reached from here ({reason})")
        return 0
    found = audited(options)
    if not found:
        print("audit: no package was looked up, for pip-audit failed (see above)")
        return 0
    lines, code = report(json.loads(found))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
