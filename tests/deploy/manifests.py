"""Writes every value set's manifests into a folder and prints how the clusters' rules judge each: evidence for an audit.

usage: manifests.py FOLDER
"""

import pathlib
import sys

import chart
import policy


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    versions = chart.minors()
    print(f"Kubernetes {', '.join(versions)}; rules: {', '.join(policy.RULES)}.\n")
    print("| values | objects | rules broken |\n|---|---|---|")
    broken = 0
    for name, values in chart.value_sets().items():
        text = chart.render_text(values)
        (folder / f"{name}.yaml").write_text(text)
        manifests = chart.documents(text)
        for version in versions:
            for manifest in manifests:
                chart.validate(manifest, version)
        report = policy.report(manifests)
        chosen = values.get("podSecurity") == "restricted"
        broken += len([r for r in report if not (chosen and r[1] == "EXI-ARCH-26")])
        said = "; ".join(sorted({f"{rule}: {wrong}" for _, rule, wrong in report})) or "none"
        print(f"| {name} | {len(manifests)} | {said}{' (the opt-in profile)' if report and chosen else ''} |")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
