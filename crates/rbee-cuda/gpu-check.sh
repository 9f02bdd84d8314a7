#!/bin/sh
# Runs the tests and the bench of the kernels on this machine's GPU and writes report.md beside this script.
# Needs an NVIDIA driver of version 580 or later, and nothing else. Fails without a GPU, and when a test fails.
set -eu
cd "$(dirname "$0")"
{
    echo "# Kernels on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo 'no GPU'), $(date -u +%F)"
    echo
    code=0
    ./parity --nocapture 2>&1 || code=$?
    ./attention --nocapture 2>&1 || code=$?
    echo
    ./decode || code=$?
    echo "$code" >code
} | tee report.md
code=$(cat code)
rm code
exit "$code"
