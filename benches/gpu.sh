#!/usr/bin/env bash
# Everything that is to be known of a GPU: the tiny models of all families in f32 and bf16, then gpu.rs on models of random
# weights, beside transformers and PEFT where they are installed, and the steps of decode.rs on a model that was packed. The
# machine with the GPU needs its driver, and neither a network nor Rust.
#
#   benches/gpu.sh pack DIR [MODEL]   on a machine with nvcc: puts programs, fixtures, this script (and a model's folder) there
#   DIR/gpu.sh run [DEVICE NUMBERS SHAPES]   on the machine with the GPU (default cuda 'f32 bf16' '1b 8b'); CUDA's libraries
#                                     may lie in DIR/lib, or be PyTorch's. FEATURES=flash-attn packs a program with that feature
set -euo pipefail

pack() {
  local out=$1 model=${2:-} root
  root=$(cd "$(dirname "$0")/.." && pwd)
  mkdir -p "$out"
  (cd "$root" && cargo build --release --locked --features "${FEATURES:-cuda}" --example device --message-format=json \
    && cargo bench --locked --features "${FEATURES:-cuda}" --bench decode --bench gpu --no-run --message-format=json) \
    | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    built = json.loads(line)
    name, program = built.get("target", {}).get("name"), built.get("executable")
    if program and name in ("device", "decode", "gpu"):
        shutil.copy(program, sys.argv[1] + "/" + name)
' "$out"
  rm -rf "$out/tiny" && cp -r "$root/tests/fixtures/tiny" "$out/tiny"
  strip "$out/device" "$out/decode" "$out/gpu"
  cp "$0" "$out/gpu.sh"
  cp "$root/benches/gpu_peft.py" "$out/gpu_peft.py"
  if [ -n "$model" ]; then rm -rf "$out/model" && cp -rL "$model" "$out/model"; fi
  du -sh "$out"
}

run() {
  local here device=$1 numbers=$2 shapes=$3 failed=0 dtype libraries peft
  here=$(cd "$(dirname "$0")" && pwd)
  # Where PyTorch is, CUDA's libraries are packages of Python's.
  libraries=$(python3 -c '
import glob, nvidia
print(":".join(folder for root in nvidia.__path__ for folder in glob.glob(root + "/*/lib")))
' 2> /dev/null || true)
  export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}${libraries:+:$libraries}"
  if [ "${device#cuda}" != "$device" ]; then
    nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader || true
  fi
  echo "| model | numbers | what | result | verdict |"
  echo "|---|---|---|---|---|"
  for dtype in $numbers; do
    "$here/device" "$here/tiny" "$device" "$dtype" || failed=1
  done
  # Large models are written there for a while.
  export TMPDIR=$here
  # shellcheck disable=SC2086  # words of their own
  "$here/gpu" "device=$device" "dtype=${numbers##* }" $shapes || failed=1
  if [ "${device#cuda}" != "$device" ] && [[ " $shapes " == *" 1b "* ]]; then
    if peft=$(python3 "$here/gpu_peft.py" 2> "$here/peft.log"); then
      echo "| 1b | transformers and PEFT, 32 sequences, as many adapters | $peft tokens/s | | |"
    else
      echo "| 1b | transformers and PEFT | not run: $(tail -n 1 "$here/peft.log") | | |"
    fi
  fi
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
  run) run "${2:-cuda}" "${3:-f32 bf16}" "${4:-1b 8b}" ;;
  *) sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' ;;
esac
