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
# Each builds the extension first, which needs nvcc, pybind11 and ninja. Results go to $OUT (default: out/gpu), in eight
# files at most.
# COMMIT names what is measured, where there is no git. WHEELS is a folder of wheels to install first, where nothing can be
# downloaded: pip download --only-binary=:all: --no-deps --python-version 3.12 -d FOLDER nibabel pydicom
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
out=${OUT:-out/gpu}
run=${RUN:-/tmp/scoat-w32}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)}
[ -z "${WHEELS:-}" ] || python3 -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || exit 1

python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || { echo "no CUDA GPU here"; exit 1; }
SCOAT_FAST_CUDA=1 python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 ||
  { echo "the extension could not be built:" && tail -5 "$out/build.log"; }
case $part in
  tests)
    python3 -m scoat_fast.cli doctor --device cuda --json "$out/doctor.json"
    # a test file whose library is lacking here costs the others nothing
    timeout -k 10 540 python3 -m pytest -n 8 --dist loadfile --tb=short -p no:cacheprovider \
      --continue-on-collection-errors 2>&1 | tee "$out/tests.log" | tail -40
    ;;
  sanitize)
    # without the caching allocator, so that every tensor has bounds of its own
    for tool in memcheck racecheck initcheck synccheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 140 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 benchmarks/sanitize.py >"$out/$tool.log" 2>&1
      echo "$tool: exit code $?, $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)"
    done
    ;;
  hopper)
    # both ways to lie in shared memory, each first with a few steps: what waits for ever then costs a minute
    for planes in False True; do
      way=$([ $planes = True ] && echo planes || echo swizzled)  # the latter in three dtypes, the former in one
      tests() { timeout -k 10 "$1" python3 -m pytest --tb=short -p no:cacheprovider tests/test_engine_hopper.py \
        -k "$2 and $way" >>"$out/hopper_$way.log" 2>&1; }
      tests 60 "test_every_step_on_a_gpu and form0 and bfloat16" && tests $([ $planes = True ] && echo 70 || echo 150) gpu
      code=$?
      tail -n 15 "$out/hopper_$way.log"
      [ $code = 0 ] || { echo "$way: exit code $code, not timed" && continue; }
      timeout -k 10 90 python3 -c "
import sys
from scoat_fast import cli
from scoat_fast.engine import sm90a
sm90a.planes = $planes
sys.exit(cli.main(sys.argv[1:]))" bench model --width 32 --batch 32 --seconds 0.5 --details \
        --commit "$commit" -o "$out/hopper_$way.json" >>"$out/hopper_$way.log" 2>&1
      grep -E 'engine (triton|sm90a) [bf]|no time' "$out/hopper_$way.log"
    done
    # what limits the kernels, where counters may be read
    ! command -v ncu >/dev/null || timeout -k 10 60 ncu --clock-control none --section SpeedOfLight \
      --section WarpStateStats -k regex:convolve_tiles -c 20 python3 -c "
import scoat_fast, torch
net = scoat_fast.SCOATNet().cuda()
scoat_fast.compile(net, backend='sm90a', batch_sizes=(8,))(torch.rand(8, 1, 512, 512, device='cuda'))" >"$out/ncu.log" 2>&1
    ;;
  model)
    timeout -k 10 570 python3 -m scoat_fast.cli bench model --width 32 64 --batch 32 8 1 --seconds 1 --details \
      --commit "$commit" -o "$out/model.json" | tee "$out/model.log" | grep -v 'GFLOP/s'
    ;;
  compiled)
    # each row is saved as it is done; compiling takes most of the time, so the largest batch comes first
    width=${2:-32}
    timeout -k 10 570 python3 -m scoat_fast.cli bench model --width "$width" --batch 32 8 1 --compile --seconds 1 \
      --commit "$commit" -o "$out/model_compiled_w$width.json"
    ;;
  tune)
    # goes on where it was stopped, if $out is kept
    XDG_CACHE_HOME="$out/cache" timeout -k 10 570 python3 -m scoat_fast.cli bench model --width 32 --batch 32 --autotune \
      --seconds 1 --commit "$commit" -o "$out/model_tuned.json"
    cat "$out/cache/scoat_fast/tiles.json"
    ;;
  train)
    timeout -k 10 570 python3 -m scoat_fast.cli bench train --width 32 --batch 16 --compile --seconds 2 \
      --commit "$commit" -o "$out/train.json"
    ;;
  cohort)
    timeout -k 10 250 python3 -m scoat_fast.cli bench cohort examples/ct.nii.gz --copies 1000 --device cuda \
      --commit "$commit" -o "$out/cohort.json"
    # scans as large as a hospital's: 512x512, 300 slices
    timeout -k 10 320 python3 -m scoat_fast.cli bench cohort examples/ct.nii.gz --shape 512 512 300 --copies 40 \
      --rounds 2 --device cuda --commit "$commit" -o "$out/cohort_512.json"
    ;;
  ops)
    # each ends in good time, with the rows that it has by then; compiling takes seconds a row, so at one batch only
    log=$(mktemp)
    bench_ops() {
      timeout -k 10 "$2" python3 -m scoat_fast.cli bench ops --device cuda --layout both --seconds 0.1 \
        --commit "$commit" -o "$out/$1.json" "${@:3}" >"$log" 2>&1 || { echo "$1: exit code $?" && tail -2 "$log"; }
      head -3 "$log" && grep 'no time' "$log" | cut -c-203 | head -10
      grep -E ' (triton|cuda) ' "$log" | grep -v 'no time' | cut -c-137 | head -18
      cat "$log" >>"$out/ops.log"
    }
    bench_ops ops_bfloat16 250 --dtype bfloat16 --batch 32
    bench_ops ops_bfloat16_small 90 --dtype bfloat16 --batch 8 1 --implementation eager triton cuda
    bench_ops ops_float16 90 --dtype float16 --batch 32 --implementation eager triton cuda
    bench_ops ops_float32 110 --dtype float32 --batch 32 --implementation eager triton cuda
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
    sed -n '2,17p' "$0"
    exit 2
    ;;
esac
