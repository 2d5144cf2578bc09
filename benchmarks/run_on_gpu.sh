#!/usr/bin/env bash
# Everything that needs a GPU, in parts of less than ten minutes each:
#
#   benchmarks/run_on_gpu.sh tests            the test suite, on the GPU where a test can use it
#   benchmarks/run_on_gpu.sh model            forward pass: eager and torch.compile
#   benchmarks/run_on_gpu.sh weights DATA     trains scoat-w32 at 512x512 (goes on where it was stopped)
#
# Results go to $OUT (default: out/gpu). COMMIT names what is measured, where there is no git.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
out=${OUT:-out/gpu}
run=${RUN:-/tmp/scoat-w32}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}

python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || { echo "no CUDA GPU here"; exit 1; }
case $part in
  tests)
    python3 -m pytest --tb=short -p no:cacheprovider 2>&1 | tee "$out/tests.log" | tail -40
    ;;
  model)
    python3 benchmarks/model.py --width 32 --size 512 --batch 1 8 32 --commit "$commit" -o "$out/model.json"
    ;;
  weights)
    # ends in good time, so that what there is can be packed; the next call goes on from the last checkpoint
    timeout "${SECONDS_TO_TRAIN:-500}" python3 -m scoat_fast.cli train "${2:?the folder with index.csv}" -o "$run" \
      --width 32 --size 512 --epochs "${EPOCHS:-40}" --exclude rp04 --validate "${VALIDATE:-cc05,rp27}" 2>&1 | tail -30
    cp "$run"/metrics.csv "$run"/validation.json "$run"/config.json "$out/" 2>/dev/null
    # parts of less than 16 MiB; cat them together again
    [ -e "$run/weights.safetensors" ] && split -b 15M "$run/weights.safetensors" "$out/weights.safetensors."
    tail -3 "$out/metrics.csv"
    ;;
  *)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
