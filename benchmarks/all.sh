#!/bin/sh
# Every report of this folder, from an otherwise idle machine: about three hours on two cores.
# Needs 64 GB of disk under build/benchmarks and 20 GB of memory; what is made there is removed at the end.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -m benchmarks.decoder_speed
"$python" -m benchmarks.vision_speed
"$python" -m benchmarks.compress_speed
"$python" -m benchmarks.export_memory --shape 1b
"$python" -m benchmarks.export_memory --shape llava-next-13b
"$python" -m benchmarks.bnb_export --shape llava-next-13b
"$python" -m benchmarks.answer_memory
"$python" -m benchmarks.cpu_profile
"$python" -m benchmarks.prediction
"$python" -m benchmarks.session_speed
"$python" -m benchmarks.watch_endurance
"$python" -m benchmarks.serve_load
"$python" -m benchmarks.serve_cache
"$python" -m benchmarks.demo_accuracy
"$python" -m benchmarks.quantizers
"$python" -m benchmarks.weights_quality
rm -rf build/benchmarks
