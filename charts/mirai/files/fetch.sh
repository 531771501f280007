# Copies the model from the object store and accepts it only whole: every file of the manifest, with its checksum.
# Files that are there and right are kept, so a restarted pod does not copy again.
cd "${MODELS:-/models}"
sums="${CHECKSUMS:-/etc/mirai/checksums}/SHA256SUMS"
if sha256sum -c "$sums" >/dev/null 2>&1; then
  echo "model is here and right"
  exit 0
fi
sed 's/^[0-9a-f]*  //' "$sums" | rclone copy --files-from - --checksum --transfers 8 "$SOURCE" .
sha256sum -c "$sums"
