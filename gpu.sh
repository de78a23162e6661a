#!/usr/bin/env bash
# About 150 s: tests on the GPU, a sweep of blocks, layers against impl="torch", stencils against cuDNN.
export PYTHONPATH="$PWD:$PYTHONPATH"
timeout 60 python3 -m pytest -q -n 12 -p no:cacheprovider tests/attnzoo/test_triton_linear.py 2>&1 | grep -E "^E  .*Error|FAILED|passed|failed|error" | cut -c1-220 | tail -25
timeout 25 python3 -m pytest -q -n 12 -p no:cacheprovider tests/attnzoo/test_triton.py -k "stencil or depthwise" 2>&1 | tail -3
timeout 100 python3 gpu_linear.py
