#!/bin/sh
# Makes the image's root file system from Debian packages: unpacked, never installed, so nothing runs and no root is
# needed. No shell, no package manager, no set-uid file; scanners find the packages in /var/lib/dpkg/status.d.
# usage: root.sh FOLDER [PACKAGE ...]   further packages are the debug variant's
set -eu

root=$1
shift
# The package that holds libgcc's licence carries the compiler's number in its name.
gcc_base=$(apt-cache depends libgcc-s1 | sed -n 's/.*Depends: \(gcc-[0-9]*-base\)$/\1/p' | head -n 1)
packages="base-files ca-certificates $gcc_base libc6 libgcc-s1 tzdata $*"
triplet=$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || echo "$(uname -m)-linux-gnu")

debs=$(mktemp -d)
trap 'rm -rf "$debs"' EXIT
mkdir -p "$root"
root=$(cd "$root" && pwd)
# shellcheck disable=SC2086 # a list of words
(cd "$debs" && apt-get download -qq -o APT::Sandbox::User=root $packages)

mkdir -p "$root/var/lib/dpkg/status.d"
for deb in "$debs"/*.deb; do
    dpkg-deb -x "$deb" "$root"
    dpkg-deb -f "$deb" > "$root/var/lib/dpkg/status.d/$(dpkg-deb -f "$deb" Package)"
done

# What installing would have made.
mkdir -p "$root/etc/ssl/certs"
find "$root/usr/share/ca-certificates" -name '*.crt' | LC_ALL=C sort | xargs cat > "$root/etc/ssl/certs/ca-certificates.crt"
printf 'root:x:0:0:root:/root:/sbin/nologin\nmirai:x:65532:0:mirai:/tmp:/sbin/nologin\n' > "$root/etc/passwd"
printf 'root:x:0:\n' > "$root/etc/group"
printf 'hosts: files dns\n' > "$root/etc/nsswitch.conf"

# What a server needs not. Licences stay.
find "$root/usr/share/doc" -type f ! -name copyright -delete
for part in usr/share/man usr/share/locale usr/share/lintian usr/share/info usr/share/bug etc/update-motd.d \
    usr/share/zoneinfo/posix usr/share/zoneinfo/right usr/sbin/update-ca-certificates usr/sbin/tzconfig sbin/ldconfig \
    usr/bin etc/cron.d etc/init.d; do
    rm -rf "${root:?}/$part"
done
# The parts of iconv and the locales that only other encodings need.
rm -rf "$root/usr/lib/$triplet/gconv" "$root/usr/lib/locale"
find "$root" -perm /6000 -exec chmod ug-s {} +

# Mount points, and the one folder that is written to.
mkdir -p "$root/usr/bin" "$root/models" "$root/mnt/models" "$root/etc/mirai" "$root/var/lib/mirai" "$root/tmp"
chmod 1777 "$root/tmp"

# The debug variant's tools came in the folder that was emptied.
if [ $# -gt 0 ]; then
    for deb in "$debs"/*.deb; do
        case " $* " in
            *" $(dpkg-deb -f "$deb" Package) "*) dpkg-deb -x "$deb" "$root" ;;
        esac
    done
    [ ! -e "$root/bin/busybox" ] || ln -s busybox "$root/bin/sh"
fi

# Two builds from the same packages are the same bytes.
find "$root" -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
