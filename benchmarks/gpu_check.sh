#!/usr/bin/env bash
# Proves the CUDA path on this machine: tests/cuda, then the GPU benchmark. Results and logs are in OUT, as they come.
#
#   benchmarks/gpu_check.sh OUT [WHEELS]        run; WHEELS: a folder of wheels, where there is no network
#   benchmarks/gpu_check.sh --fetch WHEELS      on a machine with a network: fill that folder for this Python's version
#
# What was done already in OUT is not done again, so that a check that was cut off goes on where it was.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
NEEDED="pydantic albumentations==2.0.8 pycocotools hotcoco timm rich typer jinja2 matplotlib pyyaml opencv-python-headless scipy"
PEER="pixeltable-yolox==0.4.3 loguru==0.7.3 psutil==7.2.2 tabulate==0.10.0 ultralytics==8.4.190 faster-coco-eval==1.8.0"

if [ "${1:-}" = "--fetch" ]; then
  mkdir -p "${2:?--fetch needs a folder}"
  # the rest of what these need (torch, numpy) is that of the machine with the GPU
  for name in $NEEDED $PEER pydantic-core annotated-types typing-inspection albucore stringzilla simsimd; do
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: ${PLATFORM:-} -d "$2" "$name" || echo "no wheel of $name"
  done
  exit
fi

OUT=$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)
if [ -n "${2:-}" ]; then
  export PIP_NO_INDEX=1 PIP_FIND_LINKS=$(cd "$2" && pwd)
fi
export PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1 HF_HUB_OFFLINE=1
export YOLOXKD_PEERS=$OUT/peers YOLOXKD_BENCH_OUT=$OUT/rows
export PYTHONPATH=$PWD:$OUT/site${PYTHONPATH:+:$PYTHONPATH}

step() {  # NAME COMMAND...: its output in OUT/NAME.log, its exit status in OUT/NAME.status; done already: nothing
  local name=$1
  shift
  if [ "$(cat "$OUT/$name.status" 2>/dev/null)" = 0 ]; then echo "$name: done before"; return; fi
  rm -f "$OUT/$name.status"
  "$@" 2>&1 | tee "$OUT/$name.log"
  echo "${PIPESTATUS[0]}" >"$OUT/$name.status"
}

missing() {  # installs beside this machine's packages what it lacks of ours
  local want=""
  for name in $NEEDED pydantic-core annotated-types typing-inspection albucore stringzilla simsimd; do
    "$PYTHON" -c "import importlib.metadata as m, sys; m.version(sys.argv[1].split('=')[0])" "$name" 2>/dev/null || want="$want $name"
  done
  [ -z "$want" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$OUT/site" $want
}

step machine "$PYTHON" -c "import sys, torch; print(sys.version); print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())"
step install missing
step tests-fast "$PYTHON" -m pytest tests/cuda -m "cuda and not slow" -v --durations=10 --junitxml="$OUT/tests-fast.xml"
step bench "$PYTHON" -m benchmarks.gpu
step tests-slow "$PYTHON" -m pytest tests/cuda -m "cuda and slow" -v --durations=10 --junitxml="$OUT/tests-slow.xml"

for name in machine install tests-fast bench tests-slow; do echo "$name: exit status $(cat "$OUT/$name.status" 2>/dev/null)"; done
! grep -qv '^0$' "$OUT"/*.status
