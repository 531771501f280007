"""Renders the charts and judges single manifests. Knows no policy: `policy.py` does."""

import json
import os
import pathlib
import subprocess
import tempfile

import jsonschema
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHART = ROOT / "charts" / "mirai"
HELM = os.environ.get("MIRAI_TEST_HELM", "helm")
# The binary that judges configurations and serves in the tests that need a server.
MIRAI = os.environ.get("MIRAI_TEST_BINARY", str(ROOT / "target" / "debug" / "mirai"))

# PyYAML reads YAML 1.1 but not its `=`; everything else the safe loader does.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def value_sets():
    """Name -> values, of the matrix."""
    return {p.stem: yaml.load(p.read_text(), LOADER) for p in sorted((HERE / "values").glob("*.yaml"))}


def minors():
    """The three newest minors that the validator knows, as `1.N.P`."""
    folder = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    known = {tuple(map(int, p.name.lstrip("v").split("-")[0].split("."))) for p in folder.iterdir() if p.name.startswith("v")}
    newest = {}
    for version in known:
        newest[version[:2]] = max(version, newest.get(version[:2], version))
    return [".".join(map(str, newest[m])) for m in sorted(newest)[-3:]]


def helm(*args):
    """Runs helm and returns what it printed; its error otherwise."""
    done = subprocess.run([HELM, *args], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip() + done.stdout.strip())
    return done.stdout


def render_text(values, version="1.37.0", release="chat", command="template"):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        if command == "lint":
            return helm("lint", "--strict", str(CHART), "-f", file.name)
        return helm("template", release, str(CHART), "-f", file.name, "--kube-version", version, "-n", "mirai")


def documents(text):
    return [d for d in yaml.load_all(text, LOADER) if d]


def render(values, **k):
    return documents(render_text(values, **k))


def of_kind(manifests, kind):
    return [m for m in manifests if m["kind"] == kind]


def pod_templates(manifest):
    """Pods that a manifest makes: (metadata, spec) pairs."""
    kind, spec = manifest.get("kind"), manifest.get("spec") or {}
    if kind == "Pod":
        yield manifest.get("metadata") or {}, spec
    elif kind == "CronJob":
        template = spec["jobTemplate"]["spec"]["template"]
        yield template.get("metadata") or {}, template["spec"]
    elif kind == "LeaderWorkerSet":
        for name in ("leaderTemplate", "workerTemplate"):
            if template := spec["leaderWorkerTemplate"].get(name):
                yield template.get("metadata") or {}, template["spec"]
    elif kind == "ServingRuntime":
        pod = {k: v for k, v in spec.items() if k not in ("multiModel", "supportedModelFormats", "protocolVersions", "labels")}
        yield {"labels": spec.get("labels")}, pod
    elif "template" in spec:
        yield spec["template"].get("metadata") or {}, spec["template"].get("spec") or {}


def validate(manifest, version):
    """Raises where a manifest is not what an API server would take, to the field."""
    crd = HERE / "crds" / f"{manifest['kind']}.json"
    if crd.exists():
        jsonschema.validate(manifest, json.loads(crd.read_text()))
        # What such an object holds of a pod is a pod's.
        for metadata, spec in pod_templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **metadata}, "spec": spec}
            kubernetes_validate.validate(pod, version, strict=True)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)
