"""The image's root file system: what is in it, and that it serves as a random user, read-only, without a network."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import chart

IMAGE = chart.ROOT / "charts" / "image"
TOOLS = all(shutil.which(t) for t in ("apt-get", "dpkg-deb"))


def digest(folder):
    """One digest over paths, kinds, modes, times and contents."""
    listing = "cd \"$1\" && find . -print0 | LC_ALL=C sort -z | tar --no-recursion --null -T - --numeric-owner -c | sha256sum"
    return subprocess.run(["sh", "-c", listing, "sh", str(folder)], capture_output=True, text=True, check=True).stdout


@unittest.skipUnless(TOOLS, "no Debian: the root is made from its packages")
class Root(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.root = pathlib.Path(cls.folder) / "root"
        cls.make(cls.root)

    @staticmethod
    def make(root, *packages):
        subprocess.run(["sh", str(IMAGE / "root.sh"), str(root), *packages], check=True, env=os.environ | {"SOURCE_DATE_EPOCH": "0"})

    def test_it_is_small_and_has_nothing_to_run(self):
        size = sum(p.lstat().st_size for p in self.root.rglob("*") if p.is_file() and not p.is_symlink())
        self.assertLess(size, 15_000_000)
        programs = [p for p in self.root.rglob("*") if p.is_file() and os.access(p, os.X_OK) and ".so" not in p.name]
        self.assertEqual([str(p.relative_to(self.root)) for p in programs], [])

    def test_nobody_becomes_another_user(self):
        special = [p for p in self.root.rglob("*") if not p.is_symlink() and p.stat().st_mode & 0o6000]
        self.assertEqual(special, [])

    def test_scanners_find_the_packages(self):
        packages = {p.name for p in (self.root / "var/lib/dpkg/status.d").iterdir()}
        self.assertLessEqual({"libc6", "libgcc-s1", "ca-certificates", "tzdata", "base-files"}, packages)
        for name in packages:
            text = (self.root / "var/lib/dpkg/status.d" / name).read_text()
            self.assertRegex(text, rf"(?m)^Package: {re.escape(name)}$")
            self.assertRegex(text, r"(?m)^Version: \S+$")
            self.assertTrue((self.root / "usr/share/doc" / name / "copyright").exists(), name)
        self.assertIn("PRETTY_NAME", (self.root / "etc/os-release").read_text())

    def test_authorities_and_zones_are_there(self):
        self.assertGreater((self.root / "etc/ssl/certs/ca-certificates.crt").read_text().count("BEGIN CERTIFICATE"), 50)
        self.assertTrue((self.root / "usr/share/zoneinfo/Europe/Paris").exists())

    def test_two_builds_are_the_same_bytes(self):
        again = pathlib.Path(self.folder) / "again"
        self.make(again)
        self.assertEqual(digest(self.root), digest(again))

    def test_the_debug_variant_adds_a_shell(self):
        debug = pathlib.Path(self.folder) / "debug"
        self.make(debug, "busybox-static")
        done = subprocess.run([str(debug / "bin/busybox"), "echo", "here"], capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout, "here\n")
        self.assertTrue((debug / "bin/sh").is_symlink())

    @unittest.skipUnless(pathlib.Path(chart.MIRAI).exists(), f"no server at {chart.MIRAI}")
    @unittest.skipUnless(os.geteuid() == 0 or shutil.which("sudo"), "namespaces of its own need root")
    def test_it_serves_as_a_random_user_read_only_without_a_network(self):
        root = pathlib.Path(self.folder) / "served"
        shutil.copytree(self.root, root, symlinks=True)
        shutil.copy2(chart.MIRAI, root / "usr/bin/mirai")
        # As a platform does that gives each namespace a range of its own.
        uid = random.randrange(1_000_000_000, 1_000_999_999)
        print(f"user {uid}")
        here = pathlib.Path(__file__).parent
        command = [] if os.geteuid() == 0 else ["sudo", "-n"]
        command += ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", sys.executable, "namespace.py", str(root), str(uid)]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=180, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen = json.loads(done.stdout.splitlines()[-1])
        self.assertEqual(seen["uids"], [str(uid)] * 4)
        self.assertEqual(seen["gids"], ["0"] * 4)
        self.assertEqual(seen["interfaces"], ["lo"])
        self.assertEqual(seen["health"], 200)
        self.assertIn("--model", seen["answer"])
        self.assertGreater(seen["tokens"], 5)
        self.assertEqual(seen["writable"], [], "the root is read-only")
        self.assertEqual(seen["written"], ["log"], "nothing but the test's own log is written")
        self.assertEqual(seen["exit"], 0)
        self.assertNotIn("ERROR", seen["output"])


class Recipe(unittest.TestCase):
    def setUp(self):
        self.text = (IMAGE / "Containerfile").read_text()

    def test_the_four_targets_are_there(self):
        stages = re.findall(r"(?m)^FROM (\S+) AS (\S+)$", self.text)
        self.assertLessEqual({"mirai", "mirai-debug", "mirai-cuda", "mirai-cuda-debug"}, {name for _, name in stages})
        self.assertIn(("scratch", "mirai"), stages)

    def test_no_root_no_low_port_no_latest(self):
        user = re.search(r"(?m)^USER (\d+):(\d+)$", self.text)
        self.assertEqual((user.group(1), user.group(2)), ("65532", "0"))
        self.assertTrue(all(int(p) > 1024 for p in re.findall(r"(?m)^EXPOSE (\d+)$", self.text)))
        self.assertNotIn(":latest", self.text)
        self.assertIn("NVIDIA_DRIVER_CAPABILITIES=compute,utility", self.text)
        for label in ("title", "version", "revision", "licenses"):
            self.assertIn(f"org.opencontainers.image.{label}=", self.text)

    def test_the_builder_has_the_pinned_toolchain(self):
        toolchain = re.search(r'channel = "([^"]+)"', (chart.ROOT / "rust-toolchain.toml").read_text()).group(1)
        builder = re.search(r"(?m)^ARG BUILDER=\S+/rust:([0-9.]+)-", self.text).group(1)
        self.assertTrue(builder == toolchain or builder.startswith(toolchain + "."), (builder, toolchain))

    def test_cuda_libraries_are_pinned_by_digest(self):
        lines = [l for l in (IMAGE / "cuda.txt").read_text().splitlines() if l and not l.startswith("#")]
        names = {re.match(r"([a-z0-9-]+)==[0-9.]+ --hash=sha256:[0-9a-f]{64}$", l).group(1) for l in lines}
        self.assertEqual(names, {"nvidia-cublas", "nvidia-nccl-cu13"})


if __name__ == "__main__":
    unittest.main()
