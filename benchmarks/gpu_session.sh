#!/usr/bin/env bash
# Runs everything that needs a GPU, ordered by value, in about half an hour:
#     bash benchmarks/gpu_session.sh OUT [CIFAR_FOLDER [TINY_IMAGENET_FOLDER]]
#
# Works with one card (both ranks on it, through gloo) or two (NCCL), torch 2.6 to 2.14, and without network.
# Each step is bounded, writes OUT/<step>.log and, where it has figures, OUT/<step>.json as soon as it ends; a step that fails or
# runs out of time does not stop the others. OUT/summary.txt has a line for each step. SCALE=0.2 shortens all limits (a rehearsal);
# DEVICE=cpu rehearses on a machine without a GPU; STEPS="check lrn" runs only these.
set -u
out=${1:?usage: bash benchmarks/gpu_session.sh OUT [CIFAR_FOLDER [TINY_IMAGENET_FOLDER]]}
cifar=${2:-}
tiny=${3:-}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
device=${DEVICE:-cuda}
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
ranks=("$python" -m torch.distributed.run --standalone --nproc_per_node=2)
large="1024"
[ "$device" = cpu ] && large="8"
batch="128"
[ "$device" = cpu ] && batch="8"

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit code began seconds
    limit=$(awk -v s="$2" -v k="${SCALE:-1}" 'BEGIN { print int(s * k) + 5 }')
    shift 2
    if [ -n "${STEPS:-}" ] && [[ " $STEPS " != *" $name "* ]]; then return; fi
    began=$(date +%s)
    timeout --kill-after=20 "$limit" "$@" > "$out/$name.log" 2>&1
    code=$?
    seconds=$(( $(date +%s) - began ))
    case $code in
        0) result=ok ;;
        124 | 137) result="out of time ($limit s)" ;;
        *) result="exit code $code: $(grep -v '^\s*$' "$out/$name.log" | tail -n 1 | cut -c1-160)" ;;
    esac
    printf '%-22s %5d s  %s\n' "$name" "$seconds" "$result" | tee -a "$out/summary.txt"
}

: > "$out/summary.txt"
{ date -u; "$python" -c "import torch; print('torch', torch.__version__)"; nvidia-smi 2>/dev/null; nvidia-smi topo -m 2>/dev/null; } > "$out/machine.log" 2>&1

step check 90 "${ranks[@]}" launch/check.py --device "$device" --json "$out/check.json"
step cuda-tests 240 "$python" -m pytest -q -m cuda -n 0 -p no:cacheprovider
step lrn 90 "$python" benchmarks/lrn.py --device "$device" --json "$out/lrn.json"
step throughput 240 "$python" benchmarks/throughput.py --device "$device" --mode training \
    --precision fp32 bf16 --batch-size $batch --json "$out/throughput.json"
step throughput-compiled 240 "$python" benchmarks/throughput.py --device "$device" --mode training \
    --precision bf16 --batch-size $batch $large --compile yes --json "$out/throughput-compiled.json"
[ "$device" = cpu ] || step throughput-cuda-graphs 180 "$python" benchmarks/throughput.py --device "$device" \
    --mode training --precision bf16 --batch-size $batch $large --compile cuda-graphs --json "$out/throughput-cuda-graphs.json"
step throughput-large 180 "$python" benchmarks/throughput.py --device "$device" --mode training \
    --precision bf16 --batch-size $large --rows torchvision one two --json "$out/throughput-large.json"
step exchange 120 "$python" benchmarks/exchange.py --device "$device" --json "$out/exchange.json"
step profile 60 "${ranks[@]}" launch/train.py --preset paper --device "$device" --precision bf16 --profile \
    --max-steps 24 --out "$out/profile-run"
step demo 120 "${ranks[@]}" launch/train.py --device "$device" --out "$out/demo-run"
step faults 240 "$python" tests/faults/table.py
if [ -n "$cifar" ]; then
    step original-cifar10 300 "${ranks[@]}" launch/train.py --preset original --device "$device" --data folder \
        --data-dir "$cifar" --precision bf16 --epochs 90 --save-every 200 --out "$out/original-run"
fi
if [ -n "$tiny" ]; then
    # 24 trainings, 16 at a time: 8 minutes on an H200 if the Multi-Process Service lets them share it.
    service=true
    [ "$device" = cuda ] && command -v nvidia-cuda-mps-control > /dev/null && service=nvidia-cuda-mps-control
    "$service" -d
    step ablations 600 "$python" benchmarks/ablations.py --device "$device" --data folder --data-dir "$tiny" \
        --precision bf16 --epochs "${EPOCHS:-25}" --seeds 3 --jobs "${JOBS:-16}" --threads 1 --time-limit 570 \
        --claims lrn overlap columns talking color crops dropout views --out "$out/ablations" --json "$out/ablations.json"
    echo quit | "$service"
fi
echo "results in $out"
