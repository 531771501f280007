"""The chart over its matrix: it lints, renders, validates, repeats itself, and sets every option of the server."""

import copy
import json
import math
import pathlib
import re
import stat
import subprocess
import tempfile
import tomllib
import unittest

import jsonschema

import chart
import options
import policy

# Content of the files that values name, good enough for `check-config`.
SECRETS = {
    "applications": "", "pepper": "1 " + "p" * 43 + "\n", "user-key": "1 " + "u" * 43 + "\n", "chain-key": "1 " + "c" * 43 + "\n",
}

SETS = chart.value_sets()
DEMO = SETS["demo"]


def merged(base, extra):
    out = copy.deepcopy(base)
    for key, value in extra.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def toml_of(manifests):
    config = [m for m in chart.of_kind(manifests, "ConfigMap") if "mirai.toml" in m["data"]]
    assert len(config) == 1
    return config[0]["data"]["mirai.toml"]


def pod_of(manifests):
    return next(t for m in manifests for t in chart.pod_templates(m))


class Matrix(unittest.TestCase):
    def test_it_is_wide_enough(self):
        self.assertGreaterEqual(len(SETS), 12)
        kinds = {m["kind"] for values in SETS.values() for m in chart.render(values)}
        own = {p.stem for p in (chart.HERE / "crds").glob("*.json")} - {"Application"}
        self.assertLessEqual(own, kinds, "a schema that nothing is held to")
        self.assertLessEqual({"Deployment", "StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget"}, kinds)

    def test_every_set_lints(self):
        for name, values in SETS.items():
            try:
                chart.render_text(values, command="lint")
            except ValueError as error:
                self.fail(f"{name}: {error}")

    def test_every_manifest_is_valid_for_the_three_newest_minors(self):
        versions = chart.minors()
        self.assertEqual(len(versions), 3)
        for version in versions:
            for name, values in SETS.items():
                for manifest in chart.render(values, version=version):
                    try:
                        chart.validate(manifest, version)
                    except Exception as error:  # noqa: BLE001 - each validator has its own, and all mean the same
                        self.fail(f"{name}, {version}, {manifest['kind']}: {error}")

    def test_validation_can_fail(self):
        """An unknown field anywhere, and in every kind of object of ours, is an error."""
        version, seen = chart.minors()[-1], set()
        for values in SETS.values():
            for manifest in chart.render(values):
                if manifest["kind"] in seen:
                    continue
                seen.add(manifest["kind"])
                part = "spec" if "spec" in manifest else "metadata"
                manifest[part]["noSuchField"] = 1
                with self.assertRaises(Exception, msg=manifest["kind"]):
                    chart.validate(manifest, version)
        for values, where in ((SETS["nodes"], "LeaderWorkerSet"), (SETS["kserve"], "ServingRuntime"), (DEMO, "StatefulSet")):
            manifest = chart.of_kind(chart.render(values), where)[0]
            next(chart.pod_templates(manifest))[1]["containers"][0]["livenessProbe"]["noSuchField"] = 1
            with self.assertRaises(Exception, msg=where):
                chart.validate(manifest, version)

    def test_the_same_values_render_the_same_bytes(self):
        for name, values in SETS.items():
            turned = json.loads(json.dumps(values), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
            self.assertEqual(chart.render_text(values), chart.render_text(turned), name)

    def test_a_changed_configuration_is_another_pod_template(self):
        for name in ("demo", "scaled", "nodes", "fetched"):
            before = chart.render(SETS[name])
            after = chart.render(merged(SETS[name], {"config": {"engine": {"max_num_seqs": 17}}}))
            self.assertNotEqual(pod_of(before), pod_of(after), name)
            maps = [chart.of_kind(m, "ConfigMap") for m in (before, after)]
            for old, new in zip(*maps):
                self.assertTrue(old["immutable"] and new["immutable"])
                self.assertEqual(old["metadata"]["name"] == new["metadata"]["name"], old["data"] == new["data"])
        sums = {"model": {"fetch": {"checksums": {"config.json": "0" * 64}}}}
        self.assertNotEqual(pod_of(chart.render(SETS["fetched"])), pod_of(chart.render(merged(SETS["fetched"], sums))))


class Schema(unittest.TestCase):
    def refused(self, extra, base=DEMO, saying=""):
        with self.assertRaises(ValueError, msg=extra) as caught:
            chart.render(merged(base, extra))
        self.assertIn("meet the specifications of the schema", str(caught.exception), extra)
        self.assertIn(saying, str(caught.exception))

    def test_it_is_closed(self):
        """A key that no one knows is refused in every map that has known ones."""
        closed = 0

        def walk(schema, path):
            nonlocal closed
            if schema.get("type") == "object" and "properties" in schema:
                extra = "unknown_key"
                nested = {extra: 1}
                for key in reversed(path):
                    nested = {key: nested}
                self.refused(nested, saying=extra)
                closed += 1
                for key, inner in schema["properties"].items():
                    walk(inner, [*path, key])

        schema = json.loads((chart.CHART / "values.schema.json").read_text())
        jsonschema.Draft7Validator.check_schema(schema)
        walk(schema, [])
        self.assertGreater(closed, 20)

    def test_what_has_no_meaning_is_refused(self):
        for extra in (
            {"image": {"tag": "latest"}}, {"image": {"tag": ""}}, {"image": {"repository": "mirai"}},
            {"image": {"repository": "ghcr.io/a/b:1"}}, {"image": {"pullPolicy": "Always"}}, {"image": {"digest": "sha256:12"}},
            {"labels": {"env": "production"}}, {"labels": {"tier": "gpu"}}, {"auth": {"existingSecret": ""}},
            {"replicas": 2}, {"kind": "LeaderWorkerSet"}, {"kind": "ServingRuntime"}, {"autoscaling": {"enabled": True}},
            {"ledger": {"store": "none"}}, {"ledger": {"store": "postgres"}}, {"ledger": {"size": "1Ti"}},
            {"ledger": {"store": "postgres", "url": "postgres://u@h/d", "ephemeral": True}}, {"ledger": {"url": "postgres://u:secret@h/d"}},
            {"identity": {"applications": {"configMap": "a"}}},
            {"model": {"source": "pvc"}}, {"model": {"source": "image"}}, {"model": {"source": "fetch"}},
            {"model": {"source": "kserve"}}, {"model": {"path": "../etc"}}, {"model": {"path": "/etc"}}, {"model": {"sizeGiB": 0}},
            {"tls": {"clientCa": {"configMap": "ca"}}}, {"env": [{"name": "A"}]}, {"env": [{"name": "A", "value": "b", "secret": "s"}]},
            {"mounts": [{"name": "a", "mountPath": "/a"}]}, {"mounts": [{"name": "a", "mountPath": "a", "secret": "s"}]},
            {"config": {"server": {"port": 80}}}, {"config": {"server": {"timeouts": {"shutdown_seconds": None}}}},
            {"config": {"server": {"api_key": "k"}}}, {"config": {"ledger": {"password": "k"}}}, {"config": {"Server": {}}},
            {"inferencePool": {"pool": True}}, {"podSecurity": "privileged"},
        ):
            self.refused(extra)
        checksums = {"model": {"fetch": {"checksums": {"../x": "0" * 64}}}}
        self.refused(checksums, base=SETS["fetched"])
        self.refused({"model": {"fetch": {"checksums": {"x": "0"}}}}, base=SETS["fetched"])

    def test_one_writer_of_a_file_unless_its_rows_may_go(self):
        kinds = lambda extra: {m["kind"] for m in chart.render(merged(DEMO, extra))}  # noqa: E731
        self.assertIn("StatefulSet", kinds({}))
        many = {"replicas": 3, "ledger": {"ephemeral": True}}
        self.assertIn("Deployment", kinds(many))
        self.assertIn("Deployment", kinds({"replicas": 3, "ledger": {"store": "postgres", "url": "postgres://u@h/d"}}))
        claim = chart.of_kind(chart.render(DEMO), "StatefulSet")[0]["spec"]
        self.assertEqual(claim["replicas"], 1)
        self.assertEqual(len(claim["volumeClaimTemplates"]), 1)

    def test_where_rows_go(self):
        """A file on the claim; or a database, whose password never stands in a ConfigMap, and a spool beside it."""
        store = lambda name: tomllib.loads(toml_of(chart.render(SETS[name])))["ledger"]  # noqa: E731
        self.assertEqual(store("demo"), {"store": "sqlite:///var/lib/mirai/ledger.sqlite"})
        self.assertEqual(store("scaled"), {"store": "postgres://mirai@ledger-rw/mirai", "spool": "/var/lib/mirai/spool"})
        spec = pod_of(chart.render(SETS["scaled"]))[1]
        secret = {"secretKeyRef": {"name": "ledger", "key": "password"}}
        self.assertIn({"name": "MIRAI_LEDGER_PASSWORD", "valueFrom": secret}, spec["containers"][0]["env"])
        self.assertIn({"name": "ledger", "emptyDir": {"sizeLimit": "10Gi"}}, spec["volumes"])
        self.assertIn("chain_key_file", store("identity"))


class Pods(unittest.TestCase):
    def test_what_every_pod_has(self):
        for name, values in SETS.items():
            for manifest in chart.render(values):
                for _, spec in chart.pod_templates(manifest):
                    self.check_pod(name, manifest["kind"], spec)

    def check_pod(self, name, kind, spec):
        if kind != "ServingRuntime":
            self.assertIs(spec["enableServiceLinks"], False, name)
            self.assertIs(spec["automountServiceAccountToken"], False, name)
        for container in spec["containers"] + spec.get("initContainers", []):
            self.assertEqual(container["resources"]["requests"], container["resources"]["limits"], name)
            self.assertEqual(container["imagePullPolicy"], "IfNotPresent")
            mounts = {m["name"]: m for m in container["volumeMounts"]}
            self.assertEqual(mounts["tmp"]["mountPath"], "/tmp")
            self.assertLessEqual(set(mounts), {v["name"] for v in spec["volumes"]} | {"ledger"}, name)
        server = spec["containers"][0]
        writable = {m["mountPath"] for m in server["volumeMounts"] if not m.get("readOnly")}
        self.assertLessEqual(writable, {"/tmp", "/var/lib/mirai", "/dev/shm"}, name)
        for volume in spec["volumes"]:
            if "emptyDir" in volume:
                self.assertTrue(volume["emptyDir"]["sizeLimit"], name)

    def test_probes_ask_the_right_paths(self):
        for name, values in SETS.items():
            server = pod_of(chart.render(values))[1]["containers"][0]
            for probe, path in (("startupProbe", "startup"), ("livenessProbe", "live"), ("readinessProbe", "ready")):
                if name == "mutual-tls":
                    self.assertEqual(server[probe]["tcpSocket"], {"port": "http"})
                    continue
                scheme = "HTTPS" if name == "tls" else "HTTP"
                self.assertEqual(server[probe]["httpGet"], {"path": f"/health/{path}", "port": "http", "scheme": scheme}, name)

    def test_the_startup_budget_follows_the_models_size(self):
        for size, rate, warmup in ((1, 100, 60), (57, 400, 60), (640, 2000, 120), (0.5, 33.3, 0)):
            model = {"sizeGiB": size, "readMiBPerSecond": rate, "warmupSeconds": warmup}
            probe = pod_of(chart.render(merged(DEMO, {"model": model})))[1]["containers"][0]["startupProbe"]
            seconds = warmup + 2 * size * 1024 / rate
            self.assertGreaterEqual(probe["failureThreshold"] * probe["periodSeconds"], seconds)
            self.assertLess(probe["failureThreshold"] * probe["periodSeconds"], seconds + 11)

    def test_grace_covers_the_drain(self):
        for name, values in SETS.items():
            manifests = chart.render(values)
            timeouts = tomllib.loads(toml_of(manifests))["server"]["timeouts"]
            drain = timeouts["drain_delay_seconds"] + timeouts["shutdown_seconds"]
            for manifest in manifests:
                spec = manifest["spec"]["predictor"] if manifest["kind"] == "InferenceService" else None
                spec = spec or next((s for _, s in chart.pod_templates(manifest)), {})
                if "terminationGracePeriodSeconds" in spec:
                    self.assertEqual(spec["terminationGracePeriodSeconds"], math.ceil(drain + 10), name)

    def test_nothing_is_reachable_from_outside_by_itself(self):
        for name, values in SETS.items():
            manifests = chart.render(values)
            self.assertFalse({"Ingress", "Route", "Secret"} & {m["kind"] for m in manifests}, name)
            for service in chart.of_kind(manifests, "Service"):
                self.assertEqual(service["spec"]["type"], "ClusterIP")
            for policy in chart.of_kind(manifests, "NetworkPolicy"):
                self.assertEqual(policy["spec"]["policyTypes"], ["Ingress", "Egress"])
                self.assertTrue(all(rule["from"] for rule in policy["spec"]["ingress"]))

    def test_replicas_are_spread_and_evicted_one_by_one(self):
        manifests = chart.render(SETS["gpu-claim"])
        keys = [c["topologyKey"] for c in pod_of(manifests)[1]["topologySpreadConstraints"]]
        self.assertEqual(keys, ["topology.kubernetes.io/zone", "kubernetes.io/hostname"])
        self.assertEqual(chart.of_kind(manifests, "PodDisruptionBudget")[0]["spec"]["maxUnavailable"], 1)
        self.assertEqual(chart.of_kind(manifests, "Deployment")[0]["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"], 0)
        self.assertEqual(chart.of_kind(chart.render(DEMO), "PodDisruptionBudget"), [])

    def test_selectors_find_the_pods(self):
        for name, values in SETS.items():
            manifests = chart.render(values)
            labels = pod_of(manifests)[0]["labels"].items()
            for manifest in manifests:
                spec = manifest.get("spec", {})
                selector = spec.get("podSelector") or spec.get("selector") or {}
                if manifest["kind"] == "ServiceMonitor":
                    service = chart.of_kind(manifests, "Service")[0]
                    self.assertLessEqual(selector["matchLabels"].items(), service["metadata"]["labels"].items(), name)
                    ports = {p["name"] for p in service["spec"]["ports"]}
                    self.assertLessEqual({e["port"] for e in spec["endpoints"]}, ports)
                else:
                    self.assertLessEqual(selector.get("matchLabels", selector).items(), labels, f"{name} {manifest['kind']}")

    def test_administration_has_a_door_of_its_own(self):
        manifests = chart.render(SETS["identity"])
        ports = {p["name"]: p["containerPort"] for p in pod_of(manifests)[1]["containers"][0]["ports"]}
        self.assertEqual(ports, {"http": 8000, "admin": 8001})
        rules = {r["ports"][0]["port"]: r["from"] for r in chart.of_kind(manifests, "NetworkPolicy")[0]["spec"]["ingress"]}
        self.assertEqual(rules["admin"], [{"podSelector": {"matchLabels": {"app": "finance"}}}])
        closed = chart.of_kind(chart.render(merged(SETS["identity"], {"networkPolicy": {"adminFrom": []}})), "NetworkPolicy")[0]
        self.assertNotIn("admin", [r["ports"][0]["port"] for r in closed["spec"]["ingress"]])

    def test_the_bundle_of_authorities_is_mounted(self):
        spec = pod_of(chart.render(SETS["tls"]))[1]
        server = spec["containers"][0]
        self.assertIn({"name": "SSL_CERT_FILE", "value": "/etc/mirai/ca/bundle.pem"}, server["env"])
        self.assertIn({"name": "ca", "mountPath": "/etc/mirai/ca", "readOnly": True}, server["volumeMounts"])
        self.assertIn({"name": "ca", "configMap": {"name": "internal-ca"}}, spec["volumes"])
        secret = {"secretKeyRef": {"name": "break-glass", "key": "bearer"}}
        self.assertIn({"name": "MIRAI_API_KEY", "valueFrom": secret}, server["env"])

    def test_gpus_and_shared_memory(self):
        spec = pod_of(chart.render(SETS["gpu-four"]))[1]
        self.assertEqual(spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], 4)
        shm = [v for v in spec["volumes"] if v["name"] == "shm"][0]
        self.assertEqual(shm["emptyDir"], {"medium": "Memory", "sizeLimit": "8Gi"})
        self.assertIn("image", [v for v in spec["volumes"] if v["name"] == "model"][0])
        self.assertEqual(tomllib.loads(toml_of(chart.render(SETS["gpu-four"])))["model"]["device"], "cuda")


class Fetching(unittest.TestCase):
    """The init container's own script, with an rclone that copies from a folder."""

    RCLONE = "#!/bin/sh\n[ \"$1\" = copy ] || exit 9\nfor a; do last=$a; prev2=$prev; prev=$a; done\n" \
             "while read -r f; do mkdir -p \"$(dirname \"$last/$f\")\"; cp \"$prev2/$f\" \"$last/$f\"; done\necho copied >> \"$CALLS\"\n"

    def run_script(self, folder, damage=None, before=None):
        """Runs it on a store of two files; returns (exit code, calls of rclone, what is in the volume)."""
        root = pathlib.Path(folder)
        store, models, sums, tools = (root / n for n in ("store", "models", "sums", "bin"))
        for part in (store / "sub", models, sums, tools):
            part.mkdir(parents=True, exist_ok=True)
        (store / "config.json").write_text("{}")
        (store / "sub/weights").write_text("w" * 1000)
        names = ["config.json", "sub/weights"]
        manifest = subprocess.run(["sha256sum", *names], cwd=store, capture_output=True, text=True, check=True).stdout
        (sums / "SHA256SUMS").write_text(manifest)
        if damage:
            damage(store)
        if before:
            before(models)
        (tools / "rclone").write_text(self.RCLONE)
        (tools / "rclone").chmod(stat.S_IRWXU)
        manifest = pod_of(chart.render(SETS["fetched"]))[1]["initContainers"][0]
        self.assertEqual(manifest["command"], ["sh", "-euc"])
        env = {"PATH": f"{tools}:/usr/bin:/bin", "SOURCE": str(store), "MODELS": str(models), "CHECKSUMS": str(sums), "CALLS": str(root / "calls")}
        done = subprocess.run([*manifest["command"], *manifest["args"]], env=env, capture_output=True, check=False)
        calls = (root / "calls").read_text().count("copied") if (root / "calls").exists() else 0
        return done.returncode, calls, {str(p.relative_to(models)) for p in models.rglob("*") if p.is_file()}

    def test_a_whole_copy_is_taken_and_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(self.run_script(folder), (0, 1, {"config.json", "sub/weights"}))
            self.assertEqual(self.run_script(folder)[:2], (0, 1), "what is right is not copied again")

    def test_a_changed_or_missing_file_is_refused(self):
        for damage in (lambda s: (s / "sub/weights").write_text("v" * 1000), lambda s: (s / "config.json").unlink()):
            with tempfile.TemporaryDirectory() as folder:
                self.assertNotEqual(self.run_script(folder, damage=damage)[0], 0)

    def test_a_torn_copy_is_made_anew(self):
        with tempfile.TemporaryDirectory() as folder:
            torn = lambda m: (m / "config.json").write_text("{")  # noqa: E731
            self.assertEqual(self.run_script(folder, before=torn)[:2], (0, 1))


class Options(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        if not pathlib.Path(chart.MIRAI).exists():
            raise unittest.SkipTest(f"no server at {chart.MIRAI}: build it, or name one in MIRAI_TEST_BINARY")
        cls.options = options.tree()

    def test_every_option_can_be_set_through_the_chart(self):
        flat = dict(options.flat(self.options))
        self.assertGreater(len(flat), 70)
        self.assertEqual([path for path, value in flat.items() if value is None], [], "no value found: add a candidate")
        wanted = copy.deepcopy(self.options)
        # Where the chart itself has bounds.
        wanted["server"]["port"] = 8007
        manifests = chart.render(merged(DEMO, {"config": wanted}))
        # What must not stand in a ConfigMap by its name goes by the environment.
        env = {e["name"]: e["value"] for e in pod_of(manifests)[1]["containers"][0]["env"] if "value" in e}
        self.assertEqual(env["MIRAI__LEDGER__PASSWORD_FILE"], wanted["ledger"].pop("password_file"))
        self.assertEqual(tomllib.loads(toml_of(manifests)), wanted)
        self.assertEqual(policy.report(manifests), [])

    def test_the_server_takes_what_the_chart_writes(self):
        for name, values in SETS.items():
            text = toml_of(chart.render(values))
            with tempfile.TemporaryDirectory() as folder:
                keys = pathlib.Path(folder) / "keys"
                keys.write_text("0123456789abcdef\n")
                secret = values["auth"] if "auth" in values else {}
                text = text.replace(f"/etc/mirai/auth/{secret.get('key', 'api-keys')}", str(keys))
                for name, content in SECRETS.items():
                    file = pathlib.Path(folder) / name
                    file.write_text(content)
                    text = re.sub(rf'"/etc/mirai/{name}/[^"]*"', f'"{file}"', text)
                accepted, said = options.ask(text)
                self.assertTrue(accepted, f"{name}: {said}\n{text}")

    def test_the_server_refuses_what_it_does_not_know(self):
        accepted, said = options.ask("[server]\nno_such_option = 1\n")
        self.assertFalse(accepted)
        self.assertIn("no_such_option", said)

    def test_strings_survive_the_way_to_the_server(self):
        odd = 'a "quoted" \\ <tag> & é\ttab'
        text = toml_of(chart.render(merged(DEMO, {"config": {"model": {"served_names": [odd]}}})))
        self.assertEqual(tomllib.loads(text)["model"]["served_names"], [odd])


if __name__ == "__main__":
    unittest.main()
