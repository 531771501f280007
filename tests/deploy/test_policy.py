"""Each rule, by a manifest that passes and ones that fail; then every value set by all rules."""

import unittest

import yaml

import chart
import policy

FOLDER = chart.HERE / "policies"


class Rules(unittest.TestCase):
    def test_every_rule_has_its_manifests(self):
        self.assertEqual({p.name for p in FOLDER.iterdir()}, set(policy.RULES))

    def test_a_good_manifest_passes_and_bad_ones_fail(self):
        for name, rule in policy.RULES.items():
            good = chart.documents((FOLDER / name / "pass.yaml").read_text())
            bad = chart.documents((FOLDER / name / "fail.yaml").read_text())
            self.assertTrue(good and bad, name)
            for manifest in good:
                self.assertEqual(list(rule(manifest)), [], f"{name}: {manifest}")
            for manifest in bad:
                self.assertTrue(list(rule(manifest)), f"{name}: {manifest}")

    def test_a_bad_manifest_fails_by_its_own_rule_alone(self):
        """So that no rule stands in for another. A path of the host is in two rules."""
        for name in policy.RULES:
            for manifest in chart.documents((FOLDER / name / "fail.yaml").read_text()):
                others = {rule for _, rule, _ in policy.report([manifest])} - {name}
                self.assertFalse(others - {"EXI-ARCH-26", "disallow-hostpath"}, f"{name}: {manifest}")

    def test_quantities(self):
        for text, value in {"1Ti": 2**40, "1023Gi": 1023 * 2**30, "100m": 0.1, "1e3": 1000.0, "2": 2.0, "1T": 1e12}.items():
            self.assertEqual(policy.quantity(text), value)


class Charts(unittest.TestCase):
    def test_every_value_set_keeps_all_rules(self):
        for name, values in chart.value_sets().items():
            report = policy.report(chart.render(values))
            if values.get("podSecurity") == "restricted":
                # Chosen by the user, for clusters that impose nothing.
                report = [r for r in report if r[1] != "EXI-ARCH-26"]
            self.assertEqual(report, [], name)

    def test_the_default_profile_has_no_security_context_at_all(self):
        for name, values in chart.value_sets().items():
            text = chart.render_text(values)
            restricted = values.get("podSecurity") == "restricted"
            self.assertEqual("securityContext" in text, restricted, name)

    def test_the_restricted_profile_is_kubernetes_own(self):
        for name in ("restricted", "fetched-claim"):
            for manifest in chart.render(chart.value_sets()[name]):
                for _, spec in chart.pod_templates(manifest):
                    self.assertEqual(spec["securityContext"], {"runAsNonRoot": True, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}})
                    for container in policy.containers(spec):
                        self.assertEqual(container["securityContext"], {
                            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}})

    def test_argo_children_render_alone_and_keep_all_rules(self):
        folder = chart.ROOT / "charts" / "argocd"
        root = yaml.safe_load((folder / "root.yaml").read_text())
        self.assertEqual(root["spec"]["source"]["path"], "charts/argocd/apps")
        children = [yaml.safe_load(p.read_text()) for p in sorted((folder / "apps").glob("*.yaml"))]
        self.assertGreater(len(children), 1)
        self.assertEqual(len({c["metadata"]["name"] for c in children}), len(children))
        for child in children:
            helm = child["spec"]["source"]["helm"]
            manifests = chart.render(helm["valuesObject"], release=helm["releaseName"])
            self.assertEqual(policy.report(manifests), [])
            self.assertNotIn("dependsOn", yaml.safe_dump(child))
        for application in [root, *children]:
            chart.validate(application, chart.minors()[-1])


if __name__ == "__main__":
    unittest.main()
