"""The rules that the clusters enforce on manifests, one function a rule, and the framework's EXI-ARCH-26.

Each rule yields one sentence for each thing that is wrong. The names are the cluster policies' own.
"""

import re

from chart import pod_templates

LABELS = ("app", "env", "tier")
ENVIRONMENTS = {"dev", "formation", "qualif", "test", "preprod", "prod"}
TIERS = {"frontend", "backend", "db", "cache", "auth"}
REGISTRIES = ("docker.io/", "harbor.io/", "registry.redhat.io/", "quay.io/", "bitnami/", "ghcr.io/")
CREDENTIALS = re.compile(r"password|passwd|secret_key", re.IGNORECASE)
# Imposed by the platform, so not by a chart.
IMPOSED = ("runAsUser", "runAsGroup", "fsGroup", "allowPrivilegeEscalation")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}


def quantity(text):
    """A Kubernetes quantity as a number; `1e3` and `100m` included."""
    number, unit = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)(m|[kMGTPE]|[KMGTPE]i)?", str(text)).groups()
    return float(number) * (0.001 if unit == "m" else UNITS[unit or ""])


def containers(spec, init=True):
    yield from spec.get("containers", [])
    if init:
        yield from spec.get("initContainers", [])


def images(spec):
    yield from (c["image"] for c in containers(spec))
    yield from (v["image"]["reference"] for v in spec.get("volumes", []) if "image" in v)


def check_labels(manifest):
    for metadata, _ in pod_templates(manifest):
        labels = metadata.get("labels") or {}
        for name in LABELS:
            if not labels.get(name):
                yield f"a pod has no label {name}"
        if labels.get("env") and labels["env"] not in ENVIRONMENTS:
            yield f"label env is {labels['env']}"
        if labels.get("tier") and labels["tier"] not in TIERS:
            yield f"label tier is {labels['tier']}"


def cm_no_credentials(manifest):
    if manifest["kind"] == "ConfigMap":
        for key, text in {**(manifest.get("data") or {}), **(manifest.get("binaryData") or {})}.items():
            if CREDENTIALS.search(key) or CREDENTIALS.search(str(text)):
                yield f"{key} looks like a credential"


def disallow_latest(manifest):
    for _, spec in pod_templates(manifest):
        for image in images(spec):
            name = image.rsplit("/", 1)[-1]
            if "@" not in name and (":" not in name or name.endswith(":latest")):
                yield f"{image} has no tag of its own"


def disallow_hostpath(manifest):
    volumes = [v for _, spec in pod_templates(manifest) for v in spec.get("volumes", [])]
    if manifest["kind"] == "PersistentVolume":
        volumes.append(manifest["spec"])
    if any("hostPath" in v for v in volumes):
        yield "a volume is a path of the host"


def limit_size_pvc(manifest):
    claims = (manifest.get("spec") or {}).get("volumeClaimTemplates", [])
    claims = [manifest] if manifest["kind"] == "PersistentVolumeClaim" else claims
    for claim in claims:
        size = claim["spec"]["resources"]["requests"]["storage"]
        if quantity(size) >= 2**40:
            yield f"a claim of {size}"


def need_containers_ressources(manifest):
    for _, spec in pod_templates(manifest):
        for container in containers(spec):
            for part in ("requests", "limits"):
                for resource in ("cpu", "memory"):
                    if resource not in (container.get("resources") or {}).get(part, {}):
                        yield f"{container['name']} has no {part} of {resource}"


def restrict_image_registry(manifest):
    for _, spec in pod_templates(manifest):
        yield from (f"{i} is from elsewhere" for i in images(spec) if not i.startswith(REGISTRIES))


def restrict_nodeport(manifest):
    if manifest["kind"] == "Service" and manifest["spec"].get("type") == "NodePort":
        yield "a port of the node"


def need_liveness_readiness(manifest):
    if manifest["kind"] not in ("Job", "CronJob"):
        for _, spec in pod_templates(manifest):
            for container in containers(spec, init=False):
                for probe in ("livenessProbe", "readinessProbe"):
                    if probe not in container:
                        yield f"{container['name']} has no {probe}"


def exi_arch_26(manifest):
    """Nothing in a security context that the platform imposes by itself, and no path of the host."""
    yield from disallow_hostpath(manifest)
    for _, spec in pod_templates(manifest):
        for context in [spec, *containers(spec)]:
            security = context.get("securityContext") or {}
            yield from (f"{name} is set" for name in IMPOSED if name in security)
            if (security.get("capabilities") or {}).get("add"):
                yield "capabilities are added"


RULES = {
    "check-labels": check_labels,
    "cm-no-credentials": cm_no_credentials,
    "disallow-latest": disallow_latest,
    "disallow-hostpath": disallow_hostpath,
    "limit-size-pvc": limit_size_pvc,
    "need-containers-ressources": need_containers_ressources,
    "restrict-image-registry": restrict_image_registry,
    "restrict-nodeport": restrict_nodeport,
    "need-liveness-readiness": need_liveness_readiness,
    "EXI-ARCH-26": exi_arch_26,
}


def report(manifests):
    """[(kind/name, rule, sentence)], empty where all is well."""
    return [
        (f"{m['kind']}/{m['metadata']['name']}", name, wrong)
        for m in manifests for name, rule in RULES.items() for wrong in rule(m)
    ]
