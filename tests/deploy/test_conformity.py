"""`docs/conformity.md` against the framework's lists and the tests that exist; and the documents that it names."""

import ast
import json
import re
import unittest

import yaml

import chart
import run

ROOT = chart.ROOT
LISTS = json.loads((chart.HERE / "framework.json").read_text())
STATES = ("met", "partly; missing: ", "not ours; ")
PROOF = re.compile(r"`([\w/.-]+\.(?:py|rs))::([\w.]+)`")


def rows():
    """(date of the list, id, proofs, state) of every row."""
    date = None
    for line in (ROOT / "docs" / "conformity.md").read_text().splitlines():
        if heading := re.fullmatch(r"## (\d{4}-\d\d-\d\d)", line):
            date = heading.group(1)
        elif line.startswith("| EXI-"):
            identity, _, _, proof, state = (cell.strip() for cell in line.strip("|").split("|"))
            yield date, identity, PROOF.findall(proof), state


def python_tests(path):
    """Names `Class.test` of a file, without those that are always skipped."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                always = any(ast.unparse(d).startswith("unittest.skip(") for d in getattr(inner, "decorator_list", []))
                if isinstance(inner, ast.FunctionDef) and inner.name.startswith("test_") and not always:
                    found.add(f"{node.name}.{inner.name}")
    return found


def rust_tests(path):
    """Names of a file's tests, without ignored ones. Attributes stand between `#[test]` and the function."""
    pattern = r"#\[(?:tokio::)?test[^\]]*\]((?:\s*#\[[^\]]*\]|\s*//[^\n]*)*)\s*(?:async )?fn (\w+)"
    return {name for attributes, name in re.findall(pattern, path.read_text()) if "#[ignore" not in attributes}


def exists(file, test):
    """Whether a proof is a test that CI runs."""
    path = ROOT / file
    if not path.is_file():
        return False
    if file.endswith(".rs"):
        return file.startswith(("crates/", "xtask/")) and test in rust_tests(path)
    part = path.stem.removeprefix("test_")
    return path.parent == chart.HERE and part in run.PARTS and test in python_tests(path)


class Matrix(unittest.TestCase):
    def test_no_requirement_is_missing(self):
        listed = sorted((date, identity) for date, identities in LISTS.items() for identity in identities)
        self.assertEqual(sorted((date, identity) for date, identity, _, _ in rows()), listed)

    def test_every_state_is_one_of_three_and_says_its_reason(self):
        for date, identity, proofs, state in rows():
            kind = [s for s in STATES if state.startswith(s)]
            self.assertEqual(len(kind), 1, f"{date} {identity}: {state}")
            if kind[0] == "met":
                self.assertEqual(state, "met", identity)
                self.assertTrue(proofs, f"{date} {identity} is met by no test")
            else:
                self.assertGreater(len(state), len(kind[0]) + 5, identity)

    def test_every_proof_is_a_test_that_runs(self):
        count = 0
        for date, identity, proofs, _ in rows():
            for file, test in proofs:
                count += 1
                self.assertTrue(exists(file, test), f"{date} {identity}: {file}::{test}")
        self.assertGreater(count, 50)

    def test_a_proof_that_does_not_exist_is_noticed(self):
        self.assertTrue(exists("tests/deploy/test_conformity.py", "Matrix.test_no_requirement_is_missing"))
        for file, test in (("tests/deploy/test_conformity.py", "Matrix.test_nothing"), ("tests/deploy/test_none.py", "A.test_b"),
                           ("crates/cli/tests/serve.rs", "no_such_test"), ("tests/deploy/chart.py", "helm")):
            self.assertFalse(exists(file, test), f"{file}::{test}")


class Documents(unittest.TestCase):
    def test_what_an_operator_needs_is_written(self):
        for file, headings in {
            "docs/operations.md": ("Install", "Upgrade", "Rollback", "Drain", "Sizing", "Models without a network", "Backup", "Probes"),
            "SECURITY.md": ("Supported versions", "Reporting", "What is withdrawn"),
            "CHANGELOG.md": ("Unreleased",),
            "CONTRIBUTING.md": (),
            "docs/architecture.md": ("Faults",),
        }.items():
            text = (ROOT / file).read_text()
            for heading in headings:
                self.assertRegex(text, rf"(?m)^##+ .*{heading}", file)
        self.assertIn("A fault found becomes a test", (ROOT / "CONTRIBUTING.md").read_text())

    def test_links_between_documents_lead_somewhere(self):
        pages = [ROOT / p for p in ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")]
        for page in [*pages, *(ROOT / "docs").rglob("*.md")]:
            for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
                if not link.startswith("http"):
                    self.assertTrue((page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}")

    def test_decisions_have_their_parts(self):
        pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
        numbers = [p.name[:4] for p in pages]
        self.assertEqual(len(numbers), len(set(numbers)), "two decisions of one number")
        for page in pages:
            text = page.read_text()
            self.assertRegex(text, r"(?mi)^status: (proposed|accepted|superseded)", page.name)
            self.assertRegex(text, r"(?m)^## Context", page.name)
            self.assertRegex(text, r"(?m)^## Decision", page.name)

    def test_the_gates_are_in_ci(self):
        text = (ROOT / "xtask" / "src" / "ci.rs").read_text()
        for gate in ('"fmt"', '"deny"', '"clippy"', '"-D", "warnings"', "llvm-cov", "coverage::check", "deploy::"):
            self.assertIn(gate, text)

    def test_values_named_by_the_guide_exist(self):
        """What the operations guide sets in commands and tables are values of the chart."""
        values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
        named = set(re.findall(r"`((?:image|model|auth|tls|ledger|resources|networkPolicy|monitoring|autoscaling|caBundle|podSecurity|"
                               r"strategy|identity|replicas|kind|inferencePool|kserve|leaderWorkerSet)(?:\.(?!md`)\w+)*)`", (ROOT / "docs/operations.md").read_text()))
        self.assertGreater(len(named), 15)
        for name in named:
            place = values
            for key in name.split("."):
                self.assertIn(key, place, name)
                place = place[key]


if __name__ == "__main__":
    unittest.main()
