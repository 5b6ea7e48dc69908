#!/usr/bin/env bash
# In CI: fail the build where a checkpoint is damaged, or costs any language more than a bound.
#
#     bash examples/ci_gate.sh CHECKPOINT BOUND [OPTIONS OF quant-fairness measure]
#
# BOUND is KL to the 16-bit model in bits per byte, such as 0.05. Exit status: 0 it ships, 5 a bad or altered file, 6 a
# language lost more than the bound; the last line on stderr says which. Others: README.md, "Exit codes".
set -euo pipefail
checkpoint=${1:?usage: ci_gate.sh CHECKPOINT BOUND} bound=${2:?usage: ci_gate.sh CHECKPOINT BOUND}

quant-fairness verify "$checkpoint" # files, metadata, tensors, and the logits of a real reader
quant-fairness measure "$checkpoint" --gate "worst=$bound" "${@:3}"
