#!/usr/bin/env bash
# Everything that needs a GPU, in parts of less than ten minutes each:
#
#   benchmarks/run_on_gpu.sh tests            scoat-fast doctor and the test suite, on the GPU where a test can use it
#   benchmarks/run_on_gpu.sh sanitize         the kernels under compute-sanitizer
#   benchmarks/run_on_gpu.sh hopper           the convolutions for Hopper: their tests, and both ways to lie in shared memory
#   benchmarks/run_on_gpu.sh model            forward pass: the engine, its single steps, and eager
#   benchmarks/run_on_gpu.sh compiled [WIDTH] forward pass: the engine, eager and torch.compile (default: 32)
#   benchmarks/run_on_gpu.sh tune             the engine with tiles tuned on this GPU, which are printed
#   benchmarks/run_on_gpu.sh train            a step of training: eager, torch.compile and SCOATNet
#   benchmarks/run_on_gpu.sh cohort           many scans, from files to files
#   benchmarks/run_on_gpu.sh ops              the fused operations: Triton, CUDA, eager and torch.compile
#   benchmarks/run_on_gpu.sh weights DATA     trains scoat-w32 at 512x512 (goes on where it was stopped)
#
# Each builds the extension first, which needs nvcc, pybind11 and ninja, and ends within LIMIT seconds (default: 580) with
# what it has by then. Results go to $OUT (default: out/gpu), in eight files at most.
# COMMIT names what is measured, where there is no git. WHEELS is a folder of wheels to use, where nothing can be
# downloaded: pip download --only-binary=:all: --no-deps --python-version 3.12 -d FOLDER nibabel pydicom
# TILES is the tiles.json of an earlier tune, to go on from.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
out=${OUT:-out/gpu}
run=${RUN:-/tmp/scoat-w32}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$site"
fi
# at most so many seconds, and none beyond the limit of the whole; pytest, interrupted once, says what had failed
within() {
  local left=$((${LIMIT:-580} - SECONDS)) most=$1 how=()
  shift
  [[ "$*" == *" pytest "* ]] && how=(--foreground -s INT)
  [ "$left" -ge 10 ] || { echo "no time left for: ${*:1:6}" >&2 && return 124; }
  timeout ${how[@]+"${how[@]}"} -k 15 "$((most < left ? most : left))" "$@"
}

python3 -c 'import nibabel, pydicom' || { echo "nibabel and pydicom are wanted: see WHEELS"; exit 1; }
python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || { echo "no CUDA GPU here"; exit 1; }
SCOAT_FAST_CUDA=1 python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 ||
  { echo "the extension could not be built:" && tail -5 "$out/build.log"; }
case $part in
  tests)
    # what it finds is not for the parts that come after
    XDG_CACHE_HOME=$(mktemp -d) within 120 python3 -m scoat_fast.cli doctor --device cuda --json "$out/doctor.json"
    # a test file whose library is lacking here costs the others nothing
    within 540 python3 -m pytest -v -n 8 --dist loadfile --tb=short -p no:cacheprovider \
      --continue-on-collection-errors >"$out/tests.log" 2>&1
    grep -E '^(FAILED|ERROR)|^E  |^=+ .*(passed|failed|error)' "$out/tests.log" | cut -c-200 | tail -60
    ;;
  sanitize)
    # without the caching allocator, so that every tensor has bounds of its own
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # first without a tool, under which Triton would compile for minutes
    within 100 python3 benchmarks/sanitize.py >"$out/plain.log" 2>&1
    echo "without a tool: exit code $?, $(tail -1 "$out/plain.log")"
    for tool in memcheck racecheck initcheck synccheck; do
      within $([ $tool = memcheck ] && echo 140 || echo 90) compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 benchmarks/sanitize.py >"$out/$tool.log" 2>&1
      code=$? summary=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)
      echo "$tool: exit code $code, ${summary:-$(tail -3 "$out/$tool.log")}"
    done
    ;;
  hopper)
    # both ways to lie in shared memory, each first with a few steps: what waits for ever then costs a minute
    for planes in False True; do
      way=$([ $planes = True ] && echo planes || echo swizzled)  # the latter in three dtypes, the former in one
      tests() { within "$1" python3 -m pytest --tb=short -p no:cacheprovider tests/test_engine_hopper.py \
        -k "$2 and $way" >>"$out/hopper_$way.log" 2>&1; }
      tests 60 "test_every_step_on_a_gpu and form0 and bfloat16" && tests $([ $planes = True ] && echo 70 || echo 150) gpu
      code=$?
      tail -n 15 "$out/hopper_$way.log"
      [ $code = 0 ] || { echo "$way: exit code $code, not timed" && continue; }
      within 90 python3 -c "
import sys
from scoat_fast import cli
from scoat_fast.engine import sm90a
sm90a.planes = $planes
sys.exit(cli.main(sys.argv[1:]))" bench model --width 32 --batch 32 --seconds 0.5 --details \
        --commit "$commit" -o "$out/hopper_$way.json" >>"$out/hopper_$way.log" 2>&1
      grep -E 'engine (triton|sm90a) [bf]|no time' "$out/hopper_$way.log"
    done
    # what limits the kernels, where counters may be read
    ! command -v ncu >/dev/null || within 60 ncu --clock-control none --section SpeedOfLight \
      --section WarpStateStats -k regex:convolve_tiles -c 20 python3 -c "
import scoat_fast, torch
net = scoat_fast.SCOATNet().cuda()
scoat_fast.compile(net, backend='sm90a', batch_sizes=(8,))(torch.rand(8, 1, 512, 512, device='cuda'))" >"$out/ncu.log" 2>&1
    ;;
  model)
    within 570 python3 -m scoat_fast.cli bench model --width 32 64 --batch 32 8 1 --seconds 1 --details \
      --commit "$commit" -o "$out/model.json" | tee "$out/model.log" | grep -v 'GFLOP/s'
    ;;
  compiled)
    # each row is saved as it is done; compiling takes most of the time, so the largest batch comes first
    width=${2:-32}
    within 570 python3 -m scoat_fast.cli bench model --width "$width" --batch 32 8 1 --compile --seconds 1 \
      --commit "$commit" -o "$out/model_compiled_w$width.json"
    ;;
  tune)
    [ -z "${TILES:-}" ] || install -D "$TILES" "$out/cache/scoat_fast/tiles.json"
    XDG_CACHE_HOME="$out/cache" within 570 python3 -m scoat_fast.cli bench model --width 32 --batch 32 --autotune \
      --seconds 1 --commit "$commit" -o "$out/model_tuned.json"
    cat "$out/cache/scoat_fast/tiles.json"
    ;;
  train)
    within 570 python3 -m scoat_fast.cli bench train --width 32 --batch 16 --compile --seconds 2 \
      --commit "$commit" -o "$out/train.json"
    ;;
  cohort)
    within 240 python3 -m scoat_fast.cli bench cohort examples/ct.nii.gz --copies 1000 --device cuda \
      --commit "$commit" -o "$out/cohort.json"
    # scans as large as a hospital's: 512x512, 300 slices
    within 320 python3 -m scoat_fast.cli bench cohort examples/ct.nii.gz --shape 512 512 300 --copies 40 \
      --rounds 2 --device cuda --commit "$commit" -o "$out/cohort_512.json"
    ;;
  ops)
    # each ends in good time, with the rows that it has by then; compiling takes seconds a row, so at one batch only
    log=$(mktemp)
    bench_ops() {
      within "$2" python3 -m scoat_fast.cli bench ops --device cuda --seconds 0.1 \
        --commit "$commit" -o "$out/$1.json" "${@:3}" >"$log" 2>&1 || { echo "$1: exit code $?" && tail -2 "$log"; }
      head -3 "$log" && grep 'no time' "$log" | cut -c-203 | head -10
      grep -E ' (triton|cuda) ' "$log" | grep -v 'no time' | cut -c-137 | head -18
      cat "$log" >>"$out/ops.log"
    }
    bench_ops ops_bfloat16 220 --layout channels_last --dtype bfloat16 --batch 32
    kernels="--implementation eager triton cuda"
    bench_ops ops_bfloat16_contiguous 60 --layout contiguous --dtype bfloat16 --batch 32 $kernels
    bench_ops ops_bfloat16_small 80 --layout both --dtype bfloat16 --batch 8 1 $kernels
    bench_ops ops_float16 80 --layout both --dtype float16 --batch 32 $kernels
    bench_ops ops_float32 90 --layout both --dtype float32 --batch 32 $kernels
    ;;
  weights)
    # ends in good time, so that what there is can be packed; the next call goes on from the last checkpoint
    within "${SECONDS_TO_TRAIN:-500}" python3 -m scoat_fast.cli train "${2:?the folder with index.csv}" -o "$run" \
      --width 32 --size 512 --epochs "${EPOCHS:-40}" --exclude rp04 --validate "${VALIDATE:-cc05,rp27}" 2>&1 | tail -30
    cp "$run"/metrics.csv "$run"/validation.json "$run"/config.json "$out/" 2>/dev/null
    # parts of less than 16 MiB; cat them together again
    [ -e "$run/weights.safetensors" ] && split -b 15M "$run/weights.safetensors" "$out/weights.safetensors."
    tail -3 "$out/metrics.csv"
    ;;
  *)
    sed -n '2,20p' "$0"
    exit 2
    ;;
esac
