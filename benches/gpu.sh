#!/usr/bin/env bash
# Everything that is to be known of a GPU, in one table: the tiny models of all families in f32 and bf16, then the steps of
# decode.rs. The machine with the GPU needs its driver, and neither a network nor Rust.
#
#   benches/gpu.sh pack DIR [MODEL]   on a machine with nvcc: puts programs, fixtures, this script (and a model's folder) there
#   DIR/gpu.sh run [DEVICE NUMBERS]   on the machine with the GPU (default cuda 'f32 bf16'); CUDA's libraries may lie in DIR/lib
set -euo pipefail

pack() {
  local out=$1 model=${2:-} root
  root=$(cd "$(dirname "$0")/.." && pwd)
  mkdir -p "$out"
  (cd "$root" && cargo build --release --locked --features cuda --example device --message-format=json \
    && cargo bench --locked --features cuda --bench decode --no-run --message-format=json) \
    | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    built = json.loads(line)
    name, program = built.get("target", {}).get("name"), built.get("executable")
    if program and name in ("device", "decode"):
        shutil.copy(program, sys.argv[1] + "/" + name)
' "$out"
  rm -rf "$out/tiny" && cp -r "$root/tests/fixtures/tiny" "$out/tiny"
  cp "$0" "$out/gpu.sh"
  if [ -n "$model" ]; then rm -rf "$out/model" && cp -rL "$model" "$out/model"; fi
  du -sh "$out"
}

run() {
  local here device=$1 numbers=$2 failed=0 dtype
  here=$(cd "$(dirname "$0")" && pwd)
  export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  if [ "${device#cuda}" != "$device" ]; then
    nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader
  fi
  echo "| model | numbers | what | result | verdict |"
  echo "|---|---|---|---|---|"
  for dtype in $numbers; do
    "$here/device" "$here/tiny" "$device" "$dtype" || failed=1
  done
  if [ -d "$here/model" ]; then
    for dtype in $numbers; do
      "$here/decode" json "device=$device" "dtype=$dtype" "model=$here/model" | python3 -c '
import json, sys
for line in sys.stdin:
    step = json.loads(line)
    what = "{prompts} x {tokens} tokens" if "prompts" in step else "{rows} rows at {start}"
    what = "32 rows while adapters load" if "uploads" in step else what.format(**step)
    rates = "{base:.0f} tokens/s, {adapters:.0f} with an adapter each".format(**step)
    if "uploads" in step:
        rates = "{adapters:.0f} tokens/s instead of {base:.0f}; adapters at {uploads:.1f} GB/s".format(**step)
    print(f"| model | {sys.argv[1]} | {what} | {rates} | |")
' "$dtype" || failed=1
    done
  fi
  return $failed
}

case ${1:-} in
  pack) pack "${2:?DIR}" "${3:-}" ;;
  run) run "${2:-cuda}" "${3:-f32 bf16}" ;;
  *) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' ;;
esac
