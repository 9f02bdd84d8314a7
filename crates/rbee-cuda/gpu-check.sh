#!/bin/sh
# Runs the tests and the bench of what computes on GPUs on this machine's own and writes report.md beside this script.
# Needs an NVIDIA driver of version 580 or later, and nothing else. Fails without a GPU, and when a test fails.
set -eu
cd "$(dirname "$0")"
{
    echo "# Kernels on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo 'no GPU'), $(date -u +%F)"
    echo
    code=0
    ./parity --nocapture 2>&1 || code=$?
    ./attention --nocapture 2>&1 || code=$?
    RBEE_FIXTURES="$PWD/fixtures" ./it cuda:: --nocapture --test-threads=1 2>&1 || code=$?
    echo
    ./decode || code=$?
    echo
    models=$(mktemp -d)
    ./gpu "$models" || code=$?
    if python3 -c 'import torch, transformers' 2>/dev/null; then
        python3 gpu_transformers.py "$models/1.1b" "$models/8b" || echo "transformers was not measured"
    else
        echo "transformers is not measured: python3 has no torch and transformers here"
    fi
    rm -rf "$models"
    echo "$code" >code
} | tee report.md
code=$(cat code)
rm code
exit "$code"
