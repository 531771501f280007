#!/bin/sh
# Builds the release binary so that two builds are the same bytes: the lock file, no paths of the machine, no time.
# usage: build.sh FILE
set -eu

cargo_home=${CARGO_HOME:-$HOME/.cargo}
rust=$(rustc --print sysroot)
export RUSTFLAGS="--remap-path-prefix=$PWD=/mirai --remap-path-prefix=$cargo_home=/cargo --remap-path-prefix=$rust=/rust"
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}" CARGO_INCREMENTAL=0
cargo build --release --locked -p mirai-cli
install -D -m 755 "${CARGO_TARGET_DIR:-target}/release/mirai" "$1"
