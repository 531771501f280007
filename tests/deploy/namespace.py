"""Runs the image's root file system as a cluster would, and uses it. Started by `test_image.py` in namespaces of its own.

usage: namespace.py ROOT UID      (as root, under `unshare --mount --net --pid --fork`)

There is no network but loopback, the root is read-only, /tmp alone is written to, the user is nobody's. Prints JSON.
"""

import fcntl
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys

import running


def loopback_up():
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0x1 | 0x40)
        fcntl.ioctl(any_socket, 0x8914, request)


def mount(*args):
    subprocess.run(["mount", *args], check=True)


def main(root, uid):
    loopback_up()
    mount("--make-rprivate", "/")
    mount("--bind", root, root)
    mount("-t", "tmpfs", "-o", "size=64m,mode=1777,nosuid,nodev", "tmpfs", f"{root}/tmp")
    mount("-t", "proc", "proc", f"{root}/proc")
    for device in ("null", "urandom"):
        # The mount point is a file of the image's empty /dev; a container's runtime makes these too.
        pathlib.Path(f"{root}/dev/{device}").touch()
        mount("--bind", f"/dev/{device}", f"{root}/dev/{device}")
    mount("-o", "remount,bind,ro", root)
    command = ["/usr/sbin/chroot", f"--userspec={uid}:0", root, "/usr/bin/mirai", "serve", "--port", "8000"]
    environment = {"HOME": "/tmp", "LLVM_PROFILE_FILE": "/tmp/%p.profraw"}
    log = f"{root}/tmp/log"
    with running.process(command, log, environment) as server:
        running.until(lambda: server.says("ready in"), 60, "ready")
        status = pathlib.Path(f"{root}/proc/{server.child.pid}/status").read_text()
        question = {"model": "mirai-demo", "messages": [{"role": "user", "content": "How do I load a GGUF file?"}]}
        answer = running.post("http://127.0.0.1:8000/v1/chat/completions", question)
        result = {
            "uids": next(l for l in status.splitlines() if l.startswith("Uid:")).split()[1:],
            "gids": next(l for l in status.splitlines() if l.startswith("Gid:")).split()[1:],
            "interfaces": [name for _, name in socket.if_nameindex()],
            "health": running.get("http://127.0.0.1:8000/health/ready")[0],
            "answer": answer["choices"][0]["message"]["content"],
            "tokens": answer["usage"]["completion_tokens"],
            "writable": [p for p in ("/", "/etc", "/usr/bin", "/var/lib/mirai", "/models") if os.access(f"{root}{p}", os.W_OK)],
            "written": sorted(p.name for p in pathlib.Path(f"{root}/tmp").iterdir() if p.suffix != ".profraw"),
        }
        result["exit"] = server.end()
        result["output"] = server.output()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
